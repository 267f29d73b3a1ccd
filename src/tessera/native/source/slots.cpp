// Tokens and their experts: the counting sort into slots, and the sum of a token's results.
// Variants: portable avx2 avx512

#include "lanes.h"

// experts [choices], each in [0, num_experts) -> slots sorted by expert, then by choice: ops/dispatch.py, Slots.
// `begin` and `end` are those of one share: a counting sort is one thread's. Returns how many ids are out of range;
// then nothing else is written.
TESSERA_ENTRY(int64_t, sort_slots)(int64_t begin, int64_t end, const int64_t* experts, int64_t choices, int64_t k,
                                   int64_t num_experts, int64_t* token, int64_t* choice, int64_t* position,
                                   int64_t* offsets) {
    int64_t outside = 0;
    if (begin >= end) return outside;
    for (int64_t c = 0; c < choices; ++c) outside += experts[c] < 0 || experts[c] >= num_experts;
    if (outside) return outside;
    for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
    for (int64_t c = 0; c < choices; ++c) ++offsets[experts[c] + 1];
    for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    // Each group's offset runs through its slots, to end where the next group began.
    int64_t c = 0;
    for (int64_t t = 0; c < choices; ++t)
        for (int64_t j = 0; j < k; ++j, ++c) {
            int64_t slot = offsets[experts[c]]++;
            position[c] = slot;
            choice[slot] = c;
            token[slot] = t;
        }
    for (int64_t e = num_experts; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
    return outside;
}

namespace {

// rows [slots, n], position [tokens * k] -> out [tokens, n]: the k rows of a token, in order, in float32, rounded once.
template <typename T>
INLINE int64_t combine(int64_t begin, int64_t end, const T* rows, const int64_t* position, T* out, int64_t slots,
                       int64_t k, int64_t n) {
    int64_t outside = 0;
    for (int64_t token = begin; token < end; ++token) {
        const int64_t* place = position + token * k;
        bool inside = true;
        for (int64_t j = 0; j < k; ++j) inside = inside && place[j] >= 0 && place[j] < slots;
        outside += !inside;
        if (!inside) continue;
        each_vector(n, [&](int64_t c, auto lanes) {
            f32v sum = {};
            for (int64_t j = 0; j < k; ++j) sum += lanes.get(rows + place[j] * n + c);
            lanes.put(out + token * n + c, sum);
        });
    }
    return outside;
}

}  // namespace

#define COMBINE(T, suffix)                                                                                             \
    TESSERA_ENTRY(int64_t, combine_##suffix)(int64_t begin, int64_t end, const T* rows, const int64_t* position,       \
                                             T* out, int64_t slots, int64_t k, int64_t n) {                            \
        return combine(begin, end, rows, position, out, slots, k, n);                                                  \
    }

COMBINE(float, f32)
COMBINE(bf16, bf16)
