// Ternary and integer products: int8 activations, packed weights, int32 sums, exact.
//
// Letters: M tokens, N rows of the weights, K columns. A panel is 32 rows, two blocks. For a few tokens the packed lines
// are multiplied as they are (lines.h); for more, a panel is unpacked, piece by piece, into the cache for many of them.
#pragma once

#include <stdlib.h>

#include "lines.h"

namespace bn {
namespace BN_ISA {

// sums[m][32] += MT tokens with the two blocks at p0 and p1; accumulators are named, since gcc keeps arrays of vectors
// in memory.
#if defined(BN_AVX512)
enum { TILE = 12, BLOCKS = 2 };
#else
enum { TILE = SHORT_SUMS ? 6 : 4, BLOCKS = 1 };
#endif

// BITS of the codes. Short sums are added up where `add_small` does, for as long as there is room.
template <int MT, int NB, int BITS>
BN_INLINE void tile(const uint8_t *p0, const uint8_t *p1, int64_t quads, const int8_t *x, int64_t stride, int32_t *sums) {
#define BN_EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define BN_DECLARE(m) vi a##m = {}, b##m = {};
#define BN_LOAD(m)                                                                                                     \
    if constexpr (m < MT) {                                                                                            \
        a##m = load(sums + 32 * m);                                                                                    \
        if constexpr (NB == 2) b##m = load(sums + 32 * m + 16);                                                        \
    }
#define BN_STEP(m)                                                                                                     \
    if constexpr (m < MT) {                                                                                            \
        vi t = splat_dword(x + m * stride + 4 * k);                                                                    \
        a##m = SHORT_SUMS ? add_small(a##m, w0, t) : dot4(a##m, w0, t);                                                \
        if constexpr (NB == 2) b##m = SHORT_SUMS ? add_small(b##m, w1, t) : dot4(b##m, w1, t);                         \
    }
#define BN_ADD(m, half)                                                                                                \
    if constexpr (m < MT) {                                                                                            \
        store(sums + 32 * m, load(sums + 32 * m) + (dot4_of(a##m) << 4 * half));                                       \
        if constexpr (NB == 2) store(sums + 32 * m + 16, load(sums + 32 * m + 16) + (dot4_of(b##m) << 4 * half));      \
    }
#define BN_STORE(m)                                                                                                    \
    if constexpr (m < MT) {                                                                                            \
        store(sums + 32 * m, a##m);                                                                                    \
        if constexpr (NB == 2) store(sums + 32 * m + 16, b##m);                                                        \
    }
#define BN_STEPS(begin, end, half)                                                                                     \
    for (int64_t k = begin; k < end; k++) BN_ONE(half)
#define BN_ONE(half)                                                                                                   \
    {                                                                                                                  \
        vb w0 = half_of<BITS, half>(load_line(p0 + 64 * k)), w1;                                                       \
        if constexpr (NB == 2) w1 = half_of<BITS, half>(load_line(p1 + 64 * k));                                       \
        BN_EACH(BN_STEP)                                                                                               \
    }
#define BN_ADD_LOW(m) BN_ADD(m, 0)
#define BN_ADD_HIGH(m) BN_ADD(m, 1)
    if constexpr (!SHORT_SUMS) {
        BN_EACH(BN_DECLARE)
        BN_EACH(BN_LOAD)
        int64_t k = 0;
        do BN_ONE(0) while (++k < quads); // of none, which there is not, gcc would keep all sums twice
        BN_EACH(BN_STORE)
    } else {
        for (int64_t begin = 0, end = 0; begin < quads; begin = end) {
            end = quads - begin < every(half_bits(BITS)) ? quads : begin + every(half_bits(BITS));
            {
                BN_EACH(BN_DECLARE)
                BN_STEPS(begin, end, 0)
                BN_EACH(BN_ADD_LOW)
            }
            if constexpr (halves(BITS) == 2) {
                BN_EACH(BN_DECLARE)
                BN_STEPS(begin, end, 1)
                BN_EACH(BN_ADD_HIGH)
            }
        }
    }
#undef BN_EACH
#undef BN_DECLARE
#undef BN_LOAD
#undef BN_STEP
#undef BN_ADD
#undef BN_STORE
#undef BN_STEPS
#undef BN_ONE
#undef BN_ADD_LOW
#undef BN_ADD_HIGH
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

// sums[m][32] += all M tokens with a panel.
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

// sums[m][32] of `count` tokens from `first` on with panel `panel`, less the offset, scaled, and on to where they go.
static void finish_sums(const bn_matrix &w, const target &to, int64_t panel, const int32_t *sums, const float *scale,
                        const int32_t *total, int64_t first, int64_t count) {
    int64_t n = 32 * panel;
    if (to.out == OUT_INT32) {
        for (int64_t m = 0; m < count; m++) {
            int32_t *y = (int32_t *)to.y + (first + m) * to.stride + n;
            for (int64_t r = 0; r < 32 && n + r < to.columns; r++)
                y[r] = sums[32 * m + r] - offset_of(w.codec) * total[first + m];
        }
        return;
    }
    vf scale0 = load(w.scale + n), scale1 = load(w.scale + n + 16);
    finish_tokens(w, to, panel, first, count, [&](int64_t m, vf *v0, vf *v1) {
        vi back = splat(offset_of(w.codec) * total[first + m]);
        vf of = splat(scale[first + m]);
        *v0 = to_float(load(sums + 32 * m) - back) * of * scale0;
        *v1 = to_float(load(sums + 32 * m + 16) - back) * of * scale1;
    });
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

// Up to so many tokens, of so many digits, are multiplied with packed lines of codes of so many bits, a few of them at once,
// as lines come: unpacking and multiplying in turns leaves the memory idle (0.7B shape, two cores of an EPYC, 2 rows: 2.1x).
BN_INLINE constexpr int64_t in_lines(int bits, int digits = 1) {
#if defined(BN_AMX)
    return 6 / digits;
#elif defined(BN_AVX512)
    return digits > 1 ? 4 : TILE - 1;
#else
    return !SHORT_SUMS ? DIRECT / digits : digits > 1 ? 5 : bits == 8 ? 4 : 8;
#endif
}

// How many tokens are multiplied with a line at once.
#if defined(BN_AVX512)
enum { LINE_TOKENS = 8 };
#else
enum { LINE_TOKENS = SHORT_SUMS ? 4 : 1 };
#endif

// `multiply_tokens` of so few tokens that the packed lines are multiplied as they come from memory.
template <int codec>
static void multiply_few(const bn_matrix &w, const int8_t *x, int64_t stride, const float *scale, const int32_t *total,
                         int64_t M, const target &to, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
        const uint8_t *p0 = w.lines + 2 * panel * w.lines_per_block * 64, *p1 = p0 + w.lines_per_block * 64;
        alignas(64) int32_t sums[LINE_TOKENS * 32];
        int64_t m = 0;
#define BN_FEW(n)                                                                                                      \
    for (; m + n <= M; m += n) {                                                                                       \
        vi of[n];                                                                                                      \
        block_times_tokens<codec, n>(p0, w.lines_per_block, x + m * stride, stride, of);                               \
        for (int j = 0; j < n; j++) store(sums + 32 * j, of[j]);                                                       \
        block_times_tokens<codec, n>(p1, w.lines_per_block, x + m * stride, stride, of);                               \
        for (int j = 0; j < n; j++) store(sums + 32 * j + 16, of[j]);                                                  \
        finish_sums(w, to, panel, sums, scale, total, m, n);                                                           \
    }
        if constexpr (LINE_TOKENS == 8) {
            BN_FEW(8)
        }
        BN_FEW(4) BN_FEW(3) BN_FEW(2) BN_FEW(1)
#undef BN_FEW
    }
}

// How many columns are unpacked together, in fours: their codes stay in the first-level cache, as do the sums of so many
// tokens, whose activations stay in the second for all panels of a piece. Tiles of AMX take all of both.
enum { QUADS_AT_ONCE = 64, TOKENS_AT_ONCE = 96 };

// Bytes of scratch that one thread needs for more than DIRECT tokens.
BN_INLINE int64_t token_scratch(int64_t K, int64_t M) {
#if defined(BN_AMX)
    return round_up(K + 20, 64) * 32 + round_up(M, 32) * 128 + 64;
#else
    return 2 * QUADS_AT_ONCE * 64 + (M < TOKENS_AT_ONCE ? M : TOKENS_AT_ONCE) * 128 + 64;
#endif
}

// The panels from `first` to `last`. x: [M, stride] int8, zero from K on, with 32 rows to spare for AMX.
static void multiply_tokens(const bn_matrix &w, const int8_t *x, int64_t stride, const float *scale, const int32_t *total,
                     int64_t M, const target &to, int64_t first, int64_t last, uint8_t *scratch) {
    if (LINE_TOKENS > 1 && w.codec != CODEC_BASE3 && M > 1 - SHORT_SUMS && M <= in_lines(8 / quads_of(w.codec))) {
        if (w.codec == CODEC_TWO_BIT) return multiply_few<CODEC_TWO_BIT>(w, x, stride, scale, total, M, to, first, last);
        if (w.codec == CODEC_FOUR_BIT) return multiply_few<CODEC_FOUR_BIT>(w, x, stride, scale, total, M, to, first, last);
        return multiply_few<CODEC_EIGHT_BIT>(w, x, stride, scale, total, M, to, first, last);
    }
    if (M <= DIRECT) { // a block is 8 KiB or so: the second token finds it in the first-level cache
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t m = 0; m < M; m++) {
                alignas(64) int32_t sums[32];
                store(sums, block_times_token(w, 2 * panel, x + m * stride));
                store(sums + 16, block_times_token(w, 2 * panel + 1, x + m * stride));
                finish_sums(w, to, panel, sums, scale, total, m, 1);
            }
        return;
    }
    uint8_t *codes = (uint8_t *)round_up((int64_t)scratch, 64);
#if defined(BN_AMX)
    int64_t quads = round_up(w.lines_per_block * quads_of(w.codec), 16);
    int32_t *sums = (int32_t *)(codes + 2 * quads * 64);
    for (int64_t panel = first; panel < last; panel++) {
        for (int64_t b = 0; b < 2; b++) {
            uint8_t *from = codes + b * quads * 64, *until = from + quads * 64;
            from = unpack_lines(w.codec, w.lines + (2 * panel + b) * w.lines_per_block * 64, w.lines_per_block, from);
            memset(from, 0, until - from);
        }
        panel_times_tokens_amx(codes, codes + quads * 64, quads, x, stride, M, sums);
        finish_sums(w, to, panel, sums, scale, total, 0, M);
    }
#else
    // What is unpacked stays in the first-level cache, as do sums; activations stay in the second for a piece's panels.
    int64_t each = QUADS_AT_ONCE / quads_of(w.codec);
    int32_t *sums = (int32_t *)(codes + 2 * QUADS_AT_ONCE * 64);
    for (int64_t from = 0, count; from < M; from += count) {
        count = M - from < TOKENS_AT_ONCE ? M - from : TOKENS_AT_ONCE;
        for (int64_t panel = first; panel < last; panel++) {
            const uint8_t *p0 = w.lines + 2 * panel * w.lines_per_block * 64, *p1 = p0 + w.lines_per_block * 64;
            const int8_t *some = x + from * stride;
            // Outputs are in no cache by now: memory brings them while the tiles are computed.
            auto fetch_outputs = [&](int64_t l, int64_t lines) {
                if (count < 4 * TILE) return;
                int64_t width = is_pair(to.out) ? 16 : 32, until = count * (l + lines) / w.lines_per_block;
                for (int64_t m = count * l / w.lines_per_block; m < until; m++) {
                    const float *y = to.y + (from + m) * to.stride + width * panel;
                    BN_PREFETCH(y);
                    BN_PREFETCH(y + width - 1);
                }
            };
            memset(sums, 0, count * 128);
            for (int64_t l = 0; l < w.lines_per_block; l += each) {
                int64_t lines = w.lines_per_block - l < each ? w.lines_per_block - l : each, quads = lines * quads_of(w.codec);
                uint8_t *c0 = codes, *c1 = unpack_lines(w.codec, p0 + 64 * l, lines, c0);
                unpack_lines(w.codec, p1 + 64 * l, lines, c1);
                if (!SHORT_SUMS || w.codec == CODEC_EIGHT_BIT)
                    panel_times_tokens<8>(c0, c1, quads, some, stride, count, sums);
                else if (w.codec == CODEC_FOUR_BIT) panel_times_tokens<4>(c0, c1, quads, some, stride, count, sums);
                else panel_times_tokens<2>(c0, c1, quads, some, stride, count, sums);
                some += 4 * quads;
                fetch_outputs(l, lines);
            }
            finish_sums(w, to, panel, sums, scale, total, from, count);
        }
    }
#endif
}

} // namespace BN_ISA
} // namespace bn
