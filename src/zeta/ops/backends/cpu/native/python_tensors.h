// Python's tensors of torch, read and made through DLPack's table. For direct.cpp alone: it has state.
#pragma once

#include <stdlib.h>

#include "operand.h"
#include "python.h"

namespace {

const DLPackExchangeAPI *exchange = nullptr;
PyObject *tensor_types[2];  // torch's tensor and parameter

// Whether the object is of exactly this type.
bool is_a(PyObject *object, const void *type) {
    PyObject *found = PyObject_Type(object);
    Py_DecRef(found);  // The object keeps it.
    return found == type;
}

// Reads a tensor of torch's own class.
bool read(PyObject *object, Operand &to) {
    if (!is_a(object, tensor_types[0]) && !is_a(object, tensor_types[1])) return false;
    if (exchange->tensor_from_object(object, &to)) {
        PyErr_Clear();
        return false;
    }
    // Null: nothing of it is in memory, or nowhere that C could find it.
    return to.data && to.device_type == kDLCPU && to.lanes == 1;
}

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
