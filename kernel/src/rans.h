// Interleaved rANS with static tables (kvstore/codecs/rans.py is its reference): `lanes` states of 32 bits share a
// sequence of 16-bit words. In each step lane j codes symbol step * lanes + j, so lanes do not wait for each other.
#pragma once
#include <cstring>
#include <vector>

#include "kvstored_kernel.h"

namespace kvk {

constexpr int kRansBits = 12;
constexpr uint32_t kRansLow = 1u << 16;
constexpr int64_t kRansLanes = 4096;

inline bool rans_fits(int64_t rows, int64_t width, int64_t lanes, int64_t tables, const uint8_t* classes) {
    if (rows < 0 || width < 1 || lanes < 1 || lanes > kRansLanes || tables < 1) return false;
    for (int64_t row = 0; row < rows; ++row)
        if (classes[row] >= tables) return false;
    return true;
}

// A stream as it is read: the states of the lanes, and the words behind them.
struct RansStream {
    uint32_t states[kRansLanes];
    const uint8_t *word, *end;
};

// A run of lanes whose symbols are of one class: `slots` are its. False where the words do not suffice.
inline bool rans_run(RansStream* stream, int64_t lane, int64_t stop, const uint32_t* slots, uint8_t* out) {
    const uint8_t* word = stream->word;
    for (; lane < stop; ++lane, ++out) {
        const uint32_t x = stream->states[lane], slot = slots[x & ((1u << kRansBits) - 1)];
        *out = static_cast<uint8_t>(slot);
        uint32_t y = ((slot >> 8 & 0xfff) + 1) * (x >> kRansBits) + (slot >> 20);
        if (y < kRansLow) {
            if (word == stream->end) return false;
            uint16_t more;
            std::memcpy(&more, word, 2);
            word += 2;
            y = y << 16 | more;
        }
        stream->states[lane] = y;
    }
    stream->word = word;
    return true;
}

// Symbols as columns, symbol + 128. False: not a stream of so many symbols. Run: `rans_run`, by any instruction set.
template <class Run>
inline bool rans_decode(const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                        const uint32_t* slots, int64_t lanes, uint8_t* out, const Run& run_of) {
    if (nbytes < 4 * lanes || nbytes % 2) return false;
    RansStream stream;
    std::memcpy(stream.states, data, 4 * lanes);
    stream.word = data + 4 * lanes;
    stream.end = data + nbytes;
    const int64_t n = rows * width;
    int64_t row = 0, left = width;
    for (int64_t first = 0; first < n; first += lanes) {
        const int64_t count = n - first < lanes ? n - first : lanes;
        for (int64_t lane = 0; lane < count;) {
            const int64_t run = left < count - lane ? left : count - lane;
            const uint32_t* own = slots + (static_cast<int64_t>(classes[row]) << kRansBits);
            if (!run_of(&stream, lane, lane + run, own, out + first + lane)) return false;
            lane += run;
            left -= run;
            if (!left) {
                left = width;
                ++row;
            }
        }
    }
    for (int64_t lane = 0; lane < lanes; ++lane)
        if (stream.states[lane] != kRansLow) return false;
    return stream.word == stream.end;
}

// Writes backwards from `end`, which has room for two bytes a symbol and four a lane before it. Returns how many bytes
// were written, or -1 for a symbol without a frequency.
inline int64_t rans_encode(const uint8_t* columns, int64_t rows, int64_t width, const uint8_t* classes,
                           const uint16_t* counts, const uint16_t* starts, int64_t lanes, uint8_t* end) {
    std::vector<uint32_t> states(lanes, kRansLow);
    uint8_t* at = end;
    const int64_t n = rows * width;
    int64_t row = rows - 1, left = width;
    for (int64_t lane = n ? (n - 1) % lanes : -1, i = n - 1; i >= 0; --i) {
        const int64_t from = classes[row] * 256 + columns[i];
        const uint32_t f = counts[from];
        if (!f) return -1;
        uint32_t x = states[lane];
        if (x >= static_cast<uint64_t>(f) << (32 - kRansBits)) {
            const uint16_t low = static_cast<uint16_t>(x);
            at -= 2;
            std::memcpy(at, &low, 2);
            x >>= 16;
        }
        states[lane] = (x / f << kRansBits) + x % f + starts[from];
        lane = lane ? lane - 1 : lanes - 1;
        if (!--left) {
            left = width;
            --row;
        }
    }
    at -= 4 * lanes;
    std::memcpy(at, states.data(), 4 * lanes);
    return end - at;
}

}  // namespace kvk
