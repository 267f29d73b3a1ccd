// Pairs of BF16 as 32-bit words: what a dot-product unit multiplies at once is two neighbours of the contraction.
#pragma once

#include "isa.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// rows[i][j] -> to[j * stride + i] for a 16 x 16 block of words.
INLINE void transpose_words(const uint32_t rows[16][16], uint32_t* to, int64_t stride) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // a[4 q + i] holds columns i, 4 + i, 8 + i, 12 + i of rows 4 q to 4 q + 3
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(to + (8 + i) * stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xDD));
        _mm512_storeu_si512(to + (4 + i) * stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(to + (12 + i) * stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xDD));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[j * stride + i] = rows[i][j];
#endif
}

// Words (even[i], odd[i]), the even one in the low half: sixteen to each of the two places.
INLINE void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* first, uint32_t* second) {
#if defined(__AVX512BW__)
    __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(first, _mm512_permutex2var_epi64(low, left, high));
    _mm512_storeu_si512(second, _mm512_permutex2var_epi64(low, right, high));
#else
    for (int i = 0; i < 16; ++i) {
        first[i] = even[i] | (uint32_t)odd[i] << 16;
        second[i] = even[16 + i] | (uint32_t)odd[16 + i] << 16;
    }
#endif
}
