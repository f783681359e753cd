// NEON with its dot product (Armv8.2), and with its matrix product of bytes (i8mm) where the compiler is told of it: 4
// lanes. Codes with their offset fit in signed bytes.
#pragma once
#include <arm_neon.h>

#include "numbers.h"

namespace svdq {

struct Vector {
    static constexpr int LANES = 4;
    static constexpr int TILE_ROWS = 6, TILE_VECTORS = 2; // 12 integer and 12 float sums in 32 registers
    static constexpr int BLOCKS_AT_ONCE = 1;
    static constexpr bool RECIPROCALS = true;
#ifdef __ARM_FEATURE_MATMUL_INT8
    // `multiply_square` in place of `dot`
    static constexpr bool SQUARES = true;
#else
    static constexpr bool SQUARES = false;
#endif

    using F = float32x4_t;
    using I = int32x4_t;
    using Codes = uint8x16_t;
    using Sums = int32x4_t;

    static F load(const float* from) { return vld1q_f32(from); }
    static void store(float* to, F x) { vst1q_f32(to, x); }
    static F set(float x) { return vdupq_n_f32(x); }
    static F zero() { return vdupq_n_f32(0.0f); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F subtract(F a, F b) { return vsubq_f32(a, b); }
    static F multiply(F a, F b) { return vmulq_f32(a, b); }
    static F divide(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F smaller(F a, F b) { return vminq_f32(a, b); }
    static F larger(F a, F b) { return vmaxq_f32(a, b); }
    static F magnitude(F a) { return vabsq_f32(a); }
    static F where_at_least(F a, float limit, F yes, F no) { return vbslq_f32(vcgeq_f32(a, set(limit)), yes, no); }
    static float peak(F magnitudes) { return vmaxvq_f32(magnitudes); }
    static F nan_to_infinity(F a) { return vbslq_f32(vceqq_f32(a, a), a, set(INFINITY)); }

    // The larger of `most` and the magnitude of x; infinity where x is NaN.
    static F larger_magnitude(F most, F x) { return larger(most, nan_to_infinity(magnitude(x))); }
    template <class E> static F rounded_quotient(F a, F b) { return rounded<E>(divide(a, b)); }

    static I to_nearest(F x) { return vcvtnq_s32_f32(x); }
    static I add(I a, I b) { return vaddq_s32(a, b); }
    static int32_t total(I x) { return vaddvq_s32(x); }
    static void store_bytes(int8_t* to, I x)
    {
        const int16x4_t words = vmovn_s32(x);
        const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
        vst1_lane_s32(reinterpret_cast<int32_t*>(to), vreinterpret_s32_s8(bytes), 0);
    }

    template <class E> static F load16(const uint16_t* from) { return widened<E>(vld1_u16(from)); }
    template <class E> static F widened(uint16x4_t bits)
    {
        if constexpr (E::IS_BFLOAT16)
            return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
        else
            return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    }
    template <class E> static uint16x4_t bits16(F x)
    {
        if constexpr (E::IS_BFLOAT16)
            return vshrn_n_u32(vreinterpretq_u32_f32(rounded<E>(x)), 16);
        else
            return vreinterpret_u16_f16(vcvt_f16_f32(x));
    }
    template <class E> static void store16(uint16_t* to, F x) { vst1_u16(to, bits16<E>(x)); }
    template <class E> static F rounded(F x)
    {
        if constexpr (!E::IS_BFLOAT16)
            return vcvt_f32_f16(vcvt_f16_f32(x));
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t kept = vandq_u32(up, vdupq_n_u32(0xffff0000u));
        return vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(x, x), kept, vdupq_n_u32(0x7fc00000u)));
    }
    // Rounded to bfloat16, where it is not halfway between two such numbers.
    static F rounded_off_middle(F x)
    {
        return vreinterpretq_f32_u32(vandq_u32(vaddq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x8000)), vdupq_n_u32(0xffff0000u)));
    }
    static F load_e4m3(const uint8_t* from)
    {
        uint32_t four;
        std::memcpy(&four, from, 4);
        const uint16x4_t words = vget_low_u16(vmovl_u8(vcreate_u8(four)));
        return widened<Float16>(vshl_n_u16(words, 7));
    }

    template <class E> struct Pair {
        F first, second;
    };
    template <class E> static Pair<E> load_pair(const uint16_t* from)
    {
        const uint16x4x2_t parts = vld2_u16(from);
        return {widened<E>(parts.val[0]), widened<E>(parts.val[1])};
    }
    template <class E> static F add_product(F sum, const Pair<E>& pair, uint32_t both)
    {
        sum = fma(pair.second, set(number<E>(uint16_t(both >> 16))), sum);
        return fma(pair.first, set(number<E>(uint16_t(both))), sum);
    }

    static Codes load_codes(const uint8_t* from) { return vld1q_u8(from); }
    static Codes low(Codes x) { return vandq_u8(x, vdupq_n_u8(15)); }
    static Codes high(Codes x) { return vshrq_n_u8(x, 4); }
    static Codes look_up(Codes x, const uint8_t* table) { return vqtbl1q_u8(vld1q_u8(table), x); }
    static Sums begin(int32_t start) { return vdupq_n_s32(start); }
    static Sums dot(Sums sums, Codes weights, int32_t four)
    {
        return vdotq_s32(sums, vreinterpretq_s8_u8(weights), vreinterpretq_s8_s32(vdupq_n_s32(four)));
    }
#ifdef __ARM_FEATURE_MATMUL_INT8
    // Of 2 rows and 2 columns, row by row
    using Square = int32x4_t;
    static Square begin_square(const int32_t* starts)
    {
        const int32x4_t two = vcombine_s32(vld1_s32(starts), vdup_n_s32(0));
        return vzip1q_s32(two, two);
    }
    static Codes first_columns(Codes line, Codes next)
    {
        return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(line), vreinterpretq_u32_u8(next)));
    }
    static Codes last_columns(Codes line, Codes next)
    {
        return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(line), vreinterpretq_u32_u8(next)));
    }
    // 8 codes of each row: 4 of each address
    static int8x16_t two_rows(const int32_t* four, const int32_t* next)
    {
        const int32x2x2_t rows = vzip_s32(vld1_s32(four), vld1_s32(next));
        return vreinterpretq_s8_s32(vcombine_s32(rows.val[0], rows.val[1]));
    }
    static Square multiply_square(Square sums, int8x16_t rows, Codes columns)
    {
        return vmmlaq_s32(sums, rows, vreinterpretq_s8_u8(columns));
    }
    static Sums first_row(Square left, Square right) { return vcombine_s32(vget_low_s32(left), vget_low_s32(right)); }
    static Sums second_row(Square left, Square right) { return vcombine_s32(vget_high_s32(left), vget_high_s32(right)); }
#endif
    static F finish(Sums sums, int32_t) { return vcvtq_f32_s32(sums); }
    static F byte(Codes x, int index)
    {
        const int32x4_t right = vdupq_n_s32(-8 * index);
        return vcvtq_f32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(x), right), vdupq_n_u32(255)));
    }
    static void prefetch(const void* at) { __builtin_prefetch(at); }
    static void prefetch_far(const void* at) { __builtin_prefetch(at, 0, 2); }

private:
    template <class E> static float number(uint16_t bits)
    {
        if constexpr (E::IS_BFLOAT16)
            return float_of_bits(uint32_t(bits) << 16);
        else
            return vgetq_lane_f32(widened<E>(vdup_n_u16(bits)), 0);
    }
};

} // namespace svdq
