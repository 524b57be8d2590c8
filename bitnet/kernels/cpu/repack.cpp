// Codes and GGUF blocks to the lines and groups of layout.h, without a detour through floats.
#include "blocks_layout.h"
#include "layout.h"
#include "pool.h"

#define BN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int columns_of_step(int codec) { return codec == CODEC_BASE3 ? 256 : 32; }
constexpr int lines_of_step(int codec) {
    return codec == CODEC_BASE3 ? 13 : codec == CODEC_ONE_BIT ? 1 : codec == CODEC_LEVELS ? 4 : codec;
}

// BITS of each of 32 codes, from `shift` on, to lines from `out` on.
template <int BITS> BN_INLINE void pack_field(const uint8_t *c, int shift, uint8_t *out) {
    constexpr int PER_LINE = 8 / BITS;
    for (int l = 0; l < 8 / PER_LINE; l++)
        for (int j = 0; j < 4; j++) {
            uint8_t byte = 0;
            for (int i = 0; i < PER_LINE; i++)
                byte |= (uint8_t)((c[4 * (l * PER_LINE + i) + j] >> shift & ((1 << BITS) - 1)) << (BITS * i));
            out[64 * l + j] = byte;
        }
}

BN_INLINE void pack_step(const uint8_t *c, int codec, const uint8_t *fraction, uint8_t *out) {
    switch (codec) {
    case CODEC_BASE3:
        for (int l = 0; l < 13; l++)
            for (int j = 0; j < 4; j++) {
                int number = 0;
                for (int i = 0, k = 20 * l + j; i < 5; i++, k += 4) number = 3 * number + (k < 256 ? c[k] : 0);
                out[64 * l + j] = fraction[number];
            }
        break;
    case CODEC_ONE_BIT: pack_field<1>(c, 0, out); break;
    case CODEC_TWO_BIT: pack_field<2>(c, 0, out); break;
    case CODEC_THREE_BIT:
        pack_field<2>(c, 0, out);
        pack_field<1>(c, 2, out + 128);
        break;
    case CODEC_FOUR_BIT:
    case CODEC_LEVELS: pack_field<4>(c, 0, out); break;
    case CODEC_FIVE_BIT:
        pack_field<4>(c, 0, out);
        pack_field<1>(c, 4, out + 256);
        break;
    case CODEC_SIX_BIT:
        pack_field<4>(c, 0, out);
        pack_field<2>(c, 4, out + 256);
        break;
    default: pack_field<8>(c, 0, out);
    }
}

struct fractions {
    uint8_t of[243];
    fractions() {
        for (int n = 0; n < 243; n++) of[n] = (uint8_t)((256 * n + 242) / 243);
    }
};
const fractions FRACTIONS;

// Row n goes to row at + n / 16 * step * 16 + n % 16: its block of 16 rows, and its place there.
struct place {
    int64_t block, row;
    place(int64_t n, int64_t at, int64_t step) : block(at / 16 + n / 16 * step), row(n % 16) {}
};

constexpr int codec_of(int k) {
    return k == TQ1_0 ? CODEC_BASE3 : k == TQ2_0 || k == Q2_0 || k == PQ2_0 || k == Q2_K ? CODEC_TWO_BIT
         : k == Q1_0 ? CODEC_ONE_BIT : k == Q3_K ? CODEC_THREE_BIT : is_uneven(k) ? CODEC_LEVELS
         : k == Q6_K ? CODEC_SIX_BIT : k == Q8_0 ? CODEC_EIGHT_BIT : bits_of(k) == 5 ? CODEC_FIVE_BIT : CODEC_FOUR_BIT;
}

struct rows_of_blocks {
    const uint8_t *data;
    int64_t rows, columns;
    uint8_t *lines, *groups, *supers;
    int64_t at, step;
    int threads;
};

template <int K> void repack(const rows_of_blocks &j) {
    constexpr int SIZE = size_of(K), CODEC = codec_of(K), EACH = lines_of_step(CODEC), STEP = columns_of_step(CODEC);
    constexpr bool pairs = K == Q4_1 || K == Q5_1 || K == Q1_0, minimums = K == Q4_K || K == Q5_K;
    constexpr int GROUPS = is_super(K) ? groups_of(K) : 1;
    constexpr int BYTES = is_super(K) ? (minimums ? 32 : 16) : pairs ? 64 : 32;
    constexpr int SUPER = !is_super(K) ? 0 : minimums || K == Q2_K ? 64 : 32;
    int64_t blocks = j.columns / SIZE;
    bn::share_out(j.threads, j.rows, [&](int64_t n) {
        place to(n, j.at, j.step);
        uint8_t *out = j.lines + to.block * (j.columns / STEP) * EACH * 64 + to.row * 4;
        uint8_t *group = j.groups + to.block * blocks * GROUPS * BYTES, *super = j.supers + to.block * blocks * SUPER;
        for (int64_t i = 0; i < blocks; i++) {
            block b;
            unpack<K>(j.data + (n * blocks + i) * bytes_of(K), b);
            __asm__ volatile("" ::: "memory"); // GCC 12 drops stores behind `unpack` (blocks.cpp)
            for (int k = 0; k < SIZE; k += STEP, out += 64 * EACH) pack_step(b.codes + k, CODEC, FRACTIONS.of, out);
            for (int g = 0; g < GROUPS; g++, group += BYTES) {
                if (K == Q2_K) group[to.row] = (uint8_t)(b.s[g] | b.m[g] << 4);
                else if (is_super(K)) {
                    group[to.row] = (uint8_t)b.s[g];
                    if (minimums) group[16 + to.row] = (uint8_t)b.m[g];
                } else {
                    put(group + 2 * to.row, b.d);
                    if (K == Q1_0) put(group + 32 + 2 * to.row, half_bits(-half_value(b.d) / 2)); // 2 (d c - d / 2)
                    else if (pairs) put(group + 32 + 2 * to.row, b.dmin);
                }
            }
            if (SUPER) put(super + 2 * to.row, b.d);
            if (SUPER == 64) put(super + 32 + 2 * to.row, b.dmin);
            super += SUPER;
        }
    });
}

} // namespace

// Unsigned codes [N, K], K a multiple of 32 (256 of CODEC_BASE3), to lines with groups; rows go where bn_pack puts them.
BN_EXPORT void bn_pack_codes(const uint8_t *codes, int64_t N, int64_t K, uint8_t *lines, int codec, int64_t at,
                             int64_t step, int threads) {
    int64_t each = lines_of_step(codec), columns = columns_of_step(codec);
    bn::share_out(threads, N, [&](int64_t n) {
        place to(n, at, step);
        uint8_t *out = lines + to.block * (K / columns) * each * 64 + to.row * 4;
        for (int64_t k = 0; k < K; k += columns, out += 64 * each)
            pack_step(codes + n * K + k, codec, FRACTIONS.of, out);
    });
}

// Rows of blocks of ggml's type number `kind` likewise, with their groups and super-blocks. 1: a kind that isn't here.
BN_EXPORT int bn_pack_blocks(const uint8_t *data, int64_t rows, int64_t columns, int kind, uint8_t *lines, uint8_t *groups,
                             uint8_t *supers, int64_t at, int64_t step, int threads) {
    rows_of_blocks j = {data, rows, columns, lines, groups, supers, at, step, threads};
    switch (kind) {
    case Q4_0: repack<Q4_0>(j); return 0;
    case Q4_1: repack<Q4_1>(j); return 0;
    case Q5_0: repack<Q5_0>(j); return 0;
    case Q5_1: repack<Q5_1>(j); return 0;
    case Q8_0: repack<Q8_0>(j); return 0;
    case Q2_K: repack<Q2_K>(j); return 0;
    case Q3_K: repack<Q3_K>(j); return 0;
    case Q4_K: repack<Q4_K>(j); return 0;
    case Q5_K: repack<Q5_K>(j); return 0;
    case Q6_K: repack<Q6_K>(j); return 0;
    case IQ4_NL: repack<IQ4_NL>(j); return 0;
    case IQ4_XS: repack<IQ4_XS>(j); return 0;
    case TQ1_0: repack<TQ1_0>(j); return 0;
    case TQ2_0: repack<TQ2_0>(j); return 0;
    case Q1_0: repack<Q1_0>(j); return 0;
    case Q2_0: repack<Q2_0>(j); return 0;
    case PQ2_0: repack<PQ2_0>(j); return 0;
    default: return 1;
    }
}
