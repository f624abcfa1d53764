// Continuation: a micro-batch of which some tokens are run whole becomes a pruned pass over all of its tokens and, for
// those tokens, micro-batches of their own that use the cache cells which the pruned pass has already taken.
//
// llama_context::decode() (patch pop/0003) calls add_continuations() before it computes the micro-batches of a batch.

#pragma once

struct llama_memory_context_i;
struct llama_memory_i;

// A struct, because it is a friend of the memory classes (patch pop/0004).
struct pop_memory {
    // Returns whether continuation is right for this kind of memory. A recurrent state cannot be updated twice.
    static bool supports_continuation(llama_memory_i & memory);

    // Replaces each micro-batch with the label POP_CONTINUES by its pruned pass and its continuations.
    static void add_continuations(llama_memory_context_i & mctx, bool kv_unified);
};
