// Causal attention of MLA, backward: gradients of queries, keys and values from the output's.
// Variants: portable avx2 avx512 avx512_bf16 amx
//
// Blocks of keys are the outer loop, chunks of the queries that see them the inner one. P is made again from the
// log-sum-exp, dS = P (dO v^T - delta) with delta = sum(dO O) from the P that is not rounded; both are rounded to BF16
// where they become operands: along the queries for dv = P^T dO and dk = dS^T q, down the keys for dq^T = k^T dS^T.
// As in the forward pass a query is in each lane and a key in each row.
//
// dk and dv add up over the queries from the block's first key on, in order; dq over the blocks of keys in order, so that
// a query's gradient depends on the keys it sees alone.

#include "attention.h"
#include "exponential.h"

namespace {

enum { KEYS = 64, CHUNK = 128 };  // keys in a block; queries whose P and dS are kept for one product

INLINE float sum_of(f32v x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

struct Backward {
    int64_t padded, width, depth, value_width, value_depth, width_tiles, value_tiles;
    uint32_t *q_turned, *q_down;        // B [query / 16][depth], B [width / 16][query / DEPTH]
    uint32_t *dout_turned, *dout_down;  // the same of the output's gradient
    float *offset, *delta;              // [query]: minus the log-sum-exp, and sum(dO O)
    Visible* visible;                   // [query / LANES]
    float* dq;                          // C [query / 16][width / 16], turned
    uint32_t *keys, *keys_down, *values;  // A [key / 16][depth], A [width / 16][key / DEPTH], A [key / 16][value_depth]
    float *dk, *dv;                       // C [key / 16][width or value / 16]
    float *scores, *dp;                   // C [key / 16][2]
    uint32_t *p, *ds, *ds_down;           // A [key / 16][query / DEPTH] twice, B [query / 16][key / DEPTH]
    float* lines;                         // 16 rows of a gradient
    bf16 *rotary, *rows;

    Backward(const Sizes& s, Room& room) {
        padded = up(s.length, QUERIES);
        width = up(s.width(), 32), depth = width / DEPTH, width_tiles = up(s.width(), SIDE) / SIDE;
        value_width = up(s.value, 32), value_depth = value_width / DEPTH, value_tiles = up(s.value, SIDE) / SIDE;
        q_turned = room.take<uint32_t>(padded / SIDE * depth * TILE);
        q_down = room.take<uint32_t>(width_tiles * (padded / DEPTH) * TILE);
        dout_turned = room.take<uint32_t>(padded / SIDE * value_depth * TILE);
        dout_down = room.take<uint32_t>(value_tiles * (padded / DEPTH) * TILE);
        offset = room.take<float>(padded), delta = room.take<float>(padded);
        visible = room.take<Visible>(padded / LANES);
        dq = room.take<float>(padded / SIDE * width_tiles * TILE);
        keys = room.take<uint32_t>(KEYS / SIDE * depth * TILE);
        keys_down = room.take<uint32_t>(width_tiles * (KEYS / DEPTH) * TILE);
        values = room.take<uint32_t>(KEYS / SIDE * value_depth * TILE);
        dk = room.take<float>(KEYS / SIDE * width_tiles * TILE);
        dv = room.take<float>(KEYS / SIDE * value_tiles * TILE);
        scores = room.take<float>(KEYS / SIDE * 2 * TILE), dp = room.take<float>(KEYS / SIDE * 2 * TILE);
        p = room.take<uint32_t>(KEYS / SIDE * (CHUNK / DEPTH) * TILE);
        ds = room.take<uint32_t>(KEYS / SIDE * (CHUNK / DEPTH) * TILE);
        ds_down = room.take<uint32_t>(CHUNK / SIDE * (KEYS / DEPTH) * TILE);
        lines = room.take<float>(SIDE * width_tiles * SIDE);
        rotary = room.take<bf16>(s.length * s.rope);
        rows = room.take<bf16>(QUERIES * (width > value_width ? width : value_width));
    }

    void pack_queries(const bf16* q, const bf16* dout, const float* out, const float* log_sum_exp, const float* turn,
                      const int32_t* first, const Sizes& s) {
        int64_t apart = padded / DEPTH * TILE, stride = s.heads * s.value;
        for (int64_t query = 0; query < padded; query += LANES) visible[query / LANES] = Visible(first, query, s);
        for (int64_t query = 0; query < padded; query += QUERIES) {
            int64_t count = least(QUERIES, s.length - query);
            const bf16* from = q + query * s.q_stride;
            prefetch(from + QUERIES * s.q_stride, s.q_stride, s.width(), s.length - query - QUERIES);
            prefetch(dout + (query + QUERIES) * stride, stride, s.value, s.length - query - QUERIES);
            prefetch((const bf16*)(out + (query + QUERIES) * stride), 2 * stride, 2 * s.value, s.length - query - QUERIES);
            assemble(rows, width, from, s.q_stride, from + s.nope, s.q_stride, turn + query * s.rope, count, s);
            for (int64_t g = 0; g < 2; ++g)
                pack_along<true>(q_turned + (query / SIDE + g) * depth * TILE, rows + g * SIDE * width, width, depth);
            for (int64_t i = 0; i < QUERIES; i += DEPTH)
                pack_down<false>(q_down + (query + i) / DEPTH * TILE, apart, rows + i * width, width, width_tiles);
            assemble(rows, value_width, dout + query * stride, stride, s.value, count);
            for (int64_t g = 0; g < 2; ++g)
                pack_along<true>(dout_turned + (query / SIDE + g) * value_depth * TILE, rows + g * SIDE * value_width,
                                 value_width, value_depth);
            for (int64_t i = 0; i < QUERIES; i += DEPTH)
                pack_down<false>(dout_down + (query + i) / DEPTH * TILE, apart, rows + i * value_width, value_width,
                                  value_tiles);
            for (int64_t i = 0; i < QUERIES; ++i) {  // behind the end P is exp(-inf)
                offset[query + i] = i < count ? -log_sum_exp[query + i] : -__builtin_inff();
                delta[query + i] = i < count ? product_of(rows + i * value_width, out + (query + i) * stride, s.value) : 0;
            }
        }
    }

    static float product_of(const bf16* dout, const float* out, int64_t count) {
        f32v sum = {};
        int64_t c = 0;
        for (; c + LANES <= count; c += LANES) sum = fma(read(dout + c), read(out + c), sum);
        if (c < count) sum = fma(read_part(dout + c, count - c), read_part(out + c, count - c), sum);
        return sum_of(sum);
    }

    void pack_keys(const bf16* kv, int64_t key, int64_t tiles, const Sizes& s) {
        for (int64_t i = 0; i < tiles; i += 2) {
            int64_t at = key + i * SIDE, count = least(QUERIES, s.length - at);
            const bf16* from = kv + at * s.kv_stride;
            prefetch(from + KEYS * s.kv_stride, s.kv_stride, s.nope + s.value, s.length - at - KEYS);
            assemble(rows, width, from, s.kv_stride, rotary + at * s.rope, s.rope, nullptr, count, s);
            for (int64_t j = 0; j < 2; ++j)
                pack_along<false>(keys + (i + j) * depth * TILE, rows + j * SIDE * width, width, depth);
            for (int64_t j = 0; j < QUERIES; j += DEPTH)
                pack_down<true>(keys_down + (i * SIDE + j) / DEPTH * TILE, KEYS / DEPTH * TILE, rows + j * width, width,
                                 width_tiles);
            assemble(rows, value_width, from + s.nope, s.kv_stride, s.value, count);
            for (int64_t j = 0; j < 2; ++j)
                pack_along<false>(values + (i + j) * value_depth * TILE, rows + j * SIDE * value_width, value_width,
                                  value_depth);
        }
    }

    // P and dS of 16 keys, the tile-th of the block at `key`, and the 32 queries from `query`, which are `at` in the chunk.
    template <bool CHECK>
    void differentiate(int64_t key, int64_t tile, int64_t query, int64_t at, float scale, const Visible* seen) {
        uint32_t *p_row = p + along(tile, at), *ds_row = ds + along(tile, at);
        for (int64_t row = 0; row < SIDE; row += 2) {
            f32v probability[2][VECTORS], gradient[2][VECTORS];
            for (int64_t k = 0; k < 2; ++k)
                for (int64_t v = 0; v < VECTORS; ++v) {
                    int64_t lane = query + v * LANES, from = tile * 2 * TILE + place(v) + (row + k) * SIDE;
                    f32v x = fma(load<f32v>(scores + from), splat(scale), load<f32v>(offset + lane));
                    if (CHECK) x = seen[v].sees(key + tile * SIDE + row + k, lane) ? x : splat(-__builtin_inff());
                    probability[k][v] = exponential(x);
                    gradient[k][v] = probability[k][v] * (load<f32v>(dp + from) - load<f32v>(delta + lane));
                }
            for (int64_t k = 0; k < 2; ++k) {
                put_along(p_row + (row + k) * SIDE, probability[k]);
                put_along(ds_row + (row + k) * SIDE, gradient[k]);
            }
            for (int64_t v = 0; v < VECTORS; ++v)
                put_down(ds_down + down(at, v), tile * SIDE + row, gradient[0][v], gradient[1][v]);
        }
    }

    void out_of_sight(int64_t tile, int64_t at) {
        f32v zeros[VECTORS] = {};
        for (int64_t row = 0; row < SIDE; ++row) {
            put_along(p + along(tile, at) + row * SIDE, zeros);
            put_along(ds + along(tile, at) + row * SIDE, zeros);
            for (int64_t v = 0; v < VECTORS && row % 2 == 0; ++v)
                put_down(ds_down + down(at, v), tile * SIDE + row, zeros[0], zeros[0]);
        }
    }

    // Where things lie: the v-th vector of a block of queries in C tiles side by side; in P and dS the block that is `at`
    // in the chunk, and in ds_down its v-th vector.
    static int64_t place(int64_t v) { return v * LANES / SIDE * TILE + v * LANES % SIDE; }
    static int64_t along(int64_t tile, int64_t at) { return (tile * (CHUNK / DEPTH) + at / DEPTH) * TILE; }
    static int64_t down(int64_t at, int64_t v) {
        return (at + v * LANES) / SIDE * (KEYS / DEPTH) * TILE + v * LANES % SIDE;
    }

    // The block of `tiles` * 16 keys at `key` and the chunk of queries [begin, end).
    void pass(int64_t key, int64_t tiles, int64_t begin, int64_t end, float scale) {
        bool any = false;
        for (int64_t query = begin; query < end; query += QUERIES) {
            Visible* seen = visible + query / LANES;
            int64_t first = seen[0].least, open = seen[0].most;  // from here on only the diagonal hides
            for (int64_t v = 1; v < VECTORS; ++v) {
                first = least(first, seen[v].least);
                if (seen[v].most > open) open = seen[v].most;
            }
            bool here = first < key + tiles * SIDE;
            any |= here;
            if (here) {
                multiply<false>(scores, 2 * TILE, TILE, keys, depth * TILE, q_turned + query / SIDE * depth * TILE,
                                depth * TILE, tiles, 2, depth);
                multiply<false>(dp, 2 * TILE, TILE, values, value_depth * TILE,
                                dout_turned + query / SIDE * value_depth * TILE, value_depth * TILE, tiles, 2, value_depth);
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                int64_t at = key + tile * SIDE;
                if (!here || at >= query + QUERIES) out_of_sight(tile, query - begin);
                else if (at + SIDE > query || at < open) differentiate<true>(key, tile, query, query - begin, scale, seen);
                else differentiate<false>(key, tile, query, query - begin, scale, seen);
            }
        }
        if (!any) return;
        int64_t apart = padded / DEPTH * TILE, span = (end - begin) / DEPTH;
        multiply<true>(dv, value_tiles * TILE, TILE, p, CHUNK / DEPTH * TILE, dout_down + begin / DEPTH * TILE, apart, tiles,
                       value_tiles, span);
        multiply<true>(dk, width_tiles * TILE, TILE, ds, CHUNK / DEPTH * TILE, q_down + begin / DEPTH * TILE, apart, tiles,
                       width_tiles, span);
        multiply<true>(dq + begin / SIDE * width_tiles * TILE, TILE, width_tiles * TILE, keys_down, KEYS / DEPTH * TILE,
                       ds_down, KEYS / DEPTH * TILE, width_tiles, (end - begin) / SIDE, tiles * SIDE / DEPTH);
    }

    void write_keys(bf16* dkv, float* dk_rope, int64_t key, int64_t tiles, float scale, const Sizes& s) {
        int64_t stride = s.heads * (s.nope + s.value);
        for (int64_t i = 0; i < tiles * SIDE && key + i < s.length; ++i) {
            bf16* to = dkv + (key + i) * stride;
            const float* row = dk + i / SIDE * width_tiles * TILE + i % SIDE * SIDE;
            for (int64_t c = 0; c < width_tiles * SIDE; c += LANES)
                store(lines + c, load<f32v>(row + c / SIDE * TILE + c % SIDE) * scale);
            write_row(to, lines, s.nope);
            memcpy(dk_rope + (key + i) * s.rope, lines + s.nope, 4 * (size_t)s.rope);
            row = dv + i / SIDE * value_tiles * TILE + i % SIDE * SIDE;
            for (int64_t c = 0; c < s.value; c += SIDE) write_row(to + s.nope + c, row + c * SIDE, least(SIDE, s.value - c));
        }
    }

    void write_queries(bf16* to, const float* turn, float scale, const Sizes& s) {
        int64_t stride = s.heads * s.width(), columns = width_tiles * SIDE;
        for (int64_t query = 0; query < s.length; query += SIDE) {
            for (int64_t c = 0; c < width_tiles; ++c) {
                uint32_t x[SIDE][SIDE];
                const float* tile = dq + (query / SIDE * width_tiles + c) * TILE;
                for (int i = 0; i < TILE; i += LANES) store(x[i / SIDE] + i % SIDE, load<f32v>(tile + i) * scale);
                transpose_words(x, (uint32_t*)lines + c * SIDE, columns);
            }
            for (int64_t i = 0; i < SIDE && query + i < s.length; ++i) {
                bf16* row = to + (query + i) * stride;
                const float* line = lines + i * columns;
                write_row(row, line, s.nope);
                turn_row<true>(row + s.nope, line + s.nope, turn + (query + i) * s.rope, s.rope);
            }
        }
    }
};

}  // namespace

// Bytes of memory for one worker.
TESSERA_ENTRY(int64_t, attention_backward_room)(int64_t, int64_t, const Sizes* s) {
    Room room = {nullptr, 0};
    Backward layout(*s, room);
    return room.used;
}

// Workers [begin, end), as in the forward pass; dout BF16 and out float32 [T, heads * value] -> dq [T, heads * width],
// dkv [T, heads * (nope + value)], and each head's part of the turned rotary keys' gradient, float32 [pairs, length, rope].
TESSERA_ENTRY(void, attention_backward)(int64_t begin, int64_t end, const Sizes* sizes, float scale, const bf16* q,
                                        const bf16* kv, const bf16* k_rope, const float* turn, const int32_t* first,
                                        const bf16* dout, const float* out, const float* log_sum_exp, bf16* dq, bf16* dkv,
                                        float* dk_rope, char* memory) {
    const Sizes s = *sizes;
    NoSubnormals flushed;
    Tiles registers;
    for (int64_t worker = begin; worker < end; ++worker) {
        Room room = {memory + worker * s.room, 0};
        Backward w(s, room);
        int64_t rotated = -1;
        for (int64_t pair = s.first_pair(worker); pair < s.first_pair(worker + 1); ++pair) {
            int64_t b = pair / s.heads, h = pair % s.heads, token = b * s.length;
            int64_t at = token * s.heads * s.value + h * s.value;
            const float* turn_b = turn + b * s.turn_stride;
            const bf16* kv_h = kv + token * s.kv_stride + h * (s.nope + s.value);
            if (b != rotated) turn_keys(w.rotary, k_rope + token * s.k_rope_stride, turn_b, s);
            rotated = b;
            w.pack_queries(q + token * s.q_stride + h * s.width(), dout + at, out + at, log_sum_exp + pair * s.length, turn_b,
                           first ? first + token : nullptr, s);
            clear(w.dq, w.padded / SIDE * w.width_tiles * TILE * 4);
            for (int64_t key = 0; key < w.padded; key += KEYS) {
                int64_t tiles = least(KEYS, w.padded - key) / SIDE;
                w.pack_keys(kv_h, key, tiles, s);
                clear(w.dk, tiles * w.width_tiles * TILE * 4);
                clear(w.dv, tiles * w.value_tiles * TILE * 4);
                for (int64_t query = key; query < w.padded; query += CHUNK) {
                    int64_t last = least(query + CHUNK, w.padded);
                    w.pass(key, tiles, query, last, scale);
                }
                bf16* dkv_h = dkv + (token * s.heads + h) * (s.nope + s.value);
                w.write_keys(dkv_h, dk_rope + pair * s.length * s.rope, key, tiles, scale, s);
            }
            w.write_queries(dq + (token * s.heads + h) * s.width(), turn_b, scale, s);
        }
    }
}

// Tokens [begin, end): the heads' parts, added up in their order and turned back -> dk_rope [T, rope].
TESSERA_ENTRY(void, attention_rotary_key_gradient)(int64_t begin, int64_t end, const Sizes* sizes, const float* parts,
                                                   const float* turn, bf16* dk_rope) {
    const Sizes s = *sizes;
    for (int64_t token = begin; token < end; ++token) {
        int64_t b = token / s.length, position = token % s.length;
        const float* from = parts + (b * s.heads * s.length + position) * s.rope;
        const float* turn_row = turn + b * s.turn_stride + position * s.rope;
        for (int64_t c = 0; c < s.rope; c += LANES) {
            int64_t count = least(LANES, s.rope - c);
            f32v sum = {};
            for (int64_t h = 0; h < s.heads; ++h) {
                const float* part = from + h * s.length * s.rope + c;
                sum += count == LANES ? read(part) : read_part(part, count);
            }
            bf16* to = dk_rope + token * s.rope + c;
            if (count == LANES) write(to, turned<true>(sum, read(turn_row + c)));
            else write_part(to, turned<true>(sum, read_part(turn_row + c, count)), count);
        }
    }
}
