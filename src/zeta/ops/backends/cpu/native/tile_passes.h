// The passes of a unit with tiles: bfloat16 as it is, float16 in two parts, which hold all of its
// bits, float32 in three, or in two where the caller is content with that. What cannot be taken apart
// is float32 in the unit without; few rows are for the unit with dot products.

// Whether numbers can be taken apart: the parts of infinity, and products near the largest float32,
// would make NaN where the whole does not.
inline bool is_moderate(const HeadRows &rows, int64_t count, int64_t width) {
    const Floats limit = splat(0x1p60f);
    for (int64_t row = 0; row < count; ++row)
        for (int64_t column = 0; column < width; column += LANES) {
            const Floats x = abs(load_dtype(rows.at(row), rows.dtype, column, width - column));
            if (any(not_less(x, limit))) return false;
        }
    return true;
}

inline bool are_moderate(const ZetaCall &call, const ZetaRows &rows, int64_t heads, int64_t length,
                         int64_t width) {
    if (!rows.data) return true;
    int64_t found = true;
    run(call.batch * heads, call.num_threads, [&](int64_t task) {
        if (!is_moderate(head_rows(rows, call.dtype, task / heads, task % heads), length, width))
            __atomic_store_n(&found, false, __ATOMIC_RELAXED);
    });
    return found;
}

inline bool can_split(const ZetaCall &call) {
    const int64_t source = call.source, target = call.target;
    return are_moderate(call, call.query, call.heads, target, call.head_dim) &&
           are_moderate(call, call.key, call.key_heads, source, call.head_dim) &&
           are_moderate(call, call.value, call.key_heads, source, call.value_dim) &&
           are_moderate(call, call.grad_out, call.heads, target, call.value_dim);
}

using BFloat16Operands = PairOperands<1, 0>;
using Float16Operands = PairOperands<2, 2>;
using HighOperands = PairOperands<2, 1>;
using HighestOperands = PairOperands<3, 2>;

inline int64_t forward(const ZetaCall *given) {
    const ZetaCall &call = *given;
    if (call.dtype == ZETA_BFLOAT16) return forward_with<BFloat16Operands>(call);
    if (!can_split(call)) return without_pairs().forward(given);
    if (call.dtype == ZETA_FLOAT16) return forward_with<Float16Operands>(call);
    return call.precision == ZETA_HIGH ? forward_with<HighOperands>(call)
                                       : forward_with<HighestOperands>(call);
}

inline int64_t backward(const ZetaCall *given) {
    const ZetaCall &call = *given;
    if (are_too_few(call)) return without_pairs().backward(given);
    if (call.dtype == ZETA_BFLOAT16) return backward_with<BFloat16Operands>(call);
    if (!can_split(call)) return without_pairs().backward(given);
    if (call.dtype == ZETA_FLOAT16) return backward_with<Float16Operands>(call);
    return call.precision == ZETA_HIGH ? backward_with<HighOperands>(call)
                                       : backward_with<HighestOperands>(call);
}

inline int64_t weights(const ZetaCall *given) {
    const ZetaCall &call = *given;
    if (call.dtype == ZETA_BFLOAT16) return weights_with<BFloat16, BFloat16Operands>(call);
    if (!can_split(call)) return without_pairs().weights(given);
    if (call.dtype == ZETA_FLOAT16) return weights_with<Float16, Float16Operands>(call);
    return call.precision == ZETA_HIGH ? weights_with<float, HighOperands>(call)
                                       : weights_with<float, HighestOperands>(call);
}

inline int64_t decode(const ZetaCall *call) { return zeta_passes_avx512_bf16.decode(call); }

inline int64_t project(const ZetaProjection *call) {
    return zeta_passes_avx512_bf16.project(call);
}
