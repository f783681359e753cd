// w4a16_linear: 16-bit activations times 4-bit weights, for layers that see few rows (modulation).
//
//   y = round(x . w^T + bias),  w = round16(codes * scales + zeros), one 16-bit fma a weight
//
//   x       (M, K)  16-bit float, contiguous, 16-byte aligned; K a multiple of 64
//   weight  [K/64][NP/16][lane] uint4 of unsigned codes, as in fragments.cuh but for the order in a word: bits 4 i and
//           16 + 4 i hold neighbors, columns 2 i and 2 i + 1
//   scales  [K/64][NP] pairs of 16-bit floats: scale low, zero high
//   bias    (NP,) 16-bit float, or null      y  (M, N) 16-bit float, contiguous
//   NP a multiple of COLUMNS.
//
// Grid: (NP / COLUMNS, M / 16 rounded up). A block makes 16 rows by COLUMNS columns; its warps split K and add up in a
// fixed order. The weight is read once for each 16 rows, so this is for M of a few dozen at most.
// -D: ELEMENT_BF16, COLUMNS (a multiple of 16), WARPS.
// Compute capability: 8.0 with bfloat16, 7.5 with float16. Deterministic. Reference: svdq_cli/runtime/ops/w4a16_linear.py.
#include "fragments.cuh"

constexpr int TILES = COLUMNS / 16;
constexpr int SUM_STRIDE = COLUMNS + 8;

// A 16-bit float whose last bit is worth 1, and its negative: or'ing a code into it adds the code.
#if ELEMENT_BF16
constexpr u32 ONES_PLACE = 0x43004300u, MINUS_ONES_PLACE = 0xc300c300u, ONE = 0x3f803f80u; // 128
#else
constexpr u32 ONES_PLACE = 0x64006400u, MINUS_ONES_PLACE = 0xe400e400u, ONE = 0x3c003c00u; // 1024
#endif

// 8 codes of one column as 16-bit weights, neighbors in a word.
__device__ __forceinline__ uint4 dequantize(u32 codes, u32 scale_and_zero)
{
    const u32 scale = (scale_and_zero & 0xffffu) * 0x10001u, zero = (scale_and_zero >> 16) * 0x10001u;
    u32 values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 integers = Element::fma2(((codes >> (4 * i)) & 0x000f000fu) | ONES_PLACE, ONE, MINUS_ONES_PLACE);
        values[i] = Element::fma2(integers, scale, zero);
    }
    return make_uint4(values[0], values[1], values[2], values[3]);
}

extern "C" __global__ void __launch_bounds__(WARPS* LANES)
    w4a16_linear(const uint4* x, const uint4* weight, const u32* scales, const u16* bias, u16* y, int m, int n, int np,
                 int k)
{
    __shared__ float sums[WARPS][16 * SUM_STRIDE];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int first_row = blockIdx.y * 16, first_column = blockIdx.x * COLUMNS;

    float acc[2 * TILES][4] = {};
    for (int group = warp; group < k / GROUP; group += WARPS) {
        const Rows16 rows = load_rows(x, first_row, group, m, k, lane);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int column = first_column + 16 * tile;
            const uint4 codes = weight[(size_t(group) * (np / 16) + column / 16) * LANES + lane];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const u32 scale = scales[size_t(group) * np + column + 8 * side + lane / 4];
                const uint4 halves[2] = {dequantize(word(codes, 2 * side), scale),
                                         dequantize(word(codes, 2 * side + 1), scale)};
                add_down(acc[2 * tile + side], rows, halves);
            }
        }
    }

#pragma unroll
    for (int octet = 0; octet < 2 * TILES; ++octet)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[warp][(8 * (i / 2) + lane / 4) * SUM_STRIDE + 8 * octet + 2 * (lane % 4) + i % 2] = acc[octet][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += WARPS * LANES) {
        const int row = first_row + i / COLUMNS, column = first_column + i % COLUMNS;
        if (row >= m || column >= n)
            continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            sum += sums[w][i / COLUMNS * SUM_STRIDE + i % COLUMNS];
        y[size_t(row) * n + column] = Element::from_float(bias ? sum + Element::to_float(bias[column]) : sum);
    }
}
