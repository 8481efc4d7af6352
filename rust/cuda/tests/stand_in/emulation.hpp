// Enough of CUDA to run a kernel on the CPU: blocks one after another, and the threads of a block as fibers that meet
// at barriers. If some thread of the block or lane of the warp never reaches a barrier, the process ends, as hardware
// forbids it.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define SAFELORA_EMULATED
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int WARP = 32;
constexpr std::size_t STACK = 64 * 1024;

struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK);
    ucontext_t entry;
    jmp_buf place;
    Dim3 thread;
    bool started = false, done = false;
    long warp_steps = 0, block_steps = 0;
    alignas(16) unsigned char exchanged[64];
};

inline std::vector<Fiber> fibers;
inline std::size_t running, alive;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool progress;

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "emulated kernel: %s (block %u %u, thread %u)\n", why, blockIdx.x, blockIdx.y, threadIdx.x);
    std::abort();
}

inline void yield() {
    if (!_setjmp(fibers[running].place)) _longjmp(scheduler, 1);
}

inline void enter() {
    body();
    fibers[running].done = true;
    --alive;
    _longjmp(scheduler, 1);
}

// Continues once every thread from `first` to `last` has arrived as often as this one.
inline void meet(long Fiber::*steps, std::size_t first, std::size_t last, const char* who) {
    const long mine = ++(fibers[running].*steps);
    for (;;) {
        bool all = true;
        for (std::size_t other = first; other < last; ++other) {
            if (fibers[other].*steps >= mine) continue;
            if (fibers[other].done) fail(who);
            all = false;
        }
        if (all) {
            progress = true;
            return;
        }
        yield();
    }
}

inline std::size_t warp_start() { return running / WARP * WARP; }

inline void meet_warp() {
    if (warp_start() + WARP > fibers.size()) fail("a warp operation in a block that is no multiple of 32 threads");
    meet(&Fiber::warp_steps, warp_start(), warp_start() + WARP, "a lane left before an operation of its whole warp");
}

inline void meet_block() {
    meet(&Fiber::block_steps, 0, fibers.size(), "a thread left before a barrier of its whole block");
}

// Every lane's value. Read them before the warp's next meeting ends.
template <class Value>
void put(const Value& value) {
    static_assert(sizeof(Value) <= sizeof(Fiber::exchanged));
    std::memcpy(fibers[running].exchanged, &value, sizeof value);
    meet_warp();
}

template <class Value>
Value get(int lane) {
    Value value;
    std::memcpy(&value, fibers[warp_start() + lane].exchanged, sizeof value);
    return value;
}

inline void run_block(unsigned threads) {
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    alive = threads;
    for (std::size_t index = 0; index < threads; ++index) {
        Fiber& fiber = fibers[index];
        fiber.started = fiber.done = false;
        fiber.warp_steps = fiber.block_steps = 0;
        fiber.thread = {static_cast<unsigned>(index), 0, 0};
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.data();
        fiber.entry.uc_stack.ss_size = fiber.stack.size();
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, enter, 0);
    }
    while (alive > 0) {
        progress = false;
        for (volatile std::size_t index = 0; index < threads; index = index + 1) {
            if (fibers[index].done) continue;
            running = index;
            threadIdx = fibers[index].thread;
            const std::size_t before = alive;
            if (!_setjmp(scheduler)) {
                if (fibers[index].started) _longjmp(fibers[index].place, 1);
                fibers[index].started = true;
                progress = true;
                setcontext(&fibers[index].entry);
            }
            progress = progress || alive < before;
        }
        if (!progress) fail("threads wait for each other for ever");
    }
}

template <class... Parameters, std::size_t... Index>
void call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_cv_t<Parameters>*>(parameters[Index])...);
}

inline std::map<std::string, std::function<void(void**)>>& kernels() {
    static std::map<std::string, std::function<void(void**)>> known;
    return known;
}

struct Registration {
    template <class... Parameters>
    Registration(const char* name, void (*kernel)(Parameters...)) {
        kernels()[name] = [kernel](void** parameters) { call(kernel, parameters, std::index_sequence_for<Parameters...>()); };
    }
};

}  // namespace emulation

#define EMULATE(kernel) static const emulation::Registration registration_##kernel(#kernel, kernel);

inline void __syncthreads() { emulation::meet_block(); }
inline void __syncwarp() { emulation::meet_warp(); }

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int distance) {
    emulation::put(value);
    const Value result = emulation::get<Value>(static_cast<int>(threadIdx.x % 32) ^ distance);
    emulation::meet_warp();
    return result;
}

inline int __any_sync(unsigned, int predicate) {
    emulation::put(predicate);
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= emulation::get<int>(lane);
    emulation::meet_warp();
    return any != 0;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
using std::min;
template <class Value>
Value __ldg(const Value* address) {
    return *address;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float f16_to_float(unsigned bits) {
    _Float16 value;
    const auto half = static_cast<std::uint16_t>(bits);
    std::memcpy(&value, &half, sizeof value);
    return static_cast<float>(value);
}
inline unsigned f16_bits(float value) {
    const auto half = static_cast<_Float16>(value);
    std::uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}
inline unsigned pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

inline unsigned bf16_bits(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

// One step of a warp's matrix product in the layout of PTX's m16n8k16: c[16, 8] += a[16, 16] b[16, 8].
inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Fragments {
        unsigned a[4], b[2];
    };
    emulation::put(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const auto half = [](unsigned word, int which) { return __uint_as_float(which ? word & 0xffff0000u : word << 16); };
    for (int index = 0; index < 4; ++index) {
        const int row = g + index / 2 * 8, column = 2 * t + index % 2;
        double total = sum[index];
        for (int k = 0; k < 16; ++k) {
            const auto of_a = emulation::get<Fragments>(row % 8 * 4 + k % 8 / 2), of_b = emulation::get<Fragments>(column * 4 + k % 8 / 2);
            total += static_cast<double>(half(of_a.a[row / 8 + k / 8 * 2], k % 2)) * half(of_b.b[k / 8], k % 2);
        }
        sum[index] = static_cast<float>(total);
    }
    emulation::meet_warp();
}
