// The passes of a unit with tiles: bfloat16 as it is, float16 in two parts, which hold all of its
// bits, float32 in three, or in two where the caller is content with that. What cannot be taken apart
// is float32 in the unit without; few rows are for the unit with dot products.

// Whether numbers can be taken apart: the parts of infinity, and products near the largest float32,
// would make NaN where the whole does not.
inline bool is_moderate(const void *row, int64_t dtype, int64_t width) {
    const Floats limit = splat(0x1p60f);
    for (int64_t column = 0; column < width; column += LANES)
        if (any(not_less(abs(load_dtype(row, dtype, column, width - column)), limit))) return false;
    return true;
}

// All of the rows that are there, by `existing_of(batch)`.
template <class ExistingOf>
inline bool are_moderate(const ZetaCall &call, const ZetaRows &rows, int64_t heads, int64_t length,
                         int64_t width, const ExistingOf &existing_of) {
    if (!rows.data) return true;
    int64_t found = true;
    run(call.batch * heads, call.num_threads, [&](int64_t task) {
        const int64_t batch = task / heads;
        const HeadRows of_head = head_rows(rows, call.dtype, batch, task % heads);
        const Existing existing = existing_of(batch);
        for (int64_t row = 0; row < length; ++row)
            if (existing.has(row) && !is_moderate(of_head.at(row), of_head.dtype, width))
                return __atomic_store_n(&found, false, __ATOMIC_RELAXED);
    });
    return found;
}

inline bool can_split(const ZetaCall &call) {
    const int64_t source = call.source, target = call.target;
    Unseen unseen(call);
    const auto queries = [&](int64_t) { return Existing{0, target, nullptr, 0, nullptr, 0}; };
    const auto keys = [&](int64_t batch) { return Sight(call, unseen, batch).existing; };
    return are_moderate(call, call.query, call.heads, target, call.head_dim, queries) &&
           are_moderate(call, call.key, call.key_heads, source, call.head_dim, keys) &&
           are_moderate(call, call.value, call.key_heads, source, call.value_dim, keys) &&
           are_moderate(call, call.grad_out, call.heads, target, call.value_dim, queries);
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

inline int64_t rotate(const ZetaRotation *call) { return without_pairs().rotate(call); }
