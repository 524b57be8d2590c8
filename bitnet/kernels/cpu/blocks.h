// Searches of the GGUF block formats: the arithmetic of bitnet/quant/blocks/ggml_search.py and search.py beside it, in
// the same order.
//
// A lane of a vector is a block, so every sum over a block runs from its first weight to its last, as in ggml's scalar
// code, and the bytes are the same on every instruction set. Arrays of vectors are indexed by the weight's place in the
// block. Names and comments are those of the Python files, which explain what is searched.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BN_INLINE static inline __attribute__((always_inline))
#define BN_INLINE_MEMBER inline __attribute__((always_inline))

namespace {

#if defined(BN_AVX512)
constexpr int W = 16;
#elif defined(BN_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

BN_INLINE vf all(float x) { return x - vf{}; }
#if defined(BN_AVX512)
BN_INLINE vf largest_of(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
BN_INLINE vf smallest_of(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(BN_AVX2)
BN_INLINE vf largest_of(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
BN_INLINE vf smallest_of(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
BN_INLINE vf largest_of(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
BN_INLINE vf smallest_of(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
BN_INLINE vf largest_of(vf a, vf b) { return a > b ? a : b; }
BN_INLINE vf smallest_of(vf a, vf b) { return a < b ? a : b; }
#endif
BN_INLINE vf clamp(vf x, float low, float high) { return smallest_of(largest_of(x, all(low)), all(high)); }
BN_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
BN_INLINE vf root(vf x) {
    for (int l = 0; l < W; l++) x[l] = sqrtf(x[l]);
    return x;
}
BN_INLINE bool any(vi mask) {
    int32_t found = 0;
    for (int l = 0; l < W; l++) found |= mask[l];
    return found != 0;
}

constexpr float ROUND = 12582912.0f; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr float TINY = 1e-15f, SMALL = 1e-30f, LARGEST = 65504.0f;

// float32 to the float32 of its float16, half to even; the magnitude is below 65520.
BN_INLINE vf half_of(vf x) {
    vi bits = (vi)x, sign = bits & INT32_MIN, size = bits & 0x7FFFFFFF;
    vi normal = (size + 0xFFF + (size >> 13 & 1)) & ~0x1FFF;
    vf subnormal = ((vf)size + 0.75f) - 0.75f; // the last bit of 0.75 is 2^-24, the step of float16's subnormals
    return (vf)((size < 0x38800000 ? (vi)subnormal : normal) | sign);
}
BN_INLINE vf stored(vf x) { return half_of(clamp(x, -LARGEST, LARGEST)); }

// ---- ggml.py ----

BN_INLINE vi nearest_integer(vf x) { return ((vi)(x + ROUND) & 0x7FFFFF) - 0x400000; }
BN_INLINE vf nearest_int(vf x) { return __builtin_convertvector(nearest_integer(x), vf); }
BN_INLINE vf divide(float number, vf x) { return all(number) / x; }
BN_INLINE vf inverse_or_zero(vf x) { return x != 0 ? 1 / x : vf{}; }
// Toward 0; what is not finite becomes 0.
BN_INLINE vf truncate(vf x) {
    return magnitude(x) < 1e9f ? __builtin_convertvector(__builtin_convertvector(x, vi), vf) : vf{};
}
BN_INLINE vf round_away(vf x) {
    vf whole = truncate(x);
    vf more = whole + (x < 0 ? all(-1) : all(1));
    return magnitude(x - whole) >= 0.5f && magnitude(x) < 1e9f ? more : whole;
}

template <int N> BN_INLINE vf largest(const vf *x) {
    vf found = {}, size = {};
    for (int i = 0; i < N; i++) {
        vi more = magnitude(x[i]) > size;
        size = more ? magnitude(x[i]) : size;
        found = more ? x[i] : found;
    }
    return found;
}
template <int N> BN_INLINE vf sum_of_squares(const vf *x) {
    vf sum = {};
    for (int i = 0; i < N; i++) sum += x[i] * x[i];
    return sum;
}

template <int N> static vf symmetric(const vf *x, const vf *weight, int levels, vf *codes) {
    vf extreme = largest<N>(x), wx[N];
    for (int i = 0; i < N; i++) wx[i] = weight[i] * x[i];
    vf best_inv, scale, best;
    for (int step = -10; step <= 9; step++) {
        if (step == 0) continue;
        // The first trial has no step; -10 stands for it.
        vf inv = divide(step == -10 ? (float)-levels : -((float)levels + 0.1f * (float)step), extreme), xq = {},
           qq = {};
        for (int i = 0; i < N; i++) {
            vf q = clamp(nearest_int(inv * x[i]), -levels, levels - 1);
            xq += wx[i] * q;
            qq += weight[i] * q * q;
        }
        if (step == -10) {
            best_inv = inv;
            scale = qq != 0 ? xq / qq : vf{};
            best = scale * xq;
            continue;
        }
        vi better = (qq > 0) & (xq * xq > best * qq);
        best_inv = better ? inv : best_inv;
        scale = better ? xq / qq : scale;
        best = better ? scale * xq : best;
    }
    vi zero = magnitude(extreme) < TINY;
    for (int i = 0; i < N; i++)
        codes[i] = zero ? vf{} : clamp(nearest_int(best_inv * x[i]), -levels, levels - 1) + (float)levels;
    return zero ? vf{} : scale;
}

BN_INLINE vf low_byte(vf x) { return __builtin_convertvector(__builtin_convertvector(x, vi) & 255, vf); }

template <int N, bool UNSIGNED>
static void descend(const vf *x, const vf *weight, vf *codes, vf &sum_xq, vf &sum_qq, float low, float high) {
    for (int pass = 0; pass < 5; pass++) {
        vi changed = {};
        for (int i = 0; i < N; i++) {
            vf wx = weight[i] * x[i], w = weight[i], code = codes[i];
            vf xq = sum_xq - wx * code, qq = sum_qq - w * code * code;
            vf moved = nearest_int(x[i] * qq / xq);
            moved = UNSIGNED ? smallest_of(moved, all(high)) : clamp(moved, low, high);
            vf new_xq = xq + wx * moved, new_qq = qq + w * moved * moved;
            vi better =
                (xq > 0) & (moved != code) & (new_qq > 0) & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq);
            if (UNSIGNED) better &= qq > 0;
            codes[i] = better ? UNSIGNED ? low_byte(moved) : moved : code;
            sum_xq = better ? new_xq : sum_xq;
            sum_qq = better ? new_qq : sum_qq;
            changed |= better;
        }
        if (!any(changed)) return;
    }
}

template <int N> static vf symmetric_descent(const vf *x, int levels, vf *codes) {
    vf extreme = largest<N>(x), inv = divide(-levels, extreme), weight[N], xq = {}, qq = {};
    for (int i = 0; i < N; i++) {
        weight[i] = x[i] * x[i];
        codes[i] = clamp(nearest_int(inv * x[i]), -levels, levels - 1);
        xq += weight[i] * x[i] * codes[i];
        qq += weight[i] * codes[i] * codes[i];
    }
    descend<N, false>(x, weight, codes, xq, qq, -levels, levels - 1);
    vi zero = magnitude(extreme) < TINY;
    for (int i = 0; i < N; i++) codes[i] = zero ? vf{} : codes[i] + (float)levels;
    return zero ? vf{} : qq > 0 ? xq / qq : vf{};
}

template <int N> static vf affine(const vf *x, const vf *weight, int levels, float first, float step, int steps,
                                  bool absolute, vf *best, vf &minimum) {
    vf low = x[0], high = x[0], sum_w = {}, sum_x = {}, codes[N];
    for (int i = 0; i < N; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    low = low > 0 ? vf{} : low;
    vi constant = high <= low;
    vf inv = divide(levels, high - low), scale = 1 / inv, best_error = {};
    for (int i = 0; i < N; i++) {
        best[i] = clamp(nearest_int(inv * (x[i] - low)), 0, levels);
        vf difference = scale * best[i] + low - x[i];
        best_error += weight[i] * (absolute ? magnitude(difference) : difference * difference);
    }
    for (int t = 0; t <= steps; t++) {
        inv = divide(first + step * (float)t + (float)levels, high - low);
        vf q_sum = {}, qq = {}, xq = {}, error = {};
        for (int i = 0; i < N; i++) {
            vf q = clamp(nearest_int(inv * (x[i] - low)), 0, levels), wq = weight[i] * q;
            codes[i] = q;
            q_sum += wq;
            qq += wq * q;
            xq += wq * x[i];
        }
        vf determinant = sum_w * qq - q_sum * q_sum;
        vf new_scale = (sum_w * xq - sum_x * q_sum) / determinant, new_low = (qq * sum_x - q_sum * xq) / determinant;
        vi above = new_low > 0;
        new_scale = above ? xq / qq : new_scale;
        new_low = above ? vf{} : new_low;
        for (int i = 0; i < N; i++) {
            vf difference = new_scale * codes[i] + new_low - x[i];
            error += weight[i] * (absolute ? magnitude(difference) : difference * difference);
        }
        vi better = (determinant > 0) & (error < best_error);
        if (!any(better)) continue;
        best_error = better ? error : best_error;
        scale = better ? new_scale : scale;
        low = better ? new_low : low;
        for (int i = 0; i < N; i++) best[i] = better ? codes[i] : best[i];
    }
    for (int i = 0; i < N; i++) best[i] = constant ? vf{} : best[i];
    minimum = -low;
    return constant ? vf{} : scale;
}

template <int N> static vf positive(const vf *x, const vf *weight, int levels, vf *codes) {
    vf high = {};
    for (int i = 0; i < N; i++) high = x[i] > high ? x[i] : high;
    vi zero = high < TINY;
    vf best_inv, best_error;
    for (int step = -5; step <= 4; step++) {
        if (step == 0) continue;
        vf inv = divide(step == -5 ? (float)levels : 0.1f * (float)step + (float)levels, high), scale = 1 / inv,
           error = {};
        for (int i = 0; i < N; i++) {
            vf q = nearest_int(inv * x[i]);
            q = step == -5 ? low_byte(q) : smallest_of(q, all(levels));
            vf difference = x[i] - scale * q;
            error += weight[i] * difference * difference;
        }
        if (step == -5) {
            best_inv = inv;
            best_error = error;
            continue;
        }
        vi better = error < best_error;
        best_error = better ? error : best_error;
        best_inv = better ? inv : best_inv;
    }
    vf xq = {}, qq = {};
    for (int i = 0; i < N; i++) {
        vf q = smallest_of(nearest_int(best_inv * x[i]), all(levels));
        xq += weight[i] * x[i] * q;
        qq += weight[i] * q * q;
        codes[i] = low_byte(q);
    }
    descend<N, true>(x, weight, codes, xq, qq, 0, levels);
    for (int i = 0; i < N; i++) codes[i] = zero ? vf{} : codes[i];
    return zero ? vf{} : qq > 0 ? xq / qq : vf{};
}

// ---- search.py ----

constexpr int SCALE_STEPS = 3, AFFINE_STEPS = 4, ROUNDS = 3;
constexpr double AFFINE_STARTS[] = {-1.0, -0.6, -0.2, 0.2, 0.6, 1.0};

BN_INLINE vf inverse(vf x) { return magnitude(x) < SMALL ? vf{} : 1 / x; }
BN_INLINE vf ratio(vf a, vf b) { return b > 0 ? a / b : vf{}; }
BN_INLINE vf nearest(vf x, vf inv, vf low, float first, float last) {
    return clamp(((x - low) * inv + ROUND) - ROUND, first, last);
}

struct sums {
    vf error, q, qq, xq;
};
// Codes are uneven levels for IQ4_NL and IQ4_XS, and the integers of [first, last] for the others.
struct integers {
    float first, last;
    BN_INLINE_MEMBER vf at(vf x) const { return clamp((x + ROUND) - ROUND, first, last); }
};

template <int N, bool WEIGHTED, class Codes>
BN_INLINE sums sums_at(const vf *x, const vf *weight, const Codes &codes, vf scale, vf low) {
    sums s = {};
    vf inv = inverse(scale);
    for (int i = 0; i < N; i++) {
        vf q = codes.at((x[i] - low) * inv), difference = x[i] - (scale * q + low);
        vf wq = WEIGHTED ? weight[i] * q : q, wd = WEIGHTED ? weight[i] * difference : difference;
        s.error += wd * difference;
        s.q += wq;
        s.qq += wq * q;
        s.xq += wq * x[i];
    }
    return s;
}

struct best {
    vf error;
    bool none = true;
    BN_INLINE_MEMBER vi offer(vf e) {
        vi better = none ? vi{} - 1 : e < error;
        error = better ? e : error;
        none = false;
        return better;
    }
};

template <bool KEEP> BN_INLINE vf kept(vf x) { return KEEP ? stored(x) : x; }

template <int N, bool WEIGHTED, bool KEEP, class Codes>
static vf fit_scale(const vf *x, const vf *weight, const vf *starts, int count, const Codes &codes, vf &error) {
    best b;
    vf found = {};
    for (int t = 0; t < count; t++) {
        vf scale = kept<KEEP>(starts[t]);
        for (int step = 0; step < SCALE_STEPS; step++) {
            sums s = sums_at<N, WEIGHTED>(x, weight, codes, scale, vf{});
            found = b.offer(s.error) ? scale : found;
            scale = kept<KEEP>(ratio(s.xq, s.qq));
        }
    }
    error = b.error;
    return found;
}

// Starts of fit_scale; returns how many.
template <int N> static int scale_starts(const vf *x, float first, float last, float spread, vf *starts) {
    vf extreme = largest<N>(x);
    int count = 0;
    for (int end = first == -last; end < 2; end++)
        for (int a = -2; a <= 2; a++)
            starts[count++] = extreme / all(end ? last + spread * 0.5f * a : first - spread * 0.5f * a);
    return count;
}

template <int N, bool WEIGHTED, bool KEEP, bool FREE>
static vf fit_affine(const vf *x, const vf *weight, int high, vf sum_w, vf sum_x, vf &low, vf &error) {
    vf bottom = x[0], top = x[0], found = {};
    for (int i = 1; i < N; i++) {
        bottom = x[i] < bottom ? x[i] : bottom;
        top = x[i] > top ? x[i] : top;
    }
    if (!FREE) bottom = bottom > 0 ? vf{} : bottom;
    best b;
    low = vf{};
    integers codes = {0, (float)high};
    for (double start : AFFINE_STARTS) {
        vf scale = kept<KEEP>((top - bottom) / all((float)(high + start))), end = kept<KEEP>(bottom);
        for (int step = 0; step < AFFINE_STEPS; step++) {
            sums s = sums_at<N, WEIGHTED>(x, weight, codes, scale, end);
            vi better = b.offer(s.error);
            found = better ? scale : found;
            low = better ? end : low;
            vf determinant = sum_w * s.qq - s.q * s.q;
            vf new_scale = ratio(sum_w * s.xq - sum_x * s.q, determinant),
               new_low = ratio(s.qq * sum_x - s.q * s.xq, determinant);
            if (!FREE) {
                vi above = new_low > 0;
                new_scale = above ? ratio(s.xq, s.qq) : new_scale;
                new_low = above ? vf{} : new_low;
            }
            scale = determinant > 0 ? kept<KEEP>(new_scale) : scale;
            end = determinant > 0 ? kept<KEEP>(new_low) : end;
        }
    }
    error = b.error;
    return found;
}

template <int N, bool WEIGHTED> BN_INLINE void sums_of_weights(const vf *x, const vf *weight, vf &sum_w, vf &sum_x) {
    sum_w = vf{};
    sum_x = vf{};
    for (int i = 0; i < N; i++) {
        sum_w += WEIGHTED ? weight[i] : all(1);
        sum_x += WEIGHTED ? weight[i] * x[i] : x[i];
    }
}

// A super-block's scales in two levels: G groups of N weights.
struct two_levels {
    vf d, dmin, s[16], m[16], error;
};

template <int G, int N, bool WEIGHTED, class Codes>
static two_levels search_symmetric(const vf *x, const vf *weight, const Codes &codes, float first, float last,
                                   int limit, float spread) {
    two_levels l = {}, found = {};
    vf starts[10], real[G], ignored;
    for (int g = 0; g < G; g++) {
        int count = scale_starts<N>(x + N * g, first, last, spread, starts);
        real[g] = fit_scale<N, WEIGHTED, false>(x + N * g, weight + N * g, starts, count, codes, ignored);
    }
    l.d = stored(largest<G>(real) / all(-limit));
    for (int g = 0; g < G; g++) l.s[g] = nearest(real[g], inverse(l.d), vf{}, -limit, limit - 1);
    best b;
    for (int round = 0; round < ROUNDS; round++) {
        vf error = {}, xq = {}, qq = {};
        for (int g = 0; g < G; g++) {
            best group;
            vf s = {}, group_xq = {}, group_qq = {};
            for (int step = -1; step <= 1; step++) {
                vf moved = clamp(l.s[g] + (float)step, -limit, limit - 1);
                sums a = sums_at<N, WEIGHTED>(x + N * g, weight + N * g, codes, l.d * moved, vf{});
                vi better = group.offer(a.error);
                s = better ? moved : s;
                group_xq = better ? a.xq : group_xq;
                group_qq = better ? a.qq : group_qq;
            }
            l.s[g] = s;
            error += group.error;
            xq += s * group_xq;
            qq += s * s * group_qq;
        }
        vi better = b.offer(error);
        found.d = better ? l.d : found.d;
        for (int g = 0; g < G; g++) found.s[g] = better ? l.s[g] : found.s[g];
        l.d = stored(ratio(xq, qq));
    }
    found.error = b.error;
    return found;
}

template <int G, int N, bool WEIGHTED>
static two_levels search_affine(const vf *x, const vf *weight, int high, int limit) {
    integers codes = {0, (float)high};
    two_levels l = {}, found = {};
    vf real[G], low[G], sum_w[G], sum_x[G], ignored, most = {}, least = {};
    for (int g = 0; g < G; g++) {
        sums_of_weights<N, WEIGHTED>(x + N * g, weight + N * g, sum_w[g], sum_x[g]);
        real[g] =
            fit_affine<N, WEIGHTED, false, false>(x + N * g, weight + N * g, high, sum_w[g], sum_x[g], low[g], ignored);
        most = g == 0 ? real[g] : real[g] > most ? real[g] : most;
        least = g == 0 ? -low[g] : -low[g] > least ? -low[g] : least;
    }
    l.d = stored(most / all(limit));
    l.dmin = stored(least / all(limit));
    for (int g = 0; g < G; g++) {
        l.s[g] = nearest(real[g], inverse(l.d), vf{}, 0, limit);
        l.m[g] = nearest(-low[g], inverse(l.dmin), vf{}, 0, limit);
    }
    best b;
    for (int round = 0; round < ROUNDS; round++) {
        vf error = {}, ss = {}, sm = {}, mm = {}, sx = {}, mx = {}, inv_dmin = inverse(l.dmin);
        for (int g = 0; g < G; g++) {
            best group;
            vf s = {}, m = {};
            sums kept_sums = {};
            for (int step = -1; step <= 1; step++) {
                vf moved = clamp(l.s[g] + (float)step, 0, limit), scale = l.d * moved, minimum = l.m[g], base = {};
                for (int change = -2; change <= 1;
                     change++) { // -2: the minimum as it is; then 0, -1, 1 from the best one
                    static const float changes[] = {0, 0, -1, 1};
                    if (change > -2) minimum = clamp(base + changes[change + 2], 0, limit);
                    sums a = sums_at<N, WEIGHTED>(x + N * g, weight + N * g, codes, scale, -(l.dmin * minimum));
                    if (change == -2) base = nearest(ratio(scale * a.q - sum_x[g], sum_w[g]), inv_dmin, vf{}, 0, limit);
                    vi better = group.offer(a.error);
                    s = better ? moved : s;
                    m = better ? minimum : m;
                    kept_sums.q = better ? a.q : kept_sums.q;
                    kept_sums.qq = better ? a.qq : kept_sums.qq;
                    kept_sums.xq = better ? a.xq : kept_sums.xq;
                }
            }
            l.s[g] = s;
            l.m[g] = m;
            error += group.error;
            ss += s * s * kept_sums.qq;
            sm += s * m * kept_sums.q;
            mm += m * m * sum_w[g];
            sx += s * kept_sums.xq;
            mx += m * sum_x[g];
        }
        vi better = b.offer(error);
        found.d = better ? l.d : found.d;
        found.dmin = better ? l.dmin : found.dmin;
        for (int g = 0; g < G; g++) {
            found.s[g] = better ? l.s[g] : found.s[g];
            found.m[g] = better ? l.m[g] : found.m[g];
        }
        vf determinant = ss * mm - sm * sm;
        vf d = determinant > 0 ? (sx * mm - mx * sm) / determinant : ratio(sx, ss);
        vf dmin = determinant > 0 ? (sx * sm - mx * ss) / determinant : vf{};
        vi below = dmin < 0;
        l.d = stored(below ? ratio(sx, ss) : d);
        l.dmin = stored(below ? vf{} : dmin);
    }
    found.error = b.error;
    return found;
}

} // namespace
