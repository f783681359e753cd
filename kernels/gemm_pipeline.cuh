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
};

// The stage after `stage` in the ring.
__device__ __forceinline__ uint4* next_stage(uint4* memory, uint4* stage)
{
    return stage == memory + (STAGES - 1) * STAGE_VECTORS ? memory : stage + STAGE_VECTORS;
}

// The block's threads share the copies of a step evenly.
constexpr int ROW_COPIES = ROW_VECTORS / THREADS, COLUMN_COPIES = COLUMN_VECTORS / THREADS;
constexpr int SCALE_VECTORS = ROW_SCALE_VECTORS + COLUMN_SCALE_VECTORS;
static_assert(ROW_COPIES * THREADS == ROW_VECTORS && COLUMN_COPIES * THREADS == COLUMN_VECTORS, "whole copies");
static_assert(SCALE_VECTORS <= THREADS, "at most one vector of scales a thread");

// MP is a multiple of LEAST_ROWS (or of BLOCK_M where that is less), so the last block of 256 rows may have only half of
// them. Its other half reads the first half's rows again: nothing outside is read, and no such row is stored.
constexpr int LEAST_ROWS = 128;
constexpr bool MAY_BE_HALF = BLOCK_M > LEAST_ROWS;
static_assert(!MAY_BE_HALF || (BLOCK_M == 2 * LEAST_ROWS && ROW_COPIES == 2), "a thread copies of either half once");

// Whether the block has all of its rows, of MP `rows`.
__device__ __forceinline__ bool is_whole(int rows) { return !MAY_BE_HALF || int(blockIdx.x + 1) * BLOCK_M <= rows; }

// Where a thread's copies begin in step 0, and how far its rows' are apart: indices of vectors. 32 bits hold them
// (runtime/ops/records.py sees to that), so that an address costs one instruction: the loop that multiplies has none to
// spare.
struct Share {
    int row, between_rows, column;
    int scale; // among the block's: the first threads copy the rows', the next ones the columns'

    __device__ __forceinline__ explicit Share(int rows)
    {
        constexpr int HALF = ROW_SCALE_VECTORS / 2;
        const bool whole = is_whole(rows);
        const int i = threadIdx.x;
        row = blockIdx.x * BLOCK_M * 2 + i;
        between_rows = whole ? THREADS : 0;
        column = blockIdx.y * BLOCK_N * 2 + i;
        scale = !whole && i >= HALF && i < ROW_SCALE_VECTORS ? i - HALF : i;
    }
};

// `apart`: how far a thread's vectors are from each other in global memory.
template <int COUNT>
__device__ __forceinline__ void copy_share(uint4* stage, const uint4* from, int index, int apart)
{
#pragma unroll
    for (int part = 0; part < COUNT; ++part)
        copy_async_16(stage + threadIdx.x + part * THREADS, from + (index + part * apart));
}

// A thread's vector of the scales of a group.
__device__ __forceinline__ void copy_scales(uint4* stage, const GemmInput& in, int group, const Share& mine)
{
    constexpr int ENTRIES = 16 / sizeof(Scale); // of a vector
    const int i = threadIdx.x;
    const bool of_rows = i < ROW_SCALE_VECTORS;
    const int first = of_rows ? group * in.rows + int(blockIdx.x) * BLOCK_M : group * in.columns + int(blockIdx.y) * BLOCK_N;
    const uint4* from = of_rows ? in.scales : in.weight_scales - ROW_SCALE_VECTORS;
    copy_async_16(stage + i, from + (first / ENTRIES + mine.scale));
}

// Start the copies of a step. One past the end starts none, but still counts as a group of copies.
__device__ __forceinline__ void fetch(const GemmInput& in, int step, uint4* stage, const Share& mine)
{
    if (step < in.groups) {
        copy_share<ROW_COPIES>(stage, in.codes, step * (in.rows * 2) + mine.row, mine.between_rows);
        copy_share<COLUMN_COPIES>(stage + ROW_VECTORS, in.weight, step * (in.columns * 2) + mine.column, THREADS);
        if (threadIdx.x < SCALE_VECTORS)
            copy_scales(stage + ROW_VECTORS + COLUMN_VECTORS, in, step, mine);
    } else if (step < in.groups + in.rank_tiles) {
        const int tile = step - in.groups;
        copy_share<ROW_COPIES>(stage, in.hidden, tile * (in.rows * 2) + mine.row, mine.between_rows);
        copy_share<COLUMN_COPIES>(stage + ROW_VECTORS, in.up, tile * (in.columns * 2) + mine.column, THREADS);
    }
    commit_copies();
}

// Where a lane finds its operands in a stage, in bytes. They are opaque, so that the loop keeps them: the compiler would
// rather work them out again in every step.
struct LaneOffsets {
    int rows, columns, row_scales, column_scales;

    __device__ __forceinline__ LaneOffsets(int warp_m, int warp_n, int lane)
    {
        constexpr int SCALES = (ROW_VECTORS + COLUMN_VECTORS) * 16, ENTRY = sizeof(Scale);
        rows = opaque((warp_m * tile_vectors(WARP_M) + lane) * 16);
        columns = opaque((ROW_VECTORS + warp_n * tile_vectors(WARP_N) + lane) * 16);
        row_scales = opaque(SCALES + (warp_m * WARP_M + lane / 4 * 4) * ENTRY);
        column_scales = opaque(SCALES + ROW_SCALE_VECTORS * 16 + (warp_n * WARP_N + first_column_scale(lane)) * ENTRY);
    }

    __device__ __forceinline__ Operands in(const uint4* stage) const
    {
        const u8* at = reinterpret_cast<const u8*>(stage);
        return {reinterpret_cast<const uint4*>(at + rows), reinterpret_cast<const uint4*>(at + columns),
                reinterpret_cast<const Scale*>(at + row_scales), reinterpret_cast<const Scale*>(at + column_scales)};
    }
};

// acc = (4-bit product) * outer + hidden . up^T. `outer` at the warp's first column; `memory`: STAGES * STAGE_VECTORS.
__device__ __forceinline__ void multiply(WarpTile& acc, const GemmInput& in, uint4* memory, const float* outer,
                                         int warp_m, int warp_n, int lane)
{
    constexpr int AHEAD = STAGES - 1;
    const LaneOffsets offsets(warp_m, warp_n, lane);
    const Share mine(in.rows);
    for (int step = 0; step < AHEAD; ++step)
        fetch(in, step, memory + step * STAGE_VECTORS, mine);
    uint4* stage = memory;                        // read next
    uint4* free = memory + AHEAD * STAGE_VECTORS; // filled next
    int step = 0;
    for (; step < in.groups; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads(); // the step is there, and the one before it has been read
        fetch(in, step + AHEAD, free, mine);
        multiply_group(acc, offsets.in(stage), lane);
        free = stage;
        stage = next_stage(memory, stage);
    }
    finish_product(acc, outer, lane);
    for (; step < in.groups + in.rank_tiles; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        fetch(in, step + AHEAD, free, mine);
        add_low_rank(acc, offsets.in(stage));
        free = stage;
        stage = next_stage(memory, stage);
    }
}
