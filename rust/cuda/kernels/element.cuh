// Loads of stored elements, 16 bytes at a time, and sums over a warp. Compiles without headers.

// Layout of one type's elements in 16 bytes.
struct F32 {
    static constexpr int WIDTH = 4;
    static constexpr int SIZE = 4;
};
struct Bf16 {
    static constexpr int WIDTH = 8;
    static constexpr int SIZE = 2;
};
struct F16 {
    static constexpr int WIDTH = 8;
    static constexpr int SIZE = 2;
};

#ifndef SAFELORA_EMULATED
__device__ inline float f16_to_float(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
}

// Packs `low` into the lower half; rounds to nearest even.
__device__ inline unsigned pack_f16(float low, float high) {
    unsigned bits;
    asm("{ .reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
        : "=r"(bits)
        : "f"(low), "f"(high));
    return bits;
}

__device__ inline unsigned pack_bf16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

// The values of one 32-bit word: one float, or two halves, with the first in the lower half.
__device__ inline void unpack(F32, unsigned word, float* values) { values[0] = __uint_as_float(word); }
__device__ inline void unpack(Bf16, unsigned word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void unpack(F16, unsigned word, float* values) {
    values[0] = f16_to_float(word & 0xffffu);
    values[1] = f16_to_float(word >> 16);
}

__device__ inline unsigned pack(F32, const float* values) { return __float_as_uint(values[0]); }
__device__ inline unsigned pack(Bf16, const float* values) { return pack_bf16(values[0], values[1]); }
__device__ inline unsigned pack(F16, const float* values) { return pack_f16(values[0], values[1]); }

template <class Element>
__device__ inline void unpack(const uint4& bits, float (&values)[Element::WIDTH]) {
    constexpr int PER_WORD = Element::WIDTH / 4;
    unpack(Element(), bits.x, values);
    unpack(Element(), bits.y, values + PER_WORD);
    unpack(Element(), bits.z, values + 2 * PER_WORD);
    unpack(Element(), bits.w, values + 3 * PER_WORD);
}

template <class Element>
__device__ inline uint4 pack(const float (&values)[Element::WIDTH]) {
    constexpr int PER_WORD = Element::WIDTH / 4;
    return make_uint4(pack(Element(), values), pack(Element(), values + PER_WORD), pack(Element(), values + 2 * PER_WORD),
                      pack(Element(), values + 3 * PER_WORD));
}

// Loads one element from any address that is aligned to its size.
template <class Element>
__device__ inline unsigned load_bits(const char* address) {
    if (Element::SIZE == 4) return *reinterpret_cast<const unsigned*>(address);
    return *reinterpret_cast<const unsigned short*>(address);
}

template <class Element>
__device__ inline void store_bits(char* address, unsigned bits) {
    if (Element::SIZE == 4) {
        *reinterpret_cast<unsigned*>(address) = bits;
    } else {
        *reinterpret_cast<unsigned short*>(address) = static_cast<unsigned short>(bits);
    }
}

// Loads the first `count` of WIDTH adjacent elements one by one, then zeros: the same bits as an aligned load.
template <class Element>
__device__ inline uint4 load_some(const char* address, int count) {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int index = 0; index < Element::WIDTH; ++index) {
        if (index >= count) break;
        const unsigned bits = load_bits<Element>(address + index * Element::SIZE);
        const int byte = index * Element::SIZE;
        words[byte / 4] |= bits << (8 * (byte % 4));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Element>
__device__ inline void store_some(char* address, const uint4& value, int count) {
    const unsigned words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int index = 0; index < Element::WIDTH; ++index) {
        if (index >= count) break;
        const int byte = index * Element::SIZE;
        store_bits<Element>(address + byte, words[byte / 4] >> (8 * (byte % 4)));
    }
}

// The sum over the lanes, with the same bits in each lane: every step adds the same two numbers, in either order.
__device__ inline double warp_sum(double value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
