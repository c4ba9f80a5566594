// Torch's tensors, read and made through DLPack's table. For direct.cpp alone: it has state.
#pragma once

#include <stdlib.h>

#include "python.h"
#include "table.h"

namespace {

const DLPackExchangeAPI *exchange = nullptr;
PyObject *tensor_types[2];  // torch's tensor and parameter

// Whether the object is of exactly this type.
bool is_a(PyObject *object, const void *type) {
    PyObject *found = PyObject_Type(object);
    Py_DecRef(found);  // The object keeps it.
    return found == type;
}

// A tensor of torch's own class, in memory of this machine.
struct Operand : DLTensor {
    bool read_any(PyObject *object) {
        if (!is_a(object, tensor_types[0]) && !is_a(object, tensor_types[1])) return false;
        if (exchange->tensor_from_object(object, this)) {
            PyErr_Clear();
            return false;
        }
        // Null: nothing of it is in memory, or nowhere that C could find it.
        return data && device_type == kDLCPU && lanes == 1;
    }

    // Of a type that there are kernels for.
    bool read(PyObject *object) { return read_any(object) && dtype() >= 0; }

    bool is_int64() const { return code == kDLInt && bits == 64; }
    bool is_bool() const { return code == kDLBool && bits == 8; }

    int64_t dtype() const {
        if (code == kDLFloat && bits == 32) return ZETA_FLOAT32;
        if (code == kDLFloat && bits == 16) return ZETA_FLOAT16;
        if (code == kDLBfloat && bits == 16) return ZETA_BFLOAT16;
        return -1;
    }

    char *address() const { return static_cast<char *>(data) + byte_offset; }

    bool is_dense_at(int dimension) const {
        return strides[dimension] == 1 || shape[dimension] == 1;
    }

    bool is_contiguous() const {
        int64_t stride = 1;
        for (int dimension = ndim - 1; dimension >= 0; --dimension) {
            if (shape[dimension] != 1 && strides[dimension] != stride) return false;
            stride *= shape[dimension];
        }
        return true;
    }

    int64_t numel() const {
        int64_t product = 1;
        for (int dimension = 0; dimension < ndim; ++dimension) product *= shape[dimension];
        return product;
    }

    // (B, heads, length, features)
    bool are_rows() const { return ndim == 4 && numel() > 0 && is_dense_at(3); }

    ZetaRows rows() const { return {address(), strides[0], strides[1], strides[2]}; }
};

// A contiguous tensor that torch will own, its numbers after it in one block. For what is small and
// inside: these blocks are none of torch's allocator.
struct Owned {
    static constexpr int64_t BEFORE = 192;  // the numbers begin at a cache line

    DLManagedTensorVersioned managed;
    int64_t shape[4], strides[4];

    // Of 32 bits if it is float32, else of 16; null where there is no memory.
    static Owned *make(int64_t dtype, int ndim, const int64_t *shape) {
        int64_t bytes = dtype == ZETA_FLOAT32 ? 4 : 2;
        const auto bits = static_cast<uint8_t>(8 * bytes);
        for (int dimension = 0; dimension < ndim; ++dimension) bytes *= shape[dimension];
        void *block = aligned_alloc(64, (BEFORE + bytes + 63) / 64 * 64);
        if (!block) return nullptr;
        auto *owned = static_cast<Owned *>(block);
        int64_t stride = 1;
        for (int dimension = ndim - 1; dimension >= 0; --dimension) {
            owned->shape[dimension] = shape[dimension];
            owned->strides[dimension] = stride;
            stride *= shape[dimension];
        }
        const auto code = static_cast<uint8_t>(dtype == ZETA_BFLOAT16 ? kDLBfloat : kDLFloat);
        owned->managed = {1, 0, nullptr, [](DLManagedTensorVersioned *tensor) { free(tensor); }, 0,
                          {static_cast<char *>(block) + BEFORE, kDLCPU, 0, ndim, code, bits, 1,
                           owned->shape, owned->strides, 0}};
        return owned;
    }

    void swap_dimensions(int one, int other) {
        const int64_t size = shape[one], stride = strides[one];
        shape[one] = shape[other];
        strides[one] = strides[other];
        shape[other] = size;
        strides[other] = stride;
    }

    void *data() const { return managed.tensor.data; }

    // Torch's tensor of it, which takes it whatever happens; null, with Python's error set, where torch
    // fails.
    PyObject *give() {
        PyObject *object = nullptr;
        return exchange->object_from_managed(&managed, &object) ? nullptr : object;
    }
};
static_assert(sizeof(Owned) <= Owned::BEFORE && offsetof(Owned, managed) == 0);

// Owned tensors that torch has not been given yet; they are freed.
struct Made {
    Owned *tensors[ZETA_MOST_LAYERS] = {};
    int64_t count = 0;

    ~Made() {
        for (Owned *tensor : tensors) free(tensor);
    }

    Owned *add(int64_t dtype, int ndim, const int64_t *shape) {
        return tensors[count++] = Owned::make(dtype, ndim, shape);
    }

    PyObject *give(int64_t number) {
        Owned *tensor = tensors[number];
        tensors[number] = nullptr;
        return tensor->give();
    }

    // A tuple of all.
    PyObject *give_all() {
        PyObject *tuple = PyTuple_New(count);
        for (int64_t i = 0; tuple && i < count; ++i) {
            PyObject *tensor = give(i);
            if (!tensor) {
                Py_DecRef(tuple);
                return nullptr;
            }
            PyTuple_SetItem(tuple, i, tensor);
        }
        return tuple;
    }
};

}  // namespace
