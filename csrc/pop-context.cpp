#include "pop-context.h"

#include "llama-adapter.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"
#include "pop-adapter.h"
#include "pop-kernels.h"
#include "pop-memory.h"
#include "pop-model.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

bool pop_context::needs_whole_model(const llama_cparams & cparams) const {
    const auto & inp = cparams.embeddings_layer_inp;
    return cparams.embeddings || (cparams.embeddings_nextn && !drafter_has_no_cache) ||
           cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || std::find(inp.begin(), inp.end(), true) != inp.end();
}

bool pop_context::continues() const {
    const auto it = tried.find(boundary);
    return continuation && it != tried.end() && it->second;
}

bool pop_context::completes() const {
    if (!completion) {
        return false;
    }
    const auto it = completion->works_at.find(boundary);
    return boundary == 0 || is_lossless() || (it != completion->works_at.end() && it->second.chunks);
}

llama_adapter_lora * pop_context::adapter_for(pop_part part, uint32_t b) const {
    const auto it = adapters.find(b);
    return part == POP_PRUNED && it != adapters.end() ? it->second : nullptr;
}

llama_context * pop_context::reads_cache_of(llama_context * target) const {
    target->pop.drafter_has_no_cache = true;
    return target;
}

bool pop_context::leaves_rows(const llama_cparams & cparams, const llm_graph_result & res) const {
    return res.pop_rewritten && cparams.embeddings_nextn && !cparams.embeddings_nextn_masked;
}

void pop_context::begin_batch(const llama_cparams & cparams, pop_batch & batch) const {
    // a non-causal batch has to stay in one piece
    batch.prunes = boundary != 0 && cparams.causal_attn && !needs_whole_model(cparams);
    // decode() stores the states that a drafter reads one behind the other, so each token has to be in one pass only
    batch.continues = batch.prunes && continues() && !cparams.embeddings_nextn;
    if (!batch.prunes) {
        return;
    }
    batch.n_head     = n_head;
    batch.n_tail     = n_tail;
    batch.whole_seqs = whole_seqs;
}

bool pop_context::is_lossless() const {
    return boundary >= lossless_boundary && adapters.count(boundary) == 0;
}

void pop_context::begin_ubatch(const llama_cparams &       cparams,
                               const llama_ubatch &        ubatch,
                               llama_memory_context_i &    mctx,
                               const llama_adapter_loras & loras) const {
    if (completion) {
        const auto &   label = ubatch.data->pop;
        const uint32_t b     = label.part == POP_PRUNED && !is_lossless() ? boundary : label.completes;
        completion->begin_ubatch(ubatch, mctx, b, cparams.causal_attn, loras);
    }
}

void pop_context::join_chunk(const llama_cparams &       cparams,
                             llama_memory_context_i &    mctx,
                             const llama_adapter_loras & loras) {
    const auto what = completion ? std::exchange(completion->asked, {}) : pop_completion::request();
    joins = what.seq_id >= 0 && cparams.causal_attn && !needs_whole_model(cparams) && !cparams.embeddings_nextn &&
            completion->join(what, mctx, loras);
}

void pop_context::state_restored(llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (completion && !(flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) { // which leaves the cells that have marks alone
        completion->restored(seq_id);
    }
}

pop_graph_params pop_context::graph_params_for(const llama_cparams & cparams,
                                               llm_graph_type        gtype,
                                               const llama_ubatch &  ubatch) const {
    pop_graph_params res;
    if (!ubatch.data || gtype != LLM_GRAPH_TYPE_DEFAULT) {
        return res;
    }
    const auto & label = ubatch.data->pop;
    if (label.completes) {
        res            = { label.part, label.completes };
        res.completion = completion->states;
        res.keeps      = label.part == POP_BELOW ? label.completes : 0;
        return res;
    }
    if (needs_whole_model(cparams)) {
        return res;
    }
    // if no states were kept, the pruned pass was left whole, and so is what follows it
    if (boundary != 0 && (label.part == POP_PRUNED || (label.part == POP_CONTINUATION && states_kept))) {
        const uint32_t n_rows = label.rows.size();
        res = { label.part, boundary, n_rows, label.first_state, states, adapter_for(label.part, boundary) };
    }
    if (completion) {
        // graph_reserve() has a micro-batch of no batch, and its graph shall be as large as any that follows
        const bool reserves = ubatch.data->batch_idxs.empty();
        res.keeps           = reserves ? completion->any_boundary() : label.keeps;
        res.completion      = res.keeps ? completion->states : nullptr;
    }
    return res;
}

// The marks are set before each computation, because a graph may be used again after the setting has changed.
void pop_context::choose_kernels(ggml_cgraph * gf) {
    marked = marked || !kernels;
    for (int i = 0; marked && i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * t = ggml_graph_node(gf, i);
        if (t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID || t->op == GGML_OP_FLASH_ATTN_EXT) {
            t->op_params[POP_KERNELS_OFF_PARAM] = !kernels;
        }
    }
}

void pop_context::ubatch_done(const llama_ubatch & ubatch, const llm_graph_result & res) {
    const auto & label = ubatch.data->pop;
    if (completion) {
        const bool loses = label.part == POP_PRUNED && res.pop_rewritten && !is_lossless();
        completion->ubatch_done(ubatch, loses, res.pop_rewritten);
    }
    if (label.part != POP_PRUNED) {
        return;
    }
    states_kept = res.pop_rewritten && !label.rows.empty();
    if (res.pop_rewritten) {
        n_pruned += ubatch.n_tokens - label.rows.size();
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            ++n_pruned_in[ubatch.seq_id[i][0]];
        }
        for (const int32_t i : label.rows) {
            --n_pruned_in[ubatch.seq_id[i][0]];
        }
    }
}

namespace {

// Sets a context's number of outputs while a graph is built. Afterwards, also after an exception, the number is what it
// was, and the scheduler has forgotten the tensors that the builder has pinned in it.
class build_scope {
public:
    build_scope(ggml_backend_sched_t sched, uint32_t & n_outputs, uint32_t n_logits) :
        sched(sched), n_outputs(n_outputs), n_outputs_before(n_outputs) {
        n_outputs = n_logits;
    }

    ~build_scope() {
        n_outputs = n_outputs_before;
        ggml_backend_sched_reset(sched);
    }

    build_scope(const build_scope &) = delete;

private:
    ggml_backend_sched_t sched;
    uint32_t &           n_outputs;
    const uint32_t       n_outputs_before;
};

} // namespace

// Follows llama_context::graph_reserve() as far as the build. Nothing is allocated, so later plans stay as they are.
llm_graph_result * llama_context::pop_build_graph(const pop_graph_params & what,
                                                  uint32_t                 n_tokens,
                                                  uint32_t                 n_seqs,
                                                  uint32_t                 n_logits) {
    sched_reserve();
    synchronize();

    auto mctx = memory->init_full();
    if (!mctx) {
        return nullptr;
    }

    // results that refer to the scheduler's old state go with it
    ggml_backend_sched_reset(sched.get());
    for (auto & res : gf_res_prev) {
        if (res) {
            res->reset();
        }
    }
    gf_res_prev_active = nullptr;

    const uint32_t n_seq_tokens = std::max(1u, n_tokens / n_seqs);

    llama_batch_allocr balloc(model.hparams.n_pos_per_embd());
    llama_ubatch       ubatch = balloc.ubatch_reserve(n_seq_tokens, n_seqs);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &ubatch.seq_id_unq[i / n_seq_tokens];
    }

    const build_scope scope(sched.get(), n_outputs, n_logits);

    auto * res = gf_res_reserve.get();
    res->reset();
    auto params = graph_params(res, ubatch, mctx.get(), LLM_GRAPH_TYPE_DEFAULT);
    params.pop  = what;
    model.build_graph(params);

    return res;
}

// A graph that is used again keeps the callback that the scheduler has, so the scheduler gets the new one at once.
void llama_context::pop_set_eval_callback(ggml_backend_sched_eval_callback callback, void * data) {
    cparams.cb_eval           = callback;
    cparams.cb_eval_user_data = data;
    if (sched) {
        synchronize();
        ggml_backend_sched_set_eval_callback(sched.get(), callback, data);
    }
}

// Builds the graphs that prefill would build at this boundary. A context that runs the whole model prunes nothing, so
// any boundary is fine there.
bool llama_context::pop_try_boundary(uint32_t boundary) {
    if (pop.needs_whole_model(cparams)) {
        return true;
    }
    const uint32_t n_seqs   = cparams.n_seq_max;
    const uint32_t n_tokens = std::max(n_seqs, std::min(cparams.n_ctx, cparams.n_ubatch));

    pop_graph_params pruned = { POP_PRUNED, boundary };
    pruned.adapter          = pop.adapter_for(POP_PRUNED, boundary);
    const auto * res        = pop_build_graph(pruned, n_tokens, n_seqs, 0);
    if (!res || !res->pop_rewritten) {
        return false;
    }

    bool continues = pop_memory::supports_continuation(*memory);
    if (continues) {
        pop_reserve_states(boundary);
        pruned.n_rows = 1;
        pruned.states = pop.states;

        const pop_graph_params continuation = { POP_CONTINUATION, boundary, 0, 0, pop.states };
        continues                           = pop_build_graph(pruned, n_tokens, n_seqs, 0)->pop_rewritten &&
                                              pop_build_graph(continuation, n_seqs, n_seqs, n_seqs)->pop_rewritten;
    }
    pop.tried[boundary] = continues;
    pop_try_completion(boundary);
    return true;
}

// Builds the graphs of a chunk, also of one that a token joins, and those that keep states for it.
void llama_context::pop_try_completion(uint32_t boundary) {
    if (!pop.completion) {
        return;
    }
    const uint32_t n_seqs   = cparams.n_seq_max;
    const uint32_t n_tokens = std::max(n_seqs, std::min(cparams.n_ctx, cparams.n_ubatch));

    pop_graph_params chunk = { POP_CONTINUATION, boundary };
    pop_graph_params whole = { POP_WHOLE, boundary };
    chunk.completion = whole.completion = pop.completion->states;
    whole.keeps                         = boundary;
    pop_graph_params pruned             = whole;
    pruned.part                         = POP_PRUNED;

    const auto works = [&](const pop_graph_params & what, uint32_t n) {
        const auto * res = pop_build_graph(what, n, n_seqs, 0);
        return res && res->pop_rewritten;
    };
    auto & at   = pop.completion->works_at[boundary];
    at.chunks   = works(chunk, n_tokens) && works(chunk, n_seqs) && works(whole, n_seqs) && works(pruned, n_tokens);
    pruned.part = POP_BELOW;
    if (at.chunks && works(pruned, n_seqs)) {
        const auto * res = pop_build_graph(chunk, n_tokens, n_seqs, 1);
        at.joins         = res->pop_rewritten && res->t_logits->ne[1] == 1; // some builders compute those of all tokens
    }
}

// With GGML_TYPE_COUNT no states are kept. The new reservation also drops the graphs that refer to the old states.
void llama_context::pop_set_completion(ggml_type type) {
    synchronize();
    sched_need_reserve = true;
    if (type == GGML_TYPE_COUNT) {
        pop.completion.reset();
        return;
    }
    const uint32_t il   = pop.boundary ? pop.boundary : model.hparams.n_layer() - 1;
    auto *         buft = ggml_backend_dev_buffer_type(model.dev_layer(il));

    pop.completion        = std::make_unique<pop_completion>(*memory, model, type, buft);
    pop.lossless_boundary = pop_lossless_boundary(model);
    for (const auto & tried : pop.tried) {
        pop_try_completion(tried.first);
    }
    sched_need_reserve = true; // with the states
    LLAMA_LOG_INFO("%s: %.1f MiB for the states that pruned tokens are completed from\n", __func__,
                   ggml_nbytes(pop.completion->states) / 1024.0 / 1024.0);
}

// A copy of a sequence into another stream, which is pending until then, also copies marks.
pop_completion & llama_context::pop_updated_completion() {
    memory_update(false);
    return *pop.completion;
}

// The states lie on the device of the first boundary's layer. At another boundary the scheduler copies what has to
// cross.
void llama_context::pop_reserve_states(uint32_t boundary) {
    if (pop.states) {
        return;
    }
    auto *        buft     = ggml_backend_dev_buffer_type(model.dev_layer(boundary));
    const int64_t n_values = pop_state_size(model.arch, model.hparams);
    const int64_t n_rows   = std::max(cparams.n_ubatch, cparams.n_seq_max); // at least one token of each sequence

    pop.ctx_states.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    auto * states = ggml_new_tensor_2d(pop.ctx_states.get(), GGML_TYPE_F32, n_values, n_rows);
    ggml_set_name(states, "pop_states");
    pop.buf_states.reset(ggml_backend_alloc_ctx_tensors_from_buft(pop.ctx_states.get(), buft));
    if (!pop.buf_states) {
        throw std::runtime_error("no memory for the states at the boundary");
    }
    pop.states = states;
}

// A model's adapters count when the number of graph nodes is reserved, so a new one needs a new reservation.
bool llama_context::pop_add_adapter(llama_adapter_lora * adapter) {
    const uint32_t b      = pop_adapter_boundary(*adapter);
    const auto     before = pop.adapters;

    pop.adapters[b]    = adapter;
    sched_need_reserve = true;
    try {
        if (pop.needs_whole_model(cparams) || pop_try_boundary(b)) {
            return true;
        }
    } catch (...) {
        pop.adapters = before;
        throw;
    }
    pop.adapters = before;
    return false;
}
