// The gradient of a dense bias, summed over the dimensions in which it is broadcast.

inline float *plane_at(const ZetaPlane &plane, int64_t batch, int64_t head, int64_t query,
                       int64_t key) {
    return static_cast<float *>(plane.data) +
           plane_row(plane, batch, head, query, key).start;
}

inline void add_row(const float *from, int64_t count, float *to, int64_t stride) {
    if (stride == 1) {
        for (int64_t key = 0; key < count; key += LANES)
            store_first(to + key, load_first(to + key, count - key) + load(from + key),
                        count - key);
        return;
    }
    if (stride == 0) {
        Floats total = zeros();
        for (int64_t key = 0; key < count; key += LANES)
            total = total + load_first(from + key, count - key);
        *to += sum(total);
        return;
    }
    for (int64_t key = 0; key < count; ++key) to[key * stride] += from[key];
}

struct DenseGradient {
    const ZetaCall &call;
    float *key_sums;  // over the queries of one head, where they share the bias

    bool is_wanted() const { return call.grad_dense.data; }
    bool is_for_all_queries() const { return call.grad_dense.row == 0; }

    void add(int64_t batch, int64_t head, const QueryBlock &queries, const KeyTile &tile,
             int64_t first_key, const float *gradients, int64_t stride) const {
        for (int64_t row = 0; row < queries.count; ++row) {
            float *to = is_for_all_queries()
                            ? key_sums + (tile.first - first_key)
                            : plane_at(call.grad_dense, batch, head, queries.first + row,
                                       tile.first);
            add_row(gradients + row * stride, tile.count, to,
                    is_for_all_queries() ? 1 : call.grad_dense.column);
        }
    }

    void flush(int64_t batch, int64_t head, int64_t first_key, int64_t num_keys) const {
        if (!is_for_all_queries()) return;
        add_row(key_sums, num_keys, plane_at(call.grad_dense, batch, head, 0, first_key),
                call.grad_dense.column);
    }

    // All of it, which is contiguous, by all threads: they are the first to touch its memory.
    void begin() const {
        constexpr int64_t PART = 1 << 18;
        const ZetaPlane &plane = call.grad_dense;
        const int64_t count =
            (plane.batch ? call.batch : 1) * (plane.head ? call.heads : 1) *
            (plane.row ? call.target : 1) * (plane.column ? call.source : 1);
        float *data = static_cast<float *>(plane.data);
        run(divide_up(count, PART), call.num_threads, [&](int64_t part) {
            clear(data + part * PART, smaller(PART, count - part * PART));
        });
    }
};
