// The product of blocks of rows with some columns: exact integer sums in a group, one float32 fma a group; then the
// outer scale, the branch, the bias and the rounding to 16 bit.
#pragma once
#include <type_traits>

#include "layouts.h"

namespace svdq {

template <class V> inline typename V::F weight_scale(const uint16_t* at, BFloat16) { return V::template load16<BFloat16>(at); }
template <class V> inline typename V::F weight_scale(const uint16_t* at, Float16) { return V::template load16<Float16>(at); }
template <class V, class E> inline typename V::F weight_scale(const uint8_t* at, E) { return V::load_e4m3(at); }

// What a tile fetches beside its work, a few lines a group: the next panels' codes, into the second cache, whose stream
// is too short for the hardware to foresee; and what `finish` will read, which the codes drove from the first cache.
struct Beside {
    const uint8_t* codes;
    int64_t lines; // of them a group, from the tile's first on
    const uint16_t *up, *hidden;
};

// The codes in the lower and in the upper nibbles of a line: int4's with their offset, twice e2m1's with its.
template <class V, class P> inline typename V::Codes low_codes(typename V::Codes both)
{
    if constexpr (P::OFFSET == NvFp4::OFFSET)
        return V::look_up(V::low(both), NvFp4::TABLE);
    else
        return V::low(both);
}
template <class V, class P> inline typename V::Codes high_codes(typename V::Codes both)
{
    if constexpr (P::OFFSET == NvFp4::OFFSET)
        return V::look_up(V::high(both), NvFp4::TABLE);
    else
        return V::high(both);
}

// A group's sums of ROWS rows times VECTORS vectors of columns, starts included, by products of 2 rows and 2 columns over
// 8 k: 4 of one line and, at the same place in it, 4 of the next. `lines`: of each vector, the group's first; `four`: of
// the first row, as 4 codes each. An odd number of rows ends with one of the block that is not asked for.
template <class V, class P, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void sum_squares(const uint8_t* const (&lines)[VECTORS], const int32_t* four, const int32_t* starts,
                                               typename V::Sums (&whole)[ROWS][VECTORS])
{
    static_assert(V::TILE_ROWS == BLOCK && P::LINES % 2 == 0, "whole blocks, lines in pairs");
    constexpr int PAIRS = (ROWS + 1) / 2;
    typename V::Square sums[PAIRS][VECTORS][2];
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            sums[pair][v][0] = sums[pair][v][1] = V::begin_square(starts + 2 * pair);
    // Unrolled, all lines of a group would be loaded first, and the sums stored and loaded again
#pragma GCC unroll 1
    for (int line = 0; line < P::LINES; line += 2) {
        typename V::Codes columns[2][VECTORS][2];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const uint8_t* at = lines[v] + line * LINE_BYTES;
            const auto one = V::load_codes(at), next = V::load_codes(at + LINE_BYTES);
            V::prefetch(at + 1024);
            V::prefetch(at + 1024 + LINE_BYTES);
            const typename V::Codes both[2] = {V::first_columns(one, next), V::last_columns(one, next)};
            for (int half = 0; half < 2; ++half)
                columns[0][v][half] = low_codes<V, P>(both[half]), columns[1][v][half] = high_codes<V, P>(both[half]);
        }
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            const int32_t* at = four + (2 * line + part) * BLOCK;
#pragma GCC unroll 4
            for (int pair = 0; pair < PAIRS; ++pair) {
                const auto rows = V::two_rows(at + 2 * pair, at + 2 * BLOCK + 2 * pair);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v)
                    for (int half = 0; half < 2; ++half)
                        sums[pair][v][half] = V::multiply_square(sums[pair][v][half], rows, columns[part][v][half]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            whole[m][v] = m % 2 ? V::second_row(sums[m / 2][v][0], sums[m / 2][v][1]) : V::first_row(sums[m / 2][v][0], sums[m / 2][v][1]);
}

// `ROWS` rows of a block from `row` on times `VECTORS` vectors of columns from vector `first` of all on.
// `sums` [ROWS][VECTORS * LANES].
template <class V, class P, class E, int ROWS, int VECTORS>
inline void tile(const Quantized& x, int64_t block, int row, const Weights& w, int64_t first, const Beside& beside, float* sums)
{
    constexpr int IN_PANEL = PANEL / V::LANES;
    const int64_t kp = up_to(w.k, STEP), groups = kp / P::GROUP;
    const int32_t* codes = reinterpret_cast<const int32_t*>(x.codes + block * kp * BLOCK) + row;
    const float* scales = x.scales + block * groups * BLOCK + row;
    const int32_t* starts = x.starts + block * groups * BLOCK + row;
    const uint8_t* lines[VECTORS];
    const typename P::Scale* weight_scales[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t panel = (first + v) / IN_PANEL, part = (first + v) % IN_PANEL;
        lines[v] = w.codes + panel * (kp / LINE_K) * LINE_BYTES + part * 4 * V::LANES;
        weight_scales[v] = static_cast<const typename P::Scale*>(w.scales) + panel * groups * PANEL + part * V::LANES;
    }
    const int64_t up_lines = w.rank * VECTORS * V::LANES * 2 / LINE_BYTES;
    const uint8_t* next = beside.codes;
    typename V::F total[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            total[m][v] = V::zero();
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < beside.lines; ++i, next += LINE_BYTES)
            V::prefetch_far(next);
        if (const int64_t line = group + up_lines - groups; line >= 0) {
            V::prefetch(beside.up + line * LINE_BYTES / 2);
            if (line % 2 == 0)
                V::prefetch(beside.hidden + line / 2 * LINE_BYTES / 2);
        }
        typename V::Sums whole[ROWS][VECTORS];
        const int32_t* four = codes + group * (P::GROUP / 4) * BLOCK;
        if constexpr (V::SQUARES) {
            const uint8_t* here[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                here[v] = lines[v] + group * P::LINES * LINE_BYTES;
            sum_squares<V, P>(here, four, starts + group * BLOCK, whole);
        } else {
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v)
                    whole[m][v] = V::begin(starts[group * BLOCK + m]);
#pragma GCC unroll 8
            for (int line = 0; line < P::LINES; ++line) {
                typename V::Codes low[VECTORS], high[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    const uint8_t* at = lines[v] + (group * P::LINES + line) * LINE_BYTES;
                    const auto both = V::load_codes(at);
                    V::prefetch(at + 1024);
                    low[v] = low_codes<V, P>(both), high[v] = high_codes<V, P>(both);
                }
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v)
                        whole[m][v] = V::dot(whole[m][v], low[v], four[2 * line * BLOCK + m]);
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v)
                        whole[m][v] = V::dot(whole[m][v], high[v], four[(2 * line + 1) * BLOCK + m]);
            }
        }
        typename V::F scale[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            scale[v] = weight_scale<V>(weight_scales[v] + group * PANEL, E{});
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const auto row_scale = V::set(scales[group * BLOCK + m]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                total[m][v] = V::fma(V::finish(whole[m][v], starts[group * BLOCK + m]), V::multiply(row_scale, scale[v]), total[m][v]);
        }
    }
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            V::store(sums + (m * VECTORS + v) * V::LANES, total[m][v]);
}

// Calls `of` with the constant `rows`, 1 to V::TILE_ROWS.
template <class V, class Of> inline void with_rows(int rows, Of of)
{
    switch (rows) {
    case 1: return of(std::integral_constant<int, 1>{});
    case 2: return of(std::integral_constant<int, 2>{});
    case 3: return of(std::integral_constant<int, 3>{});
    default: break;
    }
    if constexpr (V::TILE_ROWS > 3)
        switch (rows) {
        case 4: return of(std::integral_constant<int, 4>{});
        case 5: return of(std::integral_constant<int, 5>{});
        default: return of(std::integral_constant<int, 6>{});
        }
}

// A result (m, n): 16-bit, or float32 that was rounded to 16 bit. `activation`: by the bits of a result, what to write
// instead (GELU).
struct Result {
    void* y;
    bool float32;
    const uint16_t* activation;
    int64_t stride;
};

template <class E> inline void write_row(uint16_t* bits, const Result& to, int64_t at, int64_t columns)
{
    if (to.activation)
        for (int64_t i = 0; i < columns; ++i)
            bits[i] = to.activation[bits[i]];
    if (to.float32)
        for (int64_t i = 0; i < columns; ++i)
            static_cast<float*>(to.y)[at + i] = E::to_float(bits[i]);
    else
        std::memcpy(static_cast<uint16_t*>(to.y) + at, bits, 2 * columns);
}

// What follows the groups, of ROWS rows from row `row` of a block on, which may end in the next block. `sums`: of
// `tile`. `columns`: of these vectors, those that the result has.
template <class V, class E, int ROWS, int VECTORS>
inline void finish(const float* sums, const Quantized& x, int64_t block, int row, const Weights& w, int64_t first, int64_t columns,
                   const Result& to, int64_t row_of_result)
{
    constexpr int IN_PANEL = PANEL / V::LANES, WIDTH = VECTORS * V::LANES;
    typename V::F total[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            total[m][v] = V::load(sums + m * WIDTH + v * V::LANES);
    if (w.outer)
        for (int v = 0; v < VECTORS; ++v) {
            const auto outer = V::load(w.outer + (first + v) * V::LANES);
            for (int m = 0; m < ROWS; ++m)
                total[m][v] = V::multiply(total[m][v], outer);
        }
    const uint16_t* ups[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
        ups[v] = w.up + (first + v) / IN_PANEL * w.rank * PANEL + (first + v) % IN_PANEL * 2 * V::LANES;
    const uint16_t* hidden = x.hidden + block * w.rank * BLOCK + 2 * row;
    const uint16_t* next = hidden + w.rank * BLOCK;
    // All sums in turns: an addition waits for the one before it
    for (int64_t r = 0; r < w.rank; r += 2, hidden += 2 * BLOCK, next += 2 * BLOCK) {
        typename V::template Pair<E> pairs[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            pairs[v] = V::template load_pair<E>(ups[v] + r * PANEL);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; ++m) {
            uint32_t both;
            std::memcpy(&both, m < BLOCK ? hidden + 2 * m : next + 2 * (m - BLOCK), 4);
            for (int v = 0; v < VECTORS; ++v)
                total[m][v] = V::template add_product<E>(total[m][v], pairs[v], both);
        }
    }
    if (w.bias)
        for (int v = 0; v < VECTORS; ++v) {
            const auto bias = V::load(w.bias + (first + v) * V::LANES);
            for (int m = 0; m < ROWS; ++m)
                total[m][v] = V::add(total[m][v], bias);
        }
    const bool as_is = columns == WIDTH && !to.float32 && !to.activation;
    for (int m = 0; m < ROWS; ++m) {
        const int64_t at = (row_of_result + m) * to.stride + first * V::LANES;
        uint16_t room[WIDTH], *bits = as_is ? static_cast<uint16_t*>(to.y) + at : room;
        for (int v = 0; v < VECTORS; ++v)
            V::template store16<E>(bits + v * V::LANES, total[m][v]);
        if (!as_is)
            write_row<E>(room, to, at, columns);
    }
}

// `rows` rows from block `block` on times the columns of `panels` panels from `panel` on. The block's row 0 is row
// `row_of_result` of the result. At most V::BLOCKS_AT_ONCE blocks. `next` and `lines`: see Beside; those of the first block.
template <class V, class P, class E>
inline void multiply_blocks(const Quantized& x, int64_t block, int rows, const Weights& w, int64_t panel, int64_t panels,
                            const Result& to, int64_t row_of_result, const uint8_t* next, int64_t lines)
{
    constexpr int IN_PANEL = PANEL / V::LANES, MOST = V::BLOCKS_AT_ONCE * BLOCK;
    alignas(64) float sums[MOST * V::TILE_VECTORS * V::LANES];
    const int64_t next_bytes = up_to(w.k, STEP) / P::GROUP * lines * LINE_BYTES;
    const auto columns_of = [&](int64_t first, auto vectors) {
        constexpr int VECTORS = decltype(vectors)::value, WIDTH = VECTORS * V::LANES;
        const int64_t left = w.n - first * V::LANES, columns = left < WIDTH ? left : WIDTH;
        if (columns <= 0)
            return;
        const auto each_tile = [&](auto of) {
            for (int row = 0; row < rows; row += V::TILE_ROWS)
                with_rows<V>(rows - row < V::TILE_ROWS ? rows - row : V::TILE_ROWS, [&](auto some) {
                    of(block + row / BLOCK, row % BLOCK, sums + row * WIDTH, some, row_of_result + row);
                });
        };
        const uint16_t *up = w.up + first / IN_PANEL * w.rank * PANEL, *hidden = x.hidden + block * w.rank * BLOCK;
        each_tile([&](int64_t at, int row, float* to, auto some, int64_t) {
            const bool once = row == 0 && first == panel * IN_PANEL; // where a block takes several tiles
            const Beside beside{next + (at - block) * next_bytes, once ? lines : 0, up, hidden};
            tile<V, P, E, decltype(some)::value, VECTORS>(x, at, row, w, first, beside, to);
        });
        if constexpr (V::BLOCKS_AT_ONCE > 1)
            if (rows == MOST)
                return finish<V, E, MOST, VECTORS>(sums, x, block, 0, w, first, columns, to, row_of_result);
        each_tile([&](int64_t at, int row, const float* from, auto some, int64_t result) {
            finish<V, E, decltype(some)::value, VECTORS>(from, x, at, row, w, first, columns, to, result);
        });
    };
    const int64_t end = (panel + panels) * IN_PANEL;
    int64_t first = panel * IN_PANEL;
    for (; first + V::TILE_VECTORS <= end; first += V::TILE_VECTORS)
        columns_of(first, std::integral_constant<int, V::TILE_VECTORS>{});
    for (; first < end; ++first)
        columns_of(first, std::integral_constant<int, 1>{});
}

} // namespace svdq
