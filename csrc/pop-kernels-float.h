// Products of weights that are floating-point numbers of 16 bits, with AVX-512: F16 and BF16. With AVX2 alone, ggml's
// own kernels are as fast.
//
// The lanes of an unpacked tile have 32 bits: an input in F32, or two in BF16. F32 activations stay as they are; ggml
// rounds them to F16. BF16 ones are rounded as in ggml.

#pragma once

#include "pop-kernels-pass.h"

#include "ggml-cpu.h"

// Each struct describes a type:
//   inputs  that share a lane
//   unpack() writes the weights of 8 inputs, of which each vector holds two
//   add()   adds the products of a lane to a sum
struct pop_f16 {
    static constexpr int inputs = 1;

    template <class S> static void unpack(const typename S::vi a[4], float (*w)[pop_vectors][S::lanes], int v) {
        for (int i = 0; i < 4; i++) {
            S::store_f(w[2 * i][v], S::half(a[i]));
            S::store_f(w[2 * i + 1][v], S::half(S::shr(a[i], 16)));
        }
    }

    template <class S> static typename S::vf add(typename S::vf sum, typename S::vf w, typename S::vf x) {
        return S::fma(w, x, sum);
    }
};

struct pop_bf16 {
    static constexpr int inputs = 2;

    template <class S> static void unpack(const typename S::vi a[4], float (*w)[pop_vectors][S::lanes], int v) {
        for (int i = 0; i < 4; i++) {
            S::store(w[i][v], a[i]);
        }
    }

    template <class S> static typename S::vf add(typename S::vf sum, typename S::vf w, typename S::vf x) {
        return S::dot_bf16(sum, w, x);
    }
};

// The kernel for one of these types
template <class S, class F> struct pop_float {
    struct tile {
        static constexpr int outputs = pop_vectors * S::lanes;

        float w[pop_chunk / F::inputs][pop_vectors][S::lanes];
    };

    static constexpr int    rows       = 6;
    static constexpr int    group_rows = 1;
    static constexpr size_t x_bytes    = F::inputs == 1 ? 0 : pop_chunk * sizeof(ggml_bf16_t);

    static constexpr int chunk_bytes(int n_in) { return n_in * (int) sizeof(ggml_bf16_t); }

    // The lanes of a row's activations
    static const float * activations(const pop_product_job & job, int64_t r) {
        return F::inputs == 1 ? job.input_row(r) : (const float *) (job.x + r * job.n_chunks * x_bytes);
    }

    static void prepare(const pop_product_job & job, int64_t r) {
        if constexpr (F::inputs == 2) {
            ggml_bf16_t * x = (ggml_bf16_t *) activations(job, r);
            ggml_cpu_fp32_to_bf16(job.input_row(r), x, job.n_in);
            if (job.n_in % 2) {
                x[job.n_in] = {};
            }
        }
    }

    static void unpack(const uint8_t * p, size_t stride, int n_in, tile & t) {
        for (int v = 0; v < pop_vectors; v++) {
            for (int i = 0; i < n_in; i += 8) {
                typename S::vi a[4];
                S::load_rows(p + v * S::lanes * stride + chunk_bytes(i), stride, a);
                F::template unpack<S>(a, t.w + i / F::inputs, v);
            }
        }
    }

    template <int R = rows>
    static void multiply(const pop_product_job & job,
                         int64_t                 c,
                         int64_t                 first,
                         int                     n_rows,
                         const tile &            t,
                         const float *           sums,
                         float *                 out,
                         size_t                  stride) {
        using vf = typename S::vf;

        if constexpr (R > 1) {
            if (n_rows < R) {
                return multiply<R - 1>(job, c, first, n_rows, t, sums, out, stride);
            }
        }
        const float * x[R];
        vf            total[R][pop_vectors];
        for (int r = 0; r < R; r++) {
            x[r] = activations(job, first + r) + c * (pop_chunk / F::inputs);
            for (int v = 0; v < pop_vectors; v++) {
                total[r][v] = sums ? S::load_f(sums + r * tile::outputs + v * S::lanes) : S::zero_f();
            }
        }
        const int n = ((int) job.chunk_inputs(c) + F::inputs - 1) / F::inputs;
        for (int i = 0; i < n; i++) {
            vf w[pop_vectors];
            for (int v = 0; v < pop_vectors; v++) {
                w[v] = S::load_f(t.w[i][v]);
            }
            for (int r = 0; r < R; r++) {
                const vf x_r = S::keep(S::all_f(x[r][i]));
                for (int v = 0; v < pop_vectors; v++) {
                    total[r][v] = F::template add<S>(total[r][v], w[v], x_r);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < pop_vectors; v++) {
                S::store_f(out + r * stride + v * S::lanes, total[r][v]);
            }
        }
    }
};
