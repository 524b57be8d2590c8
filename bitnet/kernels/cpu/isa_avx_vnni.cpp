#define BN_ISA avx_vnni
#define BN_CODEC CODEC_BASE3
#define BN_AVX2
#define BN_AVXVNNI
#include "isa.h"
