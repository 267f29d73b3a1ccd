// Variants: portable avx2 avx512 avx512_bf16 amx
// The three GEMMs, dense and grouped, on codes or BF16, with float32 sums (numerics/kernels/native_gemm.py).
//
// B is packed once a call, into panels of 32 output columns whose words are pairs of the contraction: the layout that
// AMX tiles and vdpbf16ps read. A is packed a block of rows at a time, where it stays in the cache. Both are decoded as
// they are packed, so a product of codes costs little more than one of BF16. Every output element is a sum in the order
// of the contraction that depends on nothing else: not on the number of rows, nor on where blocks begin.

#include "operand.h"
#include "transpose.h"

#include <stdlib.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Mirrored by numerics/kernels/native_gemm.py.
struct Problem {
    Operand a, b;
    int64_t kind, groups, fold, tokens, m, n, k;  // out [m, n]; of wgrad m is a group's rows and k unused
    const int64_t* offsets;                       // [groups + 1]; null for one group
    uint32_t* packed;
    void* out;
    int64_t out_type, out_stride;
};

namespace {

enum Kind : int64_t { FPROP, DGRAD, WGRAD };
enum OutType : int64_t { OUT_FLOAT32, OUT_BFLOAT16, OUT_ADDED };  // ADDED: to the float32 that is there
enum { PANEL = 32, WORDS = CHUNK / 2, BLOCK_BYTES = 256 * 1024, BLOCK_ROWS = 128, TOGETHER = 4 };

INLINE int64_t chunks_of(int64_t k) { return (k + CHUNK - 1) / CHUNK; }

struct Group {
    int64_t first, last;   // tokens
    int64_t chunks;        // of the contraction
    int64_t k;             // its length
    int64_t first_tile;    // row of the scales at `first`, for tiles 128 rows high
    const uint32_t* packed;
};

INLINE Group group_of(const Problem& p, int64_t g) {
    Group group;
    group.first = p.offsets ? p.offsets[g] : 0;
    group.last = p.offsets ? p.offsets[g + 1] : p.tokens;
    group.first_tile = p.offsets ? group.first / TILE + g : 0;
    int64_t panels = (p.n + PANEL - 1) / PANEL;
    group.k = p.kind == WGRAD ? group.last - group.first : p.k;
    group.chunks = chunks_of(group.k);
    int64_t before = p.kind == WGRAD ? group.first / CHUNK + g : g * group.chunks;
    group.packed = p.packed + before * panels * WORDS * PANEL;
    return group;
}

// Row of the scales for row r of an operand; `group` where tiles restart with it.
INLINE int64_t tile_of_row(const Operand& o, int64_t r, const Group* group) {
    if (o.tile_rows == 1) return o.index ? o.index[r] : r;
    if (group && o.tile_rows == TILE) return group->first_tile + (r - group->first) / TILE;
    return tile_along(r, o.tile_rows, o.row_segment);
}

// A block of 32 rows and one chunk of columns; rows from `count` on and columns from `width` on are zero.
template <int64_t TYPE>
INLINE void read_block(
    const Operand& o, int64_t r, int64_t count, int64_t c, int64_t width, int64_t columns, bool fold,
    const Group* group, Chunk block[CHUNK]) {
    Shifts shifts(o, fold && TYPE >= FROM_E4M3, c, columns);
#if defined(__AVX512BW__)
    bool whole = TYPE == FROM_E4M3 && width == CHUNK && !o.index && shifts.fold && count > 0;
    bool tokens = whole && shifts.uniform && o.tile_rows == 1;
    int64_t tile = whole && !tokens ? tile_of_row(o, r, group) : 0;
    if (tokens || (whole && o.tile_rows != 1 && tile == tile_of_row(o, r + count - 1, group))) {
        const uint8_t* codes = (const uint8_t*)o.data + r * o.stride + c;
        __m512i shift = tokens ? __m512i{} : load<__m512i>(shifts.at(tile));
        for (int64_t i = 0; i < count; ++i, codes += o.stride) {
            if (tokens) {
                float scale = o.scales[(r + i) * o.scale_stride + shifts.column[0]];
                shift = _mm512_set1_epi16((short)exponent_shift(scale));
            }
            store(block[i].v, folded(e4m3_to_bf16(load<__m256i>(codes)), shift));
        }
        for (int64_t i = count; i < CHUNK; ++i) block[i] = Chunk{};
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t* shift = shifts.fold ? shifts.at(tile_of_row(o, r + i, group)) : nullptr;
        block[i] = width == CHUNK ? read_chunk<TYPE>(row_of(o, r + i), c, CHUNK, shift)
                                  : read_chunk<TYPE>(row_of(o, r + i), c, width, shift);
    }
    for (int64_t i = count; i < CHUNK; ++i) block[i] = Chunk{};
}

void read_any_block(
    const Operand& o, int64_t r, int64_t count, int64_t c, int64_t width, int64_t columns, bool fold,
    const Group* group, Chunk block[CHUNK]) {
    if (o.type == FROM_E4M3) read_block<FROM_E4M3>(o, r, count, c, width, columns, fold, group, block);
    else if (o.type == FROM_BFLOAT16) read_block<FROM_BFLOAT16>(o, r, count, c, width, columns, fold, group, block);
    else if (o.type == FROM_FLOAT32) read_block<FROM_FLOAT32>(o, r, count, c, width, columns, fold, group, block);
    else read_block<FROM_E5M2>(o, r, count, c, width, columns, fold, group, block);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of the block are of the side's own dimension, columns of the contraction: word j of row i goes to[j * stride + i].
INLINE void put_across(const Chunk block[CHUNK], uint32_t* to, int64_t stride) {
    uint32_t words[16][16];
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 16; ++i) memcpy(words[i], block[half * 16 + i].v, 64);
        transpose_words(words, to + half * 16, stride);
    }
}

// One panel of one group.
void pack_panel(const Problem& p, const Group& group, int64_t g, int64_t panel, uint32_t* to) {
    Chunk block[CHUNK];
    int64_t first = panel * PANEL, count = least(PANEL, p.n - first);
    for (int64_t chunk = 0; chunk < group.chunks; ++chunk, to += WORDS * PANEL) {
        int64_t k = chunk * CHUNK, width = least(CHUNK, group.k - k);
        if (p.kind == FPROP) {
            read_any_block(p.b, g * p.n + first, count, k, width, p.k, p.fold, nullptr, block);
            put_across(block, to, PANEL);
            continue;
        }
        int64_t row = p.kind == DGRAD ? g * p.k + k : group.first + k;
        const Group* restarts = p.kind == WGRAD ? &group : nullptr;
        read_any_block(p.b, row, width, first, count, p.n, p.fold, restarts, block);
        for (int i = 0; i < WORDS; ++i) interleave(block[2 * i].v, block[2 * i + 1].v, to + i * PANEL, to + i * PANEL + 16);
    }
}

#if defined(__AVX512BF16__)
typedef bf16 element;  // of packed A
#else
typedef float element;
#endif

// Thirty-two rows of A as BF16, one chunk; `count` of them are there.
INLINE void pack_chunk(const Problem& p, const Group& group, int64_t row, int64_t count, int64_t k, Chunk to[CHUNK]) {
    int64_t width = least(CHUNK, group.k - k);
    if (p.kind != WGRAD) {
        read_any_block(p.a, row, count, k, width, p.k, p.fold, &group, to);
        return;
    }
    Chunk block[CHUNK];
    uint32_t words[2][16][16];  // [half of the rows][pair][row]
    read_any_block(p.a, group.first + k, width, row, count, p.m, p.fold, &group, block);
    for (int i = 0; i < WORDS; ++i) interleave(block[2 * i].v, block[2 * i + 1].v, words[0][i], words[1][i]);
    for (int half = 0; half < 2; ++half) transpose_words(words[half], (uint32_t*)(to + half * 16), 16);
}

// Thirty-two rows of A, [chunks][32][32]; rows from `count` on are zero.
void pack_rows(const Problem& p, const Group& group, int64_t row, int64_t count, element* to) {
    for (int64_t chunk = 0; chunk < group.chunks; ++chunk, to += CHUNK * CHUNK) {
#if defined(__AVX512BF16__)
        pack_chunk(p, group, row, count, chunk * CHUNK, (Chunk*)to);
#else
        Chunk block[CHUNK];
        pack_chunk(p, group, row, count, chunk * CHUNK, block);
        for (int i = 0; i < CHUNK; ++i)
            for (int j = 0; j < CHUNK; j += LANES) store(to + i * CHUNK + j, from_bf16(load<u16v>(block[i].v + j)));
#endif
    }
}

// c [32][32] = sum over `chunks` of a's rows times b's columns, from zero. A's rows are `stride` elements apart, its
// chunks `step`.
typedef float Square[PANEL][PANEL];

struct Rows {
    const element* at;
    int64_t stride, step;

    ALWAYS_INLINE Rows from(int64_t chunk) const { return {at + chunk * step, stride, step}; }
};

#if defined(__AMX_BF16__)

// GCC's tile intrinsics do not say that they read memory: without this it may write an operand after they read it.
INLINE void memory_barrier() { __asm__ volatile("" ::: "memory"); }

void product(Rows rows_of_a, const uint32_t* b, int64_t chunks, int64_t rows, Square& c) {
    const element* a = rows_of_a.at;
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t stride = rows_of_a.stride, step = rows_of_a.step, bytes = 2 * stride;
    for (int64_t i = 0; i < chunks; ++i, a += step, b += WORDS * PANEL) {
        _tile_loadd(6, b, 4 * PANEL);
        _tile_loadd(4, a, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 16, 4 * PANEL);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 16) {
            _tile_loadd(5, a + 16 * stride, bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, &c[0][0], 4 * PANEL);
    _tile_stored(1, &c[0][16], 4 * PANEL);
    _tile_stored(2, &c[16][0], 4 * PANEL);
    _tile_stored(3, &c[16][16], 4 * PANEL);
}

#elif defined(__AVX512BF16__)

void product(Rows rows_of_a, const uint32_t* b, int64_t chunks, int64_t rows, Square& c) {
    const element* a = rows_of_a.at;
    enum { ROWS = 8 };
    for (int64_t r = 0; r < rows; r += ROWS) {
        __m512 sum[ROWS][2] = {};
        const element* from = a + r * rows_of_a.stride;
        const uint32_t* words = b;
        for (int64_t i = 0; i < chunks; ++i, from += rows_of_a.step)
            for (int j = 0; j < WORDS; ++j, words += PANEL) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(words), right = (__m512bh)_mm512_loadu_si512(words + 16);
                for (int q = 0; q < ROWS; ++q) {
                    int32_t pair;
                    memcpy(&pair, from + q * rows_of_a.stride + 2 * j, 4);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                    sum[q][0] = _mm512_dpbf16_ps(sum[q][0], both, left);
                    sum[q][1] = _mm512_dpbf16_ps(sum[q][1], both, right);
                }
            }
        for (int q = 0; q < ROWS; ++q) {
            _mm512_storeu_ps(&c[r + q][0], sum[q][0]);
            _mm512_storeu_ps(&c[r + q][16], sum[q][1]);
        }
    }
}

#else

void product(Rows rows_of_a, const uint32_t* b, int64_t chunks, int64_t rows, Square& c) {
    const element* a = rows_of_a.at;
    enum { ROWS = LANES == 16 ? 8 : 4, WIDE = 2 };  // sums that fit the registers
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t column = 0; column < PANEL; column += WIDE * LANES) {
            f32v sum[ROWS][WIDE] = {};
            const element* from = a + r * rows_of_a.stride;
            const uint32_t* words = b + column;
            for (int64_t i = 0; i < chunks; ++i, from += rows_of_a.step)
                for (int j = 0; j < WORDS; ++j, words += PANEL) {
                    f32v even[WIDE], odd[WIDE];
                    for (int w = 0; w < WIDE; ++w) {
                        u32v pair = load<u32v>(words + w * LANES);
                        even[w] = from_bits(pair << 16);
                        odd[w] = from_bits(pair & 0xFFFF0000u);
                    }
                    for (int q = 0; q < ROWS; ++q) {
                        const element* pair = from + q * rows_of_a.stride + 2 * j;
                        f32v first = splat(pair[0]), second = splat(pair[1]);
                        for (int w = 0; w < WIDE; ++w)
                            sum[q][w] = fma(second, odd[w], fma(first, even[w], sum[q][w]));
                    }
                }
            for (int q = 0; q < ROWS; ++q)
                for (int w = 0; w < WIDE; ++w) store(&c[r + q][column + w * LANES], sum[q][w]);
        }
}

#endif

// Scales of a block of 128 of the contraction, for 32 rows or columns of an output.
void scales_of(const Operand& o, const Group* group, int64_t first, int64_t count, int64_t k,
               bool along_rows, int64_t row, float scale[PANEL]) {
    for (int64_t i = 0; i < count; ++i) {
        int64_t r = along_rows ? first + i : row + k, c = along_rows ? k : first + i;
        int64_t tile = tile_of_row(o, r, group);
        scale[i] = o.scales[tile * o.scale_stride + tile_along(c, o.tile_columns, o.column_segment)];
    }
    for (int64_t i = count; i < PANEL; ++i) scale[i] = 0;
}

// The law's sum: for each block of 128 a sum from zero, then y = fma(s_a * s_b, p, y).
void promoted(const Problem& p, const Group& group, int64_t g, Rows a, const uint32_t* b, int64_t row,
              int64_t rows, int64_t column, int64_t columns, Square& y) {
    enum { BLOCK = TILE / CHUNK };
    Square part;
    float left[PANEL], right[PANEL];
    memset(y, 0, sizeof y);
    for (int64_t chunk = 0; chunk < group.chunks; chunk += BLOCK) {
        int64_t k = chunk * CHUNK;
        product(a.from(chunk), b + chunk * WORDS * PANEL, least(BLOCK, group.chunks - chunk), rows, part);
        scales_of(p.a, &group, row, rows, k, p.kind != WGRAD, group.first, left);
        int64_t b_first = p.kind == FPROP ? g * p.n + column : column;
        const Group* restarts = p.kind == WGRAD ? &group : nullptr;
        scales_of(p.b, restarts, b_first, columns, k, p.kind == FPROP, p.kind == DGRAD ? g * p.k : group.first, right);
        for (int64_t i = 0; i < rows; ++i)
            for (int j = 0; j < PANEL; j += LANES) {
                f32v scale = splat(left[i]) * load<f32v>(right + j);
                store(&y[i][j], fma(scale, load<f32v>(&part[i][j]), load<f32v>(&y[i][j])));
            }
    }
}

INLINE void put(float* to, f32v v) { store(to, v); }
#if defined(__AVX512BF16__)
INLINE void put(bf16* to, f32v v) { store(to, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
INLINE void put(bf16* to, f32v v) { write(to, v); }
#endif

template <typename T, bool ADD>
INLINE void write_square(const Square& c, int64_t rows, int64_t columns, T* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, to += stride)
        for (int64_t j = 0; j < columns; j += LANES) {
            f32v v = load<f32v>(&c[i][j]);
            int64_t left = columns - j;
            if (left >= LANES) put(to + j, ADD ? v + read(to + j) : v);
            else write_part(to + j, ADD ? v + read_part(to + j, left) : v, left);
        }
}

#if defined(__AVX512BF16__)
INLINE void write_whole_rows(const Square& c, int64_t rows, bf16* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, to += stride)
        store(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(c[i] + 16), _mm512_load_ps(c[i])));
}
#else
INLINE void write_whole_rows(const Square& c, int64_t rows, bf16* to, int64_t stride) {
    write_square<bf16, false>(c, rows, PANEL, to, stride);
}
#endif

// A large result is gone from the cache before anybody reads it, and its rows lie so far apart that a square's fall on the
// same few lines of it: whole lines are written past it. False where this one is not.
INLINE bool wrote_past_cache(const Problem& p, const Square& c, int64_t rows, int64_t columns, int64_t at) {
#if defined(__AVX512F__)
    enum { LARGE = 1 << 20 };  // elements
    float* to = (float*)p.out + at;
    if (p.out_type != OUT_FLOAT32 || p.kind == WGRAD || p.m * p.n < LARGE || columns != PANEL) return false;
    if ((uintptr_t)to % 64 || p.out_stride % 16) return false;
    for (int64_t i = 0; i < rows; ++i, to += p.out_stride)
        for (int j = 0; j < PANEL; j += 16) _mm512_stream_ps(to + j, _mm512_load_ps(c[i] + j));
    return true;
#else
    return false;
#endif
}

INLINE void write_out(const Problem& p, const Square& c, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    int64_t at = row * p.out_stride + column;
    if (p.out_type == OUT_BFLOAT16 && columns == PANEL) write_whole_rows(c, rows, (bf16*)p.out + at, p.out_stride);
    else if (p.out_type == OUT_BFLOAT16) write_square<bf16, false>(c, rows, columns, (bf16*)p.out + at, p.out_stride);
    else if (wrote_past_cache(p, c, rows, columns, at)) return;
    else if (p.out_type == OUT_FLOAT32) write_square<float, false>(c, rows, columns, (float*)p.out + at, p.out_stride);
    else write_square<float, true>(c, rows, columns, (float*)p.out + at, p.out_stride);
}

// BF16 rows that can be read where they lie: whole chunks, and rows not so far apart that all fall on the same few lines
// of the cache.
INLINE bool lies_ready(const Problem& p) {
#if defined(__AVX512BF16__)
    return p.kind != WGRAD && p.a.type == FROM_BFLOAT16 && !p.a.index && p.k % CHUNK == 0 && p.a.stride % 1024 != 0;
#else
    return false;
#endif
}

// Rows [from, to) of A in one group; `base` is their distance to the rows of the output.
void multiply(const Problem& p, const Group& group, int64_t g, int64_t from, int64_t to, int64_t base, element* a,
              int64_t block) {
    int64_t square = group.chunks * CHUNK * CHUNK;
    bool ready = lies_ready(p);
    for (int64_t top = from; top < to; top += block) {
        int64_t bottom = least(top + block, to);
        for (int64_t row = top; row < bottom; row += PANEL)
            if (!ready || bottom - row < PANEL)
                pack_rows(p, group, row, least(PANEL, bottom - row), a + (row - top) / PANEL * square);
        for (int64_t first = 0; first < p.n; first += TOGETHER * PANEL)
            for (int64_t row = top; row < bottom; row += PANEL) {
                int64_t rows = least(PANEL, bottom - row);
                Rows left = {a + (row - top) / PANEL * square, CHUNK, CHUNK * CHUNK};
                if (ready && rows == PANEL) left = {(const element*)p.a.data + row * p.a.stride, p.a.stride, CHUNK};
                for (int64_t column = first; column < least(first + TOGETHER * PANEL, p.n); column += PANEL) {
                    const uint32_t* b = group.packed + column * group.chunks * WORDS;
                    alignas(64) Square c;
                    int64_t columns = least(PANEL, p.n - column);
                    if (p.fold) product(left, b, group.chunks, rows, c);
                    else promoted(p, group, g, left, b, row, rows, column, columns, c);
                    write_out(p, c, base + row, rows, column, columns);
                }
            }
    }
}

}  // namespace

// Panels [begin, end) of B, counted through all groups.
TESSERA_ENTRY(void, gemm_pack)(int64_t begin, int64_t end, const Problem* problem) {
    const Problem& p = *problem;
    int64_t panels = (p.n + PANEL - 1) / PANEL;
    for (int64_t i = begin; i < end; ++i) {
        int64_t g = i / panels;
        Group group = group_of(p, g);
        pack_panel(p, group, g, i % panels, (uint32_t*)group.packed + i % panels * group.chunks * WORDS * PANEL);
    }
}

// Rows [begin, end) of the output: tokens, or for wgrad the rows of all groups' gradients.
TESSERA_ENTRY(void, gemm)(int64_t begin, int64_t end, const Problem* problem) {
    const Problem& p = *problem;
    if (begin >= end || p.n == 0) return;
#if defined(__AMX_BF16__)
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t width[16];
        uint8_t height[16];
    } tiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    memory_barrier();
    _tile_loadconfig(&tiles);
#endif
    int64_t longest = 0;
    for (int64_t g = 0; g < p.groups; ++g) {
        int64_t chunks = group_of(p, g).chunks;
        longest = chunks > longest ? chunks : longest;
    }
    int64_t row_bytes = (longest ? longest : 1) * CHUNK * (int64_t)sizeof(element);
    int64_t block = BLOCK_BYTES / row_bytes / PANEL * PANEL;
    block = block < PANEL ? PANEL : least(block, BLOCK_ROWS);
    block = least(block, (end - begin + PANEL - 1) / PANEL * PANEL);
    element* a = (element*)aligned_alloc(64, (size_t)(block * row_bytes));
    for (int64_t g = 0; g < p.groups; ++g) {
        Group group = group_of(p, g);
        int64_t first = p.kind == WGRAD ? g * p.m : group.first, last = p.kind == WGRAD ? first + p.m : group.last;
        int64_t from = first > begin ? first : begin, to = last < end ? last : end;
        if (from >= to) continue;
        int64_t base = p.kind == WGRAD ? first : 0;  // rows of A are counted within a group there
        multiply(p, group, g, from - base, to - base, base, a, block);
    }
    free(a);
#if defined(__AMX_BF16__)
    _tile_release();
#endif
}

// 1 where the scales of both sides, powers of two all of them, are at most 2^`range` and at least 2^-`range`, and their
// products 2^`product_range`.
TESSERA_ENTRY(int64_t, foldable)(
    int64_t, int64_t, const float* a, int64_t a_count, const float* b, int64_t b_count, int64_t range,
    int64_t product_range) {
    int64_t low = 0, high = 0;
    for (int side = 0; side < 2; ++side) {
        const float* scales = side ? b : a;
        int64_t count = side ? b_count : a_count;
        if (count == 0) continue;
        uint32_t smallest = 255, largest = 0, fraction = 0;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t u = bits(scales[i]), exponent = u >> 23;
            fraction |= u & FRACTION_MASK;
            smallest = exponent < smallest ? exponent : smallest;
            largest = exponent > largest ? exponent : largest;
        }
        int64_t least_exponent = (int64_t)smallest - 127, most = (int64_t)largest - 127;
        if (fraction || least_exponent < -range || most > range) return 0;
        low += least_exponent, high += most;
    }
    return low >= -product_range && high <= product_range;
}
