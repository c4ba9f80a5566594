// The passes of a unit that multiplies pairs of bfloat16 by dot products: the other dtypes are
// float32 here.

using BFloat16Operands = PairOperands<1, 0>;

inline int64_t forward(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 ? forward_with<BFloat16Operands>(*call)
                                        : forward_with<FmaOperands>(*call);
}

inline int64_t backward(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 ? backward_with<BFloat16Operands>(*call)
                                        : backward_with<FmaOperands>(*call);
}

inline int64_t weights(const ZetaCall *call) {
    return call->dtype == ZETA_BFLOAT16 ? weights_with<BFloat16Operands>(*call)
                                        : weights_with<FmaOperands>(*call);
}
