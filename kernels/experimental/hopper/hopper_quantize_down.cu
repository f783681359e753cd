// hopper_quantize_down: what a W4A4 layer does to its input, for hopper_gemm.
//
//   codes, token_scales = quantize((x + shift) / smooth)   MODE_EXACT: per row and 64 columns; else per row
//   hidden              = x . down^T                       (M, R), rounded to 16 bit; reads the raw x
//
//   x               (M, K)  16-bit float, contiguous, 16-byte aligned; K a multiple of 64
//   inverse_smooth  (K,)    float32, 1 / smooth
//   down            layout of fragments.cuh, R a multiple of 32
//   codes, token_scales, hidden: layouts of hopper_tiles.cuh. Rows from M on are those of x = 0.
//   partial         (splits, MP, R) float32; used instead of `hidden` when gridDim.z > 1: hopper_reduce_hidden adds them up.
//
// Grid: (MP / 32, chunks of R, parts of K; 1 part unless MODE_EXACT). x is read once in MODE_EXACT. A scale of a whole row
// must be known before its first code: the other modes read x twice, the second time from the L2 cache where the rows of all
// running blocks fit into it.
// -D: ELEMENT_BF16, MODE, TOKENS, QUANTIZED_UNSIGNED (MODE_EXACT), RANK_CHUNK (0, 16, .., 64), WARPS, MIN_BLOCKS (that
// share a multiprocessor).
// Compute capability: 9.0 (sm_90a). Deterministic. Reference: svdq_cli/experimental/hopper/reference.py, hopper_quantize_down.
#include "hidden_sums.cuh"
#include "hopper_quantize.cuh"

struct Quantizer {
    const uint4* x;
    const float* inverse_smooth;
    u8* codes;
    float* token_scales;
    float shift;
    int m, k;

    __device__ __forceinline__ Rows16 rows(int first_row, int group, int lane) const
    {
        return load_rows(x, first_row, group, m, k, lane);
    }
};

#if MODE == MODE_EXACT

__device__ __forceinline__ void quantize_rows_of(const Quantizer& q, const Rows16 (&rows)[TILES], int first_row, int group,
                                                 int lane)
{
    float factors[16];
    load_lane_columns(factors, q.inverse_smooth + group * GROUP, lane % 4);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        quantize_group(rows[tile], factors, q.shift, q.codes, q.token_scales, first_row + 16 * tile, group, q.k / GROUP,
                       lane);
}

#else

// The largest magnitudes of a lane's rows g + 8 r of each tile of 16, so far.
typedef float Peaks[TILES][2];

__device__ __forceinline__ void see_peaks(Peaks& peaks, const Quantizer& q, const Rows16 (&rows)[TILES], int group, int lane)
{
    float factors[16];
    load_lane_columns(factors, q.inverse_smooth + group * GROUP, lane % 4);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float v[16];
            smooth_lane(v, rows[tile], r, factors, q.shift);
            peaks[tile][r] = max_magnitude(peaks[tile][r], quad_peak(v));
        }
}

// The block's peaks in all lanes that want them: every warp has seen a part of the columns.
__device__ __forceinline__ void share_peaks(Peaks& peaks, float (&shared)[WARPS][BLOCK_ROWS], int warp, int lane)
{
    const int row = lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i)
        if (lane % 4 == 0)
            shared[warp][8 * i + row] = peaks[i / 2][i % 2];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i)
#pragma unroll
        for (int other = 0; other < WARPS; ++other)
            peaks[i / 2][i % 2] = max_magnitude(peaks[i / 2][i % 2], shared[other][8 * i + row]);
}

__device__ __forceinline__ void quantize_block(const Quantizer& q, const Peaks& peaks, int first_row, int warp, int lane)
{
    float inverse[TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        const float scale = peaks[i / 2][i % 2] * (1.0f / MOST_E4M3);
        inverse[i / 2][i % 2] = reciprocal(scale);
        const int token = first_row + 8 * i + lane / 4;
        if (warp == 0 && lane % 4 == 0)
            q.token_scales[size_t(token / TOKENS) * TOKENS + token_slot(token % TOKENS)] = scale * TOKEN_UNIT;
    }
    for (int group = warp; group < q.k / GROUP; group += WARPS) {
        float factors[16];
        load_lane_columns(factors, q.inverse_smooth + group * GROUP, lane % 4);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            quantize_with(q.rows(first_row + 16 * tile, group, lane), factors, q.shift, inverse[tile], q.codes,
                          first_row + 16 * tile, group, q.k / GROUP, lane);
    }
}

#endif

// 8 ranks of one row's hidden vector, in the layout of hopper_tiles.cuh.
__device__ __forceinline__ void store_hidden(uint4* hidden, const BlockSums& block, int row, int rank, int first_row,
                                             int first_rank, int ranks)
{
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = Element::pack(block.total(row, rank + 2 * i), block.total(row, rank + 2 * i + 1));
    const int at = (first_rank + rank) / 8;
    hidden[code_vector(first_row + row, at / CHUNKS, ranks / RANK_STEP, at % CHUNKS)] =
        make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store_sums(const BlockSums& block, uint4* hidden, float* partial, int mp, int rank)
{
    const int first_row = blockIdx.x * BLOCK_ROWS, first_rank = blockIdx.y * RANK_CHUNK;
    const int ranks = min(RANK_CHUNK, rank - first_rank);
    if (gridDim.z == 1) {
        for (int i = threadIdx.x; i < BLOCK_ROWS * ranks / 8; i += WARPS * LANES)
            store_hidden(hidden, block, i % BLOCK_ROWS, i / BLOCK_ROWS * 8, first_row, first_rank, rank);
    } else {
        for (int i = threadIdx.x; i < BLOCK_ROWS * ranks; i += WARPS * LANES) {
            const size_t row = size_t(blockIdx.z) * mp + first_row + i / ranks;
            partial[row * rank + first_rank + i % ranks] = block.total(i / ranks, i % ranks);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS* LANES, MIN_BLOCKS)
    hopper_quantize_down(const uint4* x, const float* inverse_smooth, const uint4* down, u8* codes, float* token_scales,
                         uint4* hidden, float* partial, float shift, int m, int mp, int k, int rank)
{
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, first_row = blockIdx.x * BLOCK_ROWS;
    const int first_octet = blockIdx.y * CHUNK_OCTETS, groups = k / GROUP;
    const int begin = groups * blockIdx.z / gridDim.z, end = groups * (blockIdx.z + 1) / gridDim.z;
    const Quantizer quantizer = {x, inverse_smooth, codes, token_scales, shift, m, k};

    HiddenSums sums = {};
#if MODE != MODE_EXACT
    Peaks peaks = {};
#endif
    for (int group = begin + warp; group < end; group += WARPS) {
        Rows16 rows[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            rows[tile] = quantizer.rows(first_row + 16 * tile, group, lane);
        add_group(sums, rows, down, group, first_octet, rank / 8, lane);
        if (blockIdx.y > 0)
            continue;
#if MODE == MODE_EXACT
        quantize_rows_of(quantizer, rows, first_row, group, lane);
#else
        see_peaks(peaks, quantizer, rows, group, lane);
#endif
    }
#if MODE != MODE_EXACT
    if (blockIdx.y == 0) {
        __shared__ float shared[WARPS][BLOCK_ROWS];
        share_peaks(peaks, shared, warp, lane);
        quantize_block(quantizer, peaks, first_row, warp, lane);
    }
#endif
    if constexpr (RANK_CHUNK > 0) {
        __shared__ float memory[SUMS][BLOCK_ROWS * SUM_STRIDE];
        const BlockSums block = {memory};
        block.collect(sums, warp, lane);
        store_sums(block, hidden, partial, mp, rank);
    }
}
