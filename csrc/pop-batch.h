// How a batch is split into micro-batches while POP is on, and the label that says how each of them is run.
//
// llama_batch_allocr (patch pop/0001) holds a pop_batch: it asks may_share_ubatch() wherever it adds a token to a
// micro-batch, and stores label_ubatch() in the finished one. pop_context::begin_batch() sets the rules at the start of
// each decode().

#pragma once

#include "llama.h"

#include <cstdint>
#include <set>
#include <vector>

struct ggml_tensor;
struct llama_adapter_lora;

// How the layers run a micro-batch.
enum pop_part : uint8_t {
    POP_WHOLE,        // every layer runs all tokens
    POP_PRUNED,       // the layers below the boundary run all tokens, those above only write to their caches
    POP_CONTINUES,    // some tokens are run whole: pop_memory replaces this by a pruned pass and its continuations
    POP_CONTINUATION, // the layers from the boundary on run some tokens, from states that were kept
    POP_BELOW,        // only the layers below the boundary run, for a token that joins a chunk of completion
};

// The label of a micro-batch, in llama_ubatch::data_t.
struct pop_ubatch_label {
    pop_part             part = POP_WHOLE;
    std::vector<int32_t> rows;            // PRUNED, CONTINUES: the tokens that are run whole
    uint32_t             first_state = 0; // CONTINUATION: index of its first token's state among the kept ones

    // For pop_completion; empty and 0 where completion is off.
    std::vector<int32_t> cells;         // of each token, its row among the states that are kept for completion
    uint32_t             keeps     = 0; // the boundary whose states the graph keeps for completion
    uint32_t             completes = 0; // CONTINUATION: a chunk of completion, from states at this boundary
                                        // BELOW: the boundary of the chunk that its token joins
};

// These parameters say what pop_rewrite_graph() makes of a graph. They are a part of llm_graph_params, so graph reuse
// compares them.
struct pop_graph_params {
    pop_part      part        = POP_WHOLE;
    uint32_t      boundary    = 0;
    uint32_t      n_rows      = 0;       // PRUNED: number of states to keep for continuations
    uint32_t      first_state = 0;       // CONTINUATION: see pop_ubatch_label
    ggml_tensor * states      = nullptr; // F32 [pop_state_size(), n_ubatch or more], owned by pop_context

    llama_adapter_lora * adapter = nullptr; // PRUNED: fitted projections

    // For completion. A CONTINUATION for which this is not nullptr is a chunk, which goes on from these states.
    ggml_tensor * completion = nullptr; // [pop_state_size(), cells], owned by pop_completion
    uint32_t      keeps      = 0;       // PRUNED, WHOLE, BELOW: the boundary whose states are written there

    bool operator==(const pop_graph_params & other) const {
        return part == other.part && boundary == other.boundary && n_rows == other.n_rows &&
               first_state == other.first_state && states == other.states && adapter == other.adapter &&
               completion == other.completion && keeps == other.keeps;
    }
};

struct pop_batch {
    bool prunes    = false; // false: nothing below is used, and batches are split as stock llama.cpp splits them
    bool continues = false; // pruned tokens and tokens that are run whole may share a micro-batch

    int32_t n_head = 0; // see llama_pop_set_ends()
    int32_t n_tail = 1;

    std::set<llama_seq_id> whole_seqs; // all tokens of these sequences are run whole

    // Finds out which tokens are run whole. Called before every attempt to split a batch.
    void begin_split(const llama_batch & batch);

    // Recurrent snapshots need a sequence's last n_snapshot tokens in one micro-batch. If one of them is run whole, all
    // of them are. tokens_of maps each set of sequences to the indices of its tokens.
    template <typename token_map> void run_snapshot_tails_whole(const token_map & tokens_of, uint32_t n_snapshot) {
        if (!prunes) {
            return;
        }
        for (const auto & entry : tokens_of) {
            run_snapshot_tail_whole(entry.second, n_snapshot);
        }
    }

    // The first token of a sequence that no micro-batch has taken.
    static int32_t next_token(const std::vector<int32_t> & idxs, const std::vector<bool> & used);

    bool may_share_ubatch(int32_t i, int32_t j) const {
        return !prunes || continues || (runs_whole[i] != 0) == (runs_whole[j] != 0);
    }

    pop_ubatch_label label_ubatch(const std::vector<int32_t> & idxs) const;

private:
    void run_snapshot_tail_whole(const std::vector<int32_t> & idxs, uint32_t n_snapshot);

    bool in_whole_sequence(const llama_batch & batch, int32_t i) const;

    std::vector<int8_t> runs_whole; // [n_tokens]
};
