// kv-learned: coefficients of a group of layers to keys or values. Each value is a sum of products over the coefficients in
// their order, a float32 product and a float32 sum at a time: the same bits on every instruction set, and in torch.
#pragma once
#include "kv.h"
#include "turn.h"

namespace {

template <class Isa>
struct Learned {
    static constexpr int kLanes = Isa::kLanes;
    static constexpr int kRows = kLanes == 16 ? 6 : 4;     // of the matrix at a time
    static constexpr int kWide = kLanes == 16 ? 4 : 2;     // vectors of tokens at a time: kRows * kWide sums in registers
    static constexpr int kTokens = kWide * kLanes;
    static constexpr int kTurn = 16;                       // tokens that are turned at a time
    typedef float Vector __attribute__((vector_size(4 * Isa::kLanes)));

    // Tokens that lie in whole tiles.
    static int64_t padded(int64_t tokens) { return (tokens + kTokens - 1) / kTokens * kTokens; }

    // Values of heads, layer after layer, of a group; kvstored_kernel.h says what of. used: how many escapes were.
    static int decode(int dtype, const kvk_learned& how, const uint8_t* symbols, const int32_t* live, const uint8_t* classes,
                      const int16_t* escapes, int64_t escaped, void* out, int64_t* used) {
        const int64_t wide = padded(how.tokens), n = how.layers * how.heads * how.d;
        Floats steps(how.live * wide), rows(how.d * wide);
        if (!steps || !rows) return KVK_NO_MEMORY;
        *used = 0;
        for (int64_t k = 0; k < how.live; ++k) {
            const float* table = how.values + classes[k] * 256;
            const uint8_t* from = symbols + k * how.tokens;
            for (int64_t t = 0; t < wide; t += kTokens) {
                float* const to = steps.get() + t * how.live + k * kTokens;
                const int64_t n_here = how.tokens - t < kTokens ? how.tokens - t : kTokens;
                bool any = false;
                for (int64_t i = 0; i < n_here; ++i) {
                    to[i] = table[from[t + i]];
                    any |= from[t + i] == 0;
                }
                for (int64_t i = 0; any && i < n_here; ++i) {
                    if (from[t + i]) continue;
                    if (*used == escaped) return KVK_BAD_ARGUMENT;
                    to[i] = static_cast<float>(escapes[(*used)++]);
                }
                for (int64_t i = n_here; i < kTokens; ++i) to[i] = 0.0f;
            }
        }
        uint32_t most = 0;
        for (int64_t head = 0; head < how.layers * how.heads; ++head) {
            const float* matrix = how.matrix + head * how.d * n;
            for (int64_t r = 0; r < how.d; r += kRows)
                multiply(matrix, n, r, how.d - 1, live, how.live, steps.get(), wide, rows.get());
            const int64_t layer = head / how.heads;
            const int64_t at = layer * how.stride + head % how.heads * how.d;
            finish(dtype, how, layer, rows.get(), wide, how.mean + head * how.d, at, out, &most);
        }
        const uint32_t limit = dtype == KVK_F32 ? 0x7f800000u : dtype == KVK_BF16 ? 0x7f7f8000u : 0x477ff000u;
        return most >= limit ? KVK_NOT_FINITE : KVK_OK;
    }

    // steps: tile after tile of tokens, a coefficient's behind the other's. kRows rows of the matrix from `first` on, times the coefficients. Beyond the last row, that one again.
    static void multiply(const float* matrix, int64_t n, int64_t first, int64_t last, const int32_t* live, int64_t count,
                         const float* steps, int64_t wide, float* rows) {
        const float* row[kRows];
        for (int r = 0; r < kRows; ++r) row[r] = matrix + (first + r < last ? first + r : last) * n;
        for (int64_t t = 0; t < wide; t += kTokens) {
            Vector sum[kRows][kWide] = {};
            const float* const from = steps + t * count;
            for (int64_t k = 0; k < count; ++k) {
                Vector step[kWide];
#pragma GCC unroll 4
                for (int w = 0; w < kWide; ++w) memcpy(&step[w], from + k * kTokens + w * kLanes, sizeof step[w]);
                const int64_t column = live[k];
#pragma GCC unroll 6
                for (int r = 0; r < kRows; ++r) {
                    const float by = row[r][column];
#pragma GCC unroll 4
                    for (int w = 0; w < kWide; ++w) sum[r][w] += step[w] * by;
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
                if (first + r > last) break;
#pragma GCC unroll 4
                for (int w = 0; w < kWide; ++w)
                    memcpy(rows + (first + r) * wide + t + w * kLanes, &sum[r][w], sizeof sum[r][w]);
            }
        }
    }

    // Means added, keys turned to their positions, rows of channels made rows of tokens: one head.
    static void finish(int dtype, const kvk_learned& how, int64_t layer, const float* rows, int64_t wide, const float* mean,
                       int64_t at, void* out, uint32_t* most) {
        const int d = static_cast<int>(how.d), pairs = how.pairs, width = d + 8;
        const int step = how.interleaved ? 2 : 1, apart = how.interleaved ? 1 : pairs;
        alignas(64) float block[kTurn * (kMostD + 8)];
        const int64_t table = pairs ? how.of[layer] * how.tokens * pairs : 0;
        for (int64_t t = 0; t < how.tokens; t += kTurn) {
            const int some = static_cast<int>(how.tokens - t < kTurn ? how.tokens - t : kTurn);
            for (int c = 0; c < d; ++c)
                for (int i = 0; i < kTurn; ++i) block[i * width + c] = rows[c * wide + t + i] + mean[c];
            for (int i = 0; i < some; ++i) {
                float* const x = block + i * width;
                const float *cosine = how.cosine + table + (t + i) * pairs, *sine = how.sine + table + (t + i) * pairs;
                for (int p = 0; p < pairs; ++p) {
                    const float a = x[step * p], b = x[step * p + apart];
                    x[step * p] = a * cosine[p] - b * sine[p];
                    x[step * p + apart] = a * sine[p] + b * cosine[p];
                }
                for (int c = 0; c < d; ++c) {
                    const uint32_t bits = to_bits(x[c]) & 0x7fffffffu;
                    *most = bits > *most ? bits : *most;
                }
                Kv<Isa>::store(dtype, x, d, false, out, at + (t + i) * how.heads * how.d);
            }
        }
    }
    static constexpr int kMostD = 1024;
};

}  // namespace
