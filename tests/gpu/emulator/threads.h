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

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false, done = false;
    int meetings = 0; // with the lanes of the warp
    int barriers = 0; // with the threads of the block
    std::vector<Copy> copies;
    int copy_groups = 0;
    int index = 0;
};

// What a lane brings to a meeting. Two sets: a lane can be one meeting ahead of those that still read.
struct Deposit {
    const char* instruction;
    alignas(16) unsigned char operand[MOST_OPERAND_BYTES];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<Deposit> deposits; // [parity][thread]
    std::vector<int> meetings;     // of all lanes of a warp together
    int barriers = 0, alive = 0;   // of all living threads together, and their number
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
            if (fiber.done || waits_for_lanes(fiber) || waits_for_threads(fiber))
                continue;
            step(fiber);
            moved = ever_moved = true;
        }
    }
    return ever_moved;
}

// One block, threads in ascending or descending order. False when it failed.
inline bool run_block(int threads, bool descending)
{
    start_block(threads);
    const int warps = threads / LANES;
    while (block.alive > 0 && block.failure.empty()) {
        bool moved = false;
        for (int i = 0; i < warps; ++i)
            moved |= run_warp(descending ? warps - 1 - i : i, descending);
        if (!moved)
            block.failure = "the threads of the block wait for each other forever";
    }
    return block.failure.empty();
}

} // namespace emulator
