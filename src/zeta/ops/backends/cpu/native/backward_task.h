// A task of the backward pass: a block of keys of one key head.

template <class Operands>
struct BackwardTask {
    const ZetaCall &call;
    const BackwardSizes &sizes;
    const BackwardShared &shared;
    BackwardBlock<Operands> &block;
    const Turns turns;
    const int64_t number, batch, key_head, key_block, first_key, num_keys;
    const Sight sight;
    const DenseGradient dense;
    Band band;

    BackwardTask(const ZetaCall &call, Unseen &unseen, const BackwardSizes &sizes,
                 const BackwardShared &shared, const OffsetTable &offsets,
                 BackwardBlock<Operands> &block, int64_t number)
        : call(call),
          sizes(sizes),
          shared(shared),
          block(block),
          turns(shared.done),
          number(number),
          batch(number / sizes.key_blocks / call.key_heads),
          key_head(number / sizes.key_blocks % call.key_heads),
          key_block(number % sizes.key_blocks),
          first_key(key_block * sizes.block_keys),
          num_keys(smaller(sizes.block_keys, call.source - first_key)),
          sight(call, unseen, batch),
          dense{call, block.key_sums},
          band{block.band, offsets, 0, 0} {}

    void run(const OffsetTable &offsets) {
        pack();
        for (int64_t index = 0; index < sizes.group; ++index) {
            const int64_t head = key_head * sizes.group + index;
            const Scores scores = scores_of<Operands>(call, sight, offsets, batch, head);
            if (call.grad_offsets_HR) band.clear(call, first_key, num_keys);
            if (dense.is_wanted()) clear(block.key_sums, round_up(num_keys, LANES));
            for (int64_t query = 0; query < sizes.query_blocks; ++query)
                step(scores, query * BLOCK_QUERIES, index * sizes.steps_of_head() + query);
            end_head(scores, index);
        }
        const float factor = Operands::SCALES_QUERIES ? 1 : static_cast<float>(call.scale);
        store_gradients(call.grad_key, call.head_dim, block.grad_keys, block.key_stride, factor);
        if (call.grad_value.data)
            store_gradients(call.grad_value, call.value_dim, block.grad_values,
                            block.value_stride, 1);
    }

  private:
    void pack() const {
        const KeyRows key = keys_of(sight, key_head);
        block.keys_across.pack(key, first_key, num_keys, 0);
        block.keys.pack(key, first_key, num_keys, 0);
        clear(block.grad_keys, block.sum_rows(num_keys, call.head_dim) * block.key_stride);
        if (call.grad_weights) return;
        block.values_across.pack(values_of(sight, key_head), first_key, num_keys, 0);
        clear(block.grad_values, block.sum_rows(num_keys, call.value_dim) * block.value_stride);
    }

    void step(const Scores &scores, int64_t first_query, int64_t step_number) {
        const QueryBlock queries(sight, first_query,
                                 smaller(BLOCK_QUERIES, call.target - first_query));
        const int64_t low = larger(first_key, round_down(queries.keys.low, Operands::STEP));
        const int64_t high = smaller(first_key + num_keys, queries.keys.high);
        if (low >= high || !queries.look_at(sight, low, high - low, *block.tile)) {
            if (sizes.key_blocks == 1) clear_queries(scores, queries);
            return;
        }
        if (call.dropout_p > 0) block.tile->set_hashes(sight, column_salt(call.seed));
        const Stairs stairs(sight, queries, block.tile->first, block.tile->count, true);
        make_products(scores, queries, stairs);
        make_gradients(scores, queries);
        sum_products(queries, stairs);
        take_turn(step_number);
        add_queries(scores, queries);
        if (dense.is_wanted())
            dense.add(batch, scores.head, queries, *block.tile, first_key, block.grad_biased,
                      block.tile_stride);
        turns.finish(number, step_number);
    }

    int64_t place() const { return block.tile->first - first_key; }

    void make_products(const Scores &scores, const QueryBlock &queries,
                       const Stairs &stairs) const {
        const KeyTile &tile = *block.tile;
        const HeadRows query = head_rows(call.query, call.dtype, batch, scores.head);
        block.queries.copy(query, queries.first, queries.count, static_cast<float>(call.scale));
        Operands::make_scores(block.queries, block.keys_across, place(), block.weight_tile,
                              block.tile_stride, stairs);
        if (call.grad_weights) {
            for (int64_t row = 0; row < queries.count; ++row)
                load_weight_gradients(scores, queries.first + row, tile,
                                      block.grad_tile + row * block.tile_stride);
            return;
        }
        const HeadRows grad_out = head_rows(call.grad_out, call.dtype, batch, scores.head);
        block.grad_out.copy(grad_out, queries.first, queries.count, 1);
        Operands::make_scores(block.grad_out, block.values_across, place(), block.grad_tile,
                              block.tile_stride, stairs);
    }

    void make_gradients(const Scores &scores, const QueryBlock &queries) {
        const int64_t row0 = (batch * call.heads + scores.head) * call.target + queries.first;
        for (int64_t row = 0; row < queries.count; ++row) {
            const ScoreRow score_row(scores, *block.tile, queries.first + row);
            const int64_t start = row * block.tile_stride;
            backward_row(score_row, shared.sums_BHT[row0 + row], block.weight_tile + start,
                         block.grad_tile + start, block.grad_biased + start);
            if (call.grad_offsets_HR)
                band.add(block.grad_biased + start, block.tile->first - score_row.position,
                         block.tile->padded);
        }
    }

    void sum_products(const QueryBlock &queries, const Stairs &stairs) const {
        const int64_t keys = block.tile->count, count = queries.count;
        block.grad_scores.take(block.grad_tile, block.tile_stride, count, keys);
        Operands::add_sums(block.grad_scores, block.queries, block.grad_keys, block.key_stride,
                           place(), stairs);
        Operands::make_outputs(block.grad_scores, block.keys, place(), block.grad_queries,
                               block.query_stride, false, stairs);
        // Whatever is wrong with a key or a value has come to the gradients of queries.
        sight.unseen.look_at(block.grad_queries, count, call.head_dim, block.query_stride);
        if (call.grad_weights) return;
        block.weights.take(block.weight_tile, block.tile_stride, count, keys);
        Operands::add_sums(block.weights, block.grad_out, block.grad_values, block.value_stride,
                           place(), stairs);
    }

    // Until everything that was to be added before this step has been.
    void take_turn(int64_t step_number) const {
        // A dense bias that all keys share is added to by every block of them; if its heads share
        // it too, a block's last head comes before the next block's first.
        const bool shares_keys = dense.is_wanted() && call.grad_dense.column == 0;
        const int64_t of_head = sizes.steps_of_head();
        const int64_t same_of_last_head = (sizes.group - 1) * of_head + step_number % of_head;
        const bool is_after_all_heads = shares_keys && call.grad_dense.head == 0;
        if (key_block > 0)
            turns.wait(number - 1, is_after_all_heads ? same_of_last_head : step_number);
        if (!dense.is_wanted() || (shares_keys && key_block > 0)) return;
        const bool shares_heads = call.grad_dense.head == 0;
        const bool shares_batch = call.grad_dense.batch == 0;
        // Who added last: the same block of keys of the heads before, or their last block where all
        // keys share the bias.
        const int64_t back = shares_keys ? 1 : sizes.key_blocks;
        if (shares_heads && (key_head > 0 || (shares_batch && batch > 0)))
            turns.wait(number - back, same_of_last_head);
        else if (!shares_heads && shares_batch && batch > 0)
            turns.wait(number - (call.key_heads - 1) * sizes.key_blocks - back, step_number);
    }

    void add_queries(const Scores &scores, const QueryBlock &queries) const {
        HeadRows sums = shared.query_sums(call, batch, scores.head);
        const Floats factor = splat(static_cast<float>(call.scale));
        for_vectors(sums, queries.count, call.head_dim, [&](int64_t row, int64_t column) {
            void *to = sums.at(queries.first + row);
            const int64_t count = call.head_dim - column;
            Floats total = load(block.grad_queries + row * block.query_stride + column) * factor;
            if (sizes.key_blocks > 1)
                total = total + load_dtype(to, sums.dtype, column, count);
            store_dtype(to, sums.dtype, column, total, count);
        });
    }

    void clear_queries(const Scores &scores, const QueryBlock &queries) const {
        HeadRows rows = head_rows(call.grad_query, call.dtype, batch, scores.head);
        for (int64_t row = 0; row < queries.count; ++row)
            memset(rows.at(queries.first + row), 0, call.head_dim * rows.bytes());
    }

    void end_head(const Scores &scores, int64_t index) {
        const int64_t step_number = index * sizes.steps_of_head() + sizes.query_blocks;
        take_turn(step_number);
        if (dense.is_wanted()) dense.flush(batch, scores.head, first_key, num_keys);
        if (call.grad_offsets_HR) {
            if (key_block == 0 && batch > 0)
                turns.wait(number - (call.key_heads - 1) * sizes.key_blocks - 1, step_number);
            band.flush(call.grad_offsets_HR + scores.head * (2 * call.reach + 1));
        }
        turns.finish(number, step_number);
    }

    void store_gradients(const ZetaRows &to, int64_t width, const float *from, int64_t stride,
                         float factor) const {
        HeadRows rows = head_rows(to, call.dtype, batch, key_head);
        for (int64_t key = 0; key < num_keys; key += LANES)
            for (int64_t column = 0; column < width; column += LANES) {
                Floats square[LANES];
                for (int lane = 0; lane < LANES; ++lane)
                    square[lane] = load(Operands::TURNS_SUMS
                                            ? from + (column + lane) * stride + key
                                            : from + (key + lane) * stride + column);
                if (Operands::TURNS_SUMS) transpose(square);
                for (int64_t lane = 0; lane < LANES && key + lane < num_keys; ++lane)
                    store_dtype(rows.at(first_key + key + lane), call.dtype, column,
                                square[lane] * splat(factor), width - column);
            }
    }
};
