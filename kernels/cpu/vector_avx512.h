// AVX-512 with VNNI: 16 lanes. With AVX512-BF16 also its dot product of pairs.
#pragma once
#include <immintrin.h>

#include "numbers.h"

namespace svdq {

// Word `lane` of result vector i is word at / 6 of row at % 6, where at = 16 i + lane. Rows are as `store_codes` leaves
// them: the words of each vector four apart.
struct Interleaved {
    uint32_t order[6][16] = {};
    uint16_t second[6] = {}, third[6] = {};

    constexpr Interleaved()
    {
        for (int at = 0; at < 96; ++at) {
            const int row = at % 6, lane = at % 16;
            order[at / 16][lane] = uint32_t(at / 6 % 4 * 4 + at / 6 / 4 + 16 * (row % 2));
            if (row / 2 == 1)
                second[at / 16] = uint16_t(second[at / 16] | 1u << lane);
            if (row / 2 == 2)
                third[at / 16] = uint16_t(third[at / 16] | 1u << lane);
        }
    }
};
inline constexpr Interleaved INTERLEAVED{};

struct Vector {
    static constexpr int LANES = 16;
    static constexpr int TILE_ROWS = 6, TILE_VECTORS = 2; // 12 integer and 12 float sums in 32 registers
    static constexpr int BLOCKS_AT_ONCE = 2; // 24 sums hide the time that an addition of the branch takes
    static constexpr bool SQUARES = false;
    static constexpr bool RECIPROCALS = true;

    using F = __m512;
    using I = __m512i;
    using Codes = __m512i; // 4 consecutive k of each column, a byte each
    using Sums = __m512i;

    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, F x) { _mm512_storeu_ps(to, x); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F zero() { return _mm512_setzero_ps(); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
    static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    static F divide(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F smaller(F a, F b) { return _mm512_min_ps(a, b); }
    static F larger(F a, F b) { return _mm512_max_ps(a, b); }
    static F magnitude(F a) { return _mm512_abs_ps(a); }
    // a >= limit ? yes : no
    static F where_at_least(F a, float limit, F yes, F no)
    {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, set(limit), _CMP_GE_OQ), no, yes);
    }
    // The larger of `most` and the magnitude of x, as their bits are ordered: NaN above infinity.
    static F larger_magnitude(F most, F x)
    {
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(most), _mm512_castps_si512(magnitude(x))));
    }

    static I to_nearest(F x) { return _mm512_cvtps_epi32(x); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static void store(int32_t* to, I x) { _mm512_storeu_si512(to, x); }
    static void store_codes(int8_t* to, const I (&codes)[4])
    {
        const __m512i first = _mm512_packs_epi32(codes[0], codes[1]), second = _mm512_packs_epi32(codes[2], codes[3]);
        _mm512_storeu_si512(to, _mm512_packs_epi16(first, second));
    }
    // Each of 6 vectors' lanes in one: lanes 0 to 5 of the result. Halves of two vectors side by side, and so on.
    template <class Of> static __m512i across(__m512i a, __m512i b, __m512i c, __m512i d, __m512i e, __m512i f, Of of)
    {
        const auto halves = [&](__m512i x, __m512i y) { return of(_mm512_shuffle_i64x2(x, y, 0x44), _mm512_shuffle_i64x2(x, y, 0xee)); };
        const auto quarters = [&](__m512i x, __m512i y) { return of(_mm512_shuffle_i64x2(x, y, 0x88), _mm512_shuffle_i64x2(x, y, 0xdd)); };
        const __m512i last = halves(e, f), four = quarters(halves(a, b), halves(c, d)), two = quarters(last, last);
        const __m512i pairs = of(_mm512_unpacklo_epi32(four, two), _mm512_unpackhi_epi32(four, two));
        const __m512i each = of(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_BADC));
        return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), each);
    }
    static F peaks(const F (&x)[6])
    {
        const auto bits = [](F of) { return _mm512_castps_si512(of); };
        return _mm512_castsi512_ps(across(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]), bits(x[4]), bits(x[5]),
                                          [](__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }));
    }
    static I totals(const I (&x)[6])
    {
        return across(x[0], x[1], x[2], x[3], x[4], x[5], [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
    }

    template <class E> static F load16(const uint16_t* from)
    {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if constexpr (E::IS_BFLOAT16)
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        else
            return _mm512_cvtph_ps(bits);
    }
    template <class E> static __m256i bits16(F x)
    {
        if constexpr (E::IS_BFLOAT16)
            return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(rounded<E>(x)), 16));
        else
            return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    template <class E> static void store16(uint16_t* to, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits16<E>(x)); }
    template <class E> static F rounded(F x)
    {
        if constexpr (!E::IS_BFLOAT16)
            return _mm512_cvtph_ps(bits16<E>(x));
        // Not vcvtneps2bf16, which takes subnormal numbers for zeros
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i kept = _mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_castsi512_ps(_mm512_mask_blend_epi32(nan, kept, _mm512_set1_epi32(0x7fc00000)));
    }
    // a / b of 16-bit numbers, rounded. A NaN among them, or made of them, has a lower half of zeros, and stays NaN when
    // it is rounded like a number.
    template <class E> static F rounded_quotient(F a, F b)
    {
        if constexpr (!E::IS_BFLOAT16)
            return rounded<E>(divide(a, b));
        const __m512i bits = _mm512_castps_si512(divide(a, b));
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u))));
    }
    // Rounded to bfloat16, where it is not halfway between two such numbers.
    static F rounded_off_middle(F x)
    {
        const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
        return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u))));
    }
    // 6 rows of 16 words -> [16][6]: three pairs of rows in the result's order, of which each lane takes one.
    static void interleave(const int8_t (&rows)[6][64], uint32_t* to)
    {
        __m512i row[6];
        for (int i = 0; i < 6; ++i)
            row[i] = _mm512_loadu_si512(rows[i]);
        for (int i = 0; i < 6; ++i) {
            const __m512i order = _mm512_loadu_si512(INTERLEAVED.order[i]);
            const __m512i first = _mm512_permutex2var_epi32(row[0], order, row[1]), second = _mm512_permutex2var_epi32(row[2], order, row[3]),
                          third = _mm512_permutex2var_epi32(row[4], order, row[5]);
            const __m512i two = _mm512_mask_blend_epi32(INTERLEAVED.second[i], first, second);
            _mm512_storeu_si512(to + 16 * i, _mm512_mask_blend_epi32(INTERLEAVED.third[i], two, third));
        }
    }
    // e4m3 bits without a sign, times 2^-8: they are float16's but for the exponent's offset.
    static F load_e4m3(const uint8_t* from)
    {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7));
    }

    // ---- pairs: two consecutive k of every lane, in 16 bit. acc + x1 y1, then + x0 y0, one fma each.
    template <class E> struct Pair;
    template <class E> static Pair<E> load_pair(const uint16_t* from);
    template <class E> static F add_product(F sum, const Pair<E>& pair, uint32_t both);

    // ---- sums of four products of bytes
    static Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Codes low(Codes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Codes high(Codes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
    static Codes look_up(Codes x, const uint8_t* table)
    {
        const __m128i few = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(few), x);
    }
    static Sums begin(int32_t start) { return _mm512_set1_epi32(start); }
    static Sums dot(Sums sums, Codes weights, int32_t four) { return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(four)); }
    static F finish(Sums sums, int32_t) { return _mm512_cvtepi32_ps(sums); }
    // Byte `index` of every lane
    static F byte(Codes x, int index) { return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 8 * index), _mm512_set1_epi32(255))); }
    static void prefetch(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
    static void prefetch_far(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }
};

#ifdef __AVX512BF16__
template <> struct Vector::Pair<BFloat16> {
    __m512i both;
};
template <> inline Vector::Pair<BFloat16> Vector::load_pair<BFloat16>(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
template <> inline __m512 Vector::add_product<BFloat16>(F sum, const Pair<BFloat16>& pair, uint32_t both)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)pair.both, (__m512bh)_mm512_set1_epi32(int(both)));
}
#else
template <> struct Vector::Pair<BFloat16> {
    F first, second;
};
template <> inline Vector::Pair<BFloat16> Vector::load_pair<BFloat16>(const uint16_t* from)
{
    const __m512i words = _mm512_loadu_si512(from);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))))};
}
template <> inline __m512 Vector::add_product<BFloat16>(F sum, const Pair<BFloat16>& pair, uint32_t both)
{
    sum = fma(pair.second, set(float_of_bits(both & 0xffff0000u)), sum);
    return fma(pair.first, set(float_of_bits(both << 16)), sum);
}
#endif

template <> struct Vector::Pair<Float16> {
    F first, second;
};
template <> inline Vector::Pair<Float16> Vector::load_pair<Float16>(const uint16_t* from)
{
    const __m512i words = _mm512_loadu_si512(from);
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)))};
}
template <> inline __m512 Vector::add_product<Float16>(F sum, const Pair<Float16>& pair, uint32_t both)
{
    sum = fma(pair.second, set(_cvtsh_ss(uint16_t(both >> 16))), sum);
    return fma(pair.first, set(_cvtsh_ss(uint16_t(both))), sum);
}

} // namespace svdq
