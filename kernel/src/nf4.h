// NF4 in blocks of 64 over one instruction set. Works on whole blocks; the caller splits threads at blocks.
#pragma once
#include "vec_any.h"

namespace {

template <class Isa>
struct Nf4 {
    static constexpr int kBlock = 64;

    template <class T>
    static const float* floats(const T* x, int dtype, float* scratch) {
        if (dtype == KVK_F32) return reinterpret_cast<const float*>(x);
        if (dtype == KVK_F16)
            Isa::load_f16(reinterpret_cast<const uint16_t*>(x), scratch, kBlock);
        else
            Isa::load_bf16(reinterpret_cast<const uint16_t*>(x), scratch, kBlock);
        return scratch;
    }

    // Full blocks [begin, end). Returns the bits of the largest magnitude seen.
    static uint32_t encode(int dtype, const void* x, int64_t begin, int64_t end, uint8_t* codes, float* absmax) {
        const char* source = static_cast<const char*>(x);
        const int64_t itemsize = dtype == KVK_F32 ? 4 : 2;
        uint32_t most = 0;
        alignas(64) float scratch[kBlock];
        for (int64_t block = begin; block < end; ++block) {
            const float* v = floats(source + block * kBlock * itemsize, dtype, scratch);
            const uint32_t bits = Isa::absmax_bits(v, kBlock);
            most = bits > most ? bits : most;
            const float scale = from_bits(bits);
            absmax[block] = scale;
            const float inverse = 1.0f / (scale > 1e-38f ? scale : 1e-38f);
            Isa::codes32(v, inverse, codes + block * 32);
            Isa::codes32(v + 32, inverse, codes + block * 32 + 16);
        }
        return most;
    }

    // The short last block: n values, 0 < n < 64. It divides and stores at least 1e-38 (a bitsandbytes quirk).
    static uint32_t encode_tail(int dtype, const void* x, int n, uint8_t* codes, float* absmax) {
        alignas(64) float v[kBlock] = {};
        for (int i = 0; i < n; ++i) {
            if (dtype == KVK_F32)
                v[i] = static_cast<const float*>(x)[i];
            else if (dtype == KVK_F16)
                v[i] = f16_to_float(static_cast<const uint16_t*>(x)[i]);
            else
                v[i] = bf16_to_float(static_cast<const uint16_t*>(x)[i]);
        }
        const uint32_t bits = Isa::absmax_bits(v, kBlock);
        const float scale = from_bits(bits);
        absmax[0] = scale > 1e-38f ? scale : 1e-38f;
        for (int i = 0; i < n; ++i) v[i] = v[i] / absmax[0];
        uint8_t packed[32];
        Isa::codes32(v, 1.0f, packed);
        Isa::codes32(v + 32, 1.0f, packed + 16);
        memcpy(codes, packed, static_cast<size_t>((n + 1) / 2));
        return bits;
    }

    // Full blocks [begin, end) into out, past the caches where `stream` (out is then 64-byte aligned).
    static void decode(int dtype, const uint8_t* codes, const float* absmax, int64_t begin, int64_t end, bool stream,
                       void* out) {
        alignas(64) float v[kBlock];
        for (int64_t block = begin; block < end; ++block) {
            const uint8_t* packed = codes + block * 32;
            float* single = static_cast<float*>(out) + block * kBlock;
            if (stream) {
                Isa::levels32_stream(packed, absmax[block], single);
                Isa::levels32_stream(packed + 16, absmax[block], single + 32);
                continue;
            }
            float* into = dtype == KVK_F32 ? single : v;
            Isa::levels32(packed, absmax[block], into);
            Isa::levels32(packed + 16, absmax[block], into + 32);
            uint16_t* half = static_cast<uint16_t*>(out) + block * kBlock;
            if (dtype == KVK_F16)
                Isa::store_f16(v, half, kBlock);
            else if (dtype == KVK_BF16)
                Isa::store_bf16(v, half, kBlock);
        }
        if (stream) Isa::fence();
    }

    static void decode_tail(int dtype, const uint8_t* codes, float absmax, int n, void* out) {
        alignas(64) float v[kBlock];
        uint8_t packed[32] = {};
        memcpy(packed, codes, static_cast<size_t>((n + 1) / 2));
        Isa::levels32(packed, absmax, v);
        Isa::levels32(packed + 16, absmax, v + 32);
        for (int i = 0; i < n; ++i) {
            if (dtype == KVK_F32)
                static_cast<float*>(out)[i] = v[i];
            else
                static_cast<uint16_t*>(out)[i] = dtype == KVK_F16 ? float_to_f16(v[i]) : float_to_bf16(v[i]);
        }
    }

    // Double quantization: a group's scales about the mean, as a place among 65,536 in [-1, 1], as its code.
    static void scales(const float* absmax, int64_t b, float offset, const uint8_t* lut, uint8_t* codes,
                       float* nested) {
        constexpr int kNested = 256;
        for (int64_t first = 0; first < b; first += kNested) {
            const int n = static_cast<int>(b - first < kNested ? b - first : kNested);
            alignas(64) float centred[kNested] = {};
            int32_t position[kNested];
            for (int i = 0; i < n; ++i) centred[i] = absmax[first + i] - offset;
            const float most = from_bits(Isa::absmax_bits(centred, kNested));
            nested[first / kNested] = most;
            const float inverse = 1.0f / most;
            for (int i = 0; i < kNested; ++i) {
                const float scaled = centred[i] * inverse;
                // NaN, of a group of equal scales, fails the first comparison and takes code 0.
                const float low = scaled > -1.0f ? scaled : -1.0f;
                const float z = low < 1.0f ? low : 1.0f;
                const double exact = static_cast<double>((z + 1.0f) * 0.5f) * 65535.0 + 0.5;
                position[i] = static_cast<int32_t>(static_cast<float>(exact));
            }
            for (int i = 0; i < n; ++i) codes[first + i] = lut[position[i] < 65535 ? position[i] : 65535];
        }
    }
};

}  // namespace
