// How the types are unpacked whose weights are floating-point numbers of 4 bits: MXFP4 and NVFP4. Twice each of their
// 16 values is a small integer. pop-kernels-unpack.h explains a type.

#pragma once

#include "pop-kernels-unpack.h"
#include "simd-mappings.h"

// Writes the weights that belong to the codes in the bytes of a, plus the offset of these types.
template <class S> static inline void pop_put_fp4(pop_tile<S> & t, int v, int group, typename S::vi a) {
    pop_put(t, v, group, S::add_8(S::look_up(kvalues_fp4, a), S::all_8(12)));
}

// Writes the scale of each row, one of the 256 numbers of a table. Its code stands in a byte.
template <class S>
static inline void pop_put_code_scales(
    pop_tile<S> & t, int v, int block, const float * table, const uint8_t * codes, size_t stride) {
    for (int i = 0; i < S::lanes; i++) {
        t.scale[block][v][i] = table[codes[i * stride]];
    }
}

struct pop_mxfp4 {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 17, group_rows = 1, group = 8, bits = 5, offset = 12;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            pop_put_code_scales(t, v, b, ggml_table_f32_e8m0_half, p, stride);
            typename S::vi a[4];
            S::load_rows(p + 1, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put_fp4(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put_fp4(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

// A block of the file has 64 weights, twice the 32 to which `block` refers.
struct pop_nvfp4 {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 18, group_rows = 1, group = 4, bits = 5, offset = 12;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b += 2, p += 2 * block) {
            for (int i = 0; i < 4; i++) {
                pop_put_code_scales(t, v, 2 * b + i, ggml_table_f32_ue4m3, p + i, stride);
            }
            for (int half = 0; half < 2; half++) {
                typename S::vi a[4];
                S::load_rows(p + 4 + 16 * half, stride, a);
                for (int i = 0; i < 4; i++) {
                    const int first = 8 * (b + half) + 4 * (i / 2) + i % 2;
                    pop_put_fp4(t, v, first, pop_low_4<S>(a[i]));
                    pop_put_fp4(t, v, first + 2, pop_high_4<S>(a[i]));
                }
            }
        }
    }
};
