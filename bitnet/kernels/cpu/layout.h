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
// are zero.
//
// CODEC_BASE3 holds five weights in a byte (1.6 bits each). Its byte is a fraction of 256 whose digits in base 3 are
// the codes: with v_0 = byte and v_(i+1) = 3 v_i mod 256, c_i = (3 v_i - v_(i+1)) / 256. A product therefore needs no
// digit at all: sum c_i x_i = (3 sum v_i x_i - sum v_(i+1) x_i) / 256, two additions and two dot products a digit.
// The byte's rounding up is TQ1_0's idea (llama.cpp); the sum over v_i is ours.
#pragma once

#include <stdint.h>

enum { CODEC_BASE3 = 1, CODEC_TWO_BIT = 2, CODEC_FOUR_BIT = 4, CODEC_EIGHT_BIT = 8 };
enum { OUT_STORE = 0, OUT_ADD = 1, OUT_GLU_SILU = 2, OUT_GLU_RELU2 = 3, OUT_INT32 = 4 };
enum { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_INT8 = 2 };

typedef struct {
    const uint8_t *lines; // [N / 16, lines_per_block, 64]
    const float *scale;   // [N], padded with zeros like the rows
    int32_t N, K;         // N padded to 32, K as it is
    int32_t codec, lines_per_block;
} bn_matrix;

typedef struct {
    bn_matrix qkv, o, gate_up, down; // gate_up: blocks of 16 rows of gate and up in turn
    const float *input_norm, *attn_sub_norm, *post_norm, *ffn_sub_norm; // sub-norms may be NULL
} bn_layer;

typedef struct {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, vocab, layers, relu2;
    float eps;
    const bn_layer *layer;
    const float *norm;
    const float *cos, *sin;    // [positions, head_dim]
    const uint8_t *embedding;  // [vocab, embedding_width], code + 128; NULL if tied: then the head's lines are read
    const float *embedding_scale;
    int64_t embedding_width;
    bn_matrix head;
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
    int (*forward)(const bn_model *m, const bn_row *rows, int64_t row_count, const int64_t *ids, const int32_t *wanted,
                   int64_t wanted_count, float *logits, void *workspace, int threads);
    // Multiply-adds on registers only, `rounds` times on every thread: returns how many operations (2 a multiply-add) that
    // was. For the machine's limits in bitnet.bench.
    int64_t (*peak)(int64_t rounds, int threads);
    void (*sample)(bn_draw *rows, int64_t count, int64_t V, uint8_t *room, int threads);
} bn_kernels;
