// One forward pass of the decoder in one call: embedding, every layer, the output head.
//
//     h = embed(ids)
//     per layer   h += o(attn_sub_norm(attention(input_norm(h))))
//                 h += down(ffn_sub_norm(act(gate(n)) * up(n))),  n = post_norm(h)
//     logits = head(norm(h))
//
// The model is bitnet/model/transformer.py, which is the specification. All threads stay in one parallel region and
// meet at barriers. A norm and the quantization behind it are one pass over a token; for a single token every thread
// does that pass for itself, which is cheaper than one more barrier. Nothing is allocated: Python hands over the
// workspace.
//
// Letters: M = batch * tokens, C hidden, F intermediate, H heads, G kv heads, D head_dim, Dp = D padded to 16.
#pragma once

#include <atomic>
#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"

namespace bn {
namespace BN_ISA {

enum { MAX_QUERIES = 4 };

struct barrier {
    alignas(64) std::atomic<int> waiting{0};
    alignas(64) std::atomic<int> round{0};
    int threads = 1;
    void wait() {
        if (threads == 1) return;
        int now = round.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            waiting.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            BN_PAUSE();
            if (spins > 2000) sched_yield(); // more threads than free cores
        }
    }
};

struct buffers {
    float *h, *a, *b; // [M, C], [M, max of qkv, F, heads and C] twice
    int8_t *q;        // [M + 32, stride]
    int64_t wide, stride;
    float *scale;
    int32_t *total;
    uint8_t *own; // of the threads: scratch of the products, scores of the attention
    int64_t own_bytes, scores;
};

BN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t lay_out(const bn_model &m, int64_t M, int64_t capacity, int threads, uint8_t *base, buffers *to) {
    int64_t Dp = round_up(m.head_dim, 16);
    int64_t wide = round_up(max64(max64(m.layer[0].qkv.N, m.intermediate), max64((int64_t)m.heads * Dp, m.hidden)), 32);
    int64_t longest = max64(max64(m.hidden, m.intermediate), (int64_t)m.heads * m.head_dim);
    int64_t stride = round_up(longest + 20, 64), used = 64, C = round_up(m.hidden, 32);
    int64_t rows = round_up(M, 32) + 32;
    auto take = [&](int64_t bytes) {
        uint8_t *p = base ? (uint8_t *)round_up((int64_t)base, 64) + used - 64 : nullptr;
        used += round_up(bytes, 64);
        return p;
    };
    buffers b;
    b.wide = wide;
    b.stride = stride;
    b.h = (float *)take(M * C * 4);
    b.a = (float *)take(M * wide * 4);
    b.b = (float *)take(M * wide * 4);
    b.q = (int8_t *)take(rows * stride);
    b.scale = (float *)take(M * 4);
    b.total = (int32_t *)take(M * 4);
    b.scores = round_up(capacity, 16);
    int64_t product = scratch_bytes(longest, M);
    // attention: scores and padded queries and outputs; norms: one row
    int64_t other = MAX_QUERIES * (b.scores + 2 * Dp) * 4 + 2 * Dp * 4 + stride * 5 + 256;
    b.own_bytes = round_up(max64(product, other), 64) + 64;
    b.own = take(b.own_bytes * threads);
    if (to) *to = b;
    return used + 64;
}

// RMSNorm (weight NULL: none) and INT8 of one row of `width` floats, by way of `row`, a scratch of that size.
BN_INLINE void norm_quantize(const float *x, const float *weight, int64_t width, float eps, float *row, int8_t *q,
                             float *scale, int32_t *total) {
    if (!weight) {
        quantize_token(x, width, q, scale, total);
        return;
    }
    int64_t whole = width / 16 * 16;
    vf squares[4] = {};
    int64_t i = 0;
    for (; i + 64 <= whole; i += 64)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + 16 * j);
            squares[j] = fma(v, v, squares[j]);
        }
    for (; i < whole; i += 16) squares[0] = fma(load(x + i), load(x + i), squares[0]);
    float total_squares = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < width; i++) total_squares += x[i] * x[i];
    float inverse = 1.0f / sqrtf(total_squares / (float)width + eps);
    for (i = 0; i < whole; i += 16) store(row + i, load(weight + i) * (load(x + i) * splat(inverse)));
    for (; i < width; i++) row[i] = weight[i] * (x[i] * inverse);
    quantize_token(row, width, q, scale, total);
}

struct run {
    const bn_model &m;
    bn_cache &cache;
    const buffers &buf;
    barrier &sync;
    int64_t batch, tokens;
    int threads, id;
    uint8_t *own;

    // Where this thread's quantized token lies: one token is quantized by every thread, each in its own memory.
    int8_t *q;
    float *scale;
    int32_t *total;

    int64_t M() const { return batch * tokens; }

    void share(int64_t count, int64_t *first, int64_t *last) const {
        *first = count * id / threads;
        *last = count * (id + 1) / threads;
    }

    // Norm and quantize M rows. Ends with all threads seeing all rows.
    void quantize(const float *x, int64_t x_stride, const float *weight, int64_t width) {
        float *row = (float *)own;
        if (M() == 1) {
            q = (int8_t *)(row + buf.stride);
            scale = (float *)(q + buf.stride);
            total = (int32_t *)(scale + 1);
            norm_quantize(x, weight, width, m.eps, row, q, scale, total);
            memset(q + width, 0, buf.stride - width);
            return;
        }
        q = buf.q;
        scale = buf.scale;
        total = buf.total;
        int64_t first, last;
        share(M(), &first, &last);
        for (int64_t i = first; i < last; i++) {
            norm_quantize(x + i * x_stride, weight, width, m.eps, row, q + i * buf.stride, scale + i, total + i);
            memset(q + i * buf.stride + width, 0, buf.stride - width);
        }
        sync.wait();
    }

    void product(const bn_matrix &w, float *y, int64_t y_stride, int64_t columns, int out) {
        target to = {out, y, y_stride, columns, nullptr};
        int64_t first, last;
        share(w.N / 32, &first, &last);
        // For one token the thread's own memory still holds its activations, which the product reads.
        multiply(w, q, buf.stride, scale, total, M(), to, first, last, own);
        sync.wait();
    }

    void rope(const float *x, int64_t position, float *out) const {
        const float *cos = m.cos + position * m.head_dim, *sin = m.sin + position * m.head_dim;
        int64_t D = m.head_dim, half = D / 2;
        for (int64_t i = 0; i < half; i++) {
            float first = x[i], second = x[half + i];
            out[i] = first * cos[i] - second * sin[i];
            out[half + i] = second * cos[half + i] + first * sin[half + i];
        }
        for (int64_t i = D; i < round_up(D, 16); i++) out[i] = 0.0f;
    }

    void at(int64_t layer, int64_t b, int64_t g, uint8_t **keys, uint8_t **values, float **ks, float **vs) const {
        int64_t Dp = round_up(m.head_dim, 16), slice = (layer * cache.batch + b) * m.kv_heads + g;
        int64_t size = cache.dtype == CACHE_FLOAT32 ? 4 : cache.dtype == CACHE_FLOAT16 ? 2 : 1;
        *keys = (uint8_t *)cache.keys + slice * cache.capacity * Dp * size;
        *values = (uint8_t *)cache.values + slice * cache.capacity * Dp * size;
        *ks = cache.key_scale + slice * cache.capacity;
        *vs = cache.value_scale + slice * cache.capacity;
    }

    template <int dtype> void attention(int64_t layer) {
        int64_t D = m.head_dim, Dp = round_up(D, 16), G = m.kv_heads, R = m.heads / G, start = cache.length;
        int64_t k_at = round_up(m.heads * D, 16), v_at = k_at + round_up(G * D, 16);
        float *padded = (float *)own; // 2 Dp, then queries, outputs, scores
        uint8_t *keys, *values;
        float *ks, *vs;
        int64_t first, last;
        share(batch * G, &first, &last);
        bool alone = batch * G >= threads; // a thread appends what it then attends to: no barrier between
        for (int64_t i = first; i < last; i++) {
            int64_t b = i / G, g = i % G;
            at(layer, b, g, &keys, &values, &ks, &vs);
            for (int64_t t = 0; t < tokens; t++) {
                const float *row = buf.a + (b * tokens + t) * buf.wide;
                rope(row + k_at + g * D, start + t, padded);
                memcpy(padded + Dp, row + v_at + g * D, D * 4);
                for (int64_t d = D; d < Dp; d++) padded[Dp + d] = 0.0f;
                append<dtype>(padded, padded + Dp, Dp, keys, values, ks, vs, start + t);
            }
        }
        int64_t per = (tokens * R + MAX_QUERIES - 1) / MAX_QUERIES, items = batch * G * per;
        if (alone && tokens == 1) { // whole groups
            first *= per;
            last *= per;
        } else {
            sync.wait();
            first = id; // later tokens see more: dealt out in turn
            last = items;
        }
        int64_t step = alone && tokens == 1 ? 1 : threads;
        float inv_sqrt = 1.0f / sqrtf((float)D);
        for (int64_t item = first; item < last; item += step) {
            int64_t i = item / per, b = i / G, g = i % G, row0 = item % per * MAX_QUERIES;
            int n = (int)(tokens * R - row0 < MAX_QUERIES ? tokens * R - row0 : MAX_QUERIES);
            const float *query[MAX_QUERIES];
            float *out[MAX_QUERIES], *scores[MAX_QUERIES];
            int64_t limit[MAX_QUERIES];
            float *p = padded + 2 * Dp;
            at(layer, b, g, &keys, &values, &ks, &vs);
            for (int j = 0; j < n; j++) {
                int64_t t = (row0 + j) / R, head = g * R + (row0 + j) % R;
                rope(buf.a + (b * tokens + t) * buf.wide + head * D, start + t, p);
                query[j] = p;
                out[j] = p + Dp;
                scores[j] = p + 2 * Dp;
                limit[j] = start + t + 1;
                p += 2 * Dp + buf.scores;
            }
            attend_some<dtype>(n, query, keys, values, ks, vs, Dp, limit, inv_sqrt, scores, out);
            for (int j = 0; j < n; j++) {
                int64_t t = (row0 + j) / R, head = g * R + (row0 + j) % R;
                memcpy(buf.b + (b * tokens + t) * buf.wide + head * D, out[j], D * 4);
            }
        }
        sync.wait();
    }

    void layer(int64_t index) {
        const bn_layer &l = m.layer[index];
        int64_t C = round_up(m.hidden, 32);
        quantize(buf.h, C, l.input_norm, m.hidden);
        product(l.qkv, buf.a, buf.wide, l.qkv.N, OUT_STORE);
        if (cache.dtype == CACHE_FLOAT32) attention<CACHE_FLOAT32>(index);
        else if (cache.dtype == CACHE_FLOAT16) attention<CACHE_FLOAT16>(index);
        else attention<CACHE_INT8>(index);
        quantize(buf.b, buf.wide, l.attn_sub_norm, (int64_t)m.heads * m.head_dim);
        product(l.o, buf.h, C, m.hidden, OUT_ADD);
        quantize(buf.h, C, l.post_norm, m.hidden);
        product(l.gate_up, buf.a, buf.wide, 2 * (int64_t)m.intermediate, m.relu2 ? OUT_GLU_RELU2 : OUT_GLU_SILU);
        quantize(buf.a, buf.wide, l.ffn_sub_norm, m.intermediate);
        product(l.down, buf.h, C, m.hidden, OUT_ADD);
    }

    void embed(const int64_t *ids) {
        int64_t first, last, C = round_up(m.hidden, 32);
        share(M(), &first, &last);
        for (int64_t i = first; i < last; i++) {
            int64_t row = ids[i];
            float *h = buf.h + i * C;
            if (m.embedding) {
                const uint8_t *codes = m.embedding + row * m.embedding_width;
                for (int64_t k = 0; k < m.hidden; k++) h[k] = (float)(codes[k] - 128) * m.embedding_scale[row];
            } else {
                const uint8_t *lines = m.head.lines + row / 16 * m.head.lines_per_block * 64 + row % 16 * 4;
                for (int64_t k = 0; k < m.hidden; k++)
                    h[k] = (float)(lines[k / 4 * 64 + k % 4] - 128) * m.head.scale[row];
            }
        }
        sync.wait();
    }

    // Logits of the last token of every sequence, or of all tokens.
    void head(int all, float *logits) {
        int64_t C = round_up(m.hidden, 32);
        if (!all && tokens > 1) {
            for (int64_t b = id; b < batch; b += threads) // into rows of b, which is free by now
                memcpy(buf.b + b * buf.wide, buf.h + (b * tokens + tokens - 1) * C, m.hidden * 4);
            tokens = 1;
            sync.wait();
            quantize(buf.b, buf.wide, m.norm, m.hidden);
        } else {
            quantize(buf.h, C, m.norm, m.hidden);
        }
        product(m.head, logits, m.vocab, m.vocab, OUT_STORE);
    }
};

static int forward(const bn_model *m, bn_cache *cache, const int64_t *ids, int64_t batch, int64_t tokens, int all,
                   float *logits, void *workspace, int threads) {
    buffers buf;
    lay_out(*m, batch * tokens, cache->capacity, threads, (uint8_t *)workspace, &buf);
    barrier sync;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        int id = omp_get_thread_num();
#pragma omp single
        sync.threads = omp_get_num_threads(); // may be fewer than asked for
#else
        int id = 0;
#endif
        run r = {*m, *cache, buf, sync, batch, tokens, sync.threads, id, buf.own + id * buf.own_bytes, nullptr, nullptr,
                 nullptr};
        r.embed(ids);
        for (int64_t i = 0; i < m->layers; i++) r.layer(i);
        if (logits) r.head(all, logits);
    }
    cache->length += (int32_t)tokens;
    return 0;
}

static int matmul(const bn_matrix *w, const int8_t *q, int64_t stride, const float *scale, const int32_t *total,
                  int64_t rows, const float *bias, void *y, int64_t y_stride, int64_t columns, int out, int threads) {
    target to = {out, (float *)y, y_stride, columns, bias};
    int64_t each = round_up(scratch_bytes(w->K, rows), 64), panels = w->N / 32;
    uint8_t *scratch = rows <= DIRECT ? nullptr : (uint8_t *)malloc(each * threads + 64);
    if (rows > DIRECT && !scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
        int id = 0, n = 1;
#ifdef _OPENMP
        id = omp_get_thread_num();
        n = omp_get_num_threads();
#endif
        multiply(*w, q, stride, scale, total, rows, to, panels * id / n, panels * (id + 1) / n, scratch + id * each);
    }
    free(scratch);
    return 0;
}

static void quantize(const float *x, int64_t rows, int64_t K, int8_t *q, int64_t stride, float *scale, int32_t *total,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        quantize_token(x + i * K, K, q + i * stride, scale + i, total + i);
        memset(q + i * stride + K, 0, stride - K);
    }
}

// Twelve independent sums of products on registers; what a tile of matmul.h could reach if memory cost nothing.
static int64_t peak(int64_t rounds, int threads) {
    int64_t operations = 0;
    int32_t seen = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations, seen)
    {
#if defined(BN_AMX)
        configure_tiles();
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
        for (int64_t i = 0; i < rounds; i++) {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_release();
        operations += rounds * 4 * 16 * 16 * 64 * 2;
#else
        vi a0 = {}, a1 = {}, a2 = {}, a3 = {}, a4 = {}, a5 = {}, a6 = {}, a7 = {}, a8 = {}, a9 = {}, a10 = {}, a11 = {};
        vb w;
        vi pattern = splat((int32_t)0x01020100);
        read(&pattern, &w);
        vi x = splat((int32_t)threads);
        for (int64_t i = 0; i < rounds; i++) {
            a0 = dot4_small(a0, w, x); a1 = dot4_small(a1, w, x); a2 = dot4_small(a2, w, x);
            a3 = dot4_small(a3, w, x); a4 = dot4_small(a4, w, x); a5 = dot4_small(a5, w, x);
#if defined(BN_AVX512)
            a6 = dot4_small(a6, w, x); a7 = dot4_small(a7, w, x); a8 = dot4_small(a8, w, x);
            a9 = dot4_small(a9, w, x); a10 = dot4_small(a10, w, x); a11 = dot4_small(a11, w, x);
#endif
            // The compiler would otherwise see that all sums are alike.
            opaque(a0); opaque(a1); opaque(a2); opaque(a3); opaque(a4); opaque(a5);
#if defined(BN_AVX512)
            opaque(a6); opaque(a7); opaque(a8); opaque(a9); opaque(a10); opaque(a11);
#endif
        }
        vi s = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11;
        seen += sum(s);
        operations += rounds * (BLOCKS == 2 ? 12 : 6) * 128;
#endif
    }
    return operations + (seen == 1 ? 1 : 0);
}

} // namespace BN_ISA
} // namespace bn
