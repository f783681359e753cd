// The 4-bit product of one step, nvfp4, on any card: codes times their e4m3 scales become 16-bit floats, exactly (2 + 4
// significant bits), and a 16-bit mma multiplies them with float32 sums.
#pragma once
#include "gemm_tile.cuh"

// An E2M1 code moved to the top of the exponent and mantissa of a 16-bit float is that code's value times CODE_UNIT
// (subnormal for 0.5, which 16-bit arithmetic keeps). Scales are multiplied by SCALE_UNIT so that nothing leaves the
// format's range; all of these are powers of two and cost no bit.
#if ELEMENT_BF16
constexpr int CODE_SHIFT = 6;                    // bits 12..14 of a code's 16 bits to bits 6..8
constexpr u32 CODE_MASK = 0x01c001c0u;
constexpr float SCALE_UNIT = 1.2676506e30f;      // 2^100
constexpr float PRODUCT_UNIT = 4.503599627370496e15f; // 1 / (2^-126 2^100)^2 = 2^52
#else
constexpr int CODE_SHIFT = 3;
constexpr u32 CODE_MASK = 0x0e000e00u;
constexpr float SCALE_UNIT = 1.0f;
constexpr float PRODUCT_UNIT = 268435456.0f; // 1 / (2^-14)^2 = 2^28
#endif

// An e4m3 byte without sign, times SCALE_UNIT, in both halves of a word.
__device__ __forceinline__ u32 scale_pair(u32 byte)
{
    // As the exponent and mantissa of a float32 the byte is its value times 2^-120; float32 keeps subnormals.
    const float tiny = __uint_as_float(byte << 20);
    const float value = byte == 0x7fu ? __uint_as_float(0x7fc00000u) : tiny * 1.3292279957849159e36f; // 2^120
    const u32 bits = Element::from_float(value * SCALE_UNIT);
    return bits | bits << 16;
}

// Codes i and i + 4 of a word become word i: 16-bit floats, scaled. Both operands have their k in this order.
__device__ __forceinline__ void dequantize(u32 (&values)[4], u32 codes, u32 scale)
{
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 top = codes << (12 - 4 * i);
        values[i] = Element::fma2((top & 0x80008000u) | ((top >> CODE_SHIFT) & CODE_MASK), scale, 0x80008000u); // - 0
    }
}

// The scale of columns 32 half + 8 t .. + 7 in a row's word.
__device__ __forceinline__ u32 lane_scale(u32 scales, int half, int lane)
{
    return (scales >> (16 * half + 8 * (lane % 4 / 2))) & 0xffu;
}

// A fragments of all tiles for half a group: two steps of k16.
__device__ __forceinline__ void dequantize_rows(u32 (&a)[ROW_TILES][2][4], const Operands& at, int half, int lane)
{
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        const uint4 scales = *reinterpret_cast<const uint4*>(at.row_scales + m / 2 * SCALED_ROWS);
        const uint4 codes = at.rows[m * LANES];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 values[4];
            dequantize(values, word(codes, 2 * half + r), scale_pair(lane_scale(word(scales, m % 2 * 2 + r), half, lane)));
#pragma unroll
            for (int p = 0; p < 2; ++p)
                a[m][p][r] = values[2 * p], a[m][p][2 + r] = values[2 * p + 1];
        }
    }
}

// Where a lane's scales begin among those of the warp's columns: those of column 8 n + g at [n].
__device__ __forceinline__ int first_column_scale(int lane) { return 8 * (lane / 4); }

__device__ __forceinline__ void multiply_group(WarpTile& acc, const Operands& at, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[ROW_TILES][2][4];
        dequantize_rows(a, at, half, lane);
        const uint4* column_scales = reinterpret_cast<const uint4*>(at.column_scales);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const uint4 codes = at.columns[n / 2 * LANES];
            u32 values[4];
            const u32 scales = word(column_scales[n / 4], n % 4);
            dequantize(values, word(codes, n % 2 * 2 + half), scale_pair(lane_scale(scales, half, lane)));
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const u32 b[2] = {values[2 * p], values[2 * p + 1]};
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m)
                    Element::mma(acc[m][n], a[m][p], b);
            }
        }
    }
}

// The outer scale of every column, `outer` at the warp's first one.
__device__ __forceinline__ void finish_product(WarpTile& acc, const float* outer, int lane)
{
    scale_columns(acc, outer, PRODUCT_UNIT, lane);
}
