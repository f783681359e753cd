// Blocks of 6 rows: smooth, quantize, project down, in one read of the input. Bit for bit what solve/quantizers.py
// defines; hidden vectors are one chain of fmas over k, of each pair the odd k first.
#pragma once
#include "layouts.h"

namespace svdq {

constexpr int CHUNK = 256;      // columns that are worked on at a time
constexpr int MOST_TOGETHER = 4; // blocks, so that each read of `down` serves 24 rows; with 256 columns in the first cache
constexpr float E4M3_MOST = 448.0f;

// 1 / scale; 0 where a group is zero, or so small that this would overflow.
inline float reciprocal(float scale)
{
    const float inverse = 1.0f / scale;
    return std::isinf(inverse) ? 0.0f : inverse;
}

template <class V> inline typename V::F rounded_to_e2m1(typename V::F x)
{
    // Adding 1.5 * 2^23 steps leaves whole steps, ties to even: steps of 0.5 below 2, of 1 below 4, then of 2
    const auto size = V::magnitude(x);
    const auto coarse = V::where_at_least(size, 4.0f, V::set(25165824.0f), V::set(12582912.0f));
    const auto offset = V::where_at_least(size, 2.0f, coarse, V::set(6291456.0f));
    const auto whole = V::subtract(V::add(x, offset), offset);
    return V::larger(V::smaller(whole, V::set(6.0f)), V::set(-6.0f));
}

struct Group {
    float scale;
    int32_t start;
};

// Codes of one group of smoothed values that are 16-bit numbers.
template <class V, class P, class E>
inline Group quantize_group(const typename V::F* values, bool without_sign, int8_t* codes)
{
    constexpr int VECTORS = P::GROUP / V::LANES;
    auto most = V::zero();
    for (int i = 0; i < VECTORS; ++i)
        most = V::larger_magnitude(most, values[i]);
    const float peak = V::peak(most);
    if (!std::isfinite(peak)) { // the row's result is to be NaN
        std::memset(codes, 0, P::GROUP);
        return {NAN, 0};
    }
    auto sum = V::to_nearest(V::zero());
    if constexpr (P::GROUP == 64) {
        const float scale = peak * (without_sign ? 1.0f / 15.0f : 1.0f / 7.0f);
        const auto inverse = V::set(reciprocal(scale)), most_code = V::set(without_sign ? 15.0f : 7.0f),
                   least = V::set(without_sign ? 0.0f : -8.0f);
        for (int i = 0; i < VECTORS; ++i) {
            const auto clamped = V::larger(V::smaller(V::multiply(values[i], inverse), most_code), least);
            const auto code = V::to_nearest(clamped);
            sum = V::add(sum, code);
            V::store_bytes(codes + i * V::LANES, code);
        }
        return {E::to_float(E::from_float(scale)), -P::OFFSET * V::total(sum)};
    } else {
        const float wanted = peak * (1.0f / 6.0f), scale = wanted > E4M3_MOST ? E4M3_MOST : wanted;
        const auto inverse = V::set(reciprocal(scale));
        for (int i = 0; i < VECTORS; ++i) {
            const auto value = rounded_to_e2m1<V>(V::multiply(values[i], inverse));
            const auto code = V::to_nearest(V::add(value, value));
            sum = V::add(sum, code);
            V::store_bytes(codes + i * V::LANES, code);
        }
        return {rounded_to_e4m3(scale), -P::OFFSET * V::total(sum)};
    }
}

// (x + shift) / smooth, rounded to 16 bit after each step.
template <class V, class E>
inline void smooth_row(const uint16_t* x, const uint16_t* smooth, float added, typename V::F* values)
{
    const auto shift = V::set(added);
    for (int i = 0; i < STEP / V::LANES; ++i) {
        auto value = V::template load16<E>(x + i * V::LANES);
        if (added != 0.0f)
            value = V::template rounded<E>(V::add(value, shift));
        values[i] = V::template rounded_quotient<E>(value, V::template load16<E>(smooth + i * V::LANES));
    }
}

// `sums` [6][R] += x (6 rows of `columns`) times down^T.
template <class V, class E>
inline void add_hidden(const uint16_t* const* x, int64_t columns, const uint16_t* down, int64_t rank, float* sums)
{
    constexpr int WIDE = V::LANES == 16 ? 2 : 1; // vectors of ranks at a time
    for (int64_t r = 0; r < rank; r += WIDE * V::LANES) {
        const bool both = WIDE == 2 && r + V::LANES < rank;
        typename V::F acc[BLOCK][2];
        for (int m = 0; m < BLOCK; ++m) {
            acc[m][0] = V::load(sums + m * rank + r);
            acc[m][1] = both ? V::load(sums + m * rank + r + V::LANES) : V::zero();
        }
        const uint16_t* at = down + 2 * r;
        if (both)
            for (int64_t k = 0; k < columns; k += 2, at += 2 * rank) {
                const auto first = V::template load_pair<E>(at), second = V::template load_pair<E>(at + 2 * V::LANES);
#pragma GCC unroll 6
                for (int m = 0; m < BLOCK; ++m) {
                    uint32_t pair;
                    std::memcpy(&pair, x[m] + k, 4);
                    acc[m][0] = V::template add_product<E>(acc[m][0], first, pair);
                    acc[m][1] = V::template add_product<E>(acc[m][1], second, pair);
                }
            }
        else
            for (int64_t k = 0; k < columns; k += 2, at += 2 * rank) {
                const auto first = V::template load_pair<E>(at);
#pragma GCC unroll 6
                for (int m = 0; m < BLOCK; ++m) {
                    uint32_t pair;
                    std::memcpy(&pair, x[m] + k, 4);
                    acc[m][0] = V::template add_product<E>(acc[m][0], first, pair);
                }
            }
        for (int m = 0; m < BLOCK; ++m) {
            V::store(sums + m * rank + r, acc[m][0]);
            if (both)
                V::store(sums + m * rank + r + V::LANES, acc[m][1]);
        }
    }
}

// Rows to quantize, 16-bit or float32, `stride` numbers apart: the next `columns` of K.
struct Rows {
    const void* x;
    bool float32;
    int64_t columns, stride;
};

// `columns` numbers of a row from `column` on as 16-bit ones: where they are stored, or rounded into `room`.
template <class V, class E>
inline const uint16_t* read_row(const Rows& from, int64_t row, int64_t column, int64_t columns, uint16_t* room)
{
    const int64_t at = row * from.stride + column;
    if (!from.float32)
        return static_cast<const uint16_t*>(from.x) + at;
    const float* wide = static_cast<const float*>(from.x) + at;
    int64_t i = 0;
    for (; i + V::LANES <= columns; i += V::LANES)
        V::template store16<E>(room + i, V::load(wide + i));
    for (; i < columns; ++i)
        room[i] = E::from_float(wide[i]);
    return room;
}

// One step of 64 columns of one row: codes, and the scale and start of each group. `columns` < 64 at the end of a K that
// is not a multiple of 64.
template <class V, class P, class E>
inline void quantize_step(const uint16_t* x, int64_t columns, const uint16_t* smooth, bool without_sign, float shift, int8_t* codes,
                          Group* groups)
{
    typename V::F values[STEP / V::LANES];
    if (columns == STEP) {
        smooth_row<V, E>(x, smooth, shift, values);
    } else {
        uint16_t x_end[STEP] = {}, smooth_end[STEP];
        for (int i = 0; i < STEP; ++i)
            smooth_end[i] = E::from_float(1.0f);
        std::memcpy(x_end, x, 2 * columns);
        std::memcpy(smooth_end, smooth, 2 * columns);
        smooth_row<V, E>(x_end, smooth_end, shift, values);
        float numbers[STEP];
        for (int i = 0; i < STEP / V::LANES; ++i)
            V::store(numbers + i * V::LANES, values[i]);
        for (int64_t i = columns; i < STEP; ++i)
            numbers[i] = 0.0f;
        for (int i = 0; i < STEP / V::LANES; ++i)
            values[i] = V::load(numbers + i * V::LANES);
    }
    for (int i = 0; i < STEP / P::GROUP; ++i)
        groups[i] = quantize_group<V, P, E>(values + i * P::GROUP / V::LANES, without_sign, codes + i * P::GROUP);
}

// Codes of 6 rows to [16][6], 4 of a row at a time.
template <class V> inline void interleave(const int8_t (&codes)[BLOCK][STEP], uint32_t* to)
{
    if constexpr (V::LANES == 16)
        return V::interleave(codes, to);
    for (int four = 0; four < STEP / 4; ++four)
        for (int row = 0; row < BLOCK; ++row)
            std::memcpy(to + four * BLOCK + row, codes[row] + 4 * four, 4);
}

// `count` blocks from `block` on of m rows into `out`. A row is one of `before`, which has a multiple of 64 columns or
// none, and then one of `x`. `sums`: room for [count][6][R].
template <class V, class P, class E>
inline void quantize_blocks(const Rows& before, const Rows& x, int64_t m, int64_t block, int count, const Quantizer& how,
                            const Quantized& out, float* sums)
{
    constexpr int IN_STEP = STEP / P::GROUP;
    const int64_t k = how.k, kp = up_to(k, STEP), groups = kp / P::GROUP;
    alignas(64) uint16_t chunk[MOST_TOGETHER][BLOCK][CHUNK];
    alignas(64) int8_t codes[BLOCK][STEP];
    std::memset(sums, 0, sizeof(float) * count * BLOCK * how.rank);
    std::memset(chunk, 0, sizeof chunk); // rows from m on
    const uint16_t* rows[MOST_TOGETHER][BLOCK];
    for (int64_t begin = 0, columns; begin < k; begin += columns) {
        const bool early = begin < before.columns;
        const Rows& from = early ? before : x;
        const int64_t at = early ? begin : begin - before.columns, left = from.columns - at;
        columns = left < CHUNK ? left : CHUNK;
        for (int b = 0; b < count; ++b) {
            const int64_t first = (block + b) * BLOCK;
            for (int row = 0; row < BLOCK; ++row) {
                uint16_t* room = chunk[b][row];
                rows[b][row] = first + row < m ? read_row<V, E>(from, first + row, at, columns, room) : room;
            }
            uint32_t* packed = reinterpret_cast<uint32_t*>(out.codes + (block + b) * kp * BLOCK);
            for (int64_t i = 0; i < columns; i += STEP) {
                const bool without_sign = begin + i >= how.unsigned_from;
                const int64_t here = columns - i < STEP ? columns - i : STEP, step = (begin + i) / STEP;
                Group made[BLOCK][IN_STEP];
                for (int row = 0; row < BLOCK; ++row) {
                    // The row's next chunk, which no hardware foresees: 24 rows are read in turns
                    V::prefetch(rows[b][row] + i + CHUNK);
                    V::prefetch(rows[b][row] + i + CHUNK + STEP / 2);
                    quantize_step<V, P, E>(rows[b][row] + i, here, how.smooth + begin + i, without_sign,
                                           without_sign ? how.shift : 0.0f, codes[row], made[row]);
                }
                const int64_t group = (block + b) * groups + step * IN_STEP;
                for (int g = 0; g < IN_STEP; ++g)
                    for (int row = 0; row < BLOCK; ++row) {
                        out.scales[(group + g) * BLOCK + row] = made[row][g].scale;
                        out.starts[(group + g) * BLOCK + row] = made[row][g].start;
                    }
                interleave<V>(codes, packed + step * (STEP / 4) * BLOCK);
            }
        }
        for (int b = 0; b < count && how.rank; ++b)
            add_hidden<V, E>(rows[b], columns, how.down + begin * how.rank, how.rank, sums + b * BLOCK * how.rank);
    }
    uint16_t* hidden = out.hidden + block * how.rank * BLOCK;
    for (int b = 0; b < count; ++b, hidden += how.rank * BLOCK, sums += how.rank * BLOCK)
        for (int row = 0; row < BLOCK; ++row)
            for (int64_t r = 0; r < how.rank; ++r)
                hidden[(r / 2 * BLOCK + row) * 2 + r % 2] = E::from_float(sums[row * how.rank + r]);
}

} // namespace svdq
