// Continuation: a micro-batch of which some tokens are run whole becomes a pruned pass over all of its tokens and, for
// those tokens, micro-batches of their own that use the cache cells which the pruned pass has already taken.
//
// llama_context::decode() (patch pop/0003) calls add_continuations() before it computes the micro-batches of a batch.
// pop_completion uses some of the functions, too: they reach into the memory contexts of llama.cpp.

#pragma once

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"

#include <cstdint>
#include <vector>

// A struct, because it is a friend of the memory classes (patch pop/0004).
struct pop_memory {
    // Returns whether continuation is right for this kind of memory. A recurrent state cannot be updated twice.
    static bool supports_continuation(llama_memory_i & memory);

    // Replaces each micro-batch with the label POP_CONTINUES by its pruned pass and its continuations.
    static void add_continuations(llama_memory_context_i & mctx, bool kv_unified);

    // The cells that the current micro-batch's tokens get in a cache, counted over all of its streams.
    static std::vector<int32_t> cells_of(llama_memory_context_i & mctx, const llama_kv_cache & kv);

    // Make the memory context of a chunk whose tokens have these cells already. It attends to no cell behind the last
    // one that a token of the chunk sees.
    static llama_memory_context_ptr make_chunk(llama_kv_cache &                kv,
                                               llama_kv_cache::slot_info_vec_t slots,
                                               const llama_ubatch &            ubatch);
    static llama_memory_context_ptr make_chunk(llama_kv_cache_iswa &           kv,
                                               llama_kv_cache::slot_info_vec_t slots,
                                               llama_kv_cache::slot_info_vec_t slots_swa,
                                               const llama_ubatch &            ubatch);

    // The micro-batch of a decode() that has no other, or nullptr.
    static llama_ubatch * only_ubatch(llama_memory_context_i & mctx);

    // Adds a chunk behind the only micro-batch, whose single token is the last one of the chunk. The others have these
    // cells in the cache and, with sliding windows, in the cache of the windows.
    static void append_chunk(llama_memory_context_i &      mctx,
                             const std::vector<uint32_t> & idxs,
                             const std::vector<uint32_t> & idxs_swa,
                             const llama_ubatch &          ubatch);

    // Lets the current micro-batch attend to no cell behind the last one that its only sequence has at its positions.
    static void limit_cells(llama_kv_cache_context & ctx);
    static void limit_cells(llama_kv_cache_iswa_context & ctx);
};
