// The squared distance between the unit vectors of hidden states h and reference states h0, and its gradient.
//
// With d = h - h0, the forward reduces |d|^2, <d, h0> and |h0|^2 of every token in one read. It then adds tokens to
// sequences and sequences to one number, each in a fixed order. d is computed in float32. The sums are float64, in
// which products of float32 are exact: if states mostly grow or shrink, the three sums nearly cancel. Data center GPUs
// have the float64 rate for it; on other GPUs it takes about twice as long as the read.

constexpr int LAYERS = 48;  // 48 * 64 bytes, within the 4 KiB of a launch's parameters
constexpr int WARPS = 8;
constexpr int UNROLL = 4;

// One layer's hidden states [batch, tokens, hidden], strides in elements. The gradient is contiguous.
struct Layer {
    const char* features;
    const char* reference;
    char* gradient;
    long long features_strides[2];
    long long reference_strides[2];
    int hidden;
    int aligned;  // whether every token starts at a multiple of 16 bytes
};

struct Layers {
    Layer layer[LAYERS];
};

// The tokens that count, and the sequences they form.
struct Tokens {
    const unsigned char* mask;
    long long mask_strides[2];
    const int* order;   // [batch, tokens]: tokens that count, by sequence, then the rest; null: no packing
    const int* starts;  // [batch, tokens + 1]: where sequences start in `order`, then where the last one ends
    const int* counts;  // [batch]: number of sequences in a batch row
    int batch;
    int tokens;
};

struct Sums {
    double squared, dot, norm;
};

// The gradient of one token is of_difference * d - of_features * h. If `of_difference` is zero, the gradient is zero
// whatever values the token holds.
struct Factor {
    float of_difference, of_features;
};

__device__ inline bool counts(const Tokens& tokens, int row, int token) {
    return tokens.mask[row * tokens.mask_strides[0] + token * tokens.mask_strides[1]] != 0;
}

template <class Element>
__device__ inline void add(Sums& sums, const uint4& features, const uint4& reference) {
    float h[Element::WIDTH], h0[Element::WIDTH];
    unpack<Element>(features, h);
    unpack<Element>(reference, h0);
#pragma unroll
    for (int index = 0; index < Element::WIDTH; ++index) {
        const double d = h[index] - h0[index], of_reference = h0[index];
        sums.squared = fma(d, d, sums.squared);
        sums.dot = fma(d, of_reference, sums.dot);
        sums.norm = fma(of_reference, of_reference, sums.norm);
    }
}

// One warp per token. `sums` is [layers, batch, tokens]; tokens that do not count are neither read nor written.
template <class Element>
__device__ inline void token_sums(const Layers& layers, const Tokens& tokens, int first, Sums* sums) {
    const int lane = threadIdx.x % 32;
    const long long number = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const long long rows = static_cast<long long>(tokens.batch) * tokens.tokens;
    if (number >= rows) return;
    const int row = static_cast<int>(number / tokens.tokens), token = static_cast<int>(number % tokens.tokens);
    if (!counts(tokens, row, token)) return;

    const Layer& layer = layers.layer[blockIdx.y];
    const char* h = layer.features + (row * layer.features_strides[0] + token * layer.features_strides[1]) * Element::SIZE;
    const char* h0 = layer.reference + (row * layer.reference_strides[0] + token * layer.reference_strides[1]) * Element::SIZE;
    const int whole = layer.hidden / Element::WIDTH, rest = layer.hidden % Element::WIDTH;
    Sums sum = {0.0, 0.0, 0.0};
    int group = lane;
    if (layer.aligned) {
        const uint4* wide = reinterpret_cast<const uint4*>(h);
        const uint4* wide0 = reinterpret_cast<const uint4*>(h0);
        for (; group + 32 * (UNROLL - 1) < whole; group += 32 * UNROLL) {
            uint4 features[UNROLL], reference[UNROLL];
#pragma unroll
            for (int step = 0; step < UNROLL; ++step) {
                features[step] = wide[group + 32 * step];
                reference[step] = wide0[group + 32 * step];
            }
#pragma unroll
            for (int step = 0; step < UNROLL; ++step) add<Element>(sum, features[step], reference[step]);
        }
        for (; group < whole; group += 32) add<Element>(sum, wide[group], wide0[group]);
    }
    for (; group < whole + (rest > 0); group += 32) {
        const int count = group < whole ? Element::WIDTH : rest;
        const int offset = group * Element::WIDTH * Element::SIZE;
        add<Element>(sum, load_some<Element>(h + offset, count), load_some<Element>(h0 + offset, count));
    }
    sum = {warp_sum(sum.squared), warp_sum(sum.dot), warp_sum(sum.norm)};
    if (lane == 0) sums[(first + blockIdx.y) * rows + number] = sum;
}

enum Normalize { SEQUENCE = 0, TOKEN = 1, NONE = 2 };

// With p = |h| and q = |h0|: (|d|^2 - (p - q)^2)/(pq), gradient 2/(pq) * (d - ((<d, h0> + |d|^2)/p^2) * h). A zero
// vector has no direction: its unit vector is taken as zero, and so is its gradient. NaN stays NaN.
__device__ inline double unit_distance(const Sums& sums, Factor& factor) {
    const double growth = 2.0 * sums.dot + sums.squared;
    double p_squared = sums.norm + growth;
    if (p_squared < 0.0) p_squared = 0.0;
    const double p = sqrt(p_squared), q = sqrt(sums.norm);
    factor = {0.0f, 0.0f};
    if (p == 0.0 || (q == 0.0 && p == p)) return p == 0.0 && q == 0.0 ? 0.0 : 1.0;
    const double gap = growth / (p + q);
    const double scale = 2.0 / (p * q);
    factor = {static_cast<float>(scale), static_cast<float>(scale * ((sums.dot + sums.squared) / p_squared))};
    return 0.5 * scale * (sums.squared - gap * gap);
}

// Distance and factors of one batch row of one layer. Grid: (batch, layers) blocks of four warps. `distances` is
// [layers, batch], `sequences` is [batch].
extern "C" __global__ void __launch_bounds__(128)
    sequence_factors(const Tokens tokens, int normalize, const Sums* sums, Factor* factors, double* distances, int* sequences) {
    __shared__ double by_warp[4];
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long base = (static_cast<long long>(blockIdx.y) * tokens.batch + row) * tokens.tokens;
    sums += base;
    factors += base;
    const bool packed = tokens.order != nullptr;
    const int* order = packed ? tokens.order + static_cast<long long>(row) * tokens.tokens : nullptr;
    const int* starts = packed ? tokens.starts + static_cast<long long>(row) * (tokens.tokens + 1) : nullptr;
    const int count = packed ? tokens.counts[row] : 1;

    double distance = 0.0;
    int seen = 0;
    for (int sequence = warp; sequence < count; sequence += 4) {
        const int start = packed ? starts[sequence] : 0, end = packed ? starts[sequence + 1] : tokens.tokens;
        Sums sum = {0.0, 0.0, 0.0};
        double of_tokens = 0.0;
        int counted = 0;
        for (int position = start + lane; position < end; position += 32) {
            const int token = packed ? order[position] : position;
            if (!counts(tokens, row, token)) {
                factors[token] = {0.0f, 0.0f};
                continue;
            }
            counted = 1;
            if (normalize == SEQUENCE) {
                sum.squared += sums[token].squared;
                sum.dot += sums[token].dot;
                sum.norm += sums[token].norm;
            } else if (normalize == TOKEN) {
                Factor factor;
                of_tokens += unit_distance(sums[token], factor);
                factors[token] = factor;
            } else {
                of_tokens += sums[token].squared;
                factors[token] = {2.0f, 0.0f};
            }
        }
        if (!__any_sync(0xffffffffu, counted)) continue;
        seen += 1;
        if (normalize != SEQUENCE) {
            distance += warp_sum(of_tokens);
            continue;
        }
        sum = {warp_sum(sum.squared), warp_sum(sum.dot), warp_sum(sum.norm)};
        Factor factor;
        distance += unit_distance(sum, factor);
        for (int position = start + lane; position < end; position += 32) {
            const int token = packed ? order[position] : position;
            if (counts(tokens, row, token)) factors[token] = factor;
        }
    }
    if (packed) {
        for (int position = starts[count] + threadIdx.x; position < tokens.tokens; position += 128) factors[order[position]] = {0.0f, 0.0f};
    }
    if (lane == 0) by_warp[warp] = distance;
    __syncthreads();
    if (threadIdx.x == 0) {
        distances[blockIdx.y * tokens.batch + row] = by_warp[0] + by_warp[1] + by_warp[2] + by_warp[3];
        if (blockIdx.y == 0) sequences[row] = packed ? count : seen;
    }
}

// The sum over layers and the mean over sequences, and the share of one sequence for the gradient. One block, one warp.
extern "C" __global__ void __launch_bounds__(32)
    total_distance(int layers, int batch, const double* distances, const int* sequences, float* share, float* result) {
    double sum = 0.0, count = 0.0;
    for (int index = threadIdx.x; index < layers * batch; index += 32) sum += distances[index];
    for (int row = threadIdx.x; row < batch; row += 32) count += sequences[row];
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (threadIdx.x == 0) {
        *share = count > 0.0 ? static_cast<float>(1.0 / count) : 0.0f;
        *result = count > 0.0 ? static_cast<float>(sum / count) : 0.0f;
    }
}

template <class Element>
__device__ inline uint4 differentiate(const Factor& factor, const uint4& features, const uint4& reference) {
    float h[Element::WIDTH], h0[Element::WIDTH];
    unpack<Element>(features, h);
    unpack<Element>(reference, h0);
#pragma unroll
    for (int index = 0; index < Element::WIDTH; ++index) {
        const float d = h[index] - h0[index];
        h[index] = fmaf(factor.of_difference, d, -(factor.of_features * h[index]));
    }
    return pack<Element>(h);
}

// One warp per token: `weight` (the scalar from autograd) times the gradient, in the dtype of the features. `factors`
// is [layers, batch, tokens], for the given layers starting at layer `first`.
template <class Element>
__device__ inline void gradient(const Layers& layers, int batch, int tokens, int first, const Factor* factors, const float* weight) {
    const int lane = threadIdx.x % 32;
    const long long number = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const long long rows = static_cast<long long>(batch) * tokens;
    if (number >= rows) return;
    const int row = static_cast<int>(number / tokens), token = static_cast<int>(number % tokens);
    const Layer& layer = layers.layer[blockIdx.y];
    Factor factor = factors[(first + blockIdx.y) * rows + number];
    factor = {factor.of_difference * *weight, factor.of_features * *weight};
    const bool zero = factor.of_difference == 0.0f;

    const char* h = layer.features + (row * layer.features_strides[0] + token * layer.features_strides[1]) * Element::SIZE;
    const char* h0 = layer.reference + (row * layer.reference_strides[0] + token * layer.reference_strides[1]) * Element::SIZE;
    char* output = layer.gradient + number * layer.hidden * Element::SIZE;
    const int whole = layer.hidden / Element::WIDTH, rest = layer.hidden % Element::WIDTH;
    int group = lane;
    if (layer.aligned) {
        const uint4* wide = reinterpret_cast<const uint4*>(h);
        const uint4* wide0 = reinterpret_cast<const uint4*>(h0);
        uint4* written = reinterpret_cast<uint4*>(output);
        if (zero) {
            for (; group < whole; group += 32) written[group] = make_uint4(0, 0, 0, 0);
        }
        for (; group + 32 * (UNROLL - 1) < whole; group += 32 * UNROLL) {
            uint4 features[UNROLL], reference[UNROLL];
#pragma unroll
            for (int step = 0; step < UNROLL; ++step) {
                features[step] = wide[group + 32 * step];
                reference[step] = wide0[group + 32 * step];
            }
#pragma unroll
            for (int step = 0; step < UNROLL; ++step)
                written[group + 32 * step] = differentiate<Element>(factor, features[step], reference[step]);
        }
        for (; group < whole; group += 32) written[group] = differentiate<Element>(factor, wide[group], wide0[group]);
    }
    for (; group < whole + (rest > 0); group += 32) {
        const int count = group < whole ? Element::WIDTH : rest;
        const int offset = group * Element::WIDTH * Element::SIZE;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (!zero) {
            value = differentiate<Element>(factor, load_some<Element>(h + offset, count), load_some<Element>(h0 + offset, count));
        }
        store_some<Element>(output + offset, value, count);
    }
}

#define KERNELS(name, Element)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)                                                                 \
        token_sums_##name(const __grid_constant__ Layers layers, const Tokens tokens, int first, Sums* sums) {                  \
        token_sums<Element>(layers, tokens, first, sums);                                                                       \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)                                                                 \
        gradient_##name(const __grid_constant__ Layers layers, int batch, int tokens, int first, const Factor* factors,           \
                        const float* weight) {                                                                                  \
        gradient<Element>(layers, batch, tokens, first, factors, weight);                                                       \
    }

KERNELS(f32, F32)
KERNELS(bf16, Bf16)
KERNELS(f16, F16)
