// AVX2: 8 lanes. With AVX-VNNI also its sums of four products; without, pairs are summed in 16 bit over a group (at most
// 16 times 2 * 15 * 15) and widened at its end.
#pragma once
#include <immintrin.h>

#include "numbers.h"

namespace svdq {

struct Vector {
    static constexpr int LANES = 8;
    static constexpr int TILE_ROWS = 3, TILE_VECTORS = 2; // 6 integer and 6 float sums in 16 registers
    static constexpr int BLOCKS_AT_ONCE = 1;
    static constexpr bool SQUARES = false;
    static constexpr bool RECIPROCALS = true;

    using F = __m256;
    using I = __m256i;
    using Codes = __m256i;
    using Sums = __m256i;

    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, F x) { _mm256_storeu_ps(to, x); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F zero() { return _mm256_setzero_ps(); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
    static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
    static F divide(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F smaller(F a, F b) { return _mm256_min_ps(a, b); }
    static F larger(F a, F b) { return _mm256_max_ps(a, b); }
    static F magnitude(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
    static F where_at_least(F a, float limit, F yes, F no)
    {
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, set(limit), _CMP_GE_OQ));
    }
    static float peak(F magnitudes)
    {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(magnitudes), _mm256_extractf128_ps(magnitudes, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static F nan_to_infinity(F a) { return _mm256_blendv_ps(a, set(INFINITY), _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }

    // The larger of `most` and the magnitude of x; infinity where x is NaN.
    static F larger_magnitude(F most, F x) { return larger(most, nan_to_infinity(magnitude(x))); }
    template <class E> static F rounded_quotient(F a, F b) { return rounded<E>(divide(a, b)); }

    static I to_nearest(F x) { return _mm256_cvtps_epi32(x); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static int32_t total(I x)
    {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static void store_bytes(int8_t* to, I x)
    {
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
    }

    template <class E> static F load16(const uint16_t* from) { return widened<E>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
    template <class E> static F widened(__m128i bits)
    {
        if constexpr (E::IS_BFLOAT16)
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        else
            return _mm256_cvtph_ps(bits);
    }
    template <class E> static __m128i bits16(F x)
    {
        if constexpr (E::IS_BFLOAT16)
            return low_words(_mm256_srli_epi32(_mm256_castps_si256(rounded<E>(x)), 16));
        else
            return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    template <class E> static void store16(uint16_t* to, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits16<E>(x)); }
    template <class E> static F rounded(F x)
    {
        if constexpr (!E::IS_BFLOAT16)
            return _mm256_cvtph_ps(bits16<E>(x));
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const F kept = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000u))));
        const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_blendv_ps(kept, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    // Rounded to bfloat16, where it is not halfway between two such numbers.
    static F rounded_off_middle(F x)
    {
        const __m256i up = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x8000));
        return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000u))));
    }
    static F load_e4m3(const uint8_t* from)
    {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
    }

    template <class E> struct Pair {
        F first, second;
    };
    template <class E> static Pair<E> load_pair(const uint16_t* from)
    {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if constexpr (E::IS_BFLOAT16)
            return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))))};
        else
            return {_mm256_cvtph_ps(low_words(_mm256_and_si256(words, _mm256_set1_epi32(0xffff)))),
                    _mm256_cvtph_ps(low_words(_mm256_srli_epi32(words, 16)))};
    }
    template <class E> static F add_product(F sum, const Pair<E>& pair, uint32_t both)
    {
        if constexpr (E::IS_BFLOAT16) {
            sum = fma(pair.second, set(float_of_bits(both & 0xffff0000u)), sum);
            return fma(pair.first, set(float_of_bits(both << 16)), sum);
        } else {
            sum = fma(pair.second, set(_cvtsh_ss(uint16_t(both >> 16))), sum);
            return fma(pair.first, set(_cvtsh_ss(uint16_t(both))), sum);
        }
    }

    static Codes load_codes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static Codes low(Codes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static Codes high(Codes x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
    static Codes look_up(Codes x, const uint8_t* table)
    {
        const __m128i few = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(few), x);
    }
#ifdef __AVXVNNI__
    static Sums begin(int32_t start) { return _mm256_set1_epi32(start); }
    static Sums dot(Sums sums, Codes weights, int32_t four) { return _mm256_dpbusd_avx_epi32(sums, weights, _mm256_set1_epi32(four)); }
    static F finish(Sums sums, int32_t) { return _mm256_cvtepi32_ps(sums); }
#else
    static Sums begin(int32_t) { return _mm256_setzero_si256(); }
    static Sums dot(Sums sums, Codes weights, int32_t four)
    {
        return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, _mm256_set1_epi32(four)));
    }
    static F finish(Sums sums, int32_t start)
    {
        const __m256i wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(wide, _mm256_set1_epi32(start)));
    }
#endif
    static F byte(Codes x, int index)
    {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, 8 * index), _mm256_set1_epi32(255)));
    }
    static void prefetch(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
    static void prefetch_far(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

private:
    // The lower words of 8 numbers below 2^16
    static __m128i low_words(__m256i x) { return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)); }
};

} // namespace svdq
