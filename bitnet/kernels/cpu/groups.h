// Products with groups of columns that have scales of their own: codes of 1 to 8 bits, w = s c + t in each group.
//
//     y = sum over segments of  s (x_scale sum c x_q) + t (x_scale sum x_q)      INT8 activations, X_GROUP and X_TOKEN
//     the same with  sum c x_q = sum c q0 + 256 sum c q1 + 65536 sum c q2        X_INT16, X_FLOAT in digits (activations.h)
//     y = sum over segments of  s sum c x + t sum x                              X_FLOAT in floats
//
// Letters: D digits of an activation, 1 of INT8. The integer sums are exact; the float operations are the same ones in
// the same order for any number of tokens, so a token's outputs do not depend on the others. Columns are worked on in
// chunks of 512, whose codes stay in the first-level cache for all tokens: as lines for a few of them, else
// unpacked.
#pragma once

#include "group_scales.h"

namespace bn {
namespace BN_ISA {

BN_INLINE constexpr int step_lines(int codec) { // of 32 columns; of 256 in CODEC_BASE3
    return codec == CODEC_BASE3 ? 13 : codec == CODEC_ONE_BIT ? 1 : codec == CODEC_LEVELS ? 4 : codec;
}
BN_INLINE constexpr int bits_to_add(int codec) { // of the codes that are multiplied; 8 for those that take a full dot4
    return codec == CODEC_ONE_BIT || codec == CODEC_BASE3 ? 2 : codec == CODEC_LEVELS ? 8 : codec;
}

// The codes of four columns, number i of a step.
template <int codec, int i> BN_INLINE vb quad(const uint8_t *p, const uint8_t *levels) {
    if constexpr (codec == CODEC_ONE_BIT) return field<i, 0>(load_line(p), 1);
    else if constexpr (codec == CODEC_TWO_BIT) return field<2 * (i % 4), 0>(load_line(p + 64 * (i / 4)), 3);
    else if constexpr (codec == CODEC_THREE_BIT)
        return quad<CODEC_TWO_BIT, i>(p, levels) | field<i, 2>(load_line(p + 128), 4);
    else if constexpr (codec == CODEC_FOUR_BIT) return field<4 * (i % 2), 0>(load_line(p + 64 * (i / 2)), 15);
    else if constexpr (codec == CODEC_LEVELS) return lookup(quad<CODEC_FOUR_BIT, i>(p, levels), levels);
    else if constexpr (codec == CODEC_FIVE_BIT)
        return quad<CODEC_FOUR_BIT, i>(p, levels) | field<i, 4>(load_line(p + 256), 16);
    else if constexpr (codec == CODEC_SIX_BIT)
        return quad<CODEC_FOUR_BIT, i>(p, levels) | field<2 * (i % 4), 4>(load_line(p + 256 + 64 * (i / 4)), 48);
    else return load_line(p + 64 * i);
}

// Sums of codes times x over quads FIRST to FIRST + COUNT of a step, for each of MT tokens and D digits of x: [MT][D].
template <int codec, int FIRST, int COUNT, int MT, int D>
BN_INLINE void quads_times_tokens(const uint8_t *p, const uint8_t *levels, const int8_t *x, int64_t stride, int64_t plane,
                                  vi *total) {
    vi part[MT * D];
#pragma GCC unroll 6
    for (int j = 0; j < MT * D; j++) total[j] = part[j] = (vi){};
#define BN_QUAD(i)                                                                                                     \
    if constexpr (i < COUNT) {                                                                                         \
        vb v = quad<codec, FIRST + i>(p, levels);                                                                      \
        _Pragma("GCC unroll 6") for (int j = 0; j < MT * D; j++) {                                                     \
            vi t = splat_dword(x + j / D * stride + j % D * plane + 4 * i);                                            \
            if constexpr (bits_to_add(codec) == 8) {                                                                   \
                total[j] = dot4(total[j], v, t);                                                                       \
            } else {                                                                                                   \
                part[j] = add_small(part[j], v, t);                                                                    \
                if constexpr (!SHORT_SUMS) opaque(part[j]);                                                            \
                if constexpr ((i + 1) % every(bits_to_add(codec)) == 0 || i + 1 == COUNT) {                            \
                    total[j] = total[j] + dot4_of(part[j]);                                                            \
                    part[j] = (vi){};                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
    BN_QUAD(0) BN_QUAD(1) BN_QUAD(2) BN_QUAD(3) BN_QUAD(4) BN_QUAD(5) BN_QUAD(6) BN_QUAD(7)
#undef BN_QUAD
}

// The sum that D sums of digits make; each is below 2^24.
template <int D> BN_INLINE vf joined(const vi *total) {
    vf low = to_float(total[0]);
    if constexpr (D > 1) low = fma(to_float(total[1]), splat(256.0f), low);
    if constexpr (D > 2) low = fma(to_float(total[2]), splat(65536.0f), low);
    return low;
}

// Sums of MT tokens with one segment, already exact integers or floats, enter `sums` with the segment's s and t.
BN_INLINE vf enter(vf sum, vf part, vf s, vf t, float x_sum) { return fma(splat(x_sum), t, fma(part, s, sum)); }

// MT tokens with the lines of a chunk: sums[m][32] += ...
template <int codec, int SEGMENT, int MT, int D>
static void lines_times_tokens(const bn_matrix &w, const chunk &c, const activations &a, int64_t m, float *sums) {
    const uint8_t *p = c.lines;
    const int8_t *x = a.q + m * a.stride + c.first;
    const int64_t segments = a.segments, at = m * segments + c.first / SEGMENT, per_group = w.group / SEGMENT;
    const float *scale = a.scale + at, *x_sum = a.sum + at;
    int64_t until = c.columns / SEGMENT;
    vf y[MT];
    vi total[MT * D];
#pragma GCC unroll 4
    for (int j = 0; j < MT; j++) y[j] = load(sums + 32 * j);
#define BN_ENTER(i, S, T)                                                                                              \
    _Pragma("GCC unroll 4") for (int j = 0; j < MT; j++) {                                                             \
        vf part = joined<D>(total + j * D) * splat(scale[j * segments + i]);                                           \
        y[j] = enter(y[j], part, S, T, x_sum[j * segments + i]);                                                       \
    }
    if constexpr (SEGMENT == 16) {
        for (int64_t i = 0; i < until; i += 2, p += 64 * step_lines(codec), x += 32) {
            for (int l = 0; l < step_lines(codec); l++) BN_PREFETCH(p + PREFETCH + 64 * l);
            quads_times_tokens<codec, 0, 4, MT, D>(p, w.levels, x, a.stride, a.plane, total);
            BN_ENTER(i, load(c.s + 16 * i), load(c.t + 16 * i))
            quads_times_tokens<codec, 4, 4, MT, D>(p, w.levels, x + 16, a.stride, a.plane, total);
            BN_ENTER(i + 1, load(c.s + 16 * i + 16), load(c.t + 16 * i + 16))
        }
    } else {
        int64_t left = per_group - c.first / SEGMENT % per_group;
        const float *s = c.s, *t = c.t;
        for (int64_t i = 0; i < until; i++, p += 64 * step_lines(codec), x += SEGMENT) {
            if constexpr (codec == CODEC_BASE3) {
#pragma GCC unroll 6
                for (int j = 0; j < MT * D; j++)
                    total[j] = block_times_token<CODEC_BASE3>(p, 13, x + j / D * a.stride + j % D * a.plane);
            } else {
                for (int l = 0; l < step_lines(codec); l++) BN_PREFETCH(p + PREFETCH + 64 * l);
                quads_times_tokens<codec, 0, 8, MT, D>(p, w.levels, x, a.stride, a.plane, total);
            }
            BN_ENTER(i, load(s), load(t))
            if (--left == 0) {
                left = per_group;
                s += 16;
                t += 16;
            }
        }
    }
#undef BN_ENTER
#pragma GCC unroll 4
    for (int j = 0; j < MT; j++) store(sums + 32 * j, y[j]);
}

template <int codec> static void unpack_steps(const bn_matrix &w, const chunk &c, uint8_t *out) {
    const uint8_t *p = c.lines;
    if constexpr (codec == CODEC_BASE3) { // 64 quads and a pad of one in each segment; the pad is left out
        for (int64_t k = 0; k < c.columns; k += 256)
            for (int l = 0; l < 13; l++, p += 64) {
                vb v = load_line(p);
                for (int i = 0; i < (l == 12 ? 4 : 5); i++, out += 64) {
                    store_line(out, above(v, 85) + above(v, 170));
                    v = v + (v + v);
                }
            }
    } else {
        for (int64_t k = 0; k < c.columns; k += 32, p += 64 * step_lines(codec), out += 512) {
            for (int l = 0; l < step_lines(codec); l++) BN_PREFETCH(p + PREFETCH + 64 * l);
            store_line(out, quad<codec, 0>(p, w.levels));
            store_line(out + 64, quad<codec, 1>(p, w.levels));
            store_line(out + 128, quad<codec, 2>(p, w.levels));
            store_line(out + 192, quad<codec, 3>(p, w.levels));
            store_line(out + 256, quad<codec, 4>(p, w.levels));
            store_line(out + 320, quad<codec, 5>(p, w.levels));
            store_line(out + 384, quad<codec, 6>(p, w.levels));
            store_line(out + 448, quad<codec, 7>(p, w.levels));
        }
    }
}

// Sums of codes times x over COUNT quads, of their half HALF (simd.h), for each of MT tokens and D digits: total[MT * D].
template <int MT, int BITS, int D, int COUNT, int HALF>
BN_INLINE void codes_times_digits(const uint8_t *codes, const int8_t *x, int64_t stride, int64_t plane, vi *total) {
    constexpr bool FULL = BITS == 8 && !SHORT_SUMS;
    constexpr int ROOM = every(half_bits(BITS)), EVERY = FULL || !SHORT_SUMS || ROOM > COUNT ? COUNT : ROOM;
    vi part[MT * D];
#pragma GCC unroll 1
    for (int done = 0; done < COUNT; done += EVERY) {
#pragma GCC unroll 12
        for (int j = 0; j < MT * D; j++) part[j] = (vi){};
#pragma GCC unroll 1
        for (int e = 0; e < EVERY; e++, codes += 64, x += 4) {
            vb v = half_of<BITS, HALF>(load_line(codes));
#pragma GCC unroll 12
            for (int j = 0; j < MT * D; j++) {
                vi q = splat_dword(x + j / D * stride + j % D * plane);
                if constexpr (FULL) part[j] = dot4(part[j], v, q);
                else part[j] = add_small(part[j], v, q);
                if constexpr (!SHORT_SUMS && D > 1) opaque(part[j]);
            }
        }
#pragma GCC unroll 12
        for (int j = 0; j < MT * D; j++) {
            vi sum = (FULL ? part[j] : dot4_of(part[j])) << 4 * HALF;
            if constexpr (EVERY == COUNT && HALF == 0) total[j] = sum;
            else total[j] = done || HALF ? total[j] + sum : sum;
        }
    }
}

// MT tokens with an unpacked chunk: sums[m * 32 ..] += ...; BITS of the codes, 8 for any. Segments of SEGMENT columns.
template <int MT, int BITS, int D, int SEGMENT>
static void codes_times_tokens(const bn_matrix &w, const chunk &c, const uint8_t *codes, const activations &a, int64_t m,
                               float *sums) {
    const int64_t at = m * a.segments + c.first / SEGMENT, per_group = w.group / SEGMENT;
    const int64_t stride = a.stride, plane = a.plane, segments = a.segments, until = c.columns / SEGMENT;
    const float *scale = a.scale + at, *x_sum = a.sum + at, *s = c.s, *t = c.t;
    int64_t left = per_group - c.first / SEGMENT % per_group;
    const int8_t *x = a.q + m * stride + c.first;
    for (int64_t i = 0; i < until; i++, codes += 16 * SEGMENT, x += SEGMENT) {
        vi total[MT * D];
        codes_times_digits<MT, BITS, D, SEGMENT / 4, 0>(codes, x, stride, plane, total);
        if constexpr (halves(BITS) == 2) codes_times_digits<MT, BITS, D, SEGMENT / 4, 1>(codes, x, stride, plane, total);
        vf S = load(s), T = load(t);
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++) {
            vf y = load(sums + 32 * j);
            vf of = joined<D>(total + j * D) * splat(scale[j * segments + i]);
            store(sums + 32 * j, enter(y, of, S, T, x_sum[j * segments + i]));
        }
        BN_IN_MEMORY(); // or gcc keeps the sums of all tokens in registers, and spills what is needed in the loop
        if (--left == 0) {
            left = per_group;
            s += 16;
            t += 16;
        }
    }
}

#if defined(BN_AMX)
enum { TILE_TOKENS = 16 };

// The same of 16 tokens on tiles: a segment's sums are one product of tiles of its width, or four of 64 columns, and
// meet its scales with the outputs of all tokens in registers. Neighbouring segments, or the digits of one, have tiles
// of their own.
template <int D>
static void codes_times_tiles(const bn_matrix &w, const chunk &c, const uint8_t *codes, const activations &a, int64_t m,
                              float *sums) {
    int64_t segment = segment_of(w), at = m * a.segments + c.first / segment, per_group = w.group / segment;
    int64_t left = per_group - c.first / segment % per_group, lines = 16 * (segment < 64 ? segment : 64);
    const int8_t *x = a.q + m * a.stride + c.first;
    const float *s = c.s, *t = c.t;
    alignas(64) int32_t part[D == 1 ? 2 : D][TILE_TOKENS * 16];
    vf y[TILE_TOKENS];
    BN_WRITTEN(codes);
#pragma GCC unroll 16
    for (int j = 0; j < TILE_TOKENS; j++) y[j] = load(sums + 32 * j);
    for (int64_t i = 0; i < c.columns / segment; i++, x += segment) {
        int32_t(*products)[TILE_TOKENS * 16] = part + (D == 1 ? i % 2 : 0);
#define BN_SEGMENT(d, total, tokens, rows)                                                                             \
    _tile_zero(total);                                                                                                 \
    for (int64_t k = 0; k < segment; k += 64) {                                                                        \
        _tile_loadd(tokens, x + d * a.plane + k, a.stride);                                                            \
        _tile_loadd(rows, codes + lines * (k / 64), 64);                                                               \
        _tile_dpbsud(total, tokens, rows);                                                                             \
    }                                                                                                                  \
    _tile_stored(total, products[d], 64);
        if constexpr (D > 1) {
            BN_SEGMENT(0, 0, 4, 6) BN_SEGMENT(1, 1, 5, 7)
            if constexpr (D == 3) {
                BN_SEGMENT(2, 2, 4, 6)
            }
        } else if (i % 2 == 0) {
            BN_SEGMENT(0, 0, 4, 6)
        } else {
            BN_SEGMENT(0, 1, 5, 7)
        }
#undef BN_SEGMENT
        codes += 16 * segment;
        vf S = load(s), T = load(t);
#pragma GCC unroll 16
        for (int j = 0; j < TILE_TOKENS; j++) {
            vi total[D];
#pragma GCC unroll 3
            for (int d = 0; d < D; d++) total[d] = load(products[d] + 16 * j);
            int64_t n = at + j * a.segments + i;
            y[j] = enter(y[j], joined<D>(total) * splat(a.scale[n]), S, T, a.sum[n]);
        }
        if (--left == 0) {
            left = per_group;
            s += 16;
            t += 16;
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < TILE_TOKENS; j++) store(sums + 32 * j, y[j]);
}
#endif

// The same of NB neighbouring blocks with float activations; their codes are `next` bytes apart.
template <int MT, int NB, bool VALUES>
static void codes_times_floats(const bn_matrix &w, const chunk *c, const uint8_t *codes, int64_t next,
                               const activations &a, int64_t m, float *sums) {
    int64_t segment = segment_of(w), at = m * a.segments + c->first / segment, per_group = w.group / segment;
    int64_t left = per_group - c->first / segment % per_group, g = 0;
    const float *x = a.x + m * a.stride + c->first;
    for (int64_t i = 0; i < c->columns / segment; i++, x += segment) {
        vf part[MT][NB];
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++)
#pragma GCC unroll 2
            for (int b = 0; b < NB; b++) part[j][b] = (vf){};
        for (int64_t k = 0; k < segment; k += 4, codes += 64) {
            vb v[NB];
#pragma GCC unroll 2
            for (int b = 0; b < NB; b++) v[b] = load_line(codes + b * next);
#define BN_BYTE(n)                                                                                                     \
    {                                                                                                                  \
        vf f[NB];                                                                                                      \
        _Pragma("GCC unroll 2") for (int b = 0; b < NB; b++) {                                                         \
            if constexpr (VALUES) f[b] = lookup(byte_of<n>(v[b]), w.values);                                           \
            else f[b] = to_float(byte_of<n>(v[b]));                                                                    \
        }                                                                                                              \
        _Pragma("GCC unroll 12") for (int j = 0; j < MT; j++) {                                                        \
            vf t = splat(x[j * a.stride + k + n]);                                                                     \
            _Pragma("GCC unroll 2") for (int b = 0; b < NB; b++) part[j][b] = fma(f[b], t, part[j][b]);                \
        }                                                                                                              \
    }
            BN_BYTE(0) BN_BYTE(1) BN_BYTE(2) BN_BYTE(3)
#undef BN_BYTE
        }
#pragma GCC unroll 2
        for (int b = 0; b < NB; b++) {
            vf S = load(c[b].s + 16 * g), T = load(c[b].t + 16 * g);
#pragma GCC unroll 12
            for (int j = 0; j < MT; j++) {
                float *y = sums + 32 * j + 16 * b;
                store(y, enter(load(y), part[j][b], S, T, a.sum[at + j * a.segments + i]));
            }
        }
        if (--left == 0) {
            left = per_group;
            g++;
        }
    }
}

// Chunks of two blocks with all tokens in floats; `codes` is room for both unpacked.
template <int codec>
static void chunks_times_floats(const bn_matrix &w, const chunk *c, const activations &a, int64_t M, uint8_t *codes,
                                float *sums) {
    constexpr bool VALUES = codec == CODEC_FOUR_BIT;
    const uint8_t *p = codes;
    int64_t next = CHUNK * 16, m = 0;
    if (codec == CODEC_EIGHT_BIT) { // unpacked as they lie there
        p = c->lines;
        next = c[1].lines - p;
        for (int64_t i = 0; i < 16 * c->columns; i += 64) {
            BN_PREFETCH(p + PREFETCH + i);
            BN_PREFETCH(p + next + PREFETCH + i);
        }
    } else {
        unpack_steps<codec>(w, c[0], codes);
        unpack_steps<codec>(w, c[1], codes + next);
    }
    if constexpr (FLOAT_TILE > 2)
        for (; m + FLOAT_TILE <= M; m += FLOAT_TILE)
            for (int64_t b = 0; b < 2; b++)
                codes_times_floats<FLOAT_TILE, 1, VALUES>(w, c + b, p + b * next, next, a, m, sums + 32 * m + 16 * b);
    if constexpr (FLOAT_TILE > 1)
        for (; m + 2 <= M; m += 2) codes_times_floats<2, 2, VALUES>(w, c, p, next, a, m, sums + 32 * m);
    for (; m < M; m++) codes_times_floats<1, 2, VALUES>(w, c, p, next, a, m, sums + 32 * m);
}

// A chunk with all tokens; `codes` is room for it unpacked.
template <int codec, int D>
static void chunk_times_tokens(const bn_matrix &w, const chunk &c, const activations &a, int64_t M, uint8_t *codes,
                               float *sums) {
    constexpr int BITS = bits_to_add(codec), TILE = FLOAT_TILE < D ? 1 : FLOAT_TILE / D;
    int64_t m = 0;
    // Codes of base 3 take so long to find that it is done once.
    if (M <= (codec == CODEC_BASE3 ? DIRECT / D : in_lines(BITS, D))) {
#define BN_LINES(n)                                                                                                    \
    for (; m + n <= M; m += n) {                                                                                       \
        if constexpr (codec == CODEC_BASE3) lines_times_tokens<codec, 256, n, D>(w, c, a, m, sums + 32 * m);           \
        else if (w.group == 16) lines_times_tokens<codec, 16, n, D>(w, c, a, m, sums + 32 * m);                        \
        else lines_times_tokens<codec, 32, n, D>(w, c, a, m, sums + 32 * m);                                           \
    }
        if constexpr (LINE_TOKENS > 1 && D == 1 && codec != CODEC_BASE3) {
            BN_LINES(4)
            BN_LINES(3)
        }
        if constexpr (LINE_TOKENS > 1 && codec != CODEC_BASE3) BN_LINES(2)
        BN_LINES(1)
#undef BN_LINES
        return;
    }
    unpack_steps<codec>(w, c, codes);
#if defined(BN_AMX)
    for (; m + TILE_TOKENS <= M; m += TILE_TOKENS) codes_times_tiles<D>(w, c, codes, a, m, sums + 32 * m);
#endif
#define BN_TILES(n)                                                                                                    \
    for (; m + n <= M; m += n) {                                                                                       \
        if constexpr (codec == CODEC_BASE3) codes_times_tokens<n, BITS, D, 256>(w, c, codes, a, m, sums + 32 * m);     \
        else if (w.group == 16) codes_times_tokens<n, BITS, D, 16>(w, c, codes, a, m, sums + 32 * m);                  \
        else codes_times_tokens<n, BITS, D, 32>(w, c, codes, a, m, sums + 32 * m);                                     \
    }
    BN_TILES(TILE)
    if constexpr (TILE > 2) BN_TILES(2)
    if constexpr (TILE > 1) BN_TILES(1)
#undef BN_TILES
}
template <int codec>
static void digits_times_tokens(const bn_matrix &w, const chunk &c, const activations &a, int64_t M, uint8_t *codes,
                                float *sums) {
    switch (digits_of(w)) {
    case 1: return chunk_times_tokens<codec, 1>(w, c, a, M, codes, sums);
    case 2: return chunk_times_tokens<codec, 2>(w, c, a, M, codes, sums);
    default:
        if constexpr (codec != CODEC_EIGHT_BIT && codec != CODEC_LEVELS)
            chunk_times_tokens<codec, 3>(w, c, a, M, codes, sums);
    }
}

// Calls f<codec>(..) of the codecs that have groups.
#define BN_GROUP_CODECS(codec, f, ...)                                                                                 \
    switch (codec) {                                                                                                   \
    case CODEC_ONE_BIT: f<CODEC_ONE_BIT>(__VA_ARGS__); break;                                                          \
    case CODEC_BASE3: f<CODEC_BASE3>(__VA_ARGS__); break;                                                              \
    case CODEC_TWO_BIT: f<CODEC_TWO_BIT>(__VA_ARGS__); break;                                                          \
    case CODEC_THREE_BIT: f<CODEC_THREE_BIT>(__VA_ARGS__); break;                                                      \
    case CODEC_FOUR_BIT: f<CODEC_FOUR_BIT>(__VA_ARGS__); break;                                                        \
    case CODEC_LEVELS: f<CODEC_LEVELS>(__VA_ARGS__); break;                                                            \
    case CODEC_FIVE_BIT: f<CODEC_FIVE_BIT>(__VA_ARGS__); break;                                                        \
    case CODEC_SIX_BIT: f<CODEC_SIX_BIT>(__VA_ARGS__); break;                                                          \
    default: f<CODEC_EIGHT_BIT>(__VA_ARGS__); break;                                                                   \
    }

BN_INLINE void cut(const bn_matrix &w, int64_t block, int64_t first, chunk &c) {
    int64_t columns = padded_columns(w), step = w.codec == CODEC_BASE3 ? 256 : 32;
    c.first = first;
    c.columns = columns - first < CHUNK ? columns - first : CHUNK;
    c.lines = w.lines + (block * w.lines_per_block + first / step * step_lines(w.codec)) * 64;
    read_groups(w, block, c);
}

// The panels from `first` to `last`. `scratch`: group_scratch(M) bytes.
static void multiply_groups(const bn_matrix &w, const activations &a, int64_t M, const target &to, int64_t first,
                            int64_t last, uint8_t *scratch) {
    float *sums = (float *)round_up((int64_t)scratch, 64);
    uint8_t *codes = (uint8_t *)(sums + 32 * M);
    int64_t segment = segment_of(w);
    tiles ready(digits_of(w) > 0 && M > DIRECT, segment < 64 ? (int)segment : 64);
    chunk c[2];
    for (int64_t panel = first; panel < last; panel++) {
        memset(sums, 0, M * 32 * sizeof(float));
        if (digits_of(w) == 0) {
            for (int64_t k = 0; k < padded_columns(w); k += CHUNK) {
                cut(w, 2 * panel, k, c[0]);
                cut(w, 2 * panel + 1, k, c[1]);
                if (w.codec == CODEC_EIGHT_BIT) chunks_times_floats<CODEC_EIGHT_BIT>(w, c, a, M, codes, sums);
                else if (w.codec == CODEC_LEVELS) chunks_times_floats<CODEC_LEVELS>(w, c, a, M, codes, sums);
                else chunks_times_floats<CODEC_FOUR_BIT>(w, c, a, M, codes, sums); // NF4
            }
        } else { // block after block, as they lie in memory: what is fetched ahead is what comes next
            for (int64_t b = 0; b < 2; b++)
                for (int64_t k = 0; k < padded_columns(w); k += CHUNK) {
                    cut(w, 2 * panel + b, k, c[0]);
                    float *of = sums + 16 * b;
                    BN_GROUP_CODECS(w.codec, digits_times_tokens, w, c[0], a, M, codes, of)
                }
        }
        vf s0 = load(w.scale + 32 * panel), s1 = load(w.scale + 32 * panel + 16);
        finish_tokens(w, to, panel, 0, M, [&](int64_t m, vf *v0, vf *v1) {
            *v0 = load(sums + 32 * m) * s0;
            *v1 = load(sums + 32 * m + 16) * s1;
        });
    }
}
BN_INLINE int64_t group_scratch(int64_t M) { return M * 128 + 2 * CHUNK_LINES * 64 + 64; }

} // namespace BN_ISA
} // namespace bn
