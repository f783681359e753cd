// Probe: are e4m3 wgmma sums of int4 codes the exact integers? One warpgroup, a tile of 64 x 128, `steps` steps of k32.
//
//   a  (steps, 2, 8, 8) uint4   core matrices of 64 rows: [step][k16][row / 8][row % 8]
//   b  (steps, 2, 16, 8) uint4  the same of 128 rows
//   c  (64, 128) float32
//
// Compute capability 9.0 (sm_90a).
#include "wgmma.cuh"

constexpr int LANES = 32, A_VECTORS = 128, B_VECTORS = 256;

extern "C" __global__ void __launch_bounds__(128)
    wgmma_exact(const uint4* a, const uint4* b, float* c, int steps)
{
    __shared__ alignas(128) uint4 rows[A_VECTORS];
    __shared__ alignas(128) uint4 columns[B_VECTORS];
    float d[64] = {};
    for (int step = 0; step < steps; ++step) {
        __syncthreads();
        for (int i = threadIdx.x; i < A_VECTORS; i += blockDim.x)
            rows[i] = a[step * A_VECTORS + i];
        for (int i = threadIdx.x; i < B_VECTORS; i += blockDim.x)
            columns[i] = b[step * B_VECTORS + i];
        fence_stores_before_wgmma();
        __syncthreads();
        wgmma_fence();
        wgmma_e4m3(d, matrix_descriptor(rows, 64 * 16, 8 * 16), matrix_descriptor(columns, 128 * 16, 8 * 16), 1);
        wgmma_commit();
        wgmma_wait<0>();
    }
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * warp + lane / 4 + 8 * (i / 2), column = 8 * j + 2 * (lane % 4) + i % 2;
            c[row * 128 + column] = d[4 * j + i];
        }
}
