// SwiGLU, silu(gate) * up * weight, and its gradients, from values or from E4M3 codes, to values or to E4M3 codes.
//
// gate and up are the halves of one row, read in place. An element depends on its own inputs alone, wherever it lies,
// so the codes are those of the product quantised afterwards.
// Variants: portable avx2 avx512

#include "exponential.h"
#include "lanes.h"
#include "quantise.h"

namespace {

// gate | up [S, 2 n] as values, rows `stride` apart.
template <typename T>
struct GateUp {
    const T* x;
    int64_t stride, n;

    ALWAYS_INLINE const T* row(int64_t r) const { return x + r * stride; }
    template <typename L>
    ALWAYS_INLINE f32v gate(const T* row, int64_t j, L lanes) const {
        return lanes.get(row + j);
    }
    template <typename L>
    ALWAYS_INLINE f32v up(const T* row, int64_t j, L lanes) const {
        return lanes.get(row + n + j);
    }
};

// The same as E4M3 codes in 1 x 128 tiles, which restart at up's first column.
struct GateUpCodes {
    const uint8_t* codes;
    const float* scales;
    int64_t n, tiles;

    struct Row {
        const uint8_t* codes;
        const float* scales;
    };
    ALWAYS_INLINE Row row(int64_t r) const { return {codes + r * 2 * n, scales + r * 2 * tiles}; }
    template <typename L>
    ALWAYS_INLINE f32v gate(Row row, int64_t j, L lanes) const {
        return decode<E4M3>(lanes.codes(row.codes + j)) * splat(row.scales[j / TILE]);
    }
    template <typename L>
    ALWAYS_INLINE f32v up(Row row, int64_t j, L lanes) const {
        return decode<E4M3>(lanes.codes(row.codes + n + j)) * splat(row.scales[tiles + j / TILE]);
    }
};

INLINE f32v one_and_exp(f32v gate) { return exponential(-gate) + 1.0f; }  // 1 / sigmoid

// The product [S, n], of which quantisers are a reader (quantise.h); weight [S] or null.
template <typename S>
struct Product {
    static constexpr bool BF16 = false;
    S source;
    const float* weight;

    struct Row {
        decltype(source.row(0)) pair;
        float weight;
    };
    ALWAYS_INLINE Row row(int64_t r) const { return {source.row(r), weight ? weight[r] : 1.0f}; }
    template <typename L>
    ALWAYS_INLINE f32v get(const Row& row, int64_t j, L lanes) const {
        f32v gate = source.gate(row.pair, j, lanes);
        return gate / one_and_exp(gate) * source.up(row.pair, j, lanes) * splat(row.weight);
    }
    ALWAYS_INLINE f32v at(const Row& row, int64_t j) const { return get(row, j, Whole{}); }
    ALWAYS_INLINE f32v part(const Row& row, int64_t j, int64_t count) const { return get(row, j, Part{count}); }
    ALWAYS_INLINE u16w narrow(const Row& row, int64_t j, int64_t count) const {
        f32v left = count >= LANES ? at(row, j) : part(row, j, count), right = {};
        if (count == WIDE) right = at(row, j + LANES);
        else if (count > LANES) right = part(row, j + LANES, count - LANES);
        return to_odd(left, right);
    }
    ALWAYS_INLINE void ahead(const Row&, int64_t) const {}
};

template <typename T>
INLINE void to_values(int64_t begin, int64_t end, Product<GateUp<T>> source, float* product, int64_t n) {
    for (int64_t r = begin; r < end; ++r) {
        auto row = source.row(r);
        each_vector(n, [&](int64_t j, auto lanes) { lanes.put(product + r * n + j, source.get(row, j, lanes)); });
    }
}

// 1 x 128 tiles. The product of one tile is kept until its scale is known.
template <typename T>
INLINE int64_t to_row_tiles(int64_t begin, int64_t end, Product<GateUp<T>> source, bool power_of_two, uint8_t* codes,
                            float* scales, int64_t n) {
    int64_t nonfinite = 0, tiles = (n + TILE - 1) / TILE;
    for (int64_t r = begin; r < end; ++r) {
        auto row = source.row(r);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            int64_t from = tile * TILE, width = n - from < TILE ? n - from : TILE;
            float product[TILE];
            each_vector(width, [&](int64_t j, auto lanes) { lanes.put(product + j, source.get(row, from + j, lanes)); });
            nonfinite += quantise_row<E4M3>(Values<float>{product, 0, nullptr}, 0, width, TILE, width, power_of_two,
                                            codes + r * n + from, scales + r * tiles + tile);
        }
    }
    return nonfinite;
}

// d [S, n], the product's gradient -> gradients of gate | up [S, 2 n], and of the weight [S] where there is one.
template <typename D, typename S>
INLINE void backward(int64_t begin, int64_t end, const D* d, S source, const float* weight, D* dgate_up, float* dweight,
                     int64_t n) {
    for (int64_t r = begin; r < end; ++r) {
        auto row = source.row(r);
        D *dgate = dgate_up + r * 2 * n, *dup = dgate + n;
        f32v factor = splat(weight ? weight[r] : 1.0f), products = {};
        each_vector(n, [&](int64_t j, auto lanes) {
            f32v gate = source.gate(row, j, lanes), up = source.up(row, j, lanes), dy = lanes.get(d + r * n + j);
            f32v s = 1.0f / one_and_exp(gate), activated = gate * s;
            f32v slope = ((1.0f - s) * gate + 1.0f) * s;
            products += dy * activated * up;
            dy *= factor;
            lanes.put(dgate + j, slope * up * dy);
            lanes.put(dup + j, activated * dy);
        });
        if (weight) dweight[r] = total(products);
    }
}

}  // namespace

#define SWIGLU(T, suffix)                                                                                              \
    TESSERA_ENTRY(void, swiglu_##suffix)(int64_t begin, int64_t end, const T* gate_up, int64_t stride,                 \
                                         const float* weight, float* product, int64_t n) {                             \
        to_values<T>(begin, end, {{gate_up, stride, n}, weight}, product, n);                                          \
    }                                                                                                                  \
    TESSERA_ENTRY(int64_t, swiglu_row_tiles_##suffix)(int64_t begin, int64_t end, const T* gate_up, int64_t stride,    \
                                                      const float* weight, int64_t power_of_two, uint8_t* codes,       \
                                                      float* scales, int64_t n) {                                      \
        return to_row_tiles<T>(begin, end, {{gate_up, stride, n}, weight}, power_of_two, codes, scales, n);            \
    }

#define SWIGLU_BACKWARD(D, T, suffix)                                                                                  \
    TESSERA_ENTRY(void, swiglu_backward_##suffix)(int64_t begin, int64_t end, const D* d, const T* gate_up,            \
                                                  int64_t stride, const float* weight, D* dgate_up, float* dweight,    \
                                                  int64_t n) {                                                         \
        backward(begin, end, d, GateUp<T>{gate_up, stride, n}, weight, dgate_up, dweight, n);                          \
    }

#define SWIGLU_BACKWARD_FROM_CODES(D, suffix)                                                                          \
    TESSERA_ENTRY(void, swiglu_backward_codes_##suffix)(                                                               \
        int64_t begin, int64_t end, const D* d, const uint8_t* codes, const float* scales, int64_t tiles,              \
        const float* weight, D* dgate_up, float* dweight, int64_t n) {                                                 \
        backward(begin, end, d, GateUpCodes{codes, scales, n, tiles}, weight, dgate_up, dweight, n);                   \
    }

SWIGLU(float, f32)
SWIGLU(bf16, bf16)
SWIGLU_BACKWARD(float, float, f32_f32)
SWIGLU_BACKWARD(bf16, float, bf16_f32)
SWIGLU_BACKWARD(bf16, bf16, bf16_bf16)
SWIGLU_BACKWARD_FROM_CODES(float, f32)
SWIGLU_BACKWARD_FROM_CODES(bf16, bf16)

// From E4M3 codes to E4M3 codes in 128 x 1 tiles; [begin, end) are rows of the new scales, tiles as in quantise_tall.
TESSERA_ENTRY(int64_t, swiglu_columns)(int64_t begin, int64_t end, const uint8_t* from, const float* from_scales,
                                       int64_t tiles, const float* weight, int64_t rows, const int64_t* offsets,
                                       int64_t groups, int64_t power_of_two, uint8_t* codes, float* scales, int64_t n) {
    Product<GateUpCodes> source = {{from, from_scales, n, tiles}, weight};
    return run_tall<E4M3>(begin, end, source, n, 1, rows, n, offsets, groups, power_of_two, codes, scales, n);
}
