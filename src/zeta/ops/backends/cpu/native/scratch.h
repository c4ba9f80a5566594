// Memory that a thread computes in. It is kept for the thread's next call, up to a bound.

constexpr int64_t KEPT_BYTES = 64 << 20;

inline int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
inline int64_t round_up(int64_t x, int64_t step) { return divide_up(x, step) * step; }
inline int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Pieces of one block, each aligned to a cache line. The sizes are known before there is a block:
// a plan is run twice, first with no memory to count the bytes.
class Pieces {
  public:
    explicit Pieces(char *block) : block_(block) {}

    template <class T>
    T *take(int64_t count) {
        T *piece = block_ ? reinterpret_cast<T *>(block_ + bytes_) : nullptr;
        bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }

    int64_t bytes() const { return bytes_; }

  private:
    char *block_;
    int64_t bytes_ = 0;
};

struct KeptBlock {
    char *data = nullptr;
    int64_t bytes = 0;
    bool is_used = false;
    ~KeptBlock() { free(data); }
};

static thread_local KeptBlock kept_block;

// A block for the time of its scope; `data` is null where there is no memory.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : is_kept_(!kept_block.is_used) {
        bytes = round_up(larger(bytes, 1), 4096);  // Of no bytes too, null would be a failure.
        if (!is_kept_) {
            data_ = static_cast<char *>(aligned_alloc(4096, bytes));
            return;
        }
        if (kept_block.bytes < bytes) {
            free(kept_block.data);
            kept_block.data = static_cast<char *>(aligned_alloc(4096, bytes));
            kept_block.bytes = kept_block.data ? bytes : 0;
        }
        data_ = kept_block.data;
        kept_block.is_used = true;
    }
    ~Scratch() {
        if (!is_kept_) {
            free(data_);
            return;
        }
        kept_block.is_used = false;
        if (kept_block.bytes > KEPT_BYTES) {
            free(kept_block.data);
            kept_block.data = nullptr;
            kept_block.bytes = 0;
        }
    }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    char *data() const { return data_; }

  private:
    const bool is_kept_;
    char *data_;
};

// Runs `body(pieces, tasks)` once on each thread, as run_on_threads, with so many bytes of its own.
template <class Body>
inline int64_t run_with_scratch(int64_t bytes, int64_t num_tasks, int64_t num_threads,
                                const Body &body) {
    int64_t answer = ZETA_DONE;
    run_on_threads(num_tasks, num_threads, [&](Tasks &tasks) {
        const Scratch scratch(bytes);
        if (!scratch.data()) {
            __atomic_store_n(&answer, ZETA_NO_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        Pieces pieces(scratch.data());
        body(pieces, tasks);
    });
    return answer;
}

// Memory of one call, shared by its threads.
class Shared {
  public:
    explicit Shared(int64_t bytes)
        : data_(bytes ? static_cast<char *>(aligned_alloc(64, round_up(bytes, 64))) : nullptr) {}
    ~Shared() { free(data_); }
    Shared(const Shared &) = delete;
    Shared &operator=(const Shared &) = delete;

    char *data() const { return data_; }

  private:
    char *data_;
};
