// Causal grouped-query attention over a row's cache, float32 arithmetic, keys and values in float32, float16 or int8.
//
// Sixteen positions of a key lie side by side ([block / 16, D, 16]), so a score needs no sum across lanes. Up to four
// queries that share a key/value head are worked on together: heads of one group, then neighbouring tokens. Whatever
// the company and however the positions lie in blocks, a query's additions come in one order.
#pragma once

#include "matmul.h"

namespace bn {
namespace BN_ISA {

template <int dtype> struct element;
template <> struct element<CACHE_FLOAT32> {
    typedef float type;
    BN_INLINE vf get(const float *p) { return load(p); }
};
template <> struct element<CACHE_FLOAT16> {
    typedef uint16_t type;
    BN_INLINE vf get(const uint16_t *p) { return from_half(p); }
};
template <> struct element<CACHE_INT8> {
    typedef int8_t type;
    BN_INLINE vf get(const int8_t *p) { return widen(p); }
};

// One key/value head of a row in one layer.
template <int dtype> struct head_cache {
    typedef typename element<dtype>::type T;
    const bn_row &row;
    int64_t D, within; // D padded to 16; positions from a block's start to this head
    int64_t block() const { return row.cache->block; }
    int64_t at(int64_t b) const { return row.blocks[b] * row.cache->block_stride + within; }
    T *keys(int64_t b) const { return (T *)row.cache->keys + at(b) * D; }
    T *values(int64_t b) const { return (T *)row.cache->values + at(b) * D; }
    float *key_scale(int64_t b) const { return row.cache->key_scale + at(b); }
    float *value_scale(int64_t b) const { return row.cache->value_scale + at(b); }
};

// What NQ queries are worked on together with: for every d (query) or position (score) theirs lie side by side, so that one
// pointer leads to all of them.
//     query   [D][NQ]
//     scores  [positions / 16][NQ][16]

// Scores of NB runs of 16 positions, whose keys are at k.
template <int dtype, int NQ, int NB>
BN_INLINE void score_runs(const float *query, const typename element<dtype>::type *k, int64_t D, const float *key_scale,
                          float *scores) {
    vf acc[NQ][NB];
#pragma GCC unroll 12
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) acc[q][b] = (vf){};
    for (int64_t d = 0; d < D; d++, query += NQ) {
        vf key[NB];
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) key[b] = element<dtype>::get(k + (b * D + d) * 16);
#pragma GCC unroll 12
        for (int q = 0; q < NQ; q++) {
            vf x = splat(query[q]);
#pragma GCC unroll 8
            for (int b = 0; b < NB; b++) acc[q][b] = fma(x, key[b], acc[q][b]);
        }
    }
#pragma GCC unroll 12
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) {
            vf score = acc[q][b];
            if constexpr (dtype == CACHE_INT8) score = score * load(key_scale + 16 * b);
            store(scores + (b * NQ + q) * 16, score);
        }
}

// out[q][d..] = sum over s of p[s][q] * value s, for NV vectors of D.
template <int dtype, int NQ, int NV>
BN_INLINE void mix_values(const float *p, const head_cache<dtype> &cache, int64_t count, float *const *out,
                          const float *inverse, int64_t d) {
    vf acc[NQ][NV];
#pragma GCC unroll 12
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[q][v] = (vf){};
    int64_t D = cache.D, size = cache.block();
    for (int64_t b = 0, s = 0; s < count; b++) {
        const typename element<dtype>::type *values = cache.values(b) + d;
        const float *value_scale = dtype == CACHE_INT8 ? cache.value_scale(b) - s : nullptr;
        int64_t end = s + size < count ? s + size : count;
        for (; s < end; s++, values += D) {
            const float *weights = p + s / 16 * (16 * NQ) + s % 16;
            vf value[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) value[v] = element<dtype>::get(values + 16 * v);
#pragma GCC unroll 12
            for (int q = 0; q < NQ; q++) {
                float weight = weights[16 * q];
                if constexpr (dtype == CACHE_INT8) weight *= value_scale[s];
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) acc[q][v] = fma(splat(weight), value[v], acc[q][v]);
            }
        }
    }
#pragma GCC unroll 12
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) store(out[q] + d + 16 * v, acc[q][v] * splat(inverse[q]));
}

// How many queries are worked on together, and how many vectors of keys and values with them without leaving the registers.
#if defined(BN_AVX512)
enum { MAX_QUERIES = 12, RUNS_OF_MANY = 2, VALUES_OF_MANY = 2, RUNS_OF_FOUR = 2, VALUES_OF_FOUR = 4 };
#elif defined(BN_NEON)
enum { MAX_QUERIES = 4, RUNS_OF_MANY = 2, VALUES_OF_MANY = 4, RUNS_OF_FOUR = 2, VALUES_OF_FOUR = 4 };
#else
enum { MAX_QUERIES = 6, RUNS_OF_MANY = 1, VALUES_OF_MANY = 1, RUNS_OF_FOUR = 1, VALUES_OF_FOUR = 1 };
#endif
enum { SOME_QUERIES = 4, RUNS_OF_ONE = 4, VALUES_OF_ONE = 4 };

// NQ queries of one key/value head; query q sees the first limit[q] positions, limit ascending.
template <int dtype, int NQ>
static void attend(const float *query, const head_cache<dtype> &cache, const int64_t *limit, float inv_sqrt, float *scores,
                   float *const *out) {
    float inverse[NQ];
    int64_t D = cache.D, count = limit[NQ - 1], padded = round_up(count, 16), size = cache.block();
    constexpr int NB = NQ == 1 ? RUNS_OF_ONE : NQ == SOME_QUERIES ? RUNS_OF_FOUR : RUNS_OF_MANY;
    constexpr int NV = NQ == 1 ? VALUES_OF_ONE : NQ == SOME_QUERIES ? VALUES_OF_FOUR : VALUES_OF_MANY;
    for (int64_t b = 0, s = 0; s < padded; b++) {
        auto *keys = cache.keys(b);
        const float *key_scale = dtype == CACHE_INT8 ? cache.key_scale(b) : nullptr;
        int64_t end = s + size < padded ? size : padded - s, r = 0;
        for (; r + 16 * NB <= end; r += 16 * NB)
            score_runs<dtype, NQ, NB>(query, keys + r * D, D, key_scale + r, scores + (s + r) * NQ);
        for (; r < end; r += 16) score_runs<dtype, NQ, 1>(query, keys + r * D, D, key_scale + r, scores + (s + r) * NQ);
        s += end;
    }
    for (int q = 0; q < NQ; q++) {
        float *s = scores + 16 * q; // run i of them at s + i * NQ
        for (int64_t i = limit[q]; i < padded; i++) s[i / 16 * 16 * NQ + i % 16] = -INFINITY;
        vf peak = splat(-INFINITY), total = {};
        for (int64_t i = 0; i < padded; i += 16) peak = max(load(s + i * NQ), peak);
        vf shift = splat(maximum(peak) * inv_sqrt);
        for (int64_t i = 0; i < padded; i += 16) {
            vf e = exponential(load(s + i * NQ) * splat(inv_sqrt) - shift);
            if (i + 16 > limit[q]) { // e^-87 is not 0
                float t[16];
                store(t, e);
                for (int64_t r = limit[q] > i ? limit[q] - i : 0; r < 16; r++) t[r] = 0.0f;
                e = load(t);
            }
            store(s + i * NQ, e);
            total = total + e;
        }
        inverse[q] = 1.0f / sum(total);
    }
    int64_t d = 0;
    for (; d + 16 * NV <= D; d += 16 * NV) mix_values<dtype, NQ, NV>(scores, cache, count, out, inverse, d);
    for (; d < D; d += 16) mix_values<dtype, NQ, 1>(scores, cache, count, out, inverse, d);
}

// Write one key (rotated) and one value, float [D padded], to a position.
template <int dtype>
static void append(const float *key, const float *value, const head_cache<dtype> &cache, int64_t position) {
    typedef typename element<dtype>::type T;
    int64_t D = cache.D, b = position / cache.block(), s = position % cache.block();
    T *k = cache.keys(b) + s / 16 * D * 16 + s % 16, *v = cache.values(b) + s * D;
    if constexpr (dtype == CACHE_FLOAT32) {
        for (int64_t d = 0; d < D; d++) k[16 * d] = key[d];
        memcpy(v, value, D * sizeof(float));
    } else if constexpr (dtype == CACHE_FLOAT16) {
        for (int64_t d = 0; d < D; d += 16) {
            uint16_t t[16];
            to_half(t, load(key + d));
            for (int r = 0; r < 16; r++) k[16 * (d + r)] = t[r];
            to_half(v + d, load(value + d));
        }
    } else {
        int8_t codes[1024];
        int32_t unused;
        quantize_token(key, D, codes, cache.key_scale(b) + s, &unused);
        for (int64_t d = 0; d < D; d++) k[16 * d] = codes[d];
        quantize_token(value, D, v, cache.value_scale(b) + s, &unused);
    }
}

} // namespace BN_ISA
} // namespace bn
