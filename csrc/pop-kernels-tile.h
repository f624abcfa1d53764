// The kernel proper: unpacked weights of a few outputs times quantized activations of a few rows.
//
// Weights and activations are cut into chunks of 256 inputs. A weight is `scale * q + offset` with an unsigned byte q;
// scale and offset belong to a block of 32 or 16 inputs of one output. With the offset, a product of a block is
//   d * (scale * sum(q * x) + offset * sum(x))
// where the activations are d * x. If the offset is a fixed multiple of the scale, sum(x) joins the integers.

#pragma once

#include "pop-kernels-simd.h"

#include <cstring>

constexpr int pop_chunk   = 256; // inputs
constexpr int pop_vectors = 2;   // vectors of outputs in a tile

// A pop_activations holds a chunk of one row.
struct pop_activations {
    int8_t q[pop_chunk];
    float  d[8]; // one for each 32 inputs; of K-quants only d[0] is used, for all

    // The sums of q for each block of weights. They are multiplied by -F::offset where the offset is fixed, and by d
    // where d belongs to a block.
    union {
        float   sum[16];
        int32_t bias[16];
    };

    int32_t padding[8];
};

static_assert(sizeof(pop_activations) % 64 == 0, "rows start at cache lines");

// A pop_tile holds a chunk of the weights of pop_vectors * S::lanes outputs.
template <class S> struct pop_tile {
    static constexpr int outputs = pop_vectors * S::lanes;

    uint8_t q[pop_chunk / 4][pop_vectors][4 * S::lanes]; // 4 inputs of each output
    float   scale[16][pop_vectors][S::lanes];
    float   offset[16][pop_vectors][S::lanes];
};

// Bytes keep their sign where the instruction set multiplies signed bytes, or where its product of signed and unsigned
// ones can overflow.
template <class S, class F> constexpr bool pop_is_signed() {
    return F::bits == 8 && S::is_signed;
}

// All that the kernel proper needs to know about a type. Types that agree in it share the code, which takes long to
// compile.
template <bool k, bool has_offset, int group_size, int n_bits> struct pop_shape {
    static constexpr bool is_k = k, affine = has_offset;
    static constexpr int  group = group_size, bits = n_bits;
};

// Bits tell how many products fit in 16 bits, and whether bytes have a sign.
template <class S, class F>
using pop_shape_of =
    pop_shape<F::is_k, F::affine, F::group, pop_is_signed<S, F>() ? 8 : (S::has_dot || F::bits <= 4 ? 4 : F::bits)>;

// Activation rows that one call of the kernel takes: as many as there are registers for. Sums of 16 bits that do not
// hold a whole block of 32 inputs need more of them.
template <class S, class F> constexpr int pop_rows() {
    return S::has_dot || (F::bits <= 4 && F::group == 8) ? S::rows : S::rows - 1;
}

static inline int32_t pop_load_32(const void * p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

// Adds the products of one block to sum[R][pop_vectors]. T is pop_tile<S>, or a tile that has the same layout.
template <class S, class F, int R, class T>
static inline void pop_multiply_block(const pop_activations * x,
                                      const T &               w,
                                      int                     block,
                                      typename S::vi (&sum)[R][pop_vectors]) {
    using vi = typename S::vi;

    const int first = block * F::group;
    if constexpr (S::has_block) {
        S::template multiply_block<F::group>(x[0].q + 4 * first, sizeof(*x), w.q[first][0], sum);
    } else if constexpr (S::has_dot) {
        for (int g = 0; g < F::group; g++) {
            vi w_g[pop_vectors];
            for (int v = 0; v < pop_vectors; v++) {
                w_g[v] = S::load(w.q[first + g][v]);
            }
            for (int r = 0; r < R; r++) {
                const vi x_g = S::all(pop_load_32(x[r].q + 4 * (first + g)));
                for (int v = 0; v < pop_vectors; v++) {
                    sum[r][v] = S::dot(sum[r][v], w_g[v], x_g);
                }
            }
        }
    } else {
        // so many sums of two products fit in 16 bits
        constexpr int fit  = F::bits <= 4 ? 8 : F::bits == 5 ? 4 : F::bits == 6 ? 2 : 1;
        constexpr int step = fit < F::group ? fit : F::group;
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC unroll 8
#endif
        for (int g = 0; g < F::group; g += step) {
            vi sum_16[R][pop_vectors];
            for (int i = 0; i < step; i++) {
                vi w_g[pop_vectors];
                vi w_abs[pop_vectors];
                for (int v = 0; v < pop_vectors; v++) {
                    w_g[v] = S::load(w.q[first + g + i][v]);
                    if constexpr (pop_is_signed<S, F>()) {
                        w_abs[v] = S::abs_8(w_g[v]);
                    }
                }
                for (int r = 0; r < R; r++) {
                    const vi x_g = S::all(pop_load_32(x[r].q + 4 * (first + g + i)));
                    for (int v = 0; v < pop_vectors; v++) {
                        vi pairs;
                        if constexpr (pop_is_signed<S, F>()) {
                            pairs = S::pairs(w_abs[v], S::sign_8(x_g, w_g[v]));
                        } else {
                            pairs = S::pairs(w_g[v], x_g);
                        }
                        sum_16[r][v] = S::keep(i == 0 ? pairs : S::add_16(sum_16[r][v], pairs));
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                for (int v = 0; v < pop_vectors; v++) {
                    sum[r][v] = S::keep(S::widen(sum[r][v], sum_16[r][v]));
                }
            }
        }
    }
}

// Adds the products of a chunk to sums[R][outputs], or to nothing if the chunk is the first, which has no sums yet. The
// rows of the result are `stride` apart.
template <class S, class F, int R, class T>
static void pop_multiply(
    const pop_activations * x, const T & w, int n_blocks, const float * sums, float * out, size_t stride) {
    using vi = typename S::vi;
    using vf = typename S::vf;

    vf total[R][pop_vectors];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < pop_vectors; v++) {
            const bool fresh = !sums || F::is_k;
            total[r][v]      = fresh ? S::zero_f() : S::load_f(sums + r * pop_tile<S>::outputs + v * S::lanes);
        }
    }
    int b = 0;
    do {
        vi sum[R][pop_vectors];
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < pop_vectors; v++) {
                sum[r][v] = F::affine || pop_is_signed<S, F>() ? S::zero() : S::all(x[r].bias[b]);
            }
        }
        pop_multiply_block<S, F, R>(x, w, b, sum);
        for (int v = 0; v < pop_vectors; v++) {
            const vf scale = S::load_f(w.scale[b][v]);
            for (int r = 0; r < R; r++) {
                if constexpr (F::is_k) {
                    total[r][v] = S::fma(S::to_float(sum[r][v]), scale, total[r][v]);
                } else {
                    total[r][v] =
                        S::fma(S::mul(S::to_float(sum[r][v]), scale), S::all_f(x[r].d[b * F::group / 8]), total[r][v]);
                }
            }
            if constexpr (F::affine) {
                const vf offset = S::load_f(w.offset[b][v]);
                for (int r = 0; r < R; r++) {
                    total[r][v] = S::fma(offset, S::all_f(x[r].sum[b]), total[r][v]);
                }
            }
        }
    } while (++b < n_blocks);
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < pop_vectors; v++) {
            const int i = r * pop_tile<S>::outputs + v * S::lanes;
            if constexpr (F::is_k) {
                const vf d  = S::all_f(x[r].d[0]);
                total[r][v] = S::fma(total[r][v], d, sums ? S::load_f(sums + i) : S::zero_f());
            }
            S::store_f(out + r * stride + v * S::lanes, total[r][v]);
        }
    }
}

template <class S, class F, int R = pop_rows<S, F>()>
static void pop_multiply_rows(int                     n_rows,
                              const pop_activations * x,
                              const pop_tile<S> &     w,
                              int                     n_blocks,
                              const float *           sums,
                              float *                 out,
                              size_t                  stride) {
    if (n_rows == R) {
        pop_multiply<S, F, R>(x, w, n_blocks, sums, out, stride);
    } else if constexpr (R > 1) {
        pop_multiply_rows<S, F, R - 1>(n_rows, x, w, n_blocks, sums, out, stride);
    }
}

// Quantizes n inputs, at most a chunk and a multiple of 32.
template <class F> static void pop_quantize(const float * x, int n, pop_activations & out) {
    using B = pop_base;

    B::vf largest[8];
    for (int b = 0; b < n / 32; b++) {
        largest[b] = B::abs_f(B::load_f(x + 32 * b));
        for (int i = 8; i < 32; i += 8) {
            largest[b] = B::max_f(largest[b], B::abs_f(B::load_f(x + 32 * b + i)));
        }
    }
    if (F::is_k) {
        for (int b = 1; b < n / 32; b++) {
            largest[0] = B::max_f(largest[0], largest[b]);
        }
    }
    float inverse = 0.0f;
    for (int b = 0; b < n / 32; b++) {
        if (b == 0 || !F::is_k) {
            const float max = B::largest(largest[b]);

            out.d[b] = max / 127.0f;
            inverse  = max > 1e-36f ? 127.0f / max : 0.0f; // that of smaller ones would overflow
        }
        int32_t sum[2]; // of 16 each
        B::round_32(x + 32 * b, inverse, out.q + 32 * b, sum);
        if (F::group == 8) {
            sum[0] += sum[1];
        }
        for (int i = 0; i < 8 / F::group; i++) {
            const int block = b * 8 / F::group + i;
            if (!F::affine) {
                out.bias[block] = -F::offset * sum[i];
            } else {
                out.sum[block] = F::is_k ? (float) sum[i] : out.d[b] * sum[i];
            }
        }
    }
}
