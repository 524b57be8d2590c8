// The GGUF block formats as C++ sees them: a block in numbers, and its bytes, which bitnet/quant/blocks draws.
#pragma once

#include "blocks.h"

namespace {

// ggml's numbers of the types.
constexpr int Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14;
constexpr int IQ4_NL = 20, IQ4_XS = 23, TQ1_0 = 34, TQ2_0 = 35, Q1_0 = 41, Q2_0 = 42, PQ2_0 = 142;

constexpr int bytes_of(int k) {
    constexpr int bytes[] = {0, 0, 18, 20, 0, 0, 22, 24, 34, 0, 84, 110, 144, 176, 210};
    return k <= Q6_K ? bytes[k] : k == IQ4_XS ? 136 : k == TQ1_0 ? 54 : k == TQ2_0 ? 66 : k == PQ2_0 ? 34 : 18;
}
constexpr bool is_super(int k) { return (k >= Q2_K && k <= Q6_K) || k == IQ4_XS; }
constexpr bool is_affine(int k) { return k == Q2_K || k == Q4_K || k == Q5_K; } // super-blocks with minimums
constexpr bool is_uneven(int k) { return k == IQ4_NL || k == IQ4_XS; }
constexpr int size_of(int k) {
    return is_super(k) || k == TQ1_0 || k == TQ2_0 ? 256 : k == Q2_0 ? 64 : k == Q1_0 || k == PQ2_0 ? 128 : 32;
}
constexpr int groups_of(int k) { return k == Q4_K || k == Q5_K || k == IQ4_XS ? 8 : 16; }
constexpr int bits_of(int k) {
    return k == Q2_K ? 2 : k == Q3_K ? 3 : k == Q5_0 || k == Q5_1 || k == Q5_K ? 5 : k == Q6_K ? 6 : k == Q8_0 ? 8 : 4;
}
constexpr int center_of(int k) {
    return k == Q3_K ? 4 : k == Q6_K ? 32 : k == Q4_0 ? 8 : k == Q5_0 ? 16 : k == Q8_0 ? 128 : k >= TQ1_0 && k != Q1_0 ? 1 : 0;
}
constexpr int limit_of(int k) { return k == Q2_K ? 15 : k == Q3_K || k == IQ4_XS ? 32 : k == Q6_K ? 128 : 63; }

constexpr float LEVELS[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// ---- a block in numbers, and its bytes ----

struct block {
    uint8_t codes[256]; // as stored
    int16_t s[16], m[16];
    uint16_t d, dmin;
};

uint16_t half_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00); // 65520 and more round to infinity
    if (size < 0x38800000) {
        float rounded = fabsf(x) + 0.75f;
        memcpy(&bits, &rounded, 4);
        return (uint16_t)(sign | (bits - 0x3F400000));
    }
    return (uint16_t)(sign | (((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10)));
}

float half_value(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7FFF, bits;
    if (size < 0x0400) {
        float x = (float)size * 0x1p-24f;
        memcpy(&bits, &x, 4);
    } else
        bits = (size << 13) + (size >= 0x7C00 ? 0x70000000 : 0x38000000);
    if (size > 0x7C00) bits |= 0x400000; // a quiet NaN
    bits |= sign;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

BN_INLINE void put(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
BN_INLINE uint16_t get(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

// gcc unrolls short loops whole before it looks for vectors, and then finds none.
#if defined(__clang__)
#define BN_LOOP
#else
#define BN_LOOP _Pragma("GCC unroll 1")
#endif

// layout.pack_bits of `codes >> shift`, masked to BITS, for N codes.
template <int N, int BITS, int STRIDE> BN_INLINE void pack_bits(const uint8_t *codes, int shift, uint8_t *out) {
    constexpr int LANES = 8 / BITS, MASK = (1 << BITS) - 1;
    for (int chunk = 0; chunk < N / (LANES * STRIDE); chunk++, codes += LANES * STRIDE, out += STRIDE) BN_LOOP
    for (int j = 0; j < STRIDE; j++) {
        uint8_t byte = 0;
        for (int lane = 0; lane < LANES; lane++)
            byte |= (uint8_t)((codes[lane * STRIDE + j] >> shift & MASK) << (BITS * lane));
        out[j] = byte;
    }
}
// Its inverse: ors the codes, shifted back, into `codes`.
template <int N, int BITS, int STRIDE> BN_INLINE void unpack_bits(const uint8_t *in, int shift, uint8_t *codes) {
    constexpr int LANES = 8 / BITS, MASK = (1 << BITS) - 1;
    for (int chunk = 0; chunk < N / (LANES * STRIDE); chunk++, codes += LANES * STRIDE, in += STRIDE)
        for (int lane = 0; lane < LANES; lane++) BN_LOOP
    for (int j = 0; j < STRIDE; j++) codes[lane * STRIDE + j] |= (uint8_t)((in[j] >> (BITS * lane) & MASK) << shift);
}

struct chunk {
    int first, width, count, at;
};
constexpr chunk TRITS[] = {{0, 32, 5, 0}, {160, 16, 5, 32}, {240, 4, 4, 48}};

template <int K> BN_INLINE void pack(const block &b, uint8_t *out) {
    const uint8_t *c = b.codes;
    if constexpr (K == TQ2_0) {
        pack_bits<256, 2, 32>(c, 0, out);
        put(out + 64, b.d);
    } else if constexpr (K == TQ1_0) {
        for (chunk t : TRITS)
            for (int j = 0; j < t.width; j++) {
                int number = 0, power = 81;
                for (int i = 0; i < t.count; i++, power /= 3) number += power * c[t.first + i * t.width + j];
                out[t.at + j] = (uint8_t)((number * 256 + 242) / 243);
            }
        put(out + 52, b.d);
    } else if constexpr (K >= Q1_0) {
        put(out, b.d);
        pack_bits<size_of(K), K == Q1_0 ? 1 : 2, 1>(c, 0, out + 2);
    } else if constexpr (K == Q2_K) {
        for (int g = 0; g < 16; g++) out[g] = (uint8_t)(b.s[g] | b.m[g] << 4);
        pack_bits<256, 2, 32>(c, 0, out + 16);
        put(out + 80, b.d);
        put(out + 82, b.dmin);
    } else if constexpr (K == Q3_K) {
        pack_bits<256, 1, 32>(c, 2, out);
        pack_bits<256, 2, 32>(c, 0, out + 32);
        uint8_t t[16];
        for (int g = 0; g < 16; g++) t[g] = (uint8_t)(b.s[g] + 32);
        for (int g = 0; g < 8; g++) out[96 + g] = (uint8_t)((t[g] & 15) | t[8 + g] << 4);
        pack_bits<16, 2, 4>(t, 4, out + 104);
        put(out + 108, b.d);
    } else if constexpr (K == Q6_K) {
        pack_bits<256, 4, 64>(c, 0, out);
        pack_bits<256, 2, 32>(c, 4, out + 128);
        for (int g = 0; g < 16; g++) out[192 + g] = (uint8_t)b.s[g];
        put(out + 208, b.d);
    } else if constexpr (K == IQ4_XS) {
        uint8_t t[8];
        for (int g = 0; g < 8; g++) t[g] = (uint8_t)(b.s[g] + 32);
        put(out, b.d);
        pack_bits<8, 2, 1>(t, 4, out + 2);
        pack_bits<8, 4, 1>(t, 0, out + 4);
        pack_bits<256, 4, 16>(c, 0, out + 8);
    } else if constexpr (is_super(K)) {
        put(out, b.d);
        put(out + 2, b.dmin);
        for (int j = 0; j < 4; j++) {
            out[4 + j] = (uint8_t)(b.s[j] | b.s[4 + j] >> 4 << 6);
            out[8 + j] = (uint8_t)(b.m[j] | b.m[4 + j] >> 4 << 6);
            out[12 + j] = (uint8_t)((b.s[4 + j] & 15) | b.m[4 + j] << 4);
        }
        if (K == Q5_K) pack_bits<256, 1, 32>(c, 4, out + 16);
        pack_bits<256, 4, 32>(c, 0, out + bytes_of(K) - 128);
    } else {
        put(out, b.d);
        if (K == Q4_1 || K == Q5_1) put(out + 2, b.dmin);
        if (K == Q8_0)
            for (int j = 0; j < 32; j++) out[2 + j] = c[j] ^ 128;
        else {
            if (bits_of(K) == 5) pack_bits<32, 1, 1>(c, 4, out + bytes_of(K) - 20);
            pack_bits<32, 4, 16>(c, 0, out + bytes_of(K) - 16);
        }
    }
}

template <int K> BN_INLINE void unpack(const uint8_t *in, block &b) {
    uint8_t *c = b.codes;
    memset(c, 0, size_of(K));
    if constexpr (K == TQ2_0) {
        unpack_bits<256, 2, 32>(in, 0, c);
        b.d = get(in + 64);
    } else if constexpr (K == TQ1_0) {
        for (chunk t : TRITS) {
            uint8_t power = 1;
            for (int i = 0; i < t.count; i++, power *= 3)
                for (int j = 0; j < t.width; j++)
                    c[t.first + i * t.width + j] = (uint8_t)((uint8_t)(in[t.at + j] * power) * 3 >> 8);
        }
        b.d = get(in + 52);
    } else if constexpr (K >= Q1_0) {
        b.d = get(in);
        unpack_bits<size_of(K), K == Q1_0 ? 1 : 2, 1>(in + 2, 0, c);
    } else if constexpr (K == Q2_K) {
        for (int g = 0; g < 16; g++) b.s[g] = in[g] & 15, b.m[g] = in[g] >> 4;
        unpack_bits<256, 2, 32>(in + 16, 0, c);
        b.d = get(in + 80);
        b.dmin = get(in + 82);
    } else if constexpr (K == Q3_K) {
        unpack_bits<256, 1, 32>(in, 2, c);
        unpack_bits<256, 2, 32>(in + 32, 0, c);
        uint8_t t[16];
        for (int g = 0; g < 16; g++) t[g] = in[96 + g % 8] >> (g / 8 * 4) & 15;
        unpack_bits<16, 2, 4>(in + 104, 4, t);
        for (int g = 0; g < 16; g++) b.s[g] = (int16_t)(t[g] - 32);
        b.d = get(in + 108);
    } else if constexpr (K == Q6_K) {
        unpack_bits<256, 4, 64>(in, 0, c);
        unpack_bits<256, 2, 32>(in + 128, 4, c);
        for (int g = 0; g < 16; g++) b.s[g] = (int8_t)in[192 + g];
        b.d = get(in + 208);
    } else if constexpr (K == IQ4_XS) {
        uint8_t t[8] = {};
        b.d = get(in);
        unpack_bits<8, 2, 1>(in + 2, 4, t);
        unpack_bits<8, 4, 1>(in + 4, 0, t);
        for (int g = 0; g < 8; g++) b.s[g] = (int16_t)(t[g] - 32);
        unpack_bits<256, 4, 16>(in + 8, 0, c);
    } else if constexpr (is_super(K)) {
        b.d = get(in);
        b.dmin = get(in + 2);
        for (int j = 0; j < 4; j++) {
            b.s[j] = in[4 + j] & 63;
            b.m[j] = in[8 + j] & 63;
            b.s[4 + j] = (int16_t)((in[12 + j] & 15) | in[4 + j] >> 6 << 4);
            b.m[4 + j] = (int16_t)(in[12 + j] >> 4 | in[8 + j] >> 6 << 4);
        }
        if (K == Q5_K) unpack_bits<256, 1, 32>(in + 16, 4, c);
        unpack_bits<256, 4, 32>(in + bytes_of(K) - 128, 0, c);
    } else {
        b.d = get(in);
        if (K == Q4_1 || K == Q5_1) b.dmin = get(in + 2);
        if (K == Q8_0)
            for (int j = 0; j < 32; j++) c[j] = in[2 + j] ^ 128;
        else {
            if (bits_of(K) == 5) unpack_bits<32, 1, 1>(in + bytes_of(K) - 20, 4, c);
            unpack_bits<32, 4, 16>(in + bytes_of(K) - 16, 0, c);
        }
    }
}

} // namespace
