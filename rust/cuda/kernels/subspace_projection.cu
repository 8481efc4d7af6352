// Products of many matrices V with thin factors X in one launch: V^T X (contraction over the rows of V) and V X (over
// its columns). V is aligned - base of a pair of weights, or one matrix; it is formed in float32 and never stored.
//
// bfloat16 tensor cores multiply float32 numbers as sums of bfloat16 parts: a pair of 16-bit weights has two parts, a
// float32 has three. Products of parts that float32 would round away are left out. Each step of 16 is summed from zero
// on the tensor core, which truncates, and then added to the total in float32, which rounds.
//
// The order of a contraction is free as long as both operands share it. So every lane loads 16 adjacent elements of a
// row of V and uses them in place, without exchange or shared memory. A block takes a tile of V. Sums of tiles that
// belong together are stored separately and added in their order.

constexpr int WARPS = 4;

// One module. V is [rows, columns], row-major with a stride; X and the result are contiguous, with `rank` columns.
struct Module {
    const char* aligned;
    const char* base;
    const float* factor;
    long long aligned_stride;
    long long base_stride;
    long long result;    // offset of the result among all results
    int rows;
    int columns;
    int rank;
    int is_aligned;      // whether every row of both weights starts and ends at a multiple of 16 bytes
    int tiles;           // along the axis that is not contracted
    int chunks;          // along the contraction
    int first;           // index of its first block
    int first_finished;  // index of its first block among those that add chunks
};

// The bfloat16 parts of two numbers, largest first.
template <int PARTS>
__device__ inline void split(float low, float high, unsigned (&parts)[PARTS]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        parts[part] = pack_bf16(low, high);
        low -= __uint_as_float(parts[part] << 16);
        high -= __uint_as_float(parts[part] & 0xffff0000u);
    }
}

#ifndef SAFELORA_EMULATED
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// One step of 16: all products of parts whose indices add up to less than LEAST, the smallest first.
template <int A_PARTS, int B_PARTS>
__device__ inline void step(float (&total)[4], const unsigned (&a)[A_PARTS][4], const unsigned (&b)[2][B_PARTS]) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int place = 2; place >= 0; --place) {
#pragma unroll
        for (int part = 0; part < A_PARTS; ++part) {
            const int other = place - part;
            if (other >= 0 && other < B_PARTS) multiply_add(sum, a[part], b[0][other], b[1][other]);
        }
    }
#pragma unroll
    for (int index = 0; index < 4; ++index) total[index] += sum[index];
}

// Data of a module that a loop needs, in registers. FAST: every group of adjacent elements is complete and aligned to
// its size. Elements beyond an edge are then replaced by earlier ones, without a branch: X is zero there, or the result
// is not stored.
template <class Element, bool PAIR, bool FAST>
struct Operands {
    const char *aligned, *base;
    const float* factor;
    long long aligned_stride, base_stride;
    int rows, columns, rank;

    __device__ explicit Operands(const Module& module)
        : aligned(module.aligned), base(module.base), factor(module.factor), aligned_stride(module.aligned_stride * Element::SIZE),
          base_stride(module.base_stride * Element::SIZE), rows(module.rows), columns(module.columns), rank(module.rank) {}

    __device__ bool has(int row, int column) const { return row < rows && column < columns; }

    // Loads WIDTH adjacent elements of one row of both weights.
    __device__ void load(int row, int column, uint4& left, uint4& right) const {
        if (FAST) {
            const int inside = min(row, rows - 1), offset = min(column, columns - Element::WIDTH) * Element::SIZE;
            left = __ldg(reinterpret_cast<const uint4*>(aligned + inside * aligned_stride + offset));
            if (PAIR) right = __ldg(reinterpret_cast<const uint4*>(base + inside * base_stride + offset));
        } else {
            const int count = row < rows ? columns - column : 0, offset = column * Element::SIZE;
            left = load_some<Element>(aligned + row * aligned_stride + offset, count);
            if (PAIR) right = load_some<Element>(base + row * base_stride + offset, count);
        }
    }

    // Loads COUNT adjacent elements of one row of X, which has `length` of them; zeros beyond its edges.
    template <int COUNT>
    __device__ void load_factor(int length, int row, int column, float (&x)[COUNT]) const {
        if (FAST) {
            const float* address = factor + static_cast<long long>(min(row, length - 1)) * rank + min(column, rank - COUNT);
            if (COUNT == 4) {
                const float4 four = __ldg(reinterpret_cast<const float4*>(address));
                x[0] = four.x, x[1] = four.y, x[COUNT - 2] = four.z, x[COUNT - 1] = four.w;
            } else {
                const float2 two = __ldg(reinterpret_cast<const float2*>(address));
                x[0] = two.x, x[1] = two.y;
            }
            const bool there = row < length && column < rank;
#pragma unroll
            for (int index = 0; index < COUNT; ++index) x[index] = there ? x[index] : 0.0f;
        } else {
            const float* address = factor + static_cast<long long>(row) * rank + column;
#pragma unroll
            for (int index = 0; index < COUNT; ++index) x[index] = row < length && column + index < rank ? __ldg(address + index) : 0.0f;
        }
    }
};

template <class Element, bool PAIR>
__device__ inline void difference(const uint4& aligned, const uint4& base, float (&v)[Element::WIDTH]) {
    unpack<Element>(aligned, v);
    if (PAIR) {
        float other[Element::WIDTH];
        unpack<Element>(base, other);
#pragma unroll
        for (int index = 0; index < Element::WIDTH; ++index) v[index] -= other[index];
    }
}

template <class Element>
__device__ inline double squares(const float (&v)[Element::WIDTH]) {
    float sum = 0.0f;
#pragma unroll
    for (int index = 0; index < Element::WIDTH; ++index) sum = fmaf(v[index], v[index], sum);
    return sum;
}

// The part of a module that a block computes.
struct Block {
    const Module& module;
    int tile, chunk, group;  // group: 16 * RANK_TILES columns of X
    long long slot;
};

__device__ inline Block find(const Module* modules, const int* owners) {
    const Module& module = modules[owners[blockIdx.x]];
    const int index = blockIdx.x - module.first, of_group = module.tiles * module.chunks;
    return {module, index % of_group / module.chunks, index % module.chunks, index / of_group, blockIdx.x};
}

// Where a block stores element (index along the tile, rank): in the result, or among the sums of chunks.
template <int TILE, int RANKS>
struct Target {
    float* start;
    int stride, places, ranks;
    bool wide;  // whether four adjacent ranks, the first a multiple of four, can be stored at once

    __device__ Target(const Block& block, int of_module, float* results, float* partial) {
        const int first = block.tile * TILE, rank = block.group * RANKS;
        const bool whole = block.module.chunks == 1;
        places = of_module - first;
        ranks = block.module.rank - rank;
        stride = whole ? block.module.rank : RANKS;
        start = whole ? results + block.module.result + static_cast<long long>(first) * stride + rank
                      : partial + block.slot * (TILE * RANKS);
        wide = stride % 4 == 0 && reinterpret_cast<unsigned long long>(start) % 16 == 0;
    }

    __device__ void put(int place, int rank, float value) const {
        if (place < places && rank < ranks) start[place * stride + rank] = value;
    }

    __device__ void put(int place, int rank, const float4& four) const {
        if (wide) {
            if (place < places && rank < ranks) *reinterpret_cast<float4*>(start + place * stride + rank) = four;
            return;
        }
        put(place, rank, four.x);
        put(place, rank + 1, four.y);
        put(place, rank + 2, four.z);
        put(place, rank + 3, four.w);
    }
};

// V^T X: lane (g, t) of a warp, with g = lane / 4 and t = lane % 4, has rows 4t .. 4t + 3 of 16 and WIDTH columns from
// WIDTH * g.
template <class Element, bool PAIR, int V_PARTS, int RANK_TILES>
struct Transposed {
    static constexpr int WIDTH = Element::WIDTH, COLUMNS = 8 * WIDTH, TILE = WARPS * COLUMNS, RANKS = 16 * RANK_TILES;
    static constexpr int NEIGHBORS = 2;  // adjacent elements of a row of X
    float sums[RANK_TILES][WIDTH][4] = {};
    double square = 0.0;

    __device__ static int places(const Module& module) { return module.columns; }
    __device__ static int contracted(const Module& module) { return module.rows; }

    template <bool FAST>
    __device__ void add(const Operands<Element, PAIR, FAST>& operands, int left, int rank, int start, int end) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = left + WIDTH * g;
        for (int row = start + 4 * t; row - 4 * t < end; row += 16) {
            uint4 aligned[4], base[4];
            float x[RANK_TILES][4][2];
#pragma unroll
            for (int index = 0; index < 4; ++index) operands.load(row + index, column, aligned[index], base[index]);
#pragma unroll
            for (int tile = 0; tile < RANK_TILES; ++tile) {
#pragma unroll
                for (int index = 0; index < 4; ++index)
                    operands.load_factor(operands.rows, row + index, rank + 16 * tile + 2 * g, x[tile][index]);
            }
            unsigned a[RANK_TILES][3][4];
#pragma unroll
            for (int tile = 0; tile < RANK_TILES; ++tile) {
#pragma unroll
                for (int half = 0; half < 4; ++half) {
                    unsigned parts[3];
                    split<3>(x[tile][half / 2 * 2][half % 2], x[tile][half / 2 * 2 + 1][half % 2], parts);
#pragma unroll
                    for (int part = 0; part < 3; ++part) a[tile][part][half] = parts[part];
                }
            }
            float v[4][WIDTH];
#pragma unroll
            for (int index = 0; index < 4; ++index) {
                difference<Element, PAIR>(aligned[index], base[index], v[index]);
                if (PAIR && rank == 0 && operands.has(row + index, column)) square += squares<Element>(v[index]);
            }
#pragma unroll
            for (int place = 0; place < WIDTH; ++place) {
                unsigned b[2][V_PARTS];
                split<V_PARTS>(v[0][place], v[1][place], b[0]);
                split<V_PARTS>(v[2][place], v[3][place], b[1]);
#pragma unroll
                for (int tile = 0; tile < RANK_TILES; ++tile) step<3, V_PARTS>(sums[tile][place], a[tile], b);
            }
        }
    }

    // Lane g has ranks 2g and 2g + 1 of two columns. Neighbors exchange, so that each has four ranks of one column.
    __device__ void put(const Target<TILE, RANKS>& target, int warp) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const bool odd = g % 2;
#pragma unroll
        for (int tile = 0; tile < RANK_TILES; ++tile) {
#pragma unroll
            for (int column = 0; column < WIDTH; ++column) {
                const float(&sum)[4] = sums[tile][column];
                const float low = __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 4);
                const float high = __shfl_xor_sync(0xffffffffu, odd ? sum[2] : sum[3], 4);
                const int place = warp * COLUMNS + 2 * WIDTH * t + column + (odd ? WIDTH : 0), rank = 16 * tile + 2 * (g - odd);
                target.put(place, rank, odd ? make_float4(low, high, sum[1], sum[3]) : make_float4(sum[0], sum[2], low, high));
            }
        }
    }
};

// V X: lane (g, t) has rows g and g + 8 of each 16, and WIDTH columns from WIDTH * t.
template <class Element, bool PAIR, int V_PARTS, int RANK_TILES>
struct Straight {
    static constexpr int WIDTH = Element::WIDTH, COLUMNS = 4 * WIDTH, ROWS = 32, TILE = WARPS * ROWS, RANKS = 16 * RANK_TILES;
    static constexpr int NEIGHBORS = 2 * RANK_TILES;  // lane g has the columns of X from NEIGHBORS * g
    float sums[2][NEIGHBORS][4] = {};
    double square = 0.0;

    __device__ static int places(const Module& module) { return module.rows; }
    __device__ static int contracted(const Module& module) { return module.columns; }

    template <bool FAST>
    __device__ void add(const Operands<Element, PAIR, FAST>& operands, int top, int rank, int start, int end) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = top + g;
        for (int column = start + WIDTH * t; column - WIDTH * t < end; column += COLUMNS) {
            uint4 aligned[4], base[4];
            float x[WIDTH][NEIGHBORS];
#pragma unroll
            for (int index = 0; index < 4; ++index) operands.load(row + 8 * index, column, aligned[index], base[index]);
#pragma unroll
            for (int index = 0; index < WIDTH; ++index)
                operands.load_factor(operands.columns, column + index, rank + NEIGHBORS * g, x[index]);
            float v[4][WIDTH];
#pragma unroll
            for (int index = 0; index < 4; ++index) {
                difference<Element, PAIR>(aligned[index], base[index], v[index]);
                if (PAIR && rank == 0 && operands.has(row + 8 * index, column)) square += squares<Element>(v[index]);
            }
#pragma unroll
            for (int four = 0; four < WIDTH; four += 4) {
                unsigned a[2][V_PARTS][4];
#pragma unroll
                for (int half = 0; half < 8; ++half) {
                    // Rows g, g + 8 of each 16 rows, with the first two of four columns, then with the last two.
                    const float(&of_row)[WIDTH] = v[half / 4 * 2 + half % 2];
                    unsigned parts[V_PARTS];
                    split<V_PARTS>(of_row[four + half % 4 / 2 * 2], of_row[four + half % 4 / 2 * 2 + 1], parts);
#pragma unroll
                    for (int part = 0; part < V_PARTS; ++part) a[half / 4][part][half % 4] = parts[part];
                }
#pragma unroll
                for (int neighbor = 0; neighbor < NEIGHBORS; ++neighbor) {
                    unsigned b[2][3];
                    split<3>(x[four][neighbor], x[four + 1][neighbor], b[0]);
                    split<3>(x[four + 2][neighbor], x[four + 3][neighbor], b[1]);
#pragma unroll
                    for (int rows = 0; rows < 2; ++rows) step<V_PARTS, 3>(sums[rows][neighbor], a[rows], b);
                }
            }
        }
    }

    __device__ void put(const Target<TILE, RANKS>& target, int warp) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float adjacent[2 * NEIGHBORS];
#pragma unroll
                for (int index = 0; index < 2 * NEIGHBORS; ++index)
                    adjacent[index] = sums[rows][index % NEIGHBORS][2 * half + index / NEIGHBORS];
#pragma unroll
                for (int four = 0; four < 2 * NEIGHBORS; four += 4)
                    target.put(warp * ROWS + 16 * rows + g + 8 * half, NEIGHBORS * 2 * t + four,
                               make_float4(adjacent[four], adjacent[four + 1], adjacent[four + 2], adjacent[four + 3]));
            }
        }
    }
};

template <class Element, bool PAIR, class Product>
__device__ inline void multiply(const Module* modules, const int* owners, int length, float* results, float* partial,
                                double* partial_squares) {
    const Block block = find(modules, owners);
    const Module& module = block.module;
    const int warp = threadIdx.x / 32, rank = block.group * Product::RANKS;
    const int first = block.tile * Product::TILE + warp * (Product::TILE / WARPS);
    const int start = block.chunk * length, end = min(start + length, Product::contracted(module));
    Product product;
    if (first < Product::places(module)) {
        if (module.is_aligned && module.rank % Product::NEIGHBORS == 0) {
            product.add(Operands<Element, PAIR, true>(module), first, rank, start, end);
        } else {
            product.add(Operands<Element, PAIR, false>(module), first, rank, start, end);
        }
    }
    product.put(Target<Product::TILE, Product::RANKS>(block, Product::places(module), results, partial), warp);
    if (PAIR && rank == 0) {
        const double square = warp_sum(product.square);
        if (threadIdx.x % 32 == 0) partial_squares[block.slot * WARPS + warp] = square;
    }
}

// Adds the chunks of one tile and group in order. One block per tile and group, only for modules with several chunks.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    add_chunks(const Module* modules, const int* owners, int tile_size, int ranks, int of_columns, float* results, const float* partial) {
    const Module& module = modules[owners[blockIdx.x]];
    const int index = blockIdx.x - module.first_finished, tile = index % module.tiles, group = index / module.tiles;
    const int places = of_columns ? module.columns : module.rows;
    const int size = tile_size * ranks;
    const float* start = partial + static_cast<long long>(module.first + (group * module.tiles + tile) * module.chunks) * size;
    for (int element = threadIdx.x; element < size; element += 32 * WARPS) {
        const int place = tile * tile_size + element / ranks, rank = group * ranks + element % ranks;
        if (place >= places || rank >= module.rank) continue;
        double sum = 0.0;
        for (int chunk = 0; chunk < module.chunks; ++chunk) sum += start[static_cast<long long>(chunk) * size + element];
        results[module.result + static_cast<long long>(place) * module.rank + rank] = static_cast<float>(sum);
    }
}

// |V|^2 of every module. One block of one warp per module.
extern "C" __global__ void __launch_bounds__(32) add_squares(const Module* modules, const double* partial_squares, float* squares) {
    const Module& module = modules[blockIdx.x];
    const double* start = partial_squares + static_cast<long long>(module.first) * WARPS;
    double sum = 0.0;
    for (int index = threadIdx.x; index < module.tiles * module.chunks * WARPS; index += 32) sum += start[index];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = static_cast<float>(sum);
}

#define KERNEL(form, Product, kind, name, Element, pair, parts, ranks)                                                           \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)                                                                \
        form##_##kind##_##name##_##ranks(const Module* modules, const int* owners, int length, float* results, float* partial, \
                                         double* partial_squares) {                                                            \
        multiply<Element, pair, Product<Element, pair, parts, ranks / 16>>(modules, owners, length, results, partial,          \
                                                                           partial_squares);                                   \
    }
#define KERNELS(name, Element, single_parts, pair_parts)                           \
    KERNEL(transposed, Transposed, single, name, Element, false, single_parts, 16) \
    KERNEL(transposed, Transposed, single, name, Element, false, single_parts, 32) \
    KERNEL(transposed, Transposed, pair, name, Element, true, pair_parts, 16)      \
    KERNEL(transposed, Transposed, pair, name, Element, true, pair_parts, 32)      \
    KERNEL(straight, Straight, single, name, Element, false, single_parts, 16)     \
    KERNEL(straight, Straight, single, name, Element, false, single_parts, 32)     \
    KERNEL(straight, Straight, pair, name, Element, true, pair_parts, 16)          \
    KERNEL(straight, Straight, pair, name, Element, true, pair_parts, 32)

KERNELS(f32, F32, 3, 3)
KERNELS(bf16, Bf16, 1, 2)
KERNELS(f16, F16, 2, 2)
