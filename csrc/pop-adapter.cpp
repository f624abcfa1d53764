#include "pop-adapter.h"
#include "pop-model.h"

#include "llama-adapter.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#define POP_ADAPTER_TYPE "pop"

// The name of a weight and one of these suffixes name a tensor that belongs to the weight.
static const std::string SHIFT      = ".shift";
static const std::string BOTTLENECK = ".bottleneck";
static const std::string FURTHER    = ".further";

static bool has_suffix(const std::string & name, const std::string & suffix) {
    return name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// FNV-1a
static void hash(uint64_t & h, const void * data, size_t n) {
    for (const uint8_t * p = (const uint8_t *) data; n > 0; --n, ++p) {
        h = (h ^ *p) * 0x100000001b3ull;
    }
}

uint64_t pop_fingerprint(const llama_model & model) {
    std::map<std::string, const ggml_tensor *> norms; // sorted by name, so that the order in the file does not matter
    for (const auto & [name, t] : model.tensors_by_name) {
        if (name.rfind("blk.", 0) == 0 && name.find("norm") != std::string::npos && t->type == GGML_TYPE_F32) {
            norms[name] = t;
        }
    }

    uint64_t          h     = 0xcbf29ce484222325ull;
    const std::string shape = model.arch_name() + std::to_string(pop_n_layer(model));
    hash(h, shape.data(), shape.size());
    std::vector<uint8_t> data;
    for (const auto & [name, t] : norms) {
        data.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        hash(h, name.data(), name.size());
        hash(h, data.data(), data.size());
    }
    return h;
}

std::string pop_adapter_path(const std::string & path_model, int32_t boundary) {
#ifdef _WIN32
    const size_t slash = path_model.find_last_of("/\\");
#else
    const size_t slash = path_model.rfind('/');
#endif
    const size_t name = slash == std::string::npos ? 0 : slash + 1;
    const size_t dot  = path_model.rfind('.');
    // a name that begins with its only dot has no suffix
    const bool ends_name = dot != std::string::npos && dot > name;
    return path_model.substr(0, ends_name ? dot : std::string::npos) + ".pop-b" + std::to_string(boundary) + ".gguf";
}

static std::string value(const llama_adapter_lora & adapter, const char * key) {
    const auto it = adapter.gguf_kv.find(key);
    return it == adapter.gguf_kv.end() ? "" : it->second;
}

uint32_t pop_adapter_boundary(const llama_adapter_lora & adapter) {
    return adapter.type == POP_ADAPTER_TYPE ? strtoul(value(adapter, "pop.boundary").c_str(), nullptr, 10) : 0;
}

// Returns why an adapter that could be loaded is not for this model; empty if it is.
static std::string mismatch(const llama_model & model, const llama_adapter_lora & adapter) {
    const std::string version = value(adapter, "pop.adapter.version");
    if (version != "1" && version != "2" && version != "3") {
        return "its version is " + (version.empty() ? "missing" : version) + ", this build reads 1 to 3";
    }
    char expected[17];
    snprintf(expected, sizeof(expected), "%016llx", (unsigned long long) pop_fingerprint(model));
    if (value(adapter, "pop.fingerprint") != expected) {
        return "it was fitted for another model";
    }
    const uint32_t    b   = pop_adapter_boundary(adapter);
    const std::string why = pop_refusal(model, b);
    if (!why.empty()) {
        return why;
    }
    for (const auto & [name, weight] : adapter.ab_map) {
        const bool below = has_suffix(name, BOTTLENECK);
        int        il    = -1;
        if (sscanf(name.c_str(), "blk.%d.", &il) != 1 || (below ? il >= (int) b : il <= (int) b)) {
            return name + (below ? " reads no state below" : " is no weight of a layer above") + " its boundary " +
                   std::to_string(b);
        }
    }
    return "";
}

bool pop_adapter_replaces(const llama_adapter_lora & adapter) {
    return value(adapter, "pop.adapter.version") != "1";
}

static std::string weight_of(const std::string & name) {
    for (const auto & suffix : { SHIFT, BOTTLENECK, FURTHER }) {
        if (has_suffix(name, suffix)) {
            return name.substr(0, name.size() - suffix.size());
        }
    }
    return name;
}

static ggml_tensor * find(const llama_adapter_lora & adapter, const std::string & name) {
    const auto it = adapter.ab_map.find(name);
    return it == adapter.ab_map.end() ? nullptr : it->second.a;
}

ggml_tensor * pop_adapter_bottleneck(const llama_adapter_lora & adapter, const ggml_tensor * weight) {
    return find(adapter, weight->name + BOTTLENECK);
}

ggml_tensor * pop_adapter_further(const llama_adapter_lora & adapter, const ggml_tensor * weight) {
    return find(adapter, weight->name + FURTHER);
}

size_t pop_adapter_n_bottlenecks(const llama_adapter_lora & adapter) {
    return std::count_if(adapter.ab_map.begin(), adapter.ab_map.end(),
                         [](const auto & entry) { return has_suffix(entry.first, BOTTLENECK); });
}

// Returns where a replacement of a weight goes, which is the weight's device. A buffer of repacked weights takes no
// other tensors.
static ggml_backend_buffer_type_t buffer_type(const ggml_tensor * weight) {
    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(weight->buffer));
    return ggml_backend_dev_buffer_type(dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

static bool fits(const ggml_tensor * t, const ggml_tensor * weight) {
    if (has_suffix(t->name, SHIFT)) {
        return t->type == GGML_TYPE_F32 && ggml_nelements(t) == weight->ne[1] && t->ne[0] == weight->ne[1];
    }
    if (has_suffix(t->name, BOTTLENECK)) {
        return ggml_is_matrix(t) && t->ne[0] == weight->ne[0];
    }
    if (has_suffix(t->name, FURTHER)) {
        return ggml_is_matrix(t) && t->ne[1] == weight->ne[1];
    }
    return ggml_are_same_shape(t, weight);
}

static void check_shape(const ggml_tensor * t, const ggml_tensor * weight) {
    const std::string name = t->name;
    if (!weight) {
        throw std::runtime_error(name + " belongs to no weight of this model");
    }
    if (!fits(t, weight)) {
        throw std::runtime_error(name + " has another shape than this model's");
    }
}

// Checks that every weight has all that belongs to it, and that all matrices of further inputs agree on their rank.
static void check_complete(const llama_adapter_lora & adapter) {
    int64_t rank  = 0;
    bool    reads = false;
    bool    feeds = false;
    for (const auto & [name, pair] : adapter.ab_map) {
        const bool bottleneck = has_suffix(name, BOTTLENECK);
        const bool further    = has_suffix(name, FURTHER);
        if (!bottleneck && !further) {
            if (!pair.a || !pair.b) {
                throw std::runtime_error(name + " lacks its replacement or its shift");
            }
            continue;
        }
        const int64_t own = pair.a->ne[bottleneck ? 1 : 0];
        if (rank != 0 && own != rank) {
            throw std::runtime_error(name + " has another rank than the other bottlenecks");
        }
        if (further && !find(adapter, weight_of(name))) {
            throw std::runtime_error(name + " belongs to no weight that is replaced");
        }
        rank  = own;
        reads = reads || bottleneck;
        feeds = feeds || further;
    }
    if (reads != feeds) {
        throw std::runtime_error("its further inputs lack their bottlenecks or their use");
    }
}

// Reads an adapter of version 2 or 3: for each weight its replacement [n_in, n_out] under the same name, and F32
// <name>.shift [n_out]. Version 3 has <name>.further [rank, n_out] too, and for weights below the boundary
// <name>.bottleneck [n_in, rank]. Throws.
static void load_replacements(
    llama_model & model, FILE * file, const gguf_context * gguf, ggml_context * meta, llama_adapter_lora & adapter) {
    std::map<ggml_backend_buffer_type_t, std::vector<ggml_tensor *>> in_file; // by where they go
    for (ggml_tensor * t = ggml_get_first_tensor(meta); t; t = ggml_get_next_tensor(meta, t)) {
        const ggml_tensor * weight = model.get_tensor(weight_of(t->name).c_str());
        check_shape(t, weight);
        in_file[buffer_type(weight)].push_back(t);
    }
    std::vector<uint8_t> data;
    for (const auto & [buft, tensors] : in_file) {
        adapter.ctxs.emplace_back(ggml_init({ tensors.size() * ggml_tensor_overhead(), nullptr, true }));
        ggml_context * ctx = adapter.ctxs.back().get();
        for (const ggml_tensor * t : tensors) {
            ggml_set_name(ggml_dup_tensor(ctx, t), t->name);
        }
        adapter.bufs.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
        if (!adapter.bufs.back()) {
            throw std::runtime_error("there is not enough memory for it");
        }
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            const size_t at =
                gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, gguf_find_tensor(gguf, t->name));
            data.resize(ggml_nbytes(t));
            if (fseek(file, at, SEEK_SET) != 0 || fread(data.data(), 1, data.size(), file) != data.size()) {
                throw std::runtime_error("the file ends before " + std::string(t->name));
            }
            if (!ggml_validate_row_data(t->type, data.data(), data.size())) {
                throw std::runtime_error(std::string(t->name) + " holds values that are not numbers");
            }
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
            if (has_suffix(t->name, SHIFT)) {
                adapter.ab_map[weight_of(t->name)].b = t;
            } else {
                adapter.ab_map[t->name].a = t;
            }
        }
    }
    check_complete(adapter);
}

// Reads an adapter of any version. Throws.
static void load_file(llama_model & model, FILE * file, llama_adapter_lora & adapter) {
    ggml_context *   meta = nullptr;
    gguf_context_ptr gguf(gguf_init_from_file_ptr(file, { /*no_alloc =*/true, &meta }));
    ggml_context_ptr meta_owner(meta);

    const int64_t  key       = gguf ? gguf_find_key(gguf.get(), "pop.adapter.version") : -1;
    const bool     is_number = key >= 0 && gguf_get_kv_type(gguf.get(), key) == GGUF_TYPE_UINT32;
    const uint32_t version   = is_number ? gguf_get_val_u32(gguf.get(), key) : 0;
    if (version != 2 && version != 3) {
        rewind(file);
        llama_adapter_lora_init_impl(model, file, adapter);
        return;
    }
    for (int64_t i = 0; i < gguf_get_n_kv(gguf.get()); ++i) {
        adapter.gguf_kv.emplace(gguf_get_key(gguf.get(), i), gguf_kv_to_str(gguf.get(), i));
    }
    if (value(adapter, "adapter.type") != POP_ADAPTER_TYPE) {
        throw std::runtime_error("its adapter.type is not \"" POP_ADAPTER_TYPE "\"");
    }
    load_replacements(model, file, gguf.get(), meta, adapter);
}

llama_adapter_lora * pop_load_adapter(llama_model & model, const char * path, std::string & why) {
    std::unique_ptr<FILE, int (*)(FILE *)> file(ggml_fopen(path, "rb"), fclose);
    if (!file) {
        why = std::string("cannot open ") + path + ": " + strerror(errno);
        return nullptr;
    }

    auto adapter  = std::make_unique<llama_adapter_lora>(&model);
    adapter->type = POP_ADAPTER_TYPE;
    try {
        load_file(model, file.get(), *adapter);
        why = mismatch(model, *adapter);
    } catch (const std::exception & e) {
        why = e.what();
    }
    if (!why.empty()) {
        pop_free_adapter(adapter.release());
        why = std::string(path) + ": " + why;
        return nullptr;
    }
    return adapter.release(); // the model owns it
}

void pop_free_adapter(llama_adapter_lora * adapter) {
    adapter->model->loras.erase(adapter);
    delete adapter;
}
