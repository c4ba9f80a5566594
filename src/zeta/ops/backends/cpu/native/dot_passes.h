// The passes of a unit that multiplies pairs of bfloat16 by dot products. Everything else is float32 in
// the unit without.

using BFloat16Operands = PairOperands<1, 0>;

inline int64_t forward(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 ? forward_with<BFloat16Operands>(*call)
                                        : without_pairs().forward(call);
}

inline int64_t backward(const ZetaCall *call) {
    const bool is_paired = call->dtype == ZETA_BFLOAT16 && !are_too_few(*call);
    return is_paired ? backward_with<BFloat16Operands>(*call) : without_pairs().backward(call);
}

inline int64_t weights(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 ? weights_with<BFloat16, BFloat16Operands>(*call)
                                        : without_pairs().weights(call);
}

// Codes of 8 bits are no bfloat16.
inline int64_t decode(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 && !call->key_factor_BGS
               ? decode_with<BFloat16, BFloat16>(*call)
               : without_pairs().decode(call);
}

inline int64_t project(const ZetaProjection *call) {
    return call->dtype == ZETA_BFLOAT16 ? project_with<BFloat16>(*call)
                                        : without_pairs().project(call);
}

inline int64_t rotate(const ZetaRotation *call) { return without_pairs().rotate(call); }
