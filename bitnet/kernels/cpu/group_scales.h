// What groups of columns have beside their codes: w = s c + t, as floats for a chunk of columns of one block.
#pragma once

#include "matmul.h"

namespace bn {
namespace BN_ISA {

enum { CHUNK = 512, CHUNK_LINES = CHUNK / 4 + 4, CHUNK_GROUPS = CHUNK / 16 };

struct chunk { // of one block: its columns, and what its groups have
    const uint8_t *lines;
    int64_t first, columns, groups;
    alignas(64) float s[CHUNK_GROUPS * 16], t[CHUNK_GROUPS * 16];
};

BN_INLINE int64_t group_bytes(int kind) {
    return kind == GROUPS_HALF ? 32 : kind == GROUPS_HALF_MIN || kind == GROUPS_FLOAT ? 64 : kind == GROUPS_HALF_ZERO ? 48
         : kind == GROUPS_SUPER_MIN ? 32 : 16;
}
BN_INLINE int64_t super_bytes(int kind) { return kind == GROUPS_SUPER ? 32 : kind >= GROUPS_SUPER_MIN ? 64 : 0; }

// Scales and minimums of the groups from column `first` on; chunks begin with a super-block.
template <int kind> static void read_groups(const bn_matrix &w, int64_t block, chunk &c) {
    int64_t columns = padded_columns(w), per_block = (columns + w.group - 1) / w.group, bytes = group_bytes(kind);
    int64_t from = c.first / w.group, in_super = 256 / w.group;
    const uint8_t *p = w.groups + (block * per_block + from) * bytes;
    const uint8_t *super = w.supers + (block * ((columns + 255) / 256) + c.first / 256) * super_bytes(kind);
    c.groups = (c.first + c.columns + w.group - 1) / w.group - from;
    vf center = splat((float)-w.center), scale = {}, least = {};
    for (int64_t i = 0, left = 0; i < c.groups; i++, p += bytes, left--) {
        BN_PREFETCH(p + PREFETCH / 4);
        if (super_bytes(kind) && left == 0) {
            BN_PREFETCH(super + PREFETCH / 8);
            scale = from_half((const uint16_t *)super);
            if (super_bytes(kind) == 64) least = -from_half((const uint16_t *)super + 16);
            super += super_bytes(kind);
            left = in_super;
        }
        vf s, t;
        if constexpr (kind == GROUPS_HALF) {
            s = from_half((const uint16_t *)p);
            t = center * s;
        } else if constexpr (kind == GROUPS_HALF_MIN) {
            s = from_half((const uint16_t *)p);
            t = from_half((const uint16_t *)p + 16);
        } else if constexpr (kind == GROUPS_HALF_ZERO) {
            s = from_half((const uint16_t *)p);
            t = -to_float(widen(p + 32)) * s;
        } else if constexpr (kind == GROUPS_FLOAT) {
            s = load((const float *)p);
            t = center * s;
        } else if constexpr (kind == GROUPS_SUPER) {
            s = scale * widen((const int8_t *)p);
            t = center * s;
        } else if constexpr (kind == GROUPS_SUPER_MIN) {
            s = scale * to_float(widen(p));
            t = least * to_float(widen(p + 16));
        } else {
            vi both = widen(p);
            s = scale * to_float(both & splat(15));
            t = least * to_float((both >> 4) & splat(15));
        }
        store(c.s + 16 * i, s);
        store(c.t + 16 * i, t);
    }
}
static void read_groups(const bn_matrix &w, int64_t block, chunk &c) {
    switch (w.kind) {
    case GROUPS_HALF: return read_groups<GROUPS_HALF>(w, block, c);
    case GROUPS_HALF_MIN: return read_groups<GROUPS_HALF_MIN>(w, block, c);
    case GROUPS_HALF_ZERO: return read_groups<GROUPS_HALF_ZERO>(w, block, c);
    case GROUPS_FLOAT: return read_groups<GROUPS_FLOAT>(w, block, c);
    case GROUPS_SUPER: return read_groups<GROUPS_SUPER>(w, block, c);
    case GROUPS_SUPER_MIN: return read_groups<GROUPS_SUPER_MIN>(w, block, c);
    default: return read_groups<GROUPS_NIBBLES>(w, block, c);
    }
}

} // namespace BN_ISA
} // namespace bn
