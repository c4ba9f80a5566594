// Rotations of tensors as torch has them: everything is checked here, as in plain_call.h.
#pragma once

#include "operand.h"
#include "work.h"

namespace {

// (L, P), or (1 or B, 1, L, P), L possibly 1 for all positions.
inline bool take_angles(ZetaAngles &to, const Operand &x, const Operand &given, int64_t pairs) {
    const int last = given.ndim - 1;
    if (given.dtype() != ZETA_FLOAT32 || (given.ndim != 2 && given.ndim != 4) ||
        given.shape[last] != pairs || !given.is_dense_at(last))
        return false;
    const int64_t length = given.shape[last - 1];
    if (length != 1 && length != x.shape[2]) return false;
    to = {reinterpret_cast<const float *>(given.address()), 0,
          length == 1 ? 0 : given.strides[last - 1]};
    if (given.ndim == 2) return true;
    if (given.shape[1] != 1 || (given.shape[0] != 1 && given.shape[0] != x.shape[0])) return false;
    to.batch = given.shape[0] == 1 ? 0 : given.strides[0];
    return true;
}

// The next tensor of the call, and where it goes; false where it is not for it.
inline bool add_turned(ZetaRotation &call, const Operand &x, const Operand &out,
                       const Operand &cos, const Operand &sin) {
    if (!x.are_rows() || !out.are_rows() || !out.has_sizes_of(x) || !cos.ndim) return false;
    if (!call.num_turned) {
        call.dtype = x.dtype();
        call.head_dim = x.shape[3];
        call.pairs = cos.shape[cos.ndim - 1];
    }
    if (call.dtype < 0 || x.dtype() != call.dtype || out.dtype() != call.dtype ||
        x.shape[3] != call.head_dim || call.head_dim > ZETA_MOST_FEATURES || call.pairs < 1 ||
        2 * call.pairs > call.head_dim)
        return false;
    ZetaTurned &turned = call.turned[call.num_turned++];
    turned = {x.rows(), out.rows(), x.shape[0], x.shape[1], x.shape[2], {}, {}};
    return take_angles(turned.cos, x, cos, call.pairs) &&
           take_angles(turned.sin, x, sin, call.pairs);
}

inline int64_t run_rotation(const ZetaRotation &call) {
    const ZetaPasses *passes = zeta_passes(count_multiplications(call));
    return passes ? passes->rotate(&call) : ZETA_NO_PROCESSOR;
}

}  // namespace
