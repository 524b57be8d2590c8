#define BN_ISA avx2
#define BN_CODEC CODEC_TWO_BIT
#define BN_AVX2
#include "isa.h"
