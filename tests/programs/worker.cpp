// Reads prompts with a library for another processor or system, which `make arm` and `make windows` compile. Then
// tests/engine/test_emulated.py runs this program in qemu or wine, and compares the logits with those of PyTorch and of
// the library for this machine.
//
//     worker LOGITS < model-and-cases
//
// The first line names the model's file, in UTF-8 also on Windows. A case is a line of words: the boundary (0 turns POP
// off), the tokens of head and tail, whether tokens continue, the type of the cache, whether flash attention is on, an
// adapter's file or "-", the number of prompt tokens, and the tokens of the prompt and of a text that follows it. The
// program writes the logits of the last prompt token and of each token that follows to LOGITS, as F32, and prints how
// many tokens each case has pruned.

#include "llama-pop.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

struct read_case {
    int32_t                  boundary, n_head, n_tail, continues, type_kv, flash_attention, n_prompt;
    std::string              adapter;
    std::vector<llama_token> tokens;
};

static void require(bool holds, const std::string & what) {
    if (!holds) {
        std::cerr << "worker: " << what << ": " << llama_pop_last_error() << "\n";
        exit(1);
    }
}

static read_case parse(const std::string & line) {
    std::istringstream words(line);
    read_case          c = {};
    words >> c.boundary >> c.n_head >> c.n_tail >> c.continues >> c.type_kv >> c.flash_attention >> c.adapter >>
        c.n_prompt;
    for (llama_token token; words >> token;) {
        c.tokens.push_back(token);
    }
    require(c.n_prompt > 0 && c.tokens.size() >= (size_t) c.n_prompt, "no case: " + line);
    return c;
}

static llama_context * open_context(llama_model * model, const read_case & c) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 512;
    params.n_ubatch               = 16;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = (ggml_type) c.type_kv;
    params.flash_attn_type        = c.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;

    llama_context * ctx = llama_init_from_model(model, params);
    require(ctx != nullptr, "no context");
    require(llama_pop_set_continuation(ctx, c.continues != 0), "continuation");
    require(llama_pop_set_ends(ctx, c.n_head, c.n_tail), "head and tail");
    if (c.adapter != "-") {
        llama_adapter_lora * adapter = llama_pop_adapter_init(model, c.adapter.c_str());
        require(adapter != nullptr && llama_pop_add_adapter(ctx, adapter), "adapter");
    }
    require(llama_pop_set_boundary(ctx, c.boundary), "boundary");
    return ctx;
}

// Reads the tokens from `first` to before `last` in one batch and writes the logits of the last one.
static void decode(llama_context * ctx, const read_case & c, int32_t first, int32_t last, std::ofstream & out) {
    llama_batch batch = llama_batch_init(last - first, 0, 1);
    batch.n_tokens    = last - first;
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        batch.token[i]     = c.tokens[first + i];
        batch.pos[i]       = first + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = first + i == last - 1;
    }
    require(llama_decode(ctx, batch) == 0, "llama_decode");
    llama_batch_free(batch);
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    out.write((const char *) llama_get_logits_ith(ctx, -1), n_vocab * sizeof(float));
}

int main(int argc, char ** argv) {
    require(argc == 2, "usage: worker LOGITS < model-and-cases");
    ggml_backend_load_all();
    llama_backend_init();
    std::cerr << llama_print_system_info() << "\n";
    std::string line;
    std::getline(std::cin, line);
    llama_model * model = llama_model_load_from_file(line.c_str(), llama_model_default_params());
    require(model != nullptr, "no model: " + line);
    std::ofstream out(argv[1], std::ios::binary);

    while (std::getline(std::cin, line)) {
        const read_case c   = parse(line);
        llama_context * ctx = open_context(model, c);
        decode(ctx, c, 0, c.n_prompt, out);
        for (int32_t i = c.n_prompt; i < (int32_t) c.tokens.size(); i++) {
            decode(ctx, c, i, i + 1, out);
        }
        std::cout << llama_pop_n_pruned(ctx) << "\n";
        llama_free(ctx);
    }
    llama_model_free(model);
    require(out.good(), "cannot write the logits");
}
