// 16 rows of 64 columns as the e4m3 codes of hopper_tiles.cuh.
#pragma once
#include "hopper_tiles.cuh"
#include "quantize.cuh"

constexpr float MOST_E4M3 = 448.0f;

// What quantizing 16 x 64 values gives a lane: the codes of its 2 x 16 columns, 8 to an entry, as Rows16 has them.
struct CodeRows {
    uint2 codes[2][2]; // [half][r]
};

// An integer as the float that rounding to it gives, ties to even; -0 becomes 0. |value| is below 2^22.
__device__ __forceinline__ float rounded(float value) { return value + ROUNDING - ROUNDING; }

// The codes of eight values times `inverse`: integers in MODE_EXACT, else the nearest e4m3 numbers.
__device__ __forceinline__ uint2 e4m3_codes(const float* values, float inverse)
{
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low = values[2 * i] * inverse, high = values[2 * i + 1] * inverse;
        if (MODE == MODE_EXACT) {
            low = rounded(QUANTIZED_UNSIGNED && low < 0.0f ? 0.0f : low);
            high = rounded(QUANTIZED_UNSIGNED && high < 0.0f ? 0.0f : high);
        }
        pairs[i] = e4m3_pair(low, high);
    }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// The largest magnitude of a row's 64 smoothed values, known to all lanes of its quad.
__device__ __forceinline__ float quad_peak(const float (&values)[16])
{
    float peak = peak_of(values, 16);
    peak = max_magnitude(peak, shuffle_xor(peak, 1));
    return max_magnitude(peak, shuffle_xor(peak, 2));
}

// Place of a tile's row in 16-byte units: column `chunk` of group `group`.
__device__ __forceinline__ size_t code_vector(int row, int group, int groups, int chunk)
{
    return ((size_t(row / TOKENS) * groups + group) * CHUNKS + chunk) * TOKENS + row % TOKENS;
}

__device__ __forceinline__ void store_codes(u8* codes, const CodeRows& rows, int first_row, int group, int groups, int lane)
{
    const int t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const size_t vector = code_vector(first_row + 8 * r + lane / 4, group, groups, 2 * half + t / 2);
            *reinterpret_cast<uint2*>(codes + vector * 16 + t % 2 * 8) = rows.codes[half][r];
        }
}

#if MODE == MODE_EXACT
// One scale for 64 columns, peak / 7 (peak / 15 unsigned), rounded to 16 bit; codes with the unrounded scale. Bit for bit
// the codes and scales of quantize.cuh.
__device__ __forceinline__ void quantize_group(const Rows16& rows, const float (&inverse_smooth)[16], float shift, u8* codes,
                                               float* scales, int first_row, int group, int groups, int lane)
{
    CodeRows quantized;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v[16];
        smooth_lane(v, rows, r, inverse_smooth, shift);
        const float scale = quad_peak(v) * (QUANTIZED_UNSIGNED ? 1.0f / 15.0f : 1.0f / 7.0f);
        const float inverse = reciprocal(scale);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            quantized.codes[half][r] = e4m3_codes(v + 8 * half, inverse);
        const int row = first_row + 8 * r + lane / 4;
        if (lane % 4 == 0)
            scales[(size_t(row / TOKENS) * groups + group) * TOKENS + token_slot(row % TOKENS)] =
                Element::to_float(Element::from_float(scale)) * TOKEN_UNIT;
    }
    store_codes(codes, quantized, first_row, group, groups, lane);
}
#else
// Codes of 64 columns with scales of whole rows, of which `inverse` are the reciprocals.
__device__ __forceinline__ void quantize_with(const Rows16& rows, const float (&inverse_smooth)[16], float shift,
                                              const float (&inverse)[2], u8* codes, int first_row, int group, int groups,
                                              int lane)
{
    CodeRows quantized;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v[16];
        smooth_lane(v, rows, r, inverse_smooth, shift);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            quantized.codes[half][r] = e4m3_codes(v + 8 * half, inverse[r]);
    }
    store_codes(codes, quantized, first_row, group, groups, lane);
}
#endif
