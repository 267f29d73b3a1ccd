// What every source file of the kernels begins with.
//
// A file is compiled once for each instruction set it can use (setup.py: -DTESSERA_ISA=name and the flags of that set
// alone). Entry points carry the set's name, so all variants live in one library and Python chooses at run time.
//
// Nothing from the C++ library may be used: the linker keeps one copy of an inline function, and that copy might be the
// one compiled for AVX-512. Everything here is static or in the set's own namespace.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TESSERA_PASTE_(a, b, c) a##b##_##c
#define TESSERA_PASTE(a, b, c) TESSERA_PASTE_(a, b, c)

// `TESSERA_ENTRY(int64_t, copy)(int64_t begin, int64_t end, ...)` defines tessera_<set>_copy. Rows [begin, end) are the
// share of one thread; entry points start no threads and keep no state.
#define TESSERA_ENTRY(type, name) \
    extern "C" __attribute__((visibility("default"))) type TESSERA_PASTE(tessera_, TESSERA_ISA, name)

#define INLINE static inline __attribute__((always_inline))

// Sixteen lanes whatever the machine has: the compiler splits them into registers of its own size.
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

enum { LANES = 16 };

template <typename V>
INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof(V));
    return v;
}

template <typename V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof(V));
}

// The first `count` < 16 elements; the other lanes are zero, and no byte behind the last is read.
template <typename V>
INLINE V load_part(const void* from, int64_t count) {
    V v = {};
    memcpy(&v, from, sizeof(V) / LANES * (size_t)count);
    return v;
}

template <typename V>
INLINE void store_part(void* to, V v, int64_t count) {
    memcpy(to, &v, sizeof(V) / LANES * (size_t)count);
}

INLINE f32x16 splat(float x) { return x - f32x16{}; }
INLINE u32x16 splat(uint32_t x) { return x - u32x16{}; }
INLINE i32x16 splat(int32_t x) { return x - i32x16{}; }

INLINE u32x16 bits(f32x16 x) { return (u32x16)x; }
INLINE f32x16 from_bits(u32x16 x) { return (f32x16)x; }

INLINE uint32_t bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
INLINE float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// a where the mask's lanes are all ones, b where they are zero.
template <typename V, typename M>
INLINE V choose(M mask, V a, V b) {
    return (V)(((u32x16)mask & (u32x16)a) | (~(u32x16)mask & (u32x16)b));
}

INLINE u32x16 widen(u16x16 x) { return __builtin_convertvector(x, u32x16); }
INLINE u32x16 widen(u8x16 x) { return __builtin_convertvector(x, u32x16); }
INLINE u16x16 narrow16(u32x16 x) { return __builtin_convertvector(x, u16x16); }
INLINE u8x16 narrow8(u32x16 x) { return __builtin_convertvector(x, u8x16); }

// BF16 is the upper half of a float32. Rounding is to nearest even; a NaN keeps its upper bits and stays quiet.
typedef uint16_t bf16;

INLINE f32x16 from_bf16(u16x16 x) { return from_bits(widen(x) << 16); }
INLINE u16x16 to_bf16(f32x16 x) {
    u32x16 u = bits(x);
    u32x16 rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return narrow16(choose((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded));
}
INLINE float from_bf16(bf16 x) { return from_bits((uint32_t)x << 16); }
INLINE bf16 to_bf16(float x) {
    uint32_t u = bits(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (bf16)(u >> 16 | 0x40);
    return (bf16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

// Elements of either type as float32, and back with one rounding.
INLINE f32x16 read(const float* x) { return load<f32x16>(x); }
INLINE f32x16 read(const bf16* x) { return from_bf16(load<u16x16>(x)); }
INLINE f32x16 read_part(const float* x, int64_t count) { return load_part<f32x16>(x, count); }
INLINE f32x16 read_part(const bf16* x, int64_t count) { return from_bf16(load_part<u16x16>(x, count)); }
INLINE void write(float* to, f32x16 v) { store(to, v); }
INLINE void write(bf16* to, f32x16 v) { store(to, to_bf16(v)); }
INLINE void write_part(float* to, f32x16 v, int64_t count) { store_part(to, v, count); }
INLINE void write_part(bf16* to, f32x16 v, int64_t count) { store_part(to, to_bf16(v), count); }

// One rounding where the set has the instruction, two where it has not; where a result's bits are promised it is not
// used, or the promise names it.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
