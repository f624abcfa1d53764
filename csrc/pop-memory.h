// Continuations: a mixed micro-batch becomes a pruned pass over all of its tokens and, for those that need the whole model,
// micro-batches of their own that point at the cache cells which the pruned pass has already taken.

#pragma once

struct llama_memory_context_i;
struct llama_memory_i;

struct llama_pop_memory {
    // Whether continuations are known to be right for this kind of memory. Recurrent states cannot be updated twice.
    static bool continues(llama_memory_i & memory);

    // Puts the continuations of each mixed micro-batch behind it. For memories that continue.
    static void add_continuations(llama_memory_context_i & mctx, bool kv_unified);
};
