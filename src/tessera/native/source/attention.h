// What the forward and the backward pass of latent attention share: sizes, and rows assembled from their parts.
//
// A row of queries or keys is [nope; rope]: the rotary part is turned, the key's is one for all heads. Parts are read
// where they lie; rows are put together a block at a time, straight into tiles.
#pragma once

#include "tiles.h"

enum { QUERIES = 32 };  // in a block; also what sequences and widths are filled up to with zeros
enum { VECTORS = QUERIES / LANES };

INLINE i32v ramp() {
    i32v lane = {};
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

namespace {  // a copy for each instruction set

// As ops/kernels/attention.py writes them: int64, one behind the other. Strides in elements.
struct Sizes {
    int64_t batch, length, heads, nope, rope, value;
    int64_t q_stride, kv_stride, k_rope_stride;  // from one token to the next
    int64_t turn_stride;                         // from one sequence's rotation to the next, in floats; 0: one for all
    int64_t workers, room;                       // shares of the (sequence, head) pairs; bytes of memory for each

    int64_t width() const { return nope + rope; }
    int64_t pairs() const { return batch * heads; }
    int64_t first_pair(int64_t worker) const { return pairs() * worker / workers; }
};

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of a worker, given out piece by piece; without memory it only counts.
struct Room {
    char* memory;
    int64_t used;

    template <typename T>
    T* take(int64_t count) {
        int64_t at = used;
        used += up(count * (int64_t)sizeof(T), 64);
        return memory ? (T*)(memory + at) : nullptr;
    }
};

INLINE void clear(void* to, int64_t bytes) { memset(to, 0, (size_t)bytes); }

INLINE void copy_row(bf16* to, const bf16* from, int64_t count) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) store(to + c, load<u16v>(from + c));
    if (c < count) store_part(to + c, load_part<u16v>(from + c, count - c), count - c);
}

template <typename To>
INLINE void write_row(To* to, const float* from, int64_t count) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) write(to + c, read(from + c));
    if (c < count) write_part(to + c, read_part(from + c, count - c), count - c);
}

// Turn interleaved pairs by (cosine, sine) pairs, or back: even c - odd s, even s + odd c, each product rounded.
template <bool BACK>
INLINE f32v turned(f32v x, f32v turn) {
    const i32v lane = ramp(), odd = lane & 1;
    u32v minus = (u32v)(BACK ? odd : 1 - odd) << 31;
    f32v crossed = __builtin_shuffle(x, lane ^ 1) * __builtin_shuffle(turn, lane | 1);
    return x * __builtin_shuffle(turn, lane & ~1) + from_bits(bits(crossed) ^ minus);
}

template <bool BACK, typename To, typename From>
INLINE void turn_row(To* to, const From* from, const float* turn, int64_t count) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) write(to + c, turned<BACK>(read(from + c), load<f32v>(turn + c)));
    if (c == count) return;
    f32v y = turned<BACK>(read_part(from + c, count - c), load_part<f32v>(turn + c, count - c));
    write_part(to + c, y, count - c);
}

// Rows of `width` elements, zeros behind them up to `padded`, and whole rows of zeros from `count` to QUERIES.
INLINE void fill_up(bf16* rows, int64_t width, int64_t padded, int64_t count) {
    if (width < padded)
        for (int64_t i = 0; i < count; ++i) clear(rows + i * padded + width, (padded - width) * 2);
    clear(rows + count * padded, (QUERIES - count) * padded * 2);
}

// A head's rows are far apart, which the processor does not foresee: up to QUERIES rows that are needed soon.
INLINE void prefetch(const bf16* from, int64_t stride, int64_t width, int64_t count) {
    for (int64_t i = 0; i < least(count, QUERIES); ++i)
        for (int64_t c = 0; c < width; c += 32) __builtin_prefetch(from + i * stride + c, 0, 2);
}

// `count` <= QUERIES rows [nope; rope]; `rope` is turned if there is a `turn` (rows of s.rope floats).
INLINE void assemble(bf16* rows, int64_t padded, const bf16* nope, int64_t nope_stride, const bf16* rope,
                     int64_t rope_stride, const float* turn, int64_t count, const Sizes& s) {
    for (int64_t i = 0; i < count; ++i) {
        bf16* row = rows + i * padded;
        copy_row(row, nope + i * nope_stride, s.nope);
        if (turn) turn_row<false>(row + s.nope, rope + i * rope_stride, turn + i * s.rope, s.rope);
        else copy_row(row + s.nope, rope + i * rope_stride, s.rope);
    }
    fill_up(rows, s.width(), padded, count);
}

INLINE void assemble(bf16* rows, int64_t padded, const bf16* from, int64_t stride, int64_t width, int64_t count) {
    for (int64_t i = 0; i < count; ++i) copy_row(rows + i * padded, from + i * stride, width);
    fill_up(rows, width, padded, count);
}

// The rotary keys of a sequence, turned once for all heads: [length, rope].
INLINE void turn_keys(bf16* to, const bf16* k_rope, const float* turn, const Sizes& s) {
    for (int64_t i = 0; i < s.length; ++i)
        turn_row<false>(to + i * s.rope, k_rope + i * s.k_rope_stride, turn + i * s.rope, s.rope);
}

// The first visible key of the LANES queries from `query` on; `row` is their sequence's or null. A query behind the end
// looks at its block only.
struct Visible {
    i32v first;
    int64_t least, most;  // over the lanes

    Visible(const int32_t* row, int64_t query, const Sizes& s) {
        int64_t count = s.length - query;
        if (!row) first = i32v{};
        else if (count >= LANES) first = load<i32v>(row + query);
        else {
            first = splat((int32_t)(query / QUERIES * QUERIES));
            if (count > 0) memcpy(&first, row + query, 4 * (size_t)count);
        }
        least = most = first[0];
        for (int i = 1; row && i < LANES; ++i) {
            if (first[i] < least) least = first[i];
            if (first[i] > most) most = first[i];
        }
    }

    // Whether key `number` is one of those that the queries from `query` on see.
    i32v sees(int64_t number, int64_t query) const {
        i32v key = splat((int32_t)number);
        return (key <= splat((int32_t)query) + ramp()) & (key >= first);
    }
};

}  // namespace
