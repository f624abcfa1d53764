// The vector instructions that the kernels use, in one struct per instruction set. The kernels are templates over it.
//
//   vi, vf     the type of a vector of integers, and of one of floating-point numbers
//   lanes      the number of 32-bit lanes of a vector, 8 or 16
//   rows       the number of activation rows that one call of a kernel takes
//   has_dot    whether one instruction sums the products of four bytes in 32 bits; otherwise of two bytes in 16 bits
//   is_signed  whether weights of 8 bits are unpacked to signed bytes; otherwise to bytes from 0 to 255
//   has_block  whether there is multiply_block(), which computes all products of a block, and arrange(), which puts
//              weights in the order that it reads; otherwise pop-kernels-tile.h uses dot() or pairs()
//
// pop_best is the struct of the best instruction set that the compiler may use, but for the tiles of AMX, which
// pop-kernels-amx.h has. pop_base is the one for work that is done in vectors of 32 bytes everywhere.

#pragma once

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define POP_HAS_KERNELS
#    define POP_HAS_X86_KERNELS
#    include "pop-kernels-avx2.h"
#    include "pop-kernels-avx512.h"

using pop_base = pop_avx2;
#    if defined(POP_KERNELS_HAS_AVX512_VNNI)
using pop_best = pop_avx512_vnni;
#    else
using pop_best = pop_avx_vnni;
#    endif
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__GNUC__)
#    define POP_HAS_KERNELS
#    include "pop-kernels-neon.h"

using pop_base = pop_neon_dot;
#    if defined(__ARM_FEATURE_MATMUL_INT8)
using pop_best = pop_neon_i8mm;
#    else
using pop_best = pop_neon_dot;
#    endif
#endif
