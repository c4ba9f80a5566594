// Torch's tensors and operators' results, read and made through its stable C interface. For
// operators.cpp alone: it has state.
#pragma once

#include <stdlib.h>

#include "operand.h"
#include "torch.h"

namespace {

TorchFunctions torch;

TorchTensor tensor_of(TorchValue value) { return reinterpret_cast<TorchTensor>(value); }
TorchValue value_of(TorchTensor tensor) { return reinterpret_cast<TorchValue>(tensor); }

// An optional tensor, which may be null.
TorchTensor tensor_in(TorchValue optional) {
    return optional ? tensor_of(*reinterpret_cast<TorchValue *>(optional)) : nullptr;
}

void release_optional(TorchValue optional) {
    if (!optional) return;
    auto *place = reinterpret_cast<TorchValue *>(optional);
    torch.delete_tensor(tensor_of(*place));
    torch.delete_value ? static_cast<void>(torch.delete_value(place)) : free(place);
}

bool set_type(Operand &to, int32_t dtype) {
    to.lanes = 1;
    if (dtype == torch.dtype_float32()) {
        to.code = kDLFloat, to.bits = 32;
    } else if (dtype == torch.dtype_bfloat16()) {
        to.code = kDLBfloat, to.bits = 16;
    } else if (dtype == torch.dtype_float16()) {
        to.code = kDLFloat, to.bits = 16;
    } else if (dtype == torch.dtype_int64()) {
        to.code = kDLInt, to.bits = 64;
    } else if (dtype == torch.dtype_int32()) {
        to.code = kDLInt, to.bits = 32;
    } else if (dtype == torch.dtype_uint8()) {
        to.code = kDLUInt, to.bits = 8;
    } else {
        return false;
    }
    return true;
}

// A tensor, or null, which leaves `to` without data.
bool read(TorchTensor tensor, Operand &to) {
    if (!tensor) return true;
    int32_t device_type, dtype;
    int64_t ndim;
    if (torch.get_device_type(tensor, &device_type) || device_type != torch.device_type_cpu() ||
        torch.get_dtype(tensor, &dtype) || !set_type(to, dtype) || torch.get_dim(tensor, &ndim) ||
        torch.get_sizes(tensor, &to.shape) || torch.get_strides(tensor, &to.strides) ||
        torch.get_data_ptr(tensor, &to.data))
        return false;
    to.ndim = static_cast<int32_t>(ndim);
    return to.data;
}

// Results that torch does not own yet; they are let go of unless they are given.
struct Results {
    static constexpr int MOST = 5, MOST_DIMENSIONS = 4;
    TorchTensor tensors[MOST] = {};
    int count = 0;

    ~Results() {
        for (TorchTensor tensor : tensors)
            if (tensor) torch.delete_tensor(tensor);
    }

    bool add(Operand &to, int64_t ndim, const int64_t *sizes, const int64_t *strides,
             int32_t dtype) {
        TorchTensor &tensor = tensors[count++];
        return !torch.empty_strided(ndim, sizes, strides, dtype, torch.device_type_cpu(), 0,
                                    &tensor) &&
               read(tensor, to);
    }

    // As `buffers.empty_rows`, of the width of what it is like.
    bool add_rows(Operand &to, const Operand &like, int32_t dtype) {
        if (!like.are_rows()) return false;
        if (like.is_contiguous()) return add(to, 4, like.shape, like.strides, dtype);
        const int64_t heads = like.shape[1], length = like.shape[2], features = like.shape[3];
        const bool has_heads_inside = like.strides[1] < like.strides[2];
        const int64_t strides[] = {heads * length * features,
                                   has_heads_inside ? features : length * features,
                                   has_heads_inside ? heads * features : features, 1};
        return add(to, 4, like.shape, strides, dtype);
    }

    bool add_contiguous(Operand &to, int ndim, const int64_t *sizes, int32_t dtype) {
        int64_t strides[MOST_DIMENSIONS], stride = 1;
        if (ndim > MOST_DIMENSIONS) return false;
        for (int dimension = ndim - 1; dimension >= 0; --dimension) {
            strides[dimension] = stride;
            stride *= sizes[dimension];
        }
        return add(to, ndim, sizes, strides, dtype);
    }

    // In place of one that is not asked for.
    bool add_empty() {
        const int64_t size = 0, stride = 1;
        return !torch.empty_strided(1, &size, &stride, torch.dtype_float32(),
                                    torch.device_type_cpu(), 0, &tensors[count++]);
    }

    void give(TorchValue *stack) {
        for (int place = 0; place < count; ++place) {
            stack[place] = value_of(tensors[place]);
            tensors[place] = nullptr;
        }
    }
};

int32_t dtype_of(TorchTensor tensor) {
    int32_t dtype = -1;
    torch.get_dtype(tensor, &dtype);
    return dtype;
}

}  // namespace
