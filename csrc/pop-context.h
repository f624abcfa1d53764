// A context's share of POP: the boundary in force and what it means for splits and graphs.
// llama_context holds one of these; pop-context.cpp has the C API.

#pragma once

#include "llama-cparams.h"
#include "llama-graph.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <set>

struct llama_pop_context {
    uint32_t boundary        = 0;    // first layer that prefill skips, 0 = off
    bool     continues       = true; // tokens that need the whole model go on from their boundary states where that is proven
    int32_t  n_head          = 0;    // see llama_pop_batch
    int32_t  n_tail          = 1;
    uint64_t n_tokens_pruned = 0;

    std::set<llama_seq_id>           whole;           // sequences that are not pruned
    std::map<llama_seq_id, uint64_t> n_tokens_pruned_in; // by sequence

    int64_t  t_plan_us       = 0;

    std::map<uint32_t, llama_adapter_lora *> adapters; // fitted projections by the boundary that they are for

    // boundaries that pop_try_boundary() has built graphs for -> whether tokens may go on from there
    std::map<uint32_t, bool> proven;

    // the boundary states of one micro-batch's tokens that need the whole model
    ggml_context_ptr        ctx_states;
    ggml_backend_buffer_ptr buf_states;
    ggml_tensor *           states = nullptr; // F32 [n_embd, n_ubatch]

    // whether tokens that need the whole model share micro-batches with others
    bool mixes() const;

    // the adapter that such a graph takes
    llama_adapter_lora * adapter_for(llama_pop_part part, uint32_t b) const;

    // decode(): what is allowed when this batch is split
    void begin(const llama_cparams & cparams, llama_pop_batch & batch) const;

    // graph_params()
    llama_pop_graph graph(const llama_cparams & cparams, llm_graph_type gtype, const llama_ubatch & ubatch) const;

    // decode(): a micro-batch has been computed
    void done(const llama_ubatch & ubatch, const llm_graph_result & res);

private:
    bool states_kept = false; // by the last pruned pass
};
