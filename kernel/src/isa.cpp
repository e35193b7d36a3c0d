// Compiled once for each instruction set, with KVK_USE_AVX2, KVK_USE_AVX512, KVK_USE_AVX512VBMI or neither defined.
#include "content.h"
#include "kv.h"
#include "means.h"
#include "nf4.h"
#include "ops.h"

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

namespace kvk {

const Ops KVK_TABLE = {
    Nf4<Isa>::encode, Nf4<Isa>::encode_tail, Nf4<Isa>::decode, Nf4<Isa>::decode_tail, Nf4<Isa>::scales,
    Kv<Isa>::means,   Content<Isa>::energy,  Content<Isa>::distance, Turn<Isa>::phases, Turn<Isa>::sums,
    Turn<Isa>::along, Turn<Isa>::gains,      Turn<Isa>::means,       Kv<Isa>::encode, Kv<Isa>::decode,
};

}  // namespace kvk
