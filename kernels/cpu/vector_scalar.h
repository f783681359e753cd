// No vector instructions: the definition that every other file of this kind must equal to the bit, and what runs on a
// processor that has none of them.
#pragma once
#include "numbers.h"

namespace svdq {

struct Vector {
    static constexpr int LANES = 4;
    static constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
    static constexpr int BLOCKS_AT_ONCE = 1;
    static constexpr bool SQUARES = false;
    static constexpr bool RECIPROCALS = false; // divides, as the definition does

    struct F {
        float at[LANES];
    };
    struct I {
        int32_t at[LANES];
    };
    struct Codes {
        uint8_t at[LANES][4];
    };
    using Sums = I;

    template <class Of> static F each(Of of)
    {
        F result;
        for (int i = 0; i < LANES; ++i)
            result.at[i] = of(i);
        return result;
    }

    static F load(const float* from) { return each([&](int i) { return from[i]; }); }
    static void store(float* to, F x) { std::memcpy(to, x.at, sizeof x.at); }
    static F set(float x) { return each([&](int) { return x; }); }
    static F zero() { return set(0.0f); }
    static F add(F a, F b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
    static F subtract(F a, F b) { return each([&](int i) { return a.at[i] - b.at[i]; }); }
    static F multiply(F a, F b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
    static F divide(F a, F b) { return each([&](int i) { return a.at[i] / b.at[i]; }); }
    static F fma(F a, F b, F c) { return each([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); }); }
    static F smaller(F a, F b) { return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
    static F larger(F a, F b) { return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
    static F magnitude(F a) { return each([&](int i) { return std::fabs(a.at[i]); }); }
    static F where_at_least(F a, float limit, F yes, F no)
    {
        return each([&](int i) { return a.at[i] >= limit ? yes.at[i] : no.at[i]; });
    }
    static float peak(F magnitudes)
    {
        float most = 0.0f;
        for (float each : magnitudes.at)
            most = each > most ? each : most;
        return most;
    }
    static F nan_to_infinity(F a) { return each([&](int i) { return std::isnan(a.at[i]) ? INFINITY : a.at[i]; }); }

    // The larger of `most` and the magnitude of x; infinity where x is NaN.
    static F larger_magnitude(F most, F x) { return larger(most, nan_to_infinity(magnitude(x))); }
    template <class E> static F rounded_quotient(F a, F b) { return rounded<E>(divide(a, b)); }

    static I to_nearest(F x)
    {
        I result;
        for (int i = 0; i < LANES; ++i)
            result.at[i] = int32_t(std::nearbyint(x.at[i]));
        return result;
    }
    static I add(I a, I b)
    {
        for (int i = 0; i < LANES; ++i)
            a.at[i] += b.at[i];
        return a;
    }
    static int32_t total(I x) { return x.at[0] + x.at[1] + x.at[2] + x.at[3]; }
    static void store_bytes(int8_t* to, I x)
    {
        for (int i = 0; i < LANES; ++i)
            to[i] = int8_t(x.at[i]);
    }

    template <class E> static F load16(const uint16_t* from) { return each([&](int i) { return E::to_float(from[i]); }); }
    template <class E> static void store16(uint16_t* to, F x)
    {
        for (int i = 0; i < LANES; ++i)
            to[i] = E::from_float(x.at[i]);
    }
    template <class E> static F rounded(F x) { return each([&](int i) { return E::to_float(E::from_float(x.at[i])); }); }
    // Rounded to bfloat16, where it is not halfway between two such numbers.
    static F rounded_off_middle(F x) { return rounded<BFloat16>(x); }
    static F load_e4m3(const uint8_t* from) { return each([&](int i) { return Float16::to_float(uint16_t(from[i] << 7)); }); }

    template <class E> struct Pair {
        F first, second;
    };
    template <class E> static Pair<E> load_pair(const uint16_t* from)
    {
        return {each([&](int i) { return E::to_float(from[2 * i]); }), each([&](int i) { return E::to_float(from[2 * i + 1]); })};
    }
    template <class E> static F add_product(F sum, const Pair<E>& pair, uint32_t both)
    {
        sum = fma(pair.second, set(E::to_float(uint16_t(both >> 16))), sum);
        return fma(pair.first, set(E::to_float(uint16_t(both))), sum);
    }

    static Codes load_codes(const uint8_t* from)
    {
        Codes result;
        std::memcpy(result.at, from, sizeof result.at);
        return result;
    }
    template <class Of> static Codes each_byte(Codes x, Of of)
    {
        for (auto& lane : x.at)
            for (uint8_t& byte : lane)
                byte = of(byte);
        return x;
    }
    static Codes low(Codes x) { return each_byte(x, [](uint8_t byte) { return uint8_t(byte & 15); }); }
    static Codes high(Codes x) { return each_byte(x, [](uint8_t byte) { return uint8_t(byte >> 4); }); }
    static Codes look_up(Codes x, const uint8_t* table) { return each_byte(x, [&](uint8_t byte) { return table[byte]; }); }
    static Sums begin(int32_t start) { return {{start, start, start, start}}; }
    static Sums dot(Sums sums, Codes weights, int32_t four)
    {
        int8_t codes[4];
        std::memcpy(codes, &four, 4);
        for (int i = 0; i < LANES; ++i)
            for (int k = 0; k < 4; ++k)
                sums.at[i] += int32_t(weights.at[i][k]) * codes[k];
        return sums;
    }
    static F finish(Sums sums, int32_t) { return each([&](int i) { return float(sums.at[i]); }); }
    static F byte(Codes x, int index) { return each([&](int i) { return float(x.at[i][index]); }); }
    static void prefetch(const void*) {}
    static void prefetch_far(const void*) {}
};

} // namespace svdq
