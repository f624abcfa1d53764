#include "pop-context.h"
#include "pop-graph.h"
#include "pop-plan.h"
#include "llama-pop.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>
#include <string>

// these contexts read something of every token from every layer, or run other layers than the trunk's
static bool needs_whole_model(const llama_cparams & cparams) {
    return cparams.embeddings || cparams.embeddings_nextn || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT ||
           std::find(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true) !=
               cparams.embeddings_layer_inp.end();
}

bool llama_pop_context::splits_batches(const llama_cparams & cparams) const {
    return boundary != 0 && cparams.causal_attn && !needs_whole_model(cparams);
}

uint32_t llama_pop_context::graph_boundary(const llama_cparams & cparams, llm_graph_type gtype, uint32_t n_outputs) const {
    return n_outputs == 0 && gtype == LLM_GRAPH_TYPE_DEFAULT && !needs_whole_model(cparams) ? boundary : 0;
}

// Follows llama_context::graph_reserve() as far as the build; nothing is allocated, so later plans stay as they are.
llm_graph_result * llama_context::pop_build_graph(uint32_t boundary, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs) {
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

    const auto saved_outputs  = this->n_outputs;
    const auto saved_boundary = pop.boundary;

    this->n_outputs = n_outputs;
    pop.boundary    = boundary;

    auto * res = gf_res_reserve.get();
    res->reset();
    model.build_graph(graph_params(res, ubatch, mctx.get(), LLM_GRAPH_TYPE_DEFAULT));

    this->n_outputs = saved_outputs;
    pop.boundary    = saved_boundary;
    ggml_backend_sched_reset(sched.get());

    return res;
}

// builds what prefill would build there; a context that runs the whole model prunes nothing, which is fine
bool llama_context::pop_try_boundary(uint32_t boundary) {
    if (needs_whole_model(cparams)) {
        return true;
    }
    const auto * res = pop_build_graph(boundary, std::min(cparams.n_ctx, cparams.n_ubatch), cparams.n_seq_max, 0);
    return res && res->pop_pruned;
}

//
// C API
//

static thread_local std::string last_error;

static bool refuse(const std::string & why) {
    last_error = why;
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
        boundary = pop_boundary_of_file(model, why);
        if (boundary < 0) {
            return refuse(why);
        }
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

    ctx->pop.proven.insert(boundary);
    ctx->pop.boundary = boundary;
    return true;
}

int32_t llama_pop_get_boundary(const llama_context * ctx) {
    return ctx->pop.boundary ? (int32_t) ctx->pop.boundary : pop_n_layer(*llama_get_model(ctx));
}

uint64_t llama_pop_n_pruned(const llama_context * ctx) {
    return ctx->pop.n_tokens_pruned;
}

double llama_pop_graph_flops(llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs) {
    const uint32_t b = boundary == pop_n_layer(*llama_get_model(ctx)) ? 0 : boundary;
    auto * res = ctx->pop_build_graph(b, n_tokens, n_seqs, n_outputs);
    return res ? pop_flops(res->get_gf()) : 0.0;
}

int32_t llama_pop_n_layer(const llama_model * model) {
    return pop_n_layer(*model);
}

int32_t llama_pop_lossless_boundary(const llama_model * model) {
    return pop_lossless_boundary(*model);
}

const char * llama_pop_last_error(void) {
    return last_error.c_str();
}
