// Products with groups of columns that have scales of their own: codes of 1 to 8 bits, w = s c + t in each group.
//
//     y = sum over segments of  s (x_scale sum c x_q) + t (x_scale sum x_q)      INT8 activations, X_GROUP and X_TOKEN
//     y = sum over segments of  s sum c x + t sum x                              floats, X_FLOAT
//
// The integer sums are exact; the float operations are the same ones in the same order for any number of tokens, so a
// token's outputs do not depend on the others. Columns are worked on in chunks of 512, whose codes stay in the
// first-level cache for all tokens: as lines for up to DIRECT of them, else unpacked.
#pragma once

#include "matmul.h"

namespace bn {
namespace BN_ISA {

enum { CHUNK = 512, CHUNK_LINES = CHUNK / 4 + 4, CHUNK_GROUPS = CHUNK / 16 };

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

// Sums of codes times x over quads FIRST to FIRST + COUNT of a step; x of the first of them.
template <int codec, int FIRST, int COUNT>
BN_INLINE vi quads_times_token(const uint8_t *p, const uint8_t *levels, const int8_t *x) {
    vi total = {}, part = {};
#define BN_QUAD(i)                                                                                                     \
    if constexpr (i < COUNT) {                                                                                         \
        if constexpr (bits_to_add(codec) == 8) {                                                                       \
            total = dot4(total, quad<codec, FIRST + i>(p, levels), splat_dword(x + 4 * i));                            \
        } else {                                                                                                       \
            part = add_small(part, quad<codec, FIRST + i>(p, levels), splat_dword(x + 4 * i));                         \
            if constexpr ((i + 1) % every(bits_to_add(codec)) == 0 || i + 1 == COUNT) {                                \
                total = total + dot4_of(part);                                                                         \
                part = (vi){};                                                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }
    BN_QUAD(0) BN_QUAD(1) BN_QUAD(2) BN_QUAD(3) BN_QUAD(4) BN_QUAD(5) BN_QUAD(6) BN_QUAD(7)
#undef BN_QUAD
    return total;
}

struct chunk { // of one block: its columns, and what its groups have
    const uint8_t *lines;
    int64_t first, columns, groups;
    alignas(64) float s[CHUNK_GROUPS * 16], t[CHUNK_GROUPS * 16];
};

BN_INLINE int64_t group_bytes(int kind) {
    return kind == GROUPS_HALF ? 32 : kind == GROUPS_HALF_MIN || kind == GROUPS_FLOAT ? 64 : kind == GROUPS_HALF_ZERO ? 48
         : kind == GROUPS_SUPER_MIN ? 32 : 16;
}
BN_INLINE int64_t super_bytes(int kind) { return kind == GROUPS_SUPER ? 32 : kind >= GROUPS_SUPER_MIN ? 64 : 0; }

// Scales and minimums of the groups from column `first` on.
static void read_groups(const bn_matrix &w, int64_t block, chunk &c) {
    int64_t columns = padded_columns(w), per_block = (columns + w.group - 1) / w.group, bytes = group_bytes(w.kind);
    int64_t supers = (columns + 255) / 256, from = c.first / w.group;
    c.groups = (c.first + c.columns + w.group - 1) / w.group - from;
    vf center = splat((float)-w.center);
    for (int64_t i = 0; i < c.groups; i++) {
        const uint8_t *p = w.groups + (block * per_block + from + i) * bytes;
        const uint16_t *super = nullptr;
        if (w.supers) super = (const uint16_t *)(w.supers + (block * supers + (from + i) * w.group / 256) * super_bytes(w.kind));
        vf s, t;
        switch (w.kind) {
        case GROUPS_HALF:
            s = from_half((const uint16_t *)p);
            t = center * s;
            break;
        case GROUPS_HALF_MIN:
            s = from_half((const uint16_t *)p);
            t = from_half((const uint16_t *)p + 16);
            break;
        case GROUPS_HALF_ZERO:
            s = from_half((const uint16_t *)p);
            t = -to_float(widen(p + 32)) * s;
            break;
        case GROUPS_FLOAT:
            s = load((const float *)p);
            t = center * s;
            break;
        case GROUPS_SUPER:
            s = from_half(super) * widen((const int8_t *)p);
            t = center * s;
            break;
        case GROUPS_SUPER_MIN:
            s = from_half(super) * to_float(widen(p));
            t = -from_half(super + 16) * to_float(widen(p + 16));
            break;
        default: {
            vi both = widen(p);
            s = from_half(super) * to_float(both & splat(15));
            t = -from_half(super + 16) * to_float((both >> 4) & splat(15));
        }
        }
        store(c.s + 16 * i, s);
        store(c.t + 16 * i, t);
    }
}

// Sums of MT tokens with one segment, already exact integers or floats, enter `sums` with the segment's s and t.
BN_INLINE vf enter(vf sum, vf part, vf s, vf t, float x_sum) { return fma(splat(x_sum), t, fma(part, s, sum)); }

// One token with the lines of a chunk: sums[16] += ...
template <int codec, int SEGMENT>
static void lines_times_token(const bn_matrix &w, const chunk &c, const activations &a, int64_t m, float *sums) {
    const uint8_t *p = c.lines;
    const int8_t *x = a.q + m * a.stride + c.first;
    int64_t at = m * a.segments + c.first / SEGMENT, per_group = w.group / SEGMENT;
    const float *scale = a.scale + at, *x_sum = a.sum + at;
    int64_t until = c.columns / SEGMENT;
    vf y = load(sums);
    if constexpr (SEGMENT == 16) {
        for (int64_t i = 0; i < until; i += 2, p += 64 * step_lines(codec), x += 32) {
            BN_PREFETCH(p + PREFETCH);
            vf part = to_float(quads_times_token<codec, 0, 4>(p, w.levels, x)) * splat(scale[i]);
            y = enter(y, part, load(c.s + 16 * i), load(c.t + 16 * i), x_sum[i]);
            part = to_float(quads_times_token<codec, 4, 4>(p, w.levels, x + 16)) * splat(scale[i + 1]);
            y = enter(y, part, load(c.s + 16 * i + 16), load(c.t + 16 * i + 16), x_sum[i + 1]);
        }
    } else {
        int64_t left = per_group - c.first / SEGMENT % per_group;
        const float *s = c.s, *t = c.t;
        for (int64_t i = 0; i < until; i++, p += 64 * step_lines(codec), x += SEGMENT) {
            vi sum;
            if constexpr (codec == CODEC_BASE3) {
                sum = block_times_token<CODEC_BASE3>(p, 13, x);
            } else {
                for (int l = 0; l < step_lines(codec); l++) BN_PREFETCH(p + PREFETCH + 64 * l);
                sum = quads_times_token<codec, 0, 8>(p, w.levels, x);
            }
            y = enter(y, to_float(sum) * splat(scale[i]), load(s), load(t), x_sum[i]);
            if (--left == 0) {
                left = per_group;
                s += 16;
                t += 16;
            }
        }
    }
    store(sums, y);
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
            BN_PREFETCH(p + PREFETCH);
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

// MT tokens with an unpacked chunk: sums[m * 32 ..] += ...; BITS of the codes, 8 for any.
template <int MT, int BITS>
static void codes_times_tokens(const bn_matrix &w, const chunk &c, const uint8_t *codes, const activations &a, int64_t m,
                               float *sums) {
    int64_t segment = segment_of(w), at = m * a.segments + c.first / segment, per_group = w.group / segment;
    int64_t left = per_group - c.first / segment % per_group;
    const int8_t *x = a.q + m * a.stride + c.first;
    const float *s = c.s, *t = c.t;
    for (int64_t i = 0; i < c.columns / segment; i++, x += segment) {
        vi total[MT], part[MT];
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++) total[j] = (vi){};
        if constexpr (BITS == 8) {
            for (int64_t k = 0; k < segment; k += 4, codes += 64) {
                vb v = load_line(codes);
#pragma GCC unroll 12
                for (int j = 0; j < MT; j++) total[j] = dot4(total[j], v, splat_dword(x + j * a.stride + k));
            }
        } else {
            constexpr int EVERY = every(BITS) < 4 ? every(BITS) : 4;
            for (int64_t k = 0; k < segment; k += 4 * EVERY) {
#pragma GCC unroll 12
                for (int j = 0; j < MT; j++) part[j] = (vi){};
#pragma GCC unroll 4
                for (int e = 0; e < EVERY; e++, codes += 64) {
                    vb v = load_line(codes);
#pragma GCC unroll 12
                    for (int j = 0; j < MT; j++)
                        part[j] = add_small(part[j], v, splat_dword(x + j * a.stride + k + 4 * e));
                }
#pragma GCC unroll 12
                for (int j = 0; j < MT; j++) total[j] = total[j] + dot4_of(part[j]);
            }
        }
        vf S = load(s), T = load(t);
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++) {
            int64_t n = at + j * a.segments + i;
            vf y = load(sums + 32 * j);
            store(sums + 32 * j, enter(y, to_float(total[j]) * splat(a.scale[n]), S, T, a.sum[n]));
        }
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
// meet its scales with the outputs of all tokens in registers. Neighbouring segments have tiles of their own.
static void codes_times_tiles(const bn_matrix &w, const chunk &c, const uint8_t *codes, const activations &a, int64_t m,
                              float *sums) {
    int64_t segment = segment_of(w), at = m * a.segments + c.first / segment, per_group = w.group / segment;
    int64_t left = per_group - c.first / segment % per_group;
    const int8_t *x = a.q + m * a.stride + c.first;
    const float *s = c.s, *t = c.t;
    alignas(64) int32_t part[2][TILE_TOKENS * 16];
    vf y[TILE_TOKENS];
    BN_WRITTEN(codes);
#pragma GCC unroll 16
    for (int j = 0; j < TILE_TOKENS; j++) y[j] = load(sums + 32 * j);
    for (int64_t i = 0; i < c.columns / segment; i++) {
        int32_t *products = part[i % 2];
#define BN_SEGMENT(total, tokens, rows)                                                                                \
    _tile_zero(total);                                                                                                 \
    for (int64_t k = 0; k < segment; k += 64, codes += 16 * (segment < 64 ? segment : 64)) {                           \
        _tile_loadd(tokens, x + i * segment + k, a.stride);                                                            \
        _tile_loadd(rows, codes, 64);                                                                                  \
        _tile_dpbsud(total, tokens, rows);                                                                             \
    }                                                                                                                  \
    _tile_stored(total, products, 64);
        if (i % 2 == 0) {
            BN_SEGMENT(0, 4, 6)
        } else {
            BN_SEGMENT(1, 5, 7)
        }
#undef BN_SEGMENT
        vf S = load(s), T = load(t);
#pragma GCC unroll 16
        for (int j = 0; j < TILE_TOKENS; j++) {
            int64_t n = at + j * a.segments + i;
            y[j] = enter(y[j], to_float(load(products + 16 * j)) * splat(a.scale[n]), S, T, a.sum[n]);
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

// The same with float activations.
template <int MT, bool VALUES>
static void codes_times_floats(const bn_matrix &w, const chunk &c, const uint8_t *codes, const activations &a, int64_t m,
                               float *sums) {
    int64_t segment = segment_of(w), at = m * a.segments + c.first / segment, per_group = w.group / segment;
    int64_t left = per_group - c.first / segment % per_group;
    const float *x = a.x + m * a.stride + c.first, *s = c.s, *t = c.t;
    for (int64_t i = 0; i < c.columns / segment; i++, x += segment) {
        vf part[MT];
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++) part[j] = (vf){};
        for (int64_t k = 0; k < segment; k += 4, codes += 64) {
            vb v = load_line(codes);
#define BN_BYTE(b)                                                                                                     \
    {                                                                                                                  \
        vf f;                                                                                                          \
        if constexpr (VALUES) f = lookup(byte_of<b>(v), w.values);                                                     \
        else f = to_float(byte_of<b>(v));                                                                              \
        _Pragma("GCC unroll 12") for (int j = 0; j < MT; j++)                                                          \
            part[j] = fma(f, splat(x[j * a.stride + k + b]), part[j]);                                                 \
    }
            BN_BYTE(0) BN_BYTE(1) BN_BYTE(2) BN_BYTE(3)
#undef BN_BYTE
        }
        vf S = load(s), T = load(t);
#pragma GCC unroll 12
        for (int j = 0; j < MT; j++) {
            vf y = load(sums + 32 * j);
            store(sums + 32 * j, enter(y, part[j], S, T, a.sum[at + j * a.segments + i]));
        }
        if (--left == 0) {
            left = per_group;
            s += 16;
            t += 16;
        }
    }
}

// A chunk with all tokens; `codes` is room for it unpacked.
template <int codec>
static void chunk_times_tokens(const bn_matrix &w, const chunk &c, const activations &a, int64_t M, uint8_t *codes,
                               float *sums) {
    constexpr int BITS = bits_to_add(codec);
    if (w.x != X_FLOAT && M <= DIRECT) {
        for (int64_t m = 0; m < M; m++, sums += 32) {
            if constexpr (codec == CODEC_BASE3) {
                lines_times_token<codec, 256>(w, c, a, m, sums);
            } else {
                if (w.group == 16) lines_times_token<codec, 16>(w, c, a, m, sums);
                else lines_times_token<codec, 32>(w, c, a, m, sums);
            }
        }
        return;
    }
    unpack_steps<codec>(w, c, codes);
    int64_t m = 0;
#if defined(BN_AMX)
    if (w.x != X_FLOAT)
        for (; m + TILE_TOKENS <= M; m += TILE_TOKENS) codes_times_tiles(w, c, codes, a, m, sums + 32 * m);
#endif
#define BN_TILES(n)                                                                                                    \
    for (; m + n <= M; m += n) {                                                                                       \
        if (w.x != X_FLOAT) codes_times_tokens<n, BITS>(w, c, codes, a, m, sums + 32 * m);                             \
        else if (w.values) codes_times_floats<n, true>(w, c, codes, a, m, sums + 32 * m);                              \
        else codes_times_floats<n, false>(w, c, codes, a, m, sums + 32 * m);                                           \
    }
    BN_TILES(FLOAT_TILE)
    if constexpr (FLOAT_TILE > 2) BN_TILES(2)
    if constexpr (FLOAT_TILE > 1) BN_TILES(1)
#undef BN_TILES
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
    tiles ready(w.x != X_FLOAT && M > DIRECT, segment < 64 ? (int)segment : 64);
    chunk c;
    for (int64_t panel = first; panel < last; panel++) {
        memset(sums, 0, M * 32 * sizeof(float));
        for (int64_t k = 0; k < padded_columns(w); k += CHUNK)
            for (int64_t b = 0; b < 2; b++) {
                cut(w, 2 * panel + b, k, c);
                BN_GROUP_CODECS(w.codec, chunk_times_tokens, w, c, a, M, codes, sums + 16 * b)
            }
        vf s0 = load(w.scale + 32 * panel), s1 = load(w.scale + 32 * panel + 16);
        for (int64_t m = 0; m < M; m++)
            finish(w, to, panel, load(sums + 32 * m) * s0, load(sums + 32 * m + 16) * s1, m);
    }
}
BN_INLINE int64_t group_scratch(int64_t M) { return M * 128 + CHUNK_LINES * 64 + 64; }

} // namespace BN_ISA
} // namespace bn
