// Scalar conversions between float and its 16-bit relatives, round to nearest even, finite values.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// Called with each of the consecutive places of nbytes that a loop goes through: once a page, the address of the next one
// is translated before it is needed. In a virtual machine, where that is slow, decoding gains a quarter.
inline void page_ahead(const void* at, int64_t nbytes) {
    constexpr int64_t kPage = 4096;
    if (static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) & (kPage - 1)) < nbytes)
        __builtin_prefetch(static_cast<const char*>(at) + kPage);
}

// Memory that is to be read a while from now.
inline void lines_ahead(const void* at, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

inline float bf16_to_float(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const uint32_t exponent = bits & 0x0f800000u;
    bits += 112u << 23;  // from a bias of 15 to one of 127
    if (exponent == 0x0f800000u) {
        bits += 112u << 23;  // Inf and NaN
    } else if (exponent == 0) {
        // Subnormal: let the float unit normalize it.
        bits = to_bits(from_bits(bits + (1u << 23)) - from_bits(113u << 23));
    }
    return from_bits(bits | sign);
}

inline uint16_t float_to_f16(float value) {
    uint32_t bits = to_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits >= 0x47800000u) {
        bits = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (bits < 0x38800000u) {
        // Adding 0.5 shifts the value into the place where the float unit rounds it as a subnormal half.
        bits = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
    } else {
        bits = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return static_cast<uint16_t>(bits | sign);
}

}  // namespace
