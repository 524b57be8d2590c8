// Packed lines of codes with a scale a row (CODEC_TWO_BIT, BASE3, FOUR_BIT, EIGHT_BIT): multiplied as they are, for a few
// tokens, and unpacked.
#pragma once

#include "activations.h"

namespace bn {
namespace BN_ISA {

BN_INLINE int offset_of(int codec) { return codec == CODEC_EIGHT_BIT ? 128 : codec == CODEC_FOUR_BIT ? 8 : 1; }
BN_INLINE constexpr int quads_of(int codec) { // groups of four K in a line
    return codec == CODEC_BASE3 ? 5 : codec == CODEC_TWO_BIT ? 4 : codec == CODEC_FOUR_BIT ? 2 : 1;
}

enum { PREFETCH = 8192 }; // bytes ahead: measured best of 0 to 16384 on a Xeon, with huge pages

// Sums of unsigned codes times x for the 16 rows of one block and one token.
template <int codec> BN_INLINE vi block_times_token(const uint8_t *p, int64_t lines, const int8_t *x) {
    vi zero = {};
    if constexpr (codec == CODEC_BASE3) {
        vi p0 = zero, p1 = zero, p2 = zero, q0 = zero, q1 = zero, q2 = zero;
        for (int64_t l = 0; l < lines; l++, p += 64, x += 20) {
            vb v = load_line(p);
            BN_PREFETCH(p + PREFETCH);
#define BN_DIGIT(P, Q, i)                                                                                              \
    {                                                                                                                  \
        vi t = splat_dword(x + 4 * i);                                                                                 \
        P = dot4(P, v, t);                                                                                             \
        v = v + (v + v);                                                                                               \
        Q = dot4(Q, v, t);                                                                                             \
    }
            BN_DIGIT(p0, q0, 0) BN_DIGIT(p1, q1, 1) BN_DIGIT(p2, q2, 2) BN_DIGIT(p0, q0, 3) BN_DIGIT(p1, q1, 4)
#undef BN_DIGIT
        }
        vi s = p0 + p1 + p2; // sums wrap around, which is exact as long as the result itself fits: K < 32768
        return (s + s + s - q0 - q1 - q2) >> 8;
    } else if constexpr (codec == CODEC_TWO_BIT) {
        // Codes keep their place in the byte; the three sums are shifted back once at the end. The fourth field would
        // reach 192, too much for vpmaddubsw.
        vi a0 = zero, a1 = zero, a2 = zero, a3 = zero, b0 = zero, b1 = zero, b2 = zero, b3 = zero;
#define BN_LINE(a0, a1, a2, a3)                                                                                        \
    {                                                                                                                  \
        vb v = load_line(p);                                                                                           \
        BN_PREFETCH(p + PREFETCH);                                                                                     \
        a0 = dot4_small(a0, v & 3, splat_dword(x));                                                                    \
        a1 = dot4_small(a1, v & 12, splat_dword(x + 4));                                                               \
        a2 = dot4_small(a2, v & 48, splat_dword(x + 8));                                                               \
        a3 = dot4_small(a3, v >> 6, splat_dword(x + 12));                                                              \
        p += 64;                                                                                                       \
        x += 16;                                                                                                       \
    }
        int64_t l = 0;
        for (; l + 2 <= lines; l += 2) {
            BN_LINE(a0, a1, a2, a3)
            BN_LINE(b0, b1, b2, b3)
        }
        if (l < lines) BN_LINE(a0, a1, a2, a3)
#undef BN_LINE
        return (a0 + b0) + ((a1 + b1) >> 2) + ((a2 + b2) >> 4) + (a3 + b3);
    } else if constexpr (codec == CODEC_FOUR_BIT) {
        vi a0 = zero, a1 = zero, b0 = zero, b1 = zero;
        for (int64_t l = 0; l < lines; l++, p += 64, x += 8) {
            vb v = load_line(p);
            BN_PREFETCH(p + PREFETCH);
            a0 = dot4_small(a0, v & 15, splat_dword(x));
            a1 = dot4_small(a1, v >> 4, splat_dword(x + 4));
            vi t = a0; // two pairs of sums in turn hide the latency
            a0 = b0; b0 = t; t = a1; a1 = b1; b1 = t;
        }
        return a0 + a1 + b0 + b1;
    } else {
        vi a0 = zero, a1 = zero, a2 = zero, a3 = zero; // named: gcc keeps an array of them in memory
        int64_t l = 0;
        for (; l + 4 <= lines; l += 4, p += 256, x += 16) {
            BN_PREFETCH(p + PREFETCH);
            a0 = dot4(a0, load_line(p), splat_dword(x));
            BN_PREFETCH(p + 64 + PREFETCH);
            a1 = dot4(a1, load_line(p + 64), splat_dword(x + 4));
            BN_PREFETCH(p + 128 + PREFETCH);
            a2 = dot4(a2, load_line(p + 128), splat_dword(x + 8));
            BN_PREFETCH(p + 192 + PREFETCH);
            a3 = dot4(a3, load_line(p + 192), splat_dword(x + 12));
        }
        for (; l < lines; l++, p += 64, x += 4) a0 = dot4(a0, load_line(p), splat_dword(x));
        return a0 + a1 + a2 + a3;
    }
}

// The same of MT tokens, for which each line is loaded and taken apart once.
template <int codec, int MT>
BN_INLINE void block_times_tokens(const uint8_t *p, int64_t lines, const int8_t *x, int64_t stride, vi *total) {
    constexpr int QUADS = quads_of(codec), BITS = 8 / QUADS;
#define BN_FIELDS(f) f(0) f(1) f(2) f(3)
#pragma GCC unroll 8
    for (int j = 0; j < MT; j++) total[j] = (vi){};
    if constexpr (SHORT_SUMS) { // added in 16 bits for as long as those hold them
        constexpr int LINES = BITS == 8 ? 1 : every(BITS) / QUADS;
        for (int64_t l = 0; l < lines;) {
            int64_t end = lines - l < LINES ? lines : l + LINES;
            vi part[MT];
#pragma GCC unroll 8
            for (int j = 0; j < MT; j++) part[j] = (vi){};
            for (; l < end; l++, p += 64, x += 4 * QUADS) {
                vb v = load_line(p);
                BN_PREFETCH(p + PREFETCH);
#define BN_FIELD(i)                                                                                                    \
    if constexpr (i < QUADS) {                                                                                         \
        vb codes = BITS == 8 ? v : field<BITS * i, 0>(v, (1 << BITS) - 1);                                             \
        _Pragma("GCC unroll 8") for (int j = 0; j < MT; j++) {                                                         \
            vi t = splat_dword(x + j * stride + 4 * i);                                                                \
            if constexpr (BITS == 8) total[j] = dot4(total[j], codes, t);                                              \
            else part[j] = add_small(part[j], codes, t);                                                               \
        }                                                                                                              \
    }
                BN_FIELDS(BN_FIELD)
#undef BN_FIELD
            }
            if constexpr (BITS < 8)
#pragma GCC unroll 8
                for (int j = 0; j < MT; j++) total[j] = total[j] + dot4_of(part[j]);
        }
        return;
    }
    // Sums of their own for codes of every place hide the latency, where there are registers for them, and need no shift:
    // but for the last, which would be too large for some, codes stay where they are in the byte.
    constexpr int SUMS = MT <= 4 ? QUADS : 1;
    vi part[SUMS][MT];
#pragma GCC unroll 4
    for (int i = 0; i < SUMS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < MT; j++) part[i][j] = (vi){};
    for (int64_t l = 0; l < lines; l++, p += 64, x += 4 * QUADS) {
        vb v = load_line(p);
        BN_PREFETCH(p + PREFETCH);
#define BN_FIELD(i)                                                                                                    \
    if constexpr (i < QUADS) {                                                                                         \
        constexpr bool IN_PLACE = SUMS > 1 && i < QUADS - 1;                                                           \
        vb codes = BITS == 8 ? v : field<BITS * i, IN_PLACE ? BITS * i : 0>(v, ((1 << BITS) - 1) << (IN_PLACE ? BITS * i : 0)); \
        _Pragma("GCC unroll 8") for (int j = 0; j < MT; j++) {                                                         \
            vi t = splat_dword(x + j * stride + 4 * i), &sum = part[SUMS > 1 ? i : 0][j];                              \
            sum = BITS == 8 ? dot4(sum, codes, t) : dot4_small(sum, codes, t);                                         \
        }                                                                                                              \
    }
        BN_FIELDS(BN_FIELD)
#undef BN_FIELD
    }
#undef BN_FIELDS
#pragma GCC unroll 8
    for (int j = 0; j < MT; j++)
#pragma GCC unroll 4
        for (int i = 0; i < SUMS; i++) total[j] = total[j] + (i < SUMS - 1 ? part[i][j] >> BITS * i : part[i][j]);
}

BN_INLINE vi block_times_token(const bn_matrix &w, int64_t block, const int8_t *x) {
    const uint8_t *p = w.lines + block * w.lines_per_block * 64;
    switch (w.codec) {
    case CODEC_BASE3: return block_times_token<CODEC_BASE3>(p, w.lines_per_block, x);
    case CODEC_TWO_BIT: return block_times_token<CODEC_TWO_BIT>(p, w.lines_per_block, x);
    case CODEC_FOUR_BIT: return block_times_token<CODEC_FOUR_BIT>(p, w.lines_per_block, x);
    default: return block_times_token<CODEC_EIGHT_BIT>(p, w.lines_per_block, x);
    }
}

// Lines of a block as unsigned codes, a line for every four K: [lines * quads_of(codec), 64]. Returns their end.
static uint8_t *unpack_lines(int codec, const uint8_t *p, int64_t lines, uint8_t *out) {
    for (const uint8_t *end = p + 64 * lines; p < end; p += 64) {
        vb v = load_line(p);
        BN_PREFETCH(p + PREFETCH);
        if (codec == CODEC_TWO_BIT) {
            store_line(out, v & 3);
            store_line(out + 64, (v >> 2) & 3);
            store_line(out + 128, (v >> 4) & 3);
            store_line(out + 192, v >> 6);
            out += 256;
        } else if (codec == CODEC_BASE3) {
#pragma GCC unroll 5
            for (int i = 0; i < 5; i++) { // the digit is how many thirds of 256 are in v
                vb digit = above(v, 85) + above(v, 170);
                store_line(out, digit);
                v = v + (v + v);
                out += 64;
            }
        } else if (codec == CODEC_FOUR_BIT) {
            store_line(out, v & 15);
            store_line(out + 64, v >> 4);
            out += 128;
        } else {
            store_line(out, v);
            out += 64;
        }
    }
    return out;
}

} // namespace BN_ISA
} // namespace bn
