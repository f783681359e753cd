// Attention of bfloat16 q, k and v with a running softmax: scores and sums are float32, the weights of values are rounded
// to bfloat16 before they multiply. Only where the processor has a dot product of bfloat16 pairs: elsewhere torch's own is
// as fast. A row's result depends on no other row, and keys are taken in blocks that begin at multiples of KEYS.
#pragma once
#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace svdq {

constexpr int KEYS = 256;   // a block of keys: its part of k, of v and of the scores stay in the second cache
constexpr int QUERIES = 48; // rows of q a task
constexpr int MOST_HEAD = 256;

// One of q, k, v and the result: (batch, heads, rows, size), the last axis without gaps; strides in numbers.
struct Heads {
    uint16_t* at;
    int64_t batch, head, row;
    uint16_t* of(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

struct Attention {
    int64_t batches, heads, queries, keys, size; // `size`: even, at most MOST_HEAD
    float scale;
    const float* bias; // (batches, keys), added to the scores; null where there is none
    int64_t blocks() const { return (keys + KEYS - 1) / KEYS; }
    int64_t wide() const { return (size + 15) / 16 * 16; }
    // 16-bit numbers that one head's k or v takes when it is packed
    int64_t packed() const { return blocks() * KEYS * wide(); }
};

// k of one block, (rows, size) -> [size / 2][KEYS][2]; missing keys beside others in a vector are 0.
inline void pack_keys(const uint16_t* k, int64_t stride, int64_t rows, int64_t size, uint16_t* to)
{
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t first = 0; first < rows; first += 16) {
        const int64_t count = rows - first < 16 ? rows - first : 16;
        for (int64_t pair = 0; pair < size / 2; ++pair)
            for (int64_t key = 0; key < 16; ++key) {
                uint32_t both = 0;
                if (key < count)
                    std::memcpy(&both, k + (first + key) * stride + 2 * pair, 4);
                pairs[pair * KEYS + first + key] = both;
            }
    }
}

// v of one block, (rows, size) -> [KEYS / 2][wide][2]; what is missing in a pair or beyond `size` is 0.
inline void pack_values(const uint16_t* v, int64_t stride, int64_t rows, int64_t size, int64_t wide, uint16_t* to)
{
    for (int64_t key = 0; key < rows; key += 2) {
        uint16_t* pairs = to + key * wide;
        const uint16_t *first = v + key * stride, *second = key + 1 < rows ? first + stride : nullptr;
        for (int64_t column = 0; column < wide; ++column) {
            pairs[2 * column] = column < size ? first[column] : 0;
            pairs[2 * column + 1] = second && column < size ? second[column] : 0;
        }
    }
}

// 2^x for x <= 0; below -200 it is 0. NaN stays NaN.
inline __m512 power_of_two(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); // of a NaN and a number, the second
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
    // exp(f ln 2) on [-1/2, 1/2]
    __m512 sum = _mm512_set1_ps(1.54035303934e-4f);
    for (const float c : {1.33335581464e-3f, 9.61812910763e-3f, 5.55041086648e-2f, 2.40226506959e-1f, 6.93147180560e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(sum, whole);
}

inline __m512 dot_pairs(__m512 sum, __m512i a, const uint16_t* both)
{
    uint32_t pair;
    std::memcpy(&pair, both, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(int(pair)));
}

// 6 rows of sums, 16 VECTORS columns wide: += rows of `left` (pairs, `left_stride` apart) times [pairs][columns][2].
template <int VECTORS>
inline void multiply_pairs(const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t right_stride, int64_t pairs,
                           float* sums, int64_t sums_stride, bool begin)
{
    __m512 sum[6][VECTORS];
    for (int row = 0; row < 6; ++row)
        for (int i = 0; i < VECTORS; ++i)
            sum[row][i] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * sums_stride + 16 * i);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512i columns[VECTORS];
        for (int i = 0; i < VECTORS; ++i)
            columns[i] = _mm512_loadu_si512(right + pair * right_stride + 32 * i);
        for (int row = 0; row < 6; ++row)
            for (int i = 0; i < VECTORS; ++i)
                sum[row][i] = dot_pairs(sum[row][i], columns[i], left + row * left_stride + 2 * pair);
    }
    for (int row = 0; row < 6; ++row)
        for (int i = 0; i < VECTORS; ++i)
            _mm512_storeu_ps(sums + row * sums_stride + 16 * i, sum[row][i]);
}

inline void multiply_all(const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t columns, int64_t right_stride,
                         int64_t pairs, float* sums, int64_t sums_stride, bool begin)
{
    int64_t at = 0;
    for (; at + 64 <= columns; at += 64)
        multiply_pairs<4>(left, left_stride, right + 2 * at, right_stride, pairs, sums + at, sums_stride, begin);
    for (; at + 32 <= columns; at += 32)
        multiply_pairs<2>(left, left_stride, right + 2 * at, right_stride, pairs, sums + at, sums_stride, begin);
    for (; at < columns; at += 16)
        multiply_pairs<1>(left, left_stride, right + 2 * at, right_stride, pairs, sums + at, sums_stride, begin);
}

// What a task writes while it runs.
struct Room {
    alignas(64) float scores[6 * KEYS];
    alignas(64) uint16_t weights[6 * KEYS];
    alignas(64) float sums[QUERIES * MOST_HEAD];
    alignas(64) uint16_t q[QUERIES * MOST_HEAD];
    float most[QUERIES], total[QUERIES]; // of a row: its largest score times log2(e); its weights' sum
};

// `rows` of q against all keys, `bias` (keys) or null. `k` and `v` are packed.
inline void attend(const Attention& how, const float* bias, const uint16_t* q, int64_t q_stride, int64_t rows, const uint16_t* k, const uint16_t* v,
                   uint16_t* out, int64_t out_stride, Room& room)
{
    const int64_t size = how.size, wide = how.wide();
    constexpr float LOG2_E = 1.44269504089f;
    const float scale = how.scale * LOG2_E;
    const int64_t even = (rows + 5) / 6 * 6;
    for (int64_t row = 0; row < even; ++row) {
        if (row < rows)
            std::memcpy(room.q + row * size, q + row * q_stride, size_t(size) * 2);
        else
            std::memset(room.q + row * size, 0, size_t(size) * 2);
        room.most[row] = -INFINITY, room.total[row] = 0.0f;
    }
    std::memset(room.sums, 0, size_t(even * wide) * 4);
    for (int64_t block = 0; block < how.blocks(); ++block) {
        const int64_t left = how.keys - block * KEYS, count = left < KEYS ? left : KEYS, vectors = (count + 15) / 16;
        const int64_t padded = (count + 1) / 2;
        const __mmask16 last = __mmask16(count % 16 ? (1u << count % 16) - 1 : 0xffffu);
        const uint16_t *keys = k + block * KEYS * size, *values = v + block * KEYS * wide;
        for (int64_t row = 0; row < even; row += 6) {
            multiply_all(room.q + row * size, size, keys, vectors * 16, 2 * KEYS, size / 2, room.scores, KEYS, true);
            for (int64_t i = 0; i < 6; ++i) {
                float* scores = room.scores + i * KEYS;
                const __m512 none = _mm512_set1_ps(-INFINITY);
                __m512 peaks = none;
                for (int64_t at = 0; at < vectors; ++at) {
                    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * at), _mm512_set1_ps(scale));
                    const __mmask16 there = at + 1 == vectors ? last : __mmask16(0xffff);
                    if (bias)
                        x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, bias + block * KEYS + 16 * at), _mm512_set1_ps(LOG2_E), x);
                    x = _mm512_mask_blend_ps(there, none, x);
                    _mm512_storeu_ps(scores + 16 * at, x);
                    peaks = _mm512_max_ps(peaks, x);
                }
                const float before = room.most[row + i], peak = _mm512_reduce_max_ps(peaks), most = before > peak ? before : peak;
                // Where all keys so far are masked, scores less their largest one would be infinity less infinity
                const bool seen = most != -INFINITY;
                const __m512 shift = _mm512_set1_ps(seen ? most : 0.0f);
                __m512 total = _mm512_setzero_ps();
                for (int64_t at = 0; at < vectors; ++at) {
                    const __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + 16 * at), shift));
                    total = _mm512_add_ps(total, p);
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(room.weights + i * KEYS + 16 * at), (__m256i)_mm512_cvtneps_pbh(p));
                }
                const float less = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(seen ? before - most : 0.0f)));
                room.most[row + i] = most;
                room.total[row + i] = room.total[row + i] * less + _mm512_reduce_add_ps(total);
                if (block && less != 1.0f)
                    for (int64_t at = 0; at < wide; at += 16) {
                        float* sums = room.sums + (row + i) * wide + at;
                        _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(less)));
                    }
            }
            multiply_all(room.weights, KEYS, values, wide, 2 * wide, padded, room.sums + row * wide, wide, false);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        // A row without any key is 0, as torch has it
        const __m512 total = _mm512_set1_ps(room.total[row] == 0.0f ? 1.0f : room.total[row]);
        for (int64_t at = 0; at < size; at += 16) {
            const __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(_mm512_loadu_ps(room.sums + row * wide + at), total));
            const int64_t left = size - at;
            _mm256_mask_storeu_epi16(out + row * out_stride + at, __mmask16(left < 16 ? (1u << left) - 1 : 0xffffu), y);
        }
    }
}

} // namespace svdq
#endif // __AVX512BF16__
