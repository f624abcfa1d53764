// The C API of prefill-only pruning (POP, arXiv 2602.03295), an addition to llama.h.
//
// Terms:
//   L         number of the model's layers; layers for multi-token prediction do not count
//   boundary  the index of the first layer that reading a prompt skips, 1..L; L means that nothing is skipped
//   whole     a token is run whole when every layer runs it
//   pruned    a token is pruned when only the layers below the boundary run it; the layers from the boundary on still
//             write their keys and values of it to the cache, computed from the state at the boundary
//
// A token that asks for logits is always run whole. A new context prunes nothing: after llama_pop_set_kernels() with
// false, its logits are bit for bit those of stock llama.cpp in the cases that tests/engine/test_stock.py compares.
// Some fixes of upstream faults are always active; third_party/README.md lists them.
//
// Every function checks its arguments, and no C++ exception leaves it. A function that fails returns the value that its
// comment names, changes nothing, and leaves the reason in llama_pop_last_error().
//
// A context may be used by one thread at a time, as everywhere in llama.h; llama_pop_stop() alone is an exception.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

//
// Open: choose what a context does with prompts
//

// Values of a requested boundary besides 1..L.
enum llama_pop_boundary {
    LLAMA_POP_OFF      = 0,  // prune nothing
    LLAMA_POP_DEFAULT  = -1, // the file's pop.boundary; without one LLAMA_POP_LOSSLESS if that is below L-1, else off
    LLAMA_POP_LOSSLESS = -2, // see llama_pop_lossless_boundary()
};

// The source of the boundary in a llama_pop_choice.
enum llama_pop_source {
    LLAMA_POP_SOURCE_OFF      = 0, // nothing is pruned
    LLAMA_POP_SOURCE_ARGUMENT = 1, // the request named it, as a number or as LLAMA_POP_LOSSLESS
    LLAMA_POP_SOURCE_FILE     = 2, // the model file's pop.boundary
    LLAMA_POP_SOURCE_LOSSLESS = 3, // LLAMA_POP_DEFAULT found upper layers that share a cache, so pruning is exact
};

// A llama_pop_request says what a caller asks for. A number of tokens that is -1 stands for the model file's value; if
// the file has none, it stands for a head of 0, a tail of 1 and min_tokens of 0.
struct llama_pop_request {
    int32_t boundary;   // 1..L or an enum llama_pop_boundary
    int32_t n_head;     // see llama_pop_set_ends(); file key pop.head
    int32_t n_tail;     // see llama_pop_set_ends(), at most llama_n_batch(); file key pop.tail
    int32_t min_tokens; // the caller shall leave prompts with fewer new tokens unpruned; file key pop.min_tokens
};

// A llama_pop_choice says what llama_pop_open() has chosen.
struct llama_pop_choice {
    int32_t boundary; // 1..L, L where nothing is pruned
    int32_t source;   // an enum llama_pop_source
    int32_t n_head;
    int32_t n_tail;
    int32_t min_tokens;  // the context does not know where a prompt begins, so the caller applies this
    bool    has_adapter; // an adapter file lay beside the model and is in use
};

// Decides which boundary, ends and adapter a context gets, and sets them from the next llama_decode() on. This is the
// one place where these rules are.
//   request     the model file's pop.* keys are read, and have to be valid, where it leaves a value to the file
//   path_model  where the model was loaded from: the adapter at llama_pop_adapter_path() is loaded if that file exists
//               and the context prunes. NULL loads none.
//   choice      receives the result; it is not written where the function fails
// Returns false if a value is out of range, the file's keys or its adapter are unusable, or the model cannot be pruned
// there.
LLAMA_API bool llama_pop_open(struct llama_context *    ctx,
                              struct llama_pop_request  request,
                              const char *              path_model,
                              struct llama_pop_choice * choice);

// The name of the adapter file that belongs to a model file and a boundary: <stem>.pop-b<boundary>.gguf beside the
// model. Writes it to buf, cut to n - 1 bytes and terminated by a zero, and returns its whole length in bytes. buf may
// be NULL where n is 0. Returns -1 if path_model is NULL or empty, or the boundary is below 1.
LLAMA_API int32_t llama_pop_adapter_path(const char * path_model, int32_t boundary, char * buf, size_t n);

//
// Set one thing
//

// Sets the boundary, 1..L or LLAMA_POP_OFF, from the next llama_decode() on.
// Returns false if the boundary is out of range, or the model or this kind of context cannot be pruned there.
LLAMA_API bool llama_pop_set_boundary(struct llama_context * ctx, int32_t boundary);

// Returns the boundary in force, 1..L, L where nothing is pruned; 0 if ctx is NULL.
LLAMA_API int32_t llama_pop_get_boundary(const struct llama_context * ctx);

// Sets which tokens are run whole besides those that ask for logits, from the next llama_decode() on: the first n_head
// positions of each sequence, and in each batch the n_tail tokens of a sequence that end with one that asks for logits.
// A new context has 0 and 1. Returns false if n_head is below 0 or n_tail is below 1.
LLAMA_API bool llama_pop_set_ends(struct llama_context * ctx, int32_t n_head, int32_t n_tail);

// Sets whether the tokens of one sequence are pruned at all, from the next llama_decode() on. In a new context they
// are.
// Returns false if seq_id is not in 0..llama_n_seq_max()-1.
LLAMA_API bool llama_pop_set_sequence(struct llama_context * ctx, llama_seq_id seq_id, bool prunes);

// Sets how tokens that run whole are computed beside pruned ones, from the next llama_decode() on. By default (true)
// they continue: the layers below the boundary run all tokens in one pass, then the layers from the boundary on run
// these tokens alone, from the hidden states that the first pass has kept. With false they run every layer in a
// micro-batch of their own. The results are the same; continuation is faster. Recurrent and hybrid models always use
// the second way.
// Returns false if ctx is NULL.
LLAMA_API bool llama_pop_set_continuation(struct llama_context * ctx, bool continues);

// Sets whether the context uses the kernels of pypop_gguf on a CPU, from the next llama_decode() or llama_encode() on.
// With false, llama.cpp's own kernels compute everything. They are used by default, unless POP_KERNELS=off in the
// environment forbids them in the whole process. On Arm they are used only where POP_KERNELS=on allows them.
// Returns false if ctx is NULL.
LLAMA_API bool llama_pop_set_kernels(struct llama_context * ctx, bool enabled);

// Returns true if tokens that run whole use continuation at the boundary in force; false also if ctx is NULL.
LLAMA_API bool llama_pop_continues(const struct llama_context * ctx);

//
// Adapters: fitted weights for the keys and values that a pruned token leaves in the skipped layers' caches
//

// Loads an adapter file, which docs/fitted-projections.md describes, for one model. Nothing uses it yet. The model owns
// the result and frees it with itself; llama_adapter_lora_free() leaves it alone, since contexts may hold it.
// Returns NULL if the file cannot be read or was fitted for another model.
LLAMA_API struct llama_adapter_lora * llama_pop_adapter_init(struct llama_model * model, const char * path);

// Returns the boundary that an adapter was fitted for; 0 if it is NULL or llama_pop_adapter_init() did not make it.
LLAMA_API int32_t llama_pop_adapter_boundary(const struct llama_adapter_lora * adapter);

// Lets pruned tokens use an adapter from the next llama_decode() on whenever its boundary is in force. It replaces
// another adapter for the same boundary. Tokens that run whole never use it.
// Returns false if the adapter is not one of this context's model, or the model's graph has no place for it.
LLAMA_API bool llama_pop_add_adapter(struct llama_context * ctx, struct llama_adapter_lora * adapter);

// Takes all adapters out of use from the next llama_decode() on. Returns false if ctx is NULL.
LLAMA_API bool llama_pop_clear_adapters(struct llama_context * ctx);

// Returns a hash of the model's norm weights, which no quantization changes: equal for all files of one model. An
// adapter file has it in hexadecimal as pop.fingerprint. Returns 0 if the model is NULL or a weight cannot be read.
LLAMA_API uint64_t llama_pop_fingerprint(const struct llama_model * model);

//
// Completion: run the layers that pruned tokens have skipped later on, so that their cache becomes the whole model's
//

// Types of the states that a context keeps for completion. They are values of enum ggml_type.
enum llama_pop_states {
    LLAMA_POP_STATES_OFF  = -1, // keep none: nothing can be completed, and nothing differs from a context without it
    LLAMA_POP_STATES_F32  = 0,  // a completed cache is the whole model's
    LLAMA_POP_STATES_F16  = 1,  // half the memory; some models have states beyond 65504, which F16 cannot hold
    LLAMA_POP_STATES_BF16 = 30, // half the memory, for all models
};

// Lets a context keep the state at the boundary of every token that is not the whole model's, one of an enum
// llama_pop_states. It takes a row of memory for each cell of the cache, of n_embd values, or four times as many in
// Gemma 3n. A token is the whole model's if it was run whole and all tokens before it in its sequence are; generated
// tokens behind a pruned prompt are not. Returns false if the cache is not empty, if it cannot be completed (recurrent
// and hybrid models, and caches with indexers), or if there is no memory for the states.
LLAMA_API bool llama_pop_set_completion(struct llama_context * ctx, int32_t type);

// Returns true if completion is on and works at the boundary in force. Where it does not work, pruned tokens count as
// lost.
LLAMA_API bool llama_pop_completes(const struct llama_context * ctx);

// Returns the number of tokens of a sequence that llama_pop_complete() has left to do, 0 where completion is off;
// -1 if seq_id is out of range.
LLAMA_API int32_t llama_pop_n_incomplete(struct llama_context * ctx, llama_seq_id seq_id);

// Returns the number of tokens of a sequence that are not the whole model's and can never be completed, 0 where
// completion is off; -1 if seq_id is out of range. These tokens end the sequence. They come from sliding windows that
// have moved on, from images with non-causal attention behind pruned text, and from llama_pop_set_lost().
LLAMA_API int32_t llama_pop_n_lost(struct llama_context * ctx, llama_seq_id seq_id);

// Returns the position of the first token of a sequence that is not the whole model's, or the one behind the last token
// if all are; also where completion is off. Returns -1 if seq_id is out of range.
LLAMA_API llama_pos llama_pop_first_incomplete(struct llama_context * ctx, llama_seq_id seq_id);

// Completes up to n_max tokens of a sequence, the lowest positions first, and writes to n_done how many it has
// completed: fewer if no more are left or llama_pop_stop() was called. Logits and embeddings of the last llama_decode()
// can be read as before, but not meanwhile. LoRA adapters and control vectors have to be those that the tokens were
// read with. Shift positions only after completion: completed after a shift, tokens attend to the shifted text.
// Returns false if seq_id or n_max is out of range, completion or causal attention is off, the LoRA adapters are
// others, or a computation fails. Tokens that were completed before stay so.
LLAMA_API bool llama_pop_complete(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_max, int32_t * n_done);

// Lets the next llama_decode() also complete up to n_max tokens of a sequence, and at most n_ubatch - 1. If it decodes
// one token alone, of this sequence and with logits, the layers from the boundary on run the chunk and the token
// together: they read their weights once, which takes less time than llama_pop_complete() and llama_decode() one after
// the other, and computes the same. Otherwise, as behind image features, it completes nothing; llama_pop_n_completed()
// tells. If that llama_decode() fails, the tokens stay incomplete.
// Returns false if seq_id or n_max is out of range, completion is off, or the LoRA adapters are others.
LLAMA_API bool llama_pop_complete_with_next(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_max);

// Returns the number of tokens that were completed since completion was turned on, 0 where it is off.
LLAMA_API uint64_t llama_pop_n_completed(const struct llama_context * ctx);

// Stops a llama_pop_complete() that is running, before the next operation on a CPU or the next chunk of n_ubatch tokens
// on other devices. If none is running, the next one stops at once. This is the only function that another thread may
// call while a context is in use. Returns false if completion is off.
LLAMA_API bool llama_pop_stop(struct llama_context * ctx);

// Says that the tokens of a sequence from a position on are not the whole model's and cannot be completed. A restored
// state counts as the whole model's, so the caller says it for one that was saved before it was completed.
// Returns false if seq_id or pos is out of range.
LLAMA_API bool llama_pop_set_lost(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

//
// Ask
//

// Returns the number of layers, L; 0 if the model is NULL.
LLAMA_API int32_t llama_pop_n_layer(const struct llama_model * model);

// Returns the index of the last layer that writes to the cache or to a recurrent state. Pruning there changes no
// result. It is L-1, or lower where upper layers read the cache of lower ones. Returns 0 if the model is NULL.
LLAMA_API int32_t llama_pop_lossless_boundary(const struct llama_model * model);

// Returns true if the architecture can be pruned at this boundary, 1..L, as far as the model alone tells.
// llama_pop_set_boundary() also tries the boundary on the graph that a context builds.
LLAMA_API bool llama_pop_supports(const struct llama_model * model, int32_t boundary);

// Returns the number of tokens that were pruned since the context was made; 0 also if ctx is NULL.
LLAMA_API uint64_t llama_pop_n_pruned(const struct llama_context * ctx);

// Returns the number of those that belong to one sequence. A token that several sequences share counts for its first.
LLAMA_API uint64_t llama_pop_n_pruned_in(const struct llama_context * ctx, llama_seq_id seq_id);

// Returns the microseconds that were spent on building and planning graphs since the context was made; 0 also if ctx is
// NULL.
LLAMA_API int64_t llama_pop_plan_us(const struct llama_context * ctx);

// Returns the floating-point operations of the matrix products and attentions in the graph of one micro-batch.
// Attention counts all n_ctx positions, so size the context to the prompt.
//   boundary   1..L; the graph is pruned there if n_outputs is 0, and the architecture and the context allow it
//   n_tokens   tokens of the micro-batch over all sequences, n_seqs to llama_n_ubatch()
//   n_seqs     its sequences, 1 to llama_n_seq_max()
//   n_outputs  tokens that ask for logits, 0 to n_tokens; if there is one, the graph is that of the whole model
// Returns NaN if an argument is out of range, or the context has no cache or cannot build this graph.
LLAMA_API double llama_pop_graph_flops(
    struct llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs);

//
// Observe: what the products by which skipped layers fill their caches read and write, for fitting an adapter
//

struct llama_pop_observer;

// Makes an observer of the products that a pass pruned at this boundary, 1..L-1, computes straight from the state
// there, for the boundary layer and those above it. The caller detaches it and frees it with llama_pop_observer_free().
// Returns NULL if the boundary is out of range or the model cannot be pruned there.
LLAMA_API struct llama_pop_observer * llama_pop_observer_init(struct llama_context * ctx, int32_t boundary);

// Lets an observer copy the products of one more weight, whatever they serve. Returns false if an argument is NULL.
LLAMA_API bool llama_pop_observer_add(struct llama_pop_observer * observer, const char * weight);

// Frees an observer that is not attached. Returns false if it is NULL.
LLAMA_API bool llama_pop_observer_free(struct llama_pop_observer * observer);

// Attaches an observer to a context of the same model, in the place of any evaluation callback; NULL detaches it. From
// the next llama_decode() on the observer copies the products of every token, pruned or whole, in the order of the
// tokens in the micro-batches. Returns false if ctx is NULL.
LLAMA_API bool llama_pop_observe(struct llama_context * ctx, struct llama_pop_observer * observer);

// Returns the name of the i-th weight whose products are observed, NULL if there are not that many.
LLAMA_API const char * llama_pop_observer_weight(const struct llama_pop_observer * observer, int32_t i);

// A llama_pop_product holds what the products of one weight have read and written since llama_pop_observer_clear(),
// valid until the next llama_decode() or call of it: F32 [n_tokens][n_in] and F32 [n_tokens][n_out].
struct llama_pop_product {
    const float * input;
    const float * output;
    int64_t       n_in;
    int64_t       n_out;
    int64_t       n_tokens;
};

// Fills product. Returns false if the weight is not observed or no product of it was evaluated.
LLAMA_API bool llama_pop_observer_get(const struct llama_pop_observer * observer,
                                      const char *                      weight,
                                      struct llama_pop_product *        product);

// Lets an observer forget what it has copied. Returns false if it is NULL.
LLAMA_API bool llama_pop_observer_clear(struct llama_pop_observer * observer);

// Returns one line about the last call on this thread that failed, empty if none did. The next failure overwrites it.
LLAMA_API const char * llama_pop_last_error(void);

#ifdef __cplusplus
}
#endif
