// Ternary and integer products: int8 activations, packed weights, int32 sums, exact.
//
// Letters: M tokens, N rows of the weights, K columns. A panel is 32 rows, two blocks. For a few tokens the packed lines
// are multiplied as they are; for more, a panel is unpacked once into the cache and used by all tokens.
#pragma once

#include <stdlib.h>

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

// The same of MT tokens, where short sums are added in 16 bits for as long as those hold them.
template <int codec, int MT>
BN_INLINE void block_times_tokens(const uint8_t *p, int64_t lines, const int8_t *x, int64_t stride, vi *total) {
    constexpr int QUADS = quads_of(codec), BITS = 8 / QUADS, LINES = BITS == 8 ? 1 : every(BITS) / QUADS;
#pragma GCC unroll 4
    for (int j = 0; j < MT; j++) total[j] = (vi){};
    for (int64_t l = 0; l < lines;) {
        int64_t end = lines - l < LINES ? lines : l + LINES;
        vi part[MT];
#pragma GCC unroll 4
        for (int j = 0; j < MT; j++) part[j] = (vi){};
        for (; l < end; l++, p += 64, x += 4 * QUADS) {
            vb v = load_line(p);
            BN_PREFETCH(p + PREFETCH);
#define BN_FIELD(i)                                                                                                    \
    if constexpr (i < QUADS) {                                                                                         \
        vb codes = BITS == 8 ? v : field<BITS * i, 0>(v, (1 << BITS) - 1);                                             \
        _Pragma("GCC unroll 4") for (int j = 0; j < MT; j++) {                                                         \
            vi t = splat_dword(x + j * stride + 4 * i);                                                                \
            if constexpr (BITS == 8) total[j] = dot4(total[j], codes, t);                                              \
            else part[j] = add_small(part[j], codes, t);                                                               \
        }                                                                                                              \
    }
            BN_FIELD(0) BN_FIELD(1) BN_FIELD(2) BN_FIELD(3)
#undef BN_FIELD
        }
        if constexpr (BITS < 8)
#pragma GCC unroll 4
            for (int j = 0; j < MT; j++) total[j] = total[j] + dot4_of(part[j]);
    }
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

// One block as unsigned codes, a line for every four K: [quads, 64].
static void unpack_block(const bn_matrix &w, int64_t block, uint8_t *out, int64_t quads) {
    const uint8_t *p = w.lines + block * w.lines_per_block * 64;
    uint8_t *end = out + quads * 64;
    for (int64_t l = 0; l < w.lines_per_block; l++, p += 64) {
        vb v = load_line(p);
        BN_PREFETCH(p + PREFETCH);
        if (w.codec == CODEC_TWO_BIT) {
            store_line(out, v & 3);
            store_line(out + 64, (v >> 2) & 3);
            store_line(out + 128, (v >> 4) & 3);
            store_line(out + 192, v >> 6);
            out += 256;
        } else if (w.codec == CODEC_BASE3) {
#pragma GCC unroll 5
            for (int i = 0; i < 5; i++) { // the digit is how many thirds of 256 are in v
                vb digit = above(v, 85) + above(v, 170);
                store_line(out, digit);
                v = v + (v + v);
                out += 64;
            }
        } else if (w.codec == CODEC_FOUR_BIT) {
            store_line(out, v & 15);
            store_line(out + 64, v >> 4);
            out += 128;
        } else {
            store_line(out, v);
            out += 64;
        }
    }
    if (out < end) memset(out, 0, end - out);
}

// sums[m][32] of MT tokens with the two blocks at p0 and p1; accumulators are named, since gcc keeps arrays of vectors
// in memory.
#if defined(BN_AVX512)
enum { TILE = 12, BLOCKS = 2 };
#else
enum { TILE = SHORT_SUMS ? 6 : 4, BLOCKS = 1 };
#endif

// BITS of the codes. They are added up where `add_small` does, for as long as there is room.
template <int MT, int NB, int BITS>
BN_INLINE void tile(const uint8_t *p0, const uint8_t *p1, int64_t quads, const int8_t *x, int64_t stride, int32_t *sums) {
    constexpr bool FULL = BITS == 8 && !SHORT_SUMS;
#define BN_EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define BN_DECLARE(m) vi a##m = {}, b##m = {};
    BN_EACH(BN_DECLARE)
#define BN_BEGIN(m) vi c##m = {}, d##m = {};
#define BN_STEP(m)                                                                                                     \
    if constexpr (m < MT) {                                                                                            \
        vi t = splat_dword(x + m * stride + 4 * k);                                                                    \
        c##m = FULL ? dot4(c##m, w0, t) : add_small(c##m, w0, t);                                                      \
        if constexpr (NB == 2) d##m = FULL ? dot4(d##m, w1, t) : add_small(d##m, w1, t);                               \
    }
#define BN_END(m, half)                                                                                                \
    if constexpr (m < MT) {                                                                                            \
        a##m = a##m + ((FULL ? c##m : dot4_of(c##m)) << 4 * half);                                                     \
        if constexpr (NB == 2) b##m = b##m + ((FULL ? d##m : dot4_of(d##m)) << 4 * half);                              \
    }
#define BN_HALF(half, end_of)                                                                                          \
    if constexpr (half < halves(BITS)) {                                                                               \
        BN_EACH(BN_BEGIN)                                                                                              \
        for (int64_t k = begin; k < end; k++) {                                                                        \
            vb w0 = half_of<BITS, half>(load_line(p0 + 64 * k)), w1;                                                   \
            if constexpr (NB == 2) w1 = half_of<BITS, half>(load_line(p1 + 64 * k));                                   \
            BN_EACH(BN_STEP)                                                                                           \
        }                                                                                                              \
        BN_EACH(end_of)                                                                                                \
    }
#define BN_END_LOW(m) BN_END(m, 0)
#define BN_END_HIGH(m) BN_END(m, 1)
    constexpr int64_t EVERY = SHORT_SUMS ? every(half_bits(BITS)) : INT64_MAX;
    for (int64_t begin = 0, end = 0; begin < quads; begin = end) {
        end = quads - begin < EVERY ? quads : begin + EVERY;
        BN_HALF(0, BN_END_LOW)
        BN_HALF(1, BN_END_HIGH)
    }
#undef BN_HALF
#undef BN_END_LOW
#undef BN_END_HIGH
#undef BN_BEGIN
#undef BN_END
#define BN_STORE(m)                                                                                                    \
    if constexpr (m < MT) {                                                                                            \
        store(sums + 32 * m, a##m);                                                                                    \
        if constexpr (NB == 2) store(sums + 32 * m + 16, b##m);                                                        \
    }
    BN_EACH(BN_STORE)
#undef BN_EACH
#undef BN_DECLARE
#undef BN_STEP
#undef BN_STORE
}

template <int MT, int BITS>
static void tile_both(const uint8_t *p0, const uint8_t *p1, int64_t quads, const int8_t *x, int64_t stride, int32_t *s) {
    if constexpr (BLOCKS == 2) {
        tile<MT, 2, BITS>(p0, p1, quads, x, stride, s);
    } else {
        tile<MT, 1, BITS>(p0, p0, quads, x, stride, s);
        tile<MT, 1, BITS>(p1, p1, quads, x, stride, s + 16);
    }
}

// sums[m][32] of all M tokens with a panel.
template <int BITS>
static void panel_times_tokens(const uint8_t *p0, const uint8_t *p1, int64_t quads, const int8_t *x, int64_t stride,
                               int64_t M, int32_t *sums) {
    int64_t m = 0;
    for (; m + TILE <= M; m += TILE) tile_both<TILE, BITS>(p0, p1, quads, x + m * stride, stride, sums + 32 * m);
    for (; m + 4 <= M; m += 4) tile_both<4, BITS>(p0, p1, quads, x + m * stride, stride, sums + 32 * m);
    for (; m + 2 <= M; m += 2) tile_both<2, BITS>(p0, p1, quads, x + m * stride, stride, sums + 32 * m);
    for (; m < M; m++) tile_both<1, BITS>(p0, p1, quads, x + m * stride, stride, sums + 32 * m);
}

#if defined(BN_AMX)
// Tiles of 16 tokens x 64 K and 64 K x 16 rows; an unpacked block already lies in the order that a tile of weights
// wants. tdpbsud multiplies signed activations by unsigned codes. Tokens are read 32 at a time, so x has rows to spare.
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
// gcc's tile instructions do not say that they read memory: what they read must have been written before this.
#define BN_WRITTEN(p) __asm__ volatile("" ::"r"(p) : "memory")
// The tiles of a thread, while it multiplies. Another library in the process may have configured them for itself, once
// for all, so its configuration is put back.
struct tiles {
    alignas(64) tile_config before;
    bool on;
    // `width`: bytes of a row of activations in tiles 4 and 5, four of which make a row of weights in tiles 6 and 7.
    explicit tiles(bool wanted, int width = 64) : on(wanted) {
        if (!on) return;
        _tile_storeconfig(&before);
        tile_config c = {};
        c.palette = 1;
        for (int i = 0; i < 8; i++) {
            c.bytes[i] = (uint16_t)(i == 4 || i == 5 ? width : 64);
            c.rows[i] = (uint8_t)(i == 6 || i == 7 ? width / 4 : 16);
        }
        BN_WRITTEN(&c);
        _tile_loadconfig(&c);
    }
    ~tiles() {
        if (!on) return;
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
    tiles(const tiles &) = delete;
};

static void panel_times_tokens_amx(const uint8_t *p0, const uint8_t *p1, int64_t quads, const int8_t *x, int64_t stride,
                                   int64_t M, int32_t *sums) {
    BN_WRITTEN(p0);
    for (int64_t m = 0; m < M; m += 32) {
        int32_t *s = sums + 32 * m;
        const int8_t *x0 = x + m * stride, *x1 = x0 + 16 * stride;
        bool wide = M - m > 16;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        if (wide)
            for (int64_t k = 0; k < quads; k += 16) {
                _tile_loadd(4, x0 + 4 * k, stride);
                _tile_loadd(6, p0 + 64 * k, 64);
                _tile_loadd(7, p1 + 64 * k, 64);
                _tile_loadd(5, x1 + 4 * k, stride);
                _tile_dpbsud(0, 4, 6);
                _tile_dpbsud(1, 4, 7);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        else
            for (int64_t k = 0; k < quads; k += 16) {
                _tile_loadd(4, x0 + 4 * k, stride);
                _tile_loadd(6, p0 + 64 * k, 64);
                _tile_loadd(7, p1 + 64 * k, 64);
                _tile_dpbsud(0, 4, 6);
                _tile_dpbsud(1, 4, 7);
            }
        _tile_stored(0, s, 128);
        _tile_stored(1, s + 16, 128);
        if (wide) {
            _tile_stored(2, s + 512, 128);
            _tile_stored(3, s + 528, 128);
        }
    }
}
#endif

#if !defined(BN_AMX)
struct tiles {
    explicit tiles(bool, int = 64) {}
};
#endif

// ---- from sums to outputs ----

// The sums of one token with the two blocks of panel `panel`, less the offset, scaled, and on to where they go.
BN_INLINE void finish_sums(const bn_matrix &w, const target &to, int64_t panel, vi s0, vi s1, float scale, int32_t total,
                           int64_t m) {
    vi back = splat(offset_of(w.codec) * total);
    int64_t n = 32 * panel;
    s0 = s0 - back;
    s1 = s1 - back;
    if (to.out == OUT_INT32) {
        int32_t *y = (int32_t *)to.y + m * to.stride + n, t[32];
        store(t, s0);
        store(t + 16, s1);
        for (int64_t r = 0; r < 32 && n + r < to.columns; r++) y[r] = t[r];
        return;
    }
    finish(w, to, panel, to_float(s0) * splat(scale) * load(w.scale + n),
           to_float(s1) * splat(scale) * load(w.scale + n + 16), m);
}

// Up to so many tokens are multiplied one by one with packed lines. Unpacking a panel costs about as much as multiplying
// them: on AMX (two cores, 0.7B shape) steps of 1, 2 and 4 rows that unpack for each of them take 14, 20 and 34 ms, and 8
// rows on unpacked tiles 34.
#if defined(BN_AVX2) && !defined(BN_AVXVNNI)
enum { DIRECT = 1 };
#elif defined(BN_AMX)
enum { DIRECT = 3 };
#else
enum { DIRECT = 6 };
#endif

// Up to so many tokens, of so many digits, are multiplied with packed lines of codes of so many bits. With short sums it is
// a few of them at once, as lines come: unpacking and multiplying in turns leaves the memory idle (0.7B shape, two cores of
// an EPYC, 2 rows: 2.1x).
BN_INLINE constexpr int64_t in_lines(int bits, int digits = 1) {
    return !SHORT_SUMS ? DIRECT / digits : digits > 1 ? 5 : bits == 8 ? 4 : 8;
}

// Bytes of scratch that one thread needs for more than DIRECT tokens.
BN_INLINE int64_t token_scratch(int64_t K, int64_t M) { return round_up(K + 20, 64) * 32 + round_up(M, 32) * 128 + 64; }

// `multiply_tokens` of so few tokens that the packed lines are multiplied as they come from memory.
template <int codec>
static void multiply_few(const bn_matrix &w, const int8_t *x, int64_t stride, const float *scale, const int32_t *total,
                         int64_t M, const target &to, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
        const uint8_t *p0 = w.lines + 2 * panel * w.lines_per_block * 64, *p1 = p0 + w.lines_per_block * 64;
        int64_t m = 0;
#define BN_FEW(n)                                                                                                      \
    for (; m + n <= M; m += n) {                                                                                       \
        vi s0[n], s1[n];                                                                                               \
        block_times_tokens<codec, n>(p0, w.lines_per_block, x + m * stride, stride, s0);                               \
        block_times_tokens<codec, n>(p1, w.lines_per_block, x + m * stride, stride, s1);                               \
        for (int j = 0; j < n; j++) finish_sums(w, to, panel, s0[j], s1[j], scale[m + j], total[m + j], m + j);        \
    }
        BN_FEW(4) BN_FEW(3) BN_FEW(2) BN_FEW(1)
#undef BN_FEW
    }
}

// The panels from `first` to `last`. x: [M, stride] int8, zero from K on, with 32 rows to spare for AMX.
static void multiply_tokens(const bn_matrix &w, const int8_t *x, int64_t stride, const float *scale, const int32_t *total,
                     int64_t M, const target &to, int64_t first, int64_t last, uint8_t *scratch) {
    if (SHORT_SUMS && w.codec != CODEC_BASE3 && M <= in_lines(8 / quads_of(w.codec))) {
        if (w.codec == CODEC_TWO_BIT) return multiply_few<CODEC_TWO_BIT>(w, x, stride, scale, total, M, to, first, last);
        if (w.codec == CODEC_FOUR_BIT) return multiply_few<CODEC_FOUR_BIT>(w, x, stride, scale, total, M, to, first, last);
        return multiply_few<CODEC_EIGHT_BIT>(w, x, stride, scale, total, M, to, first, last);
    }
    if (M <= DIRECT) { // a block is 8 KiB or so: the second token finds it in the first-level cache
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t m = 0; m < M; m++)
                finish_sums(w, to, panel, block_times_token(w, 2 * panel, x + m * stride),
                            block_times_token(w, 2 * panel + 1, x + m * stride), scale[m], total[m], m);
        return;
    }
    int64_t quads = round_up(w.lines_per_block * quads_of(w.codec), 16);
    uint8_t *p0 = (uint8_t *)round_up((int64_t)scratch, 64), *p1 = p0 + quads * 64;
    int32_t *sums = (int32_t *)(p1 + quads * 64);
    for (int64_t panel = first; panel < last; panel++) {
        unpack_block(w, 2 * panel, p0, quads);
        unpack_block(w, 2 * panel + 1, p1, quads);
#if defined(BN_AMX)
        panel_times_tokens_amx(p0, p1, quads, x, stride, M, sums);
#else
        if (!SHORT_SUMS || w.codec == CODEC_EIGHT_BIT) panel_times_tokens<8>(p0, p1, quads, x, stride, M, sums);
        else if (w.codec == CODEC_FOUR_BIT) panel_times_tokens<4>(p0, p1, quads, x, stride, M, sums);
        else panel_times_tokens<2>(p0, p1, quads, x, stride, M, sums);
#endif
        for (int64_t m = 0; m < M; m++)
            finish_sums(w, to, panel, load(sums + 32 * m), load(sums + 32 * m + 16), scale[m], total[m], m);
    }
}

} // namespace BN_ISA
} // namespace bn
