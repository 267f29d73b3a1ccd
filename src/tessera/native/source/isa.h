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
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define TESSERA_PASTE_(a, b, c) a##b##_##c
#define TESSERA_PASTE(a, b, c) TESSERA_PASTE_(a, b, c)

// `TESSERA_ENTRY(int64_t, copy)(int64_t begin, int64_t end, ...)` defines tessera_<set>_copy. Rows [begin, end) are the
// share of one thread; entry points start no threads and keep no state.
#define TESSERA_ENTRY(type, name) \
    extern "C" __attribute__((visibility("default"))) type TESSERA_PASTE(tessera_, TESSERA_ISA, name)

#define ALWAYS_INLINE inline __attribute__((always_inline))  // of a member or lambda
#define INLINE static ALWAYS_INLINE

// As many lanes as a register has. The compiler's vector extensions then cover every set; wider vectors than the machine
// has would be taken apart element by element.
#if defined(__AVX512F__)
#define TESSERA_LANES 16
#elif defined(__AVX2__)
#define TESSERA_LANES 8
#else
#define TESSERA_LANES 4
#endif
enum { LANES = TESSERA_LANES };

typedef float f32v __attribute__((vector_size(4 * TESSERA_LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * TESSERA_LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * TESSERA_LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * TESSERA_LANES)));
typedef uint8_t u8v __attribute__((vector_size(TESSERA_LANES)));

// A register of 16-bit lanes, and as many bytes.
enum { WIDE = 2 * LANES };
typedef uint16_t u16w __attribute__((vector_size(4 * TESSERA_LANES)));
typedef int16_t i16w __attribute__((vector_size(4 * TESSERA_LANES)));
typedef uint8_t u8w __attribute__((vector_size(2 * TESSERA_LANES)));

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

// The first `count` < LANES elements; the other lanes are zero, and no byte behind the last is read.
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

INLINE f32v splat(float x) { return x - f32v{}; }
INLINE u32v splat(uint32_t x) { return x - u32v{}; }
INLINE i32v splat(int32_t x) { return x - i32v{}; }

INLINE u32v bits(f32v x) { return (u32v)x; }
INLINE f32v from_bits(u32v x) { return (f32v)x; }

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
    return mask ? a : b;
}

#if defined(__AVX512F__)  // GCC halves a conversion between widths; the forms with a mask warn of nothing
INLINE u32v widen(u16v x) { return (u32v)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x); }
INLINE u32v widen(u8v x) { return (u32v)_mm512_maskz_cvtepu8_epi32(0xFFFF, (__m128i)x); }
INLINE u16v narrow16(u32v x) { return (u16v)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x); }
INLINE u8v narrow8(u32v x) { return (u8v)_mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)x); }
#else
INLINE u32v widen(u16v x) { return __builtin_convertvector(x, u32v); }
INLINE u32v widen(u8v x) { return widen(__builtin_convertvector(x, u16v)); }  // GCC does one step lane by lane
INLINE u16v narrow16(u32v x) { return __builtin_convertvector(x, u16v); }
INLINE u8v narrow8(u32v x) { return __builtin_convertvector(x, u8v); }
#endif
// The lower halves of the words of both, in order.
INLINE u16w join(u32v left, u32v right) {
    u16v both[2] = {narrow16(left), narrow16(right)};
    return load<u16w>(both);
}

// BF16 is the upper half of a float32. Rounding is to nearest even; a NaN keeps its upper bits and stays quiet.
typedef uint16_t bf16;

INLINE f32v from_bf16(u16v x) { return from_bits(widen(x) << 16); }
INLINE u16v to_bf16(f32v x) {
    u32v u = bits(x);
    u32v rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return narrow16(choose((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded));
}
INLINE float from_bf16(bf16 x) { return from_bits((uint32_t)x << 16); }
INLINE bf16 to_bf16(float x) {
    uint32_t u = bits(x);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (bf16)(u >> 16 | 0x40);
    return (bf16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

// Elements of either type as float32, and back with one rounding.
INLINE f32v read(const float* x) { return load<f32v>(x); }
INLINE f32v read(const bf16* x) { return from_bf16(load<u16v>(x)); }
INLINE f32v read_part(const float* x, int64_t count) { return load_part<f32v>(x, count); }
INLINE f32v read_part(const bf16* x, int64_t count) { return from_bf16(load_part<u16v>(x, count)); }
INLINE void write(float* to, f32v v) { store(to, v); }
INLINE void write(bf16* to, f32v v) { store(to, to_bf16(v)); }
INLINE void write_part(float* to, f32v v, int64_t count) { store_part(to, v, count); }
INLINE void write_part(bf16* to, f32v v, int64_t count) { store_part(to, to_bf16(v), count); }

// One rounding where the set has the instruction, two where it has not; where a result's bits are promised it is not
// used, or the promise names it.
INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)  // by name: among other code the compiler takes the loop below apart
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// True where some lane of a comparison holds.
INLINE bool any(i16w mask) {
#if defined(__AVX512BW__)
    return _mm512_movepi16_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
    uint64_t half[2];
    memcpy(half, &mask, sizeof half);
    return (half[0] | half[1]) != 0;
#endif
}

// The fma of one element (math.h has that name): a loop over it becomes vectors.
INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
