// llama_pop_*: prefill-only pruning (POP, arXiv 2602.03295) as an addition to llama.h. pypop_gguf/_library.py binds it.
//
// A boundary b in 1..L (L = layers of the trunk, without MTP layers) is the 0-based index of the first layer that prefill
// skips: tokens that do not ask for logits run layers 0..b-1 and only fill the caches of layers b..L-1 from the state at b.
// L means off. A context starts with POP off and is then exactly stock llama.cpp.

#pragma once

#include "llama.h"

#define LLAMA_POP_OFF          0
#define LLAMA_POP_FROM_FILE  (-1) // the model file's pop.boundary, off where it has none, and its pop.head and pop.tail

#ifdef __cplusplus
extern "C" {
#endif

    // Holds from the next llama_decode on. On false nothing has changed and llama_pop_last_error() says why.
    LLAMA_API bool llama_pop_set_boundary(struct llama_context * ctx, int32_t boundary);

    // Other tokens that run every layer, from the next llama_decode on: of each sequence the first n_head positions, and in each
    // batch the n_tail tokens up to each that asks for logits, itself included. 0 and 1 at the start.
    LLAMA_API bool llama_pop_set_ends(struct llama_context * ctx, int32_t n_head, int32_t n_tail);

    // Whether a sequence's tokens are pruned at all, from the next llama_decode on; they are at the start.
    LLAMA_API void llama_pop_set_sequence(struct llama_context * ctx, llama_seq_id seq_id, bool prunes);

    // Where a micro-batch holds tokens of both kinds, those that run every layer go on from their own state at the boundary,
    // if the architecture and its memory allow; off, or where they do not: a micro-batch of their own runs every layer. On at
    // the start; the results are the same.
    LLAMA_API void llama_pop_set_continuation(struct llama_context * ctx, bool continues);

    // Whether they do so at the boundary in force.
    LLAMA_API bool llama_pop_continues(const struct llama_context * ctx);

    // The boundary in force, L when off.
    LLAMA_API int32_t llama_pop_get_boundary(const struct llama_context * ctx);

    // Tokens that went through a pruned graph since the context was made.
    LLAMA_API uint64_t llama_pop_n_pruned(const struct llama_context * ctx);

    // Those of one sequence; a token of several counts for the first.
    LLAMA_API uint64_t llama_pop_n_pruned_in(const struct llama_context * ctx, llama_seq_id seq_id);

    // Fitted K/V projections (docs/metadata.md): what a pruned pass at their boundary writes to the caches of the skipped
    // layers. Graphs that run those layers never see them. The model owns the result; NULL: llama_pop_last_error() says why.
    LLAMA_API struct llama_adapter_lora * llama_pop_adapter_init(struct llama_model * model, const char * path);

    LLAMA_API int32_t llama_pop_adapter_boundary(const struct llama_adapter_lora * adapter);

    // Pruned passes at the adapter's boundary use it from the next llama_decode on, in the place of another one for the same
    // boundary. On false the context keeps what it had.
    LLAMA_API bool llama_pop_add_adapter(struct llama_context * ctx, struct llama_adapter_lora * adapter);

    LLAMA_API void llama_pop_clear_adapters(struct llama_context * ctx);

    // Equal for all files of one model, however quantized: an adapter's pop.fingerprint, in hexadecimal.
    LLAMA_API uint64_t llama_pop_fingerprint(const struct llama_model * model);

    // Microseconds spent on building and planning graphs since the context was made.
    LLAMA_API int64_t llama_pop_plan_us(const struct llama_context * ctx);

    LLAMA_API int32_t llama_pop_n_layer(const struct llama_model * model);

    // The last layer that writes to memory: pruning there changes nothing. L-1, or lower where upper layers share a cache.
    LLAMA_API int32_t llama_pop_lossless_boundary(const struct llama_model * model);

    // The model file's pop.min_tokens, for callers that know a prompt's length to leave shorter ones unpruned; 0 where it has none.
    LLAMA_API int32_t llama_pop_min_tokens(const struct llama_model * model);

    // Floating-point operations of the matrix products and attentions in the graph that the context builds for a micro-batch of
    // n_tokens in n_seqs sequences, of which n_outputs ask for logits (0: the graph pruned at boundary, 1..L; more: the whole
    // model). Attention counts the whole context, n_ctx positions: size it to the prompt.
    LLAMA_API double llama_pop_graph_flops(
        struct llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs);

    // Whether the model, as an architecture, can be pruned at this boundary; if not, llama_pop_last_error() says why.
    // llama_pop_set_boundary() goes further and tries the boundary on the graph that the context really builds.
    LLAMA_API bool llama_pop_supports(const struct llama_model * model, int32_t boundary);

    // One line about the last call on this thread that returned false.
    LLAMA_API const char * llama_pop_last_error(void);

#ifdef __cplusplus
}
#endif
