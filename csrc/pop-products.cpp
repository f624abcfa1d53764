#include "pop-products.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdio>
#include <unordered_set>

// The layer of a weight, or -1 for anything else.
static int weight_layer(const ggml_tensor * t) {
    int il = -1;
    return sscanf(t->name, "blk.%d.", &il) == 1 ? il : -1;
}

std::vector<std::string> pop_product_weights(const llama_model & model, ggml_cgraph * pruned, uint32_t boundary) {
    std::vector<std::string>                names;
    std::unordered_set<std::string>         used_twice;
    std::unordered_set<const ggml_tensor *> products_and_what_follows;

    for (int i = 0; i < ggml_graph_n_nodes(pruned); ++i) {
        const ggml_tensor * t = ggml_graph_node(pruned, i);

        bool follows = products_and_what_follows.count(t->view_src) > 0;
        for (const ggml_tensor * src : t->src) {
            follows = follows || products_and_what_follows.count(src) > 0;
        }
        const bool is_product = t->op == GGML_OP_MUL_MAT && weight_layer(t->src[0]) >= (int) boundary;
        if (is_product && !follows && ggml_is_matrix(t) && model.get_tensor(t->src[0]->name) == t->src[0]) {
            const std::string name = t->src[0]->name;
            if (std::find(names.begin(), names.end(), name) == names.end()) {
                names.push_back(name);
            } else {
                used_twice.insert(name);
            }
        }
        if (is_product || follows) {
            products_and_what_follows.insert(t);
        }
    }
    names.erase(std::remove_if(names.begin(), names.end(), [&](const auto & name) { return used_twice.count(name); }),
                names.end());
    return names;
}

// Appends the rows of an F32 matrix, whatever its strides are.
static void append_rows(const ggml_tensor * t, std::vector<float> & to) {
    const size_t n     = t->ne[0];
    const size_t start = to.size();
    to.resize(start + n * t->ne[1]);
    for (int64_t i = 0; i < t->ne[1]; ++i) {
        ggml_backend_tensor_get(t, to.data() + start + i * n, i * t->nb[1], n * sizeof(float));
    }
}

// The name of the weight that a product reads. Where the product runs on another device than its weight lies on, it
// reads a copy, which the scheduler of llama.cpp has named DEVICE#WEIGHT#NUMBER.
static std::string weight_name(const ggml_tensor * product) {
    const std::string name  = product->src[0]->name;
    const size_t      first = name.find('#');
    return first == std::string::npos ? name : name.substr(first + 1, name.rfind('#') - first - 1);
}

pop_product_observer::pop_product_observer(std::vector<std::string> weights) : weights(std::move(weights)) {
    clear();
}

bool pop_product_observer::observe(ggml_tensor * t, bool ask) {
    const bool is_product = t->op == GGML_OP_MUL_MAT && ggml_is_matrix(t) && t->src[1]->type == GGML_TYPE_F32;
    const auto it         = is_product ? products.find(weight_name(t)) : products.end();
    if (ask) {
        return it != products.end();
    }
    if (it != products.end()) {
        pop_product & product = it->second;

        product.n_in  = t->src[1]->ne[0];
        product.n_out = t->ne[0];
        product.n_tokens += t->ne[1];
        append_rows(t->src[1], product.input);
        append_rows(t, product.output);
    }
    return true; // go on with the graph
}

void pop_product_observer::add(const std::string & weight) {
    weights.push_back(weight);
    products[weight] = {};
}

void pop_product_observer::clear() {
    for (const auto & name : weights) {
        products[name] = {};
    }
}
