// Attention of many queries on keys and values of 16 bits or fewer: all lanes of a vector belong to different rows.
//
// A row is a query of one head. Heads that share keys and values are taken together, so that each tile of keys is
// converted once for all of them. The maximum and the sum of the softmax are kept for each row while the tiles of keys
// go by, and the sum of the values is scaled when the maximum grows.

#pragma once

#include "pop-kernels-simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

constexpr int                    pop_keys        = 64; // keys of a tile: as many as a 64-bit mask has bits
template <class S> constexpr int pop_row_vectors = S::lanes == 16 ? 4 : 2;
template <class S> constexpr int pop_tile_rows   = pop_row_vectors<S> * S::lanes;

// A pop_attention_memory holds the work of one thread. Its pointers are to memory for the given numbers of floats.
template <class S> struct pop_attention_memory {
    float * queries; // [n_key][rows]
    float * sums;    // [n_value][rows]
    float * weights; // [keys][rows]
    float * tile;    // [keys][n_key or n_value]

    pop_attention_memory(float * memory, int n_key, int n_value) :
        queries(memory), sums(queries + n_key * pop_tile_rows<S>), weights(sums + n_value * pop_tile_rows<S>),
        tile(weights + pop_keys * pop_tile_rows<S>) {}

    static size_t floats(int n_key, int n_value) {
        return (n_key + n_value + pop_keys) * pop_tile_rows<S> + pop_keys * (n_key > n_value ? n_key : n_value);
    }
};

// 2^x for x <= 0
template <class S> static inline typename S::vf pop_exp2(typename S::vf x) {
    using vf = typename S::vf;

    x          = S::max_f(x, S::all_f(-1000.0f));
    const vf n = S::round_f(x);
    const vf f = S::add_f(x, S::negate(n));
    vf       p = S::all_f(1.5403530e-4f); // the series of 2^f: powers of ln 2 over factorials
    p          = S::fma(p, f, S::all_f(1.3333558e-3f));
    p          = S::fma(p, f, S::all_f(9.6181291e-3f));
    p          = S::fma(p, f, S::all_f(5.5504109e-2f));
    p          = S::fma(p, f, S::all_f(2.4022651e-1f));
    p          = S::fma(p, f, S::all_f(6.9314718e-1f));
    p          = S::fma(p, f, S::all_f(1.0f));
    return S::scale_2(p, n);
}

// Converts n_rows rows of n numbers of a type each, n a multiple of 16. The rows that a tile lacks become zeros.
template <class S>
static void pop_convert(ggml_type type, const char * from, size_t stride, int n_rows, int n, float * to) {
    const ggml_to_float_t to_float = ggml_get_type_traits(type)->to_float;
    for (int r = 0; r < n_rows; r++, from += stride, to += n) {
        if (type != GGML_TYPE_F16) {
            to_float(from, to, n);
            continue;
        }
        for (int i = 0; i < n; i += S::lanes) {
            S::store_f(to + i, S::load_half((const uint16_t *) from + i));
        }
    }
    memset(to, 0, (pop_keys - n_rows) * n * sizeof(float));
}

// Adds to out[4][rows], or writes there if `fresh`, the sum over i < n of
// a[i * a_step + (0..3) * a_stride] * b[i][rows]. n is 1 or more.
template <class S, bool fresh>
static inline void pop_add_products(const float * a, int a_step, int a_stride, const float * b, int n, float * out) {
    using vf = typename S::vf;

    constexpr int rows = pop_tile_rows<S>;

    vf sum[4][pop_row_vectors<S>];
    for (int j = 0; j < 4; j++) {
        for (int v = 0; v < pop_row_vectors<S>; v++) {
            sum[j][v] = fresh ? S::zero_f() : S::load_f(out + j * rows + v * S::lanes);
        }
    }
    int i = 0;
    do {
        vf x[pop_row_vectors<S>];
        for (int v = 0; v < pop_row_vectors<S>; v++) {
            x[v] = S::keep(S::load_f(b + i * rows + v * S::lanes));
        }
        for (int j = 0; j < 4; j++) {
            const vf y = S::all_f(a[i * a_step + j * a_stride]);
            for (int v = 0; v < pop_row_vectors<S>; v++) {
                sum[j][v] = S::fma(y, x[v], sum[j][v]);
            }
        }
    } while (++i < n);
    for (int j = 0; j < 4; j++) {
        for (int v = 0; v < pop_row_vectors<S>; v++) {
            S::store_f(out + j * rows + v * S::lanes, sum[j][v]);
        }
    }
}

// These values say what the mask does to a tile of keys.
struct pop_tile_mask {
    uint64_t keep;    // bit i: key i is seen
    bool     is_bits; // the other keys have -infinity, and those that are seen have zero
};

static inline pop_tile_mask pop_read_mask(const uint16_t * mask, int n_keys) {
    uint16_t padded[pop_keys];
    if (n_keys < pop_keys) {
        std::fill_n(std::copy_n(mask, n_keys, padded), pop_keys - n_keys, (uint16_t) 0xfc00);
        mask = padded;
    }
    const __m256i infinity = _mm256_set1_epi16((int16_t) 0xfc00);
    __m256i       is_bits  = _mm256_set1_epi16(-1);
    pop_tile_mask read     = { 0, true };
    for (int i = 0; i < pop_keys; i += 32) {
        const __m256i a      = _mm256_loadu_si256((const __m256i *) (mask + i));
        const __m256i b      = _mm256_loadu_si256((const __m256i *) (mask + i + 16));
        const __m256i hide_a = _mm256_cmpeq_epi16(a, infinity);
        const __m256i hide_b = _mm256_cmpeq_epi16(b, infinity);
        const __m256i hide   = _mm256_permute4x64_epi64(_mm256_packs_epi16(hide_a, hide_b), 0xd8);
        read.keep |= (uint64_t) (uint32_t) ~_mm256_movemask_epi8(hide) << i;

        const __m256i zero = _mm256_setzero_si256();
        is_bits            = _mm256_and_si256(is_bits, _mm256_or_si256(hide_a, _mm256_cmpeq_epi16(a, zero)));
        is_bits            = _mm256_and_si256(is_bits, _mm256_or_si256(hide_b, _mm256_cmpeq_epi16(b, zero)));
    }
    read.is_bits = _mm256_movemask_epi8(is_bits) == -1;
    return read;
}

// Turns the products of a tile into weights and updates the maximum and the sum of each row. `bits` are the keys that
// the rows see, or null if they see all.
template <class S>
static void pop_softmax(float * weights,
                        const uint32_t (*bits)[pop_tile_rows<S>],
                        float * maximum,
                        float * sum,
                        float * sums,
                        int     n_value) {
    using vf = typename S::vf;

    constexpr int rows = pop_tile_rows<S>;

    vf old[pop_row_vectors<S>];
    vf largest[pop_row_vectors<S>];
    for (int v = 0; v < pop_row_vectors<S>; v++) {
        old[v] = largest[v] = S::load_f(maximum + v * S::lanes);
    }
    for (int k = 0; k < pop_keys; k++) {
        for (int v = 0; v < pop_row_vectors<S>; v++) {
            float * const w = weights + k * rows + v * S::lanes;

            vf x = S::load_f(w);
            if (bits) {
                x = S::where_bit(S::load(bits[k / 32] + v * S::lanes), k % 32, x, S::all_f(-INFINITY));
                S::store_f(w, x);
            }
            largest[v] = S::max_f(largest[v], x);
        }
    }
    vf base[pop_row_vectors<S>];
    vf all[pop_row_vectors<S>];
    for (int v = 0; v < pop_row_vectors<S>; v++) {
        // A row that sees nothing yet must not subtract infinity from infinity.
        base[v] = S::negate(S::where_equal(largest[v], -INFINITY, S::zero_f(), largest[v]));
        all[v]  = S::zero_f();
    }
    for (int k = 0; k < pop_keys; k++) {
        for (int v = 0; v < pop_row_vectors<S>; v++) {
            float * const w = weights + k * rows + v * S::lanes;

            const vf x = pop_exp2<S>(S::add_f(S::load_f(w), base[v]));
            S::store_f(w, x);
            all[v] = S::add_f(all[v], x);
        }
    }
    for (int v = 0; v < pop_row_vectors<S>; v++) {
        float * const s      = sum + v * S::lanes;
        const vf      factor = pop_exp2<S>(S::add_f(old[v], base[v]));
        S::store_f(maximum + v * S::lanes, largest[v]);
        S::store_f(s, S::fma(S::load_f(s), factor, all[v]));
        for (int i = 0; i < n_value && !S::same_f(old[v], largest[v]); i++) {
            float * const x = sums + i * rows + v * S::lanes;
            S::store_f(x, S::mul(S::load_f(x), factor));
        }
    }
}
