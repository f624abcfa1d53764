// A context's share of POP: its settings, its counters, and what they mean for the split of a batch and for a graph.
//
// llama_context (patches pop/0003, pop/0008 and pop/0010) holds a pop_context: decode() calls begin_batch() before it
// splits a batch, begin_ubatch() before each micro-batch and ubatch_done() after it, graph_params() calls
// graph_params_for(), and process_ubatch() calls choose_kernels() before it computes a graph.

#pragma once

#include "llama-cparams.h"
#include "llama-graph.h"

#include "ggml-cpp.h"
#include "pop-completion.h"

#include <cstdint>
#include <map>
#include <memory>
#include <set>

// The settings of the C API, which llama-pop.h explains.
struct pop_settings {
    uint32_t boundary     = 0; // 0 = off
    int32_t  n_head       = 0;
    int32_t  n_tail       = 1;
    bool     continuation = true;
    bool     kernels      = true; // of pop-kernels.h

    std::set<llama_seq_id> whole_seqs; // sequences that are not pruned

    std::map<uint32_t, llama_adapter_lora *> adapters; // by boundary; the model owns them and frees them with itself
};

struct pop_context : pop_settings {
    uint64_t n_pruned  = 0;
    int64_t  t_plan_us = 0;

    std::map<llama_seq_id, uint64_t> n_pruned_in;

    // The boundaries that llama_context::pop_try_boundary() has built graphs for, and whether continuation works there.
    std::map<uint32_t, bool> tried;

    // The states at the boundary of one micro-batch's tokens that are run whole.
    ggml_context_ptr        ctx_states;
    ggml_backend_buffer_ptr buf_states;
    ggml_tensor *           states = nullptr; // F32 [pop_state_size(), n_ubatch or more]

    // The states that pruned tokens are completed from later; nullptr where completion is off.
    std::unique_ptr<pop_completion> completion;

    // The context that drafts tokens from the states of this one has no cache of its own, and so reads no state of a
    // prompt but the last one. It sets this with reads_cache_of().
    bool drafter_has_no_cache = false;

    bool joins = false; // this decode() completes a chunk with its token

    uint32_t lossless_boundary = 0; // pruning there changes nothing; set where completion is on

    // Returns whether this context reads something of every token from every layer, or runs other layers than the
    // model's main ones.
    bool needs_whole_model(const llama_cparams & cparams) const;

    // Returns whether tokens that are run whole use continuation at the boundary in force.
    bool continues() const;

    // Returns whether what is pruned at the boundary in force can be completed, or nothing is lost there.
    bool completes() const;

    // The adapter that a graph of this part at boundary b takes, or nullptr.
    llama_adapter_lora * adapter_for(pop_part part, uint32_t b) const;

    // Tells the context that this one drafts for that it may prune. Returns it.
    llama_context * reads_cache_of(llama_context * target) const;

    // Returns whether a micro-batch has no states for a drafter, whose rows are there nevertheless.
    bool leaves_rows(const llama_cparams & cparams, const llm_graph_result & res) const;

    void begin_batch(const llama_cparams & cparams, pop_batch & batch) const;

    void begin_ubatch(const llama_cparams &       cparams,
                      const llama_ubatch &        ubatch,
                      llama_memory_context_i &    mctx,
                      const llama_adapter_loras & loras) const;

    // Lets a chunk of completion that was asked for join the token of this decode(), if that is possible.
    void join_chunk(const llama_cparams & cparams, llama_memory_context_i & mctx, const llama_adapter_loras & loras);

    // The state of a sequence, or of all with -1, was restored.
    void state_restored(llama_seq_id seq_id, llama_state_seq_flags flags) const;

    pop_graph_params graph_params_for(const llama_cparams & cparams,
                                      llm_graph_type        gtype,
                                      const llama_ubatch &  ubatch) const;

    // Marks what pop-kernels.h has to leave to ggml, or takes the marks away.
    void choose_kernels(ggml_cgraph * gf);

    void ubatch_done(const llama_ubatch & ubatch, const llm_graph_result & res);

private:
    // Returns whether pruning at the boundary in force computes what the whole model does.
    bool is_lossless() const;

    bool states_kept = false; // by the last pruned pass
    bool marked      = false; // by choose_kernels(): a graph may have marks
};
