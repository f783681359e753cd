// The 4-bit product of one step, int4: exact integer sums over a group of 64, then one float32 fma per group.
#pragma once
#include "gemm_tile.cuh"

// Which instruction multiplies the codes (-D CODE_MMA). All give the same integers.
#define MMA_S4_K32 0 // sm_75
#define MMA_S4_K64 1 // sm_80, 86, 89
#define MMA_S8_K32 2 // sm_80 and newer; the one for Hopper and Blackwell, which have no 4-bit integer unit

// Sums start at the bits of 1.5 * 2^23, a float whose last bit is worth 1: an int32 sum on top of them is the float
// 1.5 * 2^23 + sum. So sum * scale is one fma, exact: (start + sum) * scale - start * scale has at most 13 + 11 significant
// bits, as has start * scale. The largest sum, 64 * 15 * 8 codes (times 256 where both sides are in the upper half of a
// byte), is below 2^22.
constexpr int SUM_START = 0x4b400000;
constexpr float SUM_START_VALUE = 12582912.0f;
constexpr float SUM_UNIT = CODE_MMA == MMA_S8_K32 ? 1.0f / 256.0f : 1.0f;

#if CODE_MMA == MMA_S8_K32
// Codes as the upper halves of bytes: 16 times their value, signed or not. The even and the odd codes of a word make
// two words; k is permuted, equally on both sides.
struct RowCodes {
    u32 words[2][4]; // [half of the group]
};
struct ColumnCodes {
    u32 words[2][2];
};

__device__ __forceinline__ u32 even_codes(u32 codes) { return (codes << 4) & 0xf0f0f0f0u; }
__device__ __forceinline__ u32 odd_codes(u32 codes) { return codes & 0xf0f0f0f0u; }

__device__ __forceinline__ RowCodes row_codes(const uint4& c)
{
    return {{{even_codes(c.x), even_codes(c.y), odd_codes(c.x), odd_codes(c.y)},
             {even_codes(c.z), even_codes(c.w), odd_codes(c.z), odd_codes(c.w)}}};
}

__device__ __forceinline__ ColumnCodes column_codes(u32 first, u32 second)
{
    return {{{even_codes(first), odd_codes(first)}, {even_codes(second), odd_codes(second)}}};
}

__device__ __forceinline__ void multiply_codes(int (&sum)[4], const RowCodes& a, const ColumnCodes& b)
{
    const int start[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
    mma_s8_k32<CODES_UNSIGNED>(sum, a.words[0], b.words[0], start);
    mma_s8_k32<CODES_UNSIGNED>(sum, a.words[1], b.words[1], sum);
}

#else
struct RowCodes {
    u32 words[4];
};
struct ColumnCodes {
    u32 words[2];
};

__device__ __forceinline__ RowCodes row_codes(const uint4& c) { return {{c.x, c.y, c.z, c.w}}; }
__device__ __forceinline__ ColumnCodes column_codes(u32 first, u32 second) { return {{first, second}}; }

__device__ __forceinline__ void multiply_codes(int (&sum)[4], const RowCodes& a, const ColumnCodes& b)
{
#if CODE_MMA == MMA_S4_K64
    const int start[4] = {SUM_START, SUM_START, SUM_START, SUM_START};
    mma_s4_k64<CODES_UNSIGNED>(sum, a.words, b.words, start);
#else
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[2 * r] = sum[2 * r + 1] = SUM_START;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            mma_s4_k32<CODES_UNSIGNED>(sum[2 * r], sum[2 * r + 1], a.words[2 * half + r], b.words[half]);
    }
#endif
}
#endif

// Where a lane's scales begin among those of the warp's columns: those of columns 8 n + 2 t, + 1 of C at [n], a pair each.
__device__ __forceinline__ int first_column_scale(int lane) { return 16 * (lane % 4); }

// Scales of a lane's rows g + 8 i, times the unit of the sums.
__device__ __forceinline__ void load_row_scales(float (&scales)[2 * ROW_TILES], const Scale* rows)
{
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i += 4) {
        const uint2 four = *reinterpret_cast<const uint2*>(rows + i / 4 * SCALED_ROWS);
        scales[i] = low_float(four.x) * SUM_UNIT, scales[i + 1] = high_float(four.x) * SUM_UNIT;
        scales[i + 2] = low_float(four.y) * SUM_UNIT, scales[i + 3] = high_float(four.y) * SUM_UNIT;
    }
}

// acc = fma(sum over the group * column scale, row scale, acc): one rounding, as sum * column scale is exact. The lanes meet
// between the halves of the columns: otherwise the compiler unpacks all their scales first, and spills.
__device__ __forceinline__ void multiply_group(WarpTile& acc, const Operands& at, int)
{
    RowCodes rows[ROW_TILES];
    float row_scales[2 * ROW_TILES];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
        rows[m] = row_codes(at.rows[m * LANES]);
    load_row_scales(row_scales, at.row_scales);
    uint4 column_scales;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        if (pair == 2 && WARP_M == 32)
            __syncwarp();
        if (pair % 2 == 0)
            column_scales = reinterpret_cast<const uint4*>(at.column_scales)[pair / 2];
        const uint4 codes = at.columns[pair * LANES];
#pragma unroll
        for (int n = 2 * pair; n < 2 * pair + 2; ++n) {
            const ColumnCodes columns = n % 2 ? column_codes(codes.z, codes.w) : column_codes(codes.x, codes.y);
            const u32 both = word(column_scales, n % 4);
            const float scales[2] = {low_float(both), high_float(both)};
            const float starts[2] = {-SUM_START_VALUE * scales[0], -SUM_START_VALUE * scales[1]};
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                int sum[4];
                multiply_codes(sum, rows[m], columns);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float exact = fmaf(__int_as_float(sum[i]), scales[i % 2], starts[i % 2]);
                    acc[m][n][i] = fmaf(exact, row_scales[2 * m + i / 2], acc[m][n][i]);
                }
            }
        }
    }
}

// int4 has no outer scale.
__device__ __forceinline__ void finish_product(WarpTile&, const float*, int) {}
