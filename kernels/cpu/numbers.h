// The 16-bit numbers of a checkpoint, one at a time: bfloat16 and float16 as their bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace svdq {

inline float float_of_bits(uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct BFloat16 {
    static constexpr bool IS_BFLOAT16 = true;

    static float to_float(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

    // To nearest, ties to even; every NaN becomes torch's.
    static uint16_t from_float(float value)
    {
        if (std::isnan(value))
            return 0x7fc0;
        const uint32_t bits = bits_of_float(value);
        return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};

struct Float16 {
    static constexpr bool IS_BFLOAT16 = false;

    static float to_float(uint16_t bits)
    {
        const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
        if (exponent == 0) // exact: 10 bits times a power of two
            return float_of_bits(sign | bits_of_float(float(mantissa) * 5.9604644775390625e-8f));
        if (exponent == 31)
            return float_of_bits(sign | 0x7f800000u | mantissa << 13);
        return float_of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
    }

    static uint16_t from_float(float value)
    {
        const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u)
            return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
        if (magnitude >= 0x477ff000u) // half a step beyond the largest number
            return uint16_t(sign | 0x7c00u);
        if (magnitude < 0x38800000u) // subnormal: adding 0.5 rounds to steps of 2^-24
            return uint16_t(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u));
        return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13));
    }
};

// The e4m3 number nearest to `scale` in [0, 448], ties to even.
inline float rounded_to_e4m3(float scale)
{
    if (!(scale >= 0.015625f)) // below 2^-6 the steps are 2^-9
        return std::nearbyint(scale * 512.0f) * (1.0f / 512.0f);
    const uint32_t bits = bits_of_float(scale);
    return float_of_bits((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
}

inline int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

} // namespace svdq
