#include "pop-plan.h"

#include "llama-model.h"
#include "llama.h"

#include <cerrno>
#include <cstdlib>

static const int POP_VERSION = 1; // newest pop.version that this build reads

int32_t pop_n_layer(const llama_model & model) {
    return (int32_t) model.hparams.n_layer();
}

static bool writes_memory(const llama_model & model, int32_t il) {
    const auto & hparams = model.hparams;

    if (llama_model_is_recurrent(&model) || hparams.is_recr(il)) {
        return true;
    }

    return hparams.has_kv(il) && hparams.n_head_kv(il) > 0;
}

int32_t pop_lossless_boundary(const llama_model & model) {
    int32_t il = pop_n_layer(model) - 1;
    while (il > 1 && !writes_memory(model, il)) {
        --il;
    }
    return il;
}

std::string pop_refusal(const llama_model & model, int32_t boundary) {
    const int32_t n_layer = pop_n_layer(model);

    if (llama_model_is_diffusion(&model)) {
        return "a diffusion model rewrites its whole text at every step: it has no causal prefill to prune";
    }
    if (llama_model_has_encoder(&model)) {
        return "an encoder reads the prompt of this model: there is no causal prefill to prune";
    }
    if (!model.hparams.causal_attn) {
        return "this model attends in both directions (an encoder): it has no causal prefill to prune";
    }
    if (model.arch == LLM_ARCH_HRM_TEXT) {
        return "this model runs its layers in cycles: none of them is the deepest";
    }
    if (n_layer < 2) {
        return "the model has " + std::to_string(n_layer) + " layers: pruning needs at least 2";
    }
    if (boundary < 1 || boundary > n_layer) {
        return "boundary " + std::to_string(boundary) + " is out of range: choose 1 to " + std::to_string(n_layer) + " (" +
               std::to_string(n_layer) + " turns pruning off)";
    }

    return "";
}

// the whole of a metadata value as an integer; the model keeps every scalar as text
static bool meta_int(const llama_model & model, const char * key, bool & present, int64_t & value) {
    char text[64];
    const int32_t len = llama_model_meta_val_str(&model, key, text, sizeof(text));

    present = len >= 0;
    if (!present) {
        return true;
    }
    if (len == 0 || len >= (int32_t) sizeof(text)) {
        return false;
    }

    char * end = nullptr;
    errno = 0;
    value = strtoll(text, &end, 10);
    return errno == 0 && end != text && *end == '\0';
}

bool pop_read_file(const llama_model & model, pop_file & file, std::string & why) {
    const int32_t n_layer = pop_n_layer(model);
    const char *  mend    = ": write the file again with pop-gguf convert";

    bool    has_version = false;
    int64_t version     = 0;
    if (!meta_int(model, "pop.version", has_version, version) || (has_version && version < 1)) {
        why = std::string("pop.version is not a positive integer") + mend;
        return false;
    }
    if (has_version && version > POP_VERSION) {
        why = "pop.version " + std::to_string(version) + " is newer than this build reads (" + std::to_string(POP_VERSION) +
              "): update pypop-gguf";
        return false;
    }

    file = {};
    file.boundary = n_layer;

    const struct { const char * key; int64_t low, high; int32_t * value; } keys[] = {
        { "pop.boundary",   1, n_layer,   &file.boundary   },
        { "pop.head",       0, INT32_MAX, &file.head       },
        { "pop.tail",       1, INT32_MAX, &file.tail       },
        { "pop.min_tokens", 0, INT32_MAX, &file.min_tokens },
    };
    for (const auto & k : keys) {
        bool    present = false;
        int64_t value   = 0;
        if (!meta_int(model, k.key, present, value) || (present && (value < k.low || value > k.high))) {
            why = std::string(k.key) + " is not an integer from " + std::to_string(k.low) + " to " + std::to_string(k.high) + mend;
            return false;
        }
        if (present && !has_version) {
            why = std::string(k.key) + " stands without pop.version" + mend;
            return false;
        }
        *k.value = present ? (int32_t) value : *k.value;
    }
    return true;
}
