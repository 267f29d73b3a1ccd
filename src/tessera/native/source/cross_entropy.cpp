// Cross-entropy of rows of logits, and the gradient of it, a row at a time: nothing of a row depends on another one.
// Variants: portable avx2 avx512
//
//   loss = log(sum_j exp(z_j - max z)) + max z - z_target        d_j = scale * (exp(z_j - max z) / sum - [j == target])
//
// Three passes over a row, which stays in the cache: the largest logit, the sum, the gradient. The exponential is made
// twice rather than kept, so that logits are only read. The sum is made in lanes, in a fixed order.

#include "exponential.h"

namespace {

const int64_t IGNORED = -100;  // as in ops/kernels/cross_entropy.py

enum { BLOCK = 256 };  // elements that a loop takes at once; loops of one operation on each become vectors

INLINE float largest_of(const float* z, int64_t columns) {
    float best[BLOCK];
    for (int i = 0; i < BLOCK; ++i) best[i] = -__builtin_inff();
    for (int64_t j = 0; j < columns; j += BLOCK) {
        int64_t count = columns - j < BLOCK ? columns - j : BLOCK;
        for (int64_t i = 0; i < count; ++i) best[i] = best[i] < z[j + i] ? z[j + i] : best[i];
    }
    for (int half = BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) best[i] = best[i] < best[i + half] ? best[i + half] : best[i];
    return best[0];
}

INLINE float sum_of_exponentials(const float* z, int64_t columns, float largest) {
    f32v sums[4] = {};
    float e[BLOCK];
    for (int64_t j = 0; j < columns; j += BLOCK) {
        int64_t count = columns - j < BLOCK ? columns - j : BLOCK;
        for (int64_t i = 0; i < count; ++i) e[i] = exponential(z[j + i] - largest);
        for (int64_t i = count; i < BLOCK; ++i) e[i] = 0.0f;
        for (int i = 0; i < BLOCK; i += LANES) sums[i / LANES % 4] += load<f32v>(e + i);
    }
    f32v sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

INLINE void put(float* to, float value) { *to = value; }

// Of a number: the care that to_bf16 takes of NaN costs as much as the rounding.
INLINE void put(bf16* to, float number) {
    uint32_t u = bits(number);
    *to = (bf16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

template <typename T>
INLINE void gradient(const float* z, int64_t columns, float largest, float sum, float scale, int64_t target,
                     T* __restrict d) {
    if (sum != sum) {  // one logit is NaN or infinite: so is the whole row
        for (int64_t j = 0; j < columns; ++j) put(d + j, __builtin_nanf(""));
        return;
    }
    float factor = scale / sum;
    for (int64_t j = 0; j < columns; ++j) put(d + j, exponential(z[j] - largest) * factor);
    put(d + target, exponential(z[target] - largest) * factor - scale);
}

template <typename T>
int64_t rows(int64_t begin, int64_t end, const float* logits, int64_t columns, const int64_t* targets, float scale,
             float* loss, T* d) {
    int64_t wrong = 0;
    for (int64_t row = begin; row < end; ++row) {
        const float* z = logits + row * columns;
        int64_t target = targets[row];
        if (target < 0 || target >= columns) {
            wrong += target != IGNORED;
            loss[row] = 0.0f;
            if (d) memset(d + row * columns, 0, (size_t)columns * sizeof(T));
            continue;
        }
        float largest = largest_of(z, columns), sum = sum_of_exponentials(z, columns, largest);
        loss[row] = (float)(__builtin_log((double)sum) + ((double)largest - (double)z[target]));
        if (d) gradient(z, columns, largest, sum, scale, target, d + row * columns);
    }
    return wrong;
}

}  // namespace

// logits float32 [rows, columns], targets int64 [rows], loss float32 [rows], d BF16 or float32 [rows, columns] or null.
// Returns how many targets are neither a column nor IGNORED; those count as ignored.
TESSERA_ENTRY(int64_t, cross_entropy_bf16)
(int64_t begin, int64_t end, const float* logits, int64_t columns, const int64_t* targets, float scale, float* loss,
 bf16* d) {
    return rows(begin, end, logits, columns, targets, scale, loss, d);
}

TESSERA_ENTRY(int64_t, cross_entropy_f32)
(int64_t begin, int64_t end, const float* logits, int64_t columns, const int64_t* targets, float scale, float* loss,
 float* d) {
    return rows(begin, end, logits, columns, targets, scale, loss, d);
}
