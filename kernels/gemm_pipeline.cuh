// The GEMM's main loop: a ring of STAGES steps in shared memory, filled by asynchronous copies STAGES - 1 steps ahead.
// A step is 64 columns of codes with their scales, or 16 ranks of the low-rank branch: both are tile_vectors(rows)
// uint4 for each operand, so the branch rides in the same pipeline and costs R / 16 steps more.
#pragma once
#include "gemm_tile.cuh"

constexpr int ROW_VECTORS = tile_vectors(BLOCK_M), COLUMN_VECTORS = tile_vectors(BLOCK_N);
constexpr int ROW_SCALE_VECTORS = BLOCK_M * sizeof(Scale) / 16, COLUMN_SCALE_VECTORS = BLOCK_N * sizeof(Scale) / 16;
constexpr int STAGE_VECTORS = ROW_VECTORS + COLUMN_VECTORS + ROW_SCALE_VECTORS + COLUMN_SCALE_VECTORS;

// Everything in global memory that the main loop reads, in the layouts of fragments.cuh. `rows` is MP, `columns` NP.
struct GemmInput {
    const uint4* codes;
    const uint4* scales;
    const uint4* hidden;
    const uint4* weight;
    const uint4* weight_scales;
    const uint4* up;
    int rows, columns, groups, rank_tiles;

    __device__ __forceinline__ int steps() const { return groups + rank_tiles; }
};

// The block's threads copy `count` consecutive vectors.
__device__ __forceinline__ void copy_vectors(uint4* shared, const uint4* global, int count)
{
    for (int i = threadIdx.x; i < count; i += THREADS)
        copy_async_16(shared + i, global + i);
}

struct Ring {
    uint4* memory;

    __device__ __forceinline__ uint4* stage(int step) const { return memory + step % STAGES * STAGE_VECTORS; }

    // Start the copies of one step; a step past the end starts none, but still counts as a group of copies.
    __device__ __forceinline__ void fetch(const GemmInput& in, int step) const
    {
        if (step < in.steps()) {
            const bool codes = step < in.groups;
            const int index = codes ? step : step - in.groups;
            const size_t row = size_t(index) * in.rows + blockIdx.x * BLOCK_M;
            const size_t column = size_t(index) * in.columns + blockIdx.y * BLOCK_N;
            uint4* to = stage(step);
            copy_vectors(to, (codes ? in.codes : in.hidden) + row * 2, ROW_VECTORS);
            copy_vectors(to + ROW_VECTORS, (codes ? in.weight : in.up) + column * 2, COLUMN_VECTORS);
            if (codes) {
                to += ROW_VECTORS + COLUMN_VECTORS;
                copy_vectors(to, in.scales + row * sizeof(Scale) / 16, ROW_SCALE_VECTORS);
                copy_vectors(to + ROW_SCALE_VECTORS, in.weight_scales + column * sizeof(Scale) / 16,
                             COLUMN_SCALE_VECTORS);
            }
        }
        commit_copies();
    }

    // Wait for a step, and start the one whose place in the ring the previous step has left.
    __device__ __forceinline__ void advance(const GemmInput& in, int step) const
    {
        wait_copies<STAGES - 2>();
        __syncthreads();
        fetch(in, step + STAGES - 1);
    }

    // What the warp in row `warp_m`, column `warp_n` of the block reads of a step.
    __device__ __forceinline__ Operands operands(int step, int warp_m, int warp_n) const
    {
        const uint4* at = stage(step);
        const uint4* scales = at + ROW_VECTORS + COLUMN_VECTORS;
        return {at + warp_m * tile_vectors(WARP_M), at + ROW_VECTORS + warp_n * tile_vectors(WARP_N),
                reinterpret_cast<const Scale*>(scales) + warp_m * WARP_M,
                reinterpret_cast<const Scale*>(scales + ROW_SCALE_VECTORS) + warp_n * WARP_N};
    }
};

// acc = (4-bit product) * outer + hidden . up^T. `outer` at the warp's first column.
__device__ __forceinline__ void multiply(WarpTile& acc, const GemmInput& in, const Ring& ring, const float* outer,
                                         int warp_m, int warp_n, int lane)
{
    for (int step = 0; step < STAGES - 1; ++step)
        ring.fetch(in, step);
    int step = 0;
    for (; step < in.groups; ++step) {
        ring.advance(in, step);
        multiply_group(acc, ring.operands(step, warp_m, warp_n), lane);
    }
    finish_product(acc, outer, lane);
    for (; step < in.steps(); ++step) {
        ring.advance(in, step);
        add_low_rank(acc, ring.operands(step, warp_m, warp_n), lane);
    }
}
