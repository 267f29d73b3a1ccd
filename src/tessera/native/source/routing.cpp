// The router's choice and its balance loss: the largest few of each row of affinities, by one rule for ties.
//
// Floats are compared as integers: bits of negative numbers, magnitude inverted, sort as the numbers do. Below them in
// a key stands the index, inverted: of equal numbers the lower index comes first, and no two keys are equal. A positive
// NaN is above infinity, a negative one below: every row has an answer.
// Variants: portable avx2 avx512

#include "lanes.h"

namespace {

enum { MOST = 1024 };  // experts a row may have; ops/kernels/routing.py has it too

INLINE int64_t key_of(float x, int64_t index) {
    int32_t u = (int32_t)bits(x), order = u ^ (u >> 31 & 0x7FFFFFFF);
    return (int64_t)((uint64_t)(uint32_t)order << 32 | (uint32_t)~index);
}

INLINE int64_t index_of(int64_t key) { return (int64_t)(uint32_t)~(uint32_t)key; }

// The largest of n > 0 keys, other than `except`.
INLINE int64_t largest(const int64_t* keys, int64_t n, int64_t except) {
    int64_t best = INT64_MIN;
    for (int64_t i = 0; i < n; ++i) {
        int64_t key = keys[i] == except ? INT64_MIN : keys[i];
        best = key > best ? key : best;
    }
    return best;
}

// Take the largest key out.
INLINE int64_t pick(int64_t* keys, int64_t n) {
    int64_t best = INT64_MIN;
    for (int64_t i = 0; i < n; ++i) best = keys[i] > best ? keys[i] : best;
    int64_t index = index_of(best);
    keys[index] = INT64_MIN;
    return index;
}

// Experts of all but the `chosen` groups with the best scores get `excluded` for their value; a group's score is the
// sum of its two best biased affinities.
INLINE void exclude(int64_t* keys, const float* x, const float* bias, int64_t width, int64_t groups, int64_t chosen,
                    float excluded) {
    int64_t score[MOST];
    for (int64_t g = 0; g < groups; ++g) {
        int64_t best = largest(keys + g * width, width, INT64_MIN);
        int64_t one = index_of(best), two = index_of(largest(keys + g * width, width, best));
        score[g] = key_of((x[one] + bias[one]) + (x[two] + bias[two]), g);
    }
    for (int64_t i = 0; i < chosen; ++i) pick(score, groups);
    for (int64_t g = 0; g < groups; ++g) {
        if (score[g] == INT64_MIN) continue;  // picked
        for (int64_t e = g * width; e < (g + 1) * width; ++e) keys[e] = key_of(excluded, e);
    }
}

}  // namespace

// affinity [T, E], bias [E] -> experts [T, k], best biased affinity first; E at most MOST.
TESSERA_ENTRY(void, select_experts)(int64_t begin, int64_t end, const float* affinity, const float* bias,
                                    int64_t* experts, int64_t num_experts, int64_t groups, int64_t chosen_groups,
                                    int64_t k, float excluded) {
    int64_t keys[MOST];
    for (int64_t row = begin; row < end; ++row) {
        const float* x = affinity + row * num_experts;
        for (int64_t e = 0; e < num_experts; ++e) keys[e] = key_of(x[e] + bias[e], e);
        if (chosen_groups < groups)
            exclude(keys, x, bias, num_experts / groups, groups, chosen_groups, excluded);
        for (int64_t j = 0; j < k; ++j) experts[row * k + j] = pick(keys, num_experts);
    }
}

// For each of the sequences [begin, end) of `length` tokens: frequency [., E], how often an expert is among the k
// largest affinities of a token; share [., E], the sum of its affinities, each divided by the sum of its token's.
TESSERA_ENTRY(void, balance)(int64_t begin, int64_t end, const float* affinity, float* frequency, double* share,
                             int64_t length, int64_t num_experts, int64_t k) {
    int64_t keys[MOST];
    for (int64_t sequence = begin; sequence < end; ++sequence) {
        float* often = frequency + sequence * num_experts;
        double* sums = share + sequence * num_experts;
        for (int64_t e = 0; e < num_experts; ++e) often[e] = 0.0f, sums[e] = 0.0;
        for (int64_t t = 0; t < length; ++t) {
            const float* x = affinity + (sequence * length + t) * num_experts;
            for (int64_t e = 0; e < num_experts; ++e) keys[e] = key_of(x[e], e);
            for (int64_t j = 0; j < k; ++j) often[pick(keys, num_experts)] += 1.0f;
            f32v whole = {};
            each_vector(num_experts, [&](int64_t j, auto lanes) { whole += lanes.get(x + j); });
            float inverse = 1.0f / total(whole);
            for (int64_t e = 0; e < num_experts; ++e) sums[e] += x[e] * inverse;
        }
    }
}

// Gradient of factor * sum_e frequency_e * (sum over tokens of s_e / sum(s)) with respect to s, rows being tokens.
TESSERA_ENTRY(void, balance_backward)(int64_t begin, int64_t end, const float* affinity, const float* frequency,
                                      float* gradient, int64_t length, int64_t num_experts, float factor) {
    for (int64_t row = begin; row < end; ++row) {
        const float *x = affinity + row * num_experts, *often = frequency + row / length * num_experts;
        f32v whole = {}, weighted = {};
        each_vector(num_experts, [&](int64_t j, auto lanes) {
            whole += lanes.get(x + j);
            weighted += lanes.get(x + j) * lanes.get(often + j);
        });
        float sum = total(whole);
        f32v scale = splat(factor / sum), mean = splat(total(weighted) / sum);
        each_vector(num_experts, [&](int64_t j, auto lanes) {
            lanes.put(gradient + row * num_experts + j, (lanes.get(often + j) - mean) * scale);
        });
    }
}
