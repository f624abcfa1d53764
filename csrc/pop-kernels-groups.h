// How weights are unpacked that ggml has rearranged at load ("repack"): 8 rows stand together and take turns after 8
// bytes.

#pragma once

#include "pop-kernels-unpack-fp4.h"
#include "pop-kernels-unpack-k.h"

struct pop_q4_0_groups : pop_q4_0 {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += 8 * block) {
            S::store_f(t.scale[b][v], S::half(S::load_groups_16(p, stride)));
            typename S::vi a[4];
            S::load_groups(p + 16, stride, a);
            for (int i = 0; i < 4; i++) {
                a[i] = S::xor_(a[i], S::all_8((int8_t) 0x88)); // ggml has made the weights signed
                pop_put(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

struct pop_iq4_nl_groups : pop_iq4_nl {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += 8 * block) {
            S::store_f(t.scale[b][v], S::half(S::load_groups_16(p, stride)));
            typename S::vi a[4];
            S::load_groups(p + 16, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_iq4<S, pop_iq4_nl>(pop_low_4<S>(a[i])));
                pop_put(t, v, 8 * b + 4 + i, pop_iq4<S, pop_iq4_nl>(pop_high_4<S>(a[i])));
            }
        }
    }
};

struct pop_mxfp4_groups : pop_mxfp4 {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += 8 * block) {
            for (int i = 0; i < S::lanes; i++) {
                t.scale[b][v][i] = ggml_table_f32_e8m0_half[p[i / 8 * stride + i % 8]];
            }
            typename S::vi a[4];
            S::load_groups(p + 8, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put_fp4(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put_fp4(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

struct pop_q4_k_groups : pop_q4_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        const typename S::vf d   = S::half(S::load_groups_16(p, stride));
        const typename S::vf min = S::negate(S::half(S::load_groups_16(p + 16, stride)));
        for (int b = 0; b < 8; b++) {
            // 12 bytes hold a block's scales and offsets of 8 rows, packed as those of a row's 8 blocks in the file.
            uint32_t scale[S::lanes / 4];
            uint32_t offset[S::lanes / 4];
            for (int g = 0; g < S::lanes / 8; g++) {
                const uint8_t * from = p + g * stride + 32 + 12 * b;

                const uint32_t lower = pop_load_32(from);
                const uint32_t upper = pop_load_32(from + 4);
                const uint32_t rest  = pop_load_32(from + 8);

                scale[2 * g]      = lower & 0x3f3f3f3f;
                scale[2 * g + 1]  = (rest & 0x0f0f0f0f) | (lower >> 2 & 0x30303030);
                offset[2 * g]     = upper & 0x3f3f3f3f;
                offset[2 * g + 1] = (rest >> 4 & 0x0f0f0f0f) | (upper >> 2 & 0x30303030);
            }
            S::store_f(t.scale[b][v], S::mul(d, S::to_float(S::load_8((const uint8_t *) scale))));
            S::store_f(t.offset[b][v], S::mul(min, S::to_float(S::load_8((const uint8_t *) offset))));
        }
        for (int part = 0; part < 8; part++) {
            typename S::vi a[4];
            S::load_groups(p + 128 + 128 * part, stride, a);
            pop_put_q4_k<S>(t, v, part, a);
        }
    }
};

struct pop_q2_k_groups : pop_q2_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        const typename S::vf d   = S::half(S::load_groups_16(p, stride));
        const typename S::vf min = S::negate(S::half(S::load_groups_16(p + 16, stride)));
        for (int b = 0; b < 16; b++) {
            const typename S::vi both = S::shr(S::load_groups_16(p + 32 + 16 * (b / 2), stride), 8 * (b % 2));
            S::store_f(t.scale[b][v], S::mul(d, S::to_float(S::and_(both, S::all(15)))));
            S::store_f(t.offset[b][v], S::mul(min, S::to_float(S::and_(S::shr(both, 4), S::all(15)))));
        }
        for (int part = 0; part < 4; part++) {
            typename S::vi a[4];
            S::load_groups(p + 160 + 128 * part, stride, a);
            pop_put_q2_k<S>(t, v, part, a);
        }
    }
};
