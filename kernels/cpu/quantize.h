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

// Codes of 6 rows to [16][6], 4 of a row at a time.
template <class V> inline void interleave(const int8_t (&codes)[BLOCK][STEP], uint32_t* to)
{
    if constexpr (V::LANES == 16)
        return V::interleave(codes, to);
    for (int four = 0; four < STEP / 4; ++four)
        for (int row = 0; row < BLOCK; ++row)
            std::memcpy(to + four * BLOCK + row, codes[row] + 4 * four, 4);
}

// (x + shift) / smooth of 64 columns of 6 rows, CHUNK numbers apart, rounded to 16 bit after each step. With FAST the
// quotients are products with reciprocals, two roundings off: a quotient of two bfloat16 numbers is never within 2^-17 of
// the middle between two others.
template <class V, class E, bool FAST>
inline void smooth_rows(const uint16_t* x, const uint16_t* smooth, float added, float (&values)[BLOCK][STEP])
{
    const auto shift = V::set(added);
    const bool shifted = added != 0.0f;
    for (int i = 0; i < STEP; i += V::LANES) {
        auto divisor = V::template load16<E>(smooth + i);
        if constexpr (FAST)
            divisor = V::divide(V::set(1.0f), divisor);
#pragma GCC unroll 6
        for (int row = 0; row < BLOCK; ++row) {
            auto value = V::template load16<E>(x + row * CHUNK + i);
            if (shifted)
                value = V::template rounded<E>(V::add(value, shift));
            if constexpr (FAST)
                V::store(values[row] + i, V::rounded_off_middle(V::multiply(value, divisor)));
            else
                V::store(values[row] + i, V::template rounded_quotient<E>(value, divisor));
        }
    }
}

// The same where fewer than 64 columns are left: zeros behind them.
template <class V, class E, bool FAST>
inline void smooth_last(const uint16_t* x, int64_t columns, const uint16_t* smooth, float added, float (&values)[BLOCK][STEP])
{
    uint16_t divisors[STEP];
    for (int i = 0; i < STEP; ++i)
        divisors[i] = E::from_float(1.0f);
    std::memcpy(divisors, smooth, 2 * columns);
    smooth_rows<V, E, FAST>(x, divisors, added, values);
    for (int row = 0; row < BLOCK; ++row)
        for (int64_t i = columns; i < STEP; ++i)
            values[row][i] = 0.0f;
}

// Whether reciprocals of all these numbers are neither infinite nor subnormal, where quotients may be made with them.
template <class V, class E> inline bool have_reciprocals(const uint16_t* smooth, int64_t k)
{
    if constexpr (!V::RECIPROCALS || !E::IS_BFLOAT16)
        return false;
    uint32_t outside = 0;
    for (int64_t i = 0; i < k; ++i)
        outside |= uint32_t(((smooth[i] >> 7) & 255u) - 2u > 250u);
    return !outside;
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

// The lines of the rows' next chunks, which no hardware foresees: 24 rows are read in turns. They are fetched a few at a
// time beside the work on these chunks, so that neither the memory nor the processor waits.
struct Ahead {
    const char* rows;
    int64_t stride, lines_a_row, next, end;

    template <class V> void fetch(int lines)
    {
        for (int i = 0; i < lines && next < end; ++i, ++next)
            V::prefetch(rows + next / lines_a_row * stride + next % lines_a_row * LINE_BYTES);
    }
};

// A chunk of 6 rows on its way to codes: each stage is done for all of it, as the stages of one step alone are one long
// chain of operations that wait for each other.
template <class V, class P> struct Chunk {
    static constexpr int STEPS = CHUNK / STEP, GROUPS = STEP / P::GROUP, ROOM = BLOCK < V::LANES ? V::LANES : 2 * V::LANES;

    alignas(64) float values[STEPS][BLOCK][STEP];
    alignas(64) float peak[STEPS][GROUPS][ROOM] = {}, inverse[STEPS][GROUPS][ROOM], scale[ROOM];
    alignas(64) int8_t codes[STEPS][BLOCK][STEP];
    alignas(64) int32_t total[ROOM];
    typename V::I sums[STEPS][GROUPS][BLOCK];
};

// Where a chunk of 6 rows comes from and goes to. `codes` [columns/4][6][4], `scales` and `starts` [columns/group][6].
struct ChunkOperands {
    const uint16_t *x, *smooth;
    int64_t columns, unsigned_from;
    float shift;
    int8_t* codes;
    float* scales;
    int32_t* starts;
};

// The smoothed values and the largest of each group. False where FAST may have rounded one of them otherwise than a
// division: where a group has nothing but numbers near the subnormal ones.
template <class V, class P, class E, bool FAST> inline bool smooth_chunk(const ChunkOperands& at, Chunk<V, P>& c, Ahead& ahead, int lines)
{
    auto least = V::set(INFINITY);
    for (int64_t i = 0; i < at.columns; i += STEP) {
        const float added = i >= at.unsigned_from ? at.shift : 0.0f;
        auto& values = c.values[i / STEP];
        ahead.template fetch<V>(lines);
        for (int line = 0; line < BLOCK; ++line) // of the codes of the next chunk
            V::prefetch(at.codes + (CHUNK + i) * BLOCK + line * LINE_BYTES);
        at.columns - i < STEP ? smooth_last<V, E, FAST>(at.x + i, at.columns - i, at.smooth + i, added, values)
                              : smooth_rows<V, E, FAST>(at.x + i, at.smooth + i, added, values);
        for (int group = 0; group < c.GROUPS; ++group) {
            typename V::F most[BLOCK];
#pragma GCC unroll 6
            for (int row = 0; row < BLOCK; ++row) {
                most[row] = V::zero();
#pragma GCC unroll 16
                for (int j = 0; j < P::GROUP; j += V::LANES)
                    most[row] = V::larger_magnitude(most[row], V::load(values[row] + group * P::GROUP + j));
            }
            float* peak = c.peak[i / STEP][group];
            peaks<V>(most, peak);
            for (int row = 0; FAST && row < BLOCK; row += V::LANES) {
                const auto found = V::load(peak + row);
                least = V::smaller(least, V::where_at_least(found, 0x1p-149f, found, V::set(INFINITY)));
            }
        }
    }
    constexpr int LANES = BLOCK < V::LANES ? BLOCK : V::LANES;
    alignas(64) float lanes[V::LANES];
    V::store(lanes, least);
    uint32_t tiny = 0;
    for (int i = 0; FAST && i < LANES; ++i)
        tiny |= uint32_t(bits_of_float(lanes[i]) < bits_of_float(0x1p-110f));
    return !tiny;
}

template <class V, class P, class E, bool RECIPROCALS>
inline void quantize_chunk(const ChunkOperands& at, Chunk<V, P>& c, Ahead& ahead, int lines)
{
    constexpr int GROUPS = c.GROUPS;
    const int steps = int((at.columns + STEP - 1) / STEP);
    if (!RECIPROCALS || !smooth_chunk<V, P, E, true>(at, c, ahead, lines))
        smooth_chunk<V, P, E, false>(at, c, ahead, lines);
    for (int step = 0; step < steps; ++step)
        for (int group = 0; group < GROUPS; ++group) {
            const float* peak = c.peak[step][group];
            float* inverse = c.inverse[step][group];
            scale_groups<V, P, E>(peak, step * STEP >= at.unsigned_from, c.scale, inverse);
            uint32_t endless = 0;
            for (int row = 0; row < BLOCK; ++row)
                endless |= uint32_t(bits_of_float(peak[row]) >= bits_of_float(INFINITY));
            for (int row = 0; endless && row < BLOCK; ++row)
                if (!std::isfinite(peak[row])) { // the row's result is to be NaN
                    std::memset(c.values[step][row] + group * P::GROUP, 0, P::GROUP * sizeof(float));
                    c.scale[row] = NAN;
                    inverse[row] = 0.0f;
                }
            std::memcpy(at.scales + (step * GROUPS + group) * BLOCK, c.scale, BLOCK * sizeof(float));
        }
    for (int step = 0; step < steps; ++step)
        for (int row = 0; row < BLOCK; ++row)
            quantize_row<V, P>(c.values[step][row], c.inverse[step][0] + row, c.ROOM, step * STEP >= at.unsigned_from, c.codes[step][row],
                               c.sums[step][0] + row);
    for (int step = 0; step < steps; ++step)
        for (int group = 0; group < GROUPS; ++group) {
            totals<V>(c.sums[step][group], c.total);
            for (int row = 0; row < BLOCK; ++row)
                at.starts[(step * GROUPS + group) * BLOCK + row] = -P::OFFSET * c.total[row];
        }
    for (int step = 0; step < steps; ++step)
        interleave<V>(c.codes[step], reinterpret_cast<uint32_t*>(at.codes + step * STEP * BLOCK));
}

// `sums` [ROWS][R] += x (ROWS rows of `columns`, CHUNK numbers apart) times down^T, the ranks of VECTORS vectors of it from `r` on.
template <class V, class E, int ROWS, int VECTORS>
inline void add_hidden_ranks(const uint16_t* x, int64_t columns, const uint16_t* down, int64_t rank, int64_t r, float* sums, Ahead& ahead)
{
    typename V::F acc[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            acc[m][v] = V::load(sums + m * rank + r + v * V::LANES);
    const uint16_t* at = down + 2 * r;
    for (int64_t k = 0; k < columns; k += 2, at += 2 * rank) {
        if (k % 4 == 0)
            ahead.template fetch<V>(1);
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
inline void add_hidden(const uint16_t* x, int64_t columns, const uint16_t* down, int64_t rank, float* sums, Ahead& ahead)
{
    constexpr int WIDE = V::LANES == 16 ? 2 : 1; // vectors of ranks at a time
    int64_t r = 0;
    for (; r + WIDE * V::LANES <= rank; r += WIDE * V::LANES)
        add_hidden_ranks<V, E, ROWS, WIDE>(x, columns, down, rank, r, sums, ahead);
    for (; r < rank; r += V::LANES)
        add_hidden_ranks<V, E, ROWS, 1>(x, columns, down, rank, r, sums, ahead);
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

// `count` blocks from `block` on of m rows into `out`. A row is one of `before`, which has a multiple of 64 columns or
// none, and then one of `x`. `sums`: room for [count][6][R]. RECIPROCALS: `have_reciprocals` of the smoothing.
template <class V, class P, class E, bool RECIPROCALS>
inline void quantize_blocks(const Rows& before, const Rows& x, int64_t m, int64_t block, int count, const Quantizer& how,
                            const Quantized& out, float* sums)
{
    const int64_t k = how.k, kp = up_to(k, STEP), groups = kp / P::GROUP, first_row = block * BLOCK;
    const int64_t rows = m - first_row < count * BLOCK ? m - first_row : count * BLOCK;
    alignas(64) uint16_t chunk[MOST_TOGETHER][BLOCK][CHUNK];
    Chunk<V, P> work;
    std::memset(sums, 0, sizeof(float) * count * BLOCK * how.rank);
    std::memset(chunk, 0, sizeof chunk); // rows from m on
    for (int64_t begin = 0, columns; begin < k; begin += columns) {
        const bool early = begin < before.columns;
        const Rows& from = early ? before : x;
        const int64_t at = early ? begin : begin - before.columns, left = from.columns - at;
        columns = left < CHUNK ? left : CHUNK;
        const int64_t lines_a_row = CHUNK * from.bytes() / LINE_BYTES;
        Ahead ahead{from.at(first_row, at + CHUNK), from.stride * from.bytes(), lines_a_row, 0, rows * lines_a_row};
        if (begin + columns == k) { // the next rows
            const Rows& start = before.columns ? before : x;
            ahead.rows = start.at(first_row + count * BLOCK, 0), ahead.stride = start.stride * start.bytes();
        }
        // One half here, the other one beside the hidden vector's products
        const int lines = int(BLOCK * lines_a_row / (CHUNK / STEP) / (how.rank ? 2 : 1));
        for (int b = 0; b < count; ++b) {
            const int64_t first = b * BLOCK, some = rows - first < BLOCK ? rows - first : BLOCK;
            for (int64_t row = 0; row < some; ++row)
                read_row<V, E>(from, first_row + first + row, at, columns, chunk[b][row]);
            const int64_t group = ((block + b) * groups + begin / P::GROUP) * BLOCK;
            const ChunkOperands operands{chunk[b][0], how.smooth + begin, columns, how.unsigned_from - begin, how.shift,
                                         out.codes + ((block + b) * kp + begin) * BLOCK, out.scales + group, out.starts + group};
            quantize_chunk<V, P, E, RECIPROCALS>(operands, work, ahead, lines);
        }
        const uint16_t* down = how.down + begin * how.rank;
        int b = 0;
        if constexpr (V::LANES == 16) // 24 sums hide the time that each addition takes
            for (; b + 2 <= count; b += 2)
                add_hidden<V, E, 2 * BLOCK>(chunk[b][0], columns, down, how.rank, sums + b * BLOCK * how.rank, ahead);
        for (; b < count; ++b)
            add_hidden<V, E, BLOCK>(chunk[b][0], columns, down, how.rank, sums + b * BLOCK * how.rank, ahead);
    }
    for (int b = 0; b < count; ++b)
        store_hidden<V, E>(sums + b * BLOCK * how.rank, how.rank, out.hidden + (block + b) * how.rank * BLOCK);
}

} // namespace svdq
