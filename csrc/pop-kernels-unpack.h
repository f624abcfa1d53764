// How the types of quantized weights are unpacked to bytes, scales and offsets. ggml-quants.c dequantizes the same.
//
// Each struct describes a type:
//   is_k    a block of the file has 256 weights, and the activations share one scale in it as in ggml
//   block   bytes of a block of the file
//   group_rows  rows that stand together, 8 where ggml has interleaved them
//   group   a scale belongs to 4 * group inputs
//   affine  there is an offset of its own for each scale; otherwise it is -`offset` times the scale
//   bits    of a weight
// unpack() unpacks a chunk of S::lanes rows, which are `stride` bytes apart, into vector v of a tile.

#pragma once

#include "pop-kernels-tile.h"

// The values of the 16 codes of IQ4_NL and IQ4_XS, a fact of the format.
alignas(16) static const int8_t pop_iq4_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10,
                                                       1,    13,   25,  38,  53,  69,  89,  113 };

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

// Bytes of the value that pop_iq4_values gives to each code, signed or from 0 to 255
template <class S, class F> static inline typename S::vi pop_iq4(typename S::vi a) {
    const typename S::vi q = S::look_up(pop_iq4_values, a);
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

    template <class S> static void unpack(const uint8_t * p, size_t stride, int n_blocks, pop_tile<S> & t, int v) {
        for (int b = 0; b < n_blocks; b++, p += block) {
            typename S::vi a[4];
            S::load_rows(p, stride, a);
            S::store_f(t.scale[b][v], S::half(a[0]));
            for (int half = 0; half < 2; half++) {
                S::load_rows(p + 2 + 16 * half, stride, a);
                for (int i = 0; i < 4; i++) {
                    const typename S::vi q = pop_is_signed<S, pop_q8_0>() ? a[i] : S::xor_(a[i], S::all_8(-128));
                    pop_put(t, v, 8 * b + 4 * half + i, q);
                }
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

// Writes four scales, one for each byte of a, which is unsigned.
template <class S>
static inline void pop_put_scales(float (*to)[pop_vectors][S::lanes], int v, typename S::vi a, typename S::vf factor) {
    for (int i = 0; i < 4; i++) {
        const typename S::vi one = S::and_(S::shr(a, 8 * i), S::all(0xff));
        S::store_f(to[i][v], S::mul(factor, S::to_float(one)));
    }
}

// Reads the scales of Q4_K and Q5_K: two halves, and 8 scales and 8 offsets of 6 bits each.
template <class S> static inline void pop_put_scales_k(const uint8_t * p, size_t stride, pop_tile<S> & t, int v) {
    using vi = typename S::vi;

    vi a[4];
    S::load_rows(p, stride, a);

    const typename S::vf d   = S::half(a[0]);
    const typename S::vf min = S::negate(S::half(S::shr(a[0], 16)));
    const vi             six = S::all(0x3f3f3f3f);
    const vi             two = S::all(0x30303030);

    pop_put_scales<S>(t.scale, v, S::and_(a[1], six), d);
    pop_put_scales<S>(t.scale + 4, v, S::or_(pop_low_4<S>(a[3]), S::and_(S::shr(a[1], 2), two)), d);
    pop_put_scales<S>(t.offset, v, S::and_(a[2], six), min);
    pop_put_scales<S>(t.offset + 4, v, S::or_(pop_high_4<S>(a[3]), S::and_(S::shr(a[2], 2), two)), min);
}

// Writes an eighth of a chunk.
template <class S> static inline void pop_put_q4_k(pop_tile<S> & t, int v, int part, const typename S::vi a[4]) {
    const int first = 16 * (part / 2) + 4 * (part % 2);
    for (int i = 0; i < 4; i++) {
        pop_put(t, v, first + i, pop_low_4<S>(a[i]));
        pop_put(t, v, first + 8 + i, pop_high_4<S>(a[i]));
    }
}

struct pop_q4_k {
    static constexpr bool is_k = true, affine = true;
    static constexpr int  block = 144, group_rows = 1, group = 8, bits = 4, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        pop_put_scales_k<S>(p, stride, t, v);
        for (int part = 0; part < 8; part++) {
            typename S::vi a[4];
            S::load_rows(p + 16 + 16 * part, stride, a);
            pop_put_q4_k<S>(t, v, part, a);
        }
    }
};

struct pop_q5_k {
    static constexpr bool is_k = true, affine = true;
    static constexpr int  block = 176, group_rows = 1, group = 8, bits = 5, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        using vi = typename S::vi;

        pop_put_scales_k<S>(p, stride, t, v);
        vi fifth[8];
        S::load_rows(p + 16, stride, fifth);
        S::load_rows(p + 32, stride, fifth + 4);
        const vi sixteen = S::all(0x10101010);
        for (int part = 0; part < 8; part++) {
            vi a[4];
            S::load_rows(p + 48 + 16 * part, stride, a);
            const int first = 16 * (part / 2) + 4 * (part % 2);
            for (int i = 0; i < 4; i++) {
                const vi  x    = fifth[4 * (part % 2) + i];
                const int bit  = 2 * (part / 2);
                const vi  low  = bit < 4 ? S::shl(x, 4 - bit) : S::shr(x, bit - 4);
                const vi  high = bit + 1 < 4 ? S::shl(x, 3 - bit) : S::shr(x, bit - 3);
                pop_put(t, v, first + i, S::or_(pop_low_4<S>(a[i]), S::and_(low, sixteen)));
                pop_put(t, v, first + 8 + i, S::or_(pop_high_4<S>(a[i]), S::and_(high, sixteen)));
            }
        }
    }
};

// Writes four scales, one for each byte of a, less `less`. The bytes are signed.
template <class S>
static inline void pop_put_signed_scales(
    pop_tile<S> & t, int v, int first, typename S::vi a, int less, typename S::vf factor) {
    for (int i = 0; i < 4; i++) {
        const typename S::vi one = S::add(S::shr_signed(S::shl(a, 24 - 8 * i), 24), S::all(-less));
        S::store_f(t.scale[first + i][v], S::mul(factor, S::to_float(one)));
    }
}

struct pop_q6_k {
    static constexpr bool is_k = true, affine = false;
    static constexpr int  block = 210, group_rows = 1, group = 4, bits = 6, offset = 32;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        using vi = typename S::vi;

        vi a[4];
        S::load_rows(p + 194, stride, a);
        const typename S::vf d = S::half(S::shr(a[3], 16));
        S::load_rows(p + 192, stride, a);
        for (int i = 0; i < 4; i++) {
            pop_put_signed_scales(t, v, 4 * i, a[i], 0, d);
        }
        const vi three = S::all(0x30303030);
        for (int part = 0; part < 4; part++) {
            const int half = part / 2;
            const int odd  = part % 2;
            vi        b[4];
            vi        high[4];
            S::load_rows(p + 64 * half + 16 * odd, stride, a);
            S::load_rows(p + 64 * half + 32 + 16 * odd, stride, b);
            S::load_rows(p + 128 + 32 * half + 16 * odd, stride, high);
            for (int i = 0; i < 4; i++) {
                const int first = 32 * half + 4 * odd + i;
                const vi  h     = high[i];
                pop_put(t, v, first, S::or_(pop_low_4<S>(a[i]), S::and_(S::shl(h, 4), three)));
                pop_put(t, v, first + 8, S::or_(pop_low_4<S>(b[i]), S::and_(S::shl(h, 2), three)));
                pop_put(t, v, first + 16, S::or_(pop_high_4<S>(a[i]), S::and_(h, three)));
                pop_put(t, v, first + 24, S::or_(pop_high_4<S>(b[i]), S::and_(S::shr(h, 2), three)));
            }
        }
    }
};

struct pop_q3_k {
    static constexpr bool is_k = true, affine = false;
    static constexpr int  block = 110, group_rows = 1, group = 4, bits = 3, offset = 4;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        using vi = typename S::vi;

        vi a[4];
        S::load_rows(p + 94, stride, a);
        const typename S::vf d = S::half(S::shr(a[3], 16));
        S::load_rows(p + 92, stride, a);
        for (int i = 0; i < 4; i++) {
            const vi low = i < 2 ? pop_low_4<S>(a[1 + i]) : pop_high_4<S>(a[i - 1]);
            const vi two = S::shl(S::and_(S::shr(a[3], 2 * i), S::all(0x03030303)), 4);
            pop_put_signed_scales(t, v, 4 * i, S::or_(low, two), 32, d);
        }
        for (int odd = 0; odd < 2; odd++) {
            vi third[4];
            S::load_rows(p + 16 * odd, stride, third);
            for (int half = 0; half < 2; half++) {
                S::load_rows(p + 32 + 32 * half + 16 * odd, stride, a);
                for (int j = 0; j < 4; j++) {
                    for (int i = 0; i < 4; i++) {
                        const vi low  = S::and_(S::shr(a[i], 2 * j), S::all(0x03030303));
                        const vi high = S::and_(S::shr(third[i], 4 * half + j), S::all(0x01010101));
                        pop_put(t, v, 32 * half + 8 * j + 4 * odd + i, S::or_(low, S::shl(high, 2)));
                    }
                }
            }
        }
    }
};

// Writes a quarter of a chunk.
template <class S> static inline void pop_put_q2_k(pop_tile<S> & t, int v, int part, const typename S::vi a[4]) {
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) {
            pop_put(t, v, 32 * (part / 2) + 8 * j + 4 * (part % 2) + i,
                    S::and_(S::shr(a[i], 2 * j), S::all(0x03030303)));
        }
    }
}

struct pop_q2_k {
    static constexpr bool is_k = true, affine = true;
    static constexpr int  block = 84, group_rows = 1, group = 4, bits = 2, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        using vi = typename S::vi;

        vi a[4];
        S::load_rows(p + 68, stride, a);
        const typename S::vf d   = S::half(a[3]);
        const typename S::vf min = S::negate(S::half(S::shr(a[3], 16)));
        S::load_rows(p, stride, a);
        for (int i = 0; i < 4; i++) {
            pop_put_scales<S>(t.scale + 4 * i, v, pop_low_4<S>(a[i]), d);
            pop_put_scales<S>(t.offset + 4 * i, v, pop_high_4<S>(a[i]), min);
        }
        for (int part = 0; part < 4; part++) {
            S::load_rows(p + 16 + 16 * part, stride, a);
            pop_put_q2_k<S>(t, v, part, a);
        }
    }
};

struct pop_iq4_xs {
    static constexpr bool is_k = true, affine = false;
    static constexpr int  block = 136, group_rows = 1, group = 8, bits = 8, offset = 128;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        using vi = typename S::vi;

        vi a[4];
        S::load_rows(p, stride, a);
        const typename S::vf d    = S::half(a[0]);
        const vi             low  = a[1];
        const vi             high = S::shr(a[0], 16);
        for (int b = 0; b < 8; b++) {
            const vi four = S::and_(S::shr(low, 4 * b), S::all(15));
            const vi two  = S::and_(S::shr(high, 2 * b), S::all(3));
            const vi six  = S::add(S::or_(four, S::shl(two, 4)), S::all(-32));
            S::store_f(t.scale[b][v], S::mul(d, S::to_float(six)));
            S::load_rows(p + 8 + 16 * b, stride, a);
            for (int i = 0; i < 4; i++) {
                pop_put(t, v, 8 * b + i, pop_iq4<S, pop_iq4_xs>(pop_low_4<S>(a[i])));
                pop_put(t, v, 8 * b + 4 + i, pop_iq4<S, pop_iq4_xs>(pop_high_4<S>(a[i])));
            }
        }
    }
};
