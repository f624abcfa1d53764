// What a model allows: can it be pruned, at which boundaries, and what its file asks for.
// Called by the C API (pop-context.cpp) before any graph is built.

#pragma once

#include <cstdint>
#include <string>

struct llama_model;

// layers of the trunk
int32_t pop_n_layer(const llama_model & model);

// the last trunk layer that writes to memory
int32_t pop_lossless_boundary(const llama_model & model);

// why this model cannot be pruned at this boundary (1..L), empty if it can
std::string pop_refusal(const llama_model & model, int32_t boundary);

// what a model's file says
struct pop_file {
    int32_t boundary; // L where it has none
    int32_t head = 0;
    int32_t tail = 1;
    int32_t min_tokens = 0;
};

// false where a key is not usable, and why
bool pop_read_file(const llama_model & model, pop_file & file, std::string & why);
