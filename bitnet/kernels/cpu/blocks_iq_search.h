// The default search of blocks_iq.cpp: bitnet/quant/blocks/iq_search.py, and what Python calls.
#pragma once

namespace {

constexpr int SEARCH_STEPS = 2, SEARCH_ROUNDS = 3, VARIANTS = 2;
constexpr double SEARCH_STARTS[] = {0.7, 0.85, 1.0, 1.15};
constexpr float SEARCH_TERNARY_STARTS[] = {1.0f, 1.5f, 2.0f};

struct found_vectors {
    float error, xq, qq;
};

// All entries for the vectors of a super-block: 2 xq of each variant, and qq, which IQ1 has for each variant, too.
template <int K> struct candidates {
    static constexpr int N = group_of(K), G = 256 / N, SIZE = vector_of(K), V = N / SIZE, ALL = 256 / SIZE;
    static constexpr int COUNT = K == IQ3_XXS || is_ternary(K) ? 2 : 1, QQ = is_ternary(K) ? 2 : 1;
    const bn_codebook &book;
    const int entries;
    std::vector<float> twice_xq, qq;
    float wx[256], w[256];
    bool odd[32];
    uint8_t negative[32];

    candidates(const bn_codebook &book) : book(book), entries(book.entries) {}

    float *of_xq(int variant, int vector) { return twice_xq.data() + ((size_t)variant * ALL + vector) * entries; }
    float *of_qq(int variant, int vector) {
        return qq.data() + ((size_t)(QQ == 2 ? variant : 0) * ALL + vector) * entries;
    }

    void fill(const float *x, const float *weight) {
        twice_xq.resize((size_t)COUNT * ALL * entries);
        qq.resize((size_t)QQ * ALL * entries);
        for (int i = 0; i < 256; i++) {
            w[i] = weight[i];
            wx[i] = weight[i] * (is_ternary(K) ? x[i] : fabsf(x[i]));
        }
        for (int j = 0; j < 32; j++) {
            negative[j] = 0;
            for (int i = 0; i < 8; i++) negative[j] |= (uint8_t)((x[8 * j + i] < 0) << i);
            odd[j] = __builtin_popcount(negative[j]) % 2;
        }
        for (int v = 0; v < ALL; v++)
            for (int shift = 0; shift < QQ; shift++)
                for (int e = 0; e < entries; e += W) {
                    vf xq = {}, sum = {}, least = all(INFINITY);
                    for (int i = 0; i < SIZE; i++) {
                        vf value;
                        memcpy(&value, book.values + (size_t)i * entries + e, sizeof value);
                        if (is_ternary(K)) value = value + (shift ? -0.125f : 0.125f);
                        vf term = wx[v * SIZE + i] * value;
                        xq += term;
                        sum += w[v * SIZE + i] * (value * value);
                        least = smallest_of(least, term);
                    }
                    vf flipped = xq - 2 * least, plain = xq + xq, other = flipped + flipped;
                    if (K != IQ3_XXS && has_parity(K) && odd[v]) plain = other;
                    memcpy(of_xq(shift, v) + e, &plain, sizeof plain);
                    if (K == IQ3_XXS) memcpy(of_xq(1, v) + e, &other, sizeof other);
                    memcpy(of_qq(shift, v) + e, &sum, sizeof sum);
                }
    }

    int best(int variant, int vector, float scale, float &lowest) {
        const float *xq = of_xq(variant, vector), *sums = of_qq(variant, vector);
        vf least = all(INFINITY), at = {};
        vf lane = {};
        for (int l = 0; l < W; l++) lane[l] = (float)l;
        for (int e = 0; e < entries; e += W) {
            vf a, b;
            memcpy(&a, sums + e, sizeof a);
            memcpy(&b, xq + e, sizeof b);
            vf term = scale * a - b;
            vi better = term < least;
            least = better ? term : least;
            at = better ? lane : at;
            lane += (float)W;
        }
        int found = (int)at[0];
        lowest = least[0];
        for (int l = 1; l < W; l++)
            if (least[l] < lowest || (least[l] == lowest && (int)at[l] < found)) {
                lowest = least[l];
                found = (int)at[l];
            }
        return found;
    }

    // The best entries of a group, and of each vector the variant.
    found_vectors at(int group, float scale, int *index, int *variant) {
        float lowest[VARIANTS][V];
        int found[VARIANTS][V];
        for (int c = 0; c < COUNT; c++)
            for (int v = 0; v < V; v++) found[c][v] = best(c, group * V + v, scale, lowest[c][v]);
        for (int v = 0; v < V; v++) variant[v] = 0;
        if constexpr (K == IQ1_M) {
            for (int v = 0; v < V; v++) variant[v] = lowest[1][v] < lowest[0][v];
        } else if constexpr (K == IQ1_S) {
            float up = 0, down = 0;
            for (int v = 0; v < V; v++) up += lowest[0][v], down += lowest[1][v];
            for (int v = 0; v < V; v++) variant[v] = down < up;
        } else if constexpr (K == IQ3_XXS) {
            for (int v = 0; v < V; v += 2) {
                if (!odd[(group * V + v) / 2]) continue;
                bool second = lowest[0][v] + lowest[1][v + 1] < lowest[1][v] + lowest[0][v + 1];
                variant[v + second] = 1;
            }
        }
        found_vectors sums = {};
        float error = 0;
        for (int v = 0; v < V; v++) {
            int c = variant[v];
            index[v] = found[c][v];
            error += lowest[c][v];
            sums.xq += 0.5f * of_xq(c, group * V + v)[index[v]];
            sums.qq += of_qq(c, group * V + v)[index[v]];
        }
        sums.error = scale * error;
        return sums;
    }
    found_vectors at(int group, float scale) {
        int index[V], variant[V];
        return at(group, scale, index, variant);
    }

    // The entries at the scales of `out`, with their signs or shifts.
    void choose(vectors &out) {
        memcpy(out.signs, negative, 32);
        for (int g = 0; g < G; g++) {
            int index[V], variant[V];
            at(g, out.d * unit_of(K) * (float)(2 * out.scales[g] + 1), index, variant);
            for (int v = 0; v < V; v++) {
                int place = g * V + v;
                out.index[place] = (int16_t)index[v];
                if (is_ternary(K)) out.signs[place] = (uint8_t)variant[v];
                if (!has_parity(K) || !(K == IQ3_XXS ? variant[v] : odd[place])) continue;
                int least = 0;
                float smallest = INFINITY;
                for (int i = 0; i < SIZE; i++) {
                    float term = wx[place * SIZE + i] * book.values[(size_t)i * entries + index[v]];
                    if (term < smallest) {
                        smallest = term;
                        least = i;
                    }
                }
                out.signs[place * SIZE / 8] ^= (uint8_t)(1 << (place * SIZE % 8 + least));
            }
        }
    }
};

template <int K>
float error_of(const bn_codebook &book, const vectors &v, const float *x, const float *weight) {
    constexpr int N = group_of(K), SIZE = vector_of(K);
    float error = 0;
    for (int g = 0; g < 256 / N; g++) {
        float scale = v.d * unit_of(K) * (float)(2 * v.scales[g] + 1), sum = 0;
        for (int i = g * N; i < (g + 1) * N; i++) {
            float value = book.values[(size_t)(i % SIZE) * book.entries + v.index[i / SIZE]];
            if (is_ternary(K)) value += v.signs[i / 8] ? -0.125f : 0.125f;
            else if (v.signs[i / 8] >> (i % 8) & 1) value = -value;
            float difference = x[i] - scale * value;
            sum += weight[i] * difference * difference;
        }
        error += sum;
    }
    return error;
}

float stored_one(float x) {
    return rounded_half(x < -LARGEST ? -LARGEST : x > LARGEST ? LARGEST : x);
}

template <int K> void improve(candidates<K> &c, const float *x, const float *weight, vectors &out) {
    constexpr int N = group_of(K), G = 256 / N, LAST = last_factor(K);
    constexpr float UNIT = unit_of(K);
    c.fill(x, weight);
    float d = 0, factors[G], best_error = 0;
    for (int g = 0; g < G; g++) {
        float starts[5], largest = 0, sum = 0, real = 0, error = 0;
        for (int i = g * N; i < (g + 1) * N; i++) {
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
            sum += fabsf(x[i]);
        }
        int count = 0;
        starts[count++] = out.d * UNIT * (float)(2 * out.scales[g] + 1);
        if (is_ternary(K))
            for (float factor : SEARCH_TERNARY_STARTS) starts[count++] = sum / (float)N * factor;
        else
            for (double factor : SEARCH_STARTS)
                starts[count++] = largest / (float)((K == IQ3_XXS ? 62 : K == IQ3_S ? 15 : 43) / factor);
        for (int n = 0; n < count; n++) {
            float scale = starts[n];
            for (int step = 0; step < SEARCH_STEPS; step++) {
                found_vectors found = c.at(g, scale);
                if ((n == 0 && step == 0) || found.error < error) {
                    error = found.error;
                    real = scale;
                }
                scale = found.qq > 0 ? found.xq / found.qq : 0;
            }
        }
        factors[g] = real;
        d = g == 0 || real > d ? real : d;
    }
    d = stored_one(d / ((2 * LAST + 1) * UNIT));
    float unit = d * UNIT, inv = fabsf(unit) < SMALL ? 0 : 1 / unit;
    int levels[G];
    for (int g = 0; g < G; g++) {
        float level = 0.5f * (factors[g] * inv - 1);
        level = (level + ROUND) - ROUND;
        levels[g] = (int)(level < 0 ? 0 : level > LAST ? LAST : level);
    }
    vectors found = {};
    for (int round = 0; round < SEARCH_ROUNDS; round++) {
        float error = 0, xq = 0, qq = 0;
        for (int g = 0; g < G; g++) {
            found_vectors group = {};
            int moved_to = 0;
            for (int step = -1; step <= 1; step++) {
                int moved = within(levels[g] + step, 0, LAST);
                found_vectors sums = c.at(g, d * UNIT * (float)(2 * moved + 1));
                if (step == -1 || sums.error < group.error) {
                    group = sums;
                    moved_to = moved;
                }
            }
            levels[g] = moved_to;
            float factor = (float)(2 * moved_to + 1);
            error += group.error;
            xq += factor * group.xq;
            qq += factor * factor * group.qq;
        }
        if (round == 0 || error < best_error) {
            best_error = error;
            found.d = d;
            memcpy(found.scales, levels, sizeof levels);
        }
        d = stored_one((qq > 0 ? xq / qq : 0) * (1 / UNIT));
    }
    c.choose(found);
    if (error_of<K>(c.book, found, x, weight) < error_of<K>(c.book, out, x, weight)) out = found;
}

template <int K> void quantize(const bn_iq_job &j, const bn_codebook &book) {
    constexpr int G = 256 / group_of(K), ALL = 256 / vector_of(K);
    int64_t each = 8; // super-blocks that share the memory of candidates
    bn::share_out(j.threads, (j.blocks + each - 1) / each, [&](int64_t part) {
        candidates<K> c(book);
        int64_t last = (part + 1) * each < j.blocks ? (part + 1) * each : j.blocks;
        for (int64_t n = part * each; n < last; n++) {
            const float *x = j.x + n * 256;
            const float *importance = j.importance ? j.importance + n % j.per_row * 256 : nullptr;
            float weight[256], plain[256], mean = 0;
            for (int i = 0; i < 256; i++) mean += x[i] * x[i];
            mean = mean * ((K == IQ2_XXS || K == IQ2_XS ? 1.0f : 2.0f) / 256);
            for (int i = 0; i < 256; i++) {
                plain[i] = importance ? importance[i] : 1;
                weight[i] = importance   ? importance[i] * sqrtf(mean + x[i] * x[i])
                            : K == IQ2_S ? mean * 0.25f + x[i] * x[i]
                                         : x[i] * x[i];
            }
            vectors out;
            if constexpr (is_ternary(K)) compatible_ternary<K>(book, x, weight, out);
            else compatible_signed<K>(book, x, weight, out);
            if (!j.compatible) improve<K>(c, x, plain, out);
            memcpy(j.index + n * ALL, out.index, sizeof(int16_t) * ALL);
            memcpy(j.signs + n * 32, out.signs, 32);
            j.scale[n] = half_bits(out.d);
            for (int g = 0; g < G; g++) j.scales[n * G + g] = (int16_t)out.scales[g];
        }
    });
}

} // namespace

#define BN_JOIN2(a, b) a##b
#define BN_JOIN(a, b) BN_JOIN2(a, b)

// Returns 1 for a type that isn't here.
extern "C" __attribute__((visibility("default"))) int BN_JOIN(bn_blocks_iq_, BN_BUILD)(const bn_iq_job *job,
                                                                                       const bn_codebook *book) {
    switch (job->kind) {
    case IQ2_XXS: quantize<IQ2_XXS>(*job, *book); return 0;
    case IQ2_XS: quantize<IQ2_XS>(*job, *book); return 0;
    case IQ3_XXS: quantize<IQ3_XXS>(*job, *book); return 0;
    case IQ1_S: quantize<IQ1_S>(*job, *book); return 0;
    case IQ3_S: quantize<IQ3_S>(*job, *book); return 0;
    case IQ2_S: quantize<IQ2_S>(*job, *book); return 0;
    case IQ1_M: quantize<IQ1_M>(*job, *book); return 0;
    default: return 1;
    }
}
