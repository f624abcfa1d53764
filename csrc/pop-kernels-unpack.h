// How quantized weights are unpacked to bytes, scales and offsets: what all types share, and the types with blocks of
// 32 weights. ggml-quants.c dequantizes the same.
//
// Each struct describes a type:
//   is_k    a block of the file has 256 weights, and the activations share one scale in it as in ggml
//   block   bytes of a block of the file, or of 32 weights if not is_k
//   group_rows  rows that stand together, 8 or 4 where ggml has rearranged them
//   group   a scale belongs to 4 * group inputs
//   affine  there is an offset of its own for each scale; otherwise it is -`offset` times the scale
//   bits    of a weight
// unpack() unpacks a chunk of S::lanes rows, which are `stride` bytes apart, into vector v of a tile.

#pragma once

#include "pop-kernels-tile.h"

#define GGML_COMMON_IMPL_CPP // ggml's tables of the values that codes stand for
#include "ggml-common.h"

// Writes 4 inputs of each output, from the lower bits of each byte.
template <class S> static inline void pop_put(pop_tile<S> & t, int v, int group, typename S::vi q) {
    S::store(t.q[group][v], q);
}

template <class S> static inline typename S::vi pop_low_4(typename S::vi a) {
    return S::and_(a, S::all(0x0f0f0f0f));
}

template <class S> static inline typename S::vi pop_high_4(typename S::vi a) {
    return S::and_(S::shr(a, 4), S::all(0x0f0f0f0f));
}

// Bytes of the value that ggml's table gives to each code, signed or from 0 to 255
template <class S, class F> static inline typename S::vi pop_iq4(typename S::vi a) {
    const typename S::vi q = S::look_up(kvalues_iq4nl, a);
    return pop_is_signed<S, F>() ? q : S::xor_(q, S::all_8(-128));
}

struct pop_q4_0 {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 18, group_rows = 1, group = 8, bits = 4, offset = 8;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            S::load_rows(p + 2, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

struct pop_q4_1 {
    static constexpr bool is_k = false, affine = true;
    static constexpr int  block = 20, group_rows = 1, group = 8, bits = 4, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            S::store_f(t.offset[b][v], S::half(S::shr(a[0], 16)));
            S::load_rows(p + 4, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_low_4<S>(a[i]));
                pop_put(t, v, 8 * b + 4 + i, pop_high_4<S>(a[i]));
            }
        }
    }
};

// The fifth bits stand in `bits`, a bit for each of 32 weights.
template <class S>
static inline void pop_put_5(pop_tile<S> & t, int v, int b, const typename S::vi a[4], typename S::vi bits) {
    for (int i = 0; i < 4; i++) {
        pop_put(t, v, 8 * b + i, S::or_bits(pop_low_4<S>(a[i]), bits, 4 * i, 16));
        pop_put(t, v, 8 * b + 4 + i, S::or_bits(pop_high_4<S>(a[i]), bits, 16 + 4 * i, 16));
    }
}

struct pop_q5_0 {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 22, group_rows = 1, group = 8, bits = 5, offset = 16;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            const typename S::vi fifth = S::or_(S::shr(a[0], 16), S::shl(a[1], 16));
            S::load_rows(p + 6, stride, a);
            pop_put_5<S>(t, v, b, a, fifth);
        }
    }
};

struct pop_q5_1 {
    static constexpr bool is_k = false, affine = true;
    static constexpr int  block = 24, group_rows = 1, group = 8, bits = 5, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            S::store_f(t.offset[b][v], S::half(S::shr(a[0], 16)));
            const typename S::vi fifth = a[1];
            S::load_rows(p + 8, stride, a);
            pop_put_5<S>(t, v, b, a, fifth);
        }
    }
};

struct pop_q8_0 {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 34, group_rows = 1, group = 8, bits = 8, offset = 128;

    // Writes half a block, with signed bytes or those from 0 to 255.
    template <class S> static void put(pop_tile<S> & t, int v, int first, const typename S::vi a[4]) {
        for (int i = 0; i < 4; i++) {
            pop_put(t, v, first + i, pop_is_signed<S, pop_q8_0>() ? a[i] : S::xor_(a[i], S::all_8(-128)));
        }
    }

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            for (int half = 0; half < 2; half++) {
                S::load_rows(p + 2 + 16 * half, stride, a);
                put<S>(t, v, 8 * b + 4 * half, a);
            }
        }
    }
};

struct pop_iq4_nl {
    static constexpr bool is_k = false, affine = false;
    static constexpr int  block = 18, group_rows = 1, group = 8, bits = 8, offset = 128;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            S::load_rows(p + 2, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_iq4<S, pop_iq4_nl>(pop_low_4<S>(a[i])));
                pop_put(t, v, 8 * b + 4 + i, pop_iq4<S, pop_iq4_nl>(pop_high_4<S>(a[i])));
            }
        }
    }
};
