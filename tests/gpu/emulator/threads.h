// A CUDA block on one CPU thread: every CUDA thread is a fiber that runs until it needs the others.
//
// Fibers switch only where lanes meet (shuffle, mma) or threads do (__syncthreads). Between these a fiber runs alone, so
// a result that depends on a missing barrier depends on the order in which fibers run; the tests run both orders.
// A block that can't go on, and lanes of a warp that meet in different instructions, end the run with a message.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <ucontext.h>

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t MOST_OPERAND_BYTES = 64;

struct Copy {
    void* to;
    const void* from;
    int group;
};

// A product that has been started: `finish` writes its results.
struct Product {
    std::function<void()> finish;
    int group;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false, done = false;
    int meetings = 0; // with the lanes of the warp
    int barriers = 0; // with the threads of the block
    std::vector<Copy> copies;
    int copy_groups = 0;
    std::vector<Product> products;
    int product_groups = 0;
    std::function<bool()> ready; // what it waits for, if anything else than lanes or all threads
    int index = 0;
};

// What a lane brings to a meeting. Two sets: a lane can be one meeting ahead of those that still read.
struct Deposit {
    const char* instruction;
    alignas(16) unsigned char operand[MOST_OPERAND_BYTES];
};

// A barrier with phases: `current` counts those that have ended.
struct PhaseBarrier {
    long arrivals, pending, bytes = 0;
    unsigned current = 0;
};

struct NamedBarrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct BulkCopy {
    void* to;
    const void* from;
    unsigned bytes;
    const void* barrier;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<Deposit> deposits; // [parity][thread]
    std::vector<int> meetings;     // of all lanes of a warp together
    int barriers = 0, alive = 0;   // of all living threads together, and their number
    std::map<const void*, PhaseBarrier> phases;
    std::map<int, NamedBarrier> named;
    std::vector<BulkCopy> bulk_copies; // under way
    bool copies_late = false;          // happen when nothing else can, instead of at once
    long round = 0;                    // how often all warps have had a turn
    Fiber* current = nullptr;
    jmp_buf scheduler;
    void (*body)() = nullptr;
    std::string failure;
};

inline Block block;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline Index thread_index, block_index, grid_size;

inline void fail(const std::string& what)
{
    if (block.failure.empty())
        block.failure = what;
    _longjmp(block.scheduler, 1);
}

__attribute__((noinline)) inline void yield()
{
    if (!_setjmp(block.current->resume))
        _longjmp(block.scheduler, 1);
}

inline void run_body()
{
    block.body();
    block.current->done = true;
    block.barriers -= block.current->barriers;
    block.alive--;
    _longjmp(block.scheduler, 1);
}

inline int warp_of(const Fiber& fiber) { return fiber.index / LANES; }

// Lanes are at most one meeting apart, threads one barrier: whoever has counted on waits until the sum has caught up.
inline bool waits_for_lanes(const Fiber& fiber) { return block.meetings[warp_of(fiber)] < LANES * fiber.meetings; }
inline bool waits_for_threads(const Fiber& fiber) { return block.barriers < block.alive * fiber.barriers; }

// Bring `operand`, wait for the warp, and see what each lane brought.
template <class T>
struct Meeting {
    static_assert(sizeof(T) <= MOST_OPERAND_BYTES, "operand");
    int parity, first;

    Meeting(const char* instruction, const T& operand)
    {
        Fiber& me = *block.current;
        parity = me.meetings++ % 2;
        block.meetings[warp_of(me)]++;
        first = warp_of(me) * LANES;
        Deposit& mine = at(me.index % LANES);
        mine.instruction = instruction;
        std::memcpy(mine.operand, &operand, sizeof(T));
        while (waits_for_lanes(me))
            yield();
        for (int lane = 0; lane < LANES; ++lane)
            if (std::strcmp(at(lane).instruction, instruction))
                fail(std::string("lanes of a warp meet in ") + instruction + " and " + at(lane).instruction);
    }

    Deposit& at(int lane) const { return block.deposits[parity * block.fibers.size() + first + lane]; }

    T operator[](int lane) const
    {
        T value;
        std::memcpy(&value, at(lane).operand, sizeof(T));
        return value;
    }
};

inline void synchronize_threads()
{
    block.current->barriers++;
    block.barriers++;
    while (waits_for_threads(*block.current))
        yield();
}

// ------------------------------------------------------------------------------------------ asynchronous copies
// They happen as late as they may: when the thread waits for them.

inline void copy_late(void* to, const void* from)
{
    block.current->copies.push_back({to, from, block.current->copy_groups});
}

inline void commit_copies() { block.current->copy_groups++; }

inline void wait_copies(int pending)
{
    Fiber& me = *block.current;
    size_t kept = 0;
    for (const Copy& copy : me.copies)
        if (copy.group < me.copy_groups - pending)
            std::memcpy(copy.to, copy.from, 16);
        else
            me.copies[kept++] = copy;
    me.copies.resize(kept);
}

// ------------------------------------------------------------------------------------------ other waits

template <class Ready>
void wait_until(Ready ready)
{
    Fiber& me = *block.current;
    me.ready = ready;
    while (!me.ready())
        yield();
    me.ready = nullptr;
}

inline void meet(int id, int threads)
{
    NamedBarrier& barrier = block.named[id];
    const unsigned mine = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    wait_until([&barrier, mine] { return barrier.generation != mine; });
}

// ------------------------------------------------------------------------------------------ barriers with phases

inline PhaseBarrier& phase_barrier(const void* at)
{
    const auto found = block.phases.find(at);
    if (found == block.phases.end())
        fail("a barrier is used before it is made");
    return found->second;
}

inline void end_phase_if_complete(PhaseBarrier& barrier)
{
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.current++;
        barrier.pending = barrier.arrivals;
    }
}

inline void arrive_at(const void* at, long announced)
{
    PhaseBarrier& barrier = phase_barrier(at);
    if (barrier.pending == 0)
        fail("more arrivals at a barrier than it was made for");
    barrier.bytes += announced;
    barrier.pending--;
    end_phase_if_complete(barrier);
}

// Others do what they were waiting to do, before this thread goes on: who gives something away too early sees it.
inline void let_others_run()
{
    const long now = block.round;
    wait_until([now] { return block.round > now + 1; });
}

inline void wait_for_parity(const void* at, unsigned parity)
{
    PhaseBarrier& barrier = phase_barrier(at);
    wait_until([&barrier, parity] { return barrier.current % 2 != parity; });
}

inline void perform(const BulkCopy& copy)
{
    std::memcpy(copy.to, copy.from, copy.bytes);
    PhaseBarrier& barrier = phase_barrier(copy.barrier);
    barrier.bytes -= copy.bytes;
    end_phase_if_complete(barrier);
}

inline void copy_in_bulk(const BulkCopy& copy)
{
    if (copy.bytes % 16 || (uintptr_t(copy.to) | uintptr_t(copy.from)) % 16)
        fail("a bulk copy is not in units of 16 bytes");
    if (block.copies_late)
        block.bulk_copies.push_back(copy);
    else
        perform(copy);
}

// ------------------------------------------------------------------------------------------ products that run on

inline void start_product(std::function<void()> finish)
{
    block.current->products.push_back({std::move(finish), block.current->product_groups});
}

inline void wait_products(int pending)
{
    Fiber& me = *block.current;
    std::vector<Product> running;
    for (Product& product : me.products)
        if (product.group < me.product_groups - pending)
            product.finish();
        else
            running.push_back(std::move(product));
    me.products = std::move(running);
}

// ------------------------------------------------------------------------------------------ running

// Shared memory starts as NaN: nothing may be read before it is written.
extern "C" char __start_svdq_shared[] __attribute__((weak));
extern "C" char __stop_svdq_shared[] __attribute__((weak));

inline void start_block(int threads)
{
    if (__start_svdq_shared)
        std::memset(__start_svdq_shared, 0xff, size_t(__stop_svdq_shared - __start_svdq_shared));
    block.fibers.assign(threads, Fiber());
    block.stacks.resize(threads);
    block.meetings.assign(threads / LANES, 0);
    block.barriers = 0, block.alive = threads;
    block.deposits.assign(2 * threads, Deposit());
    block.phases.clear(), block.named.clear(), block.bulk_copies.clear();
    for (int i = 0; i < threads; ++i) {
        block.fibers[i].index = i;
        block.stacks[i].resize(STACK_BYTES);
    }
}

inline void enter(Fiber& fiber)
{
    block.current = &fiber;
    thread_index.x = unsigned(fiber.index);
    if (fiber.started)
        _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = block.stacks[fiber.index].data();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_body, 0);
    setcontext(&fiber.start);
}

// Let a fiber run until it waits or ends.
__attribute__((noinline)) inline void step(Fiber& fiber)
{
    if (!_setjmp(block.scheduler))
        enter(fiber);
}

// Let the lanes of a warp go as far as they can without other warps. False when none could move.
inline bool run_warp(int warp, bool descending)
{
    bool ever_moved = false;
    for (bool moved = true; moved && block.failure.empty();) {
        moved = false;
        for (int i = 0; i < LANES; ++i) {
            Fiber& fiber = block.fibers[warp * LANES + (descending ? LANES - 1 - i : i)];
            if (fiber.done || waits_for_lanes(fiber) || waits_for_threads(fiber) || (fiber.ready && !fiber.ready()))
                continue;
            step(fiber);
            moved = ever_moved = true;
        }
    }
    return ever_moved;
}

// Bulk copies that wait until nothing else can happen. False when there are none.
inline bool perform_late_copies()
{
    const std::vector<BulkCopy> copies = std::move(block.bulk_copies);
    block.bulk_copies.clear();
    for (const BulkCopy& copy : copies)
        perform(copy);
    return !copies.empty();
}

// One block. `order` 0: threads in ascending order, bulk copies at once; 1: in descending order, bulk copies as late as
// they may; 2 + w: as 0, but warp w runs only when no other can. False when it failed.
inline bool run_block(int threads, int order)
{
    start_block(threads);
    const bool descending = order == 1;
    const int lazy = order - 2;
    block.copies_late = descending;
    const int warps = threads / LANES;
    for (int idle = 0; block.alive > 0 && block.failure.empty();) {
        bool moved = false;
        block.round++;
        for (int i = 0; i < warps; ++i)
            if (i != lazy)
                moved |= run_warp(descending ? warps - 1 - i : i, descending);
        if (lazy >= 0 && !moved)
            moved = run_warp(lazy, false);
        // Who lets others run waits for two rounds
        idle = moved || perform_late_copies() ? 0 : idle + 1;
        if (idle > 2)
            block.failure = "the threads of the block wait for each other forever";
    }
    return block.failure.empty();
}

} // namespace emulator
