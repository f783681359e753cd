// hopper_gemm: the product, the low-rank branch and the bias of a W4A4 layer in one pass, on Hopper's fp8 tensor cores.
//
//   y = round(product + hidden . up^T + bias)
//   MODE_EXACT  product = sum over groups of codes . weight * token_scales * weight_scales
//   MODE_W4A8   product = (sum over groups of codes . weight * weight_scales) * token_scales
//   MODE_FP8    product = codes . weight * token_scales * weight_scales
//
//   codes, token_scales, hidden, weight, weight_scales, up: layouts of hopper_tiles.cuh, all 16-byte aligned
//   bias   (NP,) 16-bit float, or null
//   y      (M, N) 16-bit float, contiguous, 16-byte aligned; N a multiple of 8
//
// Persistent: a block takes every gridDim.x-th tile of 128 features by TOKENS tokens. Grid: at most one block a
// multiprocessor. Dynamic shared memory: DYNAMIC_SHARED bytes.
// Exactness: svdq_cli/experimental/hopper/modes.py. The result is rounded once. Deterministic.
// -D: ELEMENT_BF16, MODE, TOKENS (128 or 192), STAGES, DYNAMIC_SHARED.
// Compute capability: 9.0 (sm_90a). Reference: svdq_cli/experimental/hopper/reference.py, hopper_gemm.
#include "hopper_block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_gemm(const u8* codes, const float* token_scales, const u8* hidden, const u8* weight, const u8* weight_scales,
                const u8* up, const u16* bias, uint4* y, int token_tiles, int feature_tiles, int groups, int rank_steps,
                int m, int n)
{
    const TileInput in = {codes,       token_scales,  hidden, weight,     weight_scales, up,
                          token_tiles, feature_tiles, groups, rank_steps};
    run_block(in, bias, [&](int tile, const u8* staging, const Consumer& me) {
        const int row = in.token_tile(tile) * TOKENS, column = in.feature_tile(tile) * FEATURES + me.first_feature();
        for (int first = 16 * me.warp; first < TOKENS; first += 64)
            store_rows(y, staged_rows(staging, first, me.lane), row + first, column, m, n, me.lane);
    });
}
