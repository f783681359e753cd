// The instructions that C++ has no name for, one function each. Only this file and wgmma.cuh hold inline PTX.
//
// Lane coordinates of a tensor-core fragment, here and everywhere in this folder: g = lane / 4, t = lane % 4
// (PTX ISA, "Matrix fragments for mma"). The tests replace this file by one that does the same on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#if __CUDA_ARCH__ >= 800
#define HAS_SM80 1
#else
#define HAS_SM80 0
#endif

// The same value, which the compiler takes for another: what is computed from it is computed where it is needed, not ahead
// of a loop and kept in registers.
__device__ __forceinline__ int opaque(int value)
{
    asm volatile("" : "+r"(value));
    return value;
}

// %tid.x, read again: a value that the compiler can't keep in a register from one use to the next.
__device__ __forceinline__ int thread_index_again()
{
    int index;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(index));
    return index;
}

// ------------------------------------------------------------------------------------------ warps

__device__ __forceinline__ u32 shuffle_xor(u32 value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float shuffle_xor(float value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// max(a, |b|), a NaN if either is: max.NaN.f32. sm_75 lacks it; there the bits are compared as integers, among which a NaN
// is larger than any number. `a` is not negative.
__device__ __forceinline__ float max_magnitude(float a, float b)
{
#if HAS_SM80
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(fabsf(b)));
    return larger;
#else
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(fabsf(b))));
#endif
}

// ------------------------------------------------------------------------------------------ 16-bit floats

// bfloat16; sm_80 and newer.
struct Bf16 {
    static __device__ __forceinline__ float to_float(u16 value) { return __uint_as_float(u32(value) << 16); }

#if HAS_SM80
    static __device__ __forceinline__ u16 from_float(float value)
    {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }

    // `low` in bits 0..15. cvt.rn.bf16x2 names the high half first.
    static __device__ __forceinline__ u32 pack(float low, float high)
    {
        u32 bits;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
        return bits;
    }

    // a * b + c in both halves, rounded once.
    static __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c)
    {
        u32 d;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }

    // mma.m16n8k16: c (16 x 8, f32) += a (16 x 16) . b (16 x 8).
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
};

// IEEE half.
struct Fp16 {
    static __device__ __forceinline__ float to_float(u16 bits)
    {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }

    static __device__ __forceinline__ u16 from_float(float value)
    {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }

    static __device__ __forceinline__ u32 pack(float low, float high)
    {
        return u32(from_float(low)) | u32(from_float(high)) << 16;
    }

    static __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c)
    {
        u32 d;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }

    // c (16 x 8, f32) += a (16 x 16) . b (16 x 8): mma.m16n8k16, or two m16n8k8 on sm_75, whose halves of the
    // same fragment they are.
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    {
#if HAS_SM80
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
        for (int half = 0; half < 2; ++half)
            asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
    }
};

// ------------------------------------------------------------------------------------------ 4-bit products
// All of them: d (16 x 8) = start + a (16 x 64) . b (64 x 8), int32. The type of `a` is signed or unsigned.
// A lane's word i of `a` holds row g + 8 (i % 2), columns 32 (i / 2) + 8 t .. + 7; word i of `b` holds column g, rows
// 32 i + 8 t .. + 7. That is the fragment of m16n8k64; the others are fed from the same words.

#define MMA_INT(SHAPE, TYPES, D, A, B, C)                                                                              \
    asm("mma.sync.aligned." SHAPE ".row.col.s32." TYPES ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
        : "=r"(D[0]), "=r"(D[1]), "=r"(D[2]), "=r"(D[3])                                                               \
        : "r"((A)[0]), "r"((A)[1]), "r"((A)[2]), "r"((A)[3]), "r"((B)[0]), "r"((B)[1]), "r"((C)[0]), "r"((C)[1]),      \
          "r"((C)[2]), "r"((C)[3]))

#if HAS_SM80
// mma.m16n8k64 s4: native on sm_80, 86, 89. Newer cards run a subroutine instead (185 instructions).
template <bool UNSIGNED>
__device__ __forceinline__ void mma_s4_k64(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&start)[4])
{
    if (UNSIGNED)
        MMA_INT("m16n8k64", "u4.s4", d, a, b, start);
    else
        MMA_INT("m16n8k64", "s4.s4", d, a, b, start);
}

// mma.m16n8k32 s8, sm_80 and newer: c += a (16 x 32) . b (32 x 8).
template <bool UNSIGNED>
__device__ __forceinline__ void mma_s8_k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&start)[4])
{
    if (UNSIGNED)
        MMA_INT("m16n8k32", "u8.s8", d, a, b, start);
    else
        MMA_INT("m16n8k32", "s8.s8", d, a, b, start);
}
#endif

// mma.m8n8k32 s4, sm_75: c (8 x 8) += a (8 x 32) . b (32 x 8).
template <bool UNSIGNED>
__device__ __forceinline__ void mma_s4_k32(int& c0, int& c1, u32 a, u32 b)
{
    if (UNSIGNED)
        asm("mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(c0), "+r"(c1)
            : "r"(a), "r"(b));
    else
        asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(c0), "+r"(c1)
            : "r"(a), "r"(b));
}

// sm_120a, or sm_121a, which newer compilers tell by the second macro only.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ / 100 == 12)
#define HAS_MXF4 1
// mma.m16n8k64 mxf4nvf4 with a ue4m3 scale for every 16 of k: c (16 x 8, f32) += scaled a . scaled b. Scale words hold
// one scale a byte, k = 0..15 lowest. Those of `a` are read from lanes t = 0 (row g) and t = 1 (row g + 8), those of
// `b` from lane t = 0 (column g); other lanes' words are ignored.
__device__ __forceinline__ void mma_mxf4(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], u32 a_scales, u32 b_scales)
{
    asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0, 0}, {%11}, {0, 0};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(a_scales), "r"(b_scales));
}
#endif

// ------------------------------------------------------------------------------------------ copies to shared memory

// The address that instructions on shared memory take.
__device__ __forceinline__ u32 shared_address(const void* shared)
{
    return static_cast<u32>(__cvta_generic_to_shared(shared));
}

// cp.async: 16 bytes of global memory to shared memory behind this thread's back; sm_75 copies them at once. `.cg`
// passes by L1: nothing is read twice by one multiprocessor.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global)
{
#if HAS_SM80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// cp.async.commit_group: the copies since the last one become a group.
__device__ __forceinline__ void commit_copies()
{
#if HAS_SM80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// cp.async.wait_group: this thread's copies have arrived, but for those of the newest PENDING groups.
template <int PENDING>
__device__ __forceinline__ void wait_copies()
{
#if HAS_SM80
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
