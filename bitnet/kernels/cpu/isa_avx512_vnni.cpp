#define BN_ISA avx512_vnni
#define BN_CODEC CODEC_BASE3
#define BN_AVX512
#include "isa.h"
