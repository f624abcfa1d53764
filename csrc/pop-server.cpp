#include "pop-server.h"

#include "llama-pop.h"

bool pop_server::init(llama_context * ctx, const std::string & path_model, int32_t asked, std::string & why) {
    // with POP off the file's keys do not matter, so they are not read
    const llama_pop_request request =
        asked == LLAMA_POP_OFF ? llama_pop_request{ LLAMA_POP_OFF, 0, 1, 0 } : llama_pop_request{ asked, -1, -1, -1 };
    llama_pop_choice choice;
    if (!llama_pop_open(ctx, request, path_model.c_str(), &choice)) {
        why = llama_pop_last_error();
        return false;
    }

    const llama_model * model = llama_get_model(ctx);

    this->ctx    = ctx;
    pop_n_layer  = llama_pop_n_layer(model);
    pop_boundary = choice.boundary;
    min_tokens   = choice.min_tokens;
    exact        = pop_boundary >= llama_pop_lossless_boundary(model);
    slots.assign(llama_n_seq_max(ctx), {});
    return true;
}

void pop_server::begin_prompt(
    llama_seq_id seq_id, pop_cache_record & record, int32_t n_past, int32_t n_tokens, const pop_reading & reading) {
    auto & slot          = slots.at(seq_id);
    slot.prunes          = reading.prunes && pop_boundary < pop_n_layer && n_tokens - n_past >= min_tokens;
    slot.n_pruned_before = llama_pop_n_pruned_in(ctx, seq_id);
    llama_pop_set_sequence(ctx, seq_id, slot.prunes);
    record.begin(n_past, slot.prunes && !exact, reading);
}

uint64_t pop_server::n_pruned(llama_seq_id seq_id) const {
    return llama_pop_n_pruned_in(ctx, seq_id) - slots.at(seq_id).n_pruned_before;
}

int32_t pop_server::boundary_of(llama_seq_id seq_id) const {
    return slots.at(seq_id).prunes ? pop_boundary : pop_n_layer;
}

pop_cache_record pop_server::restored_record(const std::string & path, bool has_adapters, size_t & n_record) const {
    pop_cache_record record;
    n_record = record.read(path);
    if (n_record == 0) {
        record.pruned_from = pop_boundary < pop_n_layer && !exact ? 0 : pop_cache_record::NONE;
        if (has_adapters) {
            record.adapters     = "unknown";
            record.adapted_from = 0;
        }
    }
    return record;
}
