// hopper_gelu_quantize: hopper_gemm, GELU, and what the next W4A4 layer does to its input, in one pass, MODE_EXACT. The
// activation between the two is never written. (The other modes need the largest number of a whole row before they can
// quantize any of it, which no block sees.)
//
//   a             = gelu(y),  y as hopper_gemm computes it, both rounded to 16 bit; gelu by tanh
//   codes, scales = quantize((a + shift) / next_smooth)
//   partial[b]    = a . next_down^T over the 128 features of tile b; hopper_reduce_hidden adds the tiles up
//
//   inputs as hopper_gemm; N (the next layer's K) a multiple of 64
//   next_inverse_smooth  (N,) float32, 1 / smooth      next_down  layout of fragments.cuh
//   next_codes, next_scales: layouts of hopper_tiles.cuh, for K = N       partial  (NP / 128, MP, next_rank) float32
//
// Grid and -D as hopper_gemm, and QUANTIZED_UNSIGNED. Compute capability: 9.0 (sm_90a). Deterministic.
// Reference: svdq_cli/experimental/hopper/reference.py, hopper_gelu_quantize.
#include "hopper_block.cuh"
#include "gelu.cuh"
#include "hopper_quantize.cuh"

static_assert(MODE == MODE_EXACT, "a row's scale needs the whole row");

constexpr int PAIR_BARRIERS = 1 + CONSUMERS; // the first of four: a warp meets the one that has its tokens' other features

// A lane's sums of 16 tokens by 16 ranks, two fragments of C.
typedef float RankSums[2][4];

__device__ __forceinline__ int sum_place(int octet, int i, int lane, int stride)
{
    return (8 * (i / 2) + lane / 4) * stride + 8 * octet + 2 * (lane % 4) + i % 2;
}

struct NextLayer {
    const float* inverse_smooth;
    const uint4* down;
    u8* codes;
    float* scales;
    float* partial;
    float shift;
    int n, rank, mp;
};

__device__ __forceinline__ void add_ranks(RankSums& sums, const Rows16& rows, const uint4* down)
{
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
        const uint4 halves[2] = {down[2 * octet * LANES], down[(2 * octet + 1) * LANES]};
        add_down(sums[octet], rows, halves);
    }
}

// Both warpgroups' shares of 16 tokens' hidden vectors, the second one's first. `scratch` is 1 KB that both know and the
// second one's warp owns.
__device__ __forceinline__ void store_partial(const NextLayer& next, const Rows16& rows, float* scratch, int token,
                                              int feature_tile, bool inside, const Consumer& me)
{
    const int group = (feature_tile * FEATURES + me.first_feature()) / GROUP;
#pragma unroll 1
    for (int first = 0; first < next.rank; first += 16) {
        RankSums sums = {};
        if (inside)
            add_ranks(sums, rows, next.down + (size_t(group) * (next.rank / 8) + first / 8) * 2 * LANES + me.lane);
        if (me.group == 1)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                scratch[sum_place(i / 4, i % 4, me.lane, 16)] = sums[i / 4][i % 4];
        meet(PAIR_BARRIERS + me.warp, CONSUMERS * LANES);
        float* to = next.partial + (size_t(feature_tile) * next.mp + token) * next.rank + first;
        if (me.group == 0)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                to[sum_place(i / 4, i % 4, me.lane, next.rank)] =
                    sums[i / 4][i % 4] + scratch[sum_place(i / 4, i % 4, me.lane, 16)];
        meet(PAIR_BARRIERS + me.warp, CONSUMERS * LANES);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_gelu_quantize(const u8* codes, const float* token_scales, const u8* hidden, const u8* weight,
                         const u8* weight_scales, const u8* up, const u16* bias, const float* next_inverse_smooth,
                         const uint4* next_down, u8* next_codes, float* next_scales, float* partial, float shift,
                         int token_tiles, int feature_tiles, int groups, int rank_steps, int n, int next_rank)
{
    const TileInput in = {codes,       token_scales,  hidden, weight,     weight_scales, up,
                          token_tiles, feature_tiles, groups, rank_steps};
    const NextLayer next = {next_inverse_smooth, next_down, next_codes, next_scales, partial, shift, n, next_rank,
                            token_tiles * TOKENS};
    run_block(in, bias, [&](int tile, const u8* staging, const Consumer& me) {
        const int feature_tile = in.feature_tile(tile), column = feature_tile * FEATURES + me.first_feature();
        const bool inside = column < next.n; // the last tile may be half padding
#pragma unroll 1 // unrolled, registers spill
        for (int first = 16 * me.warp; first < TOKENS; first += 64) {
            const int token = in.token_tile(tile) * TOKENS + first;
            Rows16 rows = staged_rows(staging, first, me.lane);
            apply_gelu(rows);
            if (inside) {
                float factors[16];
                load_lane_columns(factors, next.inverse_smooth + column, me.lane % 4);
                quantize_group(rows, factors, next.shift, next.codes, next.scales, token, column / GROUP, next.n / GROUP,
                               me.lane);
            }
            // The second warpgroup's rows of these tokens have been read by the one warp that needed them
            __syncwarp();
            float* scratch = reinterpret_cast<float*>(Shared{dynamic_shared()}.staging(1) + first * ROW_STRIDE);
            store_partial(next, rows, scratch, token, feature_tile, inside, me);
        }
    });
}
