// A tensor of torch's in memory of this machine, however it was read.
#pragma once

#include "dlpack.h"
#include "table.h"

namespace {

struct Operand : DLTensor {
    bool is_given() const { return data; }

    bool is_int64() const { return code == kDLInt && bits == 64; }
    bool is_int32() const { return code == kDLInt && bits == 32; }
    bool is_bool() const { return code == kDLBool && bits == 8; }
    bool is_uint8() const { return code == kDLUInt && bits == 8; }

    // One that there are kernels for, or -1.
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

    // Whether another, of as many dimensions, has the same sizes.
    bool has_sizes_of(const Operand &other) const {
        for (int dimension = 0; dimension < ndim; ++dimension)
            if (shape[dimension] != other.shape[dimension]) return false;
        return true;
    }
};

}  // namespace
