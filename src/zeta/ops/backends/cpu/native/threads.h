// Tasks that threads take one after the other. No result may depend on who takes which.

// Numbers 0 .. count - 1, each handed out once.
class Tasks {
  public:
    explicit Tasks(int64_t count) : count_(count) {}

    // The next one, or -1 when there is none left.
    int64_t take() {
        const int64_t task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
        return task < count_ ? task : -1;
    }

  private:
    int64_t next_ = 0;
    const int64_t count_;
};

// Runs `body(tasks)` once on each thread, for what has to be set up and taken down there; it takes
// tasks until there are none. A single task, or a single thread, runs here and now.
template <class Body>
inline void run_on_threads(int64_t num_tasks, int64_t num_threads, const Body &body) {
    struct Shared {
        Tasks tasks;
        const Body &body;
    } shared{Tasks(num_tasks), body};
    if (num_tasks < 2 || num_threads < 2) {
        if (num_tasks > 0) body(shared.tasks);
        return;
    }
    // All threads, even for fewer tasks: libgomp ends those of its pool that a team leaves out.
    zeta_parallel(
        [](void *data) {
            auto &given = *static_cast<Shared *>(data);
            given.body(given.tasks);
        },
        &shared, num_threads);
}

// Runs `body(task)` for every task.
template <class Body>
inline void run(int64_t num_tasks, int64_t num_threads, const Body &body) {
    run_on_threads(num_tasks, num_threads, [&](Tasks &tasks) {
        for (int64_t task; (task = tasks.take()) >= 0;) body(task);
    });
}
