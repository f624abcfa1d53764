// The vector instructions that the kernels use, in one struct per instruction set. The kernels are templates over it.
//
//   vi, vf  a vector of integers and one of floating-point numbers
//   lanes   32-bit lanes of a vector, 8 or 16
//   rows    activation rows that one call of a kernel takes
//   has_dot products of four bytes are summed in 32 bits; otherwise those of two in 16 bits
//   is_signed  both factors of these products are signed; otherwise the weight is unsigned where has_dot says so
//   has_block  multiply_block() computes the products of a block, of weights that arrange() has put in its order;
//              otherwise pop-kernels-tile.h does, with dot() or pairs()
//
// pop_best is the best struct that the compiler may use, and pop_base the one for work in vectors of 32 bytes.

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
