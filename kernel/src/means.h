// nf4-kv2: what turning means are chosen by, and their codes. The arithmetic and its order are
// kvstore/kernels/reference_turn.py's.
#pragma once
#include "kv.h"

namespace {

// What is to be known of the pairs of a group of tokens before a mean is chosen.
template <class Isa>
struct Turn {
    static constexpr int kMost = 2 * kvk::kGroup;  // tokens of a group: at most 95
    static constexpr int kLags = 3;
    static constexpr int kSums = 2 + 2 * kLags;

    static constexpr int kRow = 1024;

    // n tokens of one head, pairs half of `rotary` apart however they lie.
    static void gather(int dtype, const void* x, const kvk_rows& rows, int64_t at, int n, const kvk_turns& turns, float* z) {
        const int64_t width = rows.inner * rows.d;
        const int half = turns.rotary / 2;
        alignas(64) float row[kRow];
        for (int t = 0; t < n; ++t, at += width) {
            float* to = z + t * turns.rotary;
            if (!turns.interleaved) {
                Kv<Isa>::load(dtype, x, at, to, turns.rotary);
                continue;
            }
            for (int c = 0; c < turns.rotary; c += kRow) {
                const int some = turns.rotary - c < kRow ? turns.rotary - c : kRow;
                Kv<Isa>::load(dtype, x, at + c, row, some);
                for (int i = 0; i < some; i += 2) {
                    to[(c + i) / 2] = row[i];
                    to[half + (c + i) / 2] = row[i + 1];
                }
            }
        }
    }

    static int tokens_of(const kvk_rows& rows, int64_t group, int64_t groups) {
        return static_cast<int>(group == groups - 1 ? rows.tokens - group * kvk::kGroup : kvk::kGroup);
    }

    // For each pair of each head: energy without a still mean, energy, and sum z[t] conj z[t - lag] for three lags, over
    // the first groups of a slab. sums: kSums for each. Slabs [begin, end).
    static bool lags(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t groups, int64_t sampled,
                     const int32_t* lag, int64_t begin, int64_t end, float* sums) {
        const int half = turns.rotary / 2;
        Floats z(kMost * turns.rotary), about(kMost * turns.rotary + 8 * half);
        if (!z || !about) return false;
        for (int64_t at = begin * rows.inner; at < end * rows.inner; ++at) {
            float* const out = sums + at * half * kSums;
            for (int i = 0; i < half * kSums; ++i) out[i] = 0.0f;
            const int64_t head = at / rows.inner * rows.stride + at % rows.inner * rows.d;
            for (int64_t g = 0; g < sampled; ++g) {
                const int n = tokens_of(rows, g, groups);
                gather(dtype, x, rows, head + g * kvk::kGroup * rows.inner * rows.d, n, turns, z.get());
                add_lags(z.get(), n, half, lag, about.get(), out);
            }
        }
        return true;
    }

    static void add_lags(const float* z, int n, int half, const int32_t* lag, float* room, float* out) {
        float *re = room, *im = re + half, *whole = im + half, *a = whole + half, *b = a + half;
        for (int p = 0; p < 3 * half; ++p) room[p] = 0.0f;
        for (int t = 0; t < n; ++t) {
            const float* now = z + 2 * t * half;
            for (int p = 0; p < half; ++p) {
                re[p] += now[p];
                im[p] += now[half + p];
                whole[p] += now[p] * now[p] + now[half + p] * now[half + p];
            }
        }
        for (int p = 0; p < half; ++p) {
            out[p * kSums] += whole[p] - (re[p] * re[p] + im[p] * im[p]) / static_cast<float>(n);
            out[p * kSums + 1] += whole[p];
        }
        for (int l = 0; l < kLags; ++l) {
            for (int p = 0; p < 2 * half; ++p) a[p] = 0.0f;
            for (int t = lag[l]; t < n; ++t) {
                const float *now = z + 2 * t * half, *then = z + 2 * (t - lag[l]) * half;
                for (int p = 0; p < half; ++p) {
                    a[p] += now[p] * then[p] + now[half + p] * then[half + p];
                    b[p] += now[half + p] * then[p] - now[p] * then[half + p];
                }
            }
            for (int p = 0; p < half; ++p) {
                out[p * kSums + 2 + 2 * l] += a[p];
                out[p * kSums + 3 + 2 * l] += b[p];
            }
        }
    }

    // Sums of each group in the frame that turns by `tangents`, and what such a mean takes more than a still one does.
    // still, turned: (outer, groups, inner, d); gains: (outer, inner, pairs). Slabs [begin, end).
    static bool sums(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t begin, int64_t end,
                     const float* still, float* turned, float* gains) {
        const int half = turns.rotary / 2, apart = turns.interleaved ? 1 : half, step = turns.interleaved ? 2 : 1;
        const int64_t width = rows.inner * rows.d;
        Floats z(kMost * turns.rotary), frame(kMost * turns.rotary), total(turns.rotary);
        if (!z || !frame || !total) return false;
        for (int64_t slab = begin; slab < end; ++slab) {
            make_frame(turns.tangents + slab * half, half, frame.get());
            for (int64_t i = 0; i < rows.inner * half; ++i) gains[slab * rows.inner * half + i] = 0.0f;
            for (int64_t g = 0; g < rows.groups; ++g)
                for (int64_t head = 0; head < rows.inner; ++head) {
                    const int n = tokens_of(rows, g, rows.groups);
                    const int64_t from = slab * rows.stride + g * kvk::kGroup * width + head * rows.d;
                    gather(dtype, x, rows, from, n, turns, z.get());
                    turn_back(z.get(), frame.get(), n, half, total.get());
                    const int64_t at = ((slab * rows.groups + g) * rows.inner + head) * rows.d;
                    float* const gain = gains + (slab * rows.inner + head) * half;
                    for (int p = 0; p < half; ++p) {
                        const float re = total.get()[p], im = total.get()[half + p];
                        const float a = still[at + step * p], b = still[at + step * p + apart];
                        turned[at + step * p] = re;
                        turned[at + step * p + apart] = im;
                        gain[p] += (re * re + im * im - (a * a + b * b)) / static_cast<float>(n);
                    }
                }
        }
        return true;
    }

    // cos and sin of each token of a group, for each pair.
    static void make_frame(const float* tangents, int half, float* frame) {
        for (int p = 0; p < half; ++p) {
            float s, k, c = 1.0f, d = 0.0f;
            angle_of(tangents[p], &s, &k);
            const float cosine = 1.0f - k * 0.5f;
            for (int t = 0; t < kMost; ++t) {
                frame[2 * t * half + p] = c;
                frame[2 * t * half + half + p] = d;
                const float next = c * cosine - d * s;
                d = c * s + d * cosine;
                c = next;
            }
        }
    }
    static void turn_back(const float* z, const float* frame, int n, int half, float* total) {
        for (int p = 0; p < 2 * half; ++p) total[p] = 0.0f;
        for (int t = 0; t < n; ++t) {
            const float *now = z + 2 * t * half, *f = frame + 2 * t * half;
            for (int p = 0; p < half; ++p) {
                total[p] += now[p] * f[p] + now[half + p] * f[half + p];
                total[half + p] += now[half + p] * f[p] - now[p] * f[half + p];
            }
        }
    }

    // Sums over each group of tokens as they stand. Groups [begin, end) of outer * groups.
    static void still(int dtype, const void* x, const kvk_rows& rows, int64_t begin, int64_t end, float* total) {
        const int64_t width = rows.inner * rows.d;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / rows.groups, group = at % rows.groups;
            float* to = total + at * width;
            for (int64_t i = 0; i < width; ++i) to[i] = 0.0f;
            const int n = tokens_of(rows, group, rows.groups);
            for (int64_t t = 0; t < n; ++t)
                Kv<Isa>::add_row(dtype, x, slab * rows.stride + (group * kvk::kGroup + t) * width, width, to);
        }
    }

    // Means of 8 bits under a power of two for each 8 channels, from the sums of the frame that each pair takes.
    // codes: (outer, groups, inner, d); scales: (outer, groups, inner, ceil(d/8)), exponents. Groups [begin, end).
    static void means(const kvk_rows& rows, const kvk_turns* turns, const float* still, const float* turned, int64_t begin,
                      int64_t end, int8_t* codes, uint8_t* scales) {
        const int half = turns ? turns->rotary / 2 : 0, bytes = (half + 7) / 8, d = static_cast<int>(rows.d);
        const int eights = (d + 7) / 8;
        for (int64_t at = begin * rows.inner; at < end * rows.inner; ++at) {
            const int64_t group = at / rows.inner % rows.groups, slab = at / rows.inner / rows.groups;
            const uint8_t* mask = turns ? turns->turning + (slab * rows.inner + at % rows.inner) * bytes : nullptr;
            const float inverse = 1.0f / static_cast<float>(tokens_of(rows, group, rows.groups));
            for (int e = 0; e < eights; ++e) {
                const int from = 8 * e, n = d - from < 8 ? d - from : 8;
                float mean[8];
                for (int i = 0; i < n; ++i) {
                    const int c = from + i;
                    const bool other = turns && c < turns->rotary && takes(mask, turns->interleaved ? c / 2 : c % half);
                    mean[i] = (other ? turned : still)[at * d + c] * inverse;
                }
                scales[at * eights + e] = code_eight(mean, n, codes + at * d + from);
            }
        }
    }
    static bool takes(const uint8_t* mask, int pair) { return mask[pair / 8] >> (pair % 8) & 1; }

    // The exponent whose 127 steps hold n means, and their codes.
    static uint8_t code_eight(const float* mean, int n, int8_t* codes) {
        uint32_t most = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = to_bits(mean[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        const uint32_t step = to_bits(from_bits(most) / 127.0f);
        uint32_t exponent = (step >> 23) + ((step & 0x7fffffu) != 0);
        if (step < 0x00800000u) exponent = 0;
        if (exponent > kvk::kMeanTop) exponent = kvk::kMeanTop;
        const float inverse = exponent ? from_bits((254 - exponent) << 23) : 0.0f;
        for (int i = 0; i < n; ++i) {
            const float scaled = mean[i] * inverse;
            // Comparisons in this order also put NaN into range: the conversion below must be defined.
            const float bounded = scaled > -127.0f ? (scaled < 127.0f ? scaled : 127.0f) : -127.0f;
            codes[i] = static_cast<int8_t>(__builtin_nearbyintf(bounded));
        }
        return static_cast<uint8_t>(exponent);
    }
};

}  // namespace
