// One AdamW step over any number of tensors in one pass, and the sum of squares of their gradients.
// Variants: portable avx2 avx512
//
//   m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
//   w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
//
// The last quotient is extended by sqrt(1 - b2^t), which leaves one division. All is computed in float32; moments
// are used before they are rounded to their own type. Tensors are cut into chunks of so many elements, the last of each
// one shorter; a share is a range of chunks, counted over all tensors.

#include "isa.h"

namespace {

// As training/fused_adamw.py lays them out, a row of int64 for each tensor.
struct Parameter {
    float* master;
    const float* gradient;  // null: zeros
    void* first;
    void* second;
    int64_t elements;
    int64_t decays;  // 0 or 1
};

struct Step {
    float gradient_scale;
    float first_share, beta2, second_share;  // the shares are 1 - beta
    float kept, rate, epsilon;  // 1 - lr wd; -lr sqrt(1 - b2^t) / (1 - b1^t); eps sqrt(1 - b2^t)
};

INLINE float read(const float* x, int64_t i) { return x[i]; }
INLINE float read(const bf16* x, int64_t i) { return from_bf16(x[i]); }
INLINE void write(float* x, int64_t i, float value) { x[i] = value; }
INLINE void write(bf16* x, int64_t i, float value) { x[i] = to_bf16(value); }

// Memory is the limit, and a machine's own prefetching stops at every page: lines are asked for this much ahead.
enum { BLOCK = 64, AHEAD = 512, LINE = 64 };

template <typename T>
INLINE void prefetch(const T* block) {
    for (size_t at = 0; at < BLOCK * sizeof(T); at += LINE) __builtin_prefetch((const char*)(block + AHEAD) + at);
}

template <typename Moment, bool HasGradient>
INLINE void update(const Step& s, const Parameter& p, int64_t from, int64_t to) {
    float* __restrict master = p.master;
    const float* __restrict gradient = p.gradient;
    Moment* __restrict first = (Moment*)p.first;
    Moment* __restrict second = (Moment*)p.second;
    const float kept = p.decays ? s.kept : 1.0f;
    // Both ends of the interpolation from m to g are exact only if it is computed from the nearer one.
    const bool near = s.first_share < 0.5f;
    const float share = near ? s.first_share : s.first_share - 1.0f;
    for (int64_t block = from; block < to; block += BLOCK) {
        prefetch(master + block);
        if (HasGradient) prefetch(gradient + block);
        prefetch(first + block);
        prefetch(second + block);
        int64_t end = block + BLOCK < to ? block + BLOCK : to;
        for (int64_t i = block; i < end; ++i) {
            float g = HasGradient ? gradient[i] * s.gradient_scale : 0.0f;
            float m = read(first, i), v = read(second, i);
            m = multiply_add(share, g - m, near ? m : g);
            v = multiply_add(s.second_share * g, g, v * s.beta2);
            write(first, i, m);
            write(second, i, v);
            master[i] = master[i] * kept + s.rate * m / (__builtin_sqrtf(v) + s.epsilon);
        }
    }
}

// Calls visit(parameter, from, to, chunk) for each chunk of [begin, end).
template <typename Visit>
INLINE void each_chunk(int64_t begin, int64_t end, const Parameter* p, int64_t size, Visit visit) {
    for (int64_t start = 0; start < end; ++p) {
        int64_t chunks = (p->elements + size - 1) / size;
        for (int64_t c = begin > start ? begin - start : 0; c < chunks && start + c < end; ++c) {
            int64_t from = c * size, to = from + size < p->elements ? from + size : p->elements;
            visit(*p, from, to, start + c);
        }
        start += chunks;
    }
}

template <typename Moment>
INLINE void step(int64_t begin, int64_t end, const Parameter* parameters, int64_t size, const Step& s) {
    each_chunk(begin, end, parameters, size, [&](const Parameter& p, int64_t from, int64_t to, int64_t) {
        if (p.gradient)
            update<Moment, true>(s, p, from, to);
        else
            update<Moment, false>(s, p, from, to);
    });
}

typedef double f64v __attribute__((vector_size(8 * TESSERA_LANES)));

INLINE f64v square(f32v x) {
    f64v wide = __builtin_convertvector(x, f64v);
    return wide * wide;  // exact
}

// Two sums a lane, then their sum: an order that does not depend on the threads.
INLINE double sum_of_squares(const float* x, int64_t count) {
    f64v even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        if (i % BLOCK == 0) prefetch(x + i);
        even += square(load<f32v>(x + i));
        odd += square(load<f32v>(x + i + LANES));
    }
    for (; i + LANES <= count; i += LANES) even += square(load<f32v>(x + i));
    if (i < count) odd += square(load_part<f32v>(x + i, count - i));
    even += odd;
    double sum = 0.0;
    for (int lane = 0; lane < LANES; ++lane) sum += even[lane];
    return sum;
}

}  // namespace

// Chunks [begin, end) of `size` elements; `parameters` are rows of struct Parameter.
TESSERA_ENTRY(void, adamw_bf16)
(int64_t begin, int64_t end, const void* parameters, int64_t size, float gradient_scale, float first_share, float beta2,
 float second_share, float kept, float rate, float epsilon) {
    Step s = {gradient_scale, first_share, beta2, second_share, kept, rate, epsilon};
    step<bf16>(begin, end, (const Parameter*)parameters, size, s);
}

TESSERA_ENTRY(void, adamw_f32)
(int64_t begin, int64_t end, const void* parameters, int64_t size, float gradient_scale, float first_share, float beta2,
 float second_share, float kept, float rate, float epsilon) {
    Step s = {gradient_scale, first_share, beta2, second_share, kept, rate, epsilon};
    step<float>(begin, end, (const Parameter*)parameters, size, s);
}

// sums float64 [chunks]: of the squares of each chunk's gradients; zero where there is no gradient.
TESSERA_ENTRY(void, sum_of_squares)
(int64_t begin, int64_t end, const void* parameters, int64_t size, double* sums) {
    each_chunk(begin, end, (const Parameter*)parameters, size,
               [&](const Parameter& p, int64_t from, int64_t to, int64_t chunk) {
                   sums[chunk] = p.gradient ? sum_of_squares(p.gradient + from, to - from) : 0.0;
               });
}
