// The functions of dev/emulated.h against the instructions that AVX2, FMA and F16C have, on random numbers and on those
// at the edges. A program of its own: dev/emulate.py builds and runs it.
#include "emulated.h"

#include <random>

namespace {

std::mt19937 draw(1);
int failed = 0;
long compared = 0;

template <class A, class B> void same(const char *name, const A &a, const B &b) {
    static_assert(sizeof a == sizeof b, "as many bytes");
    compared++;
    if (!memcmp(&a, &b, sizeof a)) return;
    if (!failed++ && !bn_emulated_wrong) fprintf(stderr, "%s differs from the instruction\n", name);
}

struct ints { // what 64 bytes are for AVX2
    __m256i low, high;
};
struct floats {
    __m256 low, high;
};
struct halves {
    __m128i low, high;
};
template <class W, class V> W half(const V &v, int i) {
    W w;
    memcpy(&w, (const char *)&v + i * sizeof w, sizeof w);
    return w;
}
template <class V> V any() {
    V v;
    for (size_t i = 0; i < sizeof v / 4; i++) ((uint32_t *)&v)[i] = draw();
    return v;
}

// Floats of every kind: any bits, moderate ones, ties, and the borders of int32, of half precision and of its subnormals.
float a_float() {
    static const float edges[] = {0.0f,        -0.0f,   INFINITY, -INFINITY, NAN,          2147483648.0f, -2147483648.0f,
                                  2147483520., 65504.0f, 65519.9f, 65520.0f,  6.1035156e-5f, 5.9604645e-8f, 2.9802322e-8f};
    switch (draw() % 4) {
    case 0: return emulated::float_of(draw());
    case 1: return (float)((int32_t)draw() >> 8) * 0.5f;
    case 2: return ldexpf((float)(draw() % 8192) - 4096, (int)(draw() % 40) - 30);
    default: return edges[draw() % (sizeof edges / sizeof *edges)];
    }
}
__m512 any_floats() {
    __m512 v;
    for (int i = 0; i < 16; i++) ((float *)&v)[i] = a_float();
    return v;
}

// u * s of 32 bytes by way of 16 and 32 bits, where nothing saturates.
__m256i products(__m256i from, __m256i a, __m256i b) {
    __m256i u0 = _mm256_cvtepu8_epi16(half<__m128i>(a, 0)), u1 = _mm256_cvtepu8_epi16(half<__m128i>(a, 1));
    __m256i s0 = _mm256_cvtepi8_epi16(half<__m128i>(b, 0)), s1 = _mm256_cvtepi8_epi16(half<__m128i>(b, 1));
    __m256i pairs = _mm256_hadd_epi32(_mm256_madd_epi16(u0, s0), _mm256_madd_epi16(u1, s1));
    return _mm256_add_epi32(from, _mm256_permute4x64_epi64(pairs, 0xD8));
}

void check_integers() {
    __m512i acc = any<__m512i>(), a = any<__m512i>(), b = any<__m512i>();
    if (draw() % 4 == 0) memset(&a, 255, sizeof a), memset(&b, 128, sizeof b);
    ints sums = {products(half<__m256i>(acc, 0), half<__m256i>(a, 0), half<__m256i>(b, 0)),
                         products(half<__m256i>(acc, 1), half<__m256i>(a, 1), half<__m256i>(b, 1))};
    same("_mm512_dpbusd_epi32", _mm512_dpbusd_epi32(acc, a, b), sums);
    same("_mm256_dpbusd_avx_epi32",
         _mm256_dpbusd_avx_epi32(half<__m256i>(acc, 0), half<__m256i>(a, 0), half<__m256i>(b, 0)), sums.low);

    ints shuffled = {_mm256_shuffle_epi8(half<__m256i>(a, 0), half<__m256i>(b, 0)),
                             _mm256_shuffle_epi8(half<__m256i>(a, 1), half<__m256i>(b, 1))};
    same("_mm512_shuffle_epi8", _mm512_shuffle_epi8(a, b), shuffled);

    __m128i bytes = half<__m128i>(a, 0), upper = _mm_srli_si128(bytes, 8);
    same("_mm512_cvtepi8_epi32", _mm512_cvtepi8_epi32(bytes),
         ints{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(upper)});
    same("_mm512_cvtepu8_epi32", _mm512_cvtepu8_epi32(bytes),
         ints{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(upper)});
    same("_mm512_cvtepu16_epi32", _mm512_cvtepu16_epi32(half<__m256i>(a, 0)),
         ints{_mm256_cvtepu16_epi32(half<__m128i>(a, 0)), _mm256_cvtepu16_epi32(half<__m128i>(a, 1))});
    same("_mm512_broadcast_i32x4", _mm512_broadcast_i32x4(bytes),
         ints{_mm256_broadcastsi128_si256(bytes), _mm256_broadcastsi128_si256(bytes)});
    same("_mm512_set4_epi32", _mm512_set4_epi32(4, 3, 2, 1),
         ints{_mm256_setr_epi32(1, 2, 3, 4, 1, 2, 3, 4), _mm256_set_epi32(4, 3, 2, 1, 4, 3, 2, 1)});

    __m512i small = acc;
    for (int i = 0; i < 16; i++) ((int32_t *)&small)[i] >>= draw() % 32;
    __m256i words = _mm256_packs_epi32(half<__m256i>(small, 0), half<__m256i>(small, 1));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    same("_mm512_cvtsepi32_epi8", _mm512_cvtsepi32_epi8(small),
         _mm_packs_epi16(half<__m128i>(words, 0), half<__m128i>(words, 1)));
    same("_mm512_cvtepi32_ps", _mm512_cvtepi32_ps(small),
         floats{_mm256_cvtepi32_ps(half<__m256i>(small, 0)), _mm256_cvtepi32_ps(half<__m256i>(small, 1))});
}

void check_floats() {
    __m512 x = any_floats(), y = any_floats(), z = any_floats();
#define EACH(f) floats{f(half<__m256>(x, 0), half<__m256>(y, 0)), f(half<__m256>(x, 1), half<__m256>(y, 1))}
    same("_mm512_max_ps", _mm512_max_ps(x, y), EACH(_mm256_max_ps));
    same("_mm512_min_ps", _mm512_min_ps(x, y), EACH(_mm256_min_ps));
#undef EACH
    same("_mm512_cvtps_epi32", _mm512_cvtps_epi32(x),
         ints{_mm256_cvtps_epi32(half<__m256>(x, 0)), _mm256_cvtps_epi32(half<__m256>(x, 1))});
    same("_mm512_cvtps_ph", _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
         halves{_mm256_cvtps_ph(half<__m256>(x, 0), 0), _mm256_cvtps_ph(half<__m256>(x, 1), 0)});
    same("_mm512_loadu_ps", _mm512_loadu_ps(&x), x);

    __m512i index = any<__m512i>();
    __m512 found;
    for (int i = 0; i < 2; i++) {
        __m256i from = half<__m256i>(index, i);
        __m256 low = _mm256_permutevar8x32_ps(half<__m256>(x, 0), from);
        __m256 high = _mm256_permutevar8x32_ps(half<__m256>(x, 1), from);
        ((__m256 *)&found)[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(from, 28)));
    }
    same("_mm512_permutexvar_ps", _mm512_permutexvar_ps(index, x), found);

    // Which of several NaNs a fused multiply-add gives depends on the form of the instruction.
    floats fused = {_mm256_fmadd_ps(half<__m256>(x, 0), half<__m256>(y, 0), half<__m256>(z, 0)),
                         _mm256_fmadd_ps(half<__m256>(x, 1), half<__m256>(y, 1), half<__m256>(z, 1))};
    __m512 ours = _mm512_fmadd_ps(x, y, z);
    for (int i = 0; i < 16; i++)
        if (isnan(((float *)&fused)[i]) && isnan(((float *)&ours)[i])) ((float *)&fused)[i] = ((float *)&ours)[i];
    same("_mm512_fmadd_ps", ours, fused);
}

void check_halves() {
    for (int first = 0; first < 65536; first += 16) {
        uint16_t h[16];
        for (int i = 0; i < 16; i++) h[i] = (uint16_t)(first + i);
        __m256i v;
        memcpy(&v, h, sizeof v);
        same("_mm512_cvtph_ps", _mm512_cvtph_ps(v),
             floats{_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1))});
    }
}

// Tiles of drawn shapes against sums written as a formula; rows and bytes beyond the shape must be zeros.
void check_tiles() {
    int rows = 1 + draw() % 16, dwords = 1 + draw() % 16, columns = 1 + draw() % 16;
    uint8_t config[64] = {1}, seen[64], a[16][80], b[16][80];
    for (auto &row : a)
        for (auto &byte : row) byte = (uint8_t)draw();
    for (auto &row : b)
        for (auto &byte : row) byte = (uint8_t)draw();
    int shape[3][2] = {{rows, 4 * columns}, {rows, 4 * dwords}, {dwords, 4 * columns}};
    for (int t = 0; t < 3; t++) {
        config[48 + t] = (uint8_t)shape[t][0];
        config[16 + 2 * t] = (uint8_t)shape[t][1];
    }
    _tile_loadconfig(config);
    _tile_storeconfig(seen);
    same("_tile_storeconfig", seen, config);
    int32_t out[16][20], expected[16][20];
    memset(out, 7, sizeof out);
    memset(expected, 7, sizeof expected);
    _tile_zero(0);
    _tile_loadd(1, a, 80);
    _tile_loadd(2, b, 80);
    _tile_dpbsud(0, 1, 2);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, out, 80);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            expected[m][n] = 0;
            for (int k = 0; k < 4 * dwords; k++) expected[m][n] += 2 * (int8_t)a[m][k] * b[k / 4][4 * n + k % 4];
        }
    same("_tile_dpbsud", out, expected);
    const auto &r = emulated::tiles;
    int beyond = 0;
    for (int t = 0; t < 3; t++)
        for (int m = 0; m < 16; m++)
            for (int i = 0; i < 64; i++)
                if (m >= shape[t][0] || i >= shape[t][1]) beyond |= r.row[t][m][i];
    same("tiles beyond their shape", beyond, 0);
    _tile_release();
    memset(config, 0, sizeof config);
    _tile_storeconfig(seen);
    same("_tile_release", seen, config);
}

} // namespace

void check(int rounds) {
    failed = 0;
    for (int i = 0; i < rounds; i++) {
        check_integers();
        check_floats();
    }
    check_halves();
    for (int i = 0; i < rounds / 40; i++) check_tiles();
}

int main() {
    long names = 0;
    for (const char *p = bn_emulated_names(); *p; p++) names += *p == ' ';
    for (bn_emulated_wrong = 1; bn_emulated_wrong <= names; bn_emulated_wrong++) {
        check(400);
        if (!failed) return fprintf(stderr, "a planted fault was not found, number %d\n", bn_emulated_wrong), 1;
    }
    bn_emulated_wrong = 0;
    compared = 0;
    check(20000);
    if (failed) return 1;
    printf("emulated instructions: %ld results are those of AVX2, FMA, F16C and of a tile's formula\n", compared);
}
