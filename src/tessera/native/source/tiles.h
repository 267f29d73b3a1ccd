// Products of matrices that lie in tiles: 16 rows of 16 words of 32 bits, 1 KB in one piece, as AMX has them.
//
// A word of an operand is two neighbouring BF16 elements of the contraction where the set multiplies pairs (AMX,
// AVX-512 BF16), else one float32 that holds a BF16 value; DEPTH elements of the contraction fill a tile.
//   A: 16 rows of the result x DEPTH, a row's words along the contraction
//   B: DEPTH x 16 columns of the result, a row of the tile is one word of each column
//   C: 16 x 16 float32
// Sums run along the contraction in order, each element of C for itself: its bits do not depend on how many rows and
// columns are multiplied together. The instructions on pairs take subnormal BF16 as zero.
#pragma once

#include "isa.h"
#include "transpose.h"

#if defined(__AVX512BF16__)
enum { PAIR = 2 };
#else
enum { PAIR = 1 };
#endif
enum { SIDE = 16, TILE = SIDE * SIDE, DEPTH = SIDE * PAIR };  // TILE: words

// Vectors of LANES values that become words. The set's instruction takes subnormal numbers as zero.
INLINE u32v rounded(f32v x) {
    u32v u = bits(x), r = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000;
    return choose(x != x, u | 0x00400000, r);
}

#if defined(__AVX512BF16__)

INLINE u32v beside(f32v a, f32v b) {  // 16 BF16 of a, then 16 of b
    return (u32v)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

INLINE u32v stacked(f32v a, f32v b) {  // a in the low halves, b in the high ones
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (u32v)_mm512_permutexvar_epi16(order, (__m512i)beside(a, b));
}

// Rows `row` (even) and row + 1 of the contraction into B tiles that lie one behind the other: values of LANES columns.
INLINE void put_down(uint32_t* to, int64_t row, f32v a, f32v b) { store(to + row / 2 * SIDE, stacked(a, b)); }

// 32 elements along the contraction into a row of A tiles.
INLINE void put_along(uint32_t* to, const f32v* x) { store(to, beside(x[0], x[1])); }

#else

INLINE void put_down(uint32_t* to, int64_t row, f32v a, f32v b) {
    store(to + row * SIDE, rounded(a));
    store(to + (row + 1) * SIDE, rounded(b));
}

INLINE void put_along(uint32_t* to, const f32v* x) {
    for (int c = 0; c < 32; c += LANES) store(to + c / SIDE * TILE + c % SIDE, rounded(x[c / LANES]));
}

#endif

// Packing from rows of BF16 in memory, `stride` elements apart, zero up to a multiple of 32 rows and columns.

INLINE void put_tile(uint32_t* to, const uint32_t (&x)[SIDE][SIDE], bool turned) {
    if (turned) transpose_words(x, to, SIDE);
    else memcpy(to, x, sizeof x);
}

// 16 rows against the contraction along them: A as it is, B turned. `tiles` tiles along the rows.
template <bool TURNED>
INLINE void pack_along(uint32_t* to, const bf16* rows, int64_t stride, int64_t tiles) {
    for (int64_t k = 0; k < tiles; ++k, to += TILE) {
        uint32_t x[SIDE][SIDE];
        for (int i = 0; i < SIDE; ++i)
            for (int c = 0; c < SIDE; c += LANES) {
                const bf16* from = rows + i * stride + k * DEPTH + c * PAIR;
                store(x[i] + c, PAIR == 2 ? load<u32v>(from) : widen(load<u16v>(from)) << 16);
            }
        put_tile(to, x, TURNED);
    }
}

// The contraction goes down DEPTH rows: B as it is, A turned. One tile for each 16 columns, `apart` words apart.
template <bool TURNED>
INLINE void pack_down(uint32_t* to, int64_t apart, const bf16* rows, int64_t stride, int64_t tiles) {
    for (int64_t k = 0; k < tiles; ++k, to += apart) {
        uint32_t x[SIDE][SIDE];
        for (int i = 0; i < SIDE; ++i)
            for (int c = 0; c < SIDE; c += LANES) {
                const bf16* from = rows + i * PAIR * stride + k * SIDE + c;
                u32v low = widen(load<u16v>(from));
                store(x[i] + c, PAIR == 2 ? low | widen(load<u16v>(from + stride)) << 16 : low << 16);
            }
        put_tile(to, x, TURNED);
    }
}

namespace {  // a copy for each instruction set

// As long as this lives, float32 arithmetic takes and gives zero for subnormal numbers, as the products do by themselves:
// a processor is a hundred times slower at them.
struct NoSubnormals {
#if defined(__SSE2__)
    unsigned before = __builtin_ia32_stmxcsr();
    NoSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // flush to zero, denormals are zero
    ~NoSubnormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

#if defined(__AMX_BF16__)

struct Tiles {  // the tile registers, all 16 rows of 64 bytes, for as long as this lives
    Tiles() {
        struct {
            uint8_t palette, start, zero[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic tells the compiler of its first bytes only
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

template <int ROWS, int COLUMNS, bool ADD>
INLINE void multiply_block(float* c, int64_t ci, int64_t cj, const uint32_t* a, int64_t ai, const uint32_t* b, int64_t bj,
                           int64_t depth) {
    if (ADD) {
        _tile_loadd(0, c, 64);
        if (COLUMNS > 1) _tile_loadd(1, c + cj, 64);
        if (ROWS > 1) _tile_loadd(2, c + ci, 64);
        if (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, c + ci + cj, 64);
    } else {
        _tile_zero(0);
        if (COLUMNS > 1) _tile_zero(1);
        if (ROWS > 1) _tile_zero(2);
        if (ROWS > 1 && COLUMNS > 1) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; ++k, a += TILE, b += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (COLUMNS > 1) _tile_loadd(7, b + bj, 64);
        if (COLUMNS > 1) _tile_dpbf16ps(1, 4, 7);
        if (ROWS > 1) _tile_loadd(5, a + ai, 64);
        if (ROWS > 1) _tile_dpbf16ps(2, 5, 6);
        if (ROWS > 1 && COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    if (COLUMNS > 1) _tile_stored(1, c + cj, 64);
    if (ROWS > 1) _tile_stored(2, c + ci, 64);
    if (ROWS > 1 && COLUMNS > 1) _tile_stored(3, c + ci + cj, 64);
}

enum { BLOCK_ROWS = 2, BLOCK_COLUMNS = 2 };

#else

struct Tiles {
    Tiles() {}
    ~Tiles() {}
};

INLINE f32v add_product(f32v sum, uint32_t a, u32v b) {
#if defined(__AVX512BF16__)
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32((int)a));
#else
    return fma(splat(from_bits(a)), from_bits(b), sum);
#endif
}

#if defined(__AVX512F__)
enum { AT_ONCE = 16 };  // rows of C in registers
#elif defined(__AVX2__)
enum { AT_ONCE = 4 };
#else
enum { AT_ONCE = 2 };
#endif
enum { PARTS = SIDE / LANES };

template <int ROWS, int COLUMNS, bool ADD>
INLINE void multiply_block(float* c, int64_t, int64_t, const uint32_t* a, int64_t, const uint32_t* b, int64_t,
                           int64_t depth) {
    for (int row = 0; row < SIDE; row += AT_ONCE) {
        f32v sum[AT_ONCE][PARTS];
        for (int i = 0; i < AT_ONCE; ++i)
            for (int j = 0; j < PARTS; ++j) sum[i][j] = ADD ? load<f32v>(c + (row + i) * SIDE + j * LANES) : f32v{};
        for (int64_t k = 0; k < depth; ++k)
            for (int r = 0; r < SIDE; ++r) {
                const uint32_t* from = a + k * TILE + row * SIDE + r;
                u32v line[PARTS];
                for (int j = 0; j < PARTS; ++j) line[j] = load<u32v>(b + k * TILE + r * SIDE + j * LANES);
                for (int i = 0; i < AT_ONCE; ++i)
                    for (int j = 0; j < PARTS; ++j) sum[i][j] = add_product(sum[i][j], from[i * SIDE], line[j]);
            }
        for (int i = 0; i < AT_ONCE; ++i)
            for (int j = 0; j < PARTS; ++j) store(c + (row + i) * SIDE + j * LANES, sum[i][j]);
    }
}

enum { BLOCK_ROWS = 1, BLOCK_COLUMNS = 1 };

#endif

// C = A B, or C += A B: rows x columns tiles, `depth` tiles of contraction, which lie one behind the other. ci, cj: from
// one row and one column of C's tiles to the next; ai, bj: from one row of A's, one column of B's; all in words.
template <bool ADD>
INLINE void multiply(float* c, int64_t ci, int64_t cj, const uint32_t* a, int64_t ai, const uint32_t* b, int64_t bj,
                     int64_t rows, int64_t columns, int64_t depth) {
    __asm__ volatile("" ::: "memory");  // the compiler does not know that loading a tile reads memory
    int64_t i = 0;
    for (; i + BLOCK_ROWS <= rows; i += BLOCK_ROWS) {
        int64_t j = 0;
        for (; j + BLOCK_COLUMNS <= columns; j += BLOCK_COLUMNS)
            multiply_block<BLOCK_ROWS, BLOCK_COLUMNS, ADD>(c + i * ci + j * cj, ci, cj, a + i * ai, ai, b + j * bj, bj, depth);
        for (; j < columns; ++j)
            multiply_block<BLOCK_ROWS, 1, ADD>(c + i * ci + j * cj, ci, cj, a + i * ai, ai, b + j * bj, bj, depth);
    }
    for (; i < rows; ++i) {
        int64_t j = 0;
        for (; j + BLOCK_COLUMNS <= columns; j += BLOCK_COLUMNS)
            multiply_block<1, BLOCK_COLUMNS, ADD>(c + i * ci + j * cj, ci, cj, a + i * ai, ai, b + j * bj, bj, depth);
        for (; j < columns; ++j)
            multiply_block<1, 1, ADD>(c + i * ci + j * cj, ci, cj, a + i * ai, ai, b + j * bj, bj, depth);
    }
}

}  // namespace
