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

struct RansTables {
    const uint16_t *counts, *starts;
    const uint8_t* slots;
};

inline bool rans_fits(int64_t rows, int64_t width, int64_t lanes, int64_t tables, const uint8_t* classes) {
    if (rows < 0 || width < 1 || lanes < 1 || lanes > kRansLanes || tables < 1) return false;
    for (int64_t row = 0; row < rows; ++row)
        if (classes[row] >= tables) return false;
    return true;
}

// Symbols as columns, symbol + 128. False: not a stream of so many symbols.
inline bool rans_decode(const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                        const RansTables& tables, int64_t lanes, uint8_t* out) {
    if (nbytes < 4 * lanes || nbytes % 2) return false;
    std::vector<uint32_t> states(lanes);
    std::memcpy(states.data(), data, 4 * lanes);
    const uint8_t *word = data + 4 * lanes, *end = data + nbytes;
    const int64_t n = rows * width;
    int64_t row = 0, left = width;
    for (int64_t first = 0; first < n; first += lanes) {
        const int64_t count = n - first < lanes ? n - first : lanes;
        for (int64_t lane = 0; lane < count;) {
            const int64_t run = left < count - lane ? left : count - lane;
            const uint16_t *counts = tables.counts + classes[row] * 256, *starts = tables.starts + classes[row] * 256;
            const uint8_t* slots = tables.slots + (static_cast<int64_t>(classes[row]) << kRansBits);
            for (const int64_t stop = lane + run; lane < stop; ++lane) {
                const uint32_t x = states[lane], slot = x & ((1u << kRansBits) - 1);
                const uint8_t column = slots[slot];
                out[first + lane] = column;
                uint32_t y = counts[column] * (x >> kRansBits) + slot - starts[column];
                if (y < kRansLow) {
                    if (word == end) return false;
                    uint16_t more;
                    std::memcpy(&more, word, 2);
                    word += 2;
                    y = y << 16 | more;
                }
                states[lane] = y;
            }
            left -= run;
            if (!left) {
                left = width;
                ++row;
            }
        }
    }
    for (const uint32_t x : states)
        if (x != kRansLow) return false;
    return word == end;
}

// Writes backwards from `end`, which has room for two bytes a symbol and four a lane before it. Returns how many bytes
// were written, or -1 for a symbol without a frequency.
inline int64_t rans_encode(const uint8_t* columns, int64_t rows, int64_t width, const uint8_t* classes,
                           const RansTables& tables, int64_t lanes, uint8_t* end) {
    std::vector<uint32_t> states(lanes, kRansLow);
    uint8_t* at = end;
    const int64_t n = rows * width;
    int64_t row = rows - 1, left = width;
    for (int64_t lane = n ? (n - 1) % lanes : -1, i = n - 1; i >= 0; --i) {
        const int64_t from = classes[row] * 256 + columns[i];
        const uint32_t f = tables.counts[from];
        if (!f) return -1;
        uint32_t x = states[lane];
        if (x >= static_cast<uint64_t>(f) << (32 - kRansBits)) {
            const uint16_t low = static_cast<uint16_t>(x);
            at -= 2;
            std::memcpy(at, &low, 2);
            x >>= 16;
        }
        states[lane] = (x / f << kRansBits) + x % f + tables.starts[from];
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
