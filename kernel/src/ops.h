// What one instruction set offers: single-threaded loops over a range of whole blocks or groups.
#pragma once
#include "convert.h"
#include "kvstored_kernel.h"
#include "tables.h"

namespace kvk {

struct Ops {
    uint32_t (*nf4_encode)(int dtype, const void* x, int64_t begin, int64_t end, uint8_t* codes, float* absmax,
                           Measured sums);
    uint32_t (*nf4_encode_tail)(int dtype, const void* x, int n, uint8_t* codes, float* absmax, Measured sums);
    void (*nf4_decode)(int dtype, const uint8_t* codes, const float* absmax, int64_t begin, int64_t end, bool stream,
                       void* out);
    void (*nf4_decode_tail)(int dtype, const uint8_t* codes, float absmax, int n, void* out);
    // Groups of 256 scales [begin, end); squares: two for each group.
    void (*nf4_scales)(const float* absmax, int64_t b, float offset, const uint8_t* lut, const float* map, Measured sums,
                       int64_t begin, int64_t end, uint8_t* codes, float* nested, double* squares);
    // Groups of tokens [begin, end) of outer * groups.
    void (*kv_means)(int dtype, const void* x, const kvk_rows& rows, int64_t begin, int64_t end, int8_t* codes,
                     float* scales, float* means);
    // Groups of tokens [begin, end) of outer * groups; two numbers for each head of each.
    void (*kv_content)(int dtype, const void* x, const kvk_rows& rows, int rotary, bool interleaved, int64_t groups,
                       int64_t begin, int64_t end, double* content);
    // Slabs [begin, end); one number for each head of each.
    void (*kv_distance)(int dtype, const void* x, const void* y, const kvk_rows& rows, int64_t begin, int64_t end,
                        double* squares);
    // Slabs [begin, end). False where there is no memory.
    bool (*kv_phases)(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t groups,
                      const kvk_phases& how, int64_t begin, int64_t end, double* power, double* pooled, uint8_t* shown,
                      int32_t* heads);
    // Groups of tokens [begin, end) of outer * groups. False where there is no memory.
    bool (*kv_sums)(int dtype, const void* x, const kvk_rows& rows, const kvk_turns& turns, int64_t begin, int64_t end,
                    float* still, float* turned, double* content);
    // Slabs [begin, end). False where there is no memory.
    bool (*kv_along)(int dtype, const void* x, const kvk_rows& rows, const kvk_along& how, int64_t begin, int64_t end,
                     float* distance, float* lacking);
    void (*kv_gains)(const kvk_rows& rows, const kvk_turns& turns, const float* still, const float* turned, float* gains);
    // Groups of tokens [begin, end) of outer * groups. False where there is no memory.
    bool (*kv_code_means)(const kvk_rows& rows, const kvk_turns* turns, const float* still, const float* turned,
                          int64_t begin, int64_t end, int8_t* codes, uint8_t* scales, float* means);
    // Tiles of 256 blocks [begin, end); turns may be null. A status.
    int (*kv_encode)(int dtype, const void* x, const kvk_rows& rows, const float* means, const kvk_turns* turns,
                     int64_t begin, int64_t end, uint8_t* codes, uint8_t* scales, int16_t* tops, float* error);
    int (*kv_decode)(int dtype, const uint8_t* codes, const uint8_t* scales, const int16_t* tops, const float* means,
                     const kvk_turns* turns, const kvk_rows& rows, int64_t begin, int64_t end, bool stream, void* out);
    // A status.
    int (*learned_decode)(int dtype, const kvk_learned& how, const uint8_t* symbols, const int32_t* columns,
                          const uint8_t* classes, const int16_t* escapes, int64_t escaped, void* out, int64_t* used);
    // False where the bytes are no stream of so many symbols.
    bool (*rans_decode)(const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                        const uint32_t* slots, int64_t lanes, uint8_t* out);
};

extern const Ops kPortable;
#if defined(__x86_64__)
extern const Ops kAvx2;
extern const Ops kAvx512;
extern const Ops kAvx512Vbmi;
#endif

constexpr int kScaleGroup = 256;
constexpr int kGroup = 64;
constexpr uint32_t kMeanTop = 246;  // 127 * 2^(246 - 127) is finite

// A scale from its byte: steps down from the top of its group, in float bits without their 17 lowest.
static inline float scale_of(uint8_t code, int32_t top) {
    const int32_t steps = code >= 64 ? 255 - code : 192 + ((63 - code) << 2);
    const int32_t bits = top - steps;
    return code == 0 || bits < 0 ? 0.0f : from_bits(static_cast<uint32_t>(bits) << 17);
}

static inline int64_t values_of(const kvk_rows& rows) { return rows.outer * rows.tokens * rows.inner * rows.d; }
static inline int64_t blocks_of(const kvk_rows& rows) { return (values_of(rows) + rows.block - 1) / rows.block; }

}  // namespace kvk
