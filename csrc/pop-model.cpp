#include "pop-model.h"

#include "llama-pop.h"

#include "llama-model.h"
#include "llama.h"

#include <cerrno>
#include <cstdlib>

static const int POP_VERSION = 1; // the newest pop.version that this build reads

int32_t pop_n_layer(const llama_model & model) {
    return (int32_t) model.hparams.n_layer();
}

int64_t pop_state_size(llm_arch arch, const llama_hparams & hparams) {
    return (int64_t) hparams.n_embd * (arch == LLM_ARCH_GEMMA3N ? hparams.n_altup : 1);
}

// The layers of Gemma 3n, and of Gemma 4 E2B and E4B, read an input of their own that is made from the features, too.
bool pop_reads_features_above(const llama_model & model, int32_t boundary) {
    return model.per_layer_tok_embd || boundary < (int32_t) model.hparams.n_deepstack_layers;
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
        return "boundary " + std::to_string(boundary) + " is out of range: choose 1 to " + std::to_string(n_layer) +
               " (" + std::to_string(n_layer) + " turns pruning off)";
    }

    return "";
}

// Reads a metadata value, which the model keeps as text. Returns false if it is there but is not an integer.
static bool meta_int(const llama_model & model, const char * key, bool & present, int64_t & value) {
    char          text[64];
    const int32_t len = llama_model_meta_val_str(&model, key, text, sizeof(text));

    present = len >= 0;
    if (!present) {
        return true;
    }
    if (len == 0 || len >= (int32_t) sizeof(text)) {
        return false;
    }

    char * end = nullptr;
    errno      = 0;
    value      = strtoll(text, &end, 10);
    return errno == 0 && end != text && *end == '\0';
}

bool pop_read_keys(const llama_model & model, pop_keys & keys, std::string & why) {
    const char * advice = ": write the file again with pop-gguf convert";

    bool    has_version = false;
    int64_t version     = 0;
    if (!meta_int(model, "pop.version", has_version, version) || (has_version && version < 1)) {
        why = std::string("pop.version is not a positive integer") + advice;
        return false;
    }
    if (has_version && version > POP_VERSION) {
        why = "pop.version " + std::to_string(version) + " is newer than this build reads (" +
              std::to_string(POP_VERSION) + "): update pypop-gguf";
        return false;
    }

    keys = {};

    const struct {
        const char * key;
        int64_t      low, high;
        int32_t *    value;
    } known[] = {
        { "pop.boundary",   1, pop_n_layer(model), &keys.boundary   },
        { "pop.head",       0, INT32_MAX,          &keys.head       },
        { "pop.tail",       1, INT32_MAX,          &keys.tail       },
        { "pop.min_tokens", 0, INT32_MAX,          &keys.min_tokens },
    };
    for (const auto & k : known) {
        bool    present = false;
        int64_t value   = 0;
        if (!meta_int(model, k.key, present, value) || (present && (value < k.low || value > k.high))) {
            why = std::string(k.key) + " is not an integer from " + std::to_string(k.low) + " to " +
                  std::to_string(k.high) + advice;
            return false;
        }
        if (present && !has_version) {
            why = std::string(k.key) + " stands without pop.version" + advice;
            return false;
        }
        *k.value = present ? (int32_t) value : *k.value;
    }
    return true;
}

// The number of tokens that was asked for, -1 standing for the file's. Returns why it is out of range, or nothing.
static std::string choose_tokens(const char * name,
                                 int32_t      asked,
                                 int32_t      of_file,
                                 int32_t      low,
                                 int32_t      high,
                                 const char * high_is,
                                 int32_t &    chosen) {
    chosen = asked == -1 ? of_file : asked;
    if (chosen >= low && chosen <= high) {
        return "";
    }
    return (asked == -1 ? "pop." : "pop_") + std::string(name) + " is " + std::to_string(chosen) +
           ": give a whole number, " + std::to_string(low) + " to " + std::to_string(high) + high_is;
}

bool pop_choose(const llama_model &       model,
                const llama_pop_request & request,
                int32_t                   n_batch,
                llama_pop_choice &        choice,
                std::string &             why) {
    const int32_t n_layer  = pop_n_layer(model);
    const int32_t lossless = pop_lossless_boundary(model);

    pop_keys   keys;
    const bool file_is_asked = request.boundary == LLAMA_POP_DEFAULT || request.n_head == -1 || request.n_tail == -1 ||
                               request.min_tokens == -1;
    if (file_is_asked && !pop_read_keys(model, keys, why)) {
        return false;
    }

    choice = {};
    switch (request.boundary) {
        case LLAMA_POP_OFF:
            choice.boundary = n_layer;
            break;
        case LLAMA_POP_LOSSLESS:
            choice.boundary = lossless;
            choice.source   = LLAMA_POP_SOURCE_ARGUMENT;
            break;
        case LLAMA_POP_DEFAULT:
            if (keys.boundary > 0) {
                choice.boundary = keys.boundary;
                choice.source   = LLAMA_POP_SOURCE_FILE;
            } else if (lossless < n_layer - 1 && pop_refusal(model, lossless).empty()) {
                choice.boundary = lossless;
                choice.source   = LLAMA_POP_SOURCE_LOSSLESS;
            } else {
                choice.boundary = n_layer;
            }
            break;
        default:
            choice.boundary = request.boundary;
            choice.source   = LLAMA_POP_SOURCE_ARGUMENT;
    }
    if (choice.boundary == n_layer) {
        choice.source = LLAMA_POP_SOURCE_OFF;
    } else {
        why = pop_refusal(model, choice.boundary);
    }

    const struct {
        const char * name;
        int32_t      asked, of_file, low, high;
        const char * high_is;
        int32_t *    chosen;
    } counts[] = {
        { "head",       request.n_head,     keys.head,       0, INT32_MAX, "",           &choice.n_head     },
        { "tail",       request.n_tail,     keys.tail,       1, n_batch,   " (n_batch)", &choice.n_tail     },
        { "min_tokens", request.min_tokens, keys.min_tokens, 0, INT32_MAX, "",           &choice.min_tokens },
    };
    for (const auto & c : counts) {
        if (why.empty()) {
            why = choose_tokens(c.name, c.asked, c.of_file, c.low, c.high, c.high_is, *c.chosen);
        }
    }
    return why.empty();
}
