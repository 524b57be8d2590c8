// Causal grouped-query attention over the cache, float32 arithmetic, keys and values in float32, float16 or int8.
//
// Sixteen positions of a key lie side by side ([S / 16, D, 16]), so a score needs no sum across lanes. Up to four
// queries that share a key/value head are worked on together: heads of one group, then neighbouring tokens.
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

// scores[q][s] = query q . key s, for blocks of 16 positions; D padded to 16.
template <int dtype, int NQ, int NB>
BN_INLINE void score_blocks(const float *const *query, const typename element<dtype>::type *keys, int64_t D,
                            const float *key_scale, float **scores, int64_t block) {
    vf acc[NQ][NB];
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) acc[q][b] = (vf){};
    for (int64_t d = 0; d < D; d++) {
        vf k[NB];
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) k[b] = element<dtype>::get(keys + (b * D + d) * 16);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; q++) {
            vf x = splat(query[q][d]);
#pragma GCC unroll 8
            for (int b = 0; b < NB; b++) acc[q][b] = fma(x, k[b], acc[q][b]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) {
            vf s = acc[q][b];
            if constexpr (dtype == CACHE_INT8) s = s * load(key_scale + (block + b) * 16);
            store(scores[q] + (block + b) * 16, s);
        }
}

// out[q][d..] = sum over s of p[q][s] * value s, for NV vectors of D.
template <int dtype, int NQ, int NV>
BN_INLINE void mix_values(const float *const *p, const typename element<dtype>::type *values, int64_t D,
                          const float *value_scale, int64_t count, float *const *out, const float *inverse, int64_t d) {
    vf acc[NQ][NV];
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[q][v] = (vf){};
    for (int64_t s = 0; s < count; s++) {
        vf value[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) value[v] = element<dtype>::get(values + s * D + d + 16 * v);
#pragma GCC unroll 8
        for (int q = 0; q < NQ; q++) {
            float weight = p[q][s];
            if constexpr (dtype == CACHE_INT8) weight *= value_scale[s];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) acc[q][v] = fma(splat(weight), value[v], acc[q][v]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) store(out[q] + d + 16 * v, acc[q][v] * splat(inverse[q]));
}

// NQ queries of one key/value head; query q sees the first limit[q] positions, limit ascending.
template <int dtype, int NQ>
static void attend(const float *const *query, const void *keys, const void *values, const float *key_scale,
                   const float *value_scale, int64_t D, const int64_t *limit, float inv_sqrt, float *const *scores_in,
                   float *const *out) {
    typedef typename element<dtype>::type T;
    const T *k = (const T *)keys, *v = (const T *)values;
    float *scores[NQ], inverse[NQ];
    for (int q = 0; q < NQ; q++) scores[q] = scores_in[q];
    int64_t count = limit[NQ - 1], blocks = (count + 15) / 16, b = 0;
    constexpr int NB = NQ == 1 ? 4 : 2;
    for (; b + NB <= blocks; b += NB) score_blocks<dtype, NQ, NB>(query, k + b * D * 16, D, key_scale, scores, b);
    for (; b < blocks; b++) score_blocks<dtype, NQ, 1>(query, k + b * D * 16, D, key_scale, scores, b);
    for (int q = 0; q < NQ; q++) {
        float *s = scores[q];
        for (int64_t i = limit[q]; i < blocks * 16; i++) s[i] = -INFINITY;
        vf peak = splat(-INFINITY), total = {};
        for (int64_t i = 0; i < blocks * 16; i += 16) peak = max(load(s + i), peak);
        vf shift = splat(maximum(peak) * inv_sqrt);
        for (int64_t i = 0; i < blocks * 16; i += 16) {
            vf e = exponential(load(s + i) * splat(inv_sqrt) - shift);
            if (i + 16 > limit[q]) { // e^-87 is not 0
                float t[16];
                store(t, e);
                for (int64_t r = limit[q] > i ? limit[q] - i : 0; r < 16; r++) t[r] = 0.0f;
                e = load(t);
            }
            store(s + i, e);
            total = total + e;
        }
        inverse[q] = 1.0f / sum(total);
    }
    int64_t d = 0;
    for (; d + 64 <= D; d += 64) mix_values<dtype, NQ, 4>(scores, v, D, value_scale, count, out, inverse, d);
    for (; d < D; d += 16) mix_values<dtype, NQ, 1>(scores, v, D, value_scale, count, out, inverse, d);
}

template <int dtype>
static void attend_some(int n, const float *const *query, const void *keys, const void *values, const float *key_scale,
                        const float *value_scale, int64_t D, const int64_t *limit, float inv_sqrt, float *const *scores,
                        float *const *out) {
    if (n == 4) {
        attend<dtype, 4>(query, keys, values, key_scale, value_scale, D, limit, inv_sqrt, scores, out);
        return;
    }
    for (int q = 0; q < n; q++)
        attend<dtype, 1>(query + q, keys, values, key_scale, value_scale, D, limit + q, inv_sqrt, scores + q, out + q);
}

// Write one key (rotated) and one value, float [D padded], to position s of a cache slice.
template <int dtype>
static void append(const float *key, const float *value, int64_t D, void *keys, void *values, float *key_scale,
                   float *value_scale, int64_t s) {
    typedef typename element<dtype>::type T;
    T *k = (T *)keys + s / 16 * D * 16 + s % 16, *v = (T *)values + s * D;
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
        quantize_token(key, D, codes, key_scale + s, &unused);
        for (int64_t d = 0; d < D; d++) k[16 * d] = codes[d];
        quantize_token(value, D, v, value_scale + s, &unused);
    }
}

} // namespace BN_ISA
} // namespace bn
