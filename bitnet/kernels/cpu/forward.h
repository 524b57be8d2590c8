// One step of the decoder in one call: rows of any lengths, each with any number of new tokens.
//
//     h = embed(ids)
//     per layer   h += o(attn_sub_norm(attention(input_norm(h))))
//                 h += down(ffn_sub_norm(act(gate(n)) * up(n))),  n = post_norm(h)
//     logits = head(norm(h)), or norm(h) itself where states are asked for
//
// The model is bitnet/model/transformer.py, which is the specification. The new tokens of all rows lie one behind the
// other and go through every product together; attention takes each row for itself. Integer sums are exact and floats
// are added in an order that depends on the token alone, so what a row gets does not depend on the others, on where
// its tokens were cut into steps, or on threads. A norm and the quantization behind it are one pass over a token; for a
// single token every thread does that pass for itself, which is cheaper than one more phase (pool.h). Nothing is
// allocated: Python hands over the workspace.
//
// Letters: M tokens, C hidden, F intermediate, H heads, G kv heads, D head_dim, Dp = D padded to 16.
#pragma once

#include "attention.h"
#include "pool.h"
#include "product.h"

namespace bn {
namespace BN_ISA {

struct buffers {
    float *h, *a, *b; // [M, C], [M, max of qkv, F, heads and C] twice
    uint8_t *x;       // activations of the tokens
    int64_t wide;
    int32_t *row_of, *position; // of every token
    int64_t *items;             // [rows + 1]: where a row's pieces of attention begin
    uint8_t *own;               // of the threads: activations of one token; scratch of products and norms, scores
    int64_t own_bytes, own_x;
};

// Floats from one token's to the next one's: an odd number of cache lines, or all tokens' outputs of a panel would share a
// few sets of a cache.
BN_INLINE int64_t apart_by(int64_t floats) { return round_up(floats, 64) + 16; }

// longest: positions of the longest row after the step.
static int64_t lay_out(const bn_model &m, int64_t M, int64_t rows, int64_t longest, int threads, uint8_t *base,
                       buffers *to) {
    int64_t D = m.head_dim, Dp = round_up(D, 16), used = 64;
    int64_t qkv = round_up(m.heads * D, 16) + 2 * round_up(m.kv_heads * D, 16);
    int64_t wide = apart_by(max64(max64(qkv, m.intermediate), max64((int64_t)m.heads * Dp, m.hidden)));
    int64_t inputs = 0, input = 0, scratch = group_scratch(1); // an embedding: one chunk
    auto most = [&](const bn_projection &p) {
        inputs = max64(inputs, lay_out_inputs(p, M, nullptr, nullptr));
        input = max64(input, lay_out_inputs(p, 1, nullptr, nullptr));
        scratch = max64(scratch, max64(prepare_scratch(p), product_scratch(p, M)));
    };
    most(m.head);
    for (int64_t i = 0; i < m.layers; i++) {
        most(m.layer[i].qkv);
        most(m.layer[i].o);
        most(m.layer[i].gate_up);
        most(m.layer[i].down);
    }
    auto take = [&](int64_t bytes) {
        uint8_t *p = base ? (uint8_t *)round_up((int64_t)base, 64) + used - 64 : nullptr;
        used += round_up(bytes, 64);
        return p;
    };
    buffers b;
    b.wide = wide;
    b.h = (float *)take(M * apart_by(m.hidden) * 4);
    b.a = (float *)take(M * wide * 4);
    b.b = (float *)take(M * wide * 4);
    b.x = take(inputs);
    b.row_of = (int32_t *)take(M * 4);
    b.position = (int32_t *)take(M * 4);
    b.items = (int64_t *)take((rows + 1) * 8);
    // A key and a value, a rotated query; queries, padded outputs and scores of some.
    int64_t attention = (3 * Dp + MAX_QUERIES * (2 * Dp + round_up(longest, 16))) * 4;
    b.own_x = round_up(input, 64);
    b.own_bytes = b.own_x + round_up(max64(scratch, attention), 64) + 64;
    b.own = take(b.own_bytes * threads);
    if (to) *to = b;
    return used + 64;
}

static int64_t workspace(const bn_model *m, int64_t tokens, int64_t rows, int64_t longest, int threads) {
    return lay_out(*m, tokens, rows, longest, threads, nullptr, nullptr);
}

// Rows whose keys and values are written in a phase of their own. A row of one token has one piece of attention for each
// key/value head, which writes what it then attends to, unless that makes too few pieces for the threads.
BN_INLINE bool apart(const bn_row &row, bool few) { return row.tokens > 1 || few; }
BN_INLINE int64_t queries_of(const bn_model &m, const bn_row &row) { return row.tokens * (m.heads / m.kv_heads); }
BN_INLINE int64_t queries_at_once(int64_t queries) { return queries < 2 * MAX_QUERIES ? SOME_QUERIES : MAX_QUERIES; }
BN_INLINE int64_t pieces(const bn_model &m, const bn_row &row, bool few) { // of one key/value head
    int64_t queries = queries_of(m, row), each = queries_at_once(queries);
    return apart(row, few) ? (queries + each - 1) / each : 1;
}

// A thread's way through a step. Every function ends with all threads seeing what all of them wrote, and returns false
// when the step is over without this thread, which must then touch nothing more.
struct pass {
    const bn_model &m;
    const bn_row *rows;
    int64_t row_count, M;
    bool few;
    const buffers &buf;
    member &self;
    uint8_t *own;

    // The tokens that the next product takes. One token is prepared by every thread, each in its own memory, once it is
    // about to take pieces of the product: until then `x` says of what.
    prepared inputs = {};
    const float *x = nullptr, *norm = nullptr;
    int64_t count = 0;

    // Norm and activations, as `p` takes them, of `tokens` rows: row i of x, or wanted[i].
    bool prepare_rows(const bn_projection &p, const float *from, int64_t stride, const float *weight, int64_t tokens,
                      const int32_t *wanted = nullptr) {
        count = tokens;
        norm = weight;
        if (tokens == 1) {
            x = from + (wanted ? wanted[0] : 0) * stride;
            lay_out_inputs(p, 1, own - buf.own_x, &inputs);
            return true;
        }
        x = nullptr;
        lay_out_inputs(p, tokens, buf.x, &inputs);
        return self.each(tokens, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                prepare(p, from + (wanted ? wanted[i] : i) * stride, norm, m.eps, inputs, i, own);
        });
    }

    bool multiply_rows(const bn_projection &p, float *y, int64_t stride, int out) {
        auto one = [&] {
            if (x) prepare(p, x, norm, m.eps, inputs, 0, own);
        };
        return self.each(panels_of(p, out), one, [&](int64_t first, int64_t last) {
            product(p, inputs, count, out, y, stride, first, last, own);
        });
    }

    // RMSNorm of a head (weight NULL: none) and its rotation, into out[D padded to 16].
    void rope(const float *from, const float *weight, int64_t position, float *out) const {
        alignas(64) float normed[1024];
        if (weight) {
            rms_norm(from, weight, m.head_dim, m.eps, normed);
            from = normed;
        }
        const float *cos = m.cos + position * m.head_dim, *sin = m.sin + position * m.head_dim;
        int64_t D = m.head_dim, half = D / 2, i = 0;
        for (; i + 16 <= half; i += 16) {
            vf first = load(from + i), second = load(from + half + i);
            store(out + i, first * load(cos + i) - second * load(sin + i));
            store(out + half + i, second * load(cos + half + i) + first * load(sin + half + i));
        }
        for (; i < half; i++) {
            float first = from[i], second = from[half + i];
            out[i] = first * cos[i] - second * sin[i];
            out[half + i] = second * cos[half + i] + first * sin[half + i];
        }
        for (i = D; i < round_up(D, 16); i++) out[i] = 0.0f;
    }

    template <int dtype> head_cache<dtype> cache_of(const bn_row &row, int64_t layer, int64_t g) const {
        const bn_cache &c = *row.cache;
        return {row, round_up(m.head_dim, 16), layer * c.layer_stride + g * c.head_stride};
    }

    template <int dtype> void write(int64_t token, int64_t layer, int64_t g) const {
        int64_t D = m.head_dim, Dp = round_up(D, 16), k_at = round_up(m.heads * D, 16);
        int64_t v_at = k_at + round_up(m.kv_heads * D, 16);
        float *padded = (float *)own;
        const float *from = buf.a + token * buf.wide;
        rope(from + k_at + g * D, m.layer[layer].k_norm, buf.position[token], padded);
        memcpy(padded + Dp, from + v_at + g * D, D * 4);
        for (int64_t d = D; d < Dp; d++) padded[Dp + d] = 0.0f;
        append<dtype>(padded, padded + Dp, cache_of<dtype>(rows[buf.row_of[token]], layer, g), buf.position[token]);
    }

    // NQ queries of a group from `first` on, heads within tokens, of which `token` is the row's first.
    template <int dtype, int NQ>
    void attend_to(const bn_row &row, int64_t token, int64_t layer, int64_t g, int64_t first) const {
        int64_t D = m.head_dim, Dp = round_up(D, 16), R = m.heads / m.kv_heads, limit[NQ];
        float *rotated = (float *)own + 2 * Dp, *query = rotated + Dp, *padded = query + NQ * Dp, *out[NQ];
        for (int q = 0; q < NQ; q++) {
            int64_t t = (first + q) / R, at = (token + t) * buf.wide + (g * R + (first + q) % R) * D;
            rope(buf.a + at, m.layer[layer].q_norm, row.length + t, rotated);
            for (int64_t d = 0; d < Dp; d++) query[d * NQ + q] = rotated[d];
            out[q] = D == Dp ? buf.b + at : padded + q * Dp;
            limit[q] = row.length + t + 1;
        }
        attend<dtype, NQ>(query, cache_of<dtype>(row, layer, g), limit, 1.0f / sqrtf((float)D), padded + NQ * Dp, out);
        for (int q = 0; q < NQ && D != Dp; q++) {
            int64_t t = (first + q) / R;
            memcpy(buf.b + (token + t) * buf.wide + (g * R + (first + q) % R) * D, out[q], D * 4);
        }
    }

    // Queries `first` to `last`.
    template <int dtype>
    void attend_to(const bn_row &row, int64_t token, int64_t layer, int64_t g, int64_t first, int64_t last) const {
        for (; first + MAX_QUERIES <= last; first += MAX_QUERIES) attend_to<dtype, MAX_QUERIES>(row, token, layer, g, first);
        for (; first + SOME_QUERIES <= last; first += SOME_QUERIES) attend_to<dtype, SOME_QUERIES>(row, token, layer, g, first);
        for (; first < last; first++) attend_to<dtype, 1>(row, token, layer, g, first);
    }

    template <int dtype> void attend_item(const bn_row &row, int64_t token, int64_t layer, int64_t item) const {
        int64_t per = pieces(m, row, few), g = item / per, queries = queries_of(m, row);
        if (!apart(row, few)) {
            write<dtype>(token, layer, g);
            attend_to<dtype>(row, token, layer, g, 0, queries);
            return;
        }
        int64_t each = queries_at_once(queries), first = item % per * each;
        attend_to<dtype>(row, token, layer, g, first, first + each < queries ? first + each : queries);
    }

    bool attention(int64_t layer) {
        bool any = false;
        for (int64_t i = 0; i < row_count; i++) any |= apart(rows[i], few);
        if (any && !self.each(M, [&](int64_t first, int64_t last) {
                for (int64_t token = first; token < last; token++) {
                    const bn_row &row = rows[buf.row_of[token]];
                    if (!apart(row, few)) continue;
                    for (int64_t g = 0; g < m.kv_heads; g++) {
                        if (row.cache->dtype == CACHE_FLOAT32) write<CACHE_FLOAT32>(token, layer, g);
                        else if (row.cache->dtype == CACHE_FLOAT16) write<CACHE_FLOAT16>(token, layer, g);
                        else write<CACHE_INT8>(token, layer, g);
                    }
                }
            }))
            return false;
        return self.each(buf.items[row_count], [&](int64_t first, int64_t last) {
            int64_t i = 0, token = 0;
            for (; first < last; first++) {
                for (; first >= buf.items[i + 1]; i++) token += rows[i].tokens;
                int64_t item = first - buf.items[i];
                int32_t dtype = rows[i].cache->dtype;
                if (dtype == CACHE_FLOAT32) attend_item<CACHE_FLOAT32>(rows[i], token, layer, item);
                else if (dtype == CACHE_FLOAT16) attend_item<CACHE_FLOAT16>(rows[i], token, layer, item);
                else attend_item<CACHE_INT8>(rows[i], token, layer, item);
            }
        });
    }

    bool layer(int64_t index) {
        const bn_layer &l = m.layer[index];
        int64_t C = apart_by(m.hidden);
        int glu = m.relu2 ? OUT_GLU_RELU2 : OUT_GLU_SILU;
        return prepare_rows(l.qkv, buf.h, C, l.input_norm, M) && multiply_rows(l.qkv, buf.a, buf.wide, OUT_STORE) &&
               attention(index) &&
               prepare_rows(l.o, buf.b, buf.wide, l.attn_sub_norm, M) && multiply_rows(l.o, buf.h, C, OUT_ADD) &&
               prepare_rows(l.gate_up, buf.h, C, l.post_norm, M) && multiply_rows(l.gate_up, buf.a, buf.wide, glu) &&
               prepare_rows(l.down, buf.a, buf.wide, l.ffn_sub_norm, M) && multiply_rows(l.down, buf.h, C, OUT_ADD);
    }

    // From the residual stream [M, hidden] that other layers have left.
    bool go_on(const float *hidden) {
        return self.each(M, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                memcpy(buf.h + i * apart_by(m.hidden), hidden + i * m.hidden, m.hidden * sizeof(float));
        });
    }

    bool embed(const int64_t *ids) {
        return self.each(M, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) read_row(m.embedding, ids[i], buf.h + i * apart_by(m.hidden), own);
        });
    }

    bool give_states(const int32_t *wanted, int64_t wanted_count, float *states) {
        return self.each(wanted_count, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                rms_norm(buf.h + wanted[i] * apart_by(m.hidden), m.norm, m.hidden, m.eps, states + i * m.hidden);
        });
    }
};

// The new tokens `ids` of all rows, row by row, and logits [wanted_count, vocab] behind those whose numbers are wanted,
// or with `states` [wanted_count, hidden], what the head would multiply.
static int forward(const bn_model *m, const bn_row *rows, int64_t row_count, const int64_t *ids, const float *hidden,
                   const int32_t *wanted, int64_t wanted_count, float *out, int states, void *workspace, int threads) {
    int64_t M = 0, longest = 0;
    for (int64_t i = 0; i < row_count; i++) {
        M += rows[i].tokens;
        longest = max64(longest, rows[i].length + rows[i].tokens);
    }
    buffers buf;
    lay_out(*m, M, row_count, longest, threads, (uint8_t *)workspace, &buf);
    bool few = row_count * m->kv_heads < threads && m->heads / m->kv_heads > SOME_QUERIES;
    buf.items[0] = 0;
    for (int64_t i = 0, token = 0; i < row_count; i++) {
        buf.items[i + 1] = buf.items[i] + m->kv_heads * pieces(*m, rows[i], few);
        for (int64_t t = 0; t < rows[i].tokens; t++, token++) {
            buf.row_of[token] = (int32_t)i;
            buf.position[token] = (int32_t)(rows[i].length + t);
        }
    }
    bn::run(threads, [&](member &self) {
        tiles ready(M > DIRECT);
        pass p = {*m, rows, row_count, M, few, buf, self, buf.own + self.id * buf.own_bytes + buf.own_x};
        bool here = hidden ? p.go_on(hidden) : p.embed(ids);
        for (int64_t i = 0; here && i < m->layers; i++) here = p.layer(i);
        if (!here || !wanted_count) return;
        if (states) p.give_states(wanted, wanted_count, out);
        else if (p.prepare_rows(m->head, buf.h, apart_by(m->hidden), m->norm, wanted_count, wanted))
            p.multiply_rows(m->head, out, m->vocab, OUT_STORE);
    });
    return 0;
}

static int matmul(const bn_matrix *w, const int8_t *q, int64_t stride, const float *scale, const int32_t *total,
                  int64_t rows, const float *bias, void *y, int64_t y_stride, int64_t columns, int out, int threads) {
    target to = {out, (float *)y, y_stride, columns, bias};
    int64_t each = round_up(token_scratch(w->K, rows), 64);
    uint8_t *scratch = rows <= DIRECT ? nullptr : (uint8_t *)malloc(each * threads + 64);
    if (rows > DIRECT && !scratch) return 1;
    bn::run(threads, [&](member &self) {
        tiles ready(rows > DIRECT);
        self.each(w->N / 32, [&](int64_t first, int64_t last) {
            multiply_tokens(*w, q, stride, scale, total, rows, to, first, last, scratch + self.id * each);
        });
    });
    free(scratch);
    return 0;
}

// The product of one matrix outside of a model, of floats x[rows, inputs], to y.
static int linear(const bn_matrix *w, const float *x, int64_t rows, float *y, int64_t y_stride, int64_t columns,
                  int threads) {
    bn_projection p = {};
    p.part[0] = *w;
    p.parts = 1;
    p.rows[0] = (int32_t)columns;
    int64_t bytes = lay_out_inputs(p, rows, nullptr, nullptr);
    int64_t each = round_up(max64(prepare_scratch(p), product_scratch(p, rows)), 64) + 64;
    uint8_t *memory = (uint8_t *)malloc(bytes + each * threads + 64);
    if (!memory) return 1;
    uint8_t *start = (uint8_t *)round_up((int64_t)memory, 64), *scratch = start + bytes;
    prepared to;
    lay_out_inputs(p, rows, start, &to);
    bn::run(threads, [&](member &self) {
        tiles ready(rows > DIRECT);
        uint8_t *own = scratch + self.id * each;
        bool here = self.each(rows, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) prepare(p, x + i * w->inputs, nullptr, 0.0f, to, i, own);
        });
        if (here)
            self.each(panels_of(p, OUT_STORE), [&](int64_t first, int64_t last) {
                product(p, to, rows, OUT_STORE, y, y_stride, first, last, own);
            });
    });
    free(memory);
    return 0;
}

static void quantize(const float *x, int64_t rows, int64_t K, int8_t *q, int64_t stride, float *scale, int32_t *total,
                     int threads) {
    bn::share_out(threads, rows, [&](int64_t i) {
        quantize_token(x + i * K, K, q + i * stride, scale + i, total + i);
        memset(q + i * stride + K, 0, stride - K);
    });
}

// Twelve independent sums of products on registers; what a tile of matmul.h could reach if memory cost nothing.
static int64_t peak(int64_t rounds, int threads) {
    std::atomic<int64_t> operations{0};
    std::atomic<int32_t> seen{0};
    auto one = [&] {
#if defined(BN_AMX)
        tiles ready(true);
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
        for (int64_t i = 0; i < rounds; i++) {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        operations += rounds * 4 * 16 * 16 * 64 * 2;
#else
        vi a0 = {}, a1 = {}, a2 = {}, a3 = {}, a4 = {}, a5 = {}, a6 = {}, a7 = {}, a8 = {}, a9 = {}, a10 = {}, a11 = {};
        vb w;
        vi pattern = splat((int32_t)0x01020100);
        read(&pattern, &w);
        vi x = splat((int32_t)threads);
        for (int64_t i = 0; i < rounds; i++) {
            // The compiler would otherwise see that all sums are alike, and all products.
#define BN_ADD(a) opaque(w); a = add_small(a, w, x); opaque(a);
            BN_ADD(a0) BN_ADD(a1) BN_ADD(a2) BN_ADD(a3) BN_ADD(a4) BN_ADD(a5)
#if defined(BN_AVX512)
            BN_ADD(a6) BN_ADD(a7) BN_ADD(a8) BN_ADD(a9) BN_ADD(a10) BN_ADD(a11)
#endif
#undef BN_ADD
        }
        vi s = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11;
        seen += sum(s);
        operations += rounds * (BLOCKS == 2 ? 12 : 6) * 128;
#endif
    };
    bn::share_out(threads, threads, [&](int64_t) { one(); });
    return operations + (seen == 1 ? 1 : 0);
}

} // namespace BN_ISA
} // namespace bn
