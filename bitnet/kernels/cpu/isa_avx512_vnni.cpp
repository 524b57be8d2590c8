#define BN_ISA avx512_vnni
#define BN_CODEC CODEC_TWO_BIT
#define BN_AVX512
#include "isa.h"
