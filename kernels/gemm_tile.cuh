// How the GEMM's block is cut into warps, and what a warp sees of one step. A warp computes WARP_M rows (-D: 32, or 64,
// which halves what a row and a column cost in scales and loads) by 64 columns: then the 64 columns that the next layer
// quantizes together are in one warp.
#pragma once
#include "fragments.cuh"

constexpr int WARP_N = 64;
constexpr int WARPS_N = BLOCK_N / WARP_N;
constexpr int THREADS = BLOCK_M / WARP_M * WARPS_N * LANES;
constexpr int ROW_TILES = WARP_M / 16; // of a warp
constexpr int SCALED_ROWS = 32; // whose scales are stored together (row_scale_slot): four are a lane's
static_assert(WARP_M % SCALED_ROWS == 0 && BLOCK_M % WARP_M == 0, "whole warps");

// [m][n][i]: row 16 m + 8 (i / 2) + g, column 8 n + 2 t + i % 2. Float32.
typedef float WarpTile[ROW_TILES][8][4];

// A lane's share of one step in shared memory: its vectors of ROW_TILES tiles of 16 rows and of 4 of 16 columns, LANES
// apart, its rows' scales, four of every SCALED_ROWS, and its columns' (first_column_scale).
struct Operands {
    const uint4* rows;
    const uint4* columns;
    const Scale* row_scales;
    const Scale* column_scales;
};

// acc += rows (WARP_M x 16) . columns (64 x 16)^T in 16 bit: one step of the low-rank branch.
__device__ __forceinline__ void add_low_rank(WarpTile& acc, const Operands& at)
{
    uint4 rows[ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
        rows[m] = at.rows[m * LANES];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const uint4 columns = at.columns[pair * LANES];
        const u32 b[2][2] = {{columns.x, columns.y}, {columns.z, columns.w}};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            const u32 a[4] = {rows[m].x, rows[m].y, rows[m].z, rows[m].w};
            Element::mma(acc[m][2 * pair], a, b[0]);
            Element::mma(acc[m][2 * pair + 1], a, b[1]);
        }
    }
}

// acc *= factors[column], `factors` at the warp's first column.
__device__ __forceinline__ void scale_columns(WarpTile& acc, const float* factors, float unit, int lane)
{
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 pair = *reinterpret_cast<const float2*>(factors + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                acc[m][n][i] *= (i % 2 ? pair.y : pair.x) * unit;
    }
}

// acc + bias of tile m as 16-bit values, in the lane order of Rows16. `bias` at the warp's first column, or null.
__device__ __forceinline__ Rows16 rounded_rows(const WarpTile& acc, int m, const u16* bias, int lane)
{
    Rows16 rows;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = 4 * half + i;
                const u32 b = bias ? *reinterpret_cast<const u32*>(bias + 8 * n + 2 * (lane % 4)) : 0;
                pairs[i] = Element::pack(acc[m][n][2 * r] + low_float(b), acc[m][n][2 * r + 1] + high_float(b));
            }
            transpose_in_quad(pairs, lane % 4);
            rows.part[half][r] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    return rows;
}
