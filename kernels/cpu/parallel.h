// Work in parallel: on the OpenMP threads that torch has already, where the process has GNU's entry to them, else on
// threads of our own. Which thread does what never changes a result.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

namespace svdq {

// GOMP_parallel: runs `body(data)` on that many threads, of which the caller is one.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

inline long process_id()
{
#ifdef _WIN32
    return _getpid();
#else
    return long(getpid());
#endif
}

// Our own threads. They sleep between calls; a call that finds them busy with another thread's work runs alone.
class Pool {
public:
    void run(void (*body)(void*), void* data, unsigned threads)
    {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock())
            return body(data);
        {
            std::lock_guard<std::mutex> guard(state_);
            while (workers_ + 1 < threads) {
                std::thread([this, index = workers_] { work(index); }).detach();
                ++workers_;
            }
            body_ = body, data_ = data, wanted_ = threads - 1, left_ = threads - 1;
            ++round_;
        }
        start_.notify_all();
        body(data);
        std::unique_lock<std::mutex> guard(state_);
        done_.wait(guard, [this] { return left_ == 0; });
    }

private:
    void work(unsigned index)
    {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> guard(state_);
        for (;;) {
            start_.wait(guard, [&] { return round_ != seen; });
            seen = round_;
            if (index >= wanted_)
                continue;
            const auto body = body_;
            void* const data = data_;
            guard.unlock();
            body(data);
            guard.lock();
            if (--left_ == 0)
                done_.notify_one();
        }
    }

    std::mutex turn_, state_;
    std::condition_variable start_, done_;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    unsigned workers_ = 0, wanted_ = 0, left_ = 0;
    uint64_t round_ = 0;
};

struct Threads {
    Team team = nullptr;
    long process = 0; // a team does not survive a fork
};

inline Threads& threads_of_torch()
{
    static Threads threads;
    return threads;
}

inline Pool& own_pool()
{
    // Never destroyed: its threads wait in it until the process ends. A child of a fork has none of them, and makes others.
    static std::mutex making;
    static Pool* pool = nullptr;
    static long process = 0;
    std::lock_guard<std::mutex> guard(making);
    if (pool == nullptr || process != process_id())
        pool = new Pool, process = process_id();
    return *pool;
}

// `work(task)` for every task from 0 to `tasks`.
template <class Work> inline void in_parallel(int64_t tasks, int64_t threads, const Work& work)
{
    struct Shared {
        const Work& work;
        int64_t tasks;
        std::atomic<int64_t> next;
    } shared{work, tasks, {0}};
    const auto body = [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        for (int64_t task; (task = all.next.fetch_add(1)) < all.tasks;)
            all.work(task);
    };
    const int64_t most = threads < tasks ? threads : tasks;
    if (most <= 1)
        return body(&shared);
    const Threads& torch = threads_of_torch();
    if (torch.team && torch.process == process_id())
        return torch.team(body, &shared, unsigned(most), 0);
    own_pool().run(body, &shared, unsigned(most));
}

} // namespace svdq
