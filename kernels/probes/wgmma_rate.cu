// Probe: how fast does Hopper multiply, and what does rescaling every group cost? Two warpgroups, each 64 x 128 by
// `repeats` groups of 64 columns (8-bit operands; 32 of bfloat16) on the same operands in shared memory.
//
//   operands  (384, 8) uint4: 128 rows of a, 256 of b, any numbers     result  (grid, 256) float32, so that nothing is
//   dropped
//   -D OPERAND: 0 e4m3, 1 int8, 2 bfloat16
//   -D PROMOTE: 0 sums stay in the instruction; 1 each group is added by one fma with a row's scale (W4A8);
//               2 by a row's scale and a column's, a product and an fma (exact W4A4)
//
// Compute capability 9.0 (sm_90a). Multiply-adds: grid * 2 * 64 * 128 * 64 * repeats (half of it for bfloat16).
#include "wgmma.cuh"

constexpr int COLUMN_SCALES = 32; // vectors of four
constexpr int A_BYTES = 64 * 64, B_BYTES = 128 * 64; // per warpgroup, and shared by both

#if OPERAND == 1
typedef int Sum;
#else
typedef float Sum;
#endif

__device__ __forceinline__ void multiply(Sum (&d)[64], u64 a, u64 b, int scale_d)
{
#if OPERAND == 0
    wgmma_e4m3(d, a, b, scale_d);
#elif OPERAND == 1
    wgmma_s8(d, a, b, scale_d);
#else
    wgmma_bf16(d, a, b, scale_d);
#endif
}

extern "C" __global__ void __launch_bounds__(256) wgmma_rate(const uint4* operands, float* result, int repeats)
{
    __shared__ alignas(128) uint4 memory[(2 * A_BYTES + B_BYTES) / 16];
    for (int i = threadIdx.x; i < int(sizeof(memory) / 16); i += blockDim.x)
        memory[i] = operands[i];
    fence_stores_before_wgmma();
    __syncthreads();

    const int group = threadIdx.x / 128;
    const u64 a = matrix_descriptor(memory + group * (A_BYTES / 16), 1024, 128);
    const u64 b = matrix_descriptor(memory + 2 * (A_BYTES / 16), 2048, 128);
    const float row_scales[2] = {1.0f + threadIdx.x, 2.0f + threadIdx.x};
    // As in hopper_product.cuh the scales of columns come from shared memory, four at a time, at another place for every
    // group: else the compiler multiplies both factors once, before the loop.
    __shared__ float4 column_scales[COLUMN_SCALES + 15];
    for (int i = threadIdx.x; i < COLUMN_SCALES + 15; i += blockDim.x)
        column_scales[i] = make_float4(1.0f + i, 2.0f + i, 3.0f + i, 4.0f + i);
    __syncthreads();

    Sum sums[64] = {};
    float acc[64] = {};
    for (int repeat = 0; repeat < repeats; ++repeat) {
        wgmma_fence();
        // Second half of the group: two core matrices further along k, 2 * 1024 and 2 * 2048 bytes
        multiply(sums, a, b, PROMOTE == 0);
        multiply(sums, a + 128, b + 256, 1);
        wgmma_commit();
        wgmma_wait<0>();
#if PROMOTE
        const float4* scales = column_scales + repeat % 16 + threadIdx.x % 4;
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            const float4 four = scales[4 * pair];
            const float columns[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int i = 8 * pair + j;
                const float sum = float(sums[i]) * row_scales[j / 2 % 2];
                acc[i] = PROMOTE == 1 ? fmaf(float(sums[i]), row_scales[j / 2 % 2], acc[i])
                                      : fmaf(sum, columns[j / 4 * 2 + j % 2], acc[i]);
            }
        }
#endif
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i)
        total += PROMOTE ? acc[i] : float(sums[i]);
    result[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
