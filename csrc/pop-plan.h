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

// pop.boundary of the model's file, L where it has none; on a key that is not usable returns -1 and sets why
int32_t pop_boundary_of_file(const llama_model & model, std::string & why);
