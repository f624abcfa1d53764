// Fitted K/V projections: what a pruned graph writes to the caches of skipped layers instead of what their own weights
// give. An adapter is a GGUF file of its own, for one model and one boundary. Version 2 replaces weights of the pruned
// graph and adds a shift to their products. Version 3 also adds what further inputs say: states that products below the
// boundary read go through a bottleneck, and from there a matrix leads to each replaced weight. Version 1 adds low-rank
// products, in the LoRA tensor layout.
// docs/fitted-projections.md says how it is made; the C API (pop-api.cpp) loads it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct ggml_tensor;
struct llama_adapter_lora;
struct llama_model;

// Returns a hash of the model's norm weights, which stay as they are when its file is quantized.
uint64_t pop_fingerprint(const llama_model & model);

// Returns the file that belongs to a model file and a boundary: <stem>.pop-b<boundary>.gguf beside the model.
std::string pop_adapter_path(const std::string & path_model, int32_t boundary);

// Returns nullptr, and the reason in why, if the file cannot be read or is not for this model. The model owns the
// result.
llama_adapter_lora * pop_load_adapter(llama_model & model, const char * path, std::string & why);

// Takes an adapter from its model and frees it. No context may use it.
void pop_free_adapter(llama_adapter_lora * adapter);

// Returns whether an adapter replaces weights (versions 2 and 3) or adds low-rank products (version 1).
bool pop_adapter_replaces(const llama_adapter_lora & adapter);

// Returns the matrix [n_in, rank] for what the product of a weight below the boundary reads, nullptr if that is no
// further input.
ggml_tensor * pop_adapter_bottleneck(const llama_adapter_lora & adapter, const ggml_tensor * weight);

// Returns the matrix [rank, n_out] that leads from the bottleneck to the product of a replaced weight, or nullptr.
ggml_tensor * pop_adapter_further(const llama_adapter_lora & adapter, const ggml_tensor * weight);

// Returns the number of further inputs.
size_t pop_adapter_n_bottlenecks(const llama_adapter_lora & adapter);

// Returns the boundary that an adapter was fitted for, 0 if pop_load_adapter() did not make it.
uint32_t pop_adapter_boundary(const llama_adapter_lora & adapter);
