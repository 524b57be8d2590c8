// What the native kernels hold in memory, and the calls they offer. Plain C: Python reads the same structs by ctypes.
//
// Run-time layout of a weight matrix [N, K]. Rows are padded to a multiple of 32 and cut into blocks of 16. A block is
// a run of lines of 64 bytes: dword r of a line belongs to row r, its byte j to K = 4k + j for one or more k's. One
// broadcast of four activations meets 16 rows at a time, and no sum crosses lanes.
//
//     codec            byte                                           K of line l, byte j      unsigned code
//     CODEC_TWO_BIT    c0 | c1 << 2 | c2 << 4 | c3 << 6               16 l + 4 i + j for c_i   w + 1
//     CODEC_BASE3      ceil(256/243 (81 c0 + 27 c1 + 9 c2 + 3 c3 + c4))  20 l + 4 i + j for c_i   w + 1
//     CODEC_FOUR_BIT   c0 | c1 << 4                                   8 l + 4 i + j for c_i    w + 8
//     CODEC_EIGHT_BIT  c0                                             4 l + j                  w + 128
//
// The product runs on the unsigned codes; offset * sum(x) is subtracted at the end. A pad of K meets activations that
// are zero. These four have a scale a row and activations with a scale a token.
//
// With groups of columns that have scales of their own, and activations with a scale a segment (the group, or 32 columns
// of it; 256 of CODEC_BASE3), lines come in steps of 32 columns, and a code of an odd number of bits is cut in two:
//
//     CODEC_ONE_BIT    one line      bit i of a byte: column 4 i + j
//     CODEC_TWO_BIT    2 lines       as above
//     CODEC_THREE_BIT  2 + 1 lines   the two low bits, then the third
//     CODEC_FOUR_BIT   4 lines       as above; CODEC_LEVELS alike, its codes looked up in a table
//     CODEC_FIVE_BIT   4 + 1 lines   CODEC_SIX_BIT: 4 + 2 lines   CODEC_EIGHT_BIT: 8 lines
//     CODEC_BASE3      13 lines a step of 256 columns
//
// Floats lie column by column, 16 rows side by side: [N / 16, K, 16].
//
// CODEC_BASE3 holds five weights in a byte (1.6 bits each). Its byte is a fraction of 256 whose digits in base 3 are
// the codes: with v_0 = byte and v_(i+1) = 3 v_i mod 256, c_i = (3 v_i - v_(i+1)) / 256. A product therefore needs no
// digit at all: sum c_i x_i = (3 sum v_i x_i - sum v_(i+1) x_i) / 256, two additions and two dot products a digit.
// The byte's rounding up is TQ1_0's idea (llama.cpp); the sum over v_i is ours.
#pragma once

#include <stdint.h>

enum {
    CODEC_BASE3 = 1, CODEC_TWO_BIT = 2, CODEC_THREE_BIT = 3, CODEC_FOUR_BIT = 4, CODEC_FIVE_BIT = 5, CODEC_SIX_BIT = 6,
    CODEC_LEVELS = 7, CODEC_EIGHT_BIT = 8, CODEC_ONE_BIT = 9,
    CODEC_FLOAT8 = 20, CODEC_FLOAT16 = 21, CODEC_BFLOAT16 = 22, CODEC_FLOAT32 = 23
};
enum { OUT_STORE = 0, OUT_ADD = 1, OUT_GLU_SILU = 2, OUT_GLU_RELU2 = 3, OUT_INT32 = 4, OUT_MULTIPLY = 5, OUT_SILU = 6,
       OUT_RELU2 = 7 };
enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_INT8 = 2 };
// How activations meet a matrix: INT8 with a scale a token (with or without groups), with a given scale and zero point,
// with a scale a segment; INT16 with a scale a segment; or as the floats that they are.
enum { X_TOKEN = 0, X_STATIC = 1, X_GROUP = 2, X_FLOAT = 3, X_INT16 = 4 };
// What a group of columns has of its own; rows r of a block side by side. s_r and t_r of w = s_r c + t_r:
//     GROUPS_HALF        half d[16]                                     d             -center d
//     GROUPS_HALF_MIN    half d[16], half m[16]                         d             m
//     GROUPS_HALF_ZERO   half d[16], uint8 z[16]                        d             -z d
//     GROUPS_FLOAT       float d[16]                                    d             -center d
//     GROUPS_SUPER       int8 s[16]; super: half d[16]                  d s           -center d s
//     GROUPS_SUPER_MIN   uint8 s[16], m[16]; super: half d[16], e[16]   d s           -e m
//     GROUPS_NIBBLES     uint8 (s | m << 4)[16]; super: as above        d s           -e m
// A super-block has 256 columns.
enum {
    GROUPS_NONE = 0, GROUPS_HALF = 1, GROUPS_HALF_MIN = 2, GROUPS_HALF_ZERO = 3, GROUPS_FLOAT = 4, GROUPS_SUPER = 5,
    GROUPS_SUPER_MIN = 6, GROUPS_NIBBLES = 7
};

typedef struct {
    const uint8_t *lines; // [N / 16, lines_per_block, 64]
    const float *scale;   // [N], padded with zeros like the rows
    const float *bias;    // [N] like it, or NULL
    const uint8_t *groups;   // [N / 16, K / group, bytes of one], NULL without groups
    const uint8_t *supers;   // [N / 16, K / 256, bytes of one]
    const uint8_t *levels;   // [16]: the unsigned codes that CODEC_LEVELS stands for
    const float *values;     // [16]: what the codes of CODEC_FOUR_BIT stand for where they are no integers
    const int32_t *order;    // [K]: which input each column takes, -1 for none; NULL: column k takes input k
    const float *divisor;    // [inputs]: divides the input, or NULL
    const float *down, *up;  // a LoRA adapter, y += up (down x): [rank, inputs padded to 16] and [N / 16, rank, 16]
    int32_t N, K;            // N padded to 32; K as it is, with groups padded to 32 in every group
    int32_t inputs;          // K of the layer
    int32_t codec, lines_per_block;
    int32_t group, kind, center; // columns of a group, GROUPS_*, what a code of the weight 0 is
    int32_t x;                   // X_*
    float x_scale;               // of X_STATIC
    int32_t x_zero;
    int32_t rank;                // of the adapter; 0: none
} bn_matrix;

// What is multiplied together: one matrix, or as many as there are formats in it. Part i goes to rows at[i] of the
// output, and rows[i] of it exist. A gate and an up of two formats are two parts at row 0.
enum { MAX_PARTS = 3 };
typedef struct {
    bn_matrix part[MAX_PARTS];
    int32_t parts, at[MAX_PARTS], rows[MAX_PARTS];
} bn_projection;

typedef struct {
    bn_projection qkv, o, gate_up, down; // one part of gate_up: blocks of 16 rows of gate and up in turn
    const float *input_norm, *attn_sub_norm, *post_norm, *ffn_sub_norm; // sub-norms may be NULL
    const float *q_norm, *k_norm;                                      // [head_dim] of every head, or NULL
} bn_layer;

typedef struct {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, vocab, layers, relu2;
    float eps;
    const bn_layer *layer;
    const float *norm;
    const float *cos, *sin;    // [positions, head_dim]
    bn_projection head;
    bn_matrix embedding;       // the head's where they are tied
} bn_model;

// Where keys and values lie: in blocks of `block` positions, a multiple of 16, of all layers and key/value heads. Keys of
// a block and head lie as [block / 16, D, 16], values as [block, D]; D is padded to 16. Strides count positions.
typedef struct {
    void *keys, *values;
    float *key_scale, *value_scale; // one a position, for CACHE_INT8
    int32_t dtype, block;
    int64_t block_stride, layer_stride, head_stride;
} bn_cache;

// A text in a step: `tokens` new ones behind the `length` that its cache holds, in the blocks of these numbers.
typedef struct {
    const bn_cache *cache;
    const int32_t *blocks;
    int64_t length, tokens;
} bn_row;

// One row of a draw, sampling.h. Ids are distinct in each list.
typedef struct {
    const float *logits; // [V]
    const int32_t *change_ids; // penalties of the answer's tokens and biases, added up
    const float *changes;
    const uint8_t *allowed; // [V], or NULL: every token
    const int32_t *seen_ids; // of the repetition penalty
    int32_t *top_ids; // [top_count], descending, and their log-probabilities
    float *top_logprobs;
    int64_t change_count, seen_count, top_count, top_k; // top_count -1: no log-probabilities at all
    double top_p, uniform;
    float min_p, temperature, repetition_penalty; // temperature 0: the largest
    float logprob; // out, as all that follows
    int64_t token, finite; // finite 0: some logit is not, and nothing was drawn
} bn_draw;

// Every instruction set exports one of these.
typedef struct {
    const char *name;
    int32_t codec; // the ternary layout it is fastest with
    void (*quantize)(const float *x, int64_t rows, int64_t K, int8_t *q, int64_t stride, float *scale, int32_t *total,
                     int threads);
    int (*matmul)(const bn_matrix *w, const int8_t *q, int64_t stride, const float *scale, const int32_t *total,
                  int64_t rows, const float *bias, void *y, int64_t y_stride, int64_t columns, int out, int threads);
    // One matrix of any kind and floats x[rows, inputs], to y[rows, columns]. 1: no memory.
    int (*linear)(const bn_matrix *w, const float *x, int64_t rows, float *y, int64_t y_stride, int64_t columns, int threads);
    // Bytes of workspace that forward() needs for so many new tokens of so many rows, of which the longest has `longest`
    // afterwards. What lies in it depends on the instruction set.
    int64_t (*workspace)(const bn_model *m, int64_t tokens, int64_t rows, int64_t longest, int threads);
    // Of new tokens: their ids, or where `hidden` is not NULL the residual stream [tokens, hidden] before the first layer.
    int (*forward)(const bn_model *m, const bn_row *rows, int64_t row_count, const int64_t *ids, const float *hidden,
                   const int32_t *wanted, int64_t wanted_count, float *out, int states, void *room, int threads);
    // Multiply-adds on registers only, `rounds` times on every thread: returns how many operations (2 a multiply-add) that
    // was. For the machine's limits in bitnet.bench.
    int64_t (*peak)(int64_t rounds, int threads);
    void (*sample)(bn_draw *rows, int64_t count, int64_t V, uint8_t *room, int threads);
} bn_kernels;
