// POP in llama-server: the boundary of the server's model, which part of a cached prompt a request may use, and how
// many tokens were pruned. Patch pop/0006 calls this from tools/server; it uses the C API alone.

#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

// The part of a server_prompt that says which of its tokens were pruned.
struct pop_server_record {
    static constexpr int32_t NONE = INT32_MAX;

    int32_t first = NONE; // index of the first pruned token; whether a later one was pruned is not recorded

    // Returns how many of the first n_past cached tokens serve a request, which can use pruned ones only if it prunes.
    int32_t n_usable(int32_t n_past, bool prunes) const { return prunes ? n_past : std::min(n_past, first); }

    // Returns the record after a context shift, which has moved the tokens from n_keep on.
    pop_server_record after_shift(int32_t n_keep) const { return { first == NONE ? NONE : std::min(first, n_keep) }; }
};

// The part of the server that belongs to its model's context.
class pop_server {
public:
    // Opens the context with llama_pop_open(), with what lies beside the model. asked is 1..L or an enum
    // llama_pop_boundary. Returns false, and the reason in why, if that is refused.
    bool init(llama_context * ctx, const std::string & path_model, int32_t asked, std::string & why);

    // Called when a slot begins to read a prompt of n_tokens of which n_past are cached. Sequence ids are slot ids.
    void begin_prompt(llama_seq_id seq_id, pop_server_record & record, int32_t n_past, int32_t n_tokens, bool pop);

    int32_t boundary() const { return pop_boundary; }
    int32_t n_layer() const { return pop_n_layer; }

    // Returns the number of tokens that a slot has pruned since begin_prompt().
    uint64_t n_pruned(llama_seq_id seq_id) const;

    // Returns the boundary that the prompt in this slot is read with, n_layer() if it is not pruned.
    int32_t boundary_of(llama_seq_id seq_id) const;

    // Returns the record of a prompt that is restored from a file. The file does not say how it was read, so it counts
    // as pruned.
    pop_server_record restored_record() const;

private:
    struct slot {
        bool     prunes          = false;
        uint64_t n_pruned_before = 0;
    };

    llama_context *   ctx          = nullptr;
    int32_t           pop_n_layer  = 0;
    int32_t           pop_boundary = 0;
    int32_t           min_tokens   = 0;
    bool              exact        = false; // pruning at this boundary changes no result
    std::vector<slot> slots;
};
