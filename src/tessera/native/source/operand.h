// A GEMM operand as it lies in memory, read as BF16: codes with their scales, BF16, or float32 rounded to BF16.
//
// E4M3 and E5M2 are exact in BF16, and stay so times a power of two. So where all scales are powers of two that keep
// values normal, the scale is folded into the value as it is read; otherwise values are read bare, and scales are
// applied to float32 sums (gemm.cpp).
#pragma once

#include "fp8.h"

enum OperandType : int64_t { FROM_FLOAT32, FROM_BFLOAT16, FROM_E4M3, FROM_E5M2 };

// Mirrored by numerics/kernels/native_gemm.py. Tiles and segments are those of numerics/tiles.py; `index` [rows] or null:
// row r is row index[r] of `data` (and of the scales, where tiles are one row high).
struct Operand {
    const void* data;
    const float* scales;
    const int64_t* index;
    int64_t type, stride, scale_stride, tile_rows, tile_columns, row_segment, column_segment;
};

enum { TILE = 128 };

INLINE int64_t tile_along(int64_t at, int64_t tile, int64_t segment) {
    if (tile == 1) return at;
    if (tile == 0) return at / segment;
    return at / segment * ((segment + TILE - 1) / TILE) + at % segment / TILE;
}

// How far a power-of-two scale moves a BF16 exponent, in place; a float32 scale that is no power of two never gets here.
INLINE uint16_t exponent_shift(float scale) { return (uint16_t)((bits(scale) >> 16) - 0x3F80); }

// Thirty-two columns of one row as BF16.
enum { CHUNK = 32 };
struct Chunk {
    uint16_t v[CHUNK];
};

// v * 2^k for a value of BF16 bits `u` (k = shift / 128); zeros and NaN stay.
INLINE uint16_t shifted(uint16_t u, uint16_t shift) {
    uint16_t magnitude = u & 0x7FFF;
    return magnitude == 0 || magnitude >= 0x7F80 ? u : (uint16_t)(u + shift);
}

INLINE const uint8_t* row_of(const Operand& o, int64_t r) {
    int64_t size = o.type == FROM_FLOAT32 ? 4 : o.type == FROM_BFLOAT16 ? 2 : 1;
    return (const uint8_t*)o.data + (o.index ? o.index[r] : r) * o.stride * size;
}

// Columns [c, c + count) as BF16, zero from `count` on; `shift` points at the exponents of column c, or is null.
template <int64_t TYPE>
INLINE Chunk read_chunk(const uint8_t* row, int64_t c, int64_t count, const uint16_t* shift) {
    Chunk chunk = {};
    if (TYPE == FROM_BFLOAT16) {
        memcpy(chunk.v, row + 2 * c, 2 * (size_t)count);
        return chunk;
    }
    if (TYPE == FROM_FLOAT32) {
        float values[CHUNK] = {};
        memcpy(values, row + 4 * c, 4 * (size_t)count);
        for (int i = 0; i < CHUNK; i += LANES) store(chunk.v + i, to_bf16(load<f32v>(values + i)));
        return chunk;
    }
    uint8_t codes[CHUNK] = {};
    memcpy(codes, row + c, (size_t)count);
#if defined(__AVX512BW__)
    if (TYPE == FROM_E4M3) {
        __m512i v = e4m3_to_bf16(load<__m256i>(codes));
        if (shift) v = folded(v, load<__m512i>(shift));
        store(chunk.v, v);
        return chunk;
    }
#endif
    for (int i = 0; i < CHUNK; i += LANES) {
        u32v code = widen(load<u8v>(codes + i));
        f32v value = TYPE == FROM_E4M3 ? decode<E4M3>(code) : decode<E5M2>(code);
        store(chunk.v + i, narrow16(bits(value) >> 16));
    }
    if (shift)
        for (int i = 0; i < CHUNK; ++i) chunk.v[i] = shifted(chunk.v[i], shift[i]);
    return chunk;
}

// The folded exponents of columns [c, c + CHUNK), for one row after the other. Which tiles the columns lie in is the same
// for all rows, and found once: divisions are slow.
struct Shifts {
    const Operand& o;
    bool fold, uniform;
    int64_t last;           // row of tiles that `shift` is of
    int64_t column[CHUNK];  // of tiles
    uint16_t shift[CHUNK];

    ALWAYS_INLINE Shifts(const Operand& operand, bool wanted, int64_t c, int64_t columns)
        : o(operand), fold(wanted), uniform(false), last(-1) {
        if (!fold) return;
        int64_t count = c + CHUNK < columns ? CHUNK : columns - c;
        column[0] = tile_along(c, o.tile_columns, o.column_segment);
        uniform = column[0] == tile_along(c + count - 1, o.tile_columns, o.column_segment) && o.tile_columns != 1;
        for (int64_t i = 1; i < CHUNK; ++i)  // those behind the last column are of no matter
            column[i] = uniform || i >= count ? column[0] : tile_along(c + i, o.tile_columns, o.column_segment);
    }

    ALWAYS_INLINE const uint16_t* at(int64_t tile) {
        if (tile == last) return shift;
        last = tile;
        const float* scales = o.scales + tile * o.scale_stride;
        if (uniform) {
            uint16_t one = exponent_shift(scales[column[0]]);
            for (int i = 0; i < CHUNK; ++i) shift[i] = one;
        } else {
            for (int i = 0; i < CHUNK; ++i) shift[i] = exponent_shift(scales[column[i]]);
        }
        return shift;
    }
};
