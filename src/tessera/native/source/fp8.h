// Narrow formats: the scale of a tile and the codes of its elements, by docs/numerics.md, "Tiles and scales".
#pragma once

#include "isa.h"

// Sign, exponent, fraction; the exponent field of a subnormal is zero. NAN_CODE is what non-finite input becomes;
// from SPECIAL on magnitudes are infinite or NaN.
template <int FRACTION, int BIAS_, uint32_t LARGEST_BITS, uint32_t NAN_, uint32_t SPECIAL_>
struct Format {
    static constexpr int M = FRACTION, BIAS = BIAS_, SIGN_SHIFT = FRACTION == 6 ? 11 : 7;
    static constexpr uint32_t LARGEST = LARGEST_BITS, NAN_CODE = NAN_, SPECIAL = SPECIAL_;
};
typedef Format<3, 7, 0x43E00000, 0x7F, 0x7F> E4M3;      // 448
typedef Format<2, 15, 0x47600000, 0x7F, 0x7C> E5M2;     // 57,344
typedef Format<6, 15, 0x477E0000, 0x7FF, 0x7C0> E5M6;   // 65,024

static constexpr uint32_t MAGNITUDE = 0x7FFFFFFF, INFINITE = 0x7F800000, FRACTION_MASK = 0x007FFFFF;

struct Scale {
    float scale, inverse;
};

// The biased exponent of the power of two for a tile whose largest finite magnitude has the bits `amax`: the smallest one
// with amax <= largest * scale, at least 2^-126; 2^0 for a tile of zeros.
template <typename F>
INLINE int32_t scale_exponent(uint32_t amax) {
    // Where amax's fraction is above that of the largest value, the sum carries into the exponent.
    int32_t exponent = (int32_t)((amax + (FRACTION_MASK - (F::LARGEST & FRACTION_MASK))) >> 23);
    exponent -= (int32_t)(F::LARGEST >> 23) - 127;
    exponent = exponent < 1 ? 1 : exponent;
    return amax ? exponent : 127;
}

// The scale of such a tile.
template <typename F>
INLINE Scale scale_of(uint32_t amax, bool power_of_two) {
    int32_t exponent = scale_exponent<F>(amax);
    Scale found = {from_bits((uint32_t)exponent << 23), from_bits((uint32_t)(254 - exponent) << 23)};
    if (power_of_two || amax == 0) return found;
    float scale = from_bits(amax) / from_bits(F::LARGEST);
    float inverse = 1.0f / scale;
    return (bits(inverse) & MAGNITUDE) < INFINITE ? Scale{scale, inverse} : found;
}

// Codes of finite y, |y| <= the largest value: round to nearest even, the sign of zero kept.
template <typename F>
INLINE u32v encode(f32v y) {
    constexpr uint32_t DROPPED = 23 - F::M, SMALLEST_NORMAL = (uint32_t)(128 - F::BIAS) << 23;
    // Adding this number leaves a sum whose last bit is worth one subnormal step, rounded by the addition itself.
    constexpr uint32_t MAGIC = (uint32_t)(127 + 24 - F::BIAS - F::M) << 23;
    u32v u = bits(y), magnitude = u & MAGNITUDE;
    u32v rounded = magnitude + ((1u << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1);
    u32v normal = (rounded >> DROPPED) - ((uint32_t)(127 - F::BIAS) << F::M);
    u32v subnormal = bits(from_bits(magnitude) + splat(from_bits(MAGIC))) - MAGIC;
    u32v code = choose(magnitude < SMALLEST_NORMAL, subnormal, normal);
    return code | ((u >> (31 - F::SIGN_SHIFT)) & (1u << F::SIGN_SHIFT));
}

// Values of codes without their scale; exact. NaN codes give NaN, E5M2's and E5M6's infinities infinity.
template <typename F>
INLINE f32v decode(u32v code) {
    u32v magnitude = code & ((1u << F::SIGN_SHIFT) - 1);
    u32v normal = (magnitude << (23 - F::M)) + ((uint32_t)(127 - F::BIAS) << 23);
    f32v steps = __builtin_convertvector((i32v)magnitude, f32v);
    u32v subnormal = bits(steps * splat(from_bits((uint32_t)(127 + 1 - F::BIAS - F::M) << 23)));
    u32v value = choose(magnitude < (1u << F::M), subnormal, normal);
    u32v special = (magnitude << (23 - F::M)) | INFINITE;
    value = choose(magnitude >= F::SPECIAL, F::M == 3 ? splat(0x7FC00000u) : special, value);
    return from_bits(value | ((code & (1u << F::SIGN_SHIFT)) << (31 - F::SIGN_SHIFT)));
}

#if defined(__AVX2__)

// The two halves of a register; GCC warns of the extraction without a mask.
#if defined(__AVX512F__)
INLINE __m256i lower_half(__m512i v) { return _mm512_castsi512_si256(v); }
INLINE __m256i upper_half(__m512i v) { return _mm512_maskz_extracti64x4_epi64(0xF, v, 1); }
#endif
INLINE __m128i lower_half(__m256i v) { return _mm256_castsi256_si128(v); }
INLINE __m128i upper_half(__m256i v) { return _mm256_extracti128_si256(v, 1); }

INLINE uint32_t largest_lane(u32v v) {
#if defined(__AVX512F__)
    __m256i halves[2];  // GCC warns of the extraction of a maximum
    memcpy(halves, &v, sizeof v);
    __m256i half = _mm256_max_epu32(halves[0], halves[1]);
#else
    __m256i half = (__m256i)v;
#endif
    __m128i four = _mm_max_epu32(lower_half(half), upper_half(half));
    __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1)));
}

INLINE uint16_t largest_lane(u16w v) {
#if defined(__AVX512BW__)
    __m256i half = _mm256_max_epu16(lower_half((__m512i)v), upper_half((__m512i)v));
#else
    __m256i half = (__m256i)v;
#endif
    __m128i eight = _mm_max_epu16(lower_half(half), upper_half(half));
    __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi32(-1)));  // of the complements
    return (uint16_t)~_mm_cvtsi128_si32(least);
}

#else

INLINE uint32_t largest_lane(u32v v) {
    uint32_t most = 0;
    for (int i = 0; i < LANES; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

INLINE uint16_t largest_lane(u16w v) {
    uint16_t most = 0;
    for (int i = 0; i < WIDE; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

#endif

INLINE u32v larger(u32v a, u32v b) { return choose(a > b, a, b); }
INLINE u16w larger(u16w a, u16w b) { return choose(a > b, a, b); }

// The codes of x under a tile's scale; of elements that are not finite the code is not defined.
template <typename F>
INLINE u32v codes_of(f32v x, f32v inverse) {
    f32v y = x * inverse, most = splat(from_bits(F::LARGEST));
    y = choose(y > most, most, y);  // a float32 scale is rounded, and may leave the range; a power of two never does
    y = choose(y < -most, -most, y);
    return encode<F>(y);
}

// BF16 values under powers of two, in 16-bit lanes: twice the elements of a register, and no multiplication, since a
// power of two only moves the exponent. `Narrow` has what a column's scale contributes.
template <typename F>
struct Narrow {
    uint16_t smallest, moved;  // magnitude of the smallest value with a normal code; what to subtract from codes

    static ALWAYS_INLINE Narrow of(int32_t exponent) {  // biased, of the scale
        int32_t first = exponent + 1 - F::BIAS;
        // Below 2^-126 a BF16 number is itself subnormal and has no exponent to move.
        return {(uint16_t)((first < 1 ? 1 : first) << 7), (uint16_t)((exponent - F::BIAS) * (1 << F::M))};
    }
};

// True when all lanes are zero or have normal codes; `code` has them then, with their signs.
template <typename F>
INLINE bool encode_narrow(u16w x, u16w smallest, u16w moved, u8w& code) {
    constexpr int DROPPED = 7 - F::M;
#if defined(__AVX512BW__)
    __m512i v = (__m512i)x, magnitude = _mm512_and_si512(v, _mm512_set1_epi16(0x7FFF));
    __mmask32 present = _mm512_test_epi16_mask(magnitude, magnitude);
    __mmask32 small = _mm512_mask_cmplt_epi16_mask(present, magnitude, (__m512i)smallest);
    __m512i last = _mm512_and_si512(_mm512_srli_epi16(magnitude, DROPPED), _mm512_set1_epi16(1));
    __m512i half = _mm512_add_epi16(magnitude, _mm512_set1_epi16((1 << (DROPPED - 1)) - 1));
    __m512i rounded = _mm512_srli_epi16(_mm512_add_epi16(half, last), DROPPED);
    __m512i narrow = _mm512_maskz_sub_epi16(present, rounded, (__m512i)moved);
    // narrow | (v >> 8 & 0x80)
    narrow = _mm512_ternarylogic_epi32(narrow, _mm512_srli_epi16(v, 8), _mm512_set1_epi16(0x80), 0xF8);
    code = (u8w)_mm512_maskz_cvtepi16_epi8(0xFFFFFFFF, narrow);
    return small == 0;
#else
    u16w magnitude = x & 0x7FFF;
    i16w zero = magnitude == 0, small = (i16w)magnitude < (i16w)smallest;
    u16w rounded = (magnitude + (uint16_t)((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED;
    u16w narrow = ((rounded - moved) & (u16w)~zero) | ((x >> 8) & 0x80);
    code = __builtin_convertvector(narrow, u8w);
    return !any(small & ~zero);
#endif
}

#if defined(__AVX512BW__)

// BF16 values times powers of two, `shift` being what is added to their exponents, in place; zeros and NaN stay.
INLINE __m512i folded(__m512i u, __m512i shift) {
    __m512i magnitude = _mm512_and_si512(u, _mm512_set1_epi16(0x7FFF));
    __mmask32 normal = _mm512_cmplt_epu16_mask(
        _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7F7F));
    return _mm512_mask_add_epi16(u, normal, u, shift);
}

// Thirty-two E4M3 codes: a subnormal's value comes from a table, a normal one's bits are moved into place.
INLINE __m512i e4m3_to_bf16(__m256i codes) {
    alignas(64) static const uint16_t SUBNORMAL[32] = {  // m * 2^-9
        0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};
    __m512i c = _mm512_cvtepu8_epi16(codes);
    __m512i magnitude = _mm512_and_si512(c, _mm512_set1_epi16(0x7F));
    __m512i v = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    v = _mm512_mask_permutexvar_epi16(v, small, c, _mm512_load_si512(SUBNORMAL));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
    v = _mm512_mask_mov_epi16(v, nan, _mm512_set1_epi16(0x7FC0));
    __m512i sign = _mm512_slli_epi16(c, 8);
    return _mm512_ternarylogic_epi64(v, sign, _mm512_set1_epi16((short)0x8000), 0xF8);  // v | (sign & 0x8000)
}

#endif
