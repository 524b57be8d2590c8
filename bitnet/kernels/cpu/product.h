// Any matrix of layout.h times any number of tokens: what the forward pass knows of products.
//
//     prepared x = lay_out_inputs(projection, rows, memory)      where the activations go
//     prepare(projection, row, x, m, scratch)                    one token, norm behind it
//     product(projection, x, M, to, first, last, scratch)        panels of 32 rows, in any pieces
#pragma once

#include "floats.h"

namespace bn {
namespace BN_ISA {

struct prepared {
    activations part[MAX_PARTS];
};

BN_INLINE const activations *activations_before(const bn_projection &p, int part, const prepared &x) {
    for (int i = 0; i < part; i++)
        if (same_activations(p.part[i], p.part[part])) return &x.part[i];
    return nullptr;
}

// Lays out the activations of `rows` tokens (memory NULL: only counts); returns their bytes.
static int64_t lay_out_inputs(const bn_projection &p, int64_t rows, uint8_t *memory, prepared *to) {
    int64_t used = 0;
    prepared x = {};
    for (int i = 0; i < p.parts; i++) {
        const activations *same = activations_before(p, i, x);
        if (same) x.part[i] = *same;
        else used += lay_out_activations(p.part[i], rows, memory ? memory + used : nullptr, &x.part[i]);
    }
    if (to) *to = x;
    return used;
}

// Bytes of scratch that `prepare` needs.
static int64_t prepare_scratch(const bn_projection &p) {
    int64_t floats = 0;
    for (int i = 0; i < p.parts; i++) floats = max64(floats, prepare_floats(p.part[i]));
    return floats * 4;
}

// Token m: RMSNorm of x[inputs] (weight NULL: none), then what each part takes.
static void prepare(const bn_projection &p, const float *x, const float *norm, float eps, const prepared &to, int64_t m,
                    uint8_t *scratch) {
    int64_t inputs = p.part[0].inputs;
    float *row = (float *)scratch;
    if (norm) {
        rms_norm(x, norm, inputs, eps, row);
        x = row;
    }
    for (int i = 0; i < p.parts; i++)
        if (!activations_before(p, i, to)) prepare(p.part[i], x, to.part[i], m, row + round_up(inputs, 16));
}

BN_INLINE bool is_gated(const bn_projection &p, int out) { return is_pair(out) && p.parts == 2; }

// How many panels there are to hand out. A gate and an up of two formats go panel by panel together.
BN_INLINE int64_t panels_of(const bn_projection &p, int out) {
    int64_t panels = 0;
    for (int i = 0; i < p.parts; i++) panels += p.part[i].N / 32;
    return is_gated(p, out) ? p.part[0].N / 32 : panels;
}

// Bytes of scratch that a thread needs for `product`.
static int64_t product_scratch(const bn_projection &p, int64_t M) {
    int64_t bytes = 0;
    for (int i = 0; i < p.parts; i++)
        bytes = max64(bytes, p.part[i].kind == GROUPS_NONE && p.part[i].x != X_FLOAT ? token_scratch(p.part[i].K, M)
                                                                                           : group_scratch(M));
    return bytes;
}

static void multiply(const bn_matrix &w, const activations &a, int64_t M, const target &to, int64_t first, int64_t last,
                     uint8_t *scratch) {
    if (is_float(w.codec)) multiply_floats(w, a, M, to, first, last, scratch);
    else if (w.kind != GROUPS_NONE) multiply_groups(w, a, M, to, first, last, scratch);
    else multiply_tokens(w, a.q, a.stride, a.scale, a.total, M, to, first, last, scratch);
}

// The panels from `first` to `last` of panels_of(p, out), to y[M, stride].
static void product(const bn_projection &p, const prepared &x, int64_t M, int out, float *y, int64_t stride, int64_t first,
                    int64_t last, uint8_t *scratch) {
    if (is_gated(p, out)) {
        target gate = {out == OUT_GLU_SILU ? OUT_SILU : OUT_RELU2, y, stride, p.rows[0], nullptr, x.part[0].low};
        target up = {OUT_MULTIPLY, y, stride, p.rows[1], nullptr, x.part[1].low};
        multiply(p.part[0], x.part[0], M, gate, first, last, scratch);
        multiply(p.part[1], x.part[1], M, up, first, last, scratch);
        return;
    }
    for (int i = 0; i < p.parts; i++) {
        int64_t panels = p.part[i].N / 32, from = first > 0 ? first : 0, until = last < panels ? last : panels;
        target to = {out, y + p.at[i], stride, p.rows[i], nullptr, x.part[i].low};
        if (from < until) multiply(p.part[i], x.part[i], M, to, from, until, scratch);
        first -= panels;
        last -= panels;
    }
}

// Row n of a matrix as floats, out[K padded to 64]: an embedding. `scratch` as for a product of one token.
static void read_row(const bn_matrix &w, int64_t n, float *out, uint8_t *scratch) {
    int64_t block = n / 16, r = n % 16;
    float scale = w.scale[n], lane[16];
    if (is_float(w.codec)) {
        int64_t bytes = 16 * float_bytes(w.codec);
        const uint8_t *p = w.lines + block * w.K * bytes;
        for (int64_t k = 0; k < w.K; k++, p += bytes) {
            vf v = w.codec == CODEC_FLOAT32    ? float_row<CODEC_FLOAT32>(p)
                   : w.codec == CODEC_FLOAT16  ? float_row<CODEC_FLOAT16>(p)
                   : w.codec == CODEC_BFLOAT16 ? float_row<CODEC_BFLOAT16>(p)
                                               : float_row<CODEC_FLOAT8>(p);
            store(lane, v);
            out[k] = lane[r] * scale;
        }
        return;
    }
    if (w.kind == GROUPS_NONE) { // eight bits, as the engine packs an embedding with a scale a row
        const uint8_t *lines = w.lines + block * w.lines_per_block * 64 + r * 4;
        for (int64_t k = 0; k < w.K; k++) out[k] = (float)(lines[k / 4 * 64 + k % 4] - 128) * scale;
        return;
    }
    uint8_t *codes = (uint8_t *)round_up((int64_t)scratch, 64);
    chunk c;
    for (int64_t first = 0; first < padded_columns(w); first += CHUNK) {
        cut(w, block, first, c);
        BN_GROUP_CODECS(w.codec, unpack_steps, w, c, codes)
        for (int64_t k = 0; k < c.columns && first + k < w.K; k++) {
            uint8_t code = codes[k / 4 * 64 + r * 4 + k % 4];
            int64_t g = (first + k) / w.group - first / w.group;
            float value = w.values ? w.values[code] : (float)code;
            out[first + k] = (value * c.s[16 * g + r] + c.t[16 * g + r]) * scale;
        }
    }
}

} // namespace BN_ISA
} // namespace bn
