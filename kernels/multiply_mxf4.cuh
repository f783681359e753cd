// The 4-bit product of one step, nvfp4, with the block-scaled mma of sm_120a: codes and scales go in as they are.
// Compiles; never run on hardware.
#pragma once
#include "gemm_tile.cuh"

#if !HAS_MXF4
#error "multiply_mxf4 needs a target with mxf4nvf4 mma: compile for sm_120a"
#endif

// Where a lane's scales begin among those of the warp's columns: those of column 8 n + g at [n].
__device__ __forceinline__ int first_column_scale(int lane) { return 8 * (lane / 4); }

__device__ __forceinline__ void multiply_group(WarpTile& acc, const Operands& at, int lane)
{
    const uint4* column_scales = reinterpret_cast<const uint4*>(at.column_scales);
    const bool lower = lane % 2; // lane t = 0 gives the scales of row g, lane t = 1 those of row g + 8
    u32 a[ROW_TILES][4], row_scales[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const uint4 four = *reinterpret_cast<const uint4*>(at.row_scales + m / 2 * SCALED_ROWS);
        const u32 upper_scales = word(four, m % 2 * 2), lower_scales = word(four, m % 2 * 2 + 1);
        row_scales[m] = lower ? lower_scales : upper_scales;
        const uint4 codes = at.rows[m * LANES];
        a[m][0] = codes.x, a[m][1] = codes.y, a[m][2] = codes.z, a[m][3] = codes.w;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const uint4 codes = at.columns[n / 2 * LANES];
        const u32 b[2] = {word(codes, n % 2 * 2), word(codes, n % 2 * 2 + 1)};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
            mma_mxf4(acc[m][n], a[m], b, row_scales[m], word(column_scales[n / 4], n % 4));
    }
}

// The outer scale of every column, `outer` at the warp's first one.
__device__ __forceinline__ void finish_product(WarpTile& acc, const float* outer, int lane)
{
    scale_columns(acc, outer, 1.0f, lane);
}
