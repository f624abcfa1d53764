// How the types of quantized weights are unpacked whose blocks have 256 weights. pop-kernels-unpack.h explains a type.

#pragma once

#include "pop-kernels-unpack.h"

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

// Writes an eighth of a chunk. The fifth bits of all its weights stand in `fifth`, a bit of each byte for each pair of
// parts.
template <class S>
static inline void pop_put_q5_k(
    pop_tile<S> & t, int v, int part, const typename S::vi a[4], const typename S::vi fifth[8]) {
    using vi = typename S::vi;

    const vi  sixteen = S::all(0x10101010);
    const int first   = 16 * (part / 2) + 4 * (part % 2);
    for (int i = 0; i < 4; i++) {
        const vi  x    = fifth[4 * (part % 2) + i];
        const int bit  = 2 * (part / 2);
        const vi  low  = bit < 4 ? S::shl(x, 4 - bit) : S::shr(x, bit - 4);
        const vi  high = bit + 1 < 4 ? S::shl(x, 3 - bit) : S::shr(x, bit - 3);
        pop_put(t, v, first + i, S::or_(pop_low_4<S>(a[i]), S::and_(low, sixteen)));
        pop_put(t, v, first + 8 + i, S::or_(pop_high_4<S>(a[i]), S::and_(high, sixteen)));
    }
}

struct pop_q5_k {
    static constexpr bool is_k = true, affine = true;
    static constexpr int  block = 176, group_rows = 1, group = 8, bits = 5, offset = 0;

    template <class S> static void unpack(const uint8_t * p, size_t stride, int /*n_blocks*/, pop_tile<S> & t, int v) {
        pop_put_scales_k<S>(p, stride, t, v);
        typename S::vi fifth[8];
        S::load_rows(p + 16, stride, fifth);
        S::load_rows(p + 32, stride, fifth + 4);
        for (int part = 0; part < 8; part++) {
            typename S::vi a[4];
            S::load_rows(p + 48 + 16 * part, stride, a);
            pop_put_q5_k<S>(t, v, part, a, fifth);
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

// Writes a quarter of a chunk, from the lower bits of two eighths and the upper bits of both.
template <class S>
static inline void pop_put_q6_k(pop_tile<S> &        t,
                                int                  v,
                                int                  part,
                                const typename S::vi a[4],
                                const typename S::vi b[4],
                                const typename S::vi high[4]) {
    using vi = typename S::vi;

    const vi three = S::all(0x30303030);
    for (int i = 0; i < 4; i++) {
        const int first = 32 * (part / 2) + 4 * (part % 2) + i;
        const vi  h     = high[i];
        pop_put(t, v, first, S::or_(pop_low_4<S>(a[i]), S::and_(S::shl(h, 4), three)));
        pop_put(t, v, first + 8, S::or_(pop_low_4<S>(b[i]), S::and_(S::shl(h, 2), three)));
        pop_put(t, v, first + 16, S::or_(pop_high_4<S>(a[i]), S::and_(h, three)));
        pop_put(t, v, first + 24, S::or_(pop_high_4<S>(b[i]), S::and_(S::shr(h, 2), three)));
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
        for (int part = 0; part < 4; part++) {
            const int half = part / 2;
            const int odd  = part % 2;
            vi        b[4];
            vi        high[4];
            S::load_rows(p + 64 * half + 16 * odd, stride, a);
            S::load_rows(p + 64 * half + 32 + 16 * odd, stride, b);
            S::load_rows(p + 128 + 32 * half + 16 * odd, stride, high);
            pop_put_q6_k<S>(t, v, part, a, b, high);
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
