// 4-bit weights with 16-bit activations, for layers that see few rows. Each weight is code * scale + zero, rounded to 16
// bit; a result is one chain of fmas over k.
#pragma once
#include "layouts.h"

namespace svdq {

// Scales and zeros [panel][K/64][2][16] 16-bit; codes as of int4 layers, but 0..15.
struct W4A16Weights {
    const uint8_t* codes;
    const uint16_t* scales;
    const uint16_t* bias;
    int64_t n, k;
};

template <class V, class E, int ROWS>
inline void w4a16_tile(const float* x, int64_t stride, const W4A16Weights& w, int64_t first, float* sums)
{
    constexpr int IN_PANEL = PANEL / V::LANES;
    const int64_t panel = first / IN_PANEL, part = first % IN_PANEL, groups = w.k / STEP;
    const uint8_t* line = w.codes + panel * (w.k / LINE_K) * LINE_BYTES + part * 4 * V::LANES;
    const uint16_t* scales = w.scales + panel * groups * 2 * PANEL + part * V::LANES;
    typename V::F total[ROWS];
    for (auto& each : total)
        each = V::zero();
    for (int64_t group = 0; group < groups; ++group, scales += 2 * PANEL) {
        const auto scale = V::template load16<E>(scales), zero = V::template load16<E>(scales + PANEL);
        for (int64_t k = group * STEP; k < (group + 1) * STEP; k += LINE_K, line += LINE_BYTES) {
            const auto both = V::load_codes(line);
            const typename V::Codes halves[2] = {V::low(both), V::high(both)};
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const auto weight = V::template rounded<E>(V::fma(V::byte(halves[half], i), scale, zero));
#pragma GCC unroll 8
                    for (int m = 0; m < ROWS; ++m)
                        total[m] = V::fma(weight, V::set(x[m * stride + k + 4 * half + i]), total[m]);
                }
        }
    }
    for (int m = 0; m < ROWS; ++m) {
        if (w.bias)
            total[m] = V::add(total[m], V::template load16<E>(w.bias + first * V::LANES));
        V::store(sums + m * V::LANES, total[m]);
    }
}

// Rows of `x` (rows, k) float32 times one vector of columns.
template <class V, class E>
inline void w4a16_columns(const float* x, int64_t rows, const W4A16Weights& w, int64_t first, uint16_t* y)
{
    float sums[4 * V::LANES];
    uint16_t bits[V::LANES];
    const int64_t column = first * V::LANES, left = w.n - column, columns = left < V::LANES ? left : V::LANES;
    for (int64_t row = 0; row < rows && columns > 0; row += 4) {
        const int64_t some = rows - row < 4 ? rows - row : 4;
        const float* from = x + row * w.k;
        switch (some) {
        case 1: w4a16_tile<V, E, 1>(from, w.k, w, first, sums); break;
        case 2: w4a16_tile<V, E, 2>(from, w.k, w, first, sums); break;
        case 3: w4a16_tile<V, E, 3>(from, w.k, w, first, sums); break;
        default: w4a16_tile<V, E, 4>(from, w.k, w, first, sums);
        }
        for (int64_t m = 0; m < some; ++m) {
            V::template store16<E>(bits, V::load(sums + m * V::LANES));
            std::memcpy(y + (row + m) * w.n + column, bits, 2 * columns);
        }
    }
}

} // namespace svdq
