#define BN_ISA amx
#define BN_CODEC CODEC_BASE3
#define BN_AVX512
#define BN_AMX
#include "isa.h"
