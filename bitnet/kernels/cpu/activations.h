// Activations on their way into a product: norm, order, INT8, INT16 or float.
//
//     X_TOKEN   codes int8, a scale and the sum of the codes for each token; with groups, of each segment
//     X_STATIC  the same with a scale and a zero point that were stored with the weights
//     X_GROUP   codes int8, a scale and the scaled sum for each segment of columns
//     X_INT16   codes of 16 bits, as two digits of 8, a scale and the scaled sum for each segment: for the time of two
//               products of INT8 activations
//     X_FLOAT   the floats, and with groups their sum over each segment; or, where the codes have at most 6 bits, the
//               same with three digits: as exact as float32 sums
//
// A segment is a group of the weights, or 32 columns of it. `prepare` writes one token; tokens do not depend on each other.
#pragma once

#include "outputs.h"

namespace bn {
namespace BN_ISA {

BN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
BN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

BN_INLINE bool is_float(int codec) { return codec >= CODEC_FLOAT8; }
BN_INLINE int64_t segment_of(const bn_matrix &w) {
    return w.codec == CODEC_BASE3 ? 256 : w.group < 32 ? w.group : 32;
}
// Columns as they lie in memory.
BN_INLINE int64_t padded_columns(const bn_matrix &w) {
    return w.kind == GROUPS_NONE ? w.K : round_up(w.K, w.codec == CODEC_BASE3 ? 256 : 32);
}

// A float in D digits: x = s (q0 + 256 q1 + 65536 q2), each from -128 to 127, and |x| at most s largest(D). What three of
// them round away, 2^-24 of the segment's largest, is what a float32 sum over the segment rounds away too.
BN_INLINE constexpr int32_t largest(int D) { return 127 * (1 + (D > 1 ? 256 : 0) + (D > 2 ? 65536 : 0)); }
// Digits of an activation, 0 for floats.
BN_INLINE int digits_of(const bn_matrix &w) {
    if (w.x != X_FLOAT) return w.x == X_INT16 ? 2 : 1;
    bool small = w.codec <= CODEC_SIX_BIT || w.codec == CODEC_ONE_BIT;
    return w.kind != GROUPS_NONE && small && !w.values ? 3 : 0;
}

struct activations {
    int8_t *q;      // [rows + 32, stride], zero from K on; one such array for each digit, `plane` bytes apart
    float *x;       // [rows, stride], instead of q
    float *scale;   // [rows] or [rows, segments]
    float *sum;     // [rows, segments]
    int32_t *total; // [rows]
    float *low;     // [rows, rank]: what the adapter's `down` makes of the floats
    int64_t stride, segments, plane;
};

// Lays the activations of `rows` tokens out in memory (NULL: only counts); returns their bytes.
static int64_t lay_out_activations(const bn_matrix &w, int64_t rows, uint8_t *memory, activations *to) {
    int64_t used = 0;
    auto take = [&](int64_t bytes) {
        uint8_t *p = memory ? memory + used : nullptr;
        used += round_up(bytes, 64);
        return p;
    };
    activations a = {};
    bool groups = w.kind != GROUPS_NONE;
    a.segments = groups ? padded_columns(w) / segment_of(w) : 1;
    // AMX reads whole tiles of 32 tokens, and a line of base 3 covers 20 columns: both may read beyond the end.
    a.stride = round_up(padded_columns(w) + 20, 64);
    if (digits_of(w) == 0) {
        a.x = (float *)take(rows * a.stride * 4);
    } else {
        a.plane = (round_up(rows, 32) + 32) * a.stride;
        a.q = (int8_t *)take(a.plane * digits_of(w));
        a.scale = (float *)take(rows * a.segments * 4);
    }
    if (groups) a.sum = (float *)take(rows * a.segments * 4);
    else a.total = (int32_t *)take(rows * 4);
    if (w.rank) a.low = (float *)take(rows * w.rank * 4);
    if (to) *to = a;
    return used;
}

// Whether activations that were prepared for one matrix serve another.
BN_INLINE bool same_activations(const bn_matrix &a, const bn_matrix &b) {
    bool groups = a.kind != GROUPS_NONE;
    if (a.x != b.x || a.K != b.K || a.order != b.order || a.divisor != b.divisor || a.down != b.down) return false;
    if (digits_of(a) != digits_of(b)) return false;
    if (groups != (b.kind != GROUPS_NONE) || (groups && segment_of(a) != segment_of(b))) return false;
    return a.x != X_STATIC || (a.x_scale == b.x_scale && a.x_zero == b.x_zero);
}

// The code of a value over its scale, a number for what is not finite too.
BN_INLINE vi code_of(vf v, float most) { return to_int(min(max(v, splat(-most)), splat(most))); }

// The largest magnitudes of x[count], a multiple of 16; `odd` stays 0 unless a value is not finite, and is NaN then.
BN_INLINE vf peak_of(const float *x, int64_t count, vf *odd) {
    vf peak = {};
    for (int64_t k = 0; k < count; k += 16) {
        vf v = load(x + k);
        peak = max(absolute(v), peak);
        *odd = fma(v, splat(0.0f), *odd);
    }
    return peak;
}

// Per-token absmax INT8 of x[K], which is zero or readable up to a multiple of 16 past K: the codes, their sum, the
// scale. A value that is not finite makes the scale NaN and with it the whole token, as in the reference.
BN_INLINE void quantize_token(const float *x, int64_t K, int8_t *q, float *scale, int32_t *total) {
    vf odd = {};
    int64_t whole = K / 16 * 16;
    float tail[16] = {};
    memcpy(tail, x + whole, (K - whole) * sizeof(float));
    vf peak = max(absolute(load(tail)), peak_of(x, whole, &odd));
    odd = fma(load(tail), splat(0.0f), odd);
    float absmax = maximum(peak);
    float s = (absmax > 1e-5f ? absmax : 1e-5f) / 127.0f;
    vi sums = {};
    for (int64_t k = 0; k < K; k += 16) {
        vf v = k < whole ? load(x + k) : load(tail);
        vi code = code_of(v / splat(s), 127.0f);
        int8_t narrowed[16];
        narrow(narrowed, code);
        memcpy(q + k, narrowed, K - k < 16 ? K - k : 16);
        sums = sums + code;
    }
    *scale = s + sum(odd);
    *total = sum(sums);
}


// INT8 of x[K] with a scale and a zero point that are given: clamp(round(x / scale) + zero, -128, 127).
BN_INLINE void quantize_static(const float *x, int64_t K, float scale, int32_t zero, int8_t *q, int32_t *total) {
    vi sums = {};
    for (int64_t k = 0; k < K; k += 16) {
        float tail[16] = {};
        int64_t count = K - k < 16 ? K - k : 16;
        memcpy(tail, x + k, count * sizeof(float));
        vf v = min(max(load(tail) / splat(scale), splat(-1024.0f)), splat(1024.0f));
        vi code = to_int(v) + splat(zero);
        int8_t narrowed[16];
        narrow(narrowed, code);
        for (int64_t i = count; i < 16; i++) narrowed[i] = 0;
        memcpy(q + k, narrowed, count);
        sums = sums + to_int(widen(narrowed));
    }
    *total = sum(sums);
}

// One segment of `width` floats, a multiple of 16: codes in D digits, scale, and the sum of the codes times the scale.
template <int D>
BN_INLINE void quantize_segment(const float *x, int64_t width, int8_t *q, int64_t plane, float *scale,
                                float *scaled_sum) {
    vf odd = {};
    float absmax = maximum(peak_of(x, width, &odd));
    float s = (absmax > 1e-30f ? absmax : 1e-30f) / (float)largest(D);
    vi sums = {};
    for (int64_t k = 0; k < width; k += 16) {
        vi code = code_of(load(x + k) / splat(s), (float)largest(D));
        sums = sums + code;
        for (int d = 0; d < D - 1; d++) {
            vi digit = ((code + splat(128)) & splat(255)) - splat(128);
            narrow(q + d * plane + k, digit);
            code = (code - digit) >> 8;
        }
        narrow(q + (D - 1) * plane + k, code);
    }
    *scale = s + sum(odd); // not finite where a value is not
    *scaled_sum = *scale * (float)sum(sums);
}

template <int D>
BN_INLINE void quantize_segments(const float *x, int64_t width, const activations &a, int64_t m) {
    int8_t *q = a.q + m * a.stride;
    int64_t at = m * a.segments, K = a.segments * width;
    for (int64_t s = 0; s < a.segments; s++)
        quantize_segment<D>(x + s * width, width, q + s * width, a.plane, a.scale + at + s, a.sum + at + s);
    for (int d = 0; d < D; d++) memset(q + d * a.plane + K, 0, a.stride - K);
}

// RMSNorm of x[width] by weight, into `row`.
BN_INLINE void rms_norm(const float *x, const float *weight, int64_t width, float eps, float *row) {
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
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < width; i++) total += x[i] * x[i];
    float inverse = 1.0f / sqrtf(total / (float)width + eps);
    for (i = 0; i < whole; i += 16) store(row + i, load(weight + i) * (load(x + i) * splat(inverse)));
    for (; i < width; i++) row[i] = weight[i] * (x[i] * inverse);
}

// low[rank] = down x of x[width].
BN_INLINE void project_down(const float *x, const float *down, int64_t width, int64_t rank, float *low) {
    int64_t whole = width / 16 * 16, stride = round_up(width, 16);
    float tail[16] = {};
    memcpy(tail, x + whole, (width - whole) * sizeof(float));
    for (int64_t r = 0; r < rank; r++, down += stride) {
        vf sums[4] = {};
        int64_t k = 0;
        for (; k + 64 <= whole; k += 64)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[j] = fma(load(x + k + 16 * j), load(down + k + 16 * j), sums[j]);
        for (; k < whole; k += 16) sums[0] = fma(load(x + k), load(down + k), sums[0]);
        if (whole < width) sums[1] = fma(load(tail), load(down + whole), sums[1]);
        low[r] = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// Floats of scratch that `prepare` needs.
BN_INLINE int64_t prepare_floats(const bn_matrix &w) { return round_up(w.inputs, 16) + round_up(padded_columns(w), 16) + 32; }

// The input x[inputs] of token `m`, already normed, as `w` multiplies it. `scratch`: floats, as many as columns lie in
// memory, not those of x.
static void prepare(const bn_matrix &w, const float *x, const activations &a, int64_t m, float *scratch) {
    int64_t K = padded_columns(w);
    bool groups = w.kind != GROUPS_NONE;
    if (w.rank) project_down(x, w.down, w.inputs, w.rank, a.low + m * w.rank);
    if (w.order || w.divisor || (groups && K != w.inputs)) {
        for (int64_t k = 0; k < K; k++) {
            int64_t from = k < w.K ? (w.order ? w.order[k] : k) : -1;
            if (from >= w.inputs) from = -1;
            scratch[k] = from < 0 ? 0.0f : w.divisor ? x[from] / w.divisor[from] : x[from];
        }
        x = scratch;
    }
    int8_t *q = a.q + m * a.stride;
    if (w.x == X_TOKEN && groups) {
        int64_t width = segment_of(w);
        float scale;
        int32_t total;
        quantize_token(x, K, q, &scale, &total);
        for (int64_t s = 0; s < a.segments; s++) {
            vi sums = {};
            for (int64_t k = 0; k < width; k += 16) sums = sums + to_int(widen(q + s * width + k));
            a.scale[m * a.segments + s] = scale;
            a.sum[m * a.segments + s] = scale * (float)sum(sums);
        }
        memset(q + K, 0, a.stride - K);
        return;
    }
    if (w.x == X_TOKEN || w.x == X_STATIC) {
        if (w.x == X_TOKEN) {
            quantize_token(x, w.K, q, a.scale + m, a.total + m);
        } else {
            quantize_static(x, w.K, w.x_scale, w.x_zero, q, a.total + m);
            a.scale[m] = w.x_scale;
        }
        memset(q + w.K, 0, a.stride - w.K);
        return;
    }
    int64_t width = groups ? segment_of(w) : 0;
    switch (digits_of(w)) {
    case 1: return quantize_segments<1>(x, width, a, m);
    case 2: return quantize_segments<2>(x, width, a, m);
    case 3: return quantize_segments<3>(x, width, a, m);
    }
    memcpy(a.x + m * a.stride, x, K * sizeof(float));
    for (int64_t s = 0; groups && s < a.segments; s++) {
        vf total = {};
        for (int64_t k = 0; k < width; k += 16) total = total + load(x + s * width + k);
        a.sum[m * a.segments + s] = sum(total);
    }
}

} // namespace BN_ISA
} // namespace bn
