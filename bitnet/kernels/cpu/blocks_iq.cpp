// The searches for the IQ types of codebooks: bitnet/quant/blocks/ggml_iq.py and iq_search.py with the same arithmetic in
// the same order, where comments and names are. Bytes are made of what comes out in bitnet/quant/blocks/iquants.py.
//
// Compiled once for each instruction set under another BN_BUILD (setup.py). The default search has an entry of the
// codebook in each lane, and the splits of IQ1 a group.
#include "blocks_layout.h"
#include "pool.h"

#include <vector>

extern "C" {
struct bn_codebook {
    const float *search; // [entries, size]: what entries are in ggml's search, 1, 3, 5, .. or -1, 0, 1
    const float *values; // [size, entries]: what they are in a block
    const int32_t *place;
    const int16_t *neighbours; // [base^size, width], -1 behind the last
    int32_t entries, size, base, width;
};
struct bn_iq_job {
    const float *x, *importance; // importance [columns] or null
    int64_t blocks, per_row;     // super-blocks, and of a row
    int32_t kind, compatible, threads;
    int16_t *index; // [blocks, 256 / size]
    uint8_t *signs; // [blocks, 32]
    uint16_t *scale;
    int16_t *scales; // [blocks, groups]
};
}

namespace {

constexpr int IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ3_S = 21, IQ2_S = 22, IQ1_M = 29;
constexpr bool is_ternary(int k) { return k == IQ1_S || k == IQ1_M; }
constexpr int group_of(int k) { return k == IQ2_XS || k == IQ2_S || k == IQ1_M ? 16 : 32; }
constexpr int vector_of(int k) { return k == IQ3_XXS || k == IQ3_S ? 4 : 8; }
constexpr bool has_parity(int k) { return k == IQ2_XXS || k == IQ2_XS || k == IQ3_XXS; }
constexpr float unit_of(int k) { return k == IQ3_XXS ? 0.25f : k == IQ3_S || is_ternary(k) ? 1.0f : 0.125f; }
constexpr int last_factor(int k) { return is_ternary(k) ? 7 : 15; }

struct vectors {
    int16_t index[64];
    uint8_t signs[32]; // of IQ1 the shift of each vector
    float d;           // a float16
    int scales[16];
};

int nearest_one(float x) {
    float moved = x + ROUND;
    int32_t bits;
    memcpy(&bits, &moved, 4);
    return (bits & 0x7FFFFF) - 0x400000;
}
int within(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
float rounded_half(float x) { return half_value(half_bits(x)); }

// ---- ggml_iq.py ----

int number_of(const int *digits, const bn_codebook &book) {
    int number = 0, power = 1;
    for (int i = 0; i < book.size; i++, power *= book.base) number += digits[i] * power;
    return number;
}

int nearest_neighbour(const bn_codebook &book, int number, const float *x, const float *weight, float scale,
                      float shift) {
    const int16_t *next = book.neighbours + (int64_t)number * book.width;
    int found = next[0];
    float best = INFINITY;
    for (int n = 0; n < book.width && next[n] >= 0; n++) {
        const float *entry = book.search + next[n] * book.size;
        float error = 0;
        for (int i = 0; i < book.size; i++) {
            float difference = scale * (entry[i] + shift) - x[i];
            error += weight[i] * difference * difference;
        }
        if (error < best) {
            best = error;
            found = next[n];
        }
    }
    return found;
}

int look_up(const bn_codebook &book, const float *x, const float *root_weight, float inv_scale, float scale,
            bool &exact) {
    int digits[8];
    for (int i = 0; i < book.size; i++)
        digits[i] = within(nearest_one(0.5f * (inv_scale * x[i] - 1)), 0, book.base - 1);
    int number = number_of(digits, book), index = book.place[number];
    exact = index >= 0;
    return exact ? index : nearest_neighbour(book, number, x, root_weight, scale, 0);
}

// Magnitudes and signs of 8 weights.
uint8_t signs_of(const float *x, const float *weight, bool parity, float *magnitude) {
    int signs = 0, least = 0;
    float smallest = INFINITY;
    for (int i = 0; i < 8; i++) {
        magnitude[i] = x[i] >= 0 ? x[i] : -x[i];
        signs |= (x[i] < 0) << i;
        float term = weight[i] * x[i] * x[i];
        if (term < smallest) {
            smallest = term;
            least = i;
        }
    }
    if (parity && __builtin_popcount(signs) % 2) {
        magnitude[least] = -magnitude[least];
        signs ^= 1 << least;
    }
    return (uint8_t)signs;
}

// Integers of the groups' scales, and d before its factor.
template <int K> float factors_of(const float *scales, int largest, int *factors) {
    constexpr int G = 256 / group_of(K);
    float high = 0;
    for (int g = 0; g < G; g++) high = scales[g] > high ? scales[g] : high;
    float d = high / (float)largest, inv = 1 / d;
    for (int g = 0; g < G; g++)
        factors[g] = high > 0 ? within(nearest_one(0.5f * (inv * scales[g] - 1)), 0, last_factor(K)) : 0;
    return d;
}

void sums_of(const float *x, const float *weight, const float *q, int n, float &xq, float &qq) {
    xq = qq = 0;
    for (int i = 0; i < n; i++) {
        xq += weight[i] * x[i] * q[i];
        qq += weight[i] * q[i] * q[i];
    }
}

// positive() of a super-block's 8 groups of 32 magnitudes.
void positive_scales(const float *magnitude, const float *weight, int levels, float *scales) {
    for (int first = 0; first < 8; first += W) {
        vf x[32] = {}, w[32] = {}, codes[32];
        for (int l = 0; l < W && first + l < 8; l++)
            for (int i = 0; i < 32; i++) {
                x[i][l] = magnitude[32 * (first + l) + i];
                w[i][l] = weight[32 * (first + l) + i];
            }
        vf scale = positive<32>(x, w, levels, codes);
        for (int l = 0; l < W && first + l < 8; l++) scales[first + l] = scale[l];
    }
}

template <int K> void compatible_signed(const bn_codebook &book, const float *x, const float *weight, vectors &out) {
    constexpr int N = group_of(K), G = 256 / N, SIZE = vector_of(K), V = N / SIZE;
    constexpr int TOP = K == IQ3_XXS || K == IQ3_S ? 15 : 5, STEPS = K == IQ2_XXS ? 6 : K == IQ3_XXS ? 15 : 9;
    constexpr float STEP = TOP == 15 ? 0.2f : 0.1f, TINY_GROUP = K == IQ2_S || K == IQ3_XXS ? 1e-8f : TINY;
    constexpr float FACTOR = K == IQ2_S ? 0.9875f : K == IQ3_XXS ? 1.0125f : K == IQ3_S ? 1.033f : 1.0f;
    float magnitude[256], root_weight[256], scales[G], extents[8];
    bool dead[G];
    memset(&out, 0, sizeof out);
    for (int i = 0; i < 256; i++) root_weight[i] = sqrtf(weight[i]);
    uint8_t signs[32];
    for (int j = 0; j < 32; j++) signs[j] = signs_of(x + 8 * j, weight + 8 * j, has_parity(K), magnitude + 8 * j);
    if (K == IQ2_XXS) positive_scales(magnitude, weight, book.base + 1, extents);
    for (int g = 0; g < G; g++) {
        const float *m = magnitude + g * N, *w = weight + g * N, *r = root_weight + g * N;
        float largest = m[0];
        for (int i = 1; i < N; i++) largest = m[i] > largest ? m[i] : largest;
        float scale = largest / (float)TOP, extent = largest, q[N], xq, qq, best = 0;
        dead[g] = K == IQ3_S ? largest <= 0 : largest < TINY_GROUP;
        if (K == IQ2_XXS) {
            scale = extents[g];
            extent = scale * (float)book.base;
            dead[g] |= extent <= 0;
        }
        scales[g] = 0;
        if (dead[g]) continue;
        int index[V] = {}, found[V];
        bool on_grid[V], exact[V];
        for (int v = 0; v < V; v++) on_grid[v] = K != IQ3_S && K != IQ2_XXS;
        auto fill = [&](const int *from) {
            for (int v = 0; v < V; v++) memcpy(q + v * SIZE, book.search + from[v] * SIZE, sizeof(float) * SIZE);
            sums_of(m, w, q, N, xq, qq);
        };
        for (int step = -STEPS; step <= STEPS; step++) {
            float inv = ((float)TOP + (float)step * STEP) / extent, at = 1 / inv;
            for (int v = 0; v < V; v++) found[v] = look_up(book, m + v * SIZE, r + v * SIZE, inv, at, exact[v]);
            fill(found);
            if (!(qq > 0 && xq * xq > best * qq)) continue;
            scale = xq / qq;
            best = scale * xq;
            memcpy(index, found, sizeof index);
            if (K != IQ2_XXS) memcpy(on_grid, exact, sizeof on_grid);
        }
        bool again = false;
        for (int v = 0; v < V; v++) again |= !on_grid[v];
        if (again && scale > 0) {
            for (int v = 0; v < V; v++)
                if (K == IQ3_S || !on_grid[v])
                    index[v] = look_up(book, m + v * SIZE, r + v * SIZE, 1 / scale, scale, exact[v]);
            fill(index);
            if (qq > 0) scale = xq / qq;
        }
        if (scale < 0) {
            scale = -scale;
            for (int j = 0; j < N / 8; j++) signs[g * N / 8 + j] ^= 255;
        }
        scales[g] = scale;
        for (int v = 0; v < V; v++) out.index[g * V + v] = (int16_t)index[v];
        memcpy(out.signs + g * N / 8, signs + g * N / 8, N / 8);
    }
    if (K == IQ3_S) { // groups that are not dead close up, but not the ninth bits of their indices
        int16_t low[64] = {};
        uint8_t closed[32] = {};
        int at = 0;
        for (int g = 0; g < G; g++) {
            if (dead[g]) continue;
            for (int v = 0; v < V; v++) low[at * V + v] = out.index[g * V + v] & 255;
            memcpy(closed + at * N / 8, out.signs + g * N / 8, N / 8);
            at++;
        }
        for (int v = 0; v < 64; v++) out.index[v] = (int16_t)((out.index[v] & ~255) | low[v]);
        memcpy(out.signs, closed, 32);
    }
    float d = factors_of<K>(scales, 31, out.scales);
    if (!(d > 0) && K != IQ2_S && K != IQ3_S) {
        bool none = true;
        for (int g = 0; g < G; g++) none &= !(scales[g] > 0);
        if (none) memset(&out, 0, sizeof out);
    }
    out.d = rounded_half(d * FACTOR);
}

// The best split of each of W groups' sorted weights, [N] by [lane]; levels of both shifts are differences exact in floats.
struct split {
    vf scale, best;
    vi first, last, choice;
    BN_INLINE_MEMBER void offer(vf xq, vf qq, int i, int j, int which) {
        vi better = (qq > 0) & (xq * xq > best * qq);
        scale = better ? xq / qq : scale;
        best = better ? scale * xq : best;
        first = better ? vi{} + i : first;
        last = better ? vi{} + j : last;
        choice = better ? vi{} + which : choice;
    }
};

template <int K> void find_split(const vf *sum_x, const vf *sum_w, const vf *half_x, const vf *half_w, split &s) {
    constexpr int N = group_of(K);
    constexpr float LEVEL[2][3] = {{-0.875f, 0.125f, 1.125f}, {-1.125f, -0.125f, 0.875f}};
    for (int i = 0; i <= N; i++)
        for (int j = i; j <= N; j++) {
            if constexpr (K == IQ1_S) {
                for (int down = 0; down < 2; down++) {
                    const float *level = LEVEL[down];
                    vf xq = (sum_x[i] - sum_x[0]) * level[0] + (sum_x[j] - sum_x[i]) * level[1] +
                            (sum_x[N] - sum_x[j]) * level[2];
                    vf qq = (sum_w[i] - sum_w[0]) * level[0] * level[0] + (sum_w[j] - sum_w[i]) * level[1] * level[1] +
                            (sum_w[N] - sum_w[j]) * level[2] * level[2];
                    s.offer(xq, qq, i, j, down);
                }
            } else {
                vf xq[2][2], qq[2][2];
                for (int half = 0; half < 2; half++) {
                    const vf *px = half ? half_x : sum_x, *pw = half ? half_w : sum_w;
                    vf both = px[i] + px[j];
                    for (int down = 0; down < 2; down++) {
                        const float *level = LEVEL[down];
                        xq[half][down] = px[N] * level[2] - both;
                        qq[half][down] = pw[N] * level[2] * level[2] +
                                         pw[i] * (level[0] * level[0] - level[1] * level[1]) +
                                         pw[j] * (level[1] * level[1] - level[2] * level[2]);
                    }
                }
                for (int which = 0; which < 4; which++)
                    s.offer(xq[0][which / 2] + xq[1][which % 2], qq[0][which / 2] + qq[1][which % 2], i, j, which);
            }
        }
}

// For IQ1_S choice is whether the shift goes down; for IQ1_M two bits, the first vector's the higher one.
template <int K> void compatible_ternary(const bn_codebook &book, const float *x, const float *weight, vectors &out) {
    constexpr int N = group_of(K), G = 256 / N, V = N / 8;
    constexpr float SMALLEST = K == IQ1_S ? 1e-12f : 1e-7f;
    float scales[G];
    memset(&out, 0, sizeof out);
    for (int from = 0; from < G; from += W) {
        int order[W][N], count = G - from < W ? G - from : W;
        vf sum_x[N + 1] = {}, sum_w[N + 1] = {}, half_x[N + 1] = {}, half_w[N + 1] = {};
        split s = {vf{}, all(-3.402823466e38f), vi{} - 1, vi{} - 1, vi{}};
        for (int l = 0; l < count; l++) {
            const float *xg = x + (from + l) * N, *wg = weight + (from + l) * N;
            float largest = 0;
            for (int i = 0; i < N; i++) {
                largest = fabsf(xg[i]) > largest ? fabsf(xg[i]) : largest;
                int at = i;
                for (; at > 0 && xg[order[l][at - 1]] > xg[i]; at--) order[l][at] = order[l][at - 1];
                order[l][at] = i;
            }
            s.scale[l] = largest;
            for (int i = 0; i < N; i++) {
                int from_group = order[l][i];
                bool second = K == IQ1_M && from_group >= 8;
                float w = wg[from_group], wx = w * xg[from_group];
                sum_x[i + 1][l] = second ? sum_x[i][l] : sum_x[i][l] + wx;
                sum_w[i + 1][l] = second ? sum_w[i][l] : sum_w[i][l] + w;
                half_x[i + 1][l] = second ? half_x[i][l] + wx : half_x[i][l];
                half_w[i + 1][l] = second ? half_w[i][l] + w : half_w[i][l];
            }
        }
        vf largest = s.scale;
        find_split<K>(sum_x, sum_w, half_x, half_w, s);
        for (int l = 0; l < count; l++) {
            int g = from + l, digits[N], choice = s.choice[l], index[V];
            const float *xg = x + g * N, *wg = weight + g * N;
            scales[g] = 0;
            if (largest[l] < SMALLEST || s.first[l] < 0) continue;
            float scale = s.scale[l];
            bool turned = scale < 0, off = false;
            for (int i = 0; i < N; i++) {
                int digit = (i >= s.first[l]) + (i >= s.last[l]);
                digits[order[l][i]] = turned ? 2 - digit : digit;
            }
            if (turned) choice = K == IQ1_S ? 1 - choice : 3 - choice;
            scale = fabsf(scale);
            float q[N], xq = 0, qq = 0;
            for (int v = 0; v < V; v++) {
                int down = K == IQ1_S ? choice : v == 0 ? choice / 2 : choice % 2;
                float shift = down ? -0.125f : 0.125f;
                int number = number_of(digits + 8 * v, book);
                index[v] = book.place[number];
                if (index[v] < 0) {
                    off = true;
                    index[v] = nearest_neighbour(book, number, xg + 8 * v, wg + 8 * v, scale, shift);
                }
                for (int i = 0; i < 8; i++) q[8 * v + i] = book.search[index[v] * 8 + i] + shift;
                out.index[g * V + v] = (int16_t)index[v];
                out.signs[g * V + v] = (uint8_t)down;
            }
            for (int i = 0; i < N; i++) {
                xq += wg[i] * q[i] * xg[i];
                qq += wg[i] * q[i] * q[i];
            }
            scales[g] = off && xq > 0 && qq > 0 ? xq / qq : scale;
        }
    }
    float d = factors_of<K>(scales, 15, out.scales);
    if (!(d > 0)) memset(out.signs, 0, sizeof out.signs);
    if (K == IQ1_M) {
        float xq = 0, qq = 0;
        for (int i = 0; i < 256; i++) {
            float shift = out.signs[i / 8] ? -0.125f : 0.125f;
            float q = (book.search[out.index[i / 8] * 8 + i % 8] + shift) * (float)(2 * out.scales[i / N] + 1);
            xq += weight[i] * q * x[i];
            qq += weight[i] * q * q;
        }
        if (d > 0 && qq > 0) d = xq / qq;
    }
    out.d = rounded_half(d * (K == IQ1_S ? 1.125f : 1.1125f));
}

} // namespace

#include "blocks_iq_search.h"
