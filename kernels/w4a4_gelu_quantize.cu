// w4a4_gelu_quantize: a W4A4 layer, GELU, and what the next W4A4 layer does to its input, in one pass. The activation
// between the two is never written.
//
//   a             = gelu(y),  y as w4a4_gemm computes it, both rounded to 16 bit; gelu by tanh
//   codes, scales = quantize((a + shift) / next_smooth)
//   partial[b]    = a . next_down^T over the columns of block b; reduce_hidden adds the blocks up
//
//   inputs as w4a4_gemm; N (the next layer's K) a multiple of 64
//   next_inverse_smooth  (N,) float32, 1 / smooth
//   next_down, next_codes, next_scales: layouts of fragments.cuh, for K = N and the next layer's rank
//   partial  (NP / BLOCK_N, MP, next_rank) float32
//
// Grid and -D as w4a4_gemm, and QUANTIZED_UNSIGNED. Compute capability: 8.0 with bfloat16, 7.5 with float16.
// Deterministic: sums have one order. Reference: svdq_cli/runtime/ops/w4a4_gelu_quantize.py.
#include "product.cuh"
#include "gemm_pipeline.cuh"
#include "gelu.cuh"
#include "quantize.cuh"

constexpr int RANK_STEP = 16; // ranks between two barriers
static_assert(BLOCK_M * RANK_STEP * sizeof(float) * (WARPS_N - 1) <= sizeof(uint4) * STAGES * STAGE_VECTORS, "memory");

// Rows of the block by RANK_STEP ranks, from the C fragments of one warp.
template <bool ADD>
__device__ __forceinline__ void put_hidden(float* to, const float* from, const float (&hidden)[ROW_TILES][2][4], int stride,
                                           int lane)
{
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int octet = 0; octet < 2; ++octet)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * tile + 8 * (i / 2) + lane / 4, rank = 8 * octet + 2 * (lane % 4) + i % 2;
                to[row * stride + rank] = hidden[tile][octet][i] + (ADD ? from[row * RANK_STEP + rank] : 0.0f);
            }
}

__device__ __forceinline__ void add_octets(float (&hidden)[ROW_TILES][2][4], const Rows16 (&rows)[ROW_TILES], const uint4* down)
{
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
        const uint4 halves[2] = {down[2 * octet * LANES], down[(2 * octet + 1) * LANES]};
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
            add_down(hidden[tile][octet], rows[tile], halves);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    w4a4_gelu_quantize(const uint4* codes, const uint4* scales, const uint4* hidden, const uint4* weight,
                       const uint4* weight_scales, const uint4* up, const float* outer, const u16* bias,
                       const float* next_inverse_smooth, const uint4* next_down, uint4* next_codes, Scale* next_scales,
                       float* partial, float shift, int mp, int n, int np, int k, int rank, int next_rank)
{
    __shared__ uint4 memory[STAGES * STAGE_VECTORS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    const int row = blockIdx.x * BLOCK_M + warp_m * WARP_M, column = blockIdx.y * BLOCK_N + warp_n * WARP_N;
    // The last block may be half padding either way
    const bool inside = column < n && (!MAY_BE_HALF || row < mp);

    const GemmInput in = {codes, scales, hidden, weight, weight_scales, up, mp, np, k / GROUP, rank / 16};
    WarpTile acc = {};
    multiply(acc, in, memory, outer + column, warp_m, warp_n, lane);

    Rows16 rows[ROW_TILES];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        rows[tile] = rounded_rows(acc, tile, bias ? bias + column : nullptr, lane);
        apply_gelu(rows[tile]);
    }
    const int group = column / GROUP;
    if (inside) {
        float factors[16];
        load_lane_columns(factors, next_inverse_smooth + column, lane % 4);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
            store_quantized(quantize_rows(rows[tile], factors, shift), next_codes, next_scales, row / 16 + tile, group,
                            mp, lane);
    }

    // The warps of a row of the block add their columns' shares, the last first.
    float* shared = reinterpret_cast<float*>(memory) + warp_m * WARP_M * RANK_STEP;
    for (int first = 0; first < next_rank; first += RANK_STEP) {
        float sums[ROW_TILES][2][4] = {};
        if (inside)
            add_octets(sums, rows, next_down + (size_t(group) * (next_rank / 8) + first / 8) * 2 * LANES + lane);
        for (int turn = WARPS_N - 1; turn > 0; --turn) {
            __syncthreads();
            if (warp_n == turn) {
                if (turn == WARPS_N - 1)
                    put_hidden<false>(shared, shared, sums, RANK_STEP, lane);
                else
                    put_hidden<true>(shared, shared, sums, RANK_STEP, lane);
            }
        }
        __syncthreads();
        if (warp_n == 0 && (!MAY_BE_HALF || row < mp))
            put_hidden<true>(partial + (size_t(blockIdx.y) * mp + row) * next_rank + first, shared, sums, next_rank, lane);
    }
}
