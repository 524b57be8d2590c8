// Products with float weights: [N / 16, K, 16] of float32, float16, bfloat16 or FP8 (E4M3), activations float32.
//
// Each output is one chain of fused multiply-adds over K, whatever the number of tokens.
#pragma once

#include "groups.h"

namespace bn {
namespace BN_ISA {

template <int codec> BN_INLINE vf float_row(const uint8_t *p) {
    if constexpr (codec == CODEC_FLOAT32) return load((const float *)p);
    else if constexpr (codec == CODEC_FLOAT16) return from_half((const uint16_t *)p);
    else if constexpr (codec == CODEC_BFLOAT16) return from_brain((const uint16_t *)p);
    else return from_float8(p);
}
BN_INLINE constexpr int64_t float_bytes(int codec) { // of one weight
    return codec == CODEC_FLOAT32 ? 4 : codec == CODEC_FLOAT8 ? 1 : 2;
}

// MT tokens with K columns of NB blocks, `next` bytes apart: sums[m * 32 ..] += ...
template <int codec, int MT, int NB>
BN_INLINE void rows_times_tokens(const uint8_t *p, int64_t next, int64_t K, const float *x, int64_t stride, float *sums) {
    constexpr int64_t BYTES = 16 * float_bytes(codec);
    vf y[MT][NB];
#pragma GCC unroll 12
    for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
        for (int b = 0; b < NB; b++) y[m][b] = load(sums + 32 * m + 16 * b);
    for (int64_t k = 0; k < K; k++, p += BYTES) {
        vf w[NB];
#pragma GCC unroll 2
        for (int b = 0; b < NB; b++) {
            w[b] = float_row<codec>(p + b * next);
            if (BYTES * k % 64 == 0) BN_PREFETCH(p + b * next + 2048);
        }
#pragma GCC unroll 12
        for (int m = 0; m < MT; m++) {
            vf v = splat(x[m * stride + k]);
#pragma GCC unroll 2
            for (int b = 0; b < NB; b++) y[m][b] = fma(w[b], v, y[m][b]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < MT; m++)
#pragma GCC unroll 2
        for (int b = 0; b < NB; b++) store(sums + 32 * m + 16 * b, y[m][b]);
}

template <int codec>
static void multiply_rows(const bn_matrix &w, const activations &a, int64_t M, const target &to, int64_t first,
                          int64_t last, uint8_t *scratch) {
    constexpr int64_t BYTES = 16 * float_bytes(codec);
    float *sums = (float *)round_up((int64_t)scratch, 64);
    int64_t next = w.K * BYTES, chunk = M <= DIRECT ? w.K : CHUNK; // a chunk stays in the cache for all tokens
    for (int64_t panel = first; panel < last; panel++) {
        memset(sums, 0, M * 32 * sizeof(float));
        const uint8_t *p = w.lines + 2 * panel * next;
        for (int64_t k = 0; k < w.K; k += chunk) {
            int64_t columns = w.K - k < chunk ? w.K - k : chunk, m = 0;
            const float *x = a.x + k;
            const uint8_t *at = p + k * BYTES;
#define BN_TILE(n, blocks, b)                                                                                          \
    rows_times_tokens<codec, n, blocks>(at + b * next, next, columns, x + m * a.stride, a.stride, sums + 32 * m + 16 * b)
            for (; m + FLOAT_TILE <= M; m += FLOAT_TILE) {
                if constexpr (FLOAT_TILE == 12) { // 32 registers
                    BN_TILE(FLOAT_TILE, 2, 0);
                } else {
                    BN_TILE(FLOAT_TILE, 1, 0);
                    BN_TILE(FLOAT_TILE, 1, 1);
                }
            }
            if constexpr (FLOAT_TILE > 1) {
                for (; m + 2 <= M; m += 2) BN_TILE(2, 2, 0);
                for (; m < M; m++) BN_TILE(1, 2, 0);
            }
#undef BN_TILE
        }
        vf s0 = load(w.scale + 32 * panel), s1 = load(w.scale + 32 * panel + 16);
        finish_tokens(w, to, panel, 0, M, [&](int64_t m, vf *v0, vf *v1) {
            *v0 = load(sums + 32 * m) * s0;
            *v1 = load(sums + 32 * m + 16) * s1;
        });
    }
}

static void multiply_floats(const bn_matrix &w, const activations &a, int64_t M, const target &to, int64_t first,
                            int64_t last, uint8_t *scratch) {
    switch (w.codec) {
    case CODEC_FLOAT32: return multiply_rows<CODEC_FLOAT32>(w, a, M, to, first, last, scratch);
    case CODEC_FLOAT16: return multiply_rows<CODEC_FLOAT16>(w, a, M, to, first, last, scratch);
    case CODEC_BFLOAT16: return multiply_rows<CODEC_BFLOAT16>(w, a, M, to, first, last, scratch);
    default: return multiply_rows<CODEC_FLOAT8>(w, a, M, to, first, last, scratch);
    }
}

} // namespace BN_ISA
} // namespace bn
