// One group of 64 columns of 16 rows: smooth, quantize, pack. Bit for bit what solve/quantizers.py defines.
#pragma once
#include "fragments.cuh"

// What quantizing 16 x 64 values gives a lane: the codes in the activation layout, and the scale entries of rows g and
// g + 8, valid in lanes with t = 0.
struct QuantizedRows {
    uint4 codes;
    u32 scale[2];
};

// The 16 columns of a group that a lane owns: 32 half + 8 t + i at [8 half + i].
__device__ __forceinline__ void load_lane_columns(float (&values)[16], const float* group, int t)
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int quarter = 0; quarter < 2; ++quarter) {
            const float4 four = reinterpret_cast<const float4*>(group + 32 * half + 8 * t)[quarter];
            float* to = values + 8 * half + 4 * quarter;
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
}

// (value + shift) / smooth, rounded to 16 bit after each step. Multiplying by the float32 reciprocal gives the same
// 16 bits as dividing: a quotient of two numbers of p significant bits is never nearer to a rounding boundary than
// 2^-(2p+1) of itself (p = 8: 2^-17, p = 11: 2^-23), and the reciprocal and the product together err by less.
__device__ __forceinline__ float smoothed(float value, float inverse_smooth, float shift)
{
    const float shifted = shift == 0.0f ? value : Element::to_float(Element::from_float(value + shift));
    return Element::to_float(Element::from_float(shifted * inverse_smooth));
}

__device__ __forceinline__ void smooth_lane(float (&v)[16], const Rows16& rows, int r, const float (&inverse_smooth)[16],
                                            float shift)
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const u32 both = word(rows.part[half][r], pair);
            const int i = 8 * half + 2 * pair;
            v[i] = smoothed(low_float(both), inverse_smooth[i], shift);
            v[i + 1] = smoothed(high_float(both), inverse_smooth[i + 1], shift);
        }
}

// 1 / scale, and 0 where that is not a finite number: a group of zeros gets codes of zero.
__device__ __forceinline__ float reciprocal(float scale)
{
    const float inverse = 1.0f / scale;
    return isinf(inverse) ? 0.0f : inverse;
}

__device__ __forceinline__ float peak_of(const float* values, int count)
{
    float peak = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i)
        peak = max_magnitude(peak, values[i]);
    return peak;
}

// Adding 1.5 * 2^23, a float whose last bit is worth 1, rounds to the nearest integer, ties to even, and leaves that
// integer in the lower bits: one instruction at full rate, where a conversion runs at a quarter of it.
constexpr float ROUNDING = 12582912.0f;
constexpr u32 ROUNDING_BITS = 0x4b400000u;

#if !PRECISION_NVFP4
// The code of a value over its scale, in the lower four bits. No value is larger than the peak, so none is beyond 7.5 (or
// 15.5) scales; negative ones become 0 where codes are unsigned.
__device__ __forceinline__ u32 int4_from_float(float value)
{
    const float rounded = (QUANTIZED_UNSIGNED ? fmaxf(value, 0.0f) : value) + ROUNDING;
    return __float_as_uint(rounded) & 15u;
}

// int4: one scale for 64 columns, peak / 7 (peak / 15 unsigned), kept in 16 bit; codes with the unrounded scale.
__device__ __forceinline__ QuantizedRows quantize_rows(const Rows16& rows, const float (&inverse_smooth)[16], float shift)
{
    QuantizedRows result;
    u32 words[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v[16];
        smooth_lane(v, rows, r, inverse_smooth, shift);
        float peak = peak_of(v, 16);
        peak = max_magnitude(peak, shuffle_xor(peak, 1));
        peak = max_magnitude(peak, shuffle_xor(peak, 2));
        const float scale = peak * (QUANTIZED_UNSIGNED ? 1.0f / 15.0f : 1.0f / 7.0f);
        const float inverse = reciprocal(scale);
        result.scale[r] = Element::from_float(scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 packed = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                packed |= int4_from_float(v[8 * half + i] * inverse) << (4 * i);
            words[2 * half + r] = packed;
        }
    }
    result.codes = make_uint4(words[0], words[1], words[2], words[3]);
    return result;
}

#else

constexpr float E4M3_MAX = 448.0f;

// The e4m3 byte nearest to `scale` in [0, 448] or NaN, ties to even. Written out: cvt.rn.satfinite.e4m3x2 needs sm_89.
__device__ __forceinline__ u32 e4m3_from_float(float scale)
{
    if (isnan(scale))
        return 0x7fu;
    if (scale < 0.015625f) // below 2^-6 the steps are 2^-9; 8 of them make the smallest normal number, byte 8
        return u32(__float2int_rn(scale * 512.0f));
    const u32 bits = __float_as_uint(scale);
    const u32 rounded = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20; // 3 bits of mantissa stay
    return rounded - ((127u - 7u) << 3);
}

// The E2M1 nibble nearest to `value`, ties to even, at most 6; the sign of zero stays.
__device__ __forceinline__ u32 e2m1_from_float(float value)
{
    const float magnitude = fabsf(value);
    // Steps of 0.5 up to 2 (codes 0..4), of 1 up to 4 (codes 4..6), of 2 beyond. The offsets are even: ties stay even
    const float steps = magnitude < 2.0f ? 2.0f : magnitude < 4.0f ? 1.0f : 0.5f;
    const float offset = magnitude < 2.0f ? 0.0f : magnitude < 4.0f ? 2.0f : 4.0f;
    const u32 code = __float_as_uint(fmaf(magnitude, steps, ROUNDING + offset)) - ROUNDING_BITS;
    return (code < 7u ? code : 7u) | (__float_as_uint(value) >> 31) << 3;
}

// nvfp4: an e4m3 scale for 16 columns, min(peak / 6, 448); codes with the unrounded scale.
__device__ __forceinline__ QuantizedRows quantize_rows(const Rows16& rows, const float (&inverse_smooth)[16], float shift)
{
    QuantizedRows result;
    u32 words[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float v[16];
        smooth_lane(v, rows, r, inverse_smooth, shift);
        u32 scales = 0; // bytes 0 and 2: columns 16 (t / 2) .. + 15 of either half
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float peak = peak_of(v + 8 * half, 8);
            peak = max_magnitude(peak, shuffle_xor(peak, 1)); // two lanes share 16 columns
            const float wanted = peak * (1.0f / 6.0f);
            const float scale = wanted > E4M3_MAX ? E4M3_MAX : wanted;
            const float inverse = reciprocal(scale);
            scales |= e4m3_from_float(scale) << (16 * half);
            u32 packed = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                packed |= e2m1_from_float(v[8 * half + i] * inverse) << (4 * i);
            words[2 * half + r] = packed;
        }
        result.scale[r] = scales | shuffle_xor(scales, 2) << 8; // lane t = 0 adds columns 16..31 and 48..63
    }
    result.codes = make_uint4(words[0], words[1], words[2], words[3]);
    return result;
}
#endif

// Write 16 rows by 64 columns of codes and scales. `tile` counts 16 rows, `group` 64 columns; `mp` is the rows' stride.
__device__ __forceinline__ void store_quantized(const QuantizedRows& quantized, uint4* codes, Scale* scales, int tile,
                                                int group, int mp, int lane)
{
    codes[(size_t(group) * (mp / 16) + tile) * LANES + lane] = quantized.codes;
    if (lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row_in_32 = tile % 2 * 16 + 8 * r + lane / 4;
            scales[size_t(group) * mp + tile / 2 * 32 + row_scale_slot(row_in_32)] = Scale(quantized.scale[r]);
        }
}
