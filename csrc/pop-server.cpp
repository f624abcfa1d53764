#include "pop-server.h"
#include "llama-pop.h"

#include <fstream>

bool pop_server::init(llama_context * ctx, const std::string & path_model, int32_t asked, std::string & why) {
    const llama_model * model = llama_get_model(ctx);

    this->ctx   = ctx;
    pop_n_layer = llama_pop_n_layer(model);
    min_tokens  = llama_pop_min_tokens(model);
    slots.assign(llama_n_seq_max(ctx), {});

    // a file that names none: upper layers that only read a cache of lower ones are skipped all the same, which is exact
    const int32_t lossless = llama_pop_lossless_boundary(model);
    const bool    named    = llama_model_meta_val_str(model, "pop.boundary", nullptr, 0) >= 0;
    if (asked == LLAMA_POP_FROM_FILE && !named && lossless < pop_n_layer - 1 && llama_pop_supports(model, lossless)) {
        asked = lossless;
    }

    if (!llama_pop_set_boundary(ctx, asked)) {
        why = llama_pop_last_error();
        return false;
    }
    pop_boundary = llama_pop_get_boundary(ctx);
    exact        = pop_boundary >= lossless;

    const auto        stem = path_model.substr(0, path_model.rfind('.'));
    const std::string path = stem + ".pop-b" + std::to_string(pop_boundary) + ".gguf";
    if (pop_boundary < pop_n_layer && std::ifstream(path).good()) {
        auto * adapter = llama_pop_adapter_init(const_cast<llama_model *>(model), path.c_str());
        if (!adapter || !llama_pop_add_adapter(ctx, adapter)) {
            why = llama_pop_last_error();
            return false;
        }
    }
    return true;
}

void pop_server::begin(llama_seq_id seq_id, pop_server_record & record, int32_t n_past, int32_t n_tokens, bool pop) {
    auto & slot = slots.at(seq_id);
    slot.prunes          = pop && pop_boundary < pop_n_layer && n_tokens - n_past >= min_tokens;
    slot.n_pruned_before = llama_pop_n_pruned_in(ctx, seq_id);
    llama_pop_set_sequence(ctx, seq_id, slot.prunes);

    if (record.first >= n_past) {
        record.first = slot.prunes && !exact ? n_past : pop_server_record::NONE;
    }
}

uint64_t pop_server::n_pruned(llama_seq_id seq_id) const {
    return llama_pop_n_pruned_in(ctx, seq_id) - slots.at(seq_id).n_pruned_before;
}

int32_t pop_server::boundary_of(llama_seq_id seq_id) const {
    return slots.at(seq_id).prunes ? pop_boundary : pop_n_layer;
}

pop_server_record pop_server::unknown() const {
    return { pop_boundary < pop_n_layer && !exact ? 0 : pop_server_record::NONE };
}
