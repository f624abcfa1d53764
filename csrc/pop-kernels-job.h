// The rows and matrices of one product, as the threads that compute it see them: also those of a mixture of experts.

#pragma once

#include "ggml.h"
#include "pop-kernels-tile.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

// A pop_product_job holds what the threads need to know about a product. Its rows are those of the input. Where each
// row of the input meets the weights of several experts, they are pairs of a row and an expert, sorted by expert.
struct pop_product_job {
    const ggml_tensor * weights;
    const ggml_tensor * input;
    ggml_tensor *       output;
    const ggml_tensor * ids; // the experts of each row; null without experts

    int64_t n_in;
    int64_t n_out;
    int64_t n_rows;
    int64_t n_chunks;

    char *    x      = nullptr; // the rows as the kernel has prepared them
    int32_t * pairs  = nullptr; // [n_rows], row * ids->ne[0] + place of the expert
    int32_t * starts = nullptr; // [experts + 1], the first pair of each expert

    explicit pop_product_job(const ggml_tensor * dst) :
        weights(dst->src[0]), input(dst->src[1]), output(const_cast<ggml_tensor *>(dst)),
        ids(dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr), n_in(weights->ne[0]), n_out(weights->ne[1]),
        n_rows(ids ? ids->ne[0] * ids->ne[1] : ggml_nrows(input)), n_chunks((n_in + pop_chunk - 1) / pop_chunk) {}

    int64_t chunk_inputs(int64_t chunk) const { return std::min<int64_t>(pop_chunk, n_in - chunk * pop_chunk); }

    float * input_row(int64_t r) const { return row(input, r); }

    float * output_row(int64_t r) const { return row(output, r); }

    // Returns whether the rows of the output are equally far apart.
    bool is_regular() const { return !ids && output->ne[1] == n_rows; }

    void sort_pairs() {
        const int64_t n_experts = weights->ne[2];
        std::fill_n(starts, n_experts + 1, 0);
        for (int64_t r = 0; r < n_rows; r++) {
            starts[expert(r) + 1]++;
        }
        std::partial_sum(starts, starts + n_experts + 1, starts);
        for (int64_t r = 0; r < n_rows; r++) {
            pairs[starts[expert(r)]++] = (int32_t) r;
        }
        std::copy_backward(starts, starts + n_experts, starts + n_experts + 1); // each start has become the next one
        starts[0] = 0;
    }

private:
    int32_t expert(int64_t pair) const {
        const char *  row = (const char *) ids->data + pair / ids->ne[0] * ids->nb[1];
        const int32_t id  = *(const int32_t *) (row + pair % ids->ne[0] * ids->nb[0]);
        GGML_ASSERT(id >= 0 && id < weights->ne[2]);
        return id;
    }

    float * row(const ggml_tensor * t, int64_t r) const {
        int64_t i1 = r % t->ne[1];
        int64_t i2 = r / t->ne[1] % t->ne[2];
        int64_t i3 = r / t->ne[1] / t->ne[2];
        if (ids) {
            i1 = pairs[r] % ids->ne[0] % t->ne[1];
            i2 = pairs[r] / ids->ne[0];
            i3 = 0;
        }
        return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
    }
};
