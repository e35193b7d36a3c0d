// Compiled once for each instruction set, with KVK_USE_AVX2, KVK_USE_AVX512, KVK_USE_AVX512VBMI or neither defined.
#include "content.h"
#include "kv.h"
#include "learned.h"
#include "means.h"
#include "nf4.h"
#include "ops.h"
#include "rans.h"

#if defined(KVK_USE_AVX512VBMI)
#define KVK_TABLE kAvx512Vbmi
#elif defined(KVK_USE_AVX512)
#define KVK_TABLE kAvx512
#elif defined(KVK_USE_AVX2)
#define KVK_TABLE kAvx2
#else
#define KVK_TABLE kPortable
#endif
typedef ThisIsa Isa;

namespace {

bool rans_decoded(const uint8_t* data, int64_t nbytes, int64_t rows, int64_t width, const uint8_t* classes,
                  const uint32_t* slots, int64_t lanes, uint8_t* out) {
    return kvk::rans_decode(data, nbytes, rows, width, classes, slots, lanes, out, Isa::rans_run);
}

}  // namespace

namespace kvk {

const Ops KVK_TABLE = {
    Nf4<Isa>::encode, Nf4<Isa>::encode_tail, Nf4<Isa>::decode, Nf4<Isa>::decode_tail, Nf4<Isa>::scales,
    Kv<Isa>::means,   Content<Isa>::energy,  Content<Isa>::distance, Turn<Isa>::phases, Turn<Isa>::sums,
    Turn<Isa>::along, Turn<Isa>::gains,      Turn<Isa>::means,       Kv<Isa>::encode, Kv<Isa>::decode,
    Learned<Isa>::decode, rans_decoded,
};

}  // namespace kvk
