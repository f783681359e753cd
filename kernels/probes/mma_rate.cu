// Probe: how fast is mma.sync on int8, which the portable kernels use, with and without the rescaling of every group?
// Eight warps, each 32 x 64 by `repeats` groups of 64 columns, operands in registers.
//
//   result  (grid, 256) float32, so that nothing is dropped
//   -D PROMOTE: 0 sums stay in the instruction; 2 each group is converted and added by one fma with a product of scales
//
// Compute capability 8.0. Multiply-adds: grid * 8 * 32 * 64 * 64 * repeats.
#include "ptx.cuh"

#if PROMOTE
typedef float Total;
#else
typedef int Total;
#endif

__device__ __forceinline__ void add_group(Total (&total)[4], const u32 (&a)[4], const u32 (&b)[2], float scale)
{
#if PROMOTE
    const int start[4] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000}; // as multiply_int4.cuh
    int sum[4];
    mma_s8_k32<false>(sum, a, b, start);
    mma_s8_k32<false>(sum, a, b, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        total[i] = fmaf(__int_as_float(sum[i]) - 12582912.0f, scale * (1.0f + i), total[i]);
#else
    mma_s8_k32<false>(total, a, b, total);
    mma_s8_k32<false>(total, a, b, total);
#endif
}

extern "C" __global__ void __launch_bounds__(256) mma_rate(float* result, int repeats)
{
    Total totals[2][8][4] = {};
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const u32 seed = threadIdx.x * 0x01030507u + repeat;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const u32 a[4] = {seed, seed ^ 0x10u * m, seed + 3u, seed + 7u}, b[2] = {seed + n, seed ^ n};
                add_group(totals[m][n], a, b, 1.0f + repeat);
            }
    }
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sum += float(totals[m][n][i]);
    result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
