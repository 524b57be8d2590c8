// What Python calls: which instruction sets there are, and packing.
#include "layout.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define BN_ISA common
#include "forward.h"
#include "sampling.h"

#define BN_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" const bn_kernels bn_kernels_scalar;
#ifdef BN_HAVE_AVX2
extern "C" const bn_kernels bn_kernels_avx2;
#endif
#ifdef BN_HAVE_AVX_VNNI
extern "C" const bn_kernels bn_kernels_avx_vnni;
#endif
#ifdef BN_HAVE_AVX512_VNNI
extern "C" const bn_kernels bn_kernels_avx512_vnni;
#endif
#ifdef BN_HAVE_AMX
extern "C" const bn_kernels bn_kernels_amx;
#endif
#ifdef BN_HAVE_NEON
extern "C" const bn_kernels bn_kernels_neon;
#endif

#if defined(__x86_64__)
#include <cpuid.h>

namespace {
struct features {
    bool avx2, avx_vnni, avx512_vnni, amx;
};

uint64_t xcr0() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

// The processor must have an instruction and the system must save its registers.
features detect() {
#ifdef BN_EMULATED // dev/emulate.py: every instruction set runs where AVX2 does
    return {true, true, true, true};
#endif
    features f = {};
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return f; // OSXSAVE
    bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
    uint64_t saved = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    bool avx2 = b >> 5 & 1, f512 = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    bool vnni = c >> 11 & 1, amx_tile = d >> 24 & 1, amx_int8 = d >> 25 & 1;
    uint32_t a1 = 0, unused1, unused2, unused3;
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &unused1, &unused2, &unused3);
    f.avx2 = avx2 && fma && f16c && (saved & 0x6) == 0x6;
    f.avx_vnni = f.avx2 && (a1 >> 4 & 1);
    f.avx512_vnni = f.avx2 && f512 && dq && bw && vl && vnni && (saved & 0xE6) == 0xE6;
    f.amx = f.avx512_vnni && amx_tile && amx_int8 && (saved & 0x60000) == 0x60000;
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILEDATA = 18 };
    if (f.amx && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA)) f.amx = false;
#else
    f.amx = false;
#endif
    return f;
}
} // namespace
#endif

// The kernels that this machine can run, best first; returns how many.
BN_EXPORT int bn_available(const bn_kernels **out) {
    int n = 0;
#if defined(__x86_64__)
    static const features f = detect();
#ifdef BN_HAVE_AMX
    if (f.amx) out[n++] = &bn_kernels_amx;
#endif
#ifdef BN_HAVE_AVX512_VNNI
    if (f.avx512_vnni) out[n++] = &bn_kernels_avx512_vnni;
#endif
#ifdef BN_HAVE_AVX_VNNI
    if (f.avx_vnni) out[n++] = &bn_kernels_avx_vnni;
#endif
#ifdef BN_HAVE_AVX2
    if (f.avx2) out[n++] = &bn_kernels_avx2;
#endif
    (void)f;
#endif
#ifdef BN_HAVE_NEON
    out[n++] = &bn_kernels_neon; // setup.py builds it only for targets that have the dot product
#endif
    out[n++] = &bn_kernels_scalar;
    return n;
}

// The sum of all sources, which setup.py gives and native.py compares with those it finds.
BN_EXPORT const char *bn_sources() { return BN_SOURCES; }

BN_EXPORT int64_t bn_struct_sizes(int which) {
    static const int64_t sizes[] = {sizeof(bn_matrix), sizeof(bn_projection), sizeof(bn_layer), sizeof(bn_model),
                                    sizeof(bn_cache), sizeof(bn_row), sizeof(bn_draw), sizeof(bn_kernels)};
    return sizes[which];
}

// Scratch of a thread that draws from V logits.
BN_EXPORT int64_t bn_draw_bytes(int64_t V) { return bn::common::draw_room_at(nullptr, V).bytes; }

// Lines of a block of 16 rows with K columns.
BN_EXPORT int32_t bn_lines(int64_t K, int codec) {
    int64_t each = 4 * bn::common::quads_of(codec);
    return (int32_t)((K + each - 1) / each);
}

// Canonical packed rows (bitnet/quant/packing.py) [N, width] of `bits` to the lines of layout.h: row n goes to row
// at + n / 16 * step * 16 + n % 16, so gate and up, with step 2, take turns. Rows and columns that do not exist are
// left as the caller filled them. Returns 1 without memory for a row of codes a thread, and 2 for rows of 2 bits with
// the pattern 3, which is no code and which the tables of a line have no place for.
BN_EXPORT int bn_pack(const uint8_t *packed, int64_t N, int64_t width, int bits, int64_t K, uint8_t *lines, int codec,
                      int64_t at, int64_t step, int threads) {
    int64_t per_line = bn_lines(K, codec), quads = bn::common::quads_of(codec), per_byte = 8 / bits;
    int64_t longest = width * per_byte + 4 * quads;
    uint8_t *codes_of_all = (uint8_t *)malloc(threads * longest), fraction[243];
    if (!codes_of_all) return 1;
    int no_codes = 0;
    for (int n = 0; n < 243; n++) fraction[n] = (uint8_t)((256 * n + 242) / 243);
    bn::run(threads, [&](bn::member &self) {
        uint8_t *codes = codes_of_all + self.id * longest;
        memset(codes, 0, longest);
        self.each(N, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; n++) {
                const uint8_t *row = packed + n * width;
                uint8_t threes = 0;
                for (int64_t j = 0; j < width; j++) threes |= row[j] & row[j] >> 1;
                if (bits == 2 && threes & 0x55) {
                    __atomic_store_n(&no_codes, 1, __ATOMIC_RELAXED);
                    continue;
                }
                for (int64_t block = 0; block < width / 32; block++)
                    for (int64_t lane = 0; lane < per_byte; lane++)
                        for (int64_t j = 0; j < 32; j++)
                            codes[(block * per_byte + lane) * 32 + j] =
                                row[block * 32 + j] >> (lane * bits) & ((1 << bits) - 1);
                uint8_t *out = lines + (at / 16 + n / 16 * step) * per_line * 64 + n % 16 * 4;
                const uint8_t *c = codes;
                for (int64_t l = 0; l < per_line; l++, out += 64, c += 4 * quads)
                    for (int64_t j = 0; j < 4; j++) {
                        int number = 81 * c[j] + 27 * c[4 + j];
                        if (codec == CODEC_BASE3) out[j] = fraction[number + 9 * c[8 + j] + 3 * c[12 + j] + c[16 + j]];
                        else if (codec == CODEC_TWO_BIT) out[j] = c[j] | c[4 + j] << 2 | c[8 + j] << 4 | c[12 + j] << 6;
                        else if (codec == CODEC_FOUR_BIT) out[j] = c[j] | c[4 + j] << 4;
                        else out[j] = c[j];
                    }
            }
        });
    });
    free(codes_of_all);
    return no_codes ? 2 : 0;
}

// Ask for huge pages: streaming weights from 4 KiB pages costs a fifth of the bandwidth. A hint, so it cannot fail.
BN_EXPORT void bn_advise_huge_pages(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = 4096, first = ((uintptr_t)start + page - 1) / page * page;
    uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) / page * page;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

// ---- the machine's limits, for bitnet.bench ----

// Read `bytes` once with every thread; returns something the compiler cannot know.
BN_EXPORT int64_t bn_read(const uint8_t *p, int64_t bytes, int threads) {
    std::atomic<int64_t> total{0};
    bn::run(threads, [&](bn::member &self) {
        self.each(bytes / 256, [&](int64_t first, int64_t last) {
            int64_t part = 0;
            for (int64_t i = first; i < last; i++) {
                const int64_t *q = (const int64_t *)(p + 256 * i);
                int64_t sum = 0;
                for (int j = 0; j < 32; j++) sum |= q[j];
                __builtin_prefetch(p + 256 * i + 8192);
                __builtin_prefetch(p + 256 * i + 8256);
                __builtin_prefetch(p + 256 * i + 8320);
                __builtin_prefetch(p + 256 * i + 8384);
                part += sum;
            }
            total += part;
        });
    });
    return total;
}
