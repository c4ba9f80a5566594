// The border between Python and the kernels: raw pointers, strides in elements, plain numbers.
//
// Every field is 8 bytes wide, so that Python writes the whole of it with one `struct.pack_into`.
// Python has checked every size, stride, dtype and pointer before it calls; nothing is checked here
// but `bytes`, against a library of another version.
//
// B batch, H query heads, G key heads, T target length, S source length, D features of queries and
// keys, E features of values.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ZetaDtype { ZETA_FLOAT32 = 0, ZETA_BFLOAT16 = 1, ZETA_FLOAT16 = 2 };

// Of float32 products where the processor multiplies matrices of bfloat16: three parts a number and
// six products, with float32's own errors; or two parts and three products, errors about 1e-5.
enum ZetaPrecision { ZETA_HIGHEST = 0, ZETA_HIGH = 1 };

enum ZetaIsa {
    ZETA_BEST = 0, ZETA_AVX2 = 1, ZETA_AVX512 = 2, ZETA_AVX512_BF16 = 3, ZETA_AMX = 4
};

// (B, heads, length, features), the features contiguous; data is null where there is none.
typedef struct {
    void *data;
    int64_t batch, head, row;
} ZetaRows;

// (B, H, T, S); a stride is 0 where the tensor is broadcast.
typedef struct {
    void *data;
    int64_t dtype;
    int64_t batch, head, row, column;
} ZetaPlane;

// One number for each query or key of a sequence: (B or 1, length), contiguous; batch is 0 for 1.
typedef struct {
    const void *data;
    int64_t batch;
} ZetaLabels;

// The most features of a head; up to so many queries that share a key head, zeta_decode is faster than
// zeta_forward, beside whose tiles (AMX) it is so for fewer.
enum { ZETA_MOST_FEATURES = 256, ZETA_STEP_ROWS = 48, ZETA_STEP_ROWS_BESIDE_TILES = 16 };

typedef struct {
    int64_t bytes;  // sizeof(ZetaCall)
    int64_t dtype, precision, num_threads;
    int64_t batch, heads, key_heads, target, source, head_dim, value_dim;

    ZetaRows query, key, value;
    double scale;

    // What is hidden. Window: keys position - window + 1 .. position; 0 for none; implies causal.
    int64_t causal, window;
    const int64_t *prefix_B, *padding_B;
    ZetaLabels document_rows, document_columns;      // int64
    ZetaLabels query_positions, key_positions;       // int32; null: the last T of 0 .. S - 1
    ZetaPlane keep;                                  // bytes, 0: hidden

    // What is done to the scores, in this order: softcap if it is first, then
    // + offsets[h][clamp(key - query, -reach, reach) + reach] - slopes[h] * |key - query| + dense,
    // then softcap if it is not first.
    double softcap;  // 0 for none
    int64_t softcap_first;
    const float *offsets_HR;
    int64_t reach;
    const float *slopes_H;
    ZetaPlane dense;

    // Weights are dropped by the hash that zeta/ops/dropout.py defines.
    double dropout_p;
    int64_t dropout_threshold, seed;

    // Made by forward, read by backward. lse is natural, -inf for a row with every key hidden; it is
    // null where nobody wants it.
    ZetaRows out;
    float *lse_BHT;

    // Arrive at backward; null where there is none.
    ZetaRows grad_out;
    const float *grad_lse_BHT;

    // Made by backward. Offsets' and dense ones are float32; null where none is asked for.
    ZetaRows grad_query, grad_key, grad_value;
    float *grad_offsets_HR;
    ZetaPlane grad_dense;  // in the shape of dense

    // Made by weights, (B, H, T, S) or (B, T, S) in the query's dtype, contiguous, with out where
    // that has a place and nothing is dropped; and their gradient, which arrives at backward in
    // place of grad_out.
    int64_t mean_weights;
    void *weights;
    const void *grad_weights;

    // A cache in pages: key and value are (pages, G, page_size, D); page_table (B, most pages)
    // tells where a sequence's pages lie. Or in int8 with a factor for each head and position.
    const int32_t *page_table;
    int64_t page_size, pages_per_row;
    const float *key_factor_BGS, *value_factor_BGS;
    int64_t factor_batch, factor_head;
} ZetaCall;

// What the processor has, what was built, and both, which can run: bit n for ZetaIsa n.
int64_t zeta_processor(void);
int64_t zeta_built(void);
int64_t zeta_instruction_sets(void);
int64_t zeta_abi_bytes(void);  // sizeof(ZetaCall)

// From now on all passes run on this ZetaIsa, or, with ZETA_BEST, on the best for each; 0 where it cannot run.
int64_t zeta_use(int64_t isa);

// The ZetaIsa that a pass of so many multiplications runs on; 0 for none.
int64_t zeta_used_for(double multiplications);

// 0, or why not: see messages.h. Each may be called by several threads at a time.
int64_t zeta_forward(const ZetaCall *call);
int64_t zeta_backward(const ZetaCall *call);
int64_t zeta_weights(const ZetaCall *call);
// Short queries: keys and values are read once a key head.
int64_t zeta_decode(const ZetaCall *call);

#ifdef __cplusplus
}
#endif
