// Where a product goes: bias, gate, sum with what is there.
#pragma once

#include "layout.h"
#include "simd.h"

namespace bn {
namespace BN_ISA {

struct target { // where a product goes, and how
    int out;
    float *y;
    int64_t stride, columns; // columns: how many of the N rows exist
    const float *bias;
    const float *low; // [M, rank] of an adapter
};

BN_INLINE bool relu2_of(int out) { return out == OUT_GLU_RELU2 || out == OUT_RELU2; }
BN_INLINE bool is_pair(int out) { return out == OUT_GLU_SILU || out == OUT_GLU_RELU2; }

BN_INLINE vf gate(vf g, int out) {
    if (relu2_of(out)) {
        g = max(splat(0.0f), g); // in this order a NaN stays one
        return g * g;
    }
    return g / (splat(1.0f) + exponential(-g));
}

BN_INLINE void put(float *y, vf v, int64_t columns, int out) {
    float t[16];
    if (columns < 16) {
        for (int64_t r = 0; r < 16; r++) t[r] = r < columns && (out == OUT_ADD || out == OUT_MULTIPLY) ? y[r] : 0.0f;
    }
    if (out == OUT_ADD) v = (columns < 16 ? load(t) : load(y)) + v;
    else if (out == OUT_MULTIPLY) v = (columns < 16 ? load(t) : load(y)) * v;
    else if (out == OUT_SILU || out == OUT_RELU2) v = gate(v, out);
    if (columns >= 16) {
        store(y, v);
    } else {
        store(t, v);
        for (int64_t r = 0; r < columns; r++) y[r] = t[r];
    }
}

// The product of one token with the two blocks of panel `panel`, scaled, with bias and adapter on to where it goes.
BN_INLINE void finish(const bn_matrix &w, const target &to, int64_t panel, vf v0, vf v1, int64_t m) {
    int64_t n = 32 * panel;
    if (w.bias) {
        v0 = v0 + load(w.bias + n);
        v1 = v1 + load(w.bias + n + 16);
    }
    if (w.rank) {
        const float *low = to.low + m * w.rank, *up = w.up + n * w.rank;
        vf more0 = {}, more1 = {};
        for (int64_t r = 0; r < w.rank; r++, up += 16) {
            more0 = fma(splat(low[r]), load(up), more0);
            more1 = fma(splat(low[r]), load(up + 16 * w.rank), more1);
        }
        v0 = v0 + more0;
        v1 = v1 + more1;
    }
    if (is_pair(to.out)) {
        put(to.y + m * to.stride + n / 2, gate(v0, to.out) * v1, to.columns / 2 - n / 2, OUT_STORE);
        return;
    }
    float *y = to.y + m * to.stride + n;
    if (to.bias) {
        float b[32];
        for (int64_t r = 0; r < 32; r++) b[r] = n + r < to.columns ? to.bias[n + r] : 0.0f;
        v0 = v0 + load(b);
        v1 = v1 + load(b + 16);
    }
    put(y, v0, to.columns - n, to.out);
    if (to.columns > n + 16) put(y + 16, v1, to.columns - n - 16, to.out);
}

// The same of `count` tokens from `first` on; values(m, &v0, &v1) are those of number m of them.
template <class Values>
static void finish_tokens(const bn_matrix &w, const target &to, int64_t panel, int64_t first, int64_t count, Values values) {
    int64_t n = 32 * panel, m = 0;
    vf v0, v1;
    float *y = to.y + first * to.stride + (is_pair(to.out) ? n / 2 : n);
    if (!w.bias && !w.rank && !to.bias && n + 32 <= to.columns) { // what is almost always so costs no question a token
        if (is_pair(to.out))
            for (; m < count; m++, y += to.stride) {
                values(m, &v0, &v1);
                store(y, gate(v0, to.out) * v1);
            }
        else if (to.out == OUT_STORE)
            for (; m < count; m++, y += to.stride) {
                values(m, &v0, &v1);
                store(y, v0);
                store(y + 16, v1);
            }
        else if (to.out == OUT_ADD)
            for (; m < count; m++, y += to.stride) {
                values(m, &v0, &v1);
                store(y, load(y) + v0);
                store(y + 16, load(y + 16) + v1);
            }
    }
    for (; m < count; m++) {
        values(m, &v0, &v1);
        finish(w, to, panel, v0, v1, first + m);
    }
}

} // namespace BN_ISA
} // namespace bn
