// Hopper's other instructions (sm_90a), one function each: barriers that count bytes, copies that report to them, and
// what lets a block be split into producer and consumers. The tests replace this file by one that does the same on a CPU.
#pragma once
#include "matrix_descriptor.cuh"

#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "setmaxnreg needs Hopper: compile for sm_90a"
#endif

// The shared memory that a launch asks for.
__device__ __forceinline__ u8* dynamic_shared()
{
    extern __shared__ __align__(1024) u8 memory[];
    return memory;
}

// ------------------------------------------------------------------------------------------ barriers
// A barrier in shared memory has phases. A phase ends when its arrivals have come and the bytes announced to it have
// been written; the next one begins at once. The first phase has parity 0, the next one 1, and so on.

// mbarrier.init: `arrivals` end a phase.
__device__ __forceinline__ void init_barrier(u64* barrier, u32 arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: barriers that this thread made are seen by the copies of others, after a __syncthreads.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// mbarrier.arrive: one arrival; what this thread did before is seen by those who wait.
__device__ __forceinline__ void arrive(u64* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: one arrival, and the phase shall not end before `bytes` more have been written.
__device__ __forceinline__ void arrive_expecting(u64* barrier, u32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// mbarrier.try_wait.parity: has the phase of this parity ended? Waits a while for it. On a new barrier parity 1 has.
__device__ __forceinline__ bool has_ended(u64* barrier, u32 parity)
{
    u32 ended;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return ended;
}

// %globaltimer_hi: time in units of 2^32 ns, 4.3 s.
__device__ __forceinline__ u32 coarse_time()
{
    u32 now;
    asm volatile("mov.u32 %0, %globaltimer_hi;" : "=r"(now));
    return now;
}

// No wait of a sound kernel takes this long: an error that the user sees is better than a GPU that hangs.
constexpr u32 LONGEST_WAIT = 5; // 17 to 21 s

__device__ __forceinline__ void wait_phase(u64* barrier, u32 parity)
{
    if (has_ended(barrier, parity))
        return;
    const u32 started = coarse_time();
    while (!has_ended(barrier, parity))
        if (coarse_time() - started >= LONGEST_WAIT)
            __trap();
}

// cp.async.bulk: `bytes` (a multiple of 16, as both addresses) of global memory to shared memory; the barrier is told when
// they have been written.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// bar.sync: `threads` threads meet at barrier `id`; 0 is that of __syncthreads.
__device__ __forceinline__ void meet(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------------------ registers

// setmaxnreg.dec: the warpgroup gives registers up. Works only where a launch bound caps them at entry.
template <int COUNT>
__device__ __forceinline__ void keep_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// setmaxnreg.inc: the warpgroup takes what others gave up.
template <int COUNT>
__device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ------------------------------------------------------------------------------------------ numbers

// stmatrix.x4.trans: four 8 x 8 matrices of 16-bit numbers, each stored transposed. A lane's register i holds row g,
// columns 2 t and 2 t + 1 of matrix i; `row` of lane 8 i + j is where column j of matrix i goes, 16 bytes.
__device__ __forceinline__ void store_transposed(void* row, const u32 (&matrices)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}

// cvt.rn.satfinite.e4m3x2: two floats as e4m3, ties to even, at most 448; `low` in bits 0..7. It names the high one first.
__device__ __forceinline__ u32 e4m3_pair(float low, float high)
{
    u16 bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    return bits;
}
