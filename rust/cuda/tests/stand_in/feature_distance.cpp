#include "emulation.hpp"

#include "../../kernels/element.cuh"
#include "../../kernels/feature_distance.cu"

EMULATE(token_sums_f32)
EMULATE(token_sums_bf16)
EMULATE(token_sums_f16)
EMULATE(sequence_factors)
EMULATE(total_distance)
EMULATE(gradient_f32)
EMULATE(gradient_bf16)
EMULATE(gradient_f16)
