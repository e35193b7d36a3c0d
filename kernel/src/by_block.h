// What an instruction set does to the blocks of a piece one by one, where it knows nothing better.
#pragma once
#include "convert.h"
#include "tables.h"

namespace {

template <class Isa>
struct ByBlock {
    // Bits of the largest magnitude of each block of a piece, as floats.
    static void absmaxes(const float* x, int blocks, int block, float* most) {
        for (int b = 0; b < blocks; ++b) most[b] = from_bits(Isa::absmax_bits(x + b * block, block));
    }
    static void best_clips(const float* x, int blocks, int block, const float* inverse, int* clips) {
        for (int b = 0; b < blocks; ++b) clips[b] = Isa::best_clip(x + b * block, block, inverse[b]);
    }
    template <int kSize>
    static void code_blocks(const float* x, int blocks, const float* inverse, uint8_t* codes, const kvk::BlockSums& sums) {
        for (int b = 0; b < blocks; ++b)
            sums.set(b, Isa::template code_block<kSize>(x + kSize * b, inverse[b], codes + kSize / 2 * b));
    }
};

}  // namespace
