// Calls of attention, of tensors as torch has them: whoever got one reads it into
// `Plain`, and everything is checked here. Whatever is not plainly right is false.
//
// For direct.cpp and operators.cpp, which are compiled for any x86-64 processor.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "operand.h"
#include "work.h"

namespace {

// What is given; a tensor that is not has no data.
struct Plain {
    Operand query{}, key{}, value{}, out{};
    bool has_scale = false;
    double scale = 0;
    int64_t precision = 0, num_threads = 1;

    // Everything between the products and the softmax, in the order of Python's `Plain`.
    int64_t causal = 0, window = 0;
    double softcap = 0;
    int64_t softcap_first = 0;
    double dropout_p = 0;
    int64_t dropout_threshold = 0, seed = 0;
    Operand padding{}, keep{}, offsets{}, table{}, buckets{}, slopes{}, dense{};

    // What operators may be given besides.
    Operand prefix{}, document_rows{}, document_columns{}, query_positions{}, key_positions{};
};

// What a backward pass is given besides, and what it writes to.
struct PlainGradients {
    Operand lse{}, grad_out{};
    Operand query{}, key{}, value{}, offsets{}, dense{};
};

// What a call needs besides its operands.
struct Numbers {
    float *data = nullptr;
    ~Numbers() { free(data); }
};

// A window that hides nothing is none of these.
constexpr int64_t LARGEST_WINDOW = INT32_MAX;

// How many of each sequence's keys there are, or are seen by all: (B,).
inline bool take_lengths(const int64_t *&to, const ZetaCall &call, const Operand &lengths) {
    if (!lengths.is_given()) return true;
    if (!lengths.is_int64() || lengths.ndim != 1 || lengths.shape[0] != call.batch ||
        !lengths.is_contiguous())
        return false;
    to = reinterpret_cast<const int64_t *>(lengths.address());
    return true;
}

// (1 or B, length)
inline bool take_label(ZetaLabels &to, const ZetaCall &call, const Operand &given,
                       int64_t length) {
    if (given.ndim != 2 || given.shape[1] != length || !given.is_contiguous() ||
        (given.shape[0] != 1 && given.shape[0] != call.batch))
        return false;
    to = {given.address(), given.shape[0] == 1 ? 0 : length};
    return true;
}

// Of both sides, or of none.
inline bool take_documents(ZetaCall &call, const Operand &rows, const Operand &columns) {
    if (!rows.is_given() && !columns.is_given()) return true;
    return rows.is_given() && columns.is_given() && rows.is_int64() && columns.is_int64() &&
           take_label(call.document_rows, call, rows, call.target) &&
           take_label(call.document_columns, call, columns, call.source);
}

inline bool take_positions(ZetaCall &call, const Operand &rows, const Operand &columns) {
    if (!rows.is_given() && !columns.is_given()) return true;
    return rows.is_given() && columns.is_given() && rows.is_int32() && columns.is_int32() &&
           take_label(call.query_positions, call, rows, call.target) &&
           take_label(call.key_positions, call, columns, call.source);
}

// What is broadcastable to (B, H, T, S).
inline bool take_plane(ZetaPlane &plane, const ZetaCall &call, const Operand &given,
                       int64_t dtype) {
    if (given.ndim != 4) return false;
    const int64_t sizes[] = {call.batch, call.heads, call.target, call.source};
    int64_t strides[4];
    for (int dimension = 0; dimension < 4; ++dimension) {
        const bool is_one = given.shape[dimension] == 1;
        if (!is_one && given.shape[dimension] != sizes[dimension]) return false;
        strides[dimension] = is_one ? 0 : given.strides[dimension];
    }
    plane = {given.address(), dtype, strides[0], strides[1], strides[2], strides[3]};
    return true;
}

// Not 0 where a query sees a key.
inline bool take_keep(ZetaCall &call, const Operand &keep) {
    return !keep.is_given() ||
           ((keep.is_bool() || keep.is_uint8()) && take_plane(call.keep, call, keep, 0));
}

inline bool take_dense(ZetaCall &call, const Operand &dense) {
    return !dense.is_given() ||
           (dense.dtype() >= 0 && take_plane(call.dense, call, dense, dense.dtype()));
}

// float32, of as many dimensions, the first for heads.
inline bool is_by_head(const Operand &tensor, const ZetaCall &call, int ndim) {
    return tensor.dtype() == ZETA_FLOAT32 && tensor.ndim == ndim && tensor.shape[0] == call.heads;
}

// Offsets that are not contiguous, written out; null where there is no memory. `to` keeps them.
inline const float *contiguous(const Operand &offsets, Numbers &to) {
    const int64_t heads = offsets.shape[0], length = offsets.shape[1];
    const auto *from = reinterpret_cast<const float *>(offsets.address());
    to.data = static_cast<float *>(malloc(heads * length * sizeof(float)));
    for (int64_t head = 0; to.data && head < heads; ++head)
        for (int64_t offset = 0; offset < length; ++offset)
            to.data[head * length + offset] =
                from[head * offsets.strides[0] + offset * offsets.strides[1]];
    return to.data;
}

// For each head a number for each offset, of which there are as many on both sides of 0.
inline bool take_offsets(ZetaCall &call, const Operand &offsets, Numbers &written_out) {
    if (!offsets.is_given()) return true;
    if (!is_by_head(offsets, call, 2) || offsets.shape[1] % 2 == 0) return false;
    call.offsets_HR = offsets.is_contiguous()
                          ? reinterpret_cast<const float *>(offsets.address())
                          : contiguous(offsets, written_out);
    call.reach = offsets.shape[1] / 2;
    return call.offsets_HR;
}

// One of a tensor of float32 or bfloat16.
inline float number_at(const Operand &tensor, int64_t place) {
    if (tensor.dtype() == ZETA_FLOAT32)
        return reinterpret_cast<const float *>(tensor.address())[place];
    const uint32_t bits = reinterpret_cast<const uint16_t *>(tensor.address())[place];
    const uint32_t wide = bits << 16;
    float number;
    memcpy(&number, &wide, sizeof number);
    return number;
}

// The same, looked up: a table (buckets, H), and the bucket of each offset. `to` keeps it.
inline bool take_table(ZetaCall &call, const Operand &table, const Operand &buckets, Numbers &to) {
    if (!table.is_given()) return true;
    if (call.offsets_HR || (table.dtype() != ZETA_FLOAT32 && table.dtype() != ZETA_BFLOAT16) ||
        table.ndim != 2 || table.shape[1] != call.heads || !buckets.is_given() ||
        !buckets.is_int64() || buckets.ndim != 1 || buckets.shape[0] % 2 == 0 ||
        !buckets.is_contiguous())
        return false;
    const int64_t length = buckets.shape[0];
    const auto *bucket = reinterpret_cast<const int64_t *>(buckets.address());
    to.data = static_cast<float *>(malloc(call.heads * length * sizeof(float)));
    if (!to.data) return false;
    for (int64_t offset = 0; offset < length; ++offset) {
        if (bucket[offset] < 0 || bucket[offset] >= table.shape[0]) return false;
        const int64_t row = bucket[offset] * table.strides[0];
        for (int64_t head = 0; head < call.heads; ++head)
            to.data[head * length + offset] = number_at(table, row + head * table.strides[1]);
    }
    call.offsets_HR = to.data;
    call.reach = length / 2;
    return true;
}

inline bool take_slopes(ZetaCall &call, const Operand &slopes) {
    if (!slopes.is_given()) return true;
    if (!is_by_head(slopes, call, 1) || !slopes.is_contiguous()) return false;
    call.slopes_H = reinterpret_cast<const float *>(slopes.address());
    return true;
}

inline bool take_scores(ZetaCall &call, const Plain &given, Numbers &numbers) {
    call.causal = given.causal;
    call.window = given.window;
    call.softcap = given.softcap;
    call.softcap_first = given.softcap_first;
    call.dropout_p = given.dropout_p;
    call.dropout_threshold = given.dropout_threshold;
    call.seed = given.seed;
    return call.window >= 0 && call.window <= LARGEST_WINDOW && call.softcap >= 0 &&
           call.dropout_p >= 0 && call.dropout_p < 1 && call.dropout_threshold >= INT32_MIN &&
           call.dropout_threshold <= INT32_MAX && take_lengths(call.padding_B, call, given.padding) &&
           take_lengths(call.prefix_B, call, given.prefix) &&
           take_documents(call, given.document_rows, given.document_columns) &&
           take_positions(call, given.query_positions, given.key_positions) &&
           take_keep(call, given.keep) && take_offsets(call, given.offsets, numbers) &&
           take_table(call, given.table, given.buckets, numbers) &&
           take_slopes(call, given.slopes) && take_dense(call, given.dense);
}

// Makes the call of what is given; false where that is not plainly right. `numbers` keeps a part of it.
inline bool make_call(ZetaCall &call, const Plain &given, Numbers &numbers) {
    const Operand &query = given.query, &key = given.key, &value = given.value, &out = given.out;
    call.dtype = query.dtype();
    if (call.dtype < 0 || key.dtype() != call.dtype || value.dtype() != call.dtype ||
        out.dtype() != call.dtype || !query.are_rows() || !key.are_rows() || !value.are_rows() ||
        !out.are_rows() || !query.has_sizes_of(out) || !key.has_sizes_of(value) ||
        query.shape[0] != key.shape[0] || query.shape[1] % key.shape[1] ||
        query.shape[3] != key.shape[3] || query.shape[3] > ZETA_MOST_FEATURES ||
        !__builtin_isfinite(given.scale))
        return false;
    call.bytes = sizeof call;
    call.precision = given.precision;
    call.num_threads = given.num_threads;
    call.batch = query.shape[0];
    call.heads = query.shape[1];
    call.key_heads = key.shape[1];
    call.target = query.shape[2];
    call.source = key.shape[2];
    call.head_dim = call.value_dim = query.shape[3];
    call.scale = given.has_scale ? given.scale
                                 : 1 / __builtin_sqrt(static_cast<double>(call.head_dim));
    call.query = query.rows();
    call.key = key.rows();
    call.value = value.rows();
    call.out = out.rows();
    return take_scores(call, given, numbers);
}

// Rows of the dtype and sizes of others.
inline bool take_rows(ZetaRows &to, const Operand &given, const Operand &like) {
    if (given.dtype() != like.dtype() || !given.are_rows() || !given.has_sizes_of(like))
        return false;
    to = given.rows();
    return true;
}

// A number for each query: float32 (B, H, T).
inline bool take_lse(ZetaCall &call, const Operand &lse) {
    if (lse.dtype() != ZETA_FLOAT32 || !lse.is_contiguous() ||
        lse.numel() != call.batch * call.heads * call.target)
        return false;
    call.lse_BHT = reinterpret_cast<float *>(lse.address());
    return true;
}

// What the gradient of the offsets is written to.
inline bool take_grad_offsets(ZetaCall &call, const Operand &gradient) {
    if (!gradient.is_given()) return true;
    if (!call.offsets_HR || !is_by_head(gradient, call, 2) ||
        gradient.shape[1] != 2 * call.reach + 1 || !gradient.is_contiguous())
        return false;
    call.grad_offsets_HR = reinterpret_cast<float *>(gradient.address());
    return true;
}

// The same of a dense bias, in its shape.
inline bool take_grad_dense(ZetaCall &call, const Operand &gradient, const Operand &dense) {
    return !gradient.is_given() ||
           (call.dense.data && gradient.dtype() == ZETA_FLOAT32 && gradient.ndim == 4 &&
            gradient.has_sizes_of(dense) && gradient.is_contiguous() &&
            take_plane(call.grad_dense, call, gradient, ZETA_FLOAT32));
}

// Makes the call a backward one; false as above.
inline bool add_gradients(ZetaCall &call, const Plain &given, const PlainGradients &gradients) {
    return take_lse(call, gradients.lse) &&
           take_rows(call.grad_out, gradients.grad_out, given.out) &&
           take_rows(call.grad_query, gradients.query, given.query) &&
           take_rows(call.grad_key, gradients.key, given.key) &&
           take_rows(call.grad_value, gradients.value, given.value) &&
           take_grad_offsets(call, gradients.offsets) &&
           take_grad_dense(call, gradients.dense, given.dense);
}

inline int64_t run_forward(const ZetaCall &call) {
    const ZetaPasses *passes = zeta_passes(count_multiplications(call));
    if (!passes) return ZETA_NO_PROCESSOR;
    const int64_t most =
        passes == &zeta_passes_amx ? ZETA_STEP_ROWS_BESIDE_TILES : ZETA_STEP_ROWS;
    const bool is_step = call.target * call.heads <= most * call.key_heads;
    return (is_step ? passes->decode : passes->forward)(&call);
}

}  // namespace
