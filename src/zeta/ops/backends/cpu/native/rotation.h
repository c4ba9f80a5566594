// Rotations of queries and keys: pairs of features turn by the angle of their position, times a scale where
// the tables have one. What takes the time is to move the numbers; the tables of some positions are
// written out once for all heads.

constexpr int64_t TURN_FLOATS = 2048;  // of cosines, and as many of sines

// Of a number of positions: for each feature, or, where the halves of a head are pairs, for each pair, what
// it is multiplied by, and what its partner is.
struct Angles {
    alignas(64) float own[TURN_FLOATS], partner[TURN_FLOATS];
    int64_t row;
};

inline void write_out(const ZetaRotation &call, const ZetaTurned &x, int64_t batch, int64_t first,
                      int64_t positions, Angles &to) {
    const float sign = call.inverse ? -1.0f : 1.0f;
    for (int64_t position = 0; position < positions; ++position) {
        const float *cos = x.cos.data + batch * x.cos.batch + (first + position) * x.cos.row;
        const float *sin = x.sin.data + batch * x.sin.batch + (first + position) * x.sin.row;
        float *own = to.own + position * to.row, *partner = to.partner + position * to.row;
        const int64_t count = call.interleaved ? 2 * call.pairs : call.pairs;
        for (int64_t i = count; i < to.row; ++i) own[i] = partner[i] = 0;
        if (!call.interleaved) {
            memcpy(own, cos, call.pairs * sizeof(float));
            for (int64_t pair = 0; pair < call.pairs; ++pair) partner[pair] = sign * sin[pair];
            continue;
        }
        for (int64_t pair = 0; pair < call.pairs; ++pair) {
            own[2 * pair] = own[2 * pair + 1] = cos[pair];
            partner[2 * pair] = -sign * sin[pair];
            partner[2 * pair + 1] = sign * sin[pair];
        }
    }
}

// The features of a token, by its row of both.
template <class T>
inline void turn(const ZetaRotation &call, const T *from, const float *own, const float *partner,
                 T *to) {
    const int64_t pairs = call.pairs, turned = 2 * pairs;
    if (call.interleaved) {
        for (int64_t feature = 0; feature < turned; feature += LANES) {
            const Floats x = load_first(from + feature, turned - feature);
            store_first(to + feature,
                        fma(x, load(own + feature), swap_pairs(x) * load(partner + feature)),
                        turned - feature);
        }
    } else {
        for (int64_t pair = 0; pair < pairs; pair += LANES) {
            const int64_t left = pairs - pair;
            const Floats x = load_first(from + pair, left);
            const Floats y = load_first(from + pairs + pair, left);
            const Floats cos = load(own + pair), sin = load(partner + pair);
            store_first(to + pair, x * cos - y * sin, left);
            store_first(to + pairs + pair, fma(y, cos, x * sin), left);
        }
    }
    if (turned < call.head_dim)
        memcpy(to + turned, from + turned, (call.head_dim - turned) * sizeof(T));
}

template <class T>
inline int64_t rotate_with(const ZetaRotation &call) {
    const int64_t row = round_up(call.interleaved ? 2 * call.pairs : call.pairs, LANES);
    const int64_t block = TURN_FLOATS / row;
    int64_t tasks_of[ZETA_MOST_TURNED], num_tasks = 0, bytes = 0;
    for (int64_t i = 0; i < call.num_turned; ++i) {
        const ZetaTurned &x = call.turned[i];
        num_tasks += tasks_of[i] = x.batch * divide_up(x.length, block);
        bytes += x.batch * x.heads * x.length * call.head_dim * static_cast<int64_t>(sizeof(T));
    }
    run(num_tasks, is_for_one_thread(bytes, 1) ? 1 : call.num_threads, [&](int64_t task) {
        int64_t number = 0;
        for (; task >= tasks_of[number]; ++number) task -= tasks_of[number];
        const ZetaTurned &x = call.turned[number];
        const int64_t blocks = divide_up(x.length, block);
        const int64_t batch = task / blocks, first = task % blocks * block;
        const int64_t count = smaller(block, x.length - first);
        Angles angles;
        angles.row = row;
        write_out(call, x, batch, first, count, angles);
        const T *from = static_cast<const T *>(x.from.data) + batch * x.from.batch;
        T *to = static_cast<T *>(x.to.data) + batch * x.to.batch;
        // In the order in which they lie.
        const bool by_head = x.from.head > x.from.row;
        const int64_t outer = by_head ? x.heads : count, inner = by_head ? count : x.heads;
        for (int64_t i = 0; i < outer; ++i)
            for (int64_t j = 0; j < inner; ++j) {
                const int64_t head = by_head ? i : j, position = by_head ? j : i;
                turn(call, from + head * x.from.head + (first + position) * x.from.row,
                     angles.own + position * row, angles.partner + position * row,
                     to + head * x.to.head + (first + position) * x.to.row);
            }
    });
    return ZETA_DONE;
}
