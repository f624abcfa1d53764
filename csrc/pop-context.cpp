#include "pop-context.h"
#include "pop-adapter.h"
#include "pop-graph.h"
#include "pop-memory.h"
#include "pop-plan.h"
#include "llama-pop.h"

#include "llama-adapter.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

// these contexts read something of every token from every layer, or run other layers than the trunk's
static bool needs_whole_model(const llama_cparams & cparams) {
    return cparams.embeddings || cparams.embeddings_nextn || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT ||
           std::find(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true) !=
               cparams.embeddings_layer_inp.end();
}

bool llama_pop_context::mixes() const {
    const auto it = proven.find(boundary);
    return continues && it != proven.end() && it->second;
}

llama_adapter_lora * llama_pop_context::adapter_for(llama_pop_part part, uint32_t b) const {
    const auto it = adapters.find(b);
    return part == LLAMA_POP_PRUNED && it != adapters.end() ? it->second : nullptr;
}

void llama_pop_context::begin(const llama_cparams & cparams, llama_pop_batch & batch) const {
    // a non-causal batch has to stay in one piece
    batch.prunes = boundary != 0 && cparams.causal_attn && !needs_whole_model(cparams);
    batch.mixes  = batch.prunes && mixes();
    batch.n_head = n_head;
    batch.n_tail = n_tail;
    batch.whole  = whole;
}

llama_pop_graph llama_pop_context::graph(const llama_cparams & cparams, llm_graph_type gtype, const llama_ubatch & ubatch) const {
    llama_pop_graph res;
    if (boundary == 0 || !ubatch.data || gtype != LLM_GRAPH_TYPE_DEFAULT || needs_whole_model(cparams)) {
        return res;
    }
    const auto & label = ubatch.data->pop;
    // where no states were kept, the pruned pass was left whole, and so is what follows it
    if (label.part == LLAMA_POP_PRUNED || (label.part == LLAMA_POP_CONTINUED && states_kept)) {
        res = { label.part, boundary, (uint32_t) label.rows.size(), label.first, states, adapter_for(label.part, boundary) };
    }
    return res;
}

void llama_pop_context::done(const llama_ubatch & ubatch, const llm_graph_result & res) {
    const auto & label = ubatch.data->pop;
    if (label.part == LLAMA_POP_PRUNED) {
        states_kept = res.pop_rewritten && !label.rows.empty();
        if (res.pop_rewritten) {
            n_tokens_pruned += ubatch.n_tokens - label.rows.size();
            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                ++n_tokens_pruned_in[ubatch.seq_id[i][0]];
            }
            for (const int32_t i : label.rows) {
                --n_tokens_pruned_in[ubatch.seq_id[i][0]];
            }
        }
    }
}

// Follows llama_context::graph_reserve() as far as the build; nothing is allocated, so later plans stay as they are.
llm_graph_result * llama_context::pop_build_graph(
        const llama_pop_graph & what, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs) {
    sched_reserve();
    synchronize();

    auto mctx = memory->init_full();
    if (!mctx) {
        return nullptr;
    }

    // builders pin tensors in the scheduler; results that refer to its old state go with it
    ggml_backend_sched_reset(sched.get());
    for (auto & res : gf_res_prev) {
        if (res) {
            res->reset();
        }
    }
    gf_res_prev_active = nullptr;

    const uint32_t n_seq_tokens = std::max(1u, n_tokens / n_seqs);

    llama_batch_allocr balloc(model.hparams.n_pos_per_embd());
    llama_ubatch ubatch = balloc.ubatch_reserve(n_seq_tokens, n_seqs);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id  [i] = &ubatch.seq_id_unq[i / n_seq_tokens];
    }

    const auto saved = this->n_outputs;
    this->n_outputs = n_outputs;

    auto * res = gf_res_reserve.get();
    res->reset();
    auto params = graph_params(res, ubatch, mctx.get(), LLM_GRAPH_TYPE_DEFAULT);
    params.pop = what;
    model.build_graph(params);

    this->n_outputs = saved;
    ggml_backend_sched_reset(sched.get());

    return res;
}

// Builds what prefill would build there. A context that runs the whole model prunes nothing, which is fine.
bool llama_context::pop_try_boundary(uint32_t boundary) {
    if (needs_whole_model(cparams)) {
        return true;
    }
    const uint32_t n_seqs   = cparams.n_seq_max;
    const uint32_t n_tokens = std::max(n_seqs, std::min(cparams.n_ctx, cparams.n_ubatch));

    llama_pop_graph pruned = { LLAMA_POP_PRUNED, boundary };
    pruned.adapter = pop.adapter_for(LLAMA_POP_PRUNED, boundary);
    const auto * res = pop_build_graph(pruned, n_tokens, n_seqs, 0);
    if (!res || !res->pop_rewritten) {
        return false;
    }

    bool continues = llama_pop_memory::continues(*memory);
    if (continues) {
        pop_reserve_states(boundary);
        pruned.n_rows = 1;
        pruned.states = pop.states;
        continues = pop_build_graph(pruned, n_tokens, n_seqs, 0)->pop_rewritten &&
                    pop_build_graph({ LLAMA_POP_CONTINUED, boundary, 0, 0, pop.states }, n_seqs, n_seqs, n_seqs)->pop_rewritten;
    }
    pop.proven[boundary] = continues;
    return true;
}

// on the device of the boundary layer; at another boundary the scheduler copies what has to cross
void llama_context::pop_reserve_states(uint32_t boundary) {
    if (pop.states) {
        return;
    }
    auto * buft = ggml_backend_dev_buffer_type(model.dev_layer(boundary));

    pop.ctx_states.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
    auto * states = ggml_new_tensor_2d(pop.ctx_states.get(), GGML_TYPE_F32, model.hparams.n_embd,
                                        std::max(cparams.n_ubatch, cparams.n_seq_max)); // a token of each sequence at least
    ggml_set_name(states, "pop_states");
    pop.buf_states.reset(ggml_backend_alloc_ctx_tensors_from_buft(pop.ctx_states.get(), buft));
    if (!pop.buf_states) {
        throw std::runtime_error("no memory for the states at the boundary");
    }
    pop.states = states;
}

// the node budget counts a model's adapters when it is reserved
bool llama_context::pop_add_adapter(llama_adapter_lora * adapter) {
    const uint32_t b      = pop_adapter_boundary(*adapter);
    const auto     before = pop.adapters;
    pop.adapters[b] = adapter;
    sched_need_reserve = true;
    if (needs_whole_model(cparams) || pop_try_boundary(b)) {
        return true;
    }
    pop.adapters = before;
    return false;
}

//
// C API
//

static thread_local std::string last_error;

// in one line, whatever texts of a file are in it
static bool refuse(const std::string & why) {
    last_error = why;
    std::replace_if(last_error.begin(), last_error.end(), [](unsigned char c) { return c < ' '; }, ' ');
    return false;
}

bool llama_pop_supports(const llama_model * model, int32_t boundary) {
    const std::string why = pop_refusal(*model, boundary);
    return why.empty() || refuse(why);
}

bool llama_pop_set_boundary(llama_context * ctx, int32_t boundary) {
    const llama_model & model   = *llama_get_model(ctx);
    const int32_t       n_layer = pop_n_layer(model);

    if (boundary == LLAMA_POP_FROM_FILE) {
        std::string why;
        pop_file    file;
        if (!pop_read_file(model, file, why)) {
            return refuse(why);
        }
        if (!llama_pop_set_boundary(ctx, file.boundary)) {
            return false;
        }
        return llama_pop_set_ends(ctx, file.head, file.tail);
    }
    if (boundary == LLAMA_POP_OFF || boundary == n_layer) {
        ctx->pop.boundary = 0;
        return true;
    }
    if (!llama_pop_supports(&model, boundary)) {
        return false;
    }
    if (!llama_get_memory(ctx)) {
        return refuse("this context has no cache to fill: there is no prefill to prune");
    }

    try {
        if (ctx->pop.proven.count(boundary) == 0 && !ctx->pop_try_boundary(boundary)) {
            return refuse("layer " + std::to_string(boundary) + " of this architecture cannot be a boundary: more than "
                          "the residual stream passes between its layers");
        }
    } catch (const std::exception & e) {
        return refuse(std::string("the pruned graph could not be built: ") + e.what());
    }

    ctx->pop.boundary = boundary;
    return true;
}

uint64_t llama_pop_fingerprint(const llama_model * model) {
    return pop_fingerprint(*model);
}

llama_adapter_lora * llama_pop_adapter_init(llama_model * model, const char * path) {
    std::string why;
    auto * adapter = pop_load_adapter(*model, path, why);
    if (!adapter) {
        refuse(why);
    }
    return adapter;
}

int32_t llama_pop_adapter_boundary(const llama_adapter_lora * adapter) {
    return pop_adapter_boundary(*adapter);
}

bool llama_pop_add_adapter(llama_context * ctx, llama_adapter_lora * adapter) {
    if (pop_adapter_boundary(*adapter) == 0 || adapter->model != llama_get_model(ctx)) {
        return refuse("this is no adapter that llama_pop_adapter_init() made for this context's model");
    }
    try {
        return ctx->pop_add_adapter(adapter) || refuse("this architecture's graph has no place for fitted projections");
    } catch (const std::exception & e) {
        return refuse(std::string("the pruned graph could not be built: ") + e.what());
    }
}

void llama_pop_clear_adapters(llama_context * ctx) {
    ctx->pop.adapters.clear();
}

int32_t llama_pop_get_boundary(const llama_context * ctx) {
    return ctx->pop.boundary ? (int32_t) ctx->pop.boundary : pop_n_layer(*llama_get_model(ctx));
}

bool llama_pop_set_ends(llama_context * ctx, int32_t n_head, int32_t n_tail) {
    if (n_head < 0 || n_tail < 1) {
        return refuse("a head of " + std::to_string(n_head) + " and a tail of " + std::to_string(n_tail) +
                      " tokens: give at least 0 and at least 1");
    }
    ctx->pop.n_head = n_head;
    ctx->pop.n_tail = n_tail;
    return true;
}

void llama_pop_set_sequence(llama_context * ctx, llama_seq_id seq_id, bool prunes) {
    if (prunes) {
        ctx->pop.whole.erase(seq_id);
    } else {
        ctx->pop.whole.insert(seq_id);
    }
}

void llama_pop_set_continuation(llama_context * ctx, bool continues) {
    ctx->pop.continues = continues;
}

bool llama_pop_continues(const llama_context * ctx) {
    return ctx->pop.mixes();
}

int64_t llama_pop_plan_us(const llama_context * ctx) {
    return ctx->pop.t_plan_us;
}

uint64_t llama_pop_n_pruned(const llama_context * ctx) {
    return ctx->pop.n_tokens_pruned;
}

uint64_t llama_pop_n_pruned_in(const llama_context * ctx, llama_seq_id seq_id) {
    const auto it = ctx->pop.n_tokens_pruned_in.find(seq_id);
    return it == ctx->pop.n_tokens_pruned_in.end() ? 0 : it->second;
}

double llama_pop_graph_flops(llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs) {
    const bool whole = boundary == pop_n_layer(*llama_get_model(ctx)) || n_outputs > 0;
    llama_pop_graph what = { whole ? LLAMA_POP_WHOLE : LLAMA_POP_PRUNED, (uint32_t) boundary };
    what.adapter = ctx->pop.adapter_for(what.part, boundary);
    auto * res = ctx->pop_build_graph(what, n_tokens, n_seqs, n_outputs);
    return res ? pop_flops(res->get_gf()) : 0.0;
}

int32_t llama_pop_n_layer(const llama_model * model) {
    return pop_n_layer(*model);
}

int32_t llama_pop_lossless_boundary(const llama_model * model) {
    return pop_lossless_boundary(*model);
}

int32_t llama_pop_min_tokens(const llama_model * model) {
    std::string why;
    pop_file    file;
    return pop_read_file(*model, file, why) ? file.min_tokens : 0;
}

const char * llama_pop_last_error(void) {
    return last_error.c_str();
}
