// Vectors of 64 bytes, in the words of each instruction set.
//
// A "line" is 64 bytes = 16 rows x 4 values of K (the run-time layouts are drawn in layout.h). Everything above this file
// is written in lines (vb), int32 x 16 (vi) and float x 16 (vf), and is compiled once for each instruction set; where
// registers are shorter, a vector is a pair, or a pair of pairs. Integer results are exact, and the float operations
// are the same ones in the same order, so every instruction set gives the same bits: -ffp-contract=off keeps the
// compiler from fusing where another target cannot, and where a fused multiply-add is wanted it is written `fma`.
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

// ---- a vector of the compiler's own, of N bytes, and pairs of them ----

template <int N> struct native {
    typedef float f __attribute__((vector_size(N)));
    typedef int32_t i __attribute__((vector_size(N)));
    typedef uint32_t u __attribute__((vector_size(N)));
    typedef uint8_t b __attribute__((vector_size(N)));
};

// gcc keeps two named vectors in registers; one vector of twice a register's size, or an array, goes through memory.
template <class T> struct pair {
    T lo, hi;
};
#define BN_PAIRWISE(op)                                                                                                \
    template <class T> BN_INLINE pair<T> operator op(pair<T> a, pair<T> b) { return {a.lo op b.lo, a.hi op b.hi}; }
BN_PAIRWISE(+) BN_PAIRWISE(-) BN_PAIRWISE(*) BN_PAIRWISE(/) BN_PAIRWISE(&) BN_PAIRWISE(|)
#undef BN_PAIRWISE
template <class T> BN_INLINE pair<T> operator-(pair<T> a) { return {-a.lo, -a.hi}; }
template <class T> BN_INLINE pair<T> operator&(pair<T> a, uint8_t mask) { return {a.lo & mask, a.hi & mask}; }
template <class T> BN_INLINE pair<T> operator>>(pair<T> a, int n) { return {a.lo >> n, a.hi >> n}; }
template <class T> BN_INLINE pair<T> operator<<(pair<T> a, int n) { return {a.lo << n, a.hi << n}; }

#if defined(BN_AVX2)
enum { NATIVE = 32 };
typedef pair<native<32>::f> vf;
typedef pair<native<32>::i> vi;
typedef pair<native<32>::b> vb;
#elif defined(BN_NEON)
enum { NATIVE = 16 };
typedef pair<pair<native<16>::f>> vf;
typedef pair<pair<native<16>::i>> vi;
typedef pair<pair<native<16>::b>> vb;
#else
enum { NATIVE = 64 };
typedef native<64>::f vf;
typedef native<64>::i vi;
typedef native<64>::b vb;
#endif
#if defined(BN_AVX512)
enum { FLOAT_TILE = 12 }; // tokens whose float sums stay in registers
#elif defined(BN_AVX2) || defined(BN_NEON)
enum { FLOAT_TILE = 6 };
#else
enum { FLOAT_TILE = 1 };
#endif
typedef native<NATIVE>::f nf; // what one instruction works on; the scalar build leaves that to the compiler
typedef native<NATIVE>::i ni;
typedef native<NATIVE>::b nb;

BN_INLINE ni as_int(nf v) { return (ni)v; }
BN_INLINE nf as_float(ni v) { return (nf)v; }
template <class T> BN_INLINE auto as_int(pair<T> v) -> pair<decltype(as_int(v.lo))> {
    return {as_int(v.lo), as_int(v.hi)};
}
template <class T> BN_INLINE auto as_float(pair<T> v) -> pair<decltype(as_float(v.lo))> {
    return {as_float(v.lo), as_float(v.hi)};
}

// Register by register: gcc copies a pair in smaller pieces through memory, and the loads behind them wait.
template <class T> BN_INLINE void read(const void *p, T *v) { memcpy(v, p, sizeof *v); }
template <class T> BN_INLINE void read(const void *p, pair<T> *v) {
    read(p, &v->lo);
    read((const char *)p + sizeof(T), &v->hi);
}
template <class T> BN_INLINE void write(void *p, const T *v) { memcpy(p, v, sizeof *v); }
template <class T> BN_INLINE void write(void *p, const pair<T> *v) {
    write(p, &v->lo);
    write((char *)p + sizeof(T), &v->hi);
}
BN_INLINE vb load_line(const uint8_t *p) { vb v; read(p, &v); return v; }
BN_INLINE vf load(const float *p) { vf v; read(p, &v); return v; }
BN_INLINE vi load(const int32_t *p) { vi v; read(p, &v); return v; }
BN_INLINE void store_line(uint8_t *p, vb v) { write(p, &v); }
BN_INLINE void store(float *p, vf v) { write(p, &v); }
BN_INLINE void store(int32_t *p, vi v) { write(p, &v); }

BN_INLINE void fill(nf *v, float x) { *v = x - (nf){}; }
BN_INLINE void fill(ni *v, int32_t x) { *v = x + (ni){}; }
template <class T, class S> BN_INLINE void fill(pair<T> *v, S x) { fill(&v->lo, x); v->hi = v->lo; }
BN_INLINE vf splat(float x) { vf v; fill(&v, x); return v; }
BN_INLINE vi splat(int32_t x) { vi v; fill(&v, x); return v; }
BN_INLINE vi splat_dword(const int8_t *p) { int32_t x; memcpy(&x, p, 4); return splat(x); }

// 1 in the bytes above a bound, else 0.
BN_INLINE nb above(nb v, int bound) {
    uint8_t b = (uint8_t)bound;
    return (nb)(v > b) & 1;
}
template <class T> BN_INLINE pair<T> above(pair<T> v, int bound) { return {above(v.lo, bound), above(v.hi, bound)}; }

// ---- what each instruction set says in its own way ----
//   dot4(acc, w, x)        acc[r] += sum over j of w[4r + j] * x[4r + j], w unsigned bytes, x signed ones
//   dot4_small(acc, w, x)  the same where no w exceeds 127
//   fma(a, b, c)           a * b + c, rounded once
//   to_int(v)              round half to even
//   max, min               the second operand where they do not compare

#if defined(BN_AVX512)

BN_INLINE vi dot4(vi acc, vb w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
BN_INLINE vi dot4_small(vi acc, vb w, vi x) { return dot4(acc, w, x); }
BN_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
BN_INLINE vi to_int(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
BN_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
BN_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }

#elif defined(BN_AVX2)

BN_INLINE ni dot4_small(ni acc, nb w, ni x) {
#if defined(BN_AVXVNNI)
    return (ni)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#else
    // vpmaddubsw saturates at 16 bits, which 127 * (127 + 127) and 127 * (-128 - 128) do not reach.
    return acc + (ni)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), _mm256_set1_epi16(1));
#endif
}
BN_INLINE ni dot4(ni acc, nb w, ni x) {
#if defined(BN_AVXVNNI)
    return dot4_small(acc, w, x);
#else
    acc = dot4_small(acc, w & 127, x); // 128 * (127 + 127) and 128 * (-128 - 128) still fit
    return dot4_small(acc, w & 128, x);
#endif
}
BN_INLINE nf fma(nf a, nf b, nf c) { return (nf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
BN_INLINE ni to_int(nf v) { return (ni)_mm256_cvtps_epi32((__m256)v); }
BN_INLINE nf max(nf a, nf b) { return (nf)_mm256_max_ps((__m256)a, (__m256)b); }
BN_INLINE nf min(nf a, nf b) { return (nf)_mm256_min_ps((__m256)a, (__m256)b); }

#elif defined(BN_NEON)

// vdotq_s32 takes signed bytes on both sides.
BN_INLINE ni dot4_small(ni acc, nb w, ni x) { return (ni)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x); }
// w = (w & 127) + (w & 128), and 128 reads as -128.
BN_INLINE ni dot4(ni acc, nb w, ni x) {
    return dot4_small(acc, w & 127, x) - dot4_small((ni){}, w & 128, x);
}
BN_INLINE nf fma(nf a, nf b, nf c) { return (nf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
BN_INLINE ni to_int(nf v) { return (ni)vcvtnq_s32_f32((float32x4_t)v); }

#else

// A call, or the loops of every kernel would take minutes to compile.
__attribute__((noinline)) static vi dot4(vi acc, vb w, vi x) {
    int8_t xs[4];
    int32_t first = x[0]; // all lanes are alike
    memcpy(xs, &first, 4);
    for (int r = 0; r < 16; r++)
        acc[r] += w[4 * r] * xs[0] + w[4 * r + 1] * xs[1] + w[4 * r + 2] * xs[2] + w[4 * r + 3] * xs[3];
    return acc;
}
BN_INLINE vi dot4_small(vi acc, vb w, vi x) { return dot4(acc, w, x); }
__attribute__((noinline)) static vf fma(vf a, vf b, vf c) {
    for (int r = 0; r < 16; r++) c[r] = __builtin_fmaf(a[r], b[r], c[r]);
    return c;
}
BN_INLINE vi to_int(vf v) {
    vi q;
    for (int r = 0; r < 16; r++) q[r] = (int32_t)lrintf(v[r]);
    return q;
}

#endif

#if !defined(BN_AVX512) && !defined(BN_AVX2)
BN_INLINE nf max(nf a, nf b) {
    for (int r = 0; r < NATIVE / 4; r++) a[r] = a[r] > b[r] ? a[r] : b[r];
    return a;
}
BN_INLINE nf min(nf a, nf b) {
    for (int r = 0; r < NATIVE / 4; r++) a[r] = a[r] < b[r] ? a[r] : b[r];
    return a;
}
#endif

// Sums of short dot products: `add_small` up to EVERY times from zero, then `dot4_of`. Where dot products go by way of 16
// bits, those are added first, and EVERY is what they hold of codes of this many bits.
#if defined(BN_AVX2) && !defined(BN_AVXVNNI)
enum { SHORT_SUMS = 1 };
BN_INLINE constexpr int every(int bits) { return bits <= 2 ? 32 : bits <= 4 ? 8 : bits == 5 ? 4 : 2; }
BN_INLINE ni add_small(ni acc, nb w, ni x) {
    __m256i product = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    __asm__("vpaddw %1, %0, %0" : "+x"(acc) : "x"(product)); // gcc's own multiplies first, for all sums, and spills
    return acc;
}
BN_INLINE ni dot4_of(ni acc) { return (ni)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)); }
#else
enum { SHORT_SUMS = 0 };
BN_INLINE constexpr int every(int bits) { return 8; }
#if defined(BN_AVX512) || !(defined(BN_AVX2) || defined(BN_NEON))
BN_INLINE vi add_small(vi acc, vb w, vi x) { return dot4_small(acc, w, x); }
#else
BN_INLINE ni add_small(ni acc, nb w, ni x) { return dot4_small(acc, w, x); }
#endif
BN_INLINE ni dot4_of(ni acc) { return acc; }
#endif
template <class I, class B> BN_INLINE pair<I> add_small(pair<I> acc, pair<B> w, pair<I> x) {
    return {add_small(acc.lo, w.lo, x.lo), add_small(acc.hi, w.hi, x.hi)};
}
template <class T> BN_INLINE pair<T> dot4_of(pair<T> acc) { return {dot4_of(acc.lo), dot4_of(acc.hi)}; }

// Bits `from` on of every byte, moved to bits `to` on and masked there. Whole dwords are shifted: what comes in from the
// neighbouring byte is masked away.
template <int from, int to> BN_INLINE nb field(nb v, int mask) {
    ni w = (ni)v;
    if constexpr (from > to) w = w >> (from - to);
    else if constexpr (from < to) w = w << (to - from);
    return (nb)w & (uint8_t)mask;
}
template <int from, int to, class T> BN_INLINE pair<T> field(pair<T> v, int mask) {
    return {field<from, to>(v.lo, mask), field<from, to>(v.hi, mask)};
}

// Codes of 8 bits leave no room in 16, so short sums are of their halves, of 4 bits each: number HALF, and what its sum is
// shifted by. Where sums are not short there is one half, which is the whole.
BN_INLINE constexpr int halves(int bits) { return SHORT_SUMS && bits == 8 ? 2 : 1; }
BN_INLINE constexpr int half_bits(int bits) { return bits / halves(bits); }
template <int BITS, int HALF, class T> BN_INLINE T half_of(T v) {
    if constexpr (halves(BITS) == 1) return v;
    else return field<4 * HALF, 0>(v, 15);
}

// table[code] of codes below 16, for a table of bytes and one of floats (whose codes are the dwords).
#if defined(BN_AVX512)
BN_INLINE nb lookup(nb v, const uint8_t *table) {
    __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (nb)_mm512_shuffle_epi8(t, (__m512i)v);
}
BN_INLINE nf lookup(ni v, const float *table) {
    return (nf)_mm512_permutexvar_ps((__m512i)v, _mm512_loadu_ps(table));
}
#elif defined(BN_AVX2)
BN_INLINE nb lookup(nb v, const uint8_t *table) {
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (nb)_mm256_shuffle_epi8(t, (__m256i)v);
}
BN_INLINE nf lookup(ni v, const float *table) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)v);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)v);
    return (nf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)v, 28)));
}
#else
BN_INLINE nb lookup(nb v, const uint8_t *table) {
#if defined(BN_NEON)
    return (nb)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)v);
#else
    for (int i = 0; i < NATIVE; i++) v[i] = table[v[i]];
    return v;
#endif
}
BN_INLINE nf lookup(ni v, const float *table) {
    nf f;
    for (int i = 0; i < NATIVE / 4; i++) f[i] = table[v[i]];
    return f;
}
#endif
template <class T, class E> BN_INLINE auto lookup(pair<T> v, const E *table) -> pair<decltype(lookup(v.lo, table))> {
    return {lookup(v.lo, table), lookup(v.hi, table)};
}

// Byte j of every dword.
template <int j> BN_INLINE ni byte_of(nb v) {
    if constexpr (j == 0) return (ni)v & 255;
    if constexpr (j == 3) return (ni)((native<NATIVE>::u)v >> 24);
#if defined(BN_AVX512)
    __m512i from = _mm512_set4_epi32(~255 | (12 + j), ~255 | (8 + j), ~255 | (4 + j), ~255 | j); // in one instruction
    return (ni)_mm512_shuffle_epi8((__m512i)v, from);
#elif defined(BN_AVX2)
    __m128i from = _mm_setr_epi32(~255 | j, ~255 | (4 + j), ~255 | (8 + j), ~255 | (12 + j));
    return (ni)_mm256_shuffle_epi8((__m256i)v, _mm256_broadcastsi128_si256(from));
#else
    return ((ni)v >> (8 * j)) & 255;
#endif
}
template <int j, class T> BN_INLINE auto byte_of(pair<T> v) -> pair<decltype(byte_of<j>(v.lo))> {
    return {byte_of<j>(v.lo), byte_of<j>(v.hi)};
}

BN_INLINE nf to_float(ni v) { return __builtin_convertvector(v, nf); }
template <class T> BN_INLINE auto to_float(pair<T> v) -> pair<decltype(to_float(v.lo))> {
    return {to_float(v.lo), to_float(v.hi)};
}
template <class T> BN_INLINE auto to_int(pair<T> v) -> pair<decltype(to_int(v.lo))> {
    return {to_int(v.lo), to_int(v.hi)};
}
template <class T> BN_INLINE pair<T> fma(pair<T> a, pair<T> b, pair<T> c) {
    return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
template <class T> BN_INLINE pair<T> max(pair<T> a, pair<T> b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }
template <class T> BN_INLINE pair<T> min(pair<T> a, pair<T> b) { return {min(a.lo, b.lo), min(a.hi, b.hi)}; }
template <class I, class B> BN_INLINE pair<I> dot4(pair<I> acc, pair<B> w, pair<I> x) {
    return {dot4(acc.lo, w.lo, x.lo), dot4(acc.hi, w.hi, x.hi)};
}
template <class I, class B> BN_INLINE pair<I> dot4_small(pair<I> acc, pair<B> w, pair<I> x) {
    return {dot4_small(acc.lo, w.lo, x.lo), dot4_small(acc.hi, w.hi, x.hi)};
}

// Keeps a vector in its registers, and the compiler from knowing what is in it.
#if (defined(BN_AVX512) && !defined(BN_EMULATED)) || defined(BN_AVX2)
template <class T> BN_INLINE void opaque(T &v) { __asm__ volatile("" : "+v"(v)); }
#elif defined(BN_NEON)
template <class T> BN_INLINE void opaque(T &v) { __asm__ volatile("" : "+w"(v)); }
#else
template <class T> BN_INLINE void opaque(T &v) { __asm__ volatile("" : "+m"(v)); }
#endif
template <class T> BN_INLINE void opaque(pair<T> &v) { opaque(v.lo); opaque(v.hi); }

// Nothing that lies in memory is kept in registers past this.
#define BN_IN_MEMORY() __asm__ volatile("" ::: "memory")

// ---- bytes and half precision: 16 values in memory to and from a vector ----

// widen: 16 signed bytes as floats, unsigned integers as int32; from_brain: bfloat16.
#if defined(BN_AVX512) || defined(BN_AVX2)
#if defined(BN_AVX512)
BN_INLINE vi widen(const uint8_t *q) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q)); }
BN_INLINE vi widen(const uint16_t *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
BN_INLINE vf widen(const int8_t *q) {
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
}
BN_INLINE void narrow(int8_t *q, vi v) { _mm_storeu_si128((__m128i *)q, _mm512_cvtsepi32_epi8((__m512i)v)); }
BN_INLINE vf from_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
BN_INLINE void to_half(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
BN_INLINE vi widen(const uint8_t *q) {
    return {(ni)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)q)),
            (ni)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(q + 8)))};
}
BN_INLINE vi widen(const uint16_t *p) {
    return {(ni)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
            (ni)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
BN_INLINE vf widen(const int8_t *q) {
    return {(nf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q))),
            (nf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + 8))))};
}
BN_INLINE void narrow(int8_t *q, vi v) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v.lo, (__m256i)v.hi), 0xD8);
    _mm_storeu_si128((__m128i *)q, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
BN_INLINE vf from_half(const uint16_t *p) {
    return {(nf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
            (nf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
BN_INLINE void to_half(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph((__m256)v.hi, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#else
template <class T> BN_INLINE vi widen_each(const T *q) {
    int32_t t[16];
    for (int r = 0; r < 16; r++) t[r] = q[r];
    return load(t);
}
BN_INLINE vi widen(const uint8_t *q) { return widen_each(q); }
BN_INLINE vi widen(const uint16_t *q) { return widen_each(q); }
BN_INLINE vf widen(const int8_t *q) {
    float t[16];
    for (int r = 0; r < 16; r++) t[r] = (float)q[r];
    return load(t);
}
BN_INLINE void narrow(int8_t *q, vi v) {
    int32_t t[16];
    store(t, v);
    for (int r = 0; r < 16; r++) q[r] = (int8_t)(t[r] < -128 ? -128 : t[r] > 127 ? 127 : t[r]);
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
    float t[16];
    for (int r = 0; r < 16; r++) t[r] = half_to_float(p[r]);
    return load(t);
}
BN_INLINE void to_half(uint16_t *p, vf v) {
    float t[16];
    store(t, v);
    for (int r = 0; r < 16; r++) p[r] = float_to_half(t[r]);
}
#endif

BN_INLINE vf from_brain(const uint16_t *p) { return as_float(widen(p) << 16); }
// E4M3FN times 2^-8: as half precision, whose exponent is biased by 8 more. A NaN gives 1.875, and is refused before.
BN_INLINE vf from_float8(const uint8_t *p) {
    uint16_t half[16];
    for (int r = 0; r < 16; r++) half[r] = (uint16_t)((p[r] & 0x80) << 8 | (p[r] & 0x7F) << 7);
    return from_half(half);
}
BN_INLINE vf absolute(vf v) { return as_float(as_int(v) & splat((int32_t)0x7FFFFFFF)); }

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
    int32_t t[16], s = 0;
    store(t, v);
    for (int r = 0; r < 16; r++) s += t[r];
    return s;
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
    return as_float(as_int(p) + (n << 23));
}

} // namespace BN_ISA
} // namespace bn
