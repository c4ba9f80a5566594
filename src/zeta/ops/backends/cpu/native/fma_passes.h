// The passes of a unit without products of pairs: all dtypes are float32 where they are multiplied.

inline int64_t forward(const ZetaCall *call) { return forward_with<FmaOperands>(*call); }

inline int64_t backward(const ZetaCall *call) {
    return are_few(*call) ? backward_with<FewOperands>(*call) : backward_with<FmaOperands>(*call);
}

inline int64_t weights(const ZetaCall *call) {
    switch (call->dtype) {
        case ZETA_BFLOAT16: return weights_with<BFloat16, FmaOperands>(*call);
        case ZETA_FLOAT16: return weights_with<Float16, FmaOperands>(*call);
        default: return weights_with<float, FmaOperands>(*call);
    }
}

template <class Q>
inline int64_t decode_of(const ZetaCall &call) {
    return call.key_factor_BGS ? decode_with<Q, int8_t>(call) : decode_with<Q, Q>(call);
}

inline int64_t decode(const ZetaCall *call) {
    switch (call->dtype) {
        case ZETA_BFLOAT16: return decode_of<BFloat16>(*call);
        case ZETA_FLOAT16: return decode_of<Float16>(*call);
        default: return decode_of<float>(*call);
    }
}

inline int64_t project(const ZetaProjection *call) {
    switch (call->dtype) {
        case ZETA_BFLOAT16: return project_with<BFloat16>(*call);
        case ZETA_FLOAT16: return project_with<Float16>(*call);
        default: return project_with<float>(*call);
    }
}

inline int64_t rotate(const ZetaRotation *call) {
    switch (call->dtype) {
        case ZETA_BFLOAT16: return rotate_with<BFloat16>(*call);
        case ZETA_FLOAT16: return rotate_with<Float16>(*call);
        default: return rotate_with<float>(*call);
    }
}
