// Hopper's warpgroup products (sm_90a), one function each. A warpgroup is four warps that start at a multiple of four.
//
// Operands in shared memory are stored as core matrices of 8 rows by 16 bytes, each 128 consecutive bytes, not swizzled: a core
// matrix touches every bank once as it is. (Swizzles are for tiles whose rows are longer than 16 bytes.) Results: warp w of
// the group holds rows 16 w + g and 16 w + g + 8; d[4 j + i] is row + 8 (i / 2), column 8 j + 2 t + i % 2.
//
// A product runs on after its instruction. Until wgmma_wait says it is done no one may read `d`, change the registers of
// `a`, or write the shared memory of either operand. The tests replace this file by one that does the same on a CPU.
#pragma once
#include "matrix_descriptor.cuh"

#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma needs Hopper: compile for sm_90a"
#endif

// fence.proxy.async: what this thread stored to shared memory is seen by wgmma.
__device__ __forceinline__ void fence_stores_before_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma.fence: registers written before may be read or overwritten by the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: all but the newest PENDING groups are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ------------------------------------------------------------------------------------------ the instruction's text
// `d` is 64 registers for 128 columns, 96 for 192.

#define EIGHT(KIND, d, i)                                                                                              \
    KIND(d[i]), KIND(d[i + 1]), KIND(d[i + 2]), KIND(d[i + 3]), KIND(d[i + 4]), KIND(d[i + 5]), KIND(d[i + 6]),        \
        KIND(d[i + 7])
#define SIXTY_FOUR(KIND, d)                                                                                            \
    EIGHT(KIND, d, 0), EIGHT(KIND, d, 8), EIGHT(KIND, d, 16), EIGHT(KIND, d, 24), EIGHT(KIND, d, 32),                  \
        EIGHT(KIND, d, 40), EIGHT(KIND, d, 48), EIGHT(KIND, d, 56)
#define NINETY_SIX(KIND, d)                                                                                            \
    SIXTY_FOUR(KIND, d), EIGHT(KIND, d, 64), EIGHT(KIND, d, 72), EIGHT(KIND, d, 80), EIGHT(KIND, d, 88)
#define FLOAT_RESULT(x) "+f"(x)
#define INT_RESULT(x) "+r"(x)

#define REGISTERS_64                                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define REGISTERS_96                                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                 \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"

// a and b in shared memory. MODIFIERS: what the type takes after scale-d.
#define WGMMA_SHARED(INSTRUCTION, REGISTERS, A, B, SCALE_D, MODIFIERS, ...)                                            \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE_D ", 0; wgmma.mma_async.sync.aligned." INSTRUCTION             \
                 " " REGISTERS ", " A ", " B ", p" MODIFIERS ";}"                                                      \
                 : __VA_ARGS__                                                                                         \
                 : "l"(a), "l"(b), "r"(scale_d))

// a in registers.
#define WGMMA_REGISTERS(INSTRUCTION, REGISTERS, A0, A1, A2, A3, B, SCALE_D, MODIFIERS, ...)                            \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " SCALE_D ", 0; wgmma.mma_async.sync.aligned." INSTRUCTION             \
                 " " REGISTERS ", {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p" MODIFIERS ";}"                           \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d))

// ------------------------------------------------------------------------------------------ e4m3
// d (64 x N) = (scale_d ? d : 0) + a (64 x 32) . b (N x 32)^T.

// wgmma.m64n128k32, both in shared memory.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n128k32.f32.e4m3.e4m3", REGISTERS_64, "%64", "%65", "%66", ", 1, 1", SIXTY_FOUR(FLOAT_RESULT, d));
}

// wgmma.m64n192k32, both in shared memory.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[96], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n192k32.f32.e4m3.e4m3", REGISTERS_96, "%96", "%97", "%98", ", 1, 1", NINETY_SIX(FLOAT_RESULT, d));
}

// wgmma.m64n128k32, `a` in registers: register r of a lane is row g + 8 (r % 2) of its warp's 16, k = 16 (r / 2) + 4 t + byte.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], const u32 (&a)[4], u64 b, int scale_d)
{
    WGMMA_REGISTERS("m64n128k32.f32.e4m3.e4m3", REGISTERS_64, "%64", "%65", "%66", "%67", "%68", "%69", ", 1, 1",
                    SIXTY_FOUR(FLOAT_RESULT, d));
}

// wgmma.m64n192k32, `a` in registers.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[96], const u32 (&a)[4], u64 b, int scale_d)
{
    WGMMA_REGISTERS("m64n192k32.f32.e4m3.e4m3", REGISTERS_96, "%96", "%97", "%98", "%99", "%100", "%101", ", 1, 1",
                    NINETY_SIX(FLOAT_RESULT, d));
}

// ------------------------------------------------------------------------------------------ 16-bit floats
// d (64 x N) = (scale_d ? d : 0) + a (64 x 16) . b (N x 16)^T, both in shared memory, k contiguous.

__device__ __forceinline__ void wgmma_bf16(float (&d)[64], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n128k16.f32.bf16.bf16", REGISTERS_64, "%64", "%65", "%66", ", 1, 1, 0, 0",
                 SIXTY_FOUR(FLOAT_RESULT, d));
}

__device__ __forceinline__ void wgmma_bf16(float (&d)[96], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n192k16.f32.bf16.bf16", REGISTERS_96, "%96", "%97", "%98", ", 1, 1, 0, 0",
                 NINETY_SIX(FLOAT_RESULT, d));
}

__device__ __forceinline__ void wgmma_f16(float (&d)[64], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n128k16.f32.f16.f16", REGISTERS_64, "%64", "%65", "%66", ", 1, 1, 0, 0",
                 SIXTY_FOUR(FLOAT_RESULT, d));
}

__device__ __forceinline__ void wgmma_f16(float (&d)[96], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n192k16.f32.f16.f16", REGISTERS_96, "%96", "%97", "%98", ", 1, 1, 0, 0",
                 NINETY_SIX(FLOAT_RESULT, d));
}

// ------------------------------------------------------------------------------------------ int8

// wgmma.m64n128k32: d (64 x 128) = (scale_d ? d : 0) + a . b^T, both in shared memory.
__device__ __forceinline__ void wgmma_s8(int (&d)[64], u64 a, u64 b, int scale_d)
{
    WGMMA_SHARED("m64n128k32.s32.s8.s8", REGISTERS_64, "%64", "%65", "%66", "", SIXTY_FOUR(INT_RESULT, d));
}
