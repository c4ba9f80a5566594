// The passes of a unit without tiles.

inline int64_t forward(const ZetaCall *call) { return forward_with<FmaOperands>(*call); }

inline int64_t backward(const ZetaCall *call) { return backward_with<FmaOperands>(*call); }

inline int64_t weights(const ZetaCall *call) { return weights_with<FmaOperands>(*call); }
