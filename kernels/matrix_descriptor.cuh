// How wgmma is told where an operand is stored in shared memory.
#pragma once
#include "ptx.cuh"

typedef unsigned long long u64;

// A matrix descriptor (PTX ISA, "Matrix descriptor format"): bytes from one core matrix to the next along k
// (`leading`) and along the rows (`stride`), in units of 16. Bits 62 and 63 are 0: no swizzle.
__device__ __forceinline__ u64 matrix_descriptor(const void* shared, u32 leading, u32 stride)
{
    const u64 address = shared_address(shared);
    return (address & 0x3ffff) >> 4 | u64(leading >> 4) << 16 | u64(stride >> 4) << 32;
}
