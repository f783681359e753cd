// The low-rank branch's hidden vectors of a block of rows: every warp sums over its groups of 64 columns, then the block adds
// the warps' sums in a fixed order. -D: RANK_CHUNK (ranks of a block: 0, 16, .., 64), WARPS.
#pragma once
#include "fragments.cuh"

constexpr int BLOCK_ROWS = 32;
constexpr int TILES = BLOCK_ROWS / 16;
constexpr int CHUNK_OCTETS = RANK_CHUNK / 8;
constexpr int SUMS = WARPS / 2; // hidden sums that shared memory holds at once
constexpr int SUM_STRIDE = RANK_CHUNK + 8; // 8 floats apart: eight rows' stores hit all banks

typedef float HiddenSums[TILES][CHUNK_OCTETS > 0 ? CHUNK_OCTETS : 1][4];

__device__ __forceinline__ void add_group(HiddenSums& sums, const Rows16 (&rows)[TILES], const uint4* down, int group,
                                          int first_octet, int octets, int lane)
{
#pragma unroll
    for (int octet = 0; octet < CHUNK_OCTETS; ++octet)
        if (first_octet + octet < octets) {
            const uint4* at = down + (size_t(group) * octets + first_octet + octet) * 2 * LANES + lane;
            const uint4 halves[2] = {at[0], at[LANES]};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                add_down(sums[tile][octet], rows[tile], halves);
        }
}

// The fragment of C as rows of `to` (stride SUM_STRIDE): stored, or added to what is there.
template <bool ADD>
__device__ __forceinline__ void put_sums(float* to, const HiddenSums& sums, int lane)
{
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int octet = 0; octet < CHUNK_OCTETS; ++octet)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float* at = to + (16 * tile + 8 * r + lane / 4) * SUM_STRIDE + 8 * octet + 2 * (lane % 4);
                at[0] = (ADD ? at[0] : 0.0f) + sums[tile][octet][2 * r];
                at[1] = (ADD ? at[1] : 0.0f) + sums[tile][octet][2 * r + 1];
            }
}

// Adds the warps' sums in a fixed order; afterwards any thread may ask `total`.
struct BlockSums {
    float (*sums)[BLOCK_ROWS * SUM_STRIDE];

    __device__ __forceinline__ void collect(const HiddenSums& mine, int warp, int lane) const
    {
        if (warp >= SUMS)
            put_sums<false>(sums[warp - SUMS], mine, lane);
        __syncthreads();
        if (warp < SUMS)
            put_sums<true>(sums[warp], mine, lane);
        __syncthreads();
    }

    __device__ __forceinline__ float total(int row, int rank) const
    {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
            sum += sums[i][row * SUM_STRIDE + rank];
        return sum;
    }
};
