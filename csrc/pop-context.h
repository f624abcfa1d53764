// A context's share of POP: the boundary in force and what it means for splits and graphs.
// llama_context holds one of these; pop-context.cpp has the C API.

#pragma once

#include "llama-cparams.h"
#include "llama-graph.h"

#include <cstdint>
#include <set>

struct llama_pop_context {
    uint32_t boundary        = 0; // first layer that prefill skips, 0 = off
    uint64_t n_tokens_pruned = 0;

    std::set<uint32_t> proven; // boundaries that pop_try_boundary() has built a graph for: changing to them costs nothing

    // decode(): may micro-batches of this batch differ in kind? A non-causal batch has to stay in one piece.
    bool splits_batches(const llama_cparams & cparams) const;

    // graph_params(): the boundary of a graph with this many output rows, 0 = the whole model
    uint32_t graph_boundary(const llama_cparams & cparams, llm_graph_type gtype, uint32_t n_outputs) const;
};
