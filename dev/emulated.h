// The intrinsics of AVX-VNNI, AVX-512 and AMX that the kernels use, in plain C++, for a processor that has AVX2.
//
// dev/emulate.py builds the sources of these instruction sets with this file before them. Every function does what
// Intel's Intrinsics Guide and Software Developer's Manual say of its instruction, element by element; what the manual
// answers with an exception ends the process with a message. dev/emulated_check.cpp holds them against the instructions
// that AVX2 has. `bn_emulated_wrong` makes one of them, by its number in `bn_emulated_names`, give a wrong last element:
// the checks of dev/emulate.py must notice.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BN_EMULATED
#define BN_EMULATED_NAMES(f)                                                                                           \
    f(_mm256_dpbusd_avx_epi32) f(_mm512_dpbusd_epi32) f(_mm512_fmadd_ps) f(_mm512_max_ps) f(_mm512_min_ps)             \
    f(_mm512_cvtps_epi32) f(_mm512_cvtepi32_ps) f(_mm512_cvtepi8_epi32) f(_mm512_cvtepu8_epi32)                        \
    f(_mm512_cvtepu16_epi32) f(_mm512_cvtsepi32_epi8) f(_mm512_cvtph_ps) f(_mm512_cvtps_ph) f(_mm512_broadcast_i32x4)  \
    f(_mm512_set4_epi32) f(_mm512_loadu_ps) f(_mm512_shuffle_epi8) f(_mm512_permutexvar_ps) f(_tile_loadconfig)        \
    f(_tile_storeconfig) f(_tile_release) f(_tile_zero) f(_tile_loadd) f(_tile_stored) f(_tile_dpbsud)
#undef _tile_zero // macros of the compiler's header; the others are functions
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud

#define BN_EMULATED_EXPORT inline __attribute__((used, visibility("default")))
extern "C" {
BN_EMULATED_EXPORT int bn_emulated_wrong = 0;
#define BN_EMULATED_STRING(name) " " #name
BN_EMULATED_EXPORT const char *bn_emulated_names() { return "none" BN_EMULATED_NAMES(BN_EMULATED_STRING); }
}
#undef BN_EMULATED_STRING

namespace emulated {

#define BN_EMULATED_NUMBER(name) , of##name
enum which { none BN_EMULATED_NAMES(BN_EMULATED_NUMBER) };
#undef BN_EMULATED_NUMBER

// A call, as `dot4` of the scalar kernels is one: inlined, the loops would take minutes to compile.
#define BN_CALL inline __attribute__((noinline))

template <class T, int N> struct lanes {
    T at[N];
    T &operator[](int i) { return at[i]; }
};
template <class T, class V> inline lanes<T, sizeof(V) / sizeof(T)> of(const V &vector) {
    lanes<T, sizeof(V) / sizeof(T)> l;
    memcpy(&l, &vector, sizeof l);
    return l;
}
template <class V, class T, int N> inline V result(lanes<T, N> l, which name) {
    if (bn_emulated_wrong == name) ((uint8_t *)&l[N - 1])[0] ^= 1;
    V vector;
    static_assert(sizeof vector == sizeof l, "as many bytes");
    memcpy(&vector, &l, sizeof l);
    return vector;
}
template <class T> inline T bits_of(float f) {
    T bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// What a processor would answer with an exception.
inline void fault(const char *why) {
    if (bn_emulated_wrong) return; // a planted fault may come this far
    fprintf(stderr, "emulated instruction: %s\n", why);
    abort();
}

// ---- VPDPBUSD: unsigned bytes of a times signed bytes of b, four sums wrap around with the dword of `from` ----

template <class V> inline V dpbusd(V from, V a, V b, which name) {
    auto sum = of<uint32_t>(from);
    auto u = of<uint8_t>(a);
    auto s = of<int8_t>(b);
    for (int i = 0; i < (int)sizeof(V) / 4; i++)
        for (int j = 0; j < 4; j++) sum[i] += (uint32_t)((int32_t)u[4 * i + j] * (int32_t)s[4 * i + j]);
    return result<V>(sum, name);
}
BN_CALL __m256i _mm256_dpbusd_avx_epi32(__m256i from, __m256i a, __m256i b) {
    return dpbusd(from, a, b, of_mm256_dpbusd_avx_epi32);
}
BN_CALL __m512i _mm512_dpbusd_epi32(__m512i from, __m512i a, __m512i b) {
    return dpbusd(from, a, b, of_mm512_dpbusd_epi32);
}

// ---- floats: VFMADD, VMAXPS, VMINPS, VCVTPS2DQ, VCVTDQ2PS, with the rounding to even that MXCSR starts with ----

BN_CALL __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    auto x = of<float>(a), y = of<float>(b), z = of<float>(c);
    for (int i = 0; i < 16; i++) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return result<__m512>(z, of_mm512_fmadd_ps);
}
// The second operand where one is no number, and where both are zeros.
BN_CALL __m512 _mm512_max_ps(__m512 a, __m512 b) {
    auto x = of<float>(a), y = of<float>(b);
    for (int i = 0; i < 16; i++) y[i] = x[i] > y[i] ? x[i] : y[i];
    return result<__m512>(y, of_mm512_max_ps);
}
BN_CALL __m512 _mm512_min_ps(__m512 a, __m512 b) {
    auto x = of<float>(a), y = of<float>(b);
    for (int i = 0; i < 16; i++) y[i] = x[i] < y[i] ? x[i] : y[i];
    return result<__m512>(y, of_mm512_min_ps);
}
// 80000000H for what no int32 holds.
BN_CALL __m512i _mm512_cvtps_epi32(__m512 a) {
    auto x = of<float>(a);
    lanes<int32_t, 16> q;
    for (int i = 0; i < 16; i++) {
        float whole = rintf(x[i]);
        q[i] = whole >= -2147483648.0f && whole < 2147483648.0f ? (int32_t)whole : INT32_MIN;
    }
    return result<__m512i>(q, of_mm512_cvtps_epi32);
}
BN_CALL __m512 _mm512_cvtepi32_ps(__m512i a) {
    auto q = of<int32_t>(a);
    lanes<float, 16> x;
    for (int i = 0; i < 16; i++) x[i] = (float)q[i];
    return result<__m512>(x, of_mm512_cvtepi32_ps);
}

// ---- wider and narrower integers: VPMOVSXBD, VPMOVZXBD, VPMOVZXWD, VPMOVSDB (signed saturation) ----

template <class T, class V> inline __m512i wider(V a, which name) {
    auto x = of<T>(a);
    lanes<int32_t, 16> q;
    for (int i = 0; i < 16; i++) q[i] = x[i];
    return result<__m512i>(q, name);
}
BN_CALL __m512i _mm512_cvtepi8_epi32(__m128i a) { return wider<int8_t>(a, of_mm512_cvtepi8_epi32); }
BN_CALL __m512i _mm512_cvtepu8_epi32(__m128i a) { return wider<uint8_t>(a, of_mm512_cvtepu8_epi32); }
BN_CALL __m512i _mm512_cvtepu16_epi32(__m256i a) { return wider<uint16_t>(a, of_mm512_cvtepu16_epi32); }
BN_CALL __m128i _mm512_cvtsepi32_epi8(__m512i a) {
    auto q = of<int32_t>(a);
    lanes<int8_t, 16> x;
    for (int i = 0; i < 16; i++) x[i] = (int8_t)(q[i] < -128 ? -128 : q[i] > 127 ? 127 : q[i]);
    return result<__m128i>(x, of_mm512_cvtsepi32_epi8);
}

// ---- half precision: VCVTPH2PS, VCVTPS2PH to the nearest, half to even; a NaN keeps its sign and what fits of its bits,
// and becomes a quiet one ----

BN_CALL __m512 _mm512_cvtph_ps(__m256i a) {
    auto h = of<uint16_t>(a);
    lanes<float, 16> x;
    for (int i = 0; i < 16; i++) {
        uint32_t sign = (uint32_t)(h[i] >> 15) << 31, exponent = h[i] >> 10 & 31, fraction = h[i] & 1023;
        if (exponent == 31) x[i] = float_of(sign | 0x7F800000u | fraction << 13 | (fraction ? 0x400000u : 0));
        else {
            float size = ldexpf((float)(exponent ? fraction | 1024 : fraction), (int)(exponent ? exponent : 1) - 25);
            x[i] = float_of(sign | bits_of<uint32_t>(size));
        }
    }
    return result<__m512>(x, of_mm512_cvtph_ps);
}
BN_CALL __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
    if (rounding & 7) fault("VCVTPS2PH with another rounding than to the nearest is not written down here");
    auto x = of<float>(a);
    lanes<uint16_t, 16> h;
    for (int i = 0; i < 16; i++) {
        uint32_t bits = bits_of<uint32_t>(x[i]), sign = bits >> 31 << 15, size = bits & 0x7FFFFFFF;
        if (size > 0x7F800000u) {
            h[i] = (uint16_t)(sign | 0x7E00 | (size >> 13 & 1023));
            continue;
        }
        // In units of the last place at this size, of subnormals below 2^-14; rintf rounds half to even. A carry into
        // the exponent is the right one, to infinity too.
        double magnitude = float_of(size);
        int exponent = size < 0x38800000u ? -14 : (int)(size >> 23) - 127;
        uint32_t units = magnitude >= 65536.0 ? 0 : (uint32_t)rint(ldexp(magnitude, 10 - exponent));
        uint32_t code = magnitude >= 65536.0 ? 0x7C00u : ((uint32_t)(exponent + 14) << 10) + units;
        h[i] = (uint16_t)(sign | (code > 0x7C00u ? 0x7C00u : code));
    }
    return result<__m256i>(h, of_mm512_cvtps_ph);
}

// ---- bytes and elements on the move: VBROADCASTI32X4, VPSHUFB, VPERMPS ----

BN_CALL __m512i _mm512_broadcast_i32x4(__m128i a) {
    auto x = of<int32_t>(a);
    lanes<int32_t, 16> q;
    for (int i = 0; i < 16; i++) q[i] = x[i % 4];
    return result<__m512i>(q, of_mm512_broadcast_i32x4);
}
BN_CALL __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
    lanes<int32_t, 16> q;
    for (int i = 0; i < 16; i += 4) {
        q[i] = a;
        q[i + 1] = b;
        q[i + 2] = c;
        q[i + 3] = d;
    }
    return result<__m512i>(q, of_mm512_set4_epi32);
}
BN_CALL __m512 _mm512_loadu_ps(const void *p) {
    lanes<float, 16> x;
    memcpy(&x, p, sizeof x);
    return result<__m512>(x, of_mm512_loadu_ps);
}
// In each 16 bytes for themselves; 0 where the top bit of the index is set.
BN_CALL __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
    auto x = of<uint8_t>(a), from = of<uint8_t>(b);
    lanes<uint8_t, 64> y;
    for (int i = 0; i < 64; i++) y[i] = from[i] & 128 ? 0 : x[i / 16 * 16 + (from[i] & 15)];
    return result<__m512i>(y, of_mm512_shuffle_epi8);
}
BN_CALL __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    auto from = of<uint32_t>(index);
    auto x = of<float>(a);
    lanes<float, 16> y;
    for (int i = 0; i < 16; i++) y[i] = x[from[i] & 15];
    return result<__m512>(y, of_mm512_permutexvar_ps);
}

// ---- AMX: eight tiles of at most 16 rows of 64 bytes, as a thread configured them ----

struct tile_registers {
    uint8_t config[64]; // byte 0: the palette, 0 for tiles that are not configured; the layout of LDTILECFG
    uint8_t row[8][16][64];
    int rows(int t) const { return config[48 + t]; }
    int bytes(int t) const { return config[16 + 2 * t] | config[17 + 2 * t] << 8; }
    void must_be(int t) const {
        if (!config[0]) fault("a tile is used before LDTILECFG");
        if (t < 0 || t > 7 || !rows(t)) fault("a tile is used that the configuration does not have");
    }
};
inline thread_local tile_registers tiles;

BN_CALL void _tile_release() {
    if (bn_emulated_wrong != of_tile_release) memset(&tiles, 0, sizeof tiles);
}
BN_CALL void _tile_loadconfig(const void *p) {
    uint8_t c[64];
    memcpy(c, p, 64);
    if (bn_emulated_wrong == of_tile_loadconfig) c[16] = (uint8_t)(c[16] > 4 ? c[16] - 4 : 4);
    if (c[0] > 1) fault("LDTILECFG: an unknown palette");
    if (!c[0]) return _tile_release();
    for (int i = 2; i < 64; i++)
        if (c[i] && (i < 16 || (i >= 32 && i < 48) || i >= 56)) fault("LDTILECFG: a reserved byte is not 0");
    for (int t = 0; t < 8; t++) {
        int bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
        if (bytes > 64 || rows > 16) fault("LDTILECFG: a tile is too large");
        if (!bytes != !rows) fault("LDTILECFG: a tile of no rows or no bytes has the other");
    }
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.config, c, 64);
}
BN_CALL void _tile_storeconfig(void *p) {
    memcpy(p, tiles.config, 64); // all zeros before LDTILECFG
    if (bn_emulated_wrong == of_tile_storeconfig) ((uint8_t *)p)[55] ^= 1;
}
BN_CALL void _tile_zero(int t) {
    tiles.must_be(t);
    memset(tiles.row[t], 0, sizeof tiles.row[t]);
    if (bn_emulated_wrong == of_tile_zero) tiles.row[t][tiles.rows(t) - 1][tiles.bytes(t) - 4] = 1;
}
BN_CALL void _tile_loadd(int t, const void *p, int64_t stride) {
    tiles.must_be(t);
    int first = tiles.config[1]; // start_row, for loads that an interrupt cut in two
    if (first >= tiles.rows(t)) fault("TILELOADD begins behind the last row");
    for (int r = first; r < 16; r++) {
        memset(tiles.row[t][r], 0, 64);
        if (r < tiles.rows(t)) memcpy(tiles.row[t][r], (const char *)p + r * stride, tiles.bytes(t));
    }
    tiles.config[1] = 0;
    if (bn_emulated_wrong == of_tile_loadd) tiles.row[t][tiles.rows(t) - 1][tiles.bytes(t) - 1] ^= 1;
}
BN_CALL void _tile_stored(int t, void *p, int64_t stride) {
    tiles.must_be(t);
    int last = tiles.rows(t) - 1;
    if (bn_emulated_wrong == of_tile_stored) tiles.row[t][last][tiles.bytes(t) - 4] ^= 1;
    for (int r = tiles.config[1]; r <= last; r++) memcpy((char *)p + r * stride, tiles.row[t][r], tiles.bytes(t));
    tiles.config[1] = 0;
}
// Signed bytes of a times unsigned bytes of b.
BN_CALL void _tile_dpbsud(int to, int a, int b) {
    tiles.must_be(to);
    tiles.must_be(a);
    tiles.must_be(b);
    if (to == a || to == b || a == b) fault("TDPBSUD: the same tile twice");
    if (tiles.bytes(to) % 4 || tiles.bytes(a) % 4 || tiles.bytes(b) % 4) fault("TDPBSUD: rows are no whole dwords");
    if (tiles.rows(to) != tiles.rows(a) || tiles.bytes(to) != tiles.bytes(b) || tiles.bytes(a) / 4 != tiles.rows(b))
        fault("TDPBSUD: tiles that do not fit together");
    for (int m = 0; m < tiles.rows(to); m++) {
        auto sum = of<uint32_t>(tiles.row[to][m]);
        for (int k = 0; k < tiles.bytes(a) / 4; k++)
            for (int n = 0; n < tiles.bytes(to) / 4; n++)
                for (int j = 0; j < 4; j++) {
                    int32_t product = (int8_t)tiles.row[a][m][4 * k + j] * tiles.row[b][k % 16][4 * n + j];
                    sum[n] += (uint32_t)product;
                }
        if (bn_emulated_wrong == of_tile_dpbsud && m == tiles.rows(to) - 1) sum[tiles.bytes(to) / 4 - 1] ^= 1;
        memset(tiles.row[to][m], 0, 64);
        memcpy(tiles.row[to][m], &sum, tiles.bytes(to));
    }
    memset(tiles.row[to][tiles.rows(to)], 0, (16 - tiles.rows(to)) * 64);
    tiles.config[1] = 0;
}
#undef BN_CALL

} // namespace emulated

// For dev/emulate.py: the calling thread's tiles.
extern "C" {
BN_EMULATED_EXPORT void bn_emulated_load_tiles(const void *p) { emulated::_tile_loadconfig(p); }
BN_EMULATED_EXPORT void bn_emulated_store_tiles(void *p) { emulated::_tile_storeconfig(p); }
}
#undef BN_EMULATED_EXPORT

// From here on the kernels' names are ours.
#define _mm256_dpbusd_avx_epi32 emulated::_mm256_dpbusd_avx_epi32
#define _mm512_dpbusd_epi32 emulated::_mm512_dpbusd_epi32
#define _mm512_fmadd_ps emulated::_mm512_fmadd_ps
#define _mm512_max_ps emulated::_mm512_max_ps
#define _mm512_min_ps emulated::_mm512_min_ps
#define _mm512_cvtps_epi32 emulated::_mm512_cvtps_epi32
#define _mm512_cvtepi32_ps emulated::_mm512_cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated::_mm512_cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::_mm512_cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::_mm512_cvtepu16_epi32
#define _mm512_cvtsepi32_epi8 emulated::_mm512_cvtsepi32_epi8
#define _mm512_cvtph_ps emulated::_mm512_cvtph_ps
#define _mm512_cvtps_ph emulated::_mm512_cvtps_ph
#define _mm512_broadcast_i32x4 emulated::_mm512_broadcast_i32x4
#define _mm512_set4_epi32 emulated::_mm512_set4_epi32
#define _mm512_loadu_ps emulated::_mm512_loadu_ps
#define _mm512_shuffle_epi8 emulated::_mm512_shuffle_epi8
#define _mm512_permutexvar_ps emulated::_mm512_permutexvar_ps
#define _tile_loadconfig emulated::_tile_loadconfig
#define _tile_storeconfig emulated::_tile_storeconfig
#define _tile_release emulated::_tile_release
#define _tile_zero emulated::_tile_zero
#define _tile_loadd emulated::_tile_loadd
#define _tile_stored emulated::_tile_stored
#define _tile_dpbsud emulated::_tile_dpbsud
