// Constant tables, as bits: the same as kvstore/kernels/tables.py and reference_kv.py, which explain them.
#pragma once
#include <stdint.h>

namespace kvk {

static constexpr uint32_t kCodeBits[16] = {
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};

static constexpr uint32_t kThresholdBits[15] = {
    0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff,
    0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da};

// The error of nf4 is measured in whole numbers, so that every instruction set finds the same: a normalized value
// z as u = round(z * kSteps), a level likewise. 64 squares of them stay below 2^31; 4064 = 32 * 127, so u >> 5 is
// an integer of 8 bits.
static constexpr float kSteps = 4064.0f;
static constexpr int kLevelSteps[16] = {-4064, -2829, -2134, -1605, -1156, -751, -370, 0,
                                        323,   654,   1000,  1373,  1791,  2286, 2938, 4064};
// round(kSteps * threshold) >> 5.
static constexpr int kStepThresholds[15] = {-108, -78, -59, -44, -30, -18, -6, 5, 15, 25, 37, 49, 63, 81, 109};

// Where nf4's sums go: for each block sum((u-l)^2), sum((u-l)*l) and sum(u^2), l the level of its code in steps.
struct Measured {
    int32_t *error, *cross, *energy;
};

// Of a block x with levels L: x.x, x.L and L.L.
struct Sums {
    float energy, cross, size;
};

// The same of many blocks.
struct BlockSums {
    float *energy, *cross, *size;
    void set(int b, const Sums& sums) const {
        energy[b] = sums.energy;
        cross[b] = sums.cross;
        size[b] = sums.size;
    }
    BlockSums from(int b) const { return {energy + b, cross + b, size + b}; }
};

static constexpr int kClips = 5;
static constexpr uint32_t kClipBits[kClips] = {0x3f4ccccd, 0x3f59999a, 0x3f666666, 0x3f733333, 0x3f800000};
static constexpr int kSearchLevels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
// floor(127 * clip * threshold): an integer u is above a threshold when u is above this.
static constexpr int kSearchThresholds[kClips][15] = {
    {-87, -63, -47, -35, -24, -15, -5, 4, 12, 20, 29, 39, 50, 65, 87},
    {-92, -66, -50, -37, -26, -15, -5, 4, 12, 21, 31, 42, 54, 69, 92},
    {-97, -70, -53, -39, -27, -16, -6, 4, 13, 23, 33, 44, 57, 73, 98},
    {-103, -74, -56, -41, -29, -17, -6, 4, 14, 24, 35, 46, 60, 77, 103},
    {-108, -78, -59, -44, -30, -18, -6, 5, 15, 25, 37, 49, 63, 81, 109}
};

}  // namespace kvk
