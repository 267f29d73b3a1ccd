// E5M6 codes in memory: two of 12 bits, a and b, in the three little-endian bytes of a | b << 12.
#pragma once

#include "isa.h"

// The first `count` of a vector's codes; an odd one is followed by a zero.
INLINE void write_twelve_part(uint8_t* to, u32v code, int64_t count) {
    for (int64_t i = 0; i < count; i += 2) {
        uint32_t pair = (code[i] & 0xFFF) | (i + 1 < count ? code[i + 1] & 0xFFF : 0) << 12;
        to[0] = (uint8_t)pair, to[1] = (uint8_t)(pair >> 8), to[2] = (uint8_t)(pair >> 16);
        to += 3;
    }
}

INLINE u32v read_twelve_part(const uint8_t* from, int64_t count) {
    u32v code = {};
    for (int64_t i = 0; i < count; i += 2, from += 3) {
        uint32_t pair = (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16;
        code[i] = pair & 0xFFF;
        if (i + 1 < count) code[i + 1] = pair >> 12;
    }
    return code;
}

#if defined(__AVX2__)

typedef uint64_t u64v __attribute__((vector_size(4 * TESSERA_LANES)));
typedef uint32_t u32h __attribute__((vector_size(2 * TESSERA_LANES)));  // a pair each
enum { PAIRS = 4, GROUP = 12 };                                        // pairs of a 16-byte group, and their bytes

// LANES codes, 3 / 2 bytes each.
INLINE void write_twelve(uint8_t* to, u32v code) {
    u64v both = (u64v)(code & 0xFFF);
    u32h pairs = __builtin_convertvector(both | both >> 20, u32h);
    uint8_t bytes[LANES / 2 * 4 + 4];
    store(bytes, pairs);
    const __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (int group = 0; group < LANES / 2 / PAIRS; ++group) {
        __m128i packed = _mm_shuffle_epi8(load<__m128i>(bytes + 16 * group), order);
        memcpy(to + GROUP * group, &packed, GROUP);
    }
}

INLINE u32v read_twelve(const uint8_t* from) {
    const __m128i order = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    uint8_t bytes[LANES / 2 * 4];
    for (int group = 0; group < LANES / 2 / PAIRS; ++group) {
        __m128i packed = {};
        memcpy(&packed, from + GROUP * group, GROUP);
        store(bytes + 16 * group, _mm_shuffle_epi8(packed, order));
    }
    u64v both = __builtin_convertvector(load<u32h>(bytes), u64v);
    return (u32v)((both & 0xFFF) | (both & 0xFFF000) << 20);
}

#else

INLINE void write_twelve(uint8_t* to, u32v code) { write_twelve_part(to, code, LANES); }
INLINE u32v read_twelve(const uint8_t* from) { return read_twelve_part(from, LANES); }

#endif
