// w4a4_gemm: the 4-bit product, the low-rank branch and the bias of a W4A4 layer in one pass.
//
//   y = round((sum over groups of codes . weight * scales * weight_scales) * outer + hidden . up^T + bias)
//
//   codes, scales, hidden, weight, weight_scales, up: layouts of fragments.cuh, all 16-byte aligned
//   outer  (NP,) float32, nvfp4 only         bias  (NP,) 16-bit float, or null
//   y      (M, N) 16-bit float, contiguous, 16-byte aligned; N a multiple of 8
//   K a multiple of 64, R of 16 (or 0), MP of BLOCK_M (of 128 where that is 256), NP of BLOCK_N.
//
// Grid: (MP / BLOCK_M rounded up, NP / BLOCK_N): neighbors in time share a weight tile, which stays in the L2 cache.
// Exactness: int4 sums are exact integers, each group is added by one float32 fma, groups in order. nvfp4 products are
// exact, their sums float32. The result is rounded once. Deterministic.
// -D: ELEMENT_BF16, PRECISION_NVFP4, BLOCK_SCALED (sm_120a), CODES_UNSIGNED, CODE_MMA (multiply_int4.cuh), BLOCK_M,
// BLOCK_N, WARP_M, STAGES, MIN_BLOCKS (that share a multiprocessor). Every size of a block gives the same bits.
// Compute capability: 8.0 with bfloat16, 7.5 with float16. Reference: svdq_cli/runtime/ops/w4a4_gemm.py.
#include "product.cuh"
#include "gemm_pipeline.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    w4a4_gemm(const uint4* codes, const uint4* scales, const uint4* hidden, const uint4* weight,
              const uint4* weight_scales, const uint4* up, const float* outer, const u16* bias, uint4* y, int m, int mp,
              int n, int np, int k, int rank)
{
    __shared__ uint4 memory[STAGES * STAGE_VECTORS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    const int row = blockIdx.x * BLOCK_M + warp_m * WARP_M, column = blockIdx.y * BLOCK_N + warp_n * WARP_N;

    const GemmInput in = {codes, scales, hidden, weight, weight_scales, up, mp, np, k / GROUP, rank / 16};
    WarpTile acc = {};
    multiply(acc, in, memory, outer + column, warp_m, warp_n, lane);
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        const Rows16 rows = rounded_rows(acc, tile, bias ? bias + column : nullptr, lane);
        store_rows(y, rows, row + 16 * tile, column, m, n, lane);
    }
}
