#include "pop-adapter.h"
#include "pop-model.h"

#include "llama-adapter.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <vector>

#define POP_ADAPTER_TYPE    "pop"
#define POP_ADAPTER_VERSION "1"

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
    const bool has_suffix = dot != std::string::npos && dot > name;
    return path_model.substr(0, has_suffix ? dot : std::string::npos) + ".pop-b" + std::to_string(boundary) + ".gguf";
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
    if (version != POP_ADAPTER_VERSION) {
        return "its version is " + (version.empty() ? "missing" : version) + ", this build reads " POP_ADAPTER_VERSION;
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
        int il = -1;
        if (sscanf(name.c_str(), "blk.%d.", &il) != 1 || il <= (int) b) {
            return name + " is no weight of a layer above its boundary " + std::to_string(b);
        }
    }
    return "";
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
        llama_adapter_lora_init_impl(model, file.get(), *adapter);
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
