// POP in llama-server, as PopLlama has it: the boundary from the file, what of a cached prompt a request may use, what was
// pruned. Patch 0008 calls these from tools/server; they use the C API alone.

#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

// part of a server_prompt: which of its tokens fewer layers than the model has have read
struct pop_server_record {
    static constexpr int32_t NONE = INT32_MAX;

    int32_t first = NONE; // index of the first such token; whole ones after it are not told apart

    // how many of the first n_past tokens serve a request
    int32_t usable(int32_t n_past, bool pop) const {
        return pop ? n_past : std::min(n_past, first);
    }

    // after a context shift, which has moved tokens from n_keep on
    pop_server_record shifted(int32_t n_keep) const {
        return { first == NONE ? NONE : std::min(first, n_keep) };
    }
};

// part of the server: its model's context
class pop_server {
public:
    // Takes the boundary (LLAMA_POP_FROM_FILE, LLAMA_POP_OFF, 1..L), and the fitted projections that lie beside the model.
    // false where they are not usable, and why.
    bool init(llama_context * ctx, const std::string & path_model, int32_t boundary, std::string & why);

    // A slot begins to read n_tokens of which n_past are cached; sequence ids are slot ids.
    void begin(llama_seq_id seq_id, pop_server_record & record, int32_t n_past, int32_t n_tokens, bool pop);

    int32_t boundary() const { return pop_boundary; }
    int32_t n_layer()  const { return pop_n_layer; }

    // Tokens that a slot has pruned since then.
    uint64_t n_pruned(llama_seq_id seq_id) const;

    // That the slot's prompt is read with, L where it is not pruned.
    int32_t boundary_of(llama_seq_id seq_id) const;

    // Where a prompt comes from a file that does not say how it was read.
    pop_server_record unknown() const;

private:
    struct slot {
        bool     prunes          = false;
        uint64_t n_pruned_before = 0;
    };

    llama_context *   ctx          = nullptr;
    int32_t           pop_n_layer  = 0;
    int32_t           pop_boundary = 0;
    int32_t           min_tokens   = 0;
    bool              exact        = false; // at this boundary pruned is whole
    std::vector<slot> slots;
};
