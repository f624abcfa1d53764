// The C functions of llama-pop.h. They check what callers pass and let no exception out; the work is done elsewhere.

#include "llama-pop.h"

#include "llama-adapter.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"
#include "pop-adapter.h"
#include "pop-api.h"
#include "pop-context.h"
#include "pop-graph.h"
#include "pop-model.h"
#include "pop-products.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

using namespace pop_api;

static thread_local std::string last_error;

// A reason may have texts of a file in it.
bool pop_api::refuse(const char * why) {
    try {
        last_error = why;
        std::replace_if(last_error.begin(), last_error.end(), [](unsigned char c) { return c < ' '; }, ' ');
    } catch (...) {
        last_error.clear(); // no memory for the reason
    }
    return false;
}

static int32_t n_layer_of(const llama_context * ctx) {
    return pop_n_layer(*llama_get_model(ctx));
}

//
// set one thing
//

static bool set_boundary(llama_context * ctx, int32_t boundary) {
    const llama_model & model = *llama_get_model(ctx);
    if (boundary == LLAMA_POP_OFF || boundary == pop_n_layer(model)) {
        ctx->pop.boundary = 0;
        return true;
    }
    const std::string why = pop_refusal(model, boundary);
    if (!why.empty()) {
        return refuse(why);
    }
    if (!has_memory(ctx)) {
        return false;
    }
    if (ctx->pop.tried.count(boundary) == 0 && !ctx->pop_try_boundary(boundary)) {
        return refuse("layer " + std::to_string(boundary) +
                      " of this architecture cannot be a boundary: more than the "
                      "residual stream passes between its layers");
    }
    ctx->pop.boundary = boundary;
    return true;
}

static bool set_ends(llama_context * ctx, int32_t n_head, int32_t n_tail) {
    if (n_head < 0 || n_tail < 1) {
        return refuse("a head of " + std::to_string(n_head) + " and a tail of " + std::to_string(n_tail) +
                      " tokens: give at least 0 and at least 1");
    }
    ctx->pop.n_head = n_head;
    ctx->pop.n_tail = n_tail;
    return true;
}

static llama_adapter_lora * load_adapter(llama_model & model, const char * path) {
    std::string why;
    auto *      adapter = pop_load_adapter(model, path, why);
    if (!adapter) {
        refuse(why);
    }
    return adapter;
}

static bool add_adapter(llama_context * ctx, llama_adapter_lora * adapter) {
    if (pop_adapter_boundary(*adapter) == 0 || adapter->model != llama_get_model(ctx)) {
        return refuse("this is no adapter that llama_pop_adapter_init() made for this context's model");
    }
    return has_memory(ctx) &&
           (ctx->pop_add_adapter(adapter) || refuse("this architecture's graph has no place for fitted projections"));
}

bool llama_pop_set_boundary(llama_context * ctx, int32_t boundary) {
    return guarded(false, [&] { return given(ctx) && set_boundary(ctx, boundary); });
}

int32_t llama_pop_get_boundary(const llama_context * ctx) {
    return guarded(0, [&] {
        if (!given(ctx)) {
            return 0;
        }
        return ctx->pop.boundary ? (int32_t) ctx->pop.boundary : n_layer_of(ctx);
    });
}

bool llama_pop_set_ends(llama_context * ctx, int32_t n_head, int32_t n_tail) {
    return guarded(false, [&] { return given(ctx) && set_ends(ctx, n_head, n_tail); });
}

bool llama_pop_set_sequence(llama_context * ctx, llama_seq_id seq_id, bool prunes) {
    return guarded(false, [&] {
        if (!given(ctx) || !in_range("seq_id", seq_id, 0, (int32_t) llama_n_seq_max(ctx) - 1)) {
            return false;
        }
        if (prunes) {
            ctx->pop.whole_seqs.erase(seq_id);
        } else {
            ctx->pop.whole_seqs.insert(seq_id);
        }
        return true;
    });
}

bool llama_pop_set_continuation(llama_context * ctx, bool continues) {
    if (!given(ctx)) {
        return false;
    }
    ctx->pop.continuation = continues;
    return true;
}

bool llama_pop_set_kernels(llama_context * ctx, bool enabled) {
    if (!given(ctx)) {
        return false;
    }
    ctx->pop.kernels = enabled;
    return true;
}

bool llama_pop_continues(const llama_context * ctx) {
    return given(ctx) && ctx->pop.continues();
}

llama_adapter_lora * llama_pop_adapter_init(llama_model * model, const char * path) {
    return guarded<llama_adapter_lora *>(nullptr,
                                         [&] { return given(model, path) ? load_adapter(*model, path) : nullptr; });
}

int32_t llama_pop_adapter_boundary(const llama_adapter_lora * adapter) {
    return guarded(0, [&] { return given(adapter) ? (int32_t) pop_adapter_boundary(*adapter) : 0; });
}

bool llama_pop_add_adapter(llama_context * ctx, llama_adapter_lora * adapter) {
    return guarded(false, [&] { return given(ctx, adapter) && add_adapter(ctx, adapter); });
}

bool llama_pop_clear_adapters(llama_context * ctx) {
    if (!given(ctx)) {
        return false;
    }
    ctx->pop.adapters.clear();
    return true;
}

uint64_t llama_pop_fingerprint(const llama_model * model) {
    return guarded<uint64_t>(0, [&] { return given(model) ? pop_fingerprint(*model) : 0; });
}

//
// open
//

int32_t llama_pop_adapter_path(const char * path_model, int32_t boundary, char * buf, size_t n) {
    return guarded(-1, [&] {
        if (!given(path_model) || (n > 0 && !given(buf)) || !in_range("boundary", boundary, 1, INT32_MAX)) {
            return -1;
        }
        if (*path_model == '\0') {
            refuse("the path of the model is empty");
            return -1;
        }
        return snprintf(buf, n, "%s", pop_adapter_path(path_model, boundary).c_str());
    });
}

static bool load_adapter_beside(llama_context * ctx, const char * path_model, llama_pop_choice & choice) {
    const std::string path = pop_adapter_path(path_model, choice.boundary);
    std::error_code   none; // such as a name that is too long
    if (!std::filesystem::is_regular_file(std::filesystem::u8path(path), none)) {
        return true;
    }
    auto & model = const_cast<llama_model &>(*llama_get_model(ctx));
    std::unique_ptr<llama_adapter_lora, decltype(&pop_free_adapter)> adapter(load_adapter(model, path.c_str()),
                                                                             pop_free_adapter);
    if (!adapter) {
        return false;
    }
    const auto boundary = (int32_t) pop_adapter_boundary(*adapter);
    if (boundary != choice.boundary) {
        return refuse(path + ": it was fitted for boundary " + std::to_string(boundary) +
                      ", which its name has to say");
    }
    if (!add_adapter(ctx, adapter.get())) {
        return refuse(path + ": " + last_error);
    }
    adapter.release(); // the model owns it
    choice.has_adapter = true;
    return true;
}

static bool open_context(llama_context *           ctx,
                         const llama_pop_request & request,
                         const char *              path_model,
                         llama_pop_choice &        choice) {
    std::string why;
    if (!pop_choose(*llama_get_model(ctx), request, (int32_t) llama_n_batch(ctx), choice, why)) {
        return refuse(why);
    }
    return set_boundary(ctx, choice.boundary) && set_ends(ctx, choice.n_head, choice.n_tail) &&
           (!path_model || choice.boundary == n_layer_of(ctx) || load_adapter_beside(ctx, path_model, choice));
}

bool llama_pop_open(llama_context *    ctx,
                    llama_pop_request  request,
                    const char *       path_model,
                    llama_pop_choice * choice) {
    return guarded(false, [&] {
        if (!given(ctx, choice)) {
            return false;
        }
        const pop_settings before = ctx->pop;
        llama_pop_choice   chosen = {};
        const bool         done   = guarded(false, [&] { return open_context(ctx, request, path_model, chosen); });
        if (done) {
            *choice = chosen;
        } else {
            static_cast<pop_settings &>(ctx->pop) = before;
        }
        return done;
    });
}

//
// ask
//

int32_t llama_pop_n_layer(const llama_model * model) {
    return given(model) ? pop_n_layer(*model) : 0;
}

int32_t llama_pop_lossless_boundary(const llama_model * model) {
    return given(model) ? pop_lossless_boundary(*model) : 0;
}

bool llama_pop_supports(const llama_model * model, int32_t boundary) {
    return guarded(false, [&] {
        if (!given(model)) {
            return false;
        }
        const std::string why = pop_refusal(*model, boundary);
        return why.empty() || refuse(why);
    });
}

uint64_t llama_pop_n_pruned(const llama_context * ctx) {
    return given(ctx) ? ctx->pop.n_pruned : 0;
}

uint64_t llama_pop_n_pruned_in(const llama_context * ctx, llama_seq_id seq_id) {
    if (!given(ctx)) {
        return 0;
    }
    const auto it = ctx->pop.n_pruned_in.find(seq_id);
    return it == ctx->pop.n_pruned_in.end() ? 0 : it->second;
}

int64_t llama_pop_plan_us(const llama_context * ctx) {
    return given(ctx) ? ctx->pop.t_plan_us : 0;
}

double llama_pop_graph_flops(
    llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs) {
    return guarded((double) NAN, [&]() -> double {
        if (!given(ctx) || !has_memory(ctx) || !in_range("boundary", boundary, 1, n_layer_of(ctx)) ||
            !in_range("n_seqs", n_seqs, 1, (int32_t) llama_n_seq_max(ctx)) ||
            !in_range("n_tokens", n_tokens, n_seqs, (int32_t) llama_n_ubatch(ctx)) ||
            !in_range("n_outputs", n_outputs, 0, n_tokens)) {
            return NAN;
        }
        const bool whole =
            boundary == n_layer_of(ctx) || n_outputs > 0 || ctx->pop.needs_whole_model(ctx->get_cparams());

        pop_graph_params what = { whole ? POP_WHOLE : POP_PRUNED, (uint32_t) boundary };
        what.adapter          = ctx->pop.adapter_for(what.part, boundary);

        const auto * res = ctx->pop_build_graph(what, n_tokens, n_seqs, n_outputs);
        if (!res) {
            refuse("there is no memory for this graph");
            return NAN;
        }
        return pop_flops(res->get_gf());
    });
}

//
// observe
//

struct llama_pop_observer : pop_product_observer {
    using pop_product_observer::pop_product_observer;
};

static llama_pop_observer * make_observer(llama_context * ctx, int32_t boundary) {
    const uint32_t n_tokens = std::min(llama_n_ctx(ctx), llama_n_ubatch(ctx));
    const auto *   res      = ctx->pop_build_graph({ POP_PRUNED, (uint32_t) boundary }, n_tokens, 1, 0);
    if (!res || !res->pop_rewritten) {
        refuse("layer " + std::to_string(boundary) + " of this model cannot be a boundary");
        return nullptr;
    }
    return new llama_pop_observer(pop_product_weights(*llama_get_model(ctx), res->get_gf(), boundary));
}

llama_pop_observer * llama_pop_observer_init(llama_context * ctx, int32_t boundary) {
    return guarded<llama_pop_observer *>(nullptr, [&]() -> llama_pop_observer * {
        const bool usable = given(ctx) && has_memory(ctx) && in_range("boundary", boundary, 1, n_layer_of(ctx) - 1);
        return usable ? make_observer(ctx, boundary) : nullptr;
    });
}

bool llama_pop_observer_add(llama_pop_observer * observer, const char * weight) {
    return guarded(false, [&] {
        if (!given(observer, weight)) {
            return false;
        }
        observer->add(weight);
        return true;
    });
}

bool llama_pop_observer_free(llama_pop_observer * observer) {
    const bool done = given(observer);
    delete observer;
    return done;
}

bool llama_pop_observe(llama_context * ctx, llama_pop_observer * observer) {
    return guarded(false, [&] {
        if (!given(ctx)) {
            return false;
        }
        const auto callback = [](ggml_tensor * t, bool ask, void * data) {
            return ((llama_pop_observer *) data)->observe(t, ask);
        };
        ctx->pop_set_eval_callback(observer ? +callback : nullptr, observer);
        return true;
    });
}

const char * llama_pop_observer_weight(const llama_pop_observer * observer, int32_t i) {
    return given(observer) && i >= 0 && i < (int32_t) observer->weights.size() ? observer->weights[i].c_str() : nullptr;
}

bool llama_pop_observer_get(const llama_pop_observer * observer, const char * weight, llama_pop_product * product) {
    return guarded(false, [&] {
        if (!given(observer, weight, product)) {
            return false;
        }
        const auto it = observer->products.find(weight);
        if (it == observer->products.end() || it->second.n_tokens == 0) {
            return refuse(std::string(weight) + " was not evaluated");
        }
        const pop_product & p = it->second;
        *product              = { p.input.data(), p.output.data(), p.n_in, p.n_out, p.n_tokens };
        return true;
    });
}

bool llama_pop_observer_clear(llama_pop_observer * observer) {
    return guarded(false, [&] {
        if (!given(observer)) {
            return false;
        }
        observer->clear();
        return true;
    });
}

const char * llama_pop_last_error(void) {
    return last_error.c_str();
}
