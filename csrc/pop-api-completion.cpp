// The C functions of llama-pop.h that complete pruned prompts. pop-completion.h and pop-chunks.cpp do the work.

#include "llama-pop.h"

#include "llama-context.h"
#include "pop-api.h"
#include "pop-completion.h"

#include <algorithm>
#include <string>

using namespace pop_api;

static bool set_completion(llama_context * ctx, int32_t type) {
    if (type == LLAMA_POP_STATES_OFF) {
        if (ctx->pop.completion) {
            ctx->pop_set_completion(GGML_TYPE_COUNT);
        }
        return true;
    }
    if (type != LLAMA_POP_STATES_F32 && type != LLAMA_POP_STATES_F16 && type != LLAMA_POP_STATES_BF16) {
        return refuse("completion keeps states of the types F32 (0), F16 (1) and BF16 (30), not " +
                      std::to_string(type));
    }
    auto * memory = llama_get_memory(ctx);
    if (!has_memory(ctx)) {
        return false;
    }
    if (!pop_completion::find_cache(*memory)) {
        return refuse("the cache of this architecture cannot be completed later: a recurrent state or an indexer "
                      "cannot be updated twice");
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) llama_n_seq_max(ctx); ++s) {
        if (llama_memory_seq_pos_max(memory, s) >= 0) {
            return refuse("completion can be turned on only while the cache is empty");
        }
    }
    ctx->pop_set_completion((ggml_type) type);
    return true;
}

static bool in_sequences(const llama_context * ctx, llama_seq_id seq_id) {
    return in_range("seq_id", seq_id, 0, (int32_t) llama_n_seq_max(ctx) - 1);
}

bool llama_pop_set_completion(llama_context * ctx, int32_t type) {
    return guarded(false, [&] { return given(ctx) && set_completion(ctx, type); });
}

bool llama_pop_completes(const llama_context * ctx) {
    return given(ctx) && ctx->pop.completes();
}

int32_t llama_pop_n_incomplete(llama_context * ctx, llama_seq_id seq_id) {
    return guarded(-1, [&] {
        if (!given(ctx) || !in_sequences(ctx, seq_id)) {
            return -1;
        }
        return ctx->pop.completion ? (int32_t) ctx->pop_updated_completion().n_incomplete(seq_id) : 0;
    });
}

int32_t llama_pop_n_lost(llama_context * ctx, llama_seq_id seq_id) {
    return guarded(-1, [&] {
        if (!given(ctx) || !in_sequences(ctx, seq_id)) {
            return -1;
        }
        return ctx->pop.completion ? (int32_t) ctx->pop_updated_completion().n_lost(seq_id) : 0;
    });
}

static bool is_on(const llama_context * ctx) {
    return ctx->pop.completion || refuse("completion is off: llama_pop_set_completion() turns it on");
}

llama_pos llama_pop_first_incomplete(llama_context * ctx, llama_seq_id seq_id) {
    return guarded(-1, [&] {
        if (!given(ctx) || !in_sequences(ctx, seq_id) || !has_memory(ctx)) {
            return -1;
        }
        const llama_pos first = ctx->pop.completion ? ctx->pop_updated_completion().first_incomplete(seq_id) : -1;
        return first >= 0 ? first : llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) + 1;
    });
}

bool llama_pop_complete(llama_context * ctx, llama_seq_id seq_id, int32_t n_max, int32_t * n_done) {
    return guarded(false, [&] {
        if (!given(ctx, n_done) || !in_sequences(ctx, seq_id) || !in_range("n_max", n_max, 0, INT32_MAX) ||
            !is_on(ctx)) {
            return false;
        }
        if (!ctx->get_cparams().causal_attn) {
            return refuse("completion needs causal attention");
        }
        *n_done = (int32_t) ctx->pop_complete(seq_id, n_max);
        return true;
    });
}

bool llama_pop_complete_with_next(llama_context * ctx, llama_seq_id seq_id, int32_t n_max) {
    return guarded(false, [&] {
        if (!given(ctx) || !in_sequences(ctx, seq_id) || !in_range("n_max", n_max, 0, INT32_MAX) || !is_on(ctx)) {
            return false;
        }
        auto & completion = ctx->pop_updated_completion();
        completion.check_loras(seq_id, ctx->pop_loras());
        completion.asked = { seq_id, std::min<uint32_t>(n_max, llama_n_ubatch(ctx) - 1) };
        return true;
    });
}

uint64_t llama_pop_n_completed(const llama_context * ctx) {
    return given(ctx) && ctx->pop.completion ? ctx->pop.completion->n_completed : 0;
}

bool llama_pop_stop(llama_context * ctx) {
    return guarded(false, [&] {
        if (!given(ctx) || !is_on(ctx)) {
            return false;
        }
        ctx->pop.completion->stop = true;
        return true;
    });
}

bool llama_pop_set_lost(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    return guarded(false, [&] {
        if (!given(ctx) || !in_sequences(ctx, seq_id) || !in_range("pos", pos, 0, INT32_MAX)) {
            return false;
        }
        if (ctx->pop.completion) {
            ctx->pop_updated_completion().set_lost(seq_id, pos);
        }
        return true;
    });
}
