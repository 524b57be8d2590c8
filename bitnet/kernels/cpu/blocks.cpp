// The GGUF block formats: quantizing and dequantizing rows of blocks. bitnet/quant/blocks is the specification.
//
// Compiled once for each instruction set under another BN_BUILD (setup.py). Quantizing takes a tile of W blocks, turns
// it so that a lane is a block, searches (blocks.h), turns the codes back and packs block by block (blocks_layout.h).
#include "blocks_layout.h"
#include "pool.h"

namespace {

template <int K> void dequantize(const uint8_t *data, int64_t blocks, float *out, int threads) {
    bn::share_out(threads, blocks, [&](int64_t n) {
        block b;
        unpack<K>(data + n * bytes_of(K), b);
        __asm__ volatile("" ::: "memory"); // without it GCC 12 drops the stores below, of 16 groups, as dead ones
        float *y = out + n * size_of(K), d = half_value(b.d);
        constexpr int GROUPS = is_super(K) ? groups_of(K) : 1, SIZE = size_of(K) / GROUPS;
        for (int g = 0; g < GROUPS; g++) {
            const uint8_t *c = b.codes + g * SIZE;
            float scale = is_super(K) ? d * (float)b.s[g] : d;
            constexpr bool minimum = is_affine(K);
            float low = minimum                ? -(half_value(b.dmin) * (float)b.m[g])
                      : K == Q4_1 || K == Q5_1 ? half_value(b.dmin)
                                               : 0.0f;
            auto one = [&](int i) {
                if (is_uneven(K))
                    y[g * SIZE + i] = scale * LEVELS[c[i] & 15];
                else if (K == Q1_0)
                    y[g * SIZE + i] = scale * (float)(2 * (int)c[i] - 1);
                else if (minimum || K == Q4_1 || K == Q5_1)
                    y[g * SIZE + i] = scale * (float)c[i] + low;
                else
                    y[g * SIZE + i] = scale * (float)((int)c[i] - center_of(K));
            };
            // gcc 12 drops loops of 16 weights that it may not unroll and then vectorizes.
            if constexpr (SIZE == 16)
                for (int i = 0; i < SIZE; i++) one(i);
            else {
                BN_LOOP
                for (int i = 0; i < SIZE; i++) one(i);
            }
        }
    });
}

// ---- tiles of W blocks ----

#if defined(BN_AVX512)
#define BN_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define BN_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(BN_AVX2)
#define BN_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define BN_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define BN_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define BN_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

// W x W values: lanes and places change roles. Interleaving the two halves log2(W) times is a transposition.
BN_INLINE void transpose(vf *v) {
    vf other[W];
    for (int step = 1; step < W; step *= 2) {
        for (int i = 0; i < W / 2; i++) {
            other[2 * i] = BN_LOW(v[i], v[i + W / 2]);
            other[2 * i + 1] = BN_HIGH(v[i], v[i + W / 2]);
        }
        memcpy(v, other, sizeof other);
    }
}

// Blocks of n floats at `from`, `stride` apart, to columns; blocks from `count` on are zero.
template <int N> void load(const float *const *from, int count, vf *to) {
    for (int i = 0; i < N; i += W) {
        for (int l = 0; l < W; l++)
            if (l < count)
                memcpy(&to[i + l], from[l] + i, sizeof(vf));
            else
                to[i + l] = vf{};
        transpose(to + i);
    }
}

struct tile {
    vf x[256], weight[256], q[256], sigma2; // importance in `weight`; codes as stored
    two_levels l;
};

struct uneven {
    BN_INLINE_MEMBER vf at(vf x) const {
        vf found = all(LEVELS[0]);
        for (int i = 1; i < 16; i++) found = x + x >= LEVELS[i - 1] + LEVELS[i] ? all(LEVELS[i]) : found;
        return found;
    }
};
struct signs {
    BN_INLINE_MEMBER vf at(vf x) const { return x >= 0 ? all(1) : all(-1); }
};
BN_INLINE vf level_index(vf x) {
    vf found = {};
    for (int i = 1; i < 16; i++) found = x + x >= LEVELS[i - 1] + LEVELS[i] ? all((float)i) : found;
    return found;
}
BN_INLINE vf level_value(vf index) {
    vf found = all(LEVELS[0]);
    for (int i = 1; i < 16; i++) found = index == (float)i ? all(LEVELS[i]) : found;
    return found;
}

// levels.py: ggml's weights of a block of N, and its scale of 32 weights.
template <int N> void weights_of_levels(const tile &t, bool important, vf *weight) {
    vf sigma2 = sum_of_squares<N>(t.x) * (2.0f / N);
    for (int i = 0; i < N; i++)
        weight[i] = important ? t.weight[i] * root(sigma2 + t.x[i] * t.x[i]) : t.x[i] * t.x[i];
}
static vf compatible_levels(const vf *x, const vf *weight) {
    vf extreme = largest<32>(x), scale = {}, best = {};
    for (int step = -8; step <= 7; step++) { // -8: the first trial
        vf inv = step == -8 ? 1 / (-extreme / LEVELS[0]) : ((float)step + LEVELS[0]) / extreme, xq = {}, qq = {};
        for (int i = 0; i < 32; i++) {
            vf level = uneven().at(inv * x[i]), wq = weight[i] * level;
            xq += wq * x[i];
            qq += wq * level;
        }
        vi better = step == -8 ? qq > 0 : (qq > 0) & (xq * xq > best * qq);
        scale = better ? xq / qq : scale;
        best = better ? scale * xq : best;
    }
    return magnitude(extreme) < TINY ? vf{} : scale;
}

// What a scale's code of more bits than it has does to its neighbours in ggml's bytes (kquants._overflow).
template <int K> void overflow(two_levels &l) {
    constexpr int G = groups_of(K);
    vi s[G], over = {};
    for (int g = 0; g < G; g++) {
        s[g] = __builtin_convertvector(l.s[g], vi);
        over |= s[g] > limit_of(K);
    }
    if (!any(over)) return;
    for (int g = 0; g < G; g++) {
        vi wide = s[g];
        if (K == Q2_K) l.m[g] = __builtin_convertvector(__builtin_convertvector(l.m[g], vi) | wide >> 4, vf);
        if (K == Q4_K && g >= 4) s[g] = (wide & 63) | s[g - 4] >> 6 << 4;
        l.s[g] = K == Q5_K ? smallest_of(l.s[g], all(63)) : __builtin_convertvector(s[g] & (K == Q2_K ? 15 : 63), vf);
    }
}

// ggml's fields. `weight` is scratch for types whose weights are not the importance itself.
template <int K> void compatible_super(tile &t, bool important) {
    constexpr int G = groups_of(K), N = 256 / G, high = (1 << bits_of(K)) - 1, center = center_of(K),
                  limit = limit_of(K);
    vf weight[256], sums[G] = {}, scales[G], minimums[G], *x = t.x;
    if constexpr (K == IQ4_XS) {
        weights_of_levels<256>(t, important, weight);
        for (int g = 0; g < G; g++) scales[g] = compatible_levels(x + g * N, weight + g * N);
        vf d = -largest<G>(scales) / (float)limit, inv = inverse_or_zero(d);
        for (int g = 0; g < G; g++) {
            t.l.s[g] = clamp(nearest_int(inv * scales[g]), -limit, limit - 1);
            vf inv_scale = inverse_or_zero(d * t.l.s[g]);
            for (int i = g * N; i < (g + 1) * N; i++) t.q[i] = level_index(inv_scale * x[i]);
        }
        t.l.d = half_of(d);
        return;
    }
    if (important) {
        // 2 / 256 and 1 / 256 are powers of two and round nothing.
        vf sigma2 = sum_of_squares<256>(x) * ((K == Q2_K ? 1.0f : 2.0f) / 256);
        for (int i = 0; i < 256; i++) {
            weight[i] = K == Q6_K ? t.weight[i] : t.weight[i] * root(sigma2 + x[i] * x[i]);
            sums[i / N] += weight[i];
        }
    } else
        for (int g = 0; g < G; g++) {
            vf average = K == Q4_K || K == Q5_K ? root(sum_of_squares<N>(x + g * N) / N) : vf{};
            for (int i = g * N; i < (g + 1) * N; i++) weight[i] = center ? x[i] * x[i] : magnitude(x[i]) + average;
        }
    for (int g = 0; g < G; g++) {
        vf *xg = x + g * N, *wg = weight + g * N, *qg = t.q + g * N;
        if constexpr (center == 0) {
            float first = important ? -0.9f : K == Q4_K ? -1.0f : -0.5f, step = important ? 0.05f : 0.1f;
            int steps = important ? 36 : K == Q4_K ? 20 : 15;
            scales[g] = affine<N>(xg, wg, high, first, step, steps, K == Q2_K && !important, qg, minimums[g]);
        } else if (K == Q3_K && !important)
            scales[g] = symmetric_descent<N>(xg, center, qg);
        else
            scales[g] = symmetric<N>(xg, wg, center, qg);
    }
    two_levels &l = t.l;
    if constexpr (center == 0) {
        if (important) {
            l.d = positive<G>(scales, sums, limit, l.s);
            l.dmin = positive<G>(minimums, sums, limit, l.m);
            overflow<K>(l);
        } else
            for (int which = 0; which < 2; which++) {
                vf *from = which ? minimums : scales, *to = which ? l.m : l.s, most = {};
                for (int g = 0; g < G; g++) most = from[g] > most ? from[g] : most;
                vf inv = most > 0 ? (float)limit / most : vf{};
                for (int g = 0; g < G; g++) to[g] = smallest_of(nearest_int(inv * from[g]), all(limit));
                (which ? l.dmin : l.d) = most > 0 ? most / (float)limit : vf{};
            }
    } else if (K == Q3_K && important) {
        l.d = symmetric<G>(scales, sums, limit, l.s);
        for (int g = 0; g < G; g++) l.s[g] -= (float)limit;
    } else {
        vf extreme = largest<G>(scales), inv = (float)-limit / extreme;
        vi some = K == Q6_K ? magnitude(extreme) >= TINY : extreme != 0;
        l.d = some ? 1 / inv : vf{};
        for (int g = 0; g < G; g++)
            l.s[g] = some ? clamp(nearest_int(inv * scales[g]), -limit, limit - 1) : all(K == Q6_K ? 0 : -limit);
        if (K == Q6_K)
            for (int i = 0; i < 256; i++) t.q[i] = some ? t.q[i] : vf{};
    }
    l.d = half_of(l.d);
    if (center == 0) l.dmin = half_of(l.dmin);
    for (int i = 0; i < 256; i++) {
        vf scale = l.d * l.s[i / N];
        vf again = center ? clamp(nearest_int(x[i] / scale), -center, center - 1) + (float)center
                          : clamp(nearest_int((x[i] + l.dmin * l.m[i / N]) / scale), 0, high);
        t.q[i] = scale != 0 ? again : t.q[i];
    }
}

template <int K> void compatible_simple(tile &t, bool important) {
    constexpr int N = size_of(K), center = center_of(K), high = (1 << bits_of(K)) - 1;
    vf *x = t.x, *q = t.q, weight[32], most = {};
    if (K == Q1_0) {
        vf sum = {};
        for (int i = 0; i < N; i++) {
            sum += magnitude(x[i]);
            q[i] = x[i] >= 0 ? all(1) : vf{};
        }
        t.l.d = half_of(sum / (float)N);
        return;
    }
    if (K >= TQ1_0 || K == Q8_0) {
        for (int i = 0; i < N; i++) most = largest_of(most, magnitude(x[i]));
        vf d = K == Q8_0 ? most / 127 : most, inv = inverse_or_zero(d);
        for (int i = 0; i < N; i++) {
            vf scaled = x[i] * inv;
            q[i] = round_away(scaled) + (float)center;
            if (K >= Q2_0) q[i] = magnitude(scaled) < 1e9f ? q[i] : vf{}; // ggml's smallest integer, and then 0
        }
        t.l.d = half_of(d);
        return;
    }
    if (K == IQ4_NL) {
        weights_of_levels<32>(t, important, weight);
        vf scale = compatible_levels(x, weight), inv = inverse_or_zero(scale);
        for (int i = 0; i < 32; i++) q[i] = level_index(inv * x[i]);
        t.l.d = half_of(scale);
        return;
    }
    if (important) {
        for (int i = 0; i < 32; i++) weight[i] = t.weight[i] * root(t.sigma2 + x[i] * x[i]);
        vf minimum;
        if (center)
            t.l.d = half_of(symmetric<32>(x, weight, center, q));
        else {
            t.l.d = half_of(affine<32>(x, weight, high, -0.9f, 0.05f, 36, false, q, minimum));
            t.l.dmin = half_of(-minimum);
        }
        return;
    }
    vf low = x[0], d;
    most = x[0];
    for (int i = 1; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        most = x[i] > most ? x[i] : most;
    }
    d = center ? largest<32>(x) / (float)-center : (most - low) / (float)high;
    vf inv = inverse_or_zero(d);
    for (int i = 0; i < 32; i++)
        q[i] =
            smallest_of(truncate(center ? x[i] * inv + ((float)center + 0.5f) : (x[i] - low) * inv + 0.5f), all(high));
    t.l.d = half_of(d);
    t.l.dmin = half_of(low);
}

// The default search; keeps what is there where it is no better.
template <int K, bool WEIGHTED> void improve_super(tile &t) {
    constexpr int G = groups_of(K), N = 256 / G, high = (1 << bits_of(K)) - 1, center = center_of(K),
                  limit = limit_of(K);
    two_levels found;
    constexpr bool affine = is_affine(K);
    if constexpr (affine)
        found = search_affine<G, N, WEIGHTED>(t.x, t.weight, high, limit);
    else if constexpr (K == IQ4_XS)
        found = search_symmetric<G, N, WEIGHTED>(t.x, t.weight, uneven(), LEVELS[0], LEVELS[15], limit, 14);
    else
        found = search_symmetric<G, N, WEIGHTED>(t.x, t.weight, integers{-center, center - 1}, -center, center - 1,
                                                 limit, K == Q3_K ? 1 : 2);
    vf before = {};
    for (int g = 0; g < G; g++) {
        vf scale = t.l.d * t.l.s[g], low = affine ? -(t.l.dmin * t.l.m[g]) : vf{}, error = {};
        for (int i = g * N; i < (g + 1) * N; i++) {
            vf code = K == IQ4_XS ? level_value(t.q[i]) : t.q[i] - (float)center;
            vf difference = t.x[i] - (scale * code + low);
            error += (WEIGHTED ? t.weight[i] * difference : difference) * difference;
        }
        before += error;
    }
    vi better = found.error < before;
    if (!any(better)) return;
    t.l.d = better ? found.d : t.l.d;
    if (affine) t.l.dmin = better ? found.dmin : t.l.dmin;
    for (int g = 0; g < G; g++) {
        t.l.s[g] = better ? found.s[g] : t.l.s[g];
        if (affine) t.l.m[g] = better ? found.m[g] : t.l.m[g];
        vf inv = inverse(found.d * found.s[g]), low = affine ? -(found.dmin * found.m[g]) : vf{};
        for (int i = g * N; i < (g + 1) * N; i++) {
            vf q = K == IQ4_XS ? level_index(t.x[i] * inv)
                   : affine    ? nearest(t.x[i], inv, low, 0, high)
                               : nearest(t.x[i], inv, low, -center, center - 1) + (float)center;
            t.q[i] = better ? q : t.q[i];
        }
    }
}

template <int K, bool WEIGHTED> void improve_simple(tile &t) {
    constexpr int N = size_of(K), center = center_of(K), high = (1 << bits_of(K)) - 1;
    constexpr bool minimum = K == Q4_1 || K == Q5_1, ternary = K == TQ1_0 || K == TQ2_0, two_bits = K >= Q2_0;
    const float first = K == Q8_0 ? -127 : -center, last = ternary ? 1 : two_bits ? 2 : high - center;
    integers codes = {minimum ? 0.0f : first, last};
    vf error, scale, low = {}, starts[10], sum_w, sum_x;
    if constexpr (minimum) {
        sums_of_weights<N, WEIGHTED>(t.x, t.weight, sum_w, sum_x);
        scale = fit_affine<N, WEIGHTED, true, true>(t.x, t.weight, high, sum_w, sum_x, low, error);
    } else if constexpr (ternary) {
        vf mean = {};
        starts[0] = vf{};
        for (int i = 0; i < N; i++) {
            mean += magnitude(t.x[i]);
            starts[0] = largest_of(starts[0], magnitude(t.x[i]));
        }
        mean = mean / (float)N;
        for (int i = 0; i < 6; i++) starts[i + 1] = mean * (1.0f + 0.25f * (float)i + (i == 5 ? 0.25f : 0.0f));
        scale = fit_scale<N, WEIGHTED, true>(t.x, t.weight, starts, 7, codes, error);
    } else if constexpr (K == Q1_0) {
        starts[0] = vf{};
        for (int i = 0; i < N; i++) starts[0] += magnitude(t.x[i]);
        starts[0] = starts[0] / (float)N;
        scale = fit_scale<N, WEIGHTED, true>(t.x, t.weight, starts, 1, signs(), error);
    } else if constexpr (K == IQ4_NL) {
        int count = scale_starts<N>(t.x, LEVELS[0], LEVELS[15], 14, starts);
        scale = fit_scale<N, WEIGHTED, true>(t.x, t.weight, starts, count, uneven(), error);
    } else {
        int count = scale_starts<N>(t.x, first, last, two_bits ? 0.5f : K == Q4_0 ? 1 : 2, starts);
        scale = fit_scale<N, WEIGHTED, true>(t.x, t.weight, starts, count, codes, error);
    }
    vf before = {};
    for (int i = 0; i < N; i++) {
        vf code = K == IQ4_NL ? level_value(t.q[i]) : K == Q1_0 ? t.q[i] * 2 - 1 : t.q[i] - (float)center;
        vf difference = t.x[i] - (t.l.d * code + (minimum ? t.l.dmin : vf{}));
        before += (WEIGHTED ? t.weight[i] * difference : difference) * difference;
    }
    vi better = error < before;
    t.l.d = better ? scale : t.l.d;
    if (minimum) t.l.dmin = better ? low : t.l.dmin;
    vf inv = inverse(scale);
    for (int i = 0; i < N; i++) {
        vf q = K == IQ4_NL ? level_index(t.x[i] * inv)
               : K == Q1_0 ? (t.x[i] * inv >= 0 ? all(1) : vf{})
                           : codes.at((t.x[i] - low) * inv) + (float)center;
        t.q[i] = better ? q : t.q[i];
    }
}

template <int K> void store(const tile &t, int count, uint8_t *out) {
    constexpr int N = size_of(K), G = groups_of(K);
    static_assert(N % 4 == 0, "codes leave in fours");
    block blocks[W];
    for (int i = 0; i < N; i += 4) {
        vi four = {};
        for (int j = 0; j < 4; j++) four |= __builtin_convertvector(t.q[i + j], vi) << (8 * j);
        for (int l = 0; l < W; l++) memcpy(blocks[l].codes + i, (const char *)&four + 4 * l, 4);
    }
    for (int l = 0; l < count; l++) {
        block &b = blocks[l];
        b.d = half_bits(t.l.d[l]);
        constexpr bool super_minimum = is_affine(K);
        b.dmin = super_minimum || K == Q4_1 || K == Q5_1 ? half_bits(t.l.dmin[l]) : 0;
        for (int g = 0; is_super(K) && g < G; g++) {
            b.s[g] = (int16_t)t.l.s[g][l];
            b.m[g] = super_minimum ? (int16_t)t.l.m[g][l] : 0;
        }
        pack<K>(b, out + l * bytes_of(K));
    }
}

struct job {
    const float *x, *importance; // importance [columns] or null
    float *sigma2;               // [rows], room for the rows' mean squares
    int64_t rows, columns;
    uint8_t *out;
    int compatible, threads;
};

template <int K> void quantize(const job &j) {
    constexpr int N = size_of(K);
    bool important = j.importance != nullptr;
    int64_t per_row = j.columns / N, blocks = j.rows * per_row;
    if (important && (K == Q4_0 || K == Q4_1 || K == Q5_0 || K == Q5_1)) {
        bn::share_out(j.threads, j.rows, [&](int64_t r) {
            float sum = 0;
            for (int64_t c = 0; c < j.columns; c++) sum += j.x[r * j.columns + c] * j.x[r * j.columns + c];
            j.sigma2[r] = sum / (float)j.columns;
        });
    }
    bn::share_out(j.threads, (blocks + W - 1) / W, [&](int64_t index) {
        tile t;
        int64_t first = index * W;
        const float *from[W], *weights[W];
        int count = (int)(blocks - first < W ? blocks - first : W);
        for (int l = 0; l < count; l++) {
            from[l] = j.x + (first + l) * N;
            weights[l] = important ? j.importance + (first + l) % per_row * N : nullptr;
            t.sigma2[l] = important && N == 32 ? j.sigma2[(first + l) / per_row] : 0;
        }
        for (int l = count; l < W; l++) t.sigma2[l] = 0;
        load<N>(from, count, t.x);
        if (important) load<N>(weights, count, t.weight);
        if constexpr (is_super(K)) {
            compatible_super<K>(t, important);
            if (!j.compatible) important ? improve_super<K, true>(t) : improve_super<K, false>(t);
        } else {
            compatible_simple<K>(t, important);
            if (!j.compatible) important ? improve_simple<K, true>(t) : improve_simple<K, false>(t);
        }
        store<K>(t, count, j.out + first * bytes_of(K));
    });
}

} // namespace

#define BN_JOIN2(a, b) a##b
#define BN_JOIN(a, b) BN_JOIN2(a, b)
#define BN_EXPORT extern "C" __attribute__((visibility("default")))
#define BN_KINDS(call)                       \
    switch (kind) {                          \
        case Q4_0: call(Q4_0); return 0;     \
        case Q4_1: call(Q4_1); return 0;     \
        case Q5_0: call(Q5_0); return 0;     \
        case Q5_1: call(Q5_1); return 0;     \
        case Q8_0: call(Q8_0); return 0;     \
        case Q2_K: call(Q2_K); return 0;     \
        case Q3_K: call(Q3_K); return 0;     \
        case Q4_K: call(Q4_K); return 0;     \
        case Q5_K: call(Q5_K); return 0;     \
        case Q6_K: call(Q6_K); return 0;     \
        case IQ4_NL: call(IQ4_NL); return 0; \
        case IQ4_XS: call(IQ4_XS); return 0; \
        case TQ1_0: call(TQ1_0); return 0;   \
        case TQ2_0: call(TQ2_0); return 0;   \
        case Q1_0: call(Q1_0); return 0;     \
        case Q2_0: call(Q2_0); return 0;     \
        case PQ2_0: call(PQ2_0); return 0;   \
        default: return 1;                   \
    }

// `kind` is ggml's number of the type. Both return 1 for one that isn't here.
BN_EXPORT int BN_JOIN(bn_blocks_quantize_, BN_BUILD)(const float *x, int64_t rows, int64_t columns, int kind,
                                                     const float *importance, float *sigma2, int compatible,
                                                     uint8_t *out, int threads) {
    job j = {x, importance, sigma2, rows, columns, out, compatible, threads};
#define BN_CALL(K) quantize<K>(j)
    BN_KINDS(BN_CALL)
#undef BN_CALL
}

BN_EXPORT int BN_JOIN(bn_blocks_dequantize_, BN_BUILD)(const uint8_t *data, int64_t blocks, int kind, float *out,
                                                       int threads) {
#define BN_CALL(K) dequantize<K>(data, blocks, out, threads)
    BN_KINDS(BN_CALL)
#undef BN_CALL
}
