// Causal attention of MLA, forward: out = softmax(scale q k^T) v, and the softmax's log-sum-exp.
// Variants: portable avx2 avx512 avx512_bf16 amx
//
// A block of 32 queries against all keys it sees, in three passes over its strip of scores: products and their largest,
// exponentials and their sum, P rounded to BF16. Scores lie with a query in each lane and a key in each row, so all of
// the softmax goes lane by lane; P is then the B operand of out^T = v^T P^T where it lies.
//
// A lane's bits depend on its query and the keys it sees: keys are taken in order, 32 at a time from multiples of 32, and
// what a query does not see adds zeros.

#include "attention.h"
#include "exponential.h"

namespace {

enum { KEYS = 32 };  // at a time; DEPTH divides it

// Of LANES queries, whose scores of one key are a row of the strip: the largest in keys [from, to). Those out of sight
// become -inf where there may be any.
template <bool CHECK>
INLINE f32v find_largest(float* strip, int64_t from, int64_t to, f32v largest, int64_t query, const Visible& seen) {
    for (int64_t key = from; key < to; ++key) {
        f32v x = load<f32v>(strip + key * SIDE);
        if (CHECK) {
            x = seen.sees(key, query) ? x : splat(-__builtin_inff());
            store(strip + key * SIDE, x);
        }
        largest = larger(largest, x);
    }
    return largest;
}

// Scores of keys [start, seen) to P in place, zeros behind them up to `end`; returns the log-sum-exp.
INLINE f32v softmax(float* strip, int64_t start, int64_t seen, int64_t end, f32v largest, float scale) {
    f32v offset = largest * -scale, sum = {};
    for (int64_t key = start; key < seen; key += KEYS) {  // sums of sums: their error grows with the block's length
        f32v part = {};
        for (int64_t k = key; k < least(key + KEYS, seen); ++k) {
            f32v e = exponential(fma(load<f32v>(strip + k * SIDE), splat(scale), offset));
            store(strip + k * SIDE, e);
            part += e;
        }
        sum += part;
    }
    f32v reciprocal = 1.0f / sum;
    for (int64_t key = start; key < seen; key += 2) {  // two rows are read before one or two are written, none beyond
        f32v a = load<f32v>(strip + key * SIDE), b = load<f32v>(strip + (key + 1) * SIDE);
        put_down((uint32_t*)strip, key, a * reciprocal, b * reciprocal);
    }
    for (int64_t key = seen; key < end; key += 2) put_down((uint32_t*)strip, key, f32v{}, f32v{});
    return logarithm(sum) - offset;
}

struct Forward {
    int64_t padded, width, depth, value_tiles, strip;  // strip: words of one lane group's scores
    uint32_t *keys, *values, *queries;                 // A [key / 16][depth], A [value / 16][key / DEPTH], B [2][depth]
    float *scores, *out;                               // C [2][key / 16], C [value / 16][2]
    bf16 *rotary, *rows;

    Forward(const Sizes& s, Room& room) {
        padded = up(s.length, KEYS), width = up(s.width(), 32), depth = width / DEPTH;
        value_tiles = up(s.value, SIDE) / SIDE, strip = padded * SIDE;
        keys = room.take<uint32_t>(padded / SIDE * depth * TILE);
        values = room.take<uint32_t>(value_tiles * (padded / DEPTH) * TILE);
        queries = room.take<uint32_t>(2 * depth * TILE);
        scores = room.take<float>(2 * strip);
        out = room.take<float>(value_tiles * 2 * TILE);
        rotary = room.take<bf16>(s.length * s.rope);
        rows = room.take<bf16>(QUERIES * (width > value_tiles * SIDE ? width : value_tiles * SIDE));
    }

    void pack_keys(const bf16* kv, const Sizes& s) {
        for (int64_t key = 0; key < padded; key += KEYS) {
            int64_t count = least(KEYS, s.length - key), columns = value_tiles * SIDE;
            const bf16* from = kv + key * s.kv_stride;
            assemble(rows, width, from, s.kv_stride, rotary + key * s.rope, s.rope, nullptr, count, s);
            for (int64_t i = 0; i < KEYS; i += SIDE)
                pack_along<false>(keys + (key + i) / SIDE * depth * TILE, rows + i * width, width, depth);
            assemble(rows, columns, from + s.nope, s.kv_stride, s.value, count);
            for (int64_t i = 0; i < KEYS; i += DEPTH)
                pack_down<true>(values + (key + i) / DEPTH * TILE, padded / DEPTH * TILE, rows + i * columns, columns,
                                 value_tiles);
        }
    }

    // The strip of a vector of queries, the v-th of the block.
    float* column(int64_t v) { return scores + v * LANES / SIDE * strip + v * LANES % SIDE; }

    void attend(int64_t query, const int32_t* first, float scale, float* log_sum_exp, const Sizes& s) {
        int64_t start = query, end = query + KEYS;
        for (int64_t v = 0; v < VECTORS; ++v) start = least(start, Visible(first, query + v * LANES, s).least);
        start = start / KEYS * KEYS;
        multiply<false>(scores + start * SIDE, TILE, strip, keys + start / SIDE * depth * TILE, depth * TILE, queries,
                        depth * TILE, (end - start) / SIDE, 2, depth);
        for (int64_t v = 0; v < VECTORS; ++v) {
            int64_t own = query + v * LANES, last = query + up(v * LANES + LANES, SIDE);
            const Visible seen(first, own, s);
            int64_t open = first ? least(up(seen.most, KEYS), query) : start;  // from here on only the diagonal hides
            f32v largest = splat(-__builtin_inff());
            largest = find_largest<true>(column(v), start, open, largest, own, seen);
            largest = find_largest<false>(column(v), open, query, largest, own, seen);
            largest = find_largest<true>(column(v), query, last, largest, own, seen);
            f32v found = softmax(column(v), start, last, end, largest, scale);
            int64_t count = s.length - own;
            if (count >= LANES) store(log_sum_exp + own, found);
            else if (count > 0) store_part(log_sum_exp + own, found, count);
        }
        multiply<false>(out, 2 * TILE, TILE, values + start / DEPTH * TILE, padded / DEPTH * TILE,
                        (uint32_t*)scores + start / PAIR * SIDE, strip, value_tiles, 2, (end - start) / DEPTH);
    }

    // Rows of out^T as rows of out, a query each.
    void write_rows(bf16* to, int64_t stride, int64_t count, const Sizes& s) {
        uint32_t x[SIDE][SIDE], y[TILE];
        for (int64_t column = 0; column < s.value; column += SIDE)
            for (int64_t g = 0; g * SIDE < count; ++g) {
                memcpy(x, out + (column / SIDE * 2 + g) * TILE, sizeof x);
                transpose_words(x, y, SIDE);
                for (int64_t i = 0; i < SIDE && g * SIDE + i < count; ++i)
                    write_row(to + (g * SIDE + i) * stride + column, (const float*)(y + i * SIDE),
                              least(SIDE, s.value - column));
            }
    }
};

}  // namespace

// Bytes of memory for one worker.
TESSERA_ENTRY(int64_t, attention_forward_room)(int64_t, int64_t, const Sizes* s) {
    Room room = {nullptr, 0};
    Forward f(*s, room);
    return room.used;
}

// Workers [begin, end), each its share of the pairs. q [T, heads * width], kv [T, heads * (nope + value)], k_rope
// [T, rope], turn [1 or batch, length, rope] float32, first [batch, length] or null -> out [T, heads * value],
// log_sum_exp [pairs, length]. room: workers * s->room bytes, aligned to 64.
TESSERA_ENTRY(void, attention_forward)(int64_t begin, int64_t end, const Sizes* sizes, float scale, const bf16* q,
                                       const bf16* kv, const bf16* k_rope, const float* turn, const int32_t* first,
                                       bf16* out, float* log_sum_exp, char* memory) {
    const Sizes s = *sizes;
    NoSubnormals flushed;
    Tiles registers;
    for (int64_t worker = begin; worker < end; ++worker) {
        Room room = {memory + worker * s.room, 0};
        Forward f(s, room);
        int64_t rotated = -1;
        for (int64_t pair = s.first_pair(worker); pair < s.first_pair(worker + 1); ++pair) {
            int64_t b = pair / s.heads, h = pair % s.heads, token = b * s.length;
            const float* turn_b = turn + b * s.turn_stride;
            bool more = pair + 1 < s.first_pair(worker + 1);
            int64_t next = (pair + 1) / s.heads * s.length * s.kv_stride + (pair + 1) % s.heads * (s.nope + s.value);
            if (b != rotated) turn_keys(f.rotary, k_rope + token * s.k_rope_stride, turn_b, s);
            rotated = b;
            f.pack_keys(kv + token * s.kv_stride + h * (s.nope + s.value), s);
            for (int64_t query = 0; query < s.length; query += QUERIES) {
                int64_t count = least(QUERIES, s.length - query);
                const bf16* from = q + (token + query) * s.q_stride + h * s.width();
                if (more) prefetch(kv + next + query * s.kv_stride, s.kv_stride, s.nope + s.value, count);
                prefetch(from + QUERIES * s.q_stride, s.q_stride, s.width(), s.length - query - QUERIES);
                assemble(f.rows, f.width, from, s.q_stride, from + s.nope, s.q_stride, turn_b + query * s.rope, count, s);
                for (int64_t g = 0; g < 2; ++g)
                    pack_along<true>(f.queries + g * f.depth * TILE, f.rows + g * SIDE * f.width, f.width, f.depth);
                f.attend(query, first ? first + token : nullptr, scale, log_sum_exp + pair * s.length, s);
                int64_t stride = s.heads * s.value;
                f.write_rows(out + (token + query) * stride + h * s.value, stride, count, s);
            }
        }
    }
}
