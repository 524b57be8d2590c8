// Portable: no intrinsics. Slow, and the one to read first.
#define BN_ISA scalar
#define BN_CODEC CODEC_TWO_BIT
#include "isa.h"
