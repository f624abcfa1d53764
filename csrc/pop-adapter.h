// Fitted K/V projections: low-rank differences that pruned graphs add to what skipped layers write to their caches.
// A small GGUF of its own (tools/fit_kv.py writes it) in the LoRA tensor layout, for one model and one boundary.

#pragma once

#include <cstdint>
#include <string>

struct llama_adapter_lora;
struct llama_model;

// of the values of a model's norms, which stay as they are when its file is quantized
uint64_t pop_fingerprint(const llama_model & model);

// nullptr where the file cannot be read or is not for this model, and why
llama_adapter_lora * pop_load_adapter(llama_model & model, const char * path, std::string & why);

// the boundary that an adapter was fitted for, 0 for one that pop_load_adapter() did not make
uint32_t pop_adapter_boundary(const llama_adapter_lora & adapter);
