// What the backward pass computes in: sizes, what its tasks share, and the memory of one of them.

// Tasks are numbered by batch, key head and block of keys.
struct BackwardSizes {
    int64_t group, key_blocks, block_keys, query_blocks;

    BackwardSizes(const ZetaCall &call, int64_t step)
        : group(call.heads / call.key_heads),
          key_blocks(divide_up(call.source, TILE_KEYS)),
          // Cut evenly: what blocks of a head add to the queries they add in turns, so that a short
          // one would wait for a long one.
          block_keys(key_blocks ? round_up(divide_up(call.source, key_blocks), step) : 0),
          query_blocks(divide_up(call.target, BLOCK_QUERIES)) {}

    // Of a task: its query blocks, and what is done at the end of each head.
    int64_t steps_of_head() const { return query_blocks + 1; }
    int64_t tasks(const ZetaCall &call) const { return call.batch * call.key_heads * key_blocks; }
};

// What the tasks of a call share.
struct BackwardShared {
    RowSums *sums_BHT;
    float *grad_queries;  // float32 sums where the gradient itself is not float32
    int64_t *done;
    float *offsets;

    static BackwardShared plan(Pieces &pieces, const ZetaCall &call, const BackwardSizes &sizes) {
        BackwardShared found;
        const int64_t rows = call.batch * call.heads * call.target;
        found.sums_BHT = pieces.take<RowSums>(rows);
        found.done = pieces.take<int64_t>(sizes.tasks(call));
        const bool is_wide = call.dtype == ZETA_FLOAT32 || sizes.key_blocks == 1;
        found.grad_queries = is_wide ? nullptr : pieces.take<float>(rows * call.head_dim);
        found.offsets =
            pieces.take<float>(call.offsets_HR ? call.heads * OffsetTable::length_of(call) : 0);
        return found;
    }

    // Where the gradients of a head's queries are summed up.
    HeadRows query_sums(const ZetaCall &call, int64_t batch, int64_t head) const {
        if (!grad_queries) return head_rows(call.grad_query, call.dtype, batch, head);
        float *first = grad_queries + (batch * call.heads + head) * call.target * call.head_dim;
        return {reinterpret_cast<char *>(first), ZETA_FLOAT32, call.head_dim};
    }
};

// In which order the tasks are taken: block by block of several heads, since blocks of one head wait
// for each other, under a causal mask for long.
class TaskOrder {
  public:
    TaskOrder(const ZetaCall &call, const BackwardSizes &sizes)
        : key_blocks_(sizes.key_blocks),
          // Blocks that add to the same offsets do it sequence by sequence.
          period_(call.grad_offsets_HR ? call.key_heads : call.batch * call.key_heads),
          // A dense bias that all keys share is added to head by head.
          bunch_(call.grad_dense.data && call.grad_dense.column == 0 ? 1 : 2 * call.num_threads) {}

    // The number of the task that is taken as the `place`-th.
    int64_t number_at(int64_t place) const {
        const int64_t of_period = period_ * key_blocks_, of_bunch = bunch_ * key_blocks_;
        const int64_t in_period = place % of_period, in_bunch = in_period % of_bunch;
        const int64_t first = in_period / of_bunch * bunch_;
        const int64_t heads = smaller(bunch_, period_ - first);
        const int64_t head = place / of_period * period_ + first + in_bunch % heads;
        return head * key_blocks_ + in_bunch / heads;
    }

  private:
    const int64_t key_blocks_, period_, bunch_;
};

// A block of keys under way.
template <class Operands>
struct BackwardBlock {
    typename Operands::Columns keys_across, values_across;
    typename Operands::Values keys;
    typename Operands::Rows queries, grad_out;
    typename Operands::Weights weights, grad_scores;
    float *grad_keys, *grad_values;
    // In blocks of queries: (queries, keys), and the gradient of the queries.
    float *weight_tile, *grad_tile, *grad_biased, *grad_queries;
    float *band, *key_sums;
    KeyTile *tile;
    int64_t key_stride, value_stride, tile_stride, query_stride;

    static BackwardBlock plan(Pieces &pieces, const ZetaCall &call, const BackwardSizes &sizes) {
        BackwardBlock block;
        const int64_t length = sizes.block_keys;
        const int64_t rows = smaller(BLOCK_QUERIES, round_up(call.target, Operands::STEP));
        const bool has_values = !call.grad_weights;
        block.tile_stride = row_stride(length);
        block.query_stride = row_stride(call.head_dim);
        block.keys = Operands::Values::plan(pieces, length, call.head_dim);
        block.keys_across = Operands::Columns::plan(pieces, length, call.head_dim);
        block.values_across = Operands::Columns::plan(pieces, length, call.value_dim);
        block.queries = Operands::Rows::plan(pieces, rows, call.head_dim, true);
        block.grad_out = Operands::Rows::plan(pieces, rows, call.value_dim, true);
        block.weights = Operands::Weights::plan(pieces, rows, length, false, has_values);
        block.grad_scores = Operands::Weights::plan(pieces, rows, length, true, true);
        block.grad_keys = plan_sums(pieces, length, call.head_dim, block.key_stride);
        block.grad_values = plan_sums(pieces, length, call.value_dim, block.value_stride);
        block.grad_queries = pieces.take<float>(rows * block.query_stride);
        block.weight_tile = pieces.take<float>(rows * block.tile_stride);
        block.grad_tile = pieces.take<float>(rows * block.tile_stride);
        // A soft cap that comes first lies between the scores and what is added to them.
        block.grad_biased = call.softcap && call.softcap_first
                                ? pieces.take<float>(rows * block.tile_stride)
                                : block.grad_tile;
        block.band = pieces.take<float>(Band::length(call));
        block.key_sums = pieces.take<float>(length);
        block.tile = pieces.take<KeyTile>(1);
        return block;
    }

    static int64_t sum_rows(int64_t length, int64_t width) {
        return Operands::TURNS_SUMS ? round_up(width, 16) : length;
    }

  private:
    static float *plan_sums(Pieces &pieces, int64_t length, int64_t width, int64_t &stride) {
        stride = row_stride(Operands::TURNS_SUMS ? length : width);
        return pieces.take<float>(sum_rows(length, width) * stride);
    }
};
