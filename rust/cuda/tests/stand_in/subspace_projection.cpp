#include "emulation.hpp"

#include "../../kernels/element.cuh"
#include "../../kernels/subspace_projection.cu"

#define EVERY_RANK(name) EMULATE(name##_16) EMULATE(name##_32)
#define EVERY_TYPE(name) EVERY_RANK(name##_f32) EVERY_RANK(name##_bf16) EVERY_RANK(name##_f16)

EVERY_TYPE(transposed_single)
EVERY_TYPE(transposed_pair)
EVERY_TYPE(straight_single)
EVERY_TYPE(straight_pair)
EMULATE(add_chunks)
EMULATE(add_squares)
