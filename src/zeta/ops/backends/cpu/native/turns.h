// Tasks that add to the same numbers do it in the order of their own numbers, so that every sum is
// made in one order, whichever thread takes which task.
//
// A task says how many of its steps are behind it; another waits for that. All wait only for tasks
// that have been taken before (see TaskOrder): somebody always goes on.

class Turns {
  public:
    explicit Turns(int64_t *done) : done_(done) {}

    // Until a task has done a step, and so has everyone that it had to wait for.
    void wait(int64_t task, int64_t step) const {
        for (int64_t spins = 0; __atomic_load_n(done_ + task, __ATOMIC_ACQUIRE) <= step; ++spins) {
            // The processor may be needed for the one that is waited for.
            spins < 256 ? _mm_pause() : static_cast<void>(sched_yield());
        }
    }

    void finish(int64_t task, int64_t step) const {
        __atomic_store_n(done_ + task, step + 1, __ATOMIC_RELEASE);
    }

  private:
    int64_t *done_;
};
