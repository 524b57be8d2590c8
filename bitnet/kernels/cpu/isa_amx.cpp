#define BN_ISA amx
#define BN_CODEC CODEC_TWO_BIT
#define BN_AVX512
#define BN_AMX
#include "isa.h"
