// Linear layers of a few rows, of tensors as torch has them: everything is checked here, as in
// plain_call.h.
#pragma once

#include "operand.h"
#include "work.h"

namespace {

// The call of layers of x, without the layers; false where x is not for it.
inline bool begin_projection(ZetaProjection &call, const Operand &x, int64_t most_rows,
                             int64_t num_threads) {
    call.dtype = x.dtype();
    call.num_threads = num_threads;
    if (call.dtype < 0 || !x.ndim || !x.numel() || !x.is_contiguous()) return false;
    call.width = x.shape[x.ndim - 1];
    call.rows = x.numel() / call.width;
    call.x = x.address();
    return call.rows <= most_rows && call.rows <= ZETA_MOST_ROWS;
}

// The next layer of the call, which still has to be told where its output goes; null where it is not for
// it. A bias that is not given has no data.
inline ZetaLayer *add_layer(ZetaProjection &call, const Operand &weight, const Operand &bias) {
    if (weight.ndim != 2 || weight.shape[1] != call.width || !weight.shape[0] ||
        !weight.is_dense_at(1) || weight.dtype() != call.dtype)
        return nullptr;
    if (bias.is_given() && (bias.ndim != 1 || bias.shape[0] != weight.shape[0] ||
                            !bias.is_dense_at(0) || bias.dtype() != call.dtype))
        return nullptr;
    ZetaLayer &layer = call.layers[call.num_layers++];
    layer = {weight.address(), bias.is_given() ? bias.address() : nullptr, nullptr,
             weight.strides[0], weight.shape[0]};
    return &layer;
}

inline int64_t run_projection(const ZetaProjection &call) {
    const ZetaPasses *passes = zeta_passes(count_multiplications(call));
    return passes ? passes->project(&call) : ZETA_NO_PROCESSOR;
}

}  // namespace
