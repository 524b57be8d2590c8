// Vectors of 64 bytes, in the words of each instruction set.
//
// A "line" is 64 bytes = 16 rows x 4 values of K (the run-time layouts are drawn in layout.h). Everything above this file
// is written in lines, int32 x 16 and float x 16, and is compiled once for each instruction set; a machine with
// shorter registers holds a line in two or four of them. Integer results are exact, and the float operations are the
// same ones in the same order, so every instruction set gives the same bits: -ffp-contract=off keeps the compiler from
// fusing where another target cannot, and where a fused multiply-add is wanted it is written `fma`.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define BN_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#define BN_PAUSE() _mm_pause()
#else
#define BN_PREFETCH(p) __builtin_prefetch(p)
#define BN_PAUSE() ((void)0)
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BN_INLINE static inline __attribute__((always_inline))

namespace bn {
namespace BN_ISA {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));
typedef float vf_u __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi_u __attribute__((vector_size(64), aligned(4)));
typedef uint8_t vb_u __attribute__((vector_size(64), aligned(1)));

BN_INLINE vb load_line(const uint8_t *p) { return *(const vb_u *)p; }
BN_INLINE void store_line(uint8_t *p, vb v) { *(vb_u *)p = v; }
BN_INLINE vf load(const float *p) { return *(const vf_u *)p; }
BN_INLINE void store(float *p, vf v) { *(vf_u *)p = v; }
BN_INLINE void store(int32_t *p, vi v) { *(vi_u *)p = v; }
BN_INLINE vi load(const int32_t *p) { return *(const vi_u *)p; }
BN_INLINE int32_t load_dword(const int8_t *p) { int32_t v; memcpy(&v, p, 4); return v; }

// ---- what each instruction set says in its own way ----
//   dot4(acc, w, x)        acc[r] += sum over j of w[4r + j] * x[j], w unsigned, x signed, four bytes of x at `x`
//   dot4_small(acc, w, x)  the same where no w exceeds 127
//   fma(a, b, c), to_int(v) round half to even, to_float(v), narrow(q, v) 16 x int32 to int8 with saturation

#if defined(BN_AVX512)

BN_INLINE vi splat(int32_t v) { return (vi)_mm512_set1_epi32(v); }
BN_INLINE vf splat(float v) { return (vf)_mm512_set1_ps(v); }
BN_INLINE vi dot4(vi acc, vb w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
BN_INLINE vi dot4_small(vi acc, vb w, vi x) { return dot4(acc, w, x); }
BN_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
BN_INLINE vi to_int(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
BN_INLINE vf to_float(vi v) { return (vf)_mm512_cvtepi32_ps((__m512i)v); }
BN_INLINE void narrow(int8_t *q, vi v) { _mm_storeu_si128((__m128i *)q, _mm512_cvtsepi32_epi8((__m512i)v)); }
BN_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
BN_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
BN_INLINE vf widen(const int8_t *q) {
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
}
BN_INLINE vf from_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
BN_INLINE void to_half(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

BN_INLINE vi splat(int32_t v) { return v + (vi){}; }
BN_INLINE vf splat(float v) { return v - (vf){}; }

#if defined(BN_AVX2)
// A union of the halves costs nothing once inlined.
union halves { __m256i i[2]; __m256 f[2]; vi vi_; vf vf_; vb vb_; };
BN_INLINE halves split(vi v) { halves h; h.vi_ = v; return h; }
BN_INLINE halves split(vf v) { halves h; h.vf_ = v; return h; }
BN_INLINE halves split(vb v) { halves h; h.vb_ = v; return h; }
#if defined(BN_AVXVNNI)
BN_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
BN_INLINE __m256i dot4_half_small(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
#else
// vpmaddubsw saturates at 16 bits. 128 * (127 + 127) and 128 * -256 still fit, so w up to 128 is exact.
BN_INLINE __m256i dot4_half_small(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
BN_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
    acc = dot4_half_small(acc, _mm256_and_si256(w, _mm256_set1_epi8(127)), x);
    return dot4_half_small(acc, _mm256_and_si256(w, _mm256_set1_epi8(-128)), x);
}
#endif
#define BN_BY_HALF(acc, w, x, f)                                                                                       \
    halves a = split(acc), b = split(w), c = split(x);                                                                 \
    a.i[0] = f(a.i[0], b.i[0], c.i[0]);                                                                                \
    a.i[1] = f(a.i[1], b.i[1], c.i[1]);                                                                                \
    return a.vi_;
BN_INLINE vi dot4(vi acc, vb w, vi x) { BN_BY_HALF(acc, w, x, dot4_half) }
BN_INLINE vi dot4_small(vi acc, vb w, vi x) { BN_BY_HALF(acc, w, x, dot4_half_small) }
BN_INLINE vf fma(vf x, vf y, vf z) {
    halves a = split(x), b = split(y), c = split(z);
    a.f[0] = _mm256_fmadd_ps(a.f[0], b.f[0], c.f[0]);
    a.f[1] = _mm256_fmadd_ps(a.f[1], b.f[1], c.f[1]);
    return a.vf_;
}
BN_INLINE vi to_int(vf v) {
    halves a = split(v);
    a.i[0] = _mm256_cvtps_epi32(a.f[0]);
    a.i[1] = _mm256_cvtps_epi32(a.f[1]);
    return a.vi_;
}
BN_INLINE vf from_half(const uint16_t *p) {
    halves a;
    a.f[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    a.f[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)));
    return a.vf_;
}
BN_INLINE void to_half(uint16_t *p, vf v) {
    halves a = split(v);
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.f[0], _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.f[1], _MM_FROUND_TO_NEAREST_INT));
}
BN_INLINE vf widen(const int8_t *q) {
    __m128i v = _mm_loadu_si128((const __m128i *)q);
    halves a;
    a.f[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v));
    a.f[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
    return a.vf_;
}
BN_INLINE void narrow(int8_t *q, vi v) {
    halves a = split(v);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.i[0], a.i[1]), 0xD8);
    _mm_storeu_si128((__m128i *)q, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
BN_INLINE vf max(vf x, vf y) {
    halves a = split(x), b = split(y);
    a.f[0] = _mm256_max_ps(a.f[0], b.f[0]);
    a.f[1] = _mm256_max_ps(a.f[1], b.f[1]);
    return a.vf_;
}
BN_INLINE vf min(vf x, vf y) {
    halves a = split(x), b = split(y);
    a.f[0] = _mm256_min_ps(a.f[0], b.f[0]);
    a.f[1] = _mm256_min_ps(a.f[1], b.f[1]);
    return a.vf_;
}

#elif defined(BN_NEON)
union quarters { int32x4_t i[4]; float32x4_t f[4]; uint8x16_t b[4]; vi vi_; vf vf_; vb vb_; };
// vdotq_s32 takes signed bytes on both sides.
BN_INLINE vi dot4_small(vi acc, vb w, vi x) {
    quarters a, b, c;
    a.vi_ = acc; b.vb_ = w; c.vi_ = x;
    for (int j = 0; j < 4; j++)
        a.i[j] = vdotq_s32(a.i[j], vreinterpretq_s8_u8(b.b[j]), vreinterpretq_s8_s32(c.i[j]));
    return a.vi_;
}
// w = (w & 127) + (w & 128), and 128 reads as -128.
BN_INLINE vi dot4(vi acc, vb w, vi x) {
    return dot4_small(acc, w & 127, x) - dot4_small((vi){}, w & 128, x);
}
BN_INLINE vf fma(vf x, vf y, vf z) {
    quarters a, b, c;
    a.vf_ = x; b.vf_ = y; c.vf_ = z;
    for (int j = 0; j < 4; j++) c.f[j] = vfmaq_f32(c.f[j], a.f[j], b.f[j]);
    return c.vf_;
}
BN_INLINE vi to_int(vf v) {
    quarters a;
    a.vf_ = v;
    for (int j = 0; j < 4; j++) a.i[j] = vcvtnq_s32_f32(a.f[j]);
    return a.vi_;
}
#else
BN_INLINE vi dot4(vi acc, vb w, vi x) {
    int8_t xs[4];
    int32_t first = x[0];
    memcpy(xs, &first, 4);
    for (int r = 0; r < 16; r++)
        acc[r] += w[4 * r] * xs[0] + w[4 * r + 1] * xs[1] + w[4 * r + 2] * xs[2] + w[4 * r + 3] * xs[3];
    return acc;
}
BN_INLINE vi dot4_small(vi acc, vb w, vi x) { return dot4(acc, w, x); }
BN_INLINE vf fma(vf a, vf b, vf c) {
    for (int r = 0; r < 16; r++) c[r] = __builtin_fmaf(a[r], b[r], c[r]);
    return c;
}
BN_INLINE vi to_int(vf v) {
    vi q;
    for (int r = 0; r < 16; r++) q[r] = (int32_t)lrintf(v[r]);
    return q;
}
#endif

BN_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

#if !defined(BN_AVX2)
BN_INLINE vf max(vf a, vf b) { // b where they do not compare, as x86 does
    for (int r = 0; r < 16; r++) a[r] = a[r] > b[r] ? a[r] : b[r];
    return a;
}
BN_INLINE vf min(vf a, vf b) {
    for (int r = 0; r < 16; r++) a[r] = a[r] < b[r] ? a[r] : b[r];
    return a;
}
BN_INLINE void narrow(int8_t *q, vi v) {
    for (int r = 0; r < 16; r++) q[r] = (int8_t)(v[r] < -128 ? -128 : v[r] > 127 ? 127 : v[r]);
}
BN_INLINE vf widen(const int8_t *q) {
    vf v;
    for (int r = 0; r < 16; r++) v[r] = (float)q[r];
    return v;
}
// Half precision by hand: exact one way, round half to even the other.
BN_INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7F800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float subnormal = (float)mantissa * 5.9604644775390625e-8f; // 2^-24
        memcpy(&bits, &subnormal, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
BN_INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00);
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000u) { // subnormal: the float adder does the rounding
        float value;
        memcpy(&value, &magnitude, 4);
        return (uint16_t)(sign | (uint32_t)lrintf(value * 16777216.0f));
    }
    uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}
BN_INLINE vf from_half(const uint16_t *p) {
    vf v;
    for (int r = 0; r < 16; r++) v[r] = half_to_float(p[r]);
    return v;
}
BN_INLINE void to_half(uint16_t *p, vf v) {
    for (int r = 0; r < 16; r++) p[r] = float_to_half(v[r]);
}
#endif
#endif

BN_INLINE vi splat_dword(const int8_t *p) { return splat(load_dword(p)); }

BN_INLINE vf absolute(vf v) { return (vf)((vi)v & splat((int32_t)0x7FFFFFFF)); }

// Sums and maxima over the 16 lanes, always as the same tree.
BN_INLINE float sum(vf v) {
    float t[16];
    store(t, v);
    for (int n = 8; n; n /= 2)
        for (int r = 0; r < n; r++) t[r] += t[r + n];
    return t[0];
}
BN_INLINE float maximum(vf v) {
    float t[16];
    store(t, v);
    for (int n = 8; n; n /= 2)
        for (int r = 0; r < n; r++) t[r] = t[r] > t[r + n] ? t[r] : t[r + n];
    return t[0];
}
BN_INLINE int32_t sum(vi v) {
    int32_t t = 0;
    for (int r = 0; r < 16; r++) t += v[r];
    return t;
}

// e^x within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of e^r to the
// seventh power. x is clamped to [-87, 88], so nothing overflows; e^-87 is 1.6e-38, which adds nothing to a softmax.
BN_INLINE vf exponential(vf x) {
    x = min(max(x, splat(-87.0f)), splat(88.0f));
    vi n = to_int(x * splat(1.44269504f));
    vf f = to_float(n);
    vf r = fma(f, splat(-0.693145752f), x);
    r = fma(f, splat(-1.42860677e-6f), r);
    vf p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return (vf)((vi)p + (n << 23));
}

} // namespace BN_ISA
} // namespace bn
