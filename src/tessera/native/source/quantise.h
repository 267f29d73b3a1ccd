// Quantising the tiles of a matrix: amax, scale and cast of each in one visit, from whatever gives its rows.
//
// A source has row(r), what of row r its other members need; at(row, c), LANES values from column c on; part(row, c,
// count), fewer, with zeros behind; one(row, c), for tiles one row high; narrow(row, c, count), up to WIDE values as
// 16 bits each (to_odd), zeros behind; BF16, whether those are the values themselves; ahead(row, c), a hint
// that NARROW_STRIP columns from c on are read soon.
#pragma once

#include "fp8.h"
#include "twelve_bits.h"

namespace {

// STRIP: columns that tiles 128 rows high are worked on at once, as float32; NARROW_STRIP: in 16 bits, one tile of 128
// columns. Either fits the nearest cache.
enum { TILE = 128, STRIP = 64, NARROW_STRIP = TILE };

// The upper 16 bits of float32 values, the last of them set where any of the lower ones is. A code has so few bits that
// rounding these gives what rounding the value gives: rounding to odd before rounding to nearest is exact where two bits
// more are kept (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). Comparisons with numbers of
// at most 15 bits come out the same as well.
INLINE u16w to_odd(f32v left, f32v right) {
#if defined(__AVX512BW__)
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                           23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i lower = _mm512_sub_epi16(upper, _mm512_set1_epi16(1));
    __m512i high = _mm512_permutex2var_epi16((__m512i)left, upper, (__m512i)right);
    __m512i low = _mm512_permutex2var_epi16((__m512i)left, lower, (__m512i)right);
    __mmask32 inexact = _mm512_test_epi16_mask(low, low);
    return (u16w)_mm512_or_si512(high, _mm512_maskz_set1_epi16(inexact, 1));
#else
    u32v a = bits(left), b = bits(right);
    a = a >> 16 | ((u32v)((a & 0xFFFF) != 0) & 1);
    b = b >> 16 | ((u32v)((b & 0xFFFF) != 0) & 1);
    return join(a, b);
#endif
}

// What is read: `rows` of float32 or BF16, row `index[r]` in place of r where an index is given.
template <typename T>
struct Values {
    static constexpr bool BF16 = sizeof(T) == 2;
    const T* x;
    int64_t stride;
    const int64_t* index;

    ALWAYS_INLINE const T* row(int64_t r) const { return x + (index ? index[r] : r) * stride; }
    ALWAYS_INLINE f32v at(const T* row, int64_t c) const { return read(row + c); }
    ALWAYS_INLINE f32v part(const T* row, int64_t c, int64_t count) const { return read_part(row + c, count); }
    ALWAYS_INLINE float one(const T* row, int64_t c) const { return widened(row[c]); }
    ALWAYS_INLINE u16w narrow(const T* row, int64_t c, int64_t count) const { return narrow_of(row + c, count); }
    ALWAYS_INLINE void ahead(const T* row, int64_t c) const {
        for (int64_t i = 0; i < NARROW_STRIP; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + c + i);
    }
    static ALWAYS_INLINE u16w narrow_of(const bf16* x, int64_t count) {
        u16w v = {};
        if (count == WIDE) v = load<u16w>(x);
        else memcpy(&v, x, 2 * (size_t)count);
        return v;
    }
    static ALWAYS_INLINE u16w narrow_of(const float* x, int64_t count) {
        if (count == WIDE) return to_odd(read(x), read(x + LANES));
        if (count <= LANES) return to_odd(count == LANES ? read(x) : read_part(x, count), f32v{});
        return to_odd(read(x), read_part(x + LANES, count - LANES));
    }
    static ALWAYS_INLINE float widened(float x) { return x; }
    static ALWAYS_INLINE float widened(bf16 x) { return from_bf16(x); }
};

// Columns [c, c + count) of a row of codes, count <= LANES; in 12 bits c is even.
template <typename F>
INLINE u32v read_codes(const uint8_t* row, int64_t c, int64_t count) {
    if (F::M == 6) return count == LANES ? read_twelve(row + c / 2 * 3) : read_twelve_part(row + c / 2 * 3, count);
    return widen(count == LANES ? load<u8v>(row + c) : load_part<u8v>(row + c, count));
}

template <typename F>
INLINE void write_codes_part(uint8_t* to, u32v code, int64_t count) {
    if (F::M == 6) write_twelve_part(to, code, count);
    else store_part(to, narrow8(code), count);
}

template <typename F>
INLINE uint8_t* code_at(uint8_t* row, int64_t column) {
    return F::M == 6 ? row + column / 2 * 3 : row + column;
}

// One row's elements [from, to) are a tile.
template <typename F, typename S>
void encode_row_tile(S source, decltype(source.row(0)) x, int64_t from, int64_t to, float inverse, uint8_t* codes) {
    f32v factor = splat(inverse);
    int64_t c = from;
    for (; c + LANES <= to; c += LANES) {
        u32v code = codes_of<F>(source.at(x, c), factor);
        if (F::M == 6) write_twelve(code_at<F>(codes, c), code);
        else store(codes + c, narrow8(code));
    }
    if (c < to) write_codes_part<F>(code_at<F>(codes, c), codes_of<F>(source.part(x, c, to - c), factor), to - c);
}

INLINE bool is_finite(float x) { return (bits(x) & MAGNITUDE) < INFINITE; }

// The code of a non-finite element; returns 1.
template <typename F>
int64_t spoil(uint8_t* codes, int64_t column) {
    uint8_t* at = code_at<F>(codes, column);
    if (F::M != 6) *at = F::NAN_CODE;
    else if (column % 2 == 0) at[0] = (uint8_t)F::NAN_CODE, at[1] = (uint8_t)((at[1] & 0xF0) | F::NAN_CODE >> 8);
    else at[1] = (uint8_t)((at[1] & 0x0F) | (F::NAN_CODE << 4 & 0xF0)), at[2] = (uint8_t)(F::NAN_CODE >> 4);
    return 1;
}

// Codes of WIDE elements in 16 bits. `smallest` and `moved` are those of Narrow, by column; `inverse` points at theirs.
template <typename F>
INLINE u8w codes_of_narrow(u16w x, u16w smallest, u16w moved, const float* inverse) {
    u8w code;
    if (__builtin_expect(encode_narrow<F>(x, smallest, moved, code), 1)) return code;
    uint16_t values[WIDE];
    uint8_t codes[WIDE];
    store(values, x);
    for (int i = 0; i < WIDE; i += LANES)
        store(codes + i, narrow8(codes_of<F>(read(values + i), load<f32v>(inverse + i))));
    return load<u8w>(codes);
}

// True where codes of 16-bit values are those of the values: no element is infinite or NaN, and where bits were dropped
// (to_odd) the tile's steps are far above what subnormal numbers lose. `amax` has the upper bits of a float32.
template <typename S>
INLINE bool narrow_enough(uint16_t amax) {
    return amax < INFINITE >> 16 && (S::BF16 || amax == 0 || amax >= (127 - 60) << 7);
}

// One tile of one row under a power of two; false where it cannot be done in 16 bits.
template <typename F, typename S>
INLINE bool quantise_narrow_tile(
    S source, decltype(source.row(0)) x, int64_t from, int64_t to, uint8_t* codes, float* scale) {
    u16w most = {};
    int64_t c = from;
    for (; c + WIDE <= to; c += WIDE) most = larger(most, source.narrow(x, c, WIDE) & 0x7FFF);
    if (c < to) most = larger(most, source.narrow(x, c, to - c) & 0x7FFF);
    uint16_t amax = largest_lane(most);
    if (!narrow_enough<S>(amax)) return false;
    int32_t exponent = scale_exponent<F>((uint32_t)amax << 16);
    *scale = from_bits((uint32_t)exponent << 23);
    Narrow<F> n = Narrow<F>::of(exponent);
    u16w smallest = u16w{} + n.smallest, moved = u16w{} + n.moved;
    float inverse[WIDE];
    for (int i = 0; i < WIDE; ++i) inverse[i] = from_bits((uint32_t)(254 - exponent) << 23);
    for (c = from; c + WIDE <= to; c += WIDE)
        store(codes + c, codes_of_narrow<F>(source.narrow(x, c, WIDE), smallest, moved, inverse));
    if (c < to) {
        u8w code = codes_of_narrow<F>(source.narrow(x, c, to - c), smallest, moved, inverse);
        memcpy(codes + c, &code, (size_t)(to - c));
    }
    return true;
}

// Tiles one row high and `tile` columns wide (0: a whole segment); they restart every `segment` columns.
template <typename F, typename S>
int64_t quantise_row(
    S source, int64_t r, int64_t columns, int64_t tile, int64_t segment, bool power_of_two, uint8_t* codes,
    float* scales) {
    auto x = source.row(r);
    int64_t nonfinite = 0, next = 0;
    for (int64_t start = 0; start < columns; start += segment) {
        int64_t end = start + segment, width = tile ? tile : segment;
        for (int64_t from = start; from < end; from += width) {
            int64_t to = from + width < end ? from + width : end;
            if (F::M != 6 && power_of_two && quantise_narrow_tile<F>(source, x, from, to, codes, scales + next)) {
                ++next;
                continue;
            }
            u32v most = {};
            int64_t c = from;
            for (; c + LANES <= to; c += LANES) most = larger(most, bits(source.at(x, c)) & MAGNITUDE);
            if (c < to) most = larger(most, bits(source.part(x, c, to - c)) & MAGNITUDE);
            uint32_t amax = largest_lane(most);
            bool finite = amax < INFINITE;
            if (!finite) {
                amax = 0;
                for (c = from; c < to; ++c) {
                    uint32_t found = bits(source.one(x, c)) & MAGNITUDE;
                    if (found < INFINITE && found > amax) amax = found;
                }
            }
            Scale s = scale_of<F>(amax, power_of_two);
            scales[next++] = s.scale;
            encode_row_tile<F>(source, x, from, to, s.inverse, codes);
            if (finite) continue;
            for (c = from; c < to; ++c)
                if (!is_finite(source.one(x, c))) nonfinite += spoil<F>(codes, c);
        }
    }
    return nonfinite;
}

// Part of a tile 128 rows high: `count` <= STRIP columns, with zeros behind the last one.
struct Strip {
    float value[TILE][STRIP];
    uint32_t amax[STRIP];
    int64_t height, count;
    bool finite;

    ALWAYS_INLINE void note(u32v most[STRIP / LANES]) {
        u32v all = {};
        for (int64_t i = 0; i < STRIP / LANES; ++i) {
            store(&amax[i * LANES], most[i]);
            all = larger(all, most[i]);
        }
        finite = largest_lane(all) < INFINITE;
    }
};

template <typename S>
void fill(Strip& s, S source, int64_t top, int64_t bottom, int64_t from, int64_t count) {
    u32v most[STRIP / LANES] = {};
    s.height = bottom - top, s.count = count;
    for (int64_t r = top; r < bottom; ++r) {
        auto x = source.row(r);
        float* to = s.value[r - top];
        for (int64_t i = 0; i < STRIP / LANES; ++i) {
            int64_t c = from + i * LANES, left = count - i * LANES;
            f32v v = {};
            if (left >= LANES) v = source.at(x, c);
            else if (left > 0) v = source.part(x, c, left);
            most[i] = larger(most[i], bits(v) & MAGNITUDE);
            store(to + i * LANES, v);
        }
    }
    s.note(most);
    if (s.finite) return;
    for (int64_t c = 0; c < count; ++c) {
        s.amax[c] = 0;
        for (int64_t r = 0; r < s.height; ++r) {
            uint32_t found = bits(s.value[r][c]) & MAGNITUDE;
            if (found < INFINITE && found > s.amax[c]) s.amax[c] = found;
        }
    }
}

template <typename F>
int64_t encode_strip(const Strip& s, const float* inverse, uint8_t* codes, int64_t code_stride) {
    const int64_t height = s.height, count = s.count;  // codes are bytes, which might alias anything
    for (int64_t i = 0; i * LANES < count; ++i) {
        f32v factor = load<f32v>(inverse + i * LANES);
        int64_t left = count - i * LANES;
        for (int64_t r = 0; r < height; ++r) {
            u32v code = codes_of<F>(load<f32v>(&s.value[r][i * LANES]), factor);
            uint8_t* to = codes + r * code_stride + i * LANES;
            if (left >= LANES) store(to, narrow8(code));
            else store_part(to, narrow8(code), left);
        }
    }
    if (s.finite) return 0;
    int64_t nonfinite = 0;
    for (int64_t r = 0; r < s.height; ++r)
        for (int64_t c = 0; c < s.count; ++c)
            if (!is_finite(s.value[r][c])) nonfinite += spoil<F>(codes + r * code_stride, c);
    return nonfinite;
}

// The same in 16 bits.
struct NarrowStrip {
    uint16_t value[TILE][NARROW_STRIP], amax[NARROW_STRIP];
};

// False where a column cannot be done in 16 bits. `more` columns behind the strip are its successor's.
template <typename S>
bool fill_narrow(NarrowStrip& s, S source, int64_t top, int64_t bottom, int64_t from, int64_t count, int64_t more) {
    u16w most[NARROW_STRIP / WIDE] = {};
    for (int64_t r = top; r < bottom; ++r) {
        auto x = source.row(r);
        if (more > 0) source.ahead(x, from + count);
        for (int64_t i = 0, left = count; i < NARROW_STRIP / WIDE; ++i, left -= WIDE) {
            u16w v = left > 0 ? source.narrow(x, from + i * WIDE, left < WIDE ? left : WIDE) : u16w{};
            most[i] = larger(most[i], v & 0x7FFF);
            store(&s.value[r - top][i * WIDE], v);
        }
    }
    for (int64_t i = 0; i < NARROW_STRIP / WIDE; ++i) store(&s.amax[i * WIDE], most[i]);
    bool enough = true;
    for (int64_t c = 0; c < count; ++c) enough &= narrow_enough<S>(s.amax[c]);
    return enough;
}

// Codes and scales of a strip, of tiles `width` columns wide.
template <typename F>
void encode_narrow_strip(
    const NarrowStrip& s, int64_t height, int64_t count, int64_t width, uint8_t* codes, int64_t code_stride,
    float* scales) {
    alignas(64) uint16_t smallest[NARROW_STRIP], moved[NARROW_STRIP];
    float scale[NARROW_STRIP], inverse[NARROW_STRIP];
    uint32_t amax[NARROW_STRIP];
    for (int64_t c = 0; c < NARROW_STRIP; ++c) amax[c] = (uint32_t)s.amax[c] << 16;
    if (width != 1) {
        uint32_t most = 0;
        for (int64_t c = 0; c < NARROW_STRIP; ++c) most = amax[c] > most ? amax[c] : most;
        for (int64_t c = 0; c < NARROW_STRIP; ++c) amax[c] = most;
    }
    for (int64_t c = 0; c < NARROW_STRIP; ++c) {
        int32_t exponent = scale_exponent<F>(amax[c]);
        Narrow<F> n = Narrow<F>::of(exponent);
        smallest[c] = n.smallest, moved[c] = n.moved;
        scale[c] = from_bits((uint32_t)exponent << 23), inverse[c] = from_bits((uint32_t)(254 - exponent) << 23);
    }
    memcpy(scales, scale, sizeof(float) * (size_t)(width == 1 ? count : 1));
    for (int64_t c = 0; c < count; c += WIDE) {
        u16w least = load<u16w>(smallest + c), shift = load<u16w>(moved + c);
        uint8_t* to = codes + c;
        for (int64_t r = 0; r < height; ++r, to += code_stride) {
            __builtin_prefetch(to + NARROW_STRIP, 1);  // the next strip's
            u8w code = codes_of_narrow<F>(load<u16w>(&s.value[r][c]), least, shift, inverse + c);
            if (count - c >= WIDE) store(to, code);
            else memcpy(to, &code, (size_t)(count - c));
        }
    }
}

// 128 x 1, columns [from, end): a scale a column.
template <typename F, typename S>
int64_t quantise_columns(
    S source, int64_t top, int64_t bottom, int64_t from, int64_t end, int64_t columns, bool power_of_two, uint8_t* codes,
    float* scales) {
    Strip s;
    int64_t nonfinite = 0;
    for (; from < end; from += STRIP, scales += STRIP) {
        fill(s, source, top, bottom, from, end - from < STRIP ? end - from : STRIP);
        float inverse[STRIP];
        for (int64_t c = 0; c < s.count; ++c) {
            Scale found = scale_of<F>(s.amax[c], power_of_two);
            inverse[c] = found.inverse;
            scales[c] = found.scale;
        }
        for (int64_t c = s.count; c < STRIP; ++c) inverse[c] = 0;
        nonfinite += encode_strip<F>(s, inverse, codes + top * columns + from, columns);
    }
    return nonfinite;
}

// 128 x 128, the same: the two strips of a tile share a scale.
template <typename F, typename S>
int64_t quantise_blocks(
    S source, int64_t top, int64_t bottom, int64_t from, int64_t end, int64_t columns, bool power_of_two, uint8_t* codes,
    float* scales) {
    Strip s[TILE / STRIP];
    int64_t nonfinite = 0;
    for (; from < end; from += TILE) {
        int64_t to = from + TILE < end ? from + TILE : end, strips = 0;
        uint32_t amax = 0;
        for (int64_t c = from; c < to; c += STRIP, ++strips) {
            Strip& one = s[strips];
            fill(one, source, top, bottom, c, to - c < STRIP ? to - c : STRIP);
            for (int64_t i = 0; i < one.count; ++i) amax = one.amax[i] > amax ? one.amax[i] : amax;
        }
        Scale found = scale_of<F>(amax, power_of_two);
        *scales++ = found.scale;
        float inverse[STRIP];
        for (int c = 0; c < STRIP; ++c) inverse[c] = found.inverse;
        for (int64_t i = 0; i < strips; ++i)
            nonfinite += encode_strip<F>(s[i], inverse, codes + top * columns + from + i * STRIP, columns);
    }
    return nonfinite;
}

// A row of tiles 128 rows high and 1 or 128 columns wide; they restart every `segment` columns.
template <typename F, typename S>
int64_t quantise_tile_row(
    S source, int64_t top, int64_t bottom, int64_t columns, int64_t width, int64_t segment, bool power_of_two,
    uint8_t* codes, float* scales) {
    NarrowStrip narrow;
    int64_t nonfinite = 0;
    for (int64_t start = 0; start < columns; start += segment)
        for (int64_t from = start; from < start + segment; from += NARROW_STRIP) {
            int64_t end = from + NARROW_STRIP < start + segment ? from + NARROW_STRIP : start + segment;
            if (power_of_two && fill_narrow(narrow, source, top, bottom, from, end - from, columns - end))
                encode_narrow_strip<F>(
                    narrow, bottom - top, end - from, width, codes + top * columns + from, columns, scales);
            else if (width == 1)
                nonfinite += quantise_columns<F>(source, top, bottom, from, end, columns, power_of_two, codes, scales);
            else
                nonfinite += quantise_blocks<F>(source, top, bottom, from, end, columns, power_of_two, codes, scales);
            scales += (end - from + width - 1) / width;
        }
    return nonfinite;
}

// Rows of the tiles of height 128 with scale rows [begin, end): with offsets, tiles restart at each group's first row
// and group g's first tile is number offsets[g] / 128 + g (numerics/tiles.py); without, every `segment` rows.
template <typename Do>
INLINE void each_row_tile(
    int64_t begin, int64_t end, int64_t segment, const int64_t* offsets, int64_t groups, Do&& work) {
    if (!offsets) {
        int64_t tiles = (segment + TILE - 1) / TILE;
        for (int64_t tile = begin; tile < end; ++tile) {
            int64_t first = tile / tiles * segment, top = first + tile % tiles * TILE;
            work(tile, top, top + TILE < first + segment ? top + TILE : first + segment);
        }
        return;
    }
    int64_t group = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
        while (group + 1 < groups && tile >= offsets[group + 1] / TILE + group + 1) ++group;
        int64_t top = offsets[group] + (tile - (offsets[group] / TILE + group)) * TILE;
        int64_t bottom = offsets[group + 1];
        work(tile, top < bottom ? top : bottom, top + TILE < bottom ? top + TILE : bottom);
    }
}

template <typename F, typename S>
int64_t run_rows(
    int64_t begin, int64_t end, S source, int64_t columns, int64_t tile, int64_t segment, bool power_of_two,
    uint8_t* codes, int64_t code_stride, float* scales, int64_t scale_stride) {
    int64_t nonfinite = 0;
    for (int64_t r = begin; r < end; ++r)
        nonfinite += quantise_row<F>(
            source, r, columns, tile, segment, power_of_two, codes + r * code_stride, scales + r * scale_stride);
    return nonfinite;
}

template <typename F, typename S>
int64_t run_tall(
    int64_t begin, int64_t end, S source, int64_t columns, int64_t tile_columns, int64_t row_segment,
    int64_t column_segment, const int64_t* offsets, int64_t groups, bool power_of_two, uint8_t* codes, float* scales,
    int64_t scale_stride) {
    int64_t nonfinite = 0;
    each_row_tile(begin, end, row_segment, offsets, groups, [&](int64_t tile, int64_t top, int64_t bottom) {
        float* to = scales + tile * scale_stride;
        if (top == bottom) {  // no group reaches this row of the scales
            for (int64_t i = 0; i < scale_stride; ++i) to[i] = 1.0f;
        } else {
            nonfinite += quantise_tile_row<F>(
                source, top, bottom, columns, tile_columns, column_segment, power_of_two, codes, to);
        }
    });
    return nonfinite;
}

// Codes of 1 x 128 (or 1 x segment) tiles, read through an index, as values: what a re-quantiser starts from.
template <typename F>
struct Codes {
    static constexpr bool BF16 = false;
    const uint8_t* codes;
    const float* scales;
    const int64_t* index;
    int64_t stride, scale_stride;

    struct Row {
        const uint8_t* codes;
        const float* scales;
    };
    ALWAYS_INLINE Row row(int64_t r) const {
        int64_t at = index ? index[r] : r;
        return {codes + at * stride, scales + at * scale_stride};
    }
    // LANES columns from a multiple of LANES on lie in one tile of 128.
    ALWAYS_INLINE f32v at(Row row, int64_t c) const { return part(row, c, LANES); }
    ALWAYS_INLINE f32v part(Row row, int64_t c, int64_t count) const {
        return decode<F>(read_codes<F>(row.codes, c, count)) * splat(row.scales[c / TILE]);
    }
    ALWAYS_INLINE u16w narrow(Row row, int64_t c, int64_t count) const {
#if defined(__AVX512BW__)
        uint32_t scale = bits(row.scales[c / TILE]);
        if (F::M == 3 && count == WIDE && (scale & FRACTION_MASK) == 0 && scale > 27u << 23) {  // above 2^-100
            __m512i shift = _mm512_set1_epi16((short)((scale >> 16) - 0x3F80));
            return (u16w)folded(e4m3_to_bf16(load<__m256i>(row.codes + c)), shift);
        }
#endif
        f32v left = count >= LANES ? at(row, c) : part(row, c, count), right = {};
        if (count == WIDE) right = at(row, c + LANES);
        else if (count > LANES) right = part(row, c + LANES, count - LANES);
        return to_odd(left, right);
    }
    ALWAYS_INLINE void ahead(Row row, int64_t c) const {
        for (int64_t i = 0; i < NARROW_STRIP; i += 64) __builtin_prefetch(row.codes + c + i);
    }
};

}  // namespace
