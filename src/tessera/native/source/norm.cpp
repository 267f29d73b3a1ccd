// RMSNorm, y = gamma * x / rms(x), alone or after a residual addition, and its gradients.
//
// A row's sums run over its vectors in order, then over the lanes: on one instruction set the order depends on the row's
// length alone. Rows of x may lie apart (a slice of a wider matrix is read in place); all else is contiguous.
// Variants: portable avx2 avx512

#include "lanes.h"

namespace {

enum { CHUNK = 64 };  // rows whose share of dgamma is added up in one partial sum; ops/kernels/norm.py has it too

template <typename T>
INLINE void scale_row(const T* x, const float* gamma, float inverse_rms, T* y, int64_t n) {
    f32v inverse = splat(inverse_rms);
    each_vector(n, [&](int64_t j, auto lanes) {
        lanes.put(y + j, lanes.get(x + j) * inverse * lanes.get(gamma + j));
    });
}

INLINE float inverse_rms_of(f32v squares, int64_t n, float epsilon) {
    return 1.0f / __builtin_sqrtf(total(squares) / (float)n + epsilon);
}

template <typename T>
INLINE void forward(int64_t begin, int64_t end, const T* x, int64_t stride, const float* gamma, T* y,
                    float* inverse_rms, int64_t n, float epsilon) {
    for (int64_t row = begin; row < end; ++row) {
        const T* in = x + row * stride;
        f32v squares = {};
        each_vector(n, [&](int64_t j, auto lanes) {
            f32v v = lanes.get(in + j);
            squares += v * v;
        });
        inverse_rms[row] = inverse_rms_of(squares, n, epsilon);
        scale_row(in, gamma, inverse_rms[row], y + row * n, n);
    }
}

// The same of sum = x + delta, rounded to the activations' dtype before the norm reads it.
template <typename T>
INLINE void add_forward(int64_t begin, int64_t end, const T* x, const T* delta, const float* gamma, T* sum, T* y,
                        float* inverse_rms, int64_t n, float epsilon) {
    for (int64_t row = begin; row < end; ++row) {
        const T *in = x + row * n, *add = delta + row * n;
        T* out = sum + row * n;
        f32v squares = {};
        each_vector(n, [&](int64_t j, auto lanes) {
            lanes.put(out + j, lanes.get(in + j) + lanes.get(add + j));
            f32v v = lanes.get(out + j);
            squares += v * v;
        });
        inverse_rms[row] = inverse_rms_of(squares, n, epsilon);
        scale_row(out, gamma, inverse_rms[row], y + row * n, n);
    }
}

template <typename T>
INLINE void scale(int64_t begin, int64_t end, const T* x, int64_t stride, const float* gamma, const float* inverse_rms,
                  T* y, int64_t n) {
    for (int64_t row = begin; row < end; ++row) scale_row(x + row * stride, gamma, inverse_rms[row], y + row * n, n);
}

// With u = x / rms: dx = (dy gamma - u mean(dy gamma u)) / rms, plus the gradient that passes the norm by, if there is
// one; dgamma = sum of dy u over the rows, by chunks. `begin` is a multiple of CHUNK.
template <typename D, typename T>
INLINE void backward(int64_t begin, int64_t end, const D* dy, const T* x, int64_t stride, const float* gamma,
                     const float* inverse_rms, const T* passing, T* dx, float* partial, int64_t n) {
    for (int64_t row = begin; row < end; ++row) {
        const D* d = dy + row * n;
        const T* in = x + row * stride;
        float* dgamma = partial + row / CHUNK * n;
        f32v inverse = splat(inverse_rms[row]), products = {};
        bool first = row % CHUNK == 0;
        each_vector(n, [&](int64_t j, auto lanes) {
            f32v product = lanes.get(d + j) * (lanes.get(in + j) * inverse);
            products += product * lanes.get(gamma + j);
            lanes.put(dgamma + j, first ? product : lanes.get(dgamma + j) + product);
        });
        f32v along = splat(total(products) / (float)n);
        each_vector(n, [&](int64_t j, auto lanes) {
            f32v unit = lanes.get(in + j) * inverse;
            f32v v = (lanes.get(d + j) * lanes.get(gamma + j) - unit * along) * inverse;
            if (passing) v += lanes.get(passing + row * n + j);
            lanes.put(dx + row * n + j, v);
        });
    }
}

}  // namespace

#define NORM(T, suffix)                                                                                                \
    TESSERA_ENTRY(void, norm_##suffix)(int64_t begin, int64_t end, const T* x, int64_t stride, const float* gamma,     \
                                       T* y, float* inverse_rms, int64_t n, float epsilon) {                           \
        forward(begin, end, x, stride, gamma, y, inverse_rms, n, epsilon);                                             \
    }                                                                                                                  \
    TESSERA_ENTRY(void, add_norm_##suffix)(int64_t begin, int64_t end, const T* x, const T* delta, const float* gamma, \
                                           T* sum, T* y, float* inverse_rms, int64_t n, float epsilon) {               \
        add_forward(begin, end, x, delta, gamma, sum, y, inverse_rms, n, epsilon);                                     \
    }                                                                                                                  \
    TESSERA_ENTRY(void, norm_again_##suffix)(int64_t begin, int64_t end, const T* x, int64_t stride,                   \
                                             const float* gamma, const float* inverse_rms, T* y, int64_t n) {          \
        scale(begin, end, x, stride, gamma, inverse_rms, y, n);                                                        \
    }

#define NORM_BACKWARD(D, T, suffix)                                                                                    \
    TESSERA_ENTRY(void, norm_backward_##suffix)(int64_t begin, int64_t end, const D* dy, const T* x, int64_t stride,   \
                                                const float* gamma, const float* inverse_rms, const T* passing, T* dx, \
                                                float* partial, int64_t n) {                                           \
        backward(begin, end, dy, x, stride, gamma, inverse_rms, passing, dx, partial, n);                              \
    }

NORM(float, f32)
NORM(bf16, bf16)
NORM_BACKWARD(float, float, f32_f32)
NORM_BACKWARD(float, bf16, f32_bf16)
NORM_BACKWARD(bf16, bf16, bf16_bf16)

// partial [chunks, n] -> dgamma [n], columns [begin, end), chunks in order.
TESSERA_ENTRY(void, norm_dgamma)(int64_t begin, int64_t end, const float* partial, float* dgamma, int64_t chunks,
                                 int64_t n) {
    each_vector(end - begin, [&](int64_t j, auto lanes) {
        f32v sum = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += lanes.get(partial + chunk * n + begin + j);
        lanes.put(dgamma + begin + j, sum);
    });
}
