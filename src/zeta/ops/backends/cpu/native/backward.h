// Attention, backward: blocks of keys walk over blocks of queries. Scores are made again.
//
// A task is a block of keys of one key head, with all the query heads that read it: it alone makes
// its part of the keys' and values' gradients. What several tasks add to is added in turns.

// Before the tasks: sums of rows, and zeros where they add to.
template <class Operands>
inline int64_t prepare_backward(const ZetaCall &call, Unseen &unseen, const BackwardSizes &sizes,
                                const BackwardShared &shared, const OffsetTable &offsets) {
    memset(shared.done, 0, sizes.tasks(call) * sizeof(int64_t));
    if (call.grad_offsets_HR) clear(call.grad_offsets_HR, call.heads * (2 * call.reach + 1));
    if (call.grad_dense.data) DenseGradient{call, nullptr}.begin();
    Pieces count(nullptr);
    if (sizes.key_blocks == 1) {
        for (int64_t row = 0; row < call.batch * call.heads * call.target; ++row)
            shared.sums_BHT[row] = begin_sums(call, row, 0);
        return ZETA_DONE;
    }
    EarlyPass<Operands>::plan(count, call);
    const int64_t num_tasks = call.batch * call.heads * sizes.query_blocks;
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        [[maybe_unused]] const typename Operands::Session session;
        const auto pass = EarlyPass<Operands>::plan(pieces, call);
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t first = task % sizes.query_blocks * BLOCK_QUERIES;
            const int64_t batch = task / sizes.query_blocks / call.heads;
            const int64_t head = task / sizes.query_blocks % call.heads;
            const Sight sight(call, unseen, batch);
            const Scores scores = scores_of<Operands>(call, sight, offsets, batch, head);
            make_sums(scores, pass, first, shared.sums_BHT);
            HeadRows sums = shared.query_sums(call, batch, head);
            for (int64_t row = first; row < smaller(first + BLOCK_QUERIES, call.target); ++row)
                memset(sums.at(row), 0, call.head_dim * sizeof(float));
        }
    };
    return run_with_scratch(count.bytes(), num_tasks, call.num_threads, work);
}

// After the tasks: gradients of queries that were summed elsewhere.
inline void finish_queries(const ZetaCall &call, const BackwardShared &shared) {
    run(call.batch * call.heads, call.num_threads, [&](int64_t task) {
        const int64_t batch = task / call.heads, head = task % call.heads;
        const HeadRows sums = shared.query_sums(call, batch, head);
        HeadRows rows = head_rows(call.grad_query, call.dtype, batch, head);
        for (int64_t row = 0; row < call.target; ++row)
            for (int64_t column = 0; column < call.head_dim; column += LANES) {
                const int64_t count = call.head_dim - column;
                store_dtype(rows.at(row), call.dtype, column,
                            load_dtype(sums.at(row), ZETA_FLOAT32, column, count), count);
            }
    });
}

template <class Operands>
inline int64_t backward_by(const ZetaCall &call, Unseen &unseen) {
    const BackwardSizes sizes(call, Operands::STEP);
    Pieces shared_count(nullptr);
    BackwardShared::plan(shared_count, call, sizes);
    const Shared memory(shared_count.bytes());
    if (!memory.data()) return ZETA_NO_MEMORY;
    Pieces shared_pieces(memory.data());
    const BackwardShared shared = BackwardShared::plan(shared_pieces, call, sizes);
    OffsetTable offsets{};
    if (call.offsets_HR) offsets = make_offsets(call, shared.offsets);
    int64_t answer = prepare_backward<Operands>(call, unseen, sizes, shared, offsets);
    if (answer != ZETA_DONE) return answer;
    const TaskOrder order(call, sizes);
    Pieces count(nullptr);
    BackwardBlock<Operands>::plan(count, call, sizes);
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        [[maybe_unused]] const typename Operands::Session session;
        BackwardBlock<Operands> block = BackwardBlock<Operands>::plan(pieces, call, sizes);
        for (int64_t place; (place = tasks.take()) >= 0;)
            BackwardTask<Operands>(call, unseen, sizes, shared, offsets, block,
                                   order.number_at(place))
                .run(offsets);
    };
    answer = run_with_scratch(count.bytes(), sizes.tasks(call), call.num_threads, work);
    if (answer == ZETA_DONE && shared.grad_queries) finish_queries(call, shared);
    return answer;
}

template <class Operands>
inline int64_t backward_with(const ZetaCall &call) {
    return run_without_unseen(
        call, [&](Unseen &unseen) { return backward_by<Operands>(call, unseen); });
}
