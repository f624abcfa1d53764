// What a model allows: whether it can be pruned, at which boundaries, and what its file and a caller make of that.
// The C API (pop-api.cpp) asks before any graph is built.

#pragma once

#include <cstdint>
#include <string>

struct llama_model;
struct llama_pop_choice;
struct llama_pop_request;

// Number of layers without those for multi-token prediction, L.
int32_t pop_n_layer(const llama_model & model);

// Index of the last layer that writes to the cache or to a recurrent state.
int32_t pop_lossless_boundary(const llama_model & model);

// Why this model cannot be pruned at this boundary, 1..L; empty if it can.
std::string pop_refusal(const llama_model & model, int32_t boundary);

// The pop.* keys of a model's file.
struct pop_keys {
    int32_t boundary   = 0; // 0 if the file names none
    int32_t head       = 0;
    int32_t tail       = 1;
    int32_t min_tokens = 0;
};

// False if a key is unusable, and why.
bool pop_read_keys(const llama_model & model, pop_keys & keys, std::string & why);

// Decides what llama_pop_open() sets, all but the adapter. False if a value is out of range or unusable, and why.
bool pop_choose(const llama_model &       model,
                const llama_pop_request & request,
                int32_t                   n_batch,
                llama_pop_choice &        choice,
                std::string &             why);
