// e^x and the natural logarithm in float32, lane by lane: a lane's bits depend on that lane's input alone.
//
// The exponential: n = x / ln 2 rounded, r = x - n ln 2 in two steps (the first constant has nine bits, so that its
// product with n is exact), a polynomial of degree 6 for e^r on |r| <= ln 2 / 2, and n added to the exponent. Within 2
// units in the last place of e^x where that is a normal number; 0 where it is smaller (x < -87.33654, -inf too), infinity
// where it is larger, NaN for NaN.
#pragma once

#include "isa.h"

// Of the two, where y is NaN: y.
INLINE f32v larger(f32v x, f32v y) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return x > y ? x : y;
#endif
}

INLINE f32v smaller(f32v x, f32v y) {
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (f32v)_mm256_min_ps((__m256)x, (__m256)y);
#else
    return x < y ? x : y;
#endif
}

INLINE f32v exponential(f32v x) {
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds, and leaves the whole number in the low bits
    f32v sum = fma(x, splat(1.44269504f), magic), n = sum - magic;
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v y = splat(1.3843607e-3f);  // minimax of (e^r - 1) / r, relative to e^r; error 2e-9
    y = fma(y, r, splat(8.3741955e-3f));
    y = fma(y, r, splat(4.1668005e-2f));
    y = fma(y, r, splat(1.6666430e-1f));
    y = fma(y, r, splat(4.9999994e-1f));
    y = fma(y, r, splat(1.0f));
    y = fma(y, r, splat(1.0f));
    f32v scaled = x >= -87.33654f ? from_bits(bits(y) + (bits(sum) << 23)) : f32v{};
    return x <= 88.72283f ? scaled : x * 3.4028235e38f;  // infinity, or NaN
}

// The same for one element: a loop over it becomes vectors.
INLINE float exponential(float x) {
    const float magic = 12582912.0f;
    float sum = multiply_add(x, 1.44269504f, magic), n = sum - magic;
    float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
    float y = multiply_add(1.3843607e-3f, r, 8.3741955e-3f);
    y = multiply_add(y, r, 4.1668005e-2f);
    y = multiply_add(y, r, 1.6666430e-1f);
    y = multiply_add(y, r, 4.9999994e-1f);
    y = multiply_add(y, r, 1.0f);
    y = multiply_add(y, r, 1.0f);
    y = from_bits(bits(y) + (bits(sum) << 23));
    y = x < -87.33654f ? 0.0f : y;
    return x <= 88.72283f ? y : x * 3.4028235e38f;
}

// ln x for normal, finite x > 0, within 2 units in the last place (Cephes' polynomial).
INLINE f32v logarithm(f32v x) {
    const uint32_t root = 0x3F3504F3;  // sqrt(1/2): the mantissa is taken in [sqrt(1/2), sqrt(2))
    i32v e = (i32v)(bits(x) - root) >> 23;
    f32v n = __builtin_convertvector(e, f32v), m = from_bits(bits(x) - (u32v)(e << 23)) - 1.0f, z = m * m;
    f32v y = splat(7.0376836292e-2f);
    y = fma(y, m, splat(-1.1514610310e-1f));
    y = fma(y, m, splat(1.1676998740e-1f));
    y = fma(y, m, splat(-1.2420140846e-1f));
    y = fma(y, m, splat(1.4249322787e-1f));
    y = fma(y, m, splat(-1.6668057665e-1f));
    y = fma(y, m, splat(2.0000714765e-1f));
    y = fma(y, m, splat(-2.4999993993e-1f));
    y = fma(y, m, splat(3.3333331174e-1f));
    y = fma(y * m, z, n * -2.12194440e-4f) - z * 0.5f;
    return fma(n, splat(0.693359375f), m + y);
}
