// The product of one block of rows with some columns: exact integer sums in a group, one float32 fma a group; then the
// outer scale, the branch, the bias and the rounding to 16 bit.
#pragma once
#include "layouts.h"

namespace svdq {

template <class V> inline typename V::F weight_scale(const uint16_t* at, BFloat16) { return V::template load16<BFloat16>(at); }
template <class V> inline typename V::F weight_scale(const uint16_t* at, Float16) { return V::template load16<Float16>(at); }
template <class V, class E> inline typename V::F weight_scale(const uint8_t* at, E) { return V::load_e4m3(at); }

// `ROWS` rows of a block from `row` on times `VECTORS` vectors of columns from vector `first` of all on.
// `sums` [ROWS][VECTORS * LANES].
template <class V, class P, class E, int ROWS, int VECTORS>
inline void tile(const Quantized& x, int64_t block, int row, const Weights& w, int64_t first, float* sums)
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
    typename V::F total[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v)
            total[m][v] = V::zero();
    for (int64_t group = 0; group < groups; ++group) {
        typename V::Sums whole[ROWS][VECTORS];
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v)
                whole[m][v] = V::begin(starts[group * BLOCK + m]);
        const int32_t* four = codes + group * (P::GROUP / 4) * BLOCK;
#pragma GCC unroll 8
        for (int line = 0; line < P::LINES; ++line) {
            typename V::Codes low[VECTORS], high[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const uint8_t* at = lines[v] + (group * P::LINES + line) * LINE_BYTES;
                const auto both = V::load_codes(at);
                V::prefetch(at + 1024);
                low[v] = V::low(both), high[v] = V::high(both);
                if constexpr (P::OFFSET == NvFp4::OFFSET)
                    low[v] = V::look_up(low[v], NvFp4::TABLE), high[v] = V::look_up(high[v], NvFp4::TABLE);
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
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t panel = (first + v) / IN_PANEL, column = (first + v) * V::LANES;
        if (w.outer) {
            const auto outer = V::load(w.outer + column);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m)
                total[m][v] = V::multiply(total[m][v], outer);
        }
        const uint16_t* up = w.up + (panel * w.rank * PANEL) + (first + v) % IN_PANEL * 2 * V::LANES;
        const uint16_t* hidden = x.hidden + block * w.rank * BLOCK + 2 * row;
        for (int64_t r = 0; r < w.rank; r += 2, up += 2 * PANEL, hidden += 2 * BLOCK) {
            const auto pair = V::template load_pair<E>(up);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m) {
                uint32_t both;
                std::memcpy(&both, hidden + 2 * m, 4);
                total[m][v] = V::template add_product<E>(total[m][v], pair, both);
            }
        }
        if (w.bias) {
            const auto bias = V::load(w.bias + column);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m)
                total[m][v] = V::add(total[m][v], bias);
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m)
            V::store(sums + (m * VECTORS + v) * V::LANES, total[m][v]);
    }
}

template <class V, class P, class E, int VECTORS>
inline void some_rows(int rows, const Quantized& x, int64_t block, int row, const Weights& w, int64_t first, float* sums)
{
    switch (rows) {
    case 1: return tile<V, P, E, 1, VECTORS>(x, block, row, w, first, sums);
    case 2: return tile<V, P, E, 2, VECTORS>(x, block, row, w, first, sums);
    case 3: return tile<V, P, E, 3, VECTORS>(x, block, row, w, first, sums);
    default: break;
    }
    if constexpr (V::TILE_ROWS > 3)
        switch (rows) {
        case 4: return tile<V, P, E, 4, VECTORS>(x, block, row, w, first, sums);
        case 5: return tile<V, P, E, 5, VECTORS>(x, block, row, w, first, sums);
        default: return tile<V, P, E, 6, VECTORS>(x, block, row, w, first, sums);
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

template <class V, class E>
inline void write_row(const float* sums, const Result& to, int64_t row, int64_t column, int64_t columns)
{
    uint16_t bits[2 * PANEL];
    const int64_t padded = up_to(columns, V::LANES);
    for (int64_t i = 0; i < padded; i += V::LANES)
        V::template store16<E>(bits + i, V::load(sums + i));
    if (to.activation)
        for (int64_t i = 0; i < columns; ++i)
            bits[i] = to.activation[bits[i]];
    const int64_t at = row * to.stride + column;
    if (to.float32)
        for (int64_t i = 0; i < columns; ++i)
            static_cast<float*>(to.y)[at + i] = E::to_float(bits[i]);
    else
        std::memcpy(static_cast<uint16_t*>(to.y) + at, bits, 2 * columns);
}

// Rows of block `block` (`rows` of them) times the columns of `panels` panels from `panel` on. Row 0 of the block is row
// `row_of_result` of the result.
template <class V, class P, class E>
inline void multiply_block(const Quantized& x, int64_t block, int rows, const Weights& w, int64_t panel, int64_t panels,
                           const Result& to, int64_t row_of_result)
{
    constexpr int IN_PANEL = PANEL / V::LANES, WIDE = V::TILE_VECTORS;
    alignas(64) float sums[V::TILE_ROWS * WIDE * V::LANES];
    const int64_t end = (panel + panels) * IN_PANEL;
    for (int64_t first = panel * IN_PANEL; first < end;) {
        const bool wide = first + WIDE <= end;
        const int64_t vectors = wide ? WIDE : 1, column = first * V::LANES;
        const int64_t left = w.n - column, columns = left < vectors * V::LANES ? left : vectors * V::LANES;
        for (int row = 0; row < rows && columns > 0; row += V::TILE_ROWS) {
            const int some = rows - row < V::TILE_ROWS ? rows - row : V::TILE_ROWS;
            if (wide)
                some_rows<V, P, E, WIDE>(some, x, block, row, w, first, sums);
            else
                some_rows<V, P, E, 1>(some, x, block, row, w, first, sums);
            for (int m = 0; m < some; ++m)
                write_row<V, E>(sums + m * vectors * V::LANES, to, row_of_result + row + m, column, columns);
        }
        first += vectors;
    }
}

} // namespace svdq
