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

    using C = Content<Isa>;
    using Run = typename C::Run;

    // Pairs that lie in whole runs of vectors.
    static int wide_of(const kvk_turns& turns) { return (turns.rotary / 2 + C::kSide - 1) / C::kSide * C::kSide; }

    static int tokens_of(const kvk_rows& rows, int64_t group, int64_t groups) {
        return static_cast<int>(group == groups - 1 ? rows.tokens - group * kvk::kGroup : kvk::kGroup);
    }

    // For each pair of each head: energy without a still mean, energy, and sum z[t] conj z[t - lag] for three lags, over
    // the first groups of a slab. sums: kSums for each. Slabs [begin, end).
    static void lags(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t groups, int64_t sampled,
                     const int32_t* lag, int64_t begin, int64_t end, float* sums) {
        const int half = turns.rotary / 2;
        const int64_t width = rows.inner * rows.d;
        Run z;
        for (int64_t at = begin * rows.inner; at < end * rows.inner; ++at) {
            float* const out = sums + at * half * kSums;
            for (int i = 0; i < half * kSums; ++i) out[i] = 0.0f;
            const int64_t head = at / rows.inner * rows.stride + at % rows.inner * rows.d;
            for (int64_t g = 0; g < sampled; ++g) {
                const int n = tokens_of(rows, g, groups);
                for (int c = 0, count; c < half; c += count) {
                    count = half - c < C::kChunk ? half - c : C::kChunk;
                    C::gather_pairs(dtype, x, head + g * kvk::kGroup * width, width, n, half, turns.interleaved, c, count, &z);
                    for (int w = 0; w * C::kLanes < count; ++w)
                        add_lags(z.re[w], z.im[w], n, count - w * C::kLanes, lag, out + (c + w * C::kLanes) * kSums);
                }
            }
        }
    }

    static void add_lags(const Lanes* re, const Lanes* im, int n, int count, const int32_t* lag, float* out) {
        Lanes sr = {}, si = {}, whole = {}, found[kSums];
        for (int t = 0; t < n; ++t) {
            sr += re[t];
            si += im[t];
            whole += re[t] * re[t] + im[t] * im[t];
        }
        found[0] = whole - (sr * sr + si * si) / static_cast<float>(n);
        found[1] = whole;
        for (int l = 0; l < kLags; ++l) {
            Lanes a = {}, b = {};
            for (int t = lag[l]; t < n; ++t) {
                const Lanes *x = re + t, *y = im + t, *u = x - lag[l], *v = y - lag[l];
                a += *x * *u + *y * *v;
                b += *y * *u - *x * *v;
            }
            found[2 + 2 * l] = a;
            found[3 + 2 * l] = b;
        }
        for (int i = 0; i < C::kLanes && i < count; ++i)
            for (int k = 0; k < kSums; ++k) out[i * kSums + k] += found[k][i];
    }

    // The frame that turns by a slab's tangents: cos and sin of each token, for each pair. One slab's is often the next one's.
    struct Frame {
        Floats room;
        const float* made = nullptr;
        explicit Frame(int wide) : room(2 * kMost * wide) {}
    };

    // Where the sums of a group of tokens go, and what is to be known of it besides; each may be null.
    struct Wanted {
        float *still, *turned;
        double* content;
    };

    // Sums of groups of tokens, (outer, groups, inner, d): as they stand, and where turns->tangents is given in the frame
    // that turns by them. wanted.content: (left, whole) of each head. Groups [begin, end) of outer * groups.
    static bool sums(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t begin, int64_t end,
                     float* still, float* turned, double* content) {
        const int half = turns.rotary / 2, wide = wide_of(turns);
        const int64_t width = rows.inner * rows.d;
        Frame frame(turns.tangents ? wide : 0);
        if (!frame.room) return false;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / rows.groups, group = at % rows.groups;
            const int n = tokens_of(rows, group, rows.groups);
            if (turns.tangents) {
                const float* tangents = turns.tangents + slab * half;
                if (!frame.made || memcmp(tangents, frame.made, sizeof(float) * static_cast<size_t>(half)))
                    make_frame(tangents, kMost, half, wide, frame.room.get());
                frame.made = tangents;
            }
            const int64_t value = slab * rows.stride + group * kvk::kGroup * width;
            C::ahead(dtype, x, value, n * width);
            for (int64_t i = 0; i < rows.inner; ++i) {
                const int64_t to = at * rows.inner + i;
                const Wanted wanted = {still + to * rows.d, turned + to * rows.d, content ? content + 2 * to : nullptr};
                head(dtype, x, value + i * rows.d, rows, n, turns, frame.room.get(), wanted);
            }
        }
        return true;
    }

    // One group of n tokens of one head.
    static void head(int dtype, const void* x, int64_t at, const kvk_rows& rows, int n, const kvk_turns& turns,
                     const float* frame, const Wanted& to) {
        const int half = turns.rotary / 2, wide = wide_of(turns), d = static_cast<int>(rows.d);
        const int step = turns.interleaved ? 2 : 1, apart = turns.interleaved ? 1 : half;
        const int64_t width = rows.inner * rows.d;
        const bool counted = to.content && n >= C::kShort;
        Run z;
        if (counted) to.content[0] = to.content[1] = 0.0;
        if (to.content && !counted) to.content[0] = to.content[1] = C::squares(dtype, x, nullptr, at, width, n, d);
        for (int c = 0, count; c < half; c += count) {
            count = half - c < C::kChunk ? half - c : C::kChunk;
            C::gather_pairs(dtype, x, at, width, n, half, turns.interleaved, c, count, &z);
            for (int w = 0; w * C::kLanes < count; ++w) {
                const int from = c + w * C::kLanes, some = count - w * C::kLanes;
                Lanes re, im;
                stand(z.re[w], z.im[w], n, &re, &im);
                put(re, im, some, step, apart, to.still + step * from);
                if (!turns.tangents) continue;
                turn_back(z.re[w], z.im[w], frame + from, n, wide, &re, &im);
                put(re, im, some, step, apart, to.turned + step * from);
            }
            if (counted) C::add_energies(z, n, count, true, to.content);
        }
        for (int c = turns.rotary, count; c < d; c += count) {  // the channels that turn with nobody
            count = d - c < C::kChunk ? d - c : C::kChunk;
            C::gather(dtype, x, at + c, width, n, 1, count, z.re);
            for (int w = 0; w * C::kLanes < count; ++w) {
                Lanes sum, same;
                stand(z.re[w], z.re[w], n, &sum, &same);
                for (int i = 0; i < C::kLanes && w * C::kLanes + i < count; ++i) to.still[c + w * C::kLanes + i] = sum[i];
            }
            if (counted) C::add_energies(z, n, count, false, to.content);
        }
    }
    static void put(const Lanes& re, const Lanes& im, int count, int step, int apart, float* to) {
        for (int i = 0; i < C::kLanes && i < count; ++i) {
            to[step * i] = re[i];
            to[step * i + apart] = im[i];
        }
    }
    static void stand(const Lanes* re, const Lanes* im, int n, Lanes* a, Lanes* b) {
        Lanes sr = {}, si = {};
        for (int t = 0; t < n; ++t) {
            sr += re[t];
            si += im[t];
        }
        *a = sr;
        *b = si;
    }
    static void turn_back(const Lanes* re, const Lanes* im, const float* frame, int n, int wide, Lanes* a, Lanes* b) {
        Lanes sr = {}, si = {};
        for (int t = 0; t < n; ++t, frame += 2 * wide) {
            Lanes c, s;
            memcpy(&c, frame, sizeof c);
            memcpy(&s, frame + wide, sizeof s);
            sr += re[t] * c + im[t] * s;
            si += im[t] * c - re[t] * s;
        }
        *a = sr;
        *b = si;
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
        for (int p = 0; p < wide; p += C::kLanes) {
            Lanes sine = {}, cosine = {}, c = {}, s = {};
            for (int i = 0; i < C::kLanes && p + i < half; ++i) {
                float at, chord;
                angle_of(tangents[p + i], &at, &chord);
                sine[i] = at;
                cosine[i] = 1.0f - chord * 0.5f;
                c[i] = 1.0f;
            }
            for (int t = 0; t < n; ++t) {
                memcpy(frame + 2 * t * wide + p, &c, sizeof c);
                memcpy(frame + 2 * t * wide + wide + p, &s, sizeof s);
                const Lanes next = c * cosine - s * sine;
                s = c * sine + s * cosine;
                c = next;
            }
        }
    }

    // How each token of slabs lies to the means of their heads, taken over every `every`-th token from `first` on. distance:
    // squared, from all means together. lacking: what its key lacks of a mean, along it, in standard deviations of the head
    // where that is most, of heads whose deviation is below `sure` and where it is over `most`; else 0. Sums of a row are in
    // eight lanes, then one by one. distance, lacking: (slabs, tokens). Slabs [begin, end).
    static bool along(int dtype, const void* x, const kvk_rows& rows, const kvk_along& how, int64_t begin, int64_t end,
                      float* distance, float* lacking) {
        const int64_t width = rows.inner * rows.d;
        Floats mean(width), lacks(rows.tokens);
        if (!mean || !lacks) return false;
        const auto dot = dtype == KVK_F32 ? product<KVK_F32> : dtype == KVK_F16 ? product<KVK_F16> : product<KVK_BF16>;
        for (int64_t slab = begin; slab < end; ++slab) {
            float *const far = distance + slab * rows.tokens, *const out = lacking + slab * rows.tokens;
            int64_t count = 0;
            for (int64_t i = 0; i < width; ++i) mean.get()[i] = 0.0f;
            for (int64_t t = how.first; t < rows.tokens; t += how.every, ++count)
                Kv<Isa>::add_row(dtype, x, slab * rows.stride + t * width, width, mean.get());
            const float inverse = 1.0f / static_cast<float>(count);
            for (int64_t i = 0; i < width; ++i) mean.get()[i] *= inverse;
            for (int64_t t = 0; t < rows.tokens; ++t) far[t] = out[t] = 0.0f;
            for (int64_t head = 0; head < rows.inner; ++head) {
                const float* own = mean.get() + head * rows.d;
                const int d = static_cast<int>(rows.d);
                float energy, none;
                product<KVK_F32>(own, 0, own, d, &energy, &none);
                energy = energy > 1e-30f ? energy : 1e-30f;
                for (int64_t t = 0; t < rows.tokens; ++t) {
                    float along, away;
                    dot(x, slab * rows.stride + t * width + head * rows.d, own, d, &along, &away);
                    lacks.get()[t] = 1.0f - along / energy;
                    far[t] += away;
                }
                add_lacking(lacks.get(), rows.tokens, how, out);
            }
        }
        return true;
    }
    static void add_lacking(const float* lacks, int64_t n, const kvk_along& how, float* out) {
        double sum = 0.0, squares = 0.0;
        for (int64_t t = how.first; t < n; ++t) sum += static_cast<double>(lacks[t]);
        const double mean = sum / static_cast<double>(n - how.first);
        for (int64_t t = how.first; t < n; ++t) {
            const double off = static_cast<double>(lacks[t]) - mean;
            squares += off * off;
        }
        const float spread = static_cast<float>(__builtin_sqrt(squares / static_cast<double>(n - how.first - 1)));
        if (!(spread < how.sure)) return;
        const float by = spread > 1e-6f ? spread : 1e-6f;
        for (int64_t t = 0; t < n; ++t)
            if (lacks[t] > how.most && lacks[t] / by > out[t]) out[t] = lacks[t] / by;
    }
    // x.y and |x - y|^2 of a row of d.
    template <int kDtype>
    static void product(const void* x, int64_t at, const float* y, int d, float* along, float* away) {
        const int whole = d & ~7;
        Eight dot = {}, far = {}, v, u;
        for (int c = 0; c < whole; c += 8) {
            C::template get<Eight, kDtype>(x, at + c, &v);
            memcpy(&u, y + c, sizeof u);
            dot += v * u;
            far += (v - u) * (v - u);
        }
        if (whole < d) {
            alignas(32) float some[8] = {}, other[8] = {};
            Kv<Isa>::load(kDtype, x, at + whole, some, d - whole);
            memcpy(other, y + whole, sizeof(float) * static_cast<size_t>(d - whole));
            memcpy(&v, some, sizeof v);
            memcpy(&u, other, sizeof u);
            dot += v * u;
            far += (v - u) * (v - u);
        }
        *along = one_by_one(dot);
        *away = one_by_one(far);
    }
    static float one_by_one(const Eight& v) {
        float total = v[0];
        for (int i = 1; i < 8; ++i) total += v[i];
        return total;
    }

    // Means of 8 bits under a power of two for each 8 channels, from the sums of the frame that each pair takes.
    // codes, means: (outer, groups, inner, d); scales: (outer, groups, inner, ceil(d/8)), exponents. Groups [begin, end).
    static bool means(const kvk_rows& rows, const kvk_turns* turns, const float* still, const float* turned, int64_t begin,
                      int64_t end, int8_t* codes, uint8_t* scales, float* means) {
        const int half = turns ? turns->rotary / 2 : 0, bytes = (half + 7) / 8, d = static_cast<int>(rows.d);
        const int eights = (d + 7) / 8, step = turns && turns->interleaved ? 2 : 1, apart = step == 2 ? 1 : half;
        Floats room(8 * eights);
        if (!room) return false;
        float* const sum = room.get();
        for (int c = d; c < 8 * eights; ++c) sum[c] = 0.0f;
        for (int64_t at = begin * rows.inner; at < end * rows.inner; ++at) {
            const int64_t group = at / rows.inner % rows.groups, slab = at / rows.inner / rows.groups;
            const float inverse = 1.0f / static_cast<float>(tokens_of(rows, group, rows.groups));
            memcpy(sum, still + at * d, sizeof(float) * static_cast<size_t>(d));
            const uint8_t* mask = turns ? turns->turning + (slab * rows.inner + at % rows.inner) * bytes : nullptr;
            for (int p = 0; p < half; ++p) {
                if (!(mask[p / 8] >> (p % 8) & 1)) continue;
                sum[step * p] = turned[at * d + step * p];
                sum[step * p + apart] = turned[at * d + step * p + apart];
            }
            for (int e = 0; e < eights; ++e) {
                const int from = 8 * e, n = d - from < 8 ? d - from : 8;
                int8_t code[8];
                float value[8];
                scales[at * eights + e] = code_eight(sum + from, inverse, code, value);
                memcpy(codes + at * d + from, code, static_cast<size_t>(n));
                memcpy(means + at * d + from, value, sizeof(float) * static_cast<size_t>(n));
            }
        }
        return true;
    }

    // The exponent whose 127 steps hold eight means, their codes, and what these stand for. A quarter of a step over is 127
    // as well: so the largest code is found again where only rounding made the mean larger.
    static uint8_t code_eight(const float* sum, float inverse_count, int8_t* codes, float* values) {
        float mean[8], rounded[8];
        uint32_t most = 0;
        for (int i = 0; i < 8; ++i) {
            mean[i] = sum[i] * inverse_count;
            const uint32_t bits = to_bits(mean[i]) & 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        const uint32_t step = to_bits(from_bits(most) / 127.25f);
        uint32_t exponent = (step >> 23) + ((step & 0x7fffffu) != 0);
        if (step < 0x00800000u) exponent = 0;
        if (exponent > kvk::kMeanTop) exponent = kvk::kMeanTop;
        const float inverse = exponent ? from_bits((254 - exponent) << 23) : 0.0f, scale = from_bits(exponent << 23);
        for (int i = 0; i < 8; ++i) {
            const float scaled = mean[i] * inverse;
            // Comparisons in this order also put NaN into range: the conversion below must be defined.
            const float bounded = scaled > -127.0f ? (scaled < 127.0f ? scaled : 127.0f) : -127.0f;
            rounded[i] = __builtin_nearbyintf(bounded);
        }
        for (int i = 0; i < 8; ++i) codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded[i]));
        for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(codes[i]) * scale;
        return static_cast<uint8_t>(exponent);
    }
};

}  // namespace
