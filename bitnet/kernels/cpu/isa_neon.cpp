// Arm with the dot product extension. Compiled by the tests, never run by us.
#define BN_ISA neon
#define BN_CODEC CODEC_TWO_BIT
#define BN_NEON
#include "isa.h"
