// How weights are unpacked that ggml has rearranged at load ("repack"): 8 or 4 rows stand together and take turns after
// 8 or 4 bytes, `turn`. On x86, both are 8.

#pragma once

#include "pop-kernels-unpack-fp4.h"
#include "pop-kernels-unpack-k.h"

template <int n_rows, int turn> struct pop_q4_0_groups : pop_q4_0 {
    static constexpr int group_rows = n_rows;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += n_rows * block) {
            S::store_f(t.scale[b][v], S::half(S::template load_groups_16<n_rows>(p, stride)));
            typename S::vi a[4];
            S::template load_groups<n_rows, turn>(p + 2 * n_rows, stride, a);
            for (int i = 0; i < 4; i++) {
                a[i] = S::xor_(a[i], S::all_8((int8_t) 0x88)); // ggml has made the weights signed
                pop_put(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

template <int n_rows, int turn> struct pop_q8_0_groups : pop_q8_0 {
    static constexpr int group_rows = n_rows;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += n_rows * block) {
            S::store_f(t.scale[b][v], S::half(S::template load_groups_16<n_rows>(p, stride)));
            for (int half = 0; half < 2; half++) {
                typename S::vi a[4];
                S::template load_groups<n_rows, turn>(p + (2 + 16 * half) * n_rows, stride, a);
                pop_q8_0::put<S>(t, v, 8 * b + 4 * half, a);
            }
        }
    }
};

template <int n_rows, int turn> struct pop_iq4_nl_groups : pop_iq4_nl {
    static constexpr int group_rows = n_rows;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += n_rows * block) {
            S::store_f(t.scale[b][v], S::half(S::template load_groups_16<n_rows>(p, stride)));
            typename S::vi a[4];
            S::template load_groups<n_rows, turn>(p + 2 * n_rows, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_iq4<S, pop_iq4_nl>(pop_low_4<S>(a[i])));
                pop_put(t, v, 8 * b + 4 + i, pop_iq4<S, pop_iq4_nl>(pop_high_4<S>(a[i])));
            }
        }
    }
};

template <int n_rows, int turn> struct pop_mxfp4_groups : pop_mxfp4 {
    static constexpr int group_rows = n_rows;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += n_rows * block) {
            for (int i = 0; i < S::lanes; i++) {
                t.scale[b][v][i] = ggml_table_f32_e8m0_half[p[i / n_rows * stride + i % n_rows]];
            }
            typename S::vi a[4];
            S::template load_groups<n_rows, turn>(p + n_rows, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put_fp4(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put_fp4(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

// The groups of types whose blocks have 256 weights always have 8 rows. This reads the scales of Q4_K and Q5_K.
template <class S> static inline void pop_put_group_scales_k(const uint8_t * p, size_t stride, pop_tile<S> & t, int v) {
    const typename S::vf d   = S::half(S::template load_groups_16<8>(p, stride));
    const typename S::vf min = S::negate(S::half(S::template load_groups_16<8>(p + 16, stride)));
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
}

template <int turn> struct pop_q4_k_groups : pop_q4_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        pop_put_group_scales_k<S>(p, stride, t, v);
        for (int part = 0; part < 8; part++) {
            typename S::vi a[4];
            S::template load_groups<8, turn>(p + 128 + 128 * part, stride, a);
            pop_put_q4_k<S>(t, v, part, a);
        }
    }
};

template <int turn> struct pop_q5_k_groups : pop_q5_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        pop_put_group_scales_k<S>(p, stride, t, v);
        typename S::vi fifth[8];
        S::template load_groups<8, turn>(p + 128, stride, fifth);
        S::template load_groups<8, turn>(p + 256, stride, fifth + 4);
        for (int part = 0; part < 8; part++) {
            typename S::vi a[4];
            S::template load_groups<8, turn>(p + 384 + 128 * part, stride, a);
            pop_put_q5_k<S>(t, v, part, a, fifth);
        }
    }
};

// This is for vectors of 8 lanes, because ggml has such groups for Arm alone.
template <int turn> struct pop_q6_k_groups : pop_q6_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        const typename S::vf d = S::half(S::template load_groups_16<8>(p, stride));
        for (int b = 0; b < 16; b++) {
            const typename S::vi scale = S::shr_signed(S::shl(S::load_8(p + 16 + 8 * b), 24), 24);
            S::store_f(t.scale[b][v], S::mul(d, S::to_float(scale)));
        }
        for (int part = 0; part < 4; part++) {
            const int      half = part / 2;
            const int      odd  = part % 2;
            typename S::vi a[4];
            typename S::vi b[4];
            typename S::vi high[4];
            S::template load_groups<8, turn>(p + 144 + 512 * half + 128 * odd, stride, a);
            S::template load_groups<8, turn>(p + 144 + 512 * half + 256 + 128 * odd, stride, b);
            S::template load_groups<8, turn>(p + 1168 + 256 * half + 128 * odd, stride, high);
            pop_put_q6_k<S>(t, v, part, a, b, high);
        }
    }
};

struct pop_q2_k_groups : pop_q2_k {
    static constexpr int group_rows = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        const typename S::vf d   = S::half(S::template load_groups_16<8>(p, stride));
        const typename S::vf min = S::negate(S::half(S::template load_groups_16<8>(p + 16, stride)));
        for (int b = 0; b < 16; b++) {
            const typename S::vi both =
                S::shr(S::template load_groups_16<8>(p + 32 + 16 * (b / 2), stride), 8 * (b % 2));
            S::store_f(t.scale[b][v], S::mul(d, S::to_float(S::and_(both, S::all(15)))));
            S::store_f(t.offset[b][v], S::mul(min, S::to_float(S::and_(S::shr(both, 4), S::all(15)))));
        }
        for (int part = 0; part < 4; part++) {
            typename S::vi a[4];
            S::template load_groups<8, 8>(p + 160 + 128 * part, stride, a);
            pop_put_q2_k<S>(t, v, part, a);
        }
    }
};
