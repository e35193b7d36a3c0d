// Means of keys that turn with the position, as RoPE makes them: found, coded, and put back token by token (nf4-kv2).
// The arithmetic and its order are kvstore/kernels/reference_turn.py's; every operation is elementwise over channels, so
// that all instruction sets give the same bits.
#pragma once
#include <new>

#include "convert.h"
#include "ops.h"

namespace {

// Floats that may not be had: a kernel throws nothing. They begin with a cache's line.
class Floats {
  public:
    explicit Floats(int64_t n) : at_(new (kLine, std::nothrow) float[static_cast<size_t>(n > 0 ? n : 1)]) {}
    ~Floats() { operator delete[](at_, kLine); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float* get() const { return at_; }
    explicit operator bool() const { return at_ != nullptr; }

  private:
    static constexpr std::align_val_t kLine{64};
    float* at_;
};

// sin w and 2 - 2 cos w of the angle w whose half has the tangent h.
inline void angle_of(float h, float* sine, float* chord) {
    const float inverse = 1.0f / (1.0f + h * h);
    *sine = (h + h) * inverse;
    *chord = h * h * 4.0f * inverse;
}

// The mean of one token after the other, a row of all heads at a time: m += step; step -= chord * m.
template <class Isa>
class Turner {
  public:
    // by_pairs: rows in the order of Isa::by_pairs. The means are (outer, groups, inner, d).
    Turner(const kvk_rows& rows, const kvk_turns& turns, const float* means, bool by_pairs)
        : rows_(rows), turns_(turns), means_(means), pairs_(by_pairs), width_(rows.inner * rows.d),
          apart_((width_ + 15) / 16 * 16 + kApart), offsets_{apart_, 2 * apart_}, room_(5 * apart_ + turns.rotary) {}
    explicit operator bool() const { return static_cast<bool>(room_); }

    // The row of means of a token. Tokens of a group are asked for in order, or the group begins again.
    const float* row(int64_t slab, int64_t token) {
        const int64_t last = rows_.groups - 1, found = token / kvk::kGroup, group = found < last ? found : last;
        const int64_t at = token - group * kvk::kGroup;
        if (slab != slab_) turn_to(slab);
        if (slab != slab_ || group != group_ || at < at_ || ahead_) begin(slab, group);
        for (; at_ < at; ++at_) advance(first_, end_);
        return mean();
    }

    // out = x less the means from a column of its row on, which go on to the next token's. n: up to the row's end.
    void subtract(int64_t slab, int64_t token, int64_t column, int64_t n, const float* x, float* out) {
        float* const m = row_from(slab, token, column) + column;
        Isa::subtract_turning(x, m, offsets_, static_cast<int>(n & ~7), out);
        for (int64_t i = n & ~7; i < n; ++i) {
            out[i] = x[i] - m[i];
            m[i] += m[offsets_[0] + i];
            m[offsets_[0] + i] -= m[offsets_[1] + i] * m[i];
        }
        gone_on(n);
    }

    // The same for who moves the means on himself, by `offsets` to their steps and chords, and says so by `gone_on`. Those
    // in front of `column` may have been moved already.
    float* row_from(int64_t slab, int64_t token, int64_t column) {
        const int64_t last = rows_.groups - 1, found = token / kvk::kGroup, group = found < last ? found : last;
        if (slab != slab_ || group != group_ || token - group * kvk::kGroup != at_ || ahead_ != column) {
            ahead_ = 0;
            row(slab, token);
            advance(0, column);
            ahead_ = column;
        }
        return mean();
    }
    const int64_t* offsets() const { return offsets_; }
    void gone_on(int64_t n) {
        ahead_ += n;
        if (ahead_ < width_) return;
        at_ += ahead_ / width_;
        ahead_ %= width_;
    }

  private:
    // Between rows, so that what is written to one and what is read from the next never lie a multiple of 4 KiB apart: a
    // processor that compares the low bits of addresses would wait.
    static constexpr int64_t kApart = 64;

    float* mean() const { return room_.get(); }
    float* step() const { return room_.get() + apart_; }
    float* chord() const { return room_.get() + 2 * apart_; }
    float* sine() const { return room_.get() + 3 * apart_; }
    float* other() const { return room_.get() + 4 * apart_; }
    float* angles() const { return room_.get() + 5 * apart_; }  // the sine and the chord of each pair of this slab

    // chord and sine of every channel of a slab, the sine negative for the first channel of a pair.
    void turn_to(int64_t slab) {
        const int half = turns_.rotary / 2, bytes = (half + 7) / 8;
        first_ = width_;
        end_ = 0;
        for (int p = 0; p < half; ++p) angle_of(turns_.tangents[slab * half + p], angles() + p, angles() + half + p);
        for (int64_t i = 0; i < width_; ++i) chord()[i] = sine()[i] = 0.0f;
        for (int64_t head = 0; head < rows_.inner; ++head) {
            const uint8_t* mask = turns_.turning + (slab * rows_.inner + head) * bytes;
            for (int p = 0; p < half; ++p) {
                if (!(mask[p / 8] >> (p % 8) & 1)) continue;
                const int64_t re = head * rows_.d + (turns_.interleaved ? 2 * p : p);
                const int64_t im = re + (turns_.interleaved ? 1 : half);
                chord()[re] = chord()[im] = angles()[half + p];
                sine()[re] = -angles()[p];
                sine()[im] = angles()[p];
                first_ = re < first_ ? re : first_;
                end_ = im + 1 > end_ ? im + 1 : end_;
            }
        }
        constexpr int64_t kRun = Isa::kJoined;  // by_pairs moves values within one
        first_ = first_ / kRun * kRun;
        end_ = (end_ + kRun - 1) / kRun * kRun < width_ ? (end_ + kRun - 1) / kRun * kRun : width_;
        if (pairs_) {
            for (int64_t i = 0; i < width_; ++i) other()[i] = chord()[i];
            in_order(other(), width_, chord());
        }
    }
    static void in_order(const float* x, int64_t n, float* out) {
        if constexpr (Isa::kFused) Isa::by_pairs(x, n, out);
    }

    void begin(int64_t slab, int64_t group) {
        slab_ = slab;
        group_ = group;
        at_ = ahead_ = 0;
        for (int64_t i = 0; i < width_; ++i) step()[i] = 0.0f;
        const float* from = means_ + (slab * rows_.groups + group) * width_;
        float* const m = pairs_ ? other() : mean();
        for (int64_t i = 0; i < width_; ++i) m[i] = from[i];
        if (pairs_) in_order(m, width_, mean());
        first_step(from);
    }

    // step = turn(mean) - mean, from the means in their own order.
    void first_step(const float* m) {
        float* const to = pairs_ ? other() : step();
        const int half = turns_.rotary / 2, apart = turns_.interleaved ? 1 : half;
        for (int64_t i = first_; i < end_; ++i) to[i] = 0.0f;
        for (int64_t at = 0; at < width_; at += rows_.d)
            if (turns_.interleaved)
                first_steps<2>(m + at, m + at + apart, sine() + at + apart, angles() + half, half, to + at, to + at + apart);
            else
                first_steps<1>(m + at, m + at + apart, sine() + at + apart, angles() + half, half, to + at, to + at + apart);
        if (pairs_ && end_ > first_) in_order(other() + first_, end_ - first_, step() + first_);
    }
    // Of n pairs, kStride apart; nothing where one stands still.
    template <int kStride>
    static void first_steps(const float* re, const float* im, const float* sine, const float* chord, int n,
                            float* __restrict__ to_re, float* __restrict__ to_im) {
        for (int p = 0; p < n; ++p) {
            const float a = re[kStride * p], b = im[kStride * p], s = sine[kStride * p], k = chord[p] * 0.5f;
            const float x = -(a * k) - b * s, y = a * s - b * k;
            to_re[kStride * p] = s == 0.0f ? 0.0f : x;
            to_im[kStride * p] = s == 0.0f ? 0.0f : y;
        }
    }
    void advance(int64_t from, int64_t to) {
        float *__restrict__ m = mean(), *__restrict__ by = step();
        const float* __restrict__ k = chord();
        for (int64_t i = from; i < to; ++i) {
            m[i] += by[i];
            by[i] -= k[i] * m[i];
        }
    }

    const kvk_rows& rows_;
    const kvk_turns& turns_;
    const float* means_;
    bool pairs_;
    int64_t width_, apart_, offsets_[2], slab_ = -1, group_ = -1, at_ = 0, ahead_ = 0, first_ = 0, end_ = 0;
    Floats room_;
};

// A Turner where means turn, and nothing where they stand still.
template <class Isa>
class Turned {
  public:
    Turned(const kvk_rows& rows, const kvk_turns* turns, const float* means, bool by_pairs) : ready_(true), turner_(nullptr) {
        if (!turns) return;
        turner_ = new (std::nothrow) Turner<Isa>(rows, *turns, means, by_pairs);
        ready_ = turner_ && *turner_;
    }
    ~Turned() { delete turner_; }
    Turned(const Turned&) = delete;
    Turned& operator=(const Turned&) = delete;
    bool ready() const { return ready_; }
    Turner<Isa>* get() const { return turner_; }

  private:
    bool ready_;
    Turner<Isa>* turner_;
};

}  // namespace
