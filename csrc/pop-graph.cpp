#include "pop-graph.h"
#include "pop-adapter.h"
#include "pop-graph-inputs.h"
#include "pop-model.h"
#include "pop-tensor-set.h"

#include "llama-adapter.h"
#include "llama-graph.h"

#include "ggml.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

// The number that a text begins with, -1 if there is none. The text goes on at rest. All names of all graphs are read,
// for which sscanf() is too slow.
static int leading_number(const char * text, char *& rest) {
    const long n = strtol(text, &rest, 10);
    return rest == text ? -1 : n;
}

// The layer of a tensor that a builder named "<name>-<il>", -1 if the name has none.
static int named_layer(const ggml_tensor * t) {
    const char * dash = strrchr(t->name, '-');
    char *       rest = nullptr;
    const int    il   = dash ? leading_number(dash + 1, rest) : -1;
    return rest && *rest == '\0' ? il : -1;
}

// Returns whether a builder gave the tensor one of the names of the state that a layer leaves to the next.
static bool is_layer_output(const ggml_tensor * t) {
    for (const char * name : { "l_out-", "l_last-", "ffn_residual-" }) {
        if (strncmp(t->name, name, strlen(name)) == 0) {
            return true;
        }
    }
    return false;
}

// The layer of a weight, -1 for any other tensor.
static int weight_layer(const ggml_tensor * t) {
    char * rest = nullptr;
    return strncmp(t->name, "blk.", 4) == 0 ? leading_number(t->name + 4, rest) : -1;
}

static bool is_view_op(const ggml_tensor * t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

// Returns whether the result lies in the memory of another tensor, which is thereby changed.
static bool is_in_place(const ggml_tensor * t) {
    return t->view_src && t->op != GGML_OP_NONE && !is_view_op(t);
}

// The tensor that owns the memory of t.
static ggml_tensor * owner(ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

namespace {

// plan_*() finds out what remains and changes no node, so it may fail at no cost. apply() then rewrites the graph.
struct rewrite {
    const llm_graph_params & params;
    const pop_graph_params & pop;

    const int      b;       // the boundary
    const uint32_t n_layer; // layers without those for multi-token prediction
    const uint32_t n_tokens;

    llm_graph_result & res;

    std::vector<ggml_tensor *> nodes; // the nodes of the whole graph, in order of evaluation

    std::unordered_map<const ggml_tensor *, ggml_tensor *> replaced; // what a node reads -> what it shall read instead
    pop_tensor_set replaced_memory;     // owners of the memory in which the replaced tensors lie
    pop_tensor_set kept;                // nodes that remain
    ggml_tensor *  keep_rows = nullptr; // a node to add
    ggml_tensor *  keep_from = nullptr; // the states to keep for completion

    std::unordered_map<const ggml_tensor *, ggml_tensor *> rows_of; // what to_rows() has made

    // An adapter may have further inputs. For each product that reads one, this is the result of the bottleneck; their
    // sum is below.
    std::unordered_map<const ggml_tensor *, ggml_tensor *> narrowed;
    ggml_tensor *                                          bottleneck = nullptr; // F32 [rank, n_tokens]

    std::vector<std::unique_ptr<llm_graph_input_i>> inputs;        // inputs to add
    std::vector<ggml_tensor *>                      ids_of_inputs; // their tensors

    rewrite(const llm_graph_params & params, llm_graph_result & res) :
        params(params), pop(params.pop), b(params.pop.boundary), n_layer(params.hparams.n_layer()),
        n_tokens(params.ubatch.n_tokens), res(res) {
        ggml_cgraph * gf = res.get_gf();
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            nodes.push_back(ggml_graph_node(gf, i));
        }
    }

    ggml_tensor * source(ggml_tensor * t) const {
        const auto it = replaced.find(t);
        return it == replaced.end() ? t : it->second;
    }

    void replace(ggml_tensor * t, ggml_tensor * by) {
        replaced[t] = by;
        replaced_memory.insert(owner(t));
    }

    // The tensors that layers 0..n_layer-1 read. Builders either record them or name what a layer leaves. A few add to
    // that before the next layer starts (deepstack does); the sum has the same layer's number.
    std::vector<ggml_tensor *> layer_inputs() const {
        std::vector<ggml_tensor *> x(n_layer + 1, nullptr);
        for (ggml_tensor * node : nodes) {
            const int il = named_layer(node);
            if (il < 0 || il >= (int) n_layer) {
                continue;
            }
            ggml_tensor *& next = x[il + 1];
            const bool     adds_to_output =
                next && std::find(node->src, node->src + GGML_MAX_SRC, next) != node->src + GGML_MAX_SRC;
            if (is_layer_output(node) || adds_to_output) {
                next = node;
            }
        }
        for (uint32_t il = 0; il < n_layer; ++il) {
            if (ggml_tensor * recorded = res.get_layer_inp(il)) {
                x[il] = recorded;
            }
        }
        return x;
    }

    // Adds t and whatever it needs to seen, but does not go beyond the tensors in stop.
    void reach(ggml_tensor * t, pop_tensor_set & seen, const pop_tensor_set & stop = {}) const {
        std::vector<ggml_tensor *> todo = { t };
        while (!todo.empty()) {
            ggml_tensor * cur = todo.back();
            todo.pop_back();
            if (stop.count(cur) || !seen.insert(cur)) {
                continue;
            }
            for (ggml_tensor * src : cur->src) {
                if (src) {
                    todo.push_back(source(src));
                }
            }
        }
    }

    // The fitted pair that belongs to the weight of a matrix product, or nullptr.
    const llama_adapter_lora_weight * fitted(const ggml_tensor * t) const {
        return pop.adapter && t->op == GGML_OP_MUL_MAT ? pop.adapter->get_weight(t->src[0]) : nullptr;
    }

    // Lets the states that the adapter has as further inputs go through its bottleneck. Each has to be computed below
    // the boundary, once for each token.
    bool plan_further(const pop_tensor_set & below) {
        const size_t n = pop.adapter ? pop_adapter_n_bottlenecks(*pop.adapter) : 0;
        if (n == 0) {
            return true;
        }
        pop_tensor_set weights;
        for (ggml_tensor * node : nodes) {
            ggml_tensor * a =
                node->op == GGML_OP_MUL_MAT ? pop_adapter_bottleneck(*pop.adapter, node->src[0]) : nullptr;
            if (!a || !weights.insert(a)) {
                continue;
            }
            ggml_tensor * x = node->src[1];
            if (!below.count(x) || !ggml_is_matrix(x) || x->ne[1] != n_tokens) {
                return false;
            }
            reach(node, kept);
            narrowed[node] = ggml_mul_mat(res.get_ctx(), a, x);
            bottleneck     = bottleneck ? ggml_add(res.get_ctx(), bottleneck, narrowed[node]) : narrowed[node];
        }
        return weights.size() == n;
    }

    // From now on, the readers of the product read what the adapter makes of it: with an adapter that replaces weights
    // the sum of A x, B and what follows from further inputs, else the sum of the product and B A x. The product itself
    // reads the state x.
    void add_fitted(ggml_tensor * product, const llama_adapter_lora_weight & w) {
        ggml_context * ctx = res.get_ctx();
        if (pop_adapter_replaces(*pop.adapter)) {
            ggml_tensor * further = pop_adapter_further(*pop.adapter, product->src[0]);
            product->src[0]       = w.a;
            replaced[product]     = ggml_add(ctx, product, w.b);
            if (further) {
                replaced[product] = ggml_add(ctx, replaced[product], ggml_mul_mat(ctx, further, bottleneck));
            }
        } else {
            ggml_tensor * low = ggml_mul_mat(ctx, w.a, product->src[1]);
            replaced[product] = ggml_add(ctx, product, ggml_mul_mat(ctx, w.b, low));
        }
    }

    bool works_on_replaced(const ggml_tensor * t) const { return is_in_place(t) && replaced_memory.count(t->view_src); }

    // Returns whether the graph can be cut before a write to memory. own holds what the write needs beyond x_b. All of
    // it has to be of one layer: a weight of a second skipped layer means that more than the residual stream passes
    // between layers.
    // No operation may work in place on a tensor that is replaced.
    bool is_cut(const pop_tensor_set & own) const {
        int il_own = -1;
        for (const ggml_tensor * t : own) {
            const int il = weight_layer(t);
            if (il >= b && il_own >= 0 && il != il_own) {
                return false;
            }
            il_own = std::max(il_own, il >= b ? il : -1);

            if (works_on_replaced(t)) {
                return false;
            }
        }
        return true;
    }

    // Returns whether this is a chunk of completion that no token with logits has joined.
    bool only_writes() const { return pop.part == POP_CONTINUATION && pop.completion && params.n_outputs == 0; }

    // Returns whether weights of layers from the boundary on are among the tensors.
    bool is_above(const pop_tensor_set & tensors) const {
        return std::any_of(tensors.begin(), tensors.end(), [&](const ggml_tensor * t) { return weight_layer(t) >= b; });
    }

    // Returns whether x holds the state of each token in a layout that to_rows() and from_rows() know: a state is one
    // vector, or it is several, and then x is [n_embd, n_tokens, vectors of a state].
    bool can_keep(const ggml_tensor * x) const {
        return x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && x->ne[0] == params.hparams.n_embd &&
               x->ne[1] == n_tokens && x->ne[0] * x->ne[2] == pop_state_size(params.arch, params.hparams) &&
               x->ne[3] == 1;
    }

    // Returns the states of x as rows, one for each token, which is how they are kept.
    ggml_tensor * to_rows(ggml_tensor * x) {
        if (ggml_is_matrix(x)) {
            return x;
        }
        ggml_tensor *& rows = rows_of[x];
        if (!rows) {
            ggml_tensor * by_token = ggml_cont(res.get_ctx(), ggml_permute(res.get_ctx(), x, 0, 2, 1, 3));
            rows                   = ggml_reshape_2d(res.get_ctx(), by_token, x->ne[0] * x->ne[2], n_tokens);
        }
        return rows;
    }

    // Returns kept states in the layout of x, so that they can replace it.
    ggml_tensor * from_rows(ggml_tensor * rows, const ggml_tensor * x) const {
        if (ggml_is_matrix(x)) {
            return rows;
        }
        ggml_tensor * by_token = ggml_reshape_3d(res.get_ctx(), rows, x->ne[0], x->ne[2], n_tokens);
        return ggml_cont(res.get_ctx(), ggml_permute(res.get_ctx(), by_token, 0, 2, 1, 3));
    }

    // An input of a type that the operation on it takes. It is added to the graph only if the plan succeeds, because
    // llama_context writes to every input that was added.
    template <typename input> ggml_tensor * new_ids(ggml_type type, int64_t n) {
        ggml_tensor * ids = ggml_new_tensor_1d(res.get_ctx(), type, n);
        ids_of_inputs.push_back(ids);
        inputs.push_back(std::make_unique<input>(ids));
        return ids;
    }

    ggml_tensor * states(uint32_t first, uint32_t n) const {
        ggml_tensor * s = pop.states;
        return ggml_view_2d(res.get_ctx(), s, s->ne[0], n, s->nb[1], first * s->nb[1]);
    }

    ggml_tensor * completion_states() {
        return ggml_get_rows(res.get_ctx(), pop.completion, new_ids<completion_rows>(GGML_TYPE_I32, n_tokens));
    }

    bool plan_pruned() {
        const auto    x   = layer_inputs();
        ggml_tensor * x_b = x[b];
        if (!x_b || (pop.n_rows > 0 && !can_keep(x_b))) {
            return false;
        }
        for (uint32_t il = b + 1; il < n_layer; ++il) {
            ggml_tensor * cur = x[il];
            if (!cur || !ggml_are_same_shape(cur, x_b) || !ggml_are_same_stride(cur, x_b) || cur->type != x_b->type) {
                return false;
            }
            if (cur != x_b) {
                replace(cur, x_b);
            }
        }

        for (const ggml_tensor * node : nodes) {
            if (fitted(node)) {
                replaced_memory.insert(node);
            }
        }

        pop_tensor_set below;
        reach(x_b, below);
        if (!plan_further(below)) {
            return false;
        }
        for (ggml_tensor * node : nodes) {
            // a write to memory that outlives the graph: a KV cache or a recurrent state
            if (!is_in_place(node) || !node->view_src->buffer || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                continue;
            }
            pop_tensor_set own;
            reach(node, own, below);
            if (!is_cut(own)) {
                return false;
            }
            if (pop.part != POP_BELOW || !is_above(own)) {
                reach(node, kept);
            }
        }

        if (pop.n_rows > 0) {
            ggml_tensor * ids  = new_ids<kept_rows>(GGML_TYPE_I32, pop.n_rows);
            ggml_tensor * rows = ggml_get_rows(res.get_ctx(), to_rows(x_b), ids);
            keep_rows          = ggml_cpy(res.get_ctx(), rows, states(0, pop.n_rows));
            reach(x_b, kept);
        }
        return true;
    }

    // Lets the graph write the states of all tokens at a boundary to the rows that completion has for them.
    bool plan_keep() {
        keep_from = layer_inputs()[pop.keeps];
        if (!keep_from || !can_keep(keep_from)) {
            return false;
        }
        if (pop.part == POP_WHOLE) {
            for (const ggml_tensor * node : nodes) {
                kept.insert(node);
            }
        } else {
            reach(keep_from, kept);
        }
        return true;
    }

    // Keeps the results that follow from x_b and drops what the pruned pass has done. No layer below may be needed for
    // them. The only results of a chunk without outputs are its writes to memory.
    bool plan_continued() {
        ggml_tensor * x_b = layer_inputs()[b];
        if (!x_b || !can_keep(x_b)) {
            return false;
        }
        pop_tensor_set above; // nodes that follow from x_b
        pop_tensor_set read;  // those of them that another one reads
        for (auto it = std::find(nodes.begin(), nodes.end(), x_b); it != nodes.end(); ++it) {
            for (ggml_tensor * src : (*it)->src) {
                if (src && (src == x_b || above.count(src))) {
                    above.insert(*it);
                    read.insert(src);
                }
            }
        }

        replace(x_b, from_rows(pop.completion ? completion_states() : states(pop.first_state, n_tokens), x_b));
        for (ggml_tensor * node : nodes) {
            const bool result = only_writes() ? is_in_place(node) && node->view_src->buffer : read.count(node) == 0;
            if (above.count(node) && result && (node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                reach(node, kept);
            }
        }
        for (const ggml_tensor * t : kept) {
            if ((weight_layer(t) >= 0 && weight_layer(t) < b) || works_on_replaced(t)) {
                return false;
            }
        }
        return true;
    }

    bool plan() {
        const bool planned = pop.part == POP_WHOLE          ? true
                             : pop.part == POP_CONTINUATION ? plan_continued()
                                                            : plan_pruned();
        return planned && (pop.keeps == 0 || plan_keep());
    }

    // The order of nodes matters beyond what they read: a read of a recurrent state has to stay ahead of the write to
    // it. So the kept nodes keep their order instead of being expanded anew from the roots.
    void apply() {
        std::unordered_map<const ggml_tensor *, size_t> moved; // views now in other memory -> their old offset
        for (ggml_tensor * node : nodes) {
            if (!kept.count(node)) {
                continue;
            }
            if (is_view_op(node)) {
                ggml_tensor * parent = node->src[0];
                ggml_tensor * target = source(parent);
                if (target != parent || moved.count(parent)) {
                    const size_t offs_old = moved.count(parent) ? moved[parent] : parent->view_offs;
                    moved[node]           = node->view_offs;
                    node->view_src        = owner(target);
                    node->view_offs       = node->view_offs - offs_old + target->view_offs;
                }
            }
            for (ggml_tensor *& src : node->src) {
                src = src ? source(src) : nullptr;
            }
            if (const auto * w = fitted(node)) {
                add_fitted(node, *w);
            }
        }

        ggml_tensor * keep_all = keep_from ? ggml_set_rows(res.get_ctx(), pop.completion, to_rows(keep_from),
                                                           new_ids<completion_rows>(GGML_TYPE_I64, n_tokens))
                                           : nullptr;
        for (size_t i = 0; i < inputs.size(); ++i) {
            ggml_set_input(ids_of_inputs[i]);
            res.add_input(std::move(inputs[i]));
        }

        ggml_cgraph * gf = res.get_gf();
        ggml_graph_clear(gf);

        // set_inputs() writes to every input, also to those that nothing reads any more, so all have to be allocated
        for (ggml_tensor * t = ggml_get_first_tensor(res.get_ctx()); t; t = ggml_get_next_tensor(res.get_ctx(), t)) {
            if (t->flags & GGML_TENSOR_FLAG_INPUT) {
                ggml_build_forward_expand(gf, t);
            }
        }
        for (ggml_tensor * node : nodes) {
            if (kept.count(node)) {
                ggml_build_forward_expand(gf, node);
            }
            if (narrowed.count(node)) { // at once, so that the state itself need not be kept
                ggml_build_forward_expand(gf, narrowed[node]);
            }
            if (keep_all && node == keep_from) {
                ggml_build_forward_expand(gf, keep_all);
            }
        }
        if (keep_rows) {
            ggml_build_forward_expand(gf, keep_rows);
        }

        if (pop.part == POP_PRUNED || pop.part == POP_BELOW || only_writes()) {
            drop_outputs();
        }
        check_outputs();
        res.pop_rewritten = true;
    }

    // These graphs compute none of the model's results.
    void drop_outputs() {
        res.t_logits      = nullptr;
        res.t_embd        = nullptr;
        res.t_embd_pooled = nullptr;
        res.t_h_nextn     = nullptr;
        res.t_sampled.clear();
        res.t_sampled_probs.clear();
        res.t_sampled_logits.clear();
        res.t_candidates.clear();
    }

    // llama_context reads every tensor that set_outputs() marks. A node that it marks and that does not remain is an
    // output that a newer llama.cpp has added and drop_outputs() does not know.
    void check_outputs() {
        pop_tensor_set marked_before; // some builders mark nodes themselves
        for (const ggml_tensor * node : nodes) {
            if (node->flags & GGML_TENSOR_FLAG_OUTPUT) {
                marked_before.insert(node);
            }
        }
        res.set_outputs(params);
        for (const ggml_tensor * node : nodes) {
            const bool marked = (node->flags & GGML_TENSOR_FLAG_OUTPUT) && !marked_before.count(node);
            GGML_ASSERT((!marked || kept.count(node)) && "an output of the model is not in the rewritten graph");
        }
    }
};

} // namespace

void pop_rewrite_graph(const llm_graph_params & params, llm_graph_result & res) {
    if (params.pop.part == POP_WHOLE && params.pop.keeps == 0) {
        return;
    }

    rewrite pass(params, res);
    if (pass.plan()) {
        pass.apply();
    }
}
