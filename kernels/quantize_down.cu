// quantize_down: what a W4A4 layer does to its input, in one read of it.
//
//   codes, scales = quantize((x + shift) / smooth)      per row and group (64 columns int4, 16 nvfp4)
//   hidden        = x . down^T                          (M, R), rounded to 16 bit; reads the raw x
//
//   x               (M, K)  16-bit float, contiguous, 16-byte aligned; K a multiple of 64
//   inverse_smooth  (K,)    float32, 1 / smooth
//   down, codes, scales, hidden: layouts of fragments.cuh; MP a multiple of 32. Rows from M on are those of x = 0.
//   partial         (splits, MP, R) float32; used instead of `hidden` when gridDim.z > 1: reduce_hidden adds them up.
//
// Grid: (MP / 32, chunks of R, parts of K). A block takes 32 rows; its warps take turns at groups of 64 columns. Ranks
// are cut into chunks of RANK_CHUNK; only the first chunk's blocks quantize.
// -D: ELEMENT_BF16, PRECISION_NVFP4, QUANTIZED_UNSIGNED, RANK_CHUNK (0, 16, .., 64), WARPS.
// Compute capability: 8.0 with bfloat16, 7.5 with float16. Deterministic: sums have one order.
// Reference: svdq_cli/runtime/ops/quantize_down.py.
#include "hidden_sums.cuh"
#include "quantize.cuh"

// One 16 x 16 tile of hidden in the layout of fragments.cuh, by one warp.
__device__ __forceinline__ uint4 hidden_fragment(const BlockSums& block, int tile, int rank_tile, int lane)
{
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 16 * tile + lane / 4 + 8 * (i % 2), rank = 16 * rank_tile + 8 * (i / 2) + 2 * (lane % 4);
        words[i] = Element::pack(block.total(row, rank), block.total(row, rank + 1));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(WARPS* LANES)
    quantize_down(const uint4* x, const float* inverse_smooth, const uint4* down, uint4* codes, Scale* scales,
                  uint4* hidden, float* partial, float shift, int m, int mp, int k, int rank)
{
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int first_tile = blockIdx.x * TILES, first_octet = blockIdx.y * CHUNK_OCTETS, octets = rank / 8;
    const int groups = k / GROUP;
    const int begin = groups * blockIdx.z / gridDim.z, end = groups * (blockIdx.z + 1) / gridDim.z;

    HiddenSums sums = {};
    for (int group = begin + warp; group < end; group += WARPS) {
        Rows16 rows[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            rows[tile] = load_rows(x, 16 * (first_tile + tile), group, m, k, lane);
        add_group(sums, rows, down, group, first_octet, octets, lane);
        if (blockIdx.y > 0)
            continue;
        float factors[16];
        load_lane_columns(factors, inverse_smooth + group * GROUP, lane % 4);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            store_quantized(quantize_rows(rows[tile], factors, shift), codes, scales, first_tile + tile, group, mp, lane);
    }

    if constexpr (RANK_CHUNK > 0) {
        __shared__ float memory[SUMS][BLOCK_ROWS * SUM_STRIDE];
        const BlockSums block = {memory};
        block.collect(sums, warp, lane);
        const int ranks = min(RANK_CHUNK, rank - 8 * first_octet);
        if (gridDim.z == 1) {
            for (int i = warp; i < TILES * (ranks / 16); i += WARPS) {
                const int tile = i % TILES, rank_tile = i / TILES;
                const size_t at = size_t(first_octet / 2 + rank_tile) * (mp / 16) + first_tile + tile;
                hidden[at * LANES + lane] = hidden_fragment(block, tile, rank_tile, lane);
            }
        } else {
            for (int i = threadIdx.x; i < BLOCK_ROWS * ranks; i += WARPS * LANES) {
                const int row = i / ranks, r = i % ranks;
                const size_t at = size_t(blockIdx.z) * mp + blockIdx.x * BLOCK_ROWS + row;
                partial[at * rank + 8 * first_octet + r] = block.total(row, r);
            }
        }
    }
}
