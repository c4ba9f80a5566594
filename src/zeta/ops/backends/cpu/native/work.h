// How much work a call is, by which its instruction set is chosen.
#pragma once

#include "table.h"

namespace {

// For scores and outputs. Values count as keys do, given or not: weights are rounded as outputs are.
inline double count_multiplications(const ZetaCall &call) {
    return 2.0 * call.batch * call.heads * call.target * call.source * call.head_dim;
}

inline double count_multiplications(const ZetaProjection &call) {
    double features = 0;
    for (int64_t layer = 0; layer < call.num_layers; ++layer)
        features += call.layers[layer].features;
    return features * call.rows * call.width;
}

inline double count_multiplications(const ZetaRotation &call) {
    double tokens = 0;
    for (int64_t i = 0; i < call.num_turned; ++i)
        tokens += call.turned[i].batch * call.turned[i].heads * call.turned[i].length;
    return 4.0 * tokens * call.pairs;
}

}  // namespace
