// The products by which skipped layers fill their caches: which weights they belong to, and what they read and write.
// The fit of keys and values (pypop_gguf/fitting) observes them through the C API (pop-api.cpp).

#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_model;

// Returns the names of the weights whose products a graph that is pruned at the boundary computes, for the boundary
// layer and those above it, straight from the state at the boundary. A product of another such product is left out,
// and so is a weight that is used twice, because one replacement cannot serve both. In the order of evaluation.
std::vector<std::string> pop_product_weights(const llama_model & model, ggml_cgraph * pruned, uint32_t boundary);

// A pop_product holds what the product of one weight has read and written, token by token.
struct pop_product {
    std::vector<float> input;  // [n_tokens][n_in]
    std::vector<float> output; // [n_tokens][n_out]

    int64_t n_in     = 0;
    int64_t n_out    = 0;
    int64_t n_tokens = 0;
};

// Copies the products of chosen weights while graphs are evaluated.
struct pop_product_observer {
    std::vector<std::string>                     weights;
    std::unordered_map<std::string, pop_product> products; // by weight

    explicit pop_product_observer(std::vector<std::string> weights);

    // ggml's evaluation callback calls this twice: it asks whether a tensor is wanted, then hands it over.
    bool observe(ggml_tensor * t, bool ask);

    // Copies the products of one more weight.
    void add(const std::string & weight);

    // Forgets what was copied.
    void clear();
};
