// Blocks of 6 rows: smooth, quantize, project down, in one read of the input. Bit for bit what solve/quantizers.py
// defines; hidden vectors are one chain of fmas over k, of each pair the odd k first.
#pragma once
#include "layouts.h"

namespace svdq {

constexpr int CHUNK = 256;      // columns that are worked on at a time
constexpr int MOST_TOGETHER = 4; // blocks, so that each read of `down` serves 24 rows; with 256 columns in the first cache
constexpr float E4M3_MOST = 448.0f;

// 1 / scale; 0 where a group is zero, or so small that this would overflow.
template <class V> inline typename V::F reciprocal(typename V::F scale)
{
    const auto inverse = V::divide(V::set(1.0f), scale);
    return V::where_at_least(inverse, INFINITY, V::zero(), inverse);
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

// The largest magnitude of each of 6 vectors, as `V::larger_magnitude` has it, and the sum of each: the first 6 of `to`.
template <class V> inline void peaks(const typename V::F (&rows)[BLOCK], float* to)
{
    if constexpr (V::LANES == 16)
        V::store(to, V::peaks(rows));
    else
        for (int row = 0; row < BLOCK; ++row)
            to[row] = V::peak(rows[row]);
}

template <class V> inline void totals(const typename V::I (&rows)[BLOCK], int32_t* to)
{
    if constexpr (V::LANES == 16)
        V::store(to, V::totals(rows));
    else
        for (int row = 0; row < BLOCK; ++row)
            to[row] = V::total(rows[row]);
}

// Codes of a row's step, in the order that `interleave` wants.
template <class V> inline void store_codes(int8_t* to, const typename V::I (&codes)[STEP / V::LANES])
{
    if constexpr (V::LANES == 16)
        V::store_codes(to, codes);
    else
        for (int i = 0; i < STEP / V::LANES; ++i)
            V::store_bytes(to + i * V::LANES, codes[i]);
}

// (x + shift) / smooth of 64 columns of 6 rows, CHUNK numbers apart, rounded to 16 bit after each step.
template <class V, class E>
inline void smooth_rows(const uint16_t* x, const uint16_t* smooth, float added, float (&values)[BLOCK][STEP])
{
    const auto shift = V::set(added);
    for (int i = 0; i < STEP; i += V::LANES) {
        const auto divisor = V::template load16<E>(smooth + i);
#pragma GCC unroll 6
        for (int row = 0; row < BLOCK; ++row) {
            auto value = V::template load16<E>(x + row * CHUNK + i);
            if (added != 0.0f)
                value = V::template rounded<E>(V::add(value, shift));
            V::store(values[row] + i, V::template rounded_quotient<E>(value, divisor));
        }
    }
}

// The same where fewer than 64 columns are left: zeros behind them.
template <class V, class E>
inline void smooth_last(const uint16_t* x, int64_t columns, const uint16_t* smooth, float added, float (&values)[BLOCK][STEP])
{
    uint16_t divisors[STEP];
    for (int i = 0; i < STEP; ++i)
        divisors[i] = E::from_float(1.0f);
    std::memcpy(divisors, smooth, 2 * columns);
    smooth_rows<V, E>(x, divisors, added, values);
    for (int row = 0; row < BLOCK; ++row)
        for (int64_t i = columns; i < STEP; ++i)
            values[row][i] = 0.0f;
}

// The scales of 6 rows' groups, and what their values are multiplied by.
template <class V, class P, class E> inline void scale_groups(const float* peak, bool without_sign, float* scale, float* inverse)
{
    for (int i = 0; i < BLOCK; i += V::LANES) {
        const auto most = V::load(peak + i);
        if constexpr (P::GROUP == 64) {
            const auto exact = V::multiply(most, V::set(without_sign ? 1.0f / 15.0f : 1.0f / 7.0f));
            V::store(inverse + i, reciprocal<V>(exact));
            V::store(scale + i, V::template rounded<E>(exact));
        } else {
            const auto exact = V::smaller(V::multiply(most, V::set(1.0f / 6.0f)), V::set(E4M3_MOST));
            V::store(inverse + i, reciprocal<V>(exact));
            V::store(scale + i, exact);
        }
    }
    if constexpr (P::GROUP != 64)
        for (int row = 0; row < BLOCK; ++row)
            scale[row] = rounded_to_e4m3(scale[row]);
}

// Codes of a row's smoothed values, and their sums in each group. A signed int4 code needs no limits: the largest value
// is 7 scales.
template <class V, class P>
inline void quantize_row(const float* values, const float* inverses, int64_t stride, bool without_sign, int8_t* codes,
                         typename V::I* sums)
{
    constexpr int VECTORS = P::GROUP / V::LANES;
    typename V::I made[STEP / V::LANES];
#pragma GCC unroll 4
    for (int group = 0; group < STEP / P::GROUP; ++group) {
        const auto inverse = V::set(inverses[group * stride]);
        auto sum = V::to_nearest(V::zero());
#pragma GCC unroll 16
        for (int i = group * VECTORS; i < (group + 1) * VECTORS; ++i) {
            auto value = V::multiply(V::load(values + i * V::LANES), inverse);
            if constexpr (P::GROUP == 64) {
                if (without_sign)
                    value = V::larger(value, V::zero());
            } else {
                value = rounded_to_e2m1<V>(value);
                value = V::add(value, value);
            }
            made[i] = V::to_nearest(value);
            sum = V::add(sum, made[i]);
        }
        sums[group * BLOCK] = sum;
    }
    store_codes<V>(codes, made);
}

// One step of 64 columns of 6 rows: codes [6][64], and the scales and starts of each group, [64/group][6]. `columns` < 64
// at the end of a K that is not a multiple of 64.
template <class V, class P, class E>
inline void quantize_step(const uint16_t* x, int64_t columns, const uint16_t* smooth, bool without_sign, float shift,
                          int8_t (&codes)[BLOCK][STEP], float* scales, int32_t* starts)
{
    constexpr int GROUPS = STEP / P::GROUP, ROOM = BLOCK < V::LANES ? V::LANES : 2 * V::LANES;
    alignas(64) float values[BLOCK][STEP], peak[ROOM] = {}, inverse[GROUPS][ROOM], scale[ROOM];
    alignas(64) int32_t total[ROOM];
    typename V::I sums[GROUPS][BLOCK];
    columns == STEP ? smooth_rows<V, E>(x, smooth, shift, values) : smooth_last<V, E>(x, columns, smooth, shift, values);
    for (int group = 0; group < GROUPS; ++group) {
        typename V::F most[BLOCK];
#pragma GCC unroll 6
        for (int row = 0; row < BLOCK; ++row) {
            most[row] = V::zero();
#pragma GCC unroll 16
            for (int i = 0; i < P::GROUP; i += V::LANES)
                most[row] = V::larger_magnitude(most[row], V::load(values[row] + group * P::GROUP + i));
        }
        peaks<V>(most, peak);
        scale_groups<V, P, E>(peak, without_sign, scale, inverse[group]);
        for (int row = 0; row < BLOCK; ++row)
            if (!std::isfinite(peak[row])) { // the row's result is to be NaN
                std::memset(values[row] + group * P::GROUP, 0, P::GROUP * sizeof(float));
                scale[row] = NAN;
                inverse[group][row] = 0.0f;
            }
        std::memcpy(scales + group * BLOCK, scale, BLOCK * sizeof(float));
    }
    for (int row = 0; row < BLOCK; ++row)
        quantize_row<V, P>(values[row], inverse[0] + row, ROOM, without_sign, codes[row], sums[0] + row);
    for (int group = 0; group < GROUPS; ++group) {
        totals<V>(sums[group], total);
        for (int row = 0; row < BLOCK; ++row)
            starts[group * BLOCK + row] = -P::OFFSET * total[row];
    }
}

// `sums` [ROWS][R] += x (ROWS rows of `columns`, CHUNK numbers apart) times down^T, the ranks of VECTORS vectors of it from `r` on.
template <class V, class E, int ROWS, int VECTORS>
inline void add_hidden_ranks(const uint16_t* x, int64_t columns, const uint16_t* down, int64_t rank, int64_t r, float* sums)
{
    typename V::F acc[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            acc[m][v] = V::load(sums + m * rank + r + v * V::LANES);
    const uint16_t* at = down + 2 * r;
    for (int64_t k = 0; k < columns; k += 2, at += 2 * rank) {
        typename V::template Pair<E> pairs[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            pairs[v] = V::template load_pair<E>(at + 2 * v * V::LANES);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
            uint32_t both;
            std::memcpy(&both, x + m * CHUNK + k, 4);
            for (int v = 0; v < VECTORS; ++v)
                acc[m][v] = V::template add_product<E>(acc[m][v], pairs[v], both);
        }
    }
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            V::store(sums + m * rank + r + v * V::LANES, acc[m][v]);
}

template <class V, class E, int ROWS>
inline void add_hidden(const uint16_t* x, int64_t columns, const uint16_t* down, int64_t rank, float* sums)
{
    constexpr int WIDE = V::LANES == 16 ? 2 : 1; // vectors of ranks at a time
    int64_t r = 0;
    for (; r + WIDE * V::LANES <= rank; r += WIDE * V::LANES)
        add_hidden_ranks<V, E, ROWS, WIDE>(x, columns, down, rank, r, sums);
    for (; r < rank; r += V::LANES)
        add_hidden_ranks<V, E, ROWS, 1>(x, columns, down, rank, r, sums);
}

// Rounded hidden vectors of 6 rows, [R/2][6][2].
template <class V, class E> inline void store_hidden(const float* sums, int64_t rank, uint16_t* to)
{
    for (int row = 0; row < BLOCK; ++row)
        for (int64_t r = 0; r < rank; r += V::LANES) {
            uint16_t bits[V::LANES];
            V::template store16<E>(bits, V::load(sums + row * rank + r));
            for (int i = 0; i < V::LANES; i += 2)
                std::memcpy(to + ((r + i) / 2 * BLOCK + row) * 2, bits + i, 4);
        }
}

// Rows to quantize, 16-bit or float32, `stride` numbers apart: the next `columns` of K.
struct Rows {
    const void* x;
    bool float32;
    int64_t columns, stride;

    const char* at(int64_t row, int64_t column) const { return static_cast<const char*>(x) + (row * stride + column) * bytes(); }
    int bytes() const { return float32 ? 4 : 2; }
};

// `columns` numbers of a row as 16-bit ones. Rows are copied because those of a large power of two's length apart would
// drive each other from the first cache.
template <class V, class E> inline void read_row(const Rows& from, int64_t row, int64_t column, int64_t columns, uint16_t* to)
{
    if (!from.float32) {
        std::memcpy(to, from.at(row, column), 2 * columns);
        return;
    }
    const float* wide = reinterpret_cast<const float*>(from.at(row, column));
    int64_t i = 0;
    for (; i + V::LANES <= columns; i += V::LANES)
        V::template store16<E>(to + i, V::load(wide + i));
    for (; i < columns; ++i)
        to[i] = E::from_float(wide[i]);
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
    for (int64_t begin = 0, columns; begin < k; begin += columns) {
        const bool early = begin < before.columns;
        const Rows& from = early ? before : x;
        const int64_t at = early ? begin : begin - before.columns, left = from.columns - at;
        columns = left < CHUNK ? left : CHUNK;
        for (int b = 0; b < count; ++b) {
            const int64_t first = (block + b) * BLOCK, some = m - first < BLOCK ? m - first : BLOCK;
            for (int64_t row = 0; row < some; ++row)
                read_row<V, E>(from, first + row, at, columns, chunk[b][row]);
            uint32_t* packed = reinterpret_cast<uint32_t*>(out.codes + (block + b) * kp * BLOCK);
            for (int64_t i = 0; i < columns; i += STEP) {
                // The rows' next chunks, which no hardware foresees: 24 rows are read in turns
                for (int64_t row = 0; row < some; ++row)
                    for (int line = 0; line < STEP * from.bytes(); line += LINE_BYTES)
                        V::prefetch(from.at(first + row, at + i + CHUNK) + line);
                const bool without_sign = begin + i >= how.unsigned_from;
                const int64_t here = columns - i < STEP ? columns - i : STEP, step = (begin + i) / STEP;
                const int64_t group = ((block + b) * groups + step * IN_STEP) * BLOCK;
                quantize_step<V, P, E>(chunk[b][0] + i, here, how.smooth + begin + i, without_sign, without_sign ? how.shift : 0.0f,
                                       codes, out.scales + group, out.starts + group);
                interleave<V>(codes, packed + step * (STEP / 4) * BLOCK);
            }
        }
        const uint16_t* down = how.down + begin * how.rank;
        int b = 0;
        if constexpr (V::LANES == 16) // 24 sums hide the time that each addition takes
            for (; b + 2 <= count; b += 2)
                add_hidden<V, E, 2 * BLOCK>(chunk[b][0], columns, down, how.rank, sums + b * BLOCK * how.rank);
        for (; b < count; ++b)
            add_hidden<V, E, BLOCK>(chunk[b][0], columns, down, how.rank, sums + b * BLOCK * how.rank);
    }
    for (int b = 0; b < count; ++b)
        store_hidden<V, E>(sums + b * BLOCK * how.rank, how.rank, out.hidden + (block + b) * how.rank * BLOCK);
}

} // namespace svdq
