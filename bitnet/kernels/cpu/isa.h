// The table of one instruction set; each isa_*.cpp is this file under other macros and compiler flags (setup.py).
#pragma once

#include "forward.h"
#include "sampling.h"

#define BN_STRING2(x) #x
#define BN_STRING(x) BN_STRING2(x)
#define BN_NAME2(x) bn_kernels_##x
#define BN_NAME(x) BN_NAME2(x)

extern "C" const bn_kernels BN_NAME(BN_ISA);
extern "C" const bn_kernels BN_NAME(BN_ISA) = {
    BN_STRING(BN_ISA), BN_CODEC, bn::BN_ISA::quantize, bn::BN_ISA::matmul, bn::BN_ISA::linear,
    bn::BN_ISA::workspace, bn::BN_ISA::forward, bn::BN_ISA::peak, bn::BN_ISA::sample,
};
