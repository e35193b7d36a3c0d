// The instruction set this translation unit is compiled for, as the type `KVK_ISA` names.
#pragma once
#include "kvstored_kernel.h"

#if defined(KVK_USE_AVX512)
#include "vec_avx512.h"
#elif defined(KVK_USE_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif
