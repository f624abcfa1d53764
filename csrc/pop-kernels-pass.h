// One pass over the weights of a tile: chunk by chunk, they are unpacked once and multiplied by all rows. A kernel K
// says how: pop_quantized below, or pop_float in pop-kernels-float.h.

#pragma once

#include "pop-kernels-job.h"

#include <algorithm>

// Rows that one pass over the weights takes. Their sums stay in the second-level cache.
constexpr int64_t pop_pass_rows = 512;

// The kernel for a type of quantized weights
template <class S, class F> struct pop_quantized {
    using tile  = pop_tile<S>;
    using shape = pop_shape_of<S, F>;

    static constexpr int    rows       = pop_rows<S, shape>(); // that one call of multiply() takes at most
    static constexpr int    group_rows = F::group_rows;
    static constexpr size_t x_bytes    = sizeof(pop_activations); // of the work buffer, for a chunk of a row

    static constexpr int chunk_bytes(int n_in) { return F::group_rows * (F::is_k ? F::block : n_in / 32 * F::block); }

    static pop_activations * activations(const pop_product_job & job, int64_t c, int64_t r) {
        return (pop_activations *) job.x + c * job.n_rows + r;
    }

    // Prepares a row of the input for multiply().
    static void prepare(const pop_product_job & job, int64_t r) {
        const float * x = job.input_row(r);
        for (int64_t c = 0; c < job.n_chunks; c++) {
            pop_quantize<F>(x + c * pop_chunk, (int) job.chunk_inputs(c), *activations(job, c, r));
        }
    }

    static void unpack(const uint8_t * p, size_t stride, int n_in, tile & t) {
        for (int v = 0; v < pop_vectors; v++) {
            F::template unpack<S>(p + v * S::lanes / group_rows * stride, stride, n_in / 32, t, v);
        }
        if constexpr (S::has_block) {
            S::arrange(t.q[0][0], n_in / 4);
        }
    }

    static void multiply(const pop_product_job & job,
                         int64_t                 c,
                         int64_t                 r,
                         int                     n_rows,
                         const tile &            t,
                         const float *           sums,
                         float *                 out,
                         size_t                  stride) {
        const int n_blocks = (int) job.chunk_inputs(c) / 4 / F::group;
        pop_multiply_rows<S, shape>(n_rows, activations(job, c, r), t, n_blocks, sums, out, stride);
    }
};

// A pop_scratch is the part of the work buffer that belongs to a thread.
template <class K> struct alignas(64) pop_scratch {
    typename K::tile tile;

    // A chunk of the weights, where they do not fill a tile
    uint8_t packed[K::chunk_bytes(pop_chunk) / K::group_rows * K::tile::outputs];
    float   sums[pop_pass_rows][K::tile::outputs];
};

// Asks for the chunk of the weights that comes next, a few cache lines for each group of rows.
class pop_prefetch {
public:
    pop_prefetch(const uint8_t * start, size_t stride, int64_t n_rows, int bytes, int64_t n_steps) :
        start(start), stride(stride), lines(bytes / 64 + 1), n(n_rows * lines), per_step((n + n_steps - 1) / n_steps) {}

    void step() {
        for (const int64_t end = std::min(next + per_step, n); next < end; next++) {
            pop_base::prefetch(start + next / lines * stride + next % lines * 64);
        }
    }

private:
    const uint8_t * start;
    size_t          stride;
    int64_t         lines;
    int64_t         n;
    int64_t         per_step;
    int64_t         next = 0;
};

// A pop_pass_state lives as long as a pass. It sets up the processor for kernels that need that, such as those of AMX.
template <class K> struct pop_pass_state {};

// Computes the outputs of a tile of an expert's weights for the rows from `first` to `end`, pop_pass_rows at most.
template <class K>
static void pop_compute_tile(
    const pop_product_job & job, int64_t expert, int64_t tile, int64_t first, int64_t end, void * memory) {
    constexpr int outputs     = K::tile::outputs;
    constexpr int chunk_bytes = K::chunk_bytes(pop_chunk);

    pop_scratch<K> & scratch = *(pop_scratch<K> *) memory;

    [[maybe_unused]] const pop_pass_state<K> state{};

    const int64_t   first_out = tile * outputs;
    const int64_t   n_outputs = std::min<int64_t>(outputs, job.n_out - first_out);
    const size_t    stride    = K::group_rows * job.weights->nb[1];
    const uint8_t * weights =
        (const uint8_t *) job.weights->data + expert * job.weights->nb[2] + first_out * job.weights->nb[1];
    const bool    direct   = n_outputs == outputs && job.is_regular(); // the last sums go there at once
    const int64_t n_groups = (n_outputs + K::group_rows - 1) / K::group_rows;

    for (int64_t c = 0; c < job.n_chunks; c++) {
        const int       n_in   = (int) job.chunk_inputs(c);
        const int       bytes  = K::chunk_bytes(n_in);
        const uint8_t * packed = weights + c * chunk_bytes;
        const uint8_t * from   = packed;
        size_t          step   = stride;
        if (n_outputs < outputs || n_in % 8) {
            step = chunk_bytes;
            memset(scratch.packed, 0, sizeof(scratch.packed));
            for (int64_t i = 0; i < n_groups; i++) {
                memcpy(scratch.packed + i * step, packed + i * stride, bytes);
            }
            from = scratch.packed;
        }
        K::unpack(from, step, n_in, scratch.tile);
        const int64_t n_next = c + 1 < job.n_chunks ? n_groups : 0;
        pop_prefetch  next(packed + chunk_bytes, stride, n_next, bytes, (end - first + K::rows - 1) / K::rows);
        const bool    is_last = direct && c + 1 == job.n_chunks;
        for (int64_t r = first; r < end; r += K::rows) {
            float * const sums   = scratch.sums[r - first];
            const int     n_rows = (int) std::min<int64_t>(K::rows, end - r);
            K::multiply(job, c, r, n_rows, scratch.tile, c == 0 ? nullptr : sums,
                        is_last ? job.output_row(r) + first_out : sums,
                        is_last ? job.output->nb[1] / sizeof(float) : outputs);
            next.step();
        }
    }
    for (int64_t r = first; r < end && !direct; r++) {
        memcpy(job.output_row(r) + first_out, scratch.sums[r - first], n_outputs * sizeof(float));
    }
}
