// Linear layers for a few rows, as in a decoding step: what takes the time is to read the weights,
// which is done once, where they lie, by all threads.

constexpr int64_t LAYER_FEATURES = 32;  // of a task

// Features `first` .. `first + count - 1` of all rows of x, which are arranged.
template <class T>
inline void project_features(const ZetaProjection &call, const ZetaLayer &layer,
                             const typename RowProducts<T, T>::Number *x, int64_t x_stride,
                             int64_t first, int64_t count) {
    alignas(64) float sums[ZETA_MOST_ROWS * LAYER_FEATURES];
    const T *weight = static_cast<const T *>(layer.weight) + first * layer.weight_row;
    // More rows than one block pass over weights that are near, while the next are asked for. Those that
    // are passed over once the processor asks for by itself, and one with AVX-512 the next, too.
    const bool is_near = call.rows > BLOCK, asks = is_near && LANES < 16;
    const int64_t step = is_near ? LANES : count;
    for (int64_t feature = 0; feature < count; feature += step) {
        const Stream<T> from = {weight + feature * layer.weight_row, layer.weight_row,
                                smaller(step, count - feature)};
        for_blocks(call.rows, [&](int64_t row, auto rows) {
            score_block<rows.value>(x + row * x_stride, x_stride, from, call.width,
                                    sums + row * LAYER_FEATURES + feature, LAYER_FEATURES,
                                    asks && row == 0);
        });
    }
    const T *bias = layer.bias ? static_cast<const T *>(layer.bias) + first : nullptr;
    for (int64_t row = 0; row < call.rows; ++row) {
        T *to = static_cast<T *>(layer.out) + row * layer.features + first;
        for (int64_t feature = 0; feature < count; feature += LANES) {
            Floats sum = load(sums + row * LAYER_FEATURES + feature);
            if (bias) sum = sum + load_first(bias + feature, count - feature);
            store_first(to + feature, sum, count - feature);
        }
    }
}

template <class T>
inline int64_t project_with(const ZetaProjection &call) {
    using Products = RowProducts<T, T>;
    using Number = typename Products::Number;
    const int64_t x_stride = round_up(call.width, PAIR) + PAIR;
    const int64_t row_bytes = x_stride * static_cast<int64_t>(sizeof(Number));
    const int64_t padded_rows = round_up(call.rows, BLOCK);
    Shared memory(padded_rows * row_bytes);
    if (!memory.data()) return ZETA_NO_MEMORY;
    memset(memory.data() + call.rows * row_bytes, 0, (padded_rows - call.rows) * row_bytes);
    Number *x = reinterpret_cast<Number *>(memory.data());
    for (int64_t row = 0; row < call.rows; ++row)
        Products::take_query(static_cast<const T *>(call.x) + row * call.width, call.width, 1,
                             x + row * x_stride);
    const auto tasks_of = [&](int64_t layer) {
        return divide_up(call.layers[layer].features, LAYER_FEATURES);
    };
    int64_t num_tasks = 0, bytes = 0;
    for (int64_t layer = 0; layer < call.num_layers; ++layer) {
        num_tasks += tasks_of(layer);
        bytes += call.layers[layer].features * call.width * static_cast<int64_t>(sizeof(T));
    }
    run(num_tasks, is_for_one_thread(bytes, call.rows) ? 1 : call.num_threads, [&](int64_t task) {
        int64_t number = 0;
        for (; task >= tasks_of(number); ++number) task -= tasks_of(number);
        const ZetaLayer &layer = call.layers[number];
        const int64_t first = task * LAYER_FEATURES;
        project_features<T>(call, layer, x, x_stride, first,
                            smaller(LAYER_FEATURES, layer.features - first));
    });
    return ZETA_DONE;
}
