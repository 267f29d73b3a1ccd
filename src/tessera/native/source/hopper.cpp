// Hopper's FP8 tensor core: the GEMM whose sums keep 13 fraction bits (numerics/kernels/hopper.py states the model).
// Variants: portable avx2 avx512
//
// One instruction takes 32 products and the accumulator. A product's exponent is the sum of its operands', so the
// largest of 32 is found in bytes, 64 outputs a register. The largest exponent gives the unit 2^(e_max - 13); each
// product, exact in float32, is cut toward zero to a multiple of it and added. Two ways to do that:
//
// - AVX-512 rounds as an instruction says. From S = 1.5 * 2^23 units on, and some way below it, a float32 is a multiple
//   of the unit, so S + a b rounded toward zero adds the product rounded down: one FMA cuts and adds. That is one unit
//   too low for each product below zero that is no multiple of the unit. Those are counted, in bytes again: the lowest
//   set bit of a product is where the lowest set bits of its operands say, by the sum of their exponents.
// - Elsewhere the product is divided by the unit, cut by the conversion to an integer, and summed as one.
//
// Both sums are exact: 33 terms below 2^15 units each. The order of products inside an instruction does not matter.

#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ROUNDS_TOWARD_ZERO 1
#define REGISTER 64  // bytes
#elif defined(__AVX2__)
#define ROUNDS_TOWARD_ZERO 0
#define REGISTER 32
#else
#define ROUNDS_TOWARD_ZERO 0
#define REGISTER 16
#endif

namespace {

typedef uint8_t u8r __attribute__((vector_size(REGISTER)));
typedef int8_t i8r __attribute__((vector_size(REGISTER)));
typedef uint32_t u32r __attribute__((vector_size(REGISTER)));

constexpr int DEPTH = 32;                             // products in an instruction
constexpr uint32_t FRACTION_BITS = 13;                // of the terms below e_max, and of the accumulator
constexpr int COLUMNS = 64;                           // outputs worked on at once: a register of exponents
constexpr int ROWS = 128;                             // rows that share one unpacking of b
constexpr int TOGETHER = ROUNDS_TOWARD_ZERO ? 4 : 1;  // rows worked on at once: what the registers hold

// Exponents are bytes without sign, so that zero, which takes no part in the maximum, can be 0. The offsets of a and b
// add up to float32's bias: a sum is the biased exponent of the product. With a zero in it, it is at most 15 + 64; of
// two numbers it is at least 127 - 28; an accumulator's, a multiple of 2^-32 as all products are, at least 127 - 32.
constexpr uint32_t A_OFFSET = 64, B_OFFSET = 63, SMALLEST = A_OFFSET + 15;

// Exponents of the lowest set bit, for counting: seven bits and the sign, so that the sum of two has the sign of the
// product. LOW_OFFSET makes all of them 0 to 31; a zero, a multiple of every unit, has more than any two together.
constexpr uint32_t LOW_OFFSET = 16, LOW_ZERO = 63;

struct Format {
    uint32_t fraction_bits, bias, largest;  // `largest`: the code of the largest number; above are NaN and infinity
};

INLINE Format format_of(int64_t fraction_bits) {
    return fraction_bits == 3 ? Format{3, 7, 0x7E} : Format{2, 15, 0x7B};
}

struct Decoded {
    f32v value;
    u32v exponent;  // with the operand's offset; 0 for zero
    u32v low;       // exponent of the lowest set bit, and the sign
    u32v finite;    // a mask; what is not finite is decoded as zero
};

INLINE Decoded decode(u32v code, Format f, uint32_t offset) {
    u32v magnitude = code & 0x7F, negative = code >> 7;
    u32v field = magnitude >> f.fraction_bits, fraction = magnitude & ((1u << f.fraction_bits) - 1);
    u32v subnormal = (u32v)(field == 0), finite = (u32v)(magnitude <= f.largest);
    u32v significand = (fraction | (~subnormal & 1u << f.fraction_bits)) & finite;
    u32v nonzero = (u32v)(significand != 0);
    u32v exponent = field - subnormal - f.bias;  // subnormals have that of the smallest normal number
    f32v integer = __builtin_convertvector((i32v)significand, f32v);
    f32v value = integer * from_bits((exponent + (127 - f.fraction_bits)) << 23);
    f32v lowest = __builtin_convertvector((i32v)(significand & -significand), f32v);
    u32v low = (bits(lowest) >> 23) - 127 + exponent - f.fraction_bits + LOW_OFFSET;
    return {from_bits(bits(value) | negative << 31), (exponent + offset) & nonzero,
            choose(nonzero, low | negative << 7, splat(LOW_ZERO)), finite};
}

// What a code of a is: looked up, because a row meets COLUMNS outputs with every code.
struct Table {
    float value[256];
    uint32_t exponent[256], low[256];  // four times the same byte
};

INLINE void fill(Table& table, Format f) {
    for (uint32_t code = 0; code < 256; code += LANES) {
        u32v codes;
        for (int i = 0; i < LANES; ++i) codes[i] = code + i;
        Decoded d = decode(codes, f, A_OFFSET);
        store(table.value + code, d.value);
        store(table.exponent + code, d.exponent * 0x01010101u);
        store(table.low + code, d.low * 0x01010101u);
    }
}

// 32 rows of b for COLUMNS outputs.
struct Panel {
    alignas(64) float value[DEPTH][COLUMNS];
    alignas(64) uint8_t exponent[DEPTH][COLUMNS];
    alignas(64) uint8_t low[DEPTH][COLUMNS];
};

// Rows of codes, `width` columns of each; what is not there is zero. Clears the lanes of `finite` that meet a NaN.
INLINE void unpack(Panel& panel, const uint8_t* b, int64_t stride, int64_t depth, int64_t width, Format f,
                   u32v finite[COLUMNS / LANES]) {
    for (int64_t k = 0; k < depth; ++k, b += stride)
        for (int64_t v = 0; v < COLUMNS; v += LANES) {
            const int64_t count = width - v;
            u8v codes = {};
            if (count >= LANES)
                codes = load<u8v>(b + v);
            else if (count > 0)
                codes = load_part<u8v>(b + v, count);
            Decoded d = decode(widen(codes), f, B_OFFSET);
            finite[v / LANES] &= d.finite;
            store(panel.value[k] + v, d.value);
            store(panel.exponent[k] + v, narrow8(d.exponent));
            if (ROUNDS_TOWARD_ZERO) store(panel.low[k] + v, narrow8(d.low));
        }
}

INLINE u32v larger(u32v a, u32v b) { return a > b ? a : b; }

// The unit 2^(e_max - 13) of an instruction, for COLUMNS outputs of each of R rows of a.
template <int R>
INLINE void find_units(const uint8_t* a, int64_t stride, int64_t depth, const Table& table, const Panel& panel,
                       const float (*accumulator)[COLUMNS], float (*unit)[COLUMNS]) {
    constexpr int V = COLUMNS / REGISTER;
    u8r largest[R][V] = {};
    for (int64_t k = 0; k < depth; ++k)
        for (int r = 0; r < R; ++r) {
            const u8r exponent = (u8r)(table.exponent[a[r * stride + k]] - u32r{});
            for (int v = 0; v < V; ++v) {
                u8r product = load<u8r>(panel.exponent[k] + v * REGISTER) + exponent;
                largest[r][v] = product > largest[r][v] ? product : largest[r][v];
            }
        }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < COLUMNS; v += LANES) {
            u32v products = widen(load<u8v>((uint8_t*)largest[r] + v));
            u32v own = bits(load<f32v>(accumulator[r] + v)) << 1 >> 24;
            store(unit[r] + v, (larger(larger(products, own), splat(SMALLEST)) - FRACTION_BITS) << 23);
        }
}

// The accumulator keeps 13 fraction bits of a float32; the others are cut off.
template <typename F, typename I>
INLINE F cut(F sum, I) {
    return (F)((I)sum & ~((1 << (23 - FRACTION_BITS)) - 1));
}

#if ROUNDS_TOWARD_ZERO

INLINE f32v fma_cut(f32v a, f32v b, f32v c) {
    return (f32v)_mm512_fmadd_round_ps((__m512)a, (__m512)b, (__m512)c, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

INLINE f32v add_cut(f32v a, f32v b) {  // masked by ones: GCC 12 warns about its own header without
    return (f32v)_mm512_maskz_add_round_ps(0xFFFF, (__m512)a, (__m512)b, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

// Lanes of `low` that are below `limit` add one to `count`.
INLINE __m512i count_below(__m512i count, __m512i low, __m512i limit) {
    return _mm512_mask_sub_epi8(count, _mm512_cmplt_epi8_mask(low, limit), count, _mm512_set1_epi8(-1));
}

// The instruction's sum and the accumulator's part in it.
template <int R>
INLINE void accumulate(const uint8_t* a, int64_t stride, int64_t depth, const Table& table, const Panel& panel,
                       const float (*unit)[COLUMNS], float (*accumulator)[COLUMNS]) {
    constexpr int V = COLUMNS / LANES;
    constexpr float BASE = 1.5f * (1 << 23);  // in units
    f32v sum[R][V];
    __m512i limit[R], count[R];
    for (int r = 0; r < R; ++r) {
        uint8_t exponents[COLUMNS];
        for (int v = 0; v < V; ++v) {
            f32v old = load<f32v>(accumulator[r] + v * LANES), one = load<f32v>(unit[r] + v * LANES);
            f32v base = one * BASE, like_old = from_bits(bits(base) | (bits(old) & 0x80000000u));
            sum[r][v] = base + (add_cut(old, like_old) - like_old);
            store(exponents + v * LANES, narrow8(bits(one) >> 23));
        }
        // The unit's exponent on the scale of two lowest bits, and the sign: what is below is negative and no multiple.
        __m512i low = _mm512_subs_epu8(load<__m512i>(exponents), _mm512_set1_epi8(127 - 2 * LOW_OFFSET));
        limit[r] = _mm512_or_si512(_mm512_min_epu8(low, _mm512_set1_epi8(LOW_ZERO)), _mm512_set1_epi8(-128));
        count[r] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < depth; ++k)
        for (int r = 0; r < R; ++r) {
            const size_t code = a[r * stride + k];
            const f32v value = splat(table.value[code]);
            for (int v = 0; v < V; ++v)
                sum[r][v] = fma_cut(value, load<f32v>(panel.value[k] + v * LANES), sum[r][v]);
            const __m512i low = (__m512i)splat(table.low[code]);
            count[r] = count_below(count[r], _mm512_add_epi8(load<__m512i>(panel.low[k]), low), limit[r]);
        }
    for (int r = 0; r < R; ++r) {
        uint8_t counts[COLUMNS];
        store(counts, count[r]);
        for (int v = 0; v < V; ++v) {
            i32v missing = (i32v)widen(load<u8v>(counts + v * LANES));
            f32v one = load<f32v>(unit[r] + v * LANES);
            f32v total = (sum[r][v] - one * BASE) + __builtin_convertvector(missing, f32v) * one;
            store(accumulator[r] + v * LANES, cut(total, i32v{}));
        }
    }
}

#else

// Vectors of the machine's own size, GROUP of them at once: GCC passes larger ones through memory.
constexpr int WIDTH = REGISTER / 4, GROUP = 4;
typedef float f32r __attribute__((vector_size(REGISTER)));
typedef int32_t i32r __attribute__((vector_size(REGISTER)));

INLINE i32r whole(f32r x) { return __builtin_convertvector(x, i32r); }

template <int R>
INLINE void accumulate(const uint8_t* a, int64_t, int64_t depth, const Table& table, const Panel& panel,
                       const float (*unit)[COLUMNS], float (*accumulator)[COLUMNS]) {
    static_assert(R == 1, "the registers hold no second row");
    for (int v = 0; v < COLUMNS; v += GROUP * WIDTH) {
        f32r per_unit[GROUP];
        i32r sum[GROUP];
        for (int g = 0; g < GROUP; ++g) {
            per_unit[g] = (f32r)((254 << 23) - load<i32r>(unit[0] + v + g * WIDTH));
            sum[g] = whole(load<f32r>(accumulator[0] + v + g * WIDTH) * per_unit[g]);
        }
        for (int64_t k = 0; k < depth; ++k) {
            const f32r value = table.value[a[k]] - f32r{};
            for (int g = 0; g < GROUP; ++g)
                sum[g] += whole(load<f32r>(panel.value[k] + v + g * WIDTH) * value * per_unit[g]);
        }
        for (int g = 0; g < GROUP; ++g) {
            f32r total = __builtin_convertvector(sum[g], f32r) * load<f32r>(unit[0] + v + g * WIDTH);
            store(accumulator[0] + v + g * WIDTH, cut(total, i32r{}));
        }
    }
}

#endif

// One instruction of R rows of a and COLUMNS outputs.
template <int R>
INLINE void instruction(const uint8_t* a, int64_t stride, int64_t depth, const Table& table, const Panel& panel,
                        float (*accumulator)[COLUMNS]) {
    alignas(64) float unit[R][COLUMNS];
    find_units<R>(a, stride, depth, table, panel, accumulator, unit);
    accumulate<R>(a, stride, depth, table, panel, unit, accumulator);
}

// One rounding on every machine: where there is no instruction, the C library's function.
INLINE f32v fma_exact(f32v a, f32v b, f32v c) {
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}

INLINE bool all_finite(const uint8_t* codes, int64_t count, Format f) {
    uint8_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= (codes[i] & 0x7F) > f.largest;
    return !found;
}

// One promotion: y [width] = fma(a_scale * b_scales, sums, y); NaN where a factor was not finite.
INLINE void promote(float* y, int64_t width, const float* sums, float a_scale, const float* b_scales,
                    const u32v finite[COLUMNS / LANES]) {
    for (int64_t v = 0; v < width; v += LANES) {
        const int64_t count = width - v < LANES ? width - v : LANES;
        f32v scale = splat(a_scale) * load_part<f32v>(b_scales + v, count);
        scale = choose(finite[v / LANES], scale, splat(__builtin_nanf("")));
        store_part(y + v, fma_exact(scale, load<f32v>(sums + v), load_part<f32v>(y + v, count)), count);
    }
}

}  // namespace

// y [M, N] += a [M, K] b [K, N], row-major; rows of a and b are `a_stride` and `b_stride` codes apart, those of y N.
// Block i of the contraction is [edges[i], edges[i + 1]): its sum starts at zero, and is added to y times
// a_scales[row, i] * b_scales[i, column] (float32 [M, blocks] and [blocks, N]) with one rounding. Where a NaN or an
// infinity takes part, y is NaN. Formats are given by their fraction bits, 3 or 2.
TESSERA_ENTRY(void, hopper_matmul)
(int64_t begin, int64_t end, const uint8_t* a, int64_t a_stride, int64_t a_fraction_bits, const uint8_t* b,
 int64_t b_stride, int64_t b_fraction_bits, const float* a_scales, const float* b_scales, const int64_t* edges,
 int64_t blocks, int64_t columns, float* y) {
    const Format a_format = format_of(a_fraction_bits), b_format = format_of(b_fraction_bits);
    Table table;
    fill(table, a_format);
    for (int64_t left = 0; left < columns; left += COLUMNS) {
        const int64_t width = columns - left < COLUMNS ? columns - left : COLUMNS;
        for (int64_t top = begin; top < end; top += ROWS) {
            const int64_t rows = end - top < ROWS ? end - top : ROWS;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = edges[block], last = edges[block + 1];
                const uint8_t* from = a + top * a_stride;
                alignas(64) float sums[ROWS][COLUMNS];
                memset(sums, 0, sizeof(sums[0]) * (size_t)rows);
                u32v finite[COLUMNS / LANES];
                memset(finite, 0xFF, sizeof(finite));
                for (int64_t k = first; k < last; k += DEPTH) {
                    const int64_t depth = last - k < DEPTH ? last - k : DEPTH;
                    Panel panel;
                    unpack(panel, b + k * b_stride + left, b_stride, depth, width, b_format, finite);
                    int64_t row = 0;
                    for (; row + TOGETHER <= rows; row += TOGETHER)
                        instruction<TOGETHER>(from + row * a_stride + k, a_stride, depth, table, panel, sums + row);
                    for (; TOGETHER > 1 && row < rows; ++row)
                        instruction<1>(from + row * a_stride + k, a_stride, depth, table, panel, sums + row);
                }
                for (int64_t row = 0; row < rows; ++row) {
                    const bool good = all_finite(from + row * a_stride + first, last - first, a_format);
                    const float a_scale = good ? a_scales[(top + row) * blocks + block] : __builtin_nanf("");
                    promote(y + (top + row) * columns + left, width, sums[row], a_scale,
                            b_scales + block * columns + left, finite);
                }
            }
        }
    }
}
