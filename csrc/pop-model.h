// Tells whether a model can be pruned, and at which boundaries, and reads what its file asks for.
// The C API (pop-api.cpp) asks before any graph is built.

#pragma once

#include "llama-arch.h"

#include <cstdint>
#include <string>

struct llama_hparams;
struct llama_model;
struct llama_pop_choice;
struct llama_pop_request;

// Returns the number of layers without those for multi-token prediction, L.
int32_t pop_n_layer(const llama_model & model);

// Returns how many values a layer passes on for each token: n_embd, or n_altup times as many in Gemma 3n, whose state
// is several vectors.
int64_t pop_state_size(llm_arch arch, const llama_hparams & hparams);

// Returns whether the layers from a boundary on read more of an image's features than the state at the boundary.
bool pop_reads_features_above(const llama_model & model, int32_t boundary);

// Returns the index of the last layer that writes to the cache or to a recurrent state.
int32_t pop_lossless_boundary(const llama_model & model);

// Returns why this model cannot be pruned at this boundary, 1..L; empty if it can.
std::string pop_refusal(const llama_model & model, int32_t boundary);

// The pop.* keys of a model's file.
struct pop_keys {
    int32_t boundary   = 0; // 0 if the file names none
    int32_t head       = 0;
    int32_t tail       = 1;
    int32_t min_tokens = 0;
};

// Returns false, and the reason in why, if a key is unusable.
bool pop_read_keys(const llama_model & model, pop_keys & keys, std::string & why);

// Decides all that llama_pop_open() sets but the adapter. Returns false, and the reason in why, if a value is out of
// range or unusable.
bool pop_choose(const llama_model &       model,
                const llama_pop_request & request,
                int32_t                   n_batch,
                llama_pop_choice &        choice,
                std::string &             why);
