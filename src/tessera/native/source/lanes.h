// A row of any length as vectors: whole ones, then a part of one whose other lanes are zero.
#pragma once

#include "isa.h"

namespace {

struct Whole {
    ALWAYS_INLINE u32v codes(const uint8_t* from) const { return widen(load<u8v>(from)); }
    template <typename T>
    ALWAYS_INLINE f32v get(const T* from) const {
        return read(from);
    }
    template <typename T>
    ALWAYS_INLINE void put(T* to, f32v v) const {
        write(to, v);
    }
};

struct Part {
    int64_t count;
    ALWAYS_INLINE u32v codes(const uint8_t* from) const { return widen(load_part<u8v>(from, count)); }
    template <typename T>
    ALWAYS_INLINE f32v get(const T* from) const {
        return read_part(from, count);
    }
    template <typename T>
    ALWAYS_INLINE void put(T* to, f32v v) const {
        write_part(to, v, count);
    }
};

// body(j, lanes) for each vector of a row of n elements; lanes.get and lanes.put touch only what the row has.
template <typename Body>
INLINE void each_vector(int64_t n, Body body) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) body(j, Whole{});
    if (j < n) body(j, Part{n - j});
}

// The lanes' sum, halves folded onto each other.
INLINE float total(f32v v) {
    float lane[LANES];
    store(lane, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

}  // namespace
