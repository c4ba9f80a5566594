// The gradient of offset biases: sums of the scores' gradients along diagonals.
//
// A row of gradients is added to the place in an offset table where `ScoreRow` reads the row's
// biases. The repeated ends gather what lies beyond the reach.

struct Band {
    float *sums;  // of one head
    OffsetTable table;
    int64_t low, high;  // what a block of keys can reach

    static int64_t length(const ZetaCall &call) {
        return call.grad_offsets_HR ? OffsetTable::length_of(call) : 0;
    }

    // Begins a head, for some of its keys.
    void clear(const ZetaCall &call, int64_t first_key, int64_t num_keys) {
        const int64_t shift = call.source - call.target;
        low = table.start(first_key - (shift + call.target - 1));
        high = table.start(first_key + num_keys - 1 - shift) + table.pad;
        memset(sums + low, 0, (high - low) * sizeof(float));
    }

    void add(const float *gradients, int64_t offset, int64_t num_keys) {
        float *to = sums + table.start(offset);
        for (int64_t key = 0; key < num_keys; key += LANES)
            store(to + key, load(to + key) + load(gradients + key));
    }

    void flush(float *grad_offsets_R) const {
        for (int64_t place = low; place < high; ++place) {
            const int64_t offset = smaller(larger(place - table.pad, 0), 2 * table.reach);
            grad_offsets_R[offset] += sums[place];
        }
    }
};
