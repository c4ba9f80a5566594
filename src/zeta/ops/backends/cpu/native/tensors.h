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

// A tensor of torch's own class, in memory of this machine, of a type that there are kernels for.
struct Operand : DLTensor {
    bool read(PyObject *object) {
        if (!is_a(object, tensor_types[0]) && !is_a(object, tensor_types[1])) return false;
        if (exchange->tensor_from_object(object, this)) {
            PyErr_Clear();
            return false;
        }
        return device_type == kDLCPU && lanes == 1 && dtype() >= 0;
    }

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

// A tensor that torch will own, its numbers after it in one block. Only a few rows are made so: these
// blocks are none of torch's allocator.
struct Owned {
    static constexpr int64_t BEFORE = 192;  // the numbers begin at a cache line

    DLManagedTensorVersioned managed;
    int64_t shape[4], strides[4];

    // (B, heads, length, features), each token's heads side by side; null where there is no memory.
    static Owned *heads_of_tokens(const Operand &like, int64_t batch, int64_t heads,
                                  int64_t length, int64_t features) {
        const int64_t bytes = batch * heads * length * features * (like.bits / 8);
        void *block = aligned_alloc(64, (BEFORE + bytes + 63) / 64 * 64);
        if (!block) return nullptr;
        auto *owned = static_cast<Owned *>(block);
        const int64_t token = heads * features;
        *owned = {{1, 0, nullptr, [](DLManagedTensorVersioned *tensor) { free(tensor); }, 0, like},
                  {batch, heads, length, features},
                  {length * token, features, token, 1}};
        DLTensor &tensor = owned->managed.tensor;
        tensor.data = static_cast<char *>(block) + BEFORE;
        tensor.byte_offset = 0;
        tensor.ndim = 4;
        tensor.shape = owned->shape;
        tensor.strides = owned->strides;
        return owned;
    }

    void *data() const { return managed.tensor.data; }

    // Torch's tensor of it, which takes it; null, with Python's error set, where torch refuses.
    PyObject *give() {
        PyObject *object = nullptr;
        if (!exchange->object_from_managed(&managed, &object)) return object;
        free(this);
        return nullptr;
    }
};
static_assert(sizeof(Owned) <= Owned::BEFORE && offsetof(Owned, managed) == 0);

}  // namespace
