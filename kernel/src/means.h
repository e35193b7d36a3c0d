// nf4-kv2: what turning means are chosen by, and their codes. The arithmetic and its order are
// kvstore/kernels/reference_turn.py's.
#pragma once
#include "content.h"

namespace {

// What is to be known of the pairs of a group of tokens before a mean is chosen.
template <class Isa>
struct Turn {
    static constexpr int kMost = 2 * kvk::kGroup;  // tokens of a group: at most 95
    static constexpr int kLags = 3;
    static constexpr int kSums = 2 + 2 * kLags;

    static constexpr int kRow = 1024;

    // Pairs that lie in whole eights.
    static int wide_of(const kvk_turns& turns) { return (turns.rotary / 2 + 7) / 8 * 8; }

    // n tokens of one head as rows of `wide` real parts and `wide` imaginary ones, zeros behind the last pair.
    static void gather(int dtype, const void* x, const kvk_rows& rows, int64_t at, int n, const kvk_turns& turns, float* z) {
        const int64_t width = rows.inner * rows.d;
        const int half = turns.rotary / 2, wide = wide_of(turns);
        alignas(64) float row[kRow];
        for (int t = 0; t < n; ++t, at += width) {
            float *re = z + 2 * t * wide, *im = re + wide;
            if (!turns.interleaved) {
                Kv<Isa>::load(dtype, x, at, re, half);
                Kv<Isa>::load(dtype, x, at + half, im, half);
            }
            for (int c = 0; turns.interleaved && c < turns.rotary; c += kRow) {
                const int some = turns.rotary - c < kRow ? turns.rotary - c : kRow;
                Kv<Isa>::load(dtype, x, at + c, row, some);
                for (int i = 0; i < some / 2; ++i) {
                    re[c / 2 + i] = row[2 * i];
                    im[c / 2 + i] = row[2 * i + 1];
                }
            }
            for (int p = half; p < wide; ++p) re[p] = im[p] = 0.0f;
        }
    }
    __attribute__((always_inline)) static inline void get(const float* x, Eight* out) { memcpy(out, x, sizeof *out); }

    static int tokens_of(const kvk_rows& rows, int64_t group, int64_t groups) {
        return static_cast<int>(group == groups - 1 ? rows.tokens - group * kvk::kGroup : kvk::kGroup);
    }

    // For each pair of each head: energy without a still mean, energy, and sum z[t] conj z[t - lag] for three lags, over
    // the first groups of a slab. sums: kSums for each. Slabs [begin, end).
    static bool lags(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t groups, int64_t sampled,
                     const int32_t* lag, int64_t begin, int64_t end, float* sums) {
        const int half = turns.rotary / 2;
        Floats z(2 * kMost * wide_of(turns));
        if (!z) return false;
        for (int64_t at = begin * rows.inner; at < end * rows.inner; ++at) {
            float* const out = sums + at * half * kSums;
            for (int i = 0; i < half * kSums; ++i) out[i] = 0.0f;
            const int64_t head = at / rows.inner * rows.stride + at % rows.inner * rows.d;
            for (int64_t g = 0; g < sampled; ++g) {
                const int n = tokens_of(rows, g, groups);
                gather(dtype, x, rows, head + g * kvk::kGroup * rows.inner * rows.d, n, turns, z.get());
                add_lags(z.get(), n, half, wide_of(turns), lag, out);
            }
        }
        return true;
    }

    static void add_lags(const float* z, int n, int half, int wide, const int32_t* lag, float* out) {
        for (int p = 0; p < half; p += 8) {
            Eight re = {}, im = {}, whole = {}, found[kSums];
            for (int t = 0; t < n; ++t) {
                const float* now = z + 2 * t * wide + p;
                Eight a, b;
                get(now, &a);
                get(now + wide, &b);
                re += a;
                im += b;
                whole += a * a + b * b;
            }
            found[0] = whole - (re * re + im * im) / static_cast<float>(n);
            found[1] = whole;
            for (int l = 0; l < kLags; ++l) {
                Eight a = {}, b = {};
                for (int t = lag[l]; t < n; ++t) {
                    const float *now = z + 2 * t * wide + p, *then = now - 2 * lag[l] * wide;
                    Eight x, y, u, v;
                    get(now, &x);
                    get(now + wide, &y);
                    get(then, &u);
                    get(then + wide, &v);
                    a += x * u + y * v;
                    b += y * u - x * v;
                }
                found[2 + 2 * l] = a;
                found[3 + 2 * l] = b;
            }
            for (int i = 0; i < 8 && p + i < half; ++i)
                for (int k = 0; k < kSums; ++k) out[(p + i) * kSums + k] += found[k][i];
        }
    }

    // What is turned back is turned back by the frame of one slab after the other, which is often the same.
    struct Frame {
        Floats z, frame, total;
        const float* made = nullptr;
        explicit Frame(int wide) : z(2 * kMost * wide), frame(2 * kMost * wide), total(2 * wide) {}
    };

    // Sums of groups of tokens, (outer, groups, inner, d): as they stand, and in the frame that turns by `tangents`. content:
    // null, or `Content::energy`, taken while a group is in the caches. Groups [begin, end) of outer * groups.
    static bool sums(int dtype, const void* x, const kvk_rows& rows, const kvk_turns* turns, const kvk_turns& told,
                     int64_t begin, int64_t end, float* still, float* turned, double* content) {
        Frame frame(turns ? wide_of(*turns) : 0);
        if (!frame.z || !frame.frame || !frame.total) return false;
        for (int64_t at = begin; at < end; ++at) {
            Turn<Isa>::still(dtype, x, rows, at, still);
            if (content)
                Content<Isa>::energy(dtype, x, rows, told.rotary, told.interleaved, rows.groups, at, at + 1, content);
            if (turns) turn_group(dtype, x, rows, *turns, at, &frame, turned);
        }
        return true;
    }

    static void turn_group(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t at, Frame* room,
                           float* turned) {
        const int half = turns.rotary / 2, apart = turns.interleaved ? 1 : half, step = turns.interleaved ? 2 : 1;
        const int wide = wide_of(turns), n = tokens_of(rows, at % rows.groups, rows.groups);
        const float* tangents = turns.tangents + at / rows.groups * half;
        if (!room->made || memcmp(tangents, room->made, sizeof(float) * static_cast<size_t>(half)))
            make_frame(tangents, kMost, half, wide, room->frame.get());
        room->made = tangents;
        const float* total = room->total.get();
        for (int64_t head = 0; head < rows.inner; ++head) {
            const int64_t token = at % rows.groups * kvk::kGroup, width = rows.inner * rows.d;
            gather(dtype, x, rows, at / rows.groups * rows.stride + token * width + head * rows.d, n, turns, room->z.get());
            turn_back(room->z.get(), room->frame.get(), n, half, wide, room->total.get());
            float* const to = turned + (at * rows.inner + head) * rows.d;
            for (int p = 0; p < half; ++p) {
                to[step * p] = total[p];
                to[step * p + apart] = total[wide + p];
            }
        }
    }

    // What turning means take beyond still ones: (outer, inner, pairs).
    static void gains(const kvk_rows& rows, const kvk_turns& turns, const float* still, const float* turned, float* out) {
        const int half = turns.rotary / 2, apart = turns.interleaved ? 1 : half, step = turns.interleaved ? 2 : 1;
        for (int64_t at = 0; at < rows.outer * rows.groups * rows.inner; ++at) {
            const int64_t head = at % rows.inner, group = at / rows.inner % rows.groups, slab = at / rows.inner / rows.groups;
            const float count = static_cast<float>(tokens_of(rows, group, rows.groups));
            const float *x = turned + at * rows.d, *y = still + at * rows.d;
            float* const to = out + (slab * rows.inner + head) * half;
            for (int p = 0; p < half; ++p) {
                const float re = x[step * p], im = x[step * p + apart], a = y[step * p], b = y[step * p + apart];
                const float more = (re * re + im * im - (a * a + b * b)) / count;
                to[p] = group ? to[p] + more : more;
            }
        }
    }

    // cos and sin of each of n tokens, for each pair.
    static void make_frame(const float* tangents, int n, int half, int wide, float* frame) {
        for (int p = 0; p < wide; p += 8) {
            Eight sine = {}, cosine = {}, c = {}, s = {};
            for (int i = 0; i < 8 && p + i < half; ++i) {
                float at, chord;
                angle_of(tangents[p + i], &at, &chord);
                sine[i] = at;
                cosine[i] = 1.0f - chord * 0.5f;
                c[i] = 1.0f;
            }
            for (int t = 0; t < n; ++t) {
                memcpy(frame + 2 * t * wide + p, &c, sizeof c);
                memcpy(frame + 2 * t * wide + wide + p, &s, sizeof s);
                const Eight next = c * cosine - s * sine;
                s = c * sine + s * cosine;
                c = next;
            }
        }
    }
    static void turn_back(const float* z, const float* frame, int n, int half, int wide, float* total) {
        for (int p = 0; p < half; p += 8) {
            Eight re = {}, im = {};
            for (int t = 0; t < n; ++t) {
                const float *now = z + 2 * t * wide + p, *f = frame + 2 * t * wide + p;
                Eight a, b, c, s;
                get(now, &a);
                get(now + wide, &b);
                get(f, &c);
                get(f + wide, &s);
                re += a * c + b * s;
                im += b * c - a * s;
            }
            memcpy(total + p, &re, sizeof re);
            memcpy(total + wide + p, &im, sizeof im);
        }
    }

    // Sums over a group of tokens as they stand.
    static void still(int dtype, const void* x, const kvk_rows& rows, int64_t at, float* total) {
        const int64_t width = rows.inner * rows.d, slab = at / rows.groups, group = at % rows.groups;
        float* to = total + at * width;
        for (int64_t i = 0; i < width; ++i) to[i] = 0.0f;
        const int n = tokens_of(rows, group, rows.groups);
        for (int64_t t = 0; t < n; ++t)
            Kv<Isa>::add_row(dtype, x, slab * rows.stride + (group * kvk::kGroup + t) * width, width, to);
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

    // The exponent whose 127 steps hold n means, and their codes. A quarter of a step over is 127 as well: so the largest
    // code is found again where only rounding made the mean larger.
    static uint8_t code_eight(const float* mean, int n, int8_t* codes) {
        uint32_t most = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = to_bits(mean[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        const uint32_t step = to_bits(from_bits(most) / 127.25f);
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
