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
    using Next = typename C::Ahead;
    // Runs that may not be had.
    class Runs {
      public:
        explicit Runs(int n) : at_(new (std::nothrow) Run[static_cast<size_t>(n > 0 ? n : 1)]) {}
        ~Runs() { delete[] at_; }
        Runs(const Runs&) = delete;
        Runs& operator=(const Runs&) = delete;
        Run* get() const { return at_; }
        explicit operator bool() const { return at_ != nullptr; }

      private:
        Run* at_;
    };

    static int tokens_of(const kvk_rows& rows, int64_t group, int64_t groups) {
        return static_cast<int>(group == groups - 1 ? rows.tokens - group * kvk::kGroup : kvk::kGroup);
    }

    // What keys show of how they turn, slab by slab [begin, end): kvstored_kernel.h says what.
    static bool phases(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t groups,
                       const kvk_phases& how, int64_t begin, int64_t end, double* power, double* pooled, uint8_t* shown,
                       int32_t* heads) {
        const int half = turns.rotary / 2;
        const int64_t width = rows.inner * rows.d;
        Floats sums(half * kSums);
        if (!sums) return false;
        Run z;
        for (int64_t slab = begin; slab < end; ++slab) {
            const int64_t group = tokens_of(rows, 0, groups) * width;
            if (slab == begin) C::ahead(dtype, x, slab * rows.stride, group);
            Next next(dtype, x, (slab + 1) * rows.stride, slab + 1 < end ? group : 0,
                      rows.inner * how.sampled * (half + C::kLanes - 1) / C::kLanes);
            double* const pool = pooled + slab * half * 2 * kLags;
            uint8_t* const show = shown + slab * half;
            for (int i = 0; i < half * 2 * kLags; ++i) pool[i] = 0.0;
            for (int i = 0; i < half; ++i) show[i] = 0;
            heads[slab] = 0;
            for (int64_t head = 0; head < rows.inner; ++head) {
                for (int i = 0; i < half * kSums; ++i) sums.get()[i] = 0.0f;
                for (int64_t g = 0; g < how.sampled; ++g) {
                    const int n = tokens_of(rows, g, groups);
                    const int64_t value = slab * rows.stride + g * kvk::kGroup * width + head * rows.d;
                    for (int c = 0, count; c < half; c += count) {
                        count = half - c < C::kChunk ? half - c : C::kChunk;
                        C::gather_pairs(dtype, x, value, width, n, half, turns.interleaved, c, count, &z);
                        for (int w = 0; w * C::kLanes < count; ++w) {
                            next();
                            add_lags(z.re[w], z.im[w], n, count - w * C::kLanes, how.lags,
                                     sums.get() + (c + w * C::kLanes) * kSums);
                        }
                    }
                }
                power[slab * rows.inner + head] = pool_head(sums.get(), half, how, pool, show, heads + slab);
            }
        }
        return true;
    }

    // The energy of a head without its means, still or turning; what it adds to its slab's.
    static double pool_head(const float* sums, int half, const kvk_phases& how, double* pool, uint8_t* show, int32_t* heads) {
        double left = 0.0;
        for (int p = 0; p < half; ++p) {
            const float* of = sums + p * kSums;
            const double turned = __builtin_fabs(static_cast<double>(of[1]) - length_of(of) * how.whole);
            const double still = static_cast<double>(of[0]);
            left += still < turned ? still : turned;
        }
        left = left > 1e-30 ? left : 1e-30;
        int any = 0;
        for (int p = 0; p < half; ++p) {
            const float* of = sums + p * kSums;
            const double last = length_of(of), energy = static_cast<double>(of[1]);
            const double more = last * how.whole - (energy - static_cast<double>(of[0]));
            const bool seen = last > energy * how.seen && more > left * how.worth;
            show[p] |= seen;
            any |= seen;
            for (int k = 0; k < 2 * kLags; ++k) pool[p * 2 * kLags + k] += static_cast<double>(of[2 + k]) / left;
        }
        *heads += any;
        return left;
    }
    static double length_of(const float* of) {
        const double a = static_cast<double>(of[kSums - 2]), b = static_cast<double>(of[kSums - 1]);
        return __builtin_sqrt(a * a + b * b);
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

    // Sums of groups of tokens, (outer, groups, inner, d): as they stand, and where turns->tangents is given in the frame
    // that turns by them. content: null, or (left, whole) of each head. Groups [begin, end) of outer * groups.
    static bool sums(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t begin, int64_t end,
                     float* still, float* turned, double* content) {
        const int half = turns.rotary / 2, chunks = (half + C::kChunk - 1) / C::kChunk;
        const int64_t width = rows.inner * rows.d;
        Runs frames(turns.tangents ? chunks : 0);
        if (!frames) return false;
        const float* made = nullptr;
        for (int64_t at = begin; at < end; ++at) {
            const int64_t slab = at / rows.groups, group = at % rows.groups;
            const float* tangents = turns.tangents ? turns.tangents + slab * half : nullptr;
            if (tangents && (!made || memcmp(tangents, made, sizeof(float) * static_cast<size_t>(half)))) {
                for (int c = 0; c < chunks; ++c) make_frame(tangents + c * C::kChunk, half - c * C::kChunk, frames.get() + c);
                made = tangents;
            }
            const int64_t value = slab * rows.stride + group * kvk::kGroup * width;
            if (at == begin) C::ahead(dtype, x, value, tokens_of(rows, group, rows.groups) * width);
            const Group of = {dtype, x, value, rows, turns, tokens_of(rows, group, rows.groups), content != nullptr};
            const bool last = at + 1 == end, turn = group + 1 == rows.groups;
            const int64_t next = turn ? (slab + 1) * rows.stride : value + kvk::kGroup * width;
            Next then(dtype, x, next, last ? 0 : tokens_of(rows, turn ? 0 : group + 1, rows.groups) * width,
                      chunks > 0 ? 4 * chunks * rows.inner : rows.inner);
            of_group(of, frames.get(), still + at * width, turned + at * width, content + 2 * at * rows.inner, &then);
        }
        return true;
    }

    // A group of n tokens, the first of whose values is at `at`.
    struct Group {
        int dtype;
        const void* x;
        int64_t at;
        const kvk_rows& rows;
        const kvk_turns& turns;
        int n;
        bool content;
    };
    // A chunk of pairs of all heads after the other: so what turns them stays in L1.
    static void of_group(const Group& g, const Run* frames, float* still, float* turned, double* content, Next* next) {
        const int half = g.turns.rotary / 2, d = static_cast<int>(g.rows.d), n = g.n;
        const int step = g.turns.interleaved ? 2 : 1, apart = g.turns.interleaved ? 1 : half;
        const int64_t inner = g.rows.inner, width = inner * d;
        const bool counted = g.content && n >= C::kShort;
        Run z;
        for (int64_t i = 0; g.content && i < inner; ++i)
            content[2 * i] = content[2 * i + 1] = counted ? 0.0 : C::squares(g.dtype, g.x, nullptr, g.at + i * d, width, n, d);
        for (int c = 0, count; c < half; c += count) {
            count = half - c < C::kChunk ? half - c : C::kChunk;
            for (int64_t i = 0; i < inner; ++i) {
                (*next)();
                C::gather_pairs(g.dtype, g.x, g.at + i * d, width, n, half, g.turns.interleaved, c, count, &z);
                for (int w = 0; w * C::kLanes < count; ++w) {
                    const int64_t to = i * d + step * (c + w * C::kLanes);
                    Lanes re, im, back[2];
                    (*next)();
                    if (!g.turns.tangents) {
                        stand(z.re[w], z.im[w], n, &re, &im);
                    } else {
                        const Run& frame = frames[c / C::kChunk];
                        both(z.re[w], z.im[w], frame.re[w], frame.im[w], n, &re, &im, back);
                        put(back[0], back[1], count - w * C::kLanes, step, apart, turned + to);
                    }
                    put(re, im, count - w * C::kLanes, step, apart, still + to);
                }
                (*next)();
                if (counted) C::add_energies(z, n, count, true, content + 2 * i);
            }
        }
        for (int64_t i = 0; i < inner; ++i)
            for (int c = g.turns.rotary, count; c < d; c += count) {  // the channels that turn with nobody
                count = d - c < C::kChunk ? d - c : C::kChunk;
                C::gather(g.dtype, g.x, g.at + i * d + c, width, n, 1, count, z.re);
                for (int w = 0; w * C::kLanes < count; ++w) {
                    Lanes sum, same;
                    stand(z.re[w], z.re[w], n, &sum, &same);
                    for (int k = 0; k < C::kLanes && w * C::kLanes + k < count; ++k)
                        still[i * d + c + w * C::kLanes + k] = sum[k];
                }
                if (counted) C::add_energies(z, n, count, false, content + 2 * i);
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
    // Sums of pairs as they stand, and turned back.
    static void both(const Lanes* re, const Lanes* im, const Lanes* cosine, const Lanes* sine, int n, Lanes* a, Lanes* b,
                     Lanes* back) {
        Lanes sr = {}, si = {}, tr = {}, ti = {};
        for (int t = 0; t < n; ++t) {
            sr += re[t];
            si += im[t];
            tr += re[t] * cosine[t] + im[t] * sine[t];
            ti += im[t] * cosine[t] - re[t] * sine[t];
        }
        *a = sr;
        *b = si;
        back[0] = tr;
        back[1] = ti;
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

    // The frame that turns by tangents: cos and sin of each token, for up to a chunk of pairs.
    static void make_frame(const float* tangents, int pairs, Run* frame) {
        for (int w = 0; w < C::kWide; ++w) {
            Lanes sine = {}, cosine = {}, c = {}, s = {};
            for (int i = 0; i < C::kLanes && w * C::kLanes + i < pairs; ++i) {
                float at, chord;
                angle_of(tangents[w * C::kLanes + i], &at, &chord);
                sine[i] = at;
                cosine[i] = 1.0f - chord * 0.5f;
                c[i] = 1.0f;
            }
            for (int t = 0; t < kMost; ++t) {
                frame->re[w][t] = c;
                frame->im[w][t] = s;
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
        const int64_t width = rows.inner * rows.d, size = dtype == KVK_F32 ? 4 : 2;
        Floats mean(width), energy(rows.inner), lacks(rows.inner * rows.tokens);
        if (!mean || !energy || !lacks) return false;
        const auto dot = dtype == KVK_F32 ? product<KVK_F32> : dtype == KVK_F16 ? product<KVK_F16> : product<KVK_BF16>;
        for (int64_t slab = begin; slab < end; ++slab) {
            float *const far = distance + slab * rows.tokens, *const out = lacking + slab * rows.tokens;
            int64_t count = 0;
            for (int64_t i = 0; i < width; ++i) mean.get()[i] = 0.0f;
            for (int64_t t = how.first; t < rows.tokens; t += how.every, ++count) {
                const int64_t value = slab * rows.stride + t * width;
                lines_ahead(static_cast<const char*>(x) + (value + how.every * width) * size, width * size);
                Kv<Isa>::add_row(dtype, x, value, width, mean.get());
            }
            const float inverse = 1.0f / static_cast<float>(count);
            for (int64_t i = 0; i < width; ++i) mean.get()[i] *= inverse;
            const int d = static_cast<int>(rows.d);
            for (int64_t head = 0; head < rows.inner; ++head) {
                float none, *const own = energy.get() + head;
                product<KVK_F32>(mean.get(), head * d, mean.get() + head * d, d, own, &none);
                *own = *own > 1e-30f ? *own : 1e-30f;
            }
            for (int64_t t = 0; t < rows.tokens; ++t) {
                far[t] = out[t] = 0.0f;
                lines_ahead(static_cast<const char*>(x) + (slab * rows.stride + t * width + Kv<Isa>::kFar) * size, width * size);
                for (int64_t head = 0; head < rows.inner; ++head) {
                    float along, away;
                    dot(x, slab * rows.stride + t * width + head * d, mean.get() + head * d, d, &along, &away);
                    lacks.get()[head * rows.tokens + t] = 1.0f - along / energy.get()[head];
                    far[t] += away;
                }
            }
            for (int64_t head = 0; head < rows.inner; ++head)
                add_lacking(lacks.get() + head * rows.tokens, rows.tokens, how, out);
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
