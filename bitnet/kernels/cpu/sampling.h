// Drawing the next token of many rows, in the steps of bitnet/inference/sampling.py, which is the specification.
//
// A row of 128 k logits is read three times: for its maximum, for the weights exp((l - max) / temperature), and for the
// candidates. Only what a cut or the draw falls on is sorted: candidates are dealt into buckets by the first bits of
// their weight, whole buckets count by their mass, and the bucket that a boundary lies in is put in order. Masses are
// added in double, in another order than the specification's: a draw could differ where u falls within 1e-15 of a
// border.
#pragma once

#include <algorithm>
#include <float.h>
#include <math.h>

#include "pool.h"
#include "simd.h"

namespace bn {
namespace BN_ISA {

enum { STRIP = 256, BUCKETS = 4096, FEW = 1024 };

// Scratch of one thread.
struct draw_room {
    float *work, *strip_max; // [V padded], [strips]
    double *strip_sum;       // [strips]
    uint64_t *keys, *dealt;  // [V] each
    int32_t *start;          // [BUCKETS + 1]
    double *mass;            // [BUCKETS]
    int64_t bytes;
};

static draw_room draw_room_at(uint8_t *base, int64_t V) {
    draw_room r = {};
    int64_t used = 0, strips = (V + STRIP - 1) / STRIP;
    auto take = [&](int64_t bytes) {
        uint8_t *p = base + used;
        used += (bytes + 63) / 64 * 64;
        return (void *)p;
    };
    r.work = (float *)take(strips * STRIP * 4);
    r.strip_max = (float *)take(strips * 4);
    r.strip_sum = (double *)take(strips * 8);
    r.keys = (uint64_t *)take(V * 8);
    r.dealt = (uint64_t *)take(V * 8);
    r.start = (int32_t *)take((BUCKETS + 1) * 4);
    r.mass = (double *)take(BUCKETS * 8);
    r.bytes = used;
    return r;
}

BN_INLINE uint64_t key_of(float weight, int64_t id) {
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    return (uint64_t)bits << 32 | (0xFFFFFFFFu - (uint32_t)id); // descending keys: by weight, equal ones by id
}
BN_INLINE double weight_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    float weight;
    memcpy(&weight, &bits, 4);
    return weight;
}
BN_INLINE int64_t id_of(uint64_t key) { return 0xFFFFFFFFu - (uint32_t)key; }
BN_INLINE int bucket_of(uint64_t key) { return BUCKETS - 1 - (int)(key >> 50); } // weights are at most 1: below 4064

// A strip of x that may end at V, as whole vectors: what is beyond is `fill`.
BN_INLINE const float *strip_of(const float *x, int64_t i, int64_t V, float fill, float *spare) {
    if (i + STRIP <= V) return x + i;
    for (int64_t r = 0; r < STRIP; r++) spare[r] = i + r < V ? x[i + r] : fill;
    return spare;
}

// Largest of V floats and of each strip, and in `odd` a NaN if one of them is not finite.
BN_INLINE float largest(const float *x, int64_t V, float *strip_max, float *odd) {
    vf not_finite[4] = {};
    float all = -INFINITY, spare[STRIP];
    for (int64_t i = 0; i < V; i += STRIP) {
        const float *strip = strip_of(x, i, V, x[V - 1], spare);
        vf peak[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
        for (int64_t j = 0; j < STRIP; j += 64)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                vf v = load(strip + j + 16 * r);
                peak[r] = max(v, peak[r]);
                not_finite[r] = fma(v, splat(0.0f), not_finite[r]);
            }
        float m = maximum(max(max(peak[0], peak[1]), max(peak[2], peak[3])));
        strip_max[i / STRIP] = m;
        all = m > all ? m : all;
    }
    *odd = sum((not_finite[0] + not_finite[1]) + (not_finite[2] + not_finite[3]));
    return all;
}

// weights[i] = exp((x[i] - top) / temperature), 0 below e^-87; of each strip its largest, and the sum of those that reach
// `least`. Null weights: the sum alone. Returns the sum of all.
BN_INLINE double exponentiate(const float *x, int64_t V, float top, float temperature, float least, float *weights,
                              float *strip_max, double *strip_sum) {
    double total = 0;
    float spare[STRIP];
    for (int64_t i = 0; i < V; i += STRIP) {
        const float *strip = strip_of(x, i, V, -INFINITY, spare);
        vf peak[2] = {}, parts[2] = {};
        for (int64_t j = 0; j < STRIP; j += 32)
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
                vf v = (load(strip + j + 16 * r) - splat(top)) / splat(temperature);
                vi keep = splat((int32_t)0) - ((as_int(v + splat(87.0f)) >> 31) + splat((int32_t)1));
                vf e = as_float(as_int(exponential(v)) & keep);
                peak[r] = max(e, peak[r]);
                vi reach = splat((int32_t)0) - ((as_int(e - splat(least)) >> 31) + splat((int32_t)1));
                parts[r] = parts[r] + as_float(as_int(e) & reach);
                if (weights) store(weights + i + j + 16 * r, e);
            }
        double s = sum(parts[0] + parts[1]);
        total += s;
        if (weights) {
            strip_sum[i / STRIP] = s;
            strip_max[i / STRIP] = maximum(max(peak[0], peak[1]));
        }
    }
    return total;
}

// The k-th largest of the strips' maxima: at least k values reach it. `spare` has room for the maxima.
BN_INLINE float reached_by(int64_t k, const float *strip_max, int64_t strips, float *spare) {
    if (k > strips) return -INFINITY;
    memcpy(spare, strip_max, strips * 4);
    std::nth_element(spare, spare + (k - 1), spare + strips, [](float a, float b) { return a > b; });
    return spare[k - 1];
}

// Candidates in descending order, of which only those buckets are sorted that something asks for.
struct candidates {
    uint64_t *keys; // [count]
    int64_t count;
    int32_t *start; // of the buckets; null: one bucket, sorted
    double *mass;

    int64_t begin(int b) const { return start ? start[b] : 0; }
    int64_t end(int b) const { return start ? start[b + 1] : count; }
    int buckets() const { return start ? BUCKETS : 1; }
    void sort(int b) {
        uint64_t *from = keys + begin(b), *to = keys + end(b);
        auto descending = [](uint64_t x, uint64_t y) { return x > y; };
        if (!std::is_sorted(from, to, descending)) std::sort(from, to, descending);
    }

    // The mass of the first n.
    double mass_of(int64_t n) {
        double before = 0;
        for (int b = 0; b < buckets() && begin(b) < n; b++) {
            if (start && end(b) <= n) {
                before += mass[b];
                continue;
            }
            sort(b);
            for (int64_t i = begin(b); i < n && i < end(b); i++) before += weight_of(keys[i]);
        }
        return before;
    }

    // The first whose mass and that before it exceed `target`, or reach it (`reach`); the last if none does.
    int64_t where(double target, bool reach) {
        double before = 0;
        int64_t last = 0;
        for (int b = 0; b < buckets(); b++) {
            if (begin(b) == end(b)) continue;
            last = end(b) - 1;
            if (start && (reach ? before + mass[b] * (1 + 1e-12) < target : before + mass[b] * (1 + 1e-12) <= target)) {
                before += mass[b];
                continue;
            }
            sort(b);
            for (int64_t i = begin(b); i < end(b); i++) {
                before += weight_of(keys[i]);
                if (reach ? before >= target : before > target) return i;
            }
        }
        return last < count ? last : count - 1;
    }
};

static candidates gather(const draw_room &room, const float *weights, int64_t V, float floor) {
    int64_t n = 0;
    for (int64_t i = 0; i < V; i += STRIP) {
        if (room.strip_max[i / STRIP] < floor) continue;
        int64_t end = i + STRIP < V ? i + STRIP : V;
        for (int64_t j = i; j < end; j++) {
            room.keys[n] = key_of(weights[j], j);
            n += weights[j] >= floor && weights[j] > 0;
        }
    }
    candidates c = {room.keys, n, nullptr, nullptr};
    if (n <= FEW) {
        c.sort(0);
        return c;
    }
    memset(room.start, 0, (BUCKETS + 1) * 4);
    memset(room.mass, 0, BUCKETS * 8);
    for (int64_t i = 0; i < n; i++) {
        int b = bucket_of(room.keys[i]);
        room.start[b]++;
        room.mass[b] += weight_of(room.keys[i]);
    }
    for (int32_t b = 0, at = 0; b <= BUCKETS; b++) {
        int32_t here = room.start[b];
        room.start[b] = at;
        at += here;
    }
    for (int64_t i = 0; i < n; i++) room.dealt[room.start[bucket_of(room.keys[i])]++] = room.keys[i];
    for (int b = BUCKETS; b > 0; b--) room.start[b] = room.start[b - 1]; // each had moved to its end
    room.start[0] = 0;
    return {room.dealt, n, room.start, room.mass};
}

static int64_t draw_filtered(const bn_draw &d, const draw_room &room, const float *weights, int64_t V, double total) {
    float floor = 0;
    bool counted = d.top_k > 0 && d.top_k < V;
    if (counted) floor = reached_by(d.top_k, room.strip_max, (V + STRIP - 1) / STRIP, (float *)room.dealt);
    else floor = (float)(total * (1 - d.top_p) / (double)V * 0.999999); // all below weigh less than 1 - p together
    if (d.min_p > floor && !(counted && d.top_p < 1)) floor = d.min_p; // the mass of all k is wanted there
    candidates c = gather(room, weights, V, floor);
    int64_t kept = counted && d.top_k < c.count ? d.top_k : c.count;
    if (d.top_p < 1) {
        double whole = counted ? c.mass_of(kept) : total;
        int64_t last = c.where(d.top_p * whole, true);
        kept = last + 1 < kept ? last + 1 : kept;
    }
    if (d.min_p > 0) { // a prefix too
        for (int b = c.buckets() - 1; b >= 0; b--) {
            if (c.begin(b) >= kept || c.begin(b) == c.end(b)) continue;
            c.sort(b);
            int64_t i = c.begin(b);
            while (i < c.end(b) && i < kept && weight_of(c.keys[i]) >= d.min_p) i++;
            kept = i < kept ? i : kept;
            if (i > c.begin(b)) break;
        }
        kept = kept > 0 ? kept : 1;
    }
    int64_t at = c.where(d.uniform * c.mass_of(kept), false);
    return id_of(c.keys[at < kept ? at : kept - 1]);
}

// What is beyond float counts as the largest one: differences of infinities are no numbers.
BN_INLINE float within_float(float l) { return l > FLT_MAX ? FLT_MAX : l < -FLT_MAX ? -FLT_MAX : l; }

static void draw_one(bn_draw &d, const draw_room &room, int64_t V) {
    float odd, *work = room.work;
    const float *x = d.logits;
    float raw_top = largest(x, V, room.strip_max, &odd);
    double log_total = 0;
    d.finite = odd == 0.0f;
    d.token = 0;
    if (!d.finite) return;
    if (d.top_count >= 0) {
        log_total = log(exponentiate(x, V, raw_top, 1.0f, 0.0f, nullptr, nullptr, nullptr));
        int64_t n = 0, wanted = d.top_count < V ? d.top_count : V;
        float floor = wanted ? reached_by(wanted, room.strip_max, (V + STRIP - 1) / STRIP, work) : INFINITY;
        for (int64_t i = 0; i < V; i += STRIP)
            if (room.strip_max[i / STRIP] >= floor)
                for (int64_t j = i; j < i + STRIP && j < V; j++)
                    if (x[j] >= floor) room.keys[n++] = (uint64_t)j;
        std::partial_sort(room.keys, room.keys + wanted, room.keys + n, [&](uint64_t a, uint64_t b) {
            return x[a] > x[b] || (x[a] == x[b] && a < b);
        });
        for (int64_t i = 0; i < wanted; i++) {
            d.top_ids[i] = (int32_t)room.keys[i];
            d.top_logprobs[i] = (float)((double)x[room.keys[i]] - raw_top - log_total);
        }
    }

    float top = raw_top;
    if (d.change_count || d.allowed || (d.seen_count && d.repetition_penalty != 1.0f)) {
        memcpy(work, x, V * 4);
        for (int64_t i = 0; i < d.change_count; i++) {
            float &l = work[d.change_ids[i]];
            l = within_float(l + d.changes[i]);
        }
        if (d.allowed)
            for (int64_t i = 0; i < V; i++) work[i] = d.allowed[i] ? work[i] : -INFINITY;
        if (d.repetition_penalty != 1.0f)
            for (int64_t i = 0; i < d.seen_count; i++) {
                float &l = work[d.seen_ids[i]];
                if (l > -INFINITY) l = within_float(l > 0 ? l / d.repetition_penalty : l * d.repetition_penalty);
            }
        x = work;
        top = largest(x, V, room.strip_max, &odd);
    }
    if (d.temperature <= 0) {
        int64_t strip = 0;
        while (room.strip_max[strip] < top) strip++;
        d.token = strip * STRIP;
        while (d.token + 1 < V && x[d.token] < top) d.token++;
    } else {
        bool filtered = (d.top_k > 0 && d.top_k < V) || d.top_p < 1;
        double total = exponentiate(x, V, top, d.temperature, filtered ? 0.0f : d.min_p, work, room.strip_max,
                                    room.strip_sum);
        if (filtered) {
            d.token = draw_filtered(d, room, work, V, total);
        } else { // in the order of the ids
            double target = d.uniform * total, before = 0;
            int64_t strip = 0, strips = (V + STRIP - 1) / STRIP, last = 0;
            for (; strip + 1 < strips && before + room.strip_sum[strip] <= target; strip++) before += room.strip_sum[strip];
            int64_t i = strip * STRIP;
            for (; i < V; i++) {
                if (work[i] < d.min_p || work[i] <= 0) continue;
                last = i;
                before += work[i];
                if (before > target) break;
            }
            d.token = i < V ? i : last;
        }
    }
    if (d.top_count >= 0) d.logprob = (float)((double)d.logits[d.token] - raw_top - log_total);
}

// Draw for `count` rows of V logits; `room` has bn_draw_bytes(V) for each thread.
static void sample(bn_draw *rows, int64_t count, int64_t V, uint8_t *room, int threads) {
    int64_t each = draw_room_at(nullptr, V).bytes;
    bn::run(threads, [&](member &self) {
        self.each(count, [&](int64_t first, int64_t last) {
            for (; first < last; first++) draw_one(rows[first], draw_room_at(room + self.id * each, V), V);
        });
    });
}

} // namespace BN_ISA
} // namespace bn
