// Variants: portable avx2 avx512
// The quantisers and the decoder; numerics/kernels/cpu.py has the layouts.

#include "quantise.h"

namespace {

enum ElementType : int64_t { FLOAT32, BFLOAT16 };

enum FormatName : int64_t { E4M3_NAME, E5M2_NAME, E5M6_NAME };

}  // namespace

// Tiles one row high. Rows [begin, end) of x; returns how many elements are not finite.
TESSERA_ENTRY(int64_t, quantise_rows)(
    int64_t begin, int64_t end, const void* x, int64_t type, int64_t x_stride, int64_t columns, int64_t tile,
    int64_t segment, int64_t format, int64_t power_of_two, uint8_t* codes, int64_t code_stride, float* scales,
    int64_t scale_stride) {
#define RUN(F, T)                                                                                                      \
    return run_rows<F>(begin, end, Values<T>{(const T*)x, x_stride, nullptr}, columns, tile, segment, power_of_two,    \
                       codes, code_stride, scales, scale_stride)
    if (type == FLOAT32) {
        if (format == E4M3_NAME) RUN(E4M3, float);
        if (format == E5M2_NAME) RUN(E5M2, float);
        RUN(E5M6, float);
    }
    if (format == E4M3_NAME) RUN(E4M3, bf16);
    if (format == E5M2_NAME) RUN(E5M2, bf16);
    RUN(E5M6, bf16);
#undef RUN
}

// Tiles 128 rows high; the range is one of rows of the scales. Row r of the result is row index[r] of x.
TESSERA_ENTRY(int64_t, quantise_tall)(
    int64_t begin, int64_t end, const void* x, int64_t type, int64_t x_stride, const int64_t* index, int64_t columns,
    int64_t tile_columns, int64_t row_segment, int64_t column_segment, const int64_t* offsets, int64_t groups,
    int64_t format, int64_t power_of_two, uint8_t* codes, float* scales, int64_t scale_stride) {
#define RUN(F, T)                                                                                                      \
    return run_tall<F>(begin, end, Values<T>{(const T*)x, x_stride, index}, columns, tile_columns, row_segment,        \
                       column_segment, offsets, groups, power_of_two, codes, scales, scale_stride)
    if (type == FLOAT32) {
        if (format == E4M3_NAME) RUN(E4M3, float);
        RUN(E5M2, float);
    }
    if (format == E4M3_NAME) RUN(E4M3, bf16);
    RUN(E5M2, bf16);
#undef RUN
}

// From codes in 1 x 128 tiles to E4M3 codes in 128 x 1 tiles, each value decoded and rounded once more.
TESSERA_ENTRY(int64_t, requantise_columns)(
    int64_t begin, int64_t end, const uint8_t* from, const float* from_scales, int64_t from_stride,
    int64_t from_scale_stride, int64_t from_format, const int64_t* index, int64_t rows, int64_t columns,
    const int64_t* offsets, int64_t groups, int64_t power_of_two, uint8_t* codes, float* scales) {
#define RUN(F)                                                                                                         \
    return run_tall<E4M3>(begin, end, Codes<F>{from, from_scales, index, from_stride, from_scale_stride}, columns, 1,  \
                          rows, columns, offsets, groups, power_of_two, codes, scales, columns)
    if (from_format == E4M3_NAME) RUN(E4M3);
    RUN(E5M6);
#undef RUN
}

namespace {

// Values code * scale, rounded once. A scale's column is `tile` columns wide; segments restart it.
template <typename F, typename T>
void dequantise_row(const uint8_t* codes, const float* scales, int64_t columns, int64_t tile, int64_t segment, T* to) {
    int64_t next = 0;
    for (int64_t start = 0; start < columns; start += segment) {
        int64_t end = start + segment, width = tile ? tile : segment;
        for (int64_t from = start; from < end; from += width, ++next) {
            int64_t last = from + width < end ? from + width : end;
            f32v factor = splat(scales[next]);
            for (int64_t c = from; c < last; c += LANES) {
                int64_t count = last - c < LANES ? last - c : LANES;
                f32v value = decode<F>(read_codes<F>(codes, c, count)) * factor;
                if (count == LANES) write(to + c, value);
                else write_part(to + c, value, count);
            }
        }
    }
}

}  // namespace

// Codes of tiles one row high (tile 0: a whole segment) to float32 or BF16.
TESSERA_ENTRY(void, dequantise_rows)(
    int64_t begin, int64_t end, const uint8_t* codes, int64_t code_stride, const float* scales, int64_t scale_stride,
    int64_t columns, int64_t tile, int64_t segment, int64_t format, void* to, int64_t type) {
#define ROW(F, T)                                                                                                      \
    for (int64_t r = begin; r < end; ++r)                                                                              \
        dequantise_row<F>(                                                                                             \
            codes + r * code_stride, scales + r * scale_stride, columns, tile, segment, (T*)to + r * columns)
#define OF_TYPE(F)                                                                                                     \
    if (type == FLOAT32) ROW(F, float);                                                                                \
    else ROW(F, bf16)
    if (format == E4M3_NAME) { OF_TYPE(E4M3); }
    else if (format == E5M2_NAME) { OF_TYPE(E5M2); }
    else { OF_TYPE(E5M6); }
}
