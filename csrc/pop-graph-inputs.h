// The inputs that pop_rewrite_graph() adds to graphs. Each picks rows of a tensor of states.

#pragma once

#include "llama-batch.h"
#include "llama-graph.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

// The input that picks the rows of a micro-batch whose states at the boundary are kept.
class kept_rows : public llm_graph_input_i {
public:
    kept_rows(ggml_tensor * ids) : ids(ids) {}

    void set_input(const llama_ubatch * ubatch) override {
        const auto & rows = ubatch->data->pop.rows;
        ggml_backend_tensor_set(ids, rows.data(), 0, rows.size() * sizeof(rows[0]));
    }

    bool can_reuse(const llm_graph_params &) override {
        return true; // pop_graph_params has their number
    }

private:
    ggml_tensor * ids; // I32 [n_rows]
};

// The input that picks the rows of the states that are kept for completion.
class completion_rows : public llm_graph_input_i {
public:
    completion_rows(ggml_tensor * ids) : ids(ids) {}

    void set_input(const llama_ubatch * ubatch) override {
        const auto & cells = ubatch->data->pop.cells;
        if (ids->type == GGML_TYPE_I64) {
            const std::vector<int64_t> wide(cells.begin(), cells.end());
            ggml_backend_tensor_set(ids, wide.data(), 0, wide.size() * sizeof(wide[0]));
        } else {
            ggml_backend_tensor_set(ids, cells.data(), 0, cells.size() * sizeof(cells[0]));
        }
    }

    bool can_reuse(const llm_graph_params & params) override { return ids->ne[0] == params.ubatch.n_tokens; }

private:
    ggml_tensor * ids; // I32 or I64 [n_tokens]
};
