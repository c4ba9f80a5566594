// Masks, biases and dropout of a call that takes torch's tensors as they are: read, and everything
// checked. For direct.cpp alone, which answers ZETA_NOT_PLAIN where a reader says false.
#pragma once

#include <string.h>

#include "tensors.h"

namespace {

// Of tensors of as many dimensions.
bool have_same_sizes(const Operand &one, const Operand &other) {
    for (int dimension = 0; dimension < one.ndim; ++dimension)
        if (one.shape[dimension] != other.shape[dimension]) return false;
    return true;
}

// Whether every number that Python gave was one.
bool were_numbers() {
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}

bool is_none(PyObject *object) { return object == &_Py_NoneStruct; }

// How many of each sequence's keys there are: (B,), or None.
bool read_padding(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand lengths;
    if (!lengths.read_any(object) || !lengths.is_int64() || lengths.ndim != 1 ||
        lengths.shape[0] != call.batch || !lengths.is_contiguous())
        return false;
    call.padding_B = reinterpret_cast<const int64_t *>(lengths.address());
    return true;
}

// What was read, if it is broadcastable to (B, H, T, S).
bool read_plane(ZetaPlane &plane, const ZetaCall &call, const Operand &read, int64_t dtype) {
    if (read.ndim != 4) return false;
    const int64_t sizes[] = {call.batch, call.heads, call.target, call.source};
    int64_t strides[4];
    for (int dimension = 0; dimension < 4; ++dimension) {
        const bool is_one = read.shape[dimension] == 1;
        if (!is_one && read.shape[dimension] != sizes[dimension]) return false;
        strides[dimension] = is_one ? 0 : read.strides[dimension];
    }
    plane = {read.address(), dtype, strides[0], strides[1], strides[2], strides[3]};
    return true;
}

// True where a query sees a key, or None.
bool read_keep(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand keep;
    return keep.read_any(object) && keep.is_bool() && read_plane(call.keep, call, keep, 0);
}

bool read_dense(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand dense;
    return dense.read(object) && read_plane(call.dense, call, dense, dense.dtype());
}

// Of a tensor that was read: float32, contiguous, of as many dimensions, the first for heads.
bool is_by_head(const Operand &tensor, const ZetaCall &call, int ndim) {
    return tensor.dtype() == ZETA_FLOAT32 && tensor.ndim == ndim &&
           tensor.shape[0] == call.heads && tensor.is_contiguous();
}

// For each head a number for each offset, of which there are as many on both sides of 0, or None.
bool read_offsets(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand offsets;
    if (!offsets.read(object) || !is_by_head(offsets, call, 2) || offsets.shape[1] % 2 == 0)
        return false;
    call.offsets_HR = reinterpret_cast<const float *>(offsets.address());
    call.reach = offsets.shape[1] / 2;
    return true;
}

// What a call needs besides its operands.
struct Numbers {
    float *data = nullptr;
    ~Numbers() { free(data); }
};

// One of a tensor of float32 or bfloat16.
float number_at(const Operand &tensor, int64_t place) {
    if (tensor.dtype() == ZETA_FLOAT32)
        return reinterpret_cast<const float *>(tensor.address())[place];
    const uint32_t bits = reinterpret_cast<const uint16_t *>(tensor.address())[place];
    const uint32_t wide = bits << 16;
    float number;
    memcpy(&number, &wide, sizeof number);
    return number;
}

// The same, looked up: a table (buckets, H), and the bucket of each offset. `to` keeps it.
bool read_table(ZetaCall &call, PyObject *table_object, PyObject *buckets_object, Numbers &to) {
    if (is_none(table_object)) return true;
    Operand table, buckets;
    if (call.offsets_HR || !table.read(table_object) || table.dtype() == ZETA_FLOAT16 ||
        table.ndim != 2 || table.shape[1] != call.heads || !buckets.read_any(buckets_object) ||
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

bool read_slopes(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand slopes;
    if (!slopes.read(object) || !is_by_head(slopes, call, 1)) return false;
    call.slopes_H = reinterpret_cast<const float *>(slopes.address());
    return true;
}

// A window that hides nothing is none of these.
constexpr int64_t LARGEST_WINDOW = INT32_MAX;

constexpr int NUM_SCORE_OPTIONS = 14;

// Everything between the products and the softmax, in the order of Python's `Plain`.
bool read_scores(ZetaCall &call, PyObject *const *options, Numbers &looked_up) {
    if (!is_a(options[2], &PyFloat_Type) || !is_a(options[4], &PyFloat_Type)) return false;
    call.causal = PyLong_AsLong(options[0]);
    call.window = PyLong_AsLong(options[1]);
    call.softcap = PyFloat_AsDouble(options[2]);
    call.softcap_first = PyLong_AsLong(options[3]);
    call.dropout_p = PyFloat_AsDouble(options[4]);
    call.dropout_threshold = PyLong_AsLong(options[5]);
    call.seed = PyLong_AsLong(options[6]);
    return were_numbers() && call.window >= 0 && call.window <= LARGEST_WINDOW &&
           call.softcap >= 0 && call.dropout_p >= 0 && call.dropout_p < 1 &&
           call.dropout_threshold >= INT32_MIN && call.dropout_threshold <= INT32_MAX &&
           read_padding(call, options[7]) && read_keep(call, options[8]) &&
           read_offsets(call, options[9]) &&
           read_table(call, options[10], options[11], looked_up) &&
           read_slopes(call, options[12]) && read_dense(call, options[13]);
}

// What the gradient of the offsets is written to, or None.
bool read_grad_offsets(ZetaCall &call, PyObject *object) {
    if (is_none(object)) return true;
    Operand gradient;
    if (!call.offsets_HR || !gradient.read(object) || !is_by_head(gradient, call, 2) ||
        gradient.shape[1] != 2 * call.reach + 1)
        return false;
    call.grad_offsets_HR = reinterpret_cast<float *>(gradient.address());
    return true;
}

// The same of a dense bias, in its shape.
bool read_grad_dense(ZetaCall &call, PyObject *object, PyObject *bias) {
    if (is_none(object)) return true;
    Operand gradient, dense;
    return call.dense.data && dense.read(bias) && gradient.read(object) &&
           gradient.dtype() == ZETA_FLOAT32 && gradient.ndim == 4 &&
           have_same_sizes(gradient, dense) && gradient.is_contiguous() &&
           read_plane(call.grad_dense, call, gradient, ZETA_FLOAT32);
}

}  // namespace
