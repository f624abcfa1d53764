#include "pop-server.h"

#include "llama-pop.h"

#include <algorithm>

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

void pop_server::begin_prompt(llama_seq_id        seq_id,
                              pop_cache_record &  record,
                              int32_t             n_past,
                              int32_t             n_tokens,
                              const pop_reading & reading,
                              bool                has_images) {
    auto & slot          = slots.at(seq_id);
    slot.prunes          = reading.prunes && pop_boundary < pop_n_layer && n_tokens - n_past >= min_tokens;
    slot.n_pruned_before = llama_pop_n_pruned_in(ctx, seq_id);
    joins                = true;
    llama_pop_set_sequence(ctx, seq_id, slot.prunes);

    // a pruned prompt without marks was restored, and the states to complete it are not there
    if (chunk > 0 && record.pruned_from < n_past && llama_pop_n_incomplete(ctx, seq_id) == 0 &&
        llama_pop_n_lost(ctx, seq_id) == 0) {
        llama_pop_set_lost(ctx, seq_id, has_images ? 0 : record.pruned_from);
    }
    record.begin(n_past, slot.prunes && !exact, reading);
}

bool pop_server::init_completion(const std::string & mode, int32_t chunk, bool swa_full, std::string & why) {
    if (mode == "off" || pop_boundary == pop_n_layer || exact) {
        return true; // there is nothing to complete
    }
    if (llama_model_n_swa(llama_get_model(ctx)) > 0 && !swa_full) {
        why = "the sliding windows of this model are not kept, so its cache cannot be completed: give --swa-full, or "
              "--pop-complete off";
        return false;
    }
    if (!llama_pop_set_completion(ctx, LLAMA_POP_STATES_F32)) {
        why = llama_pop_last_error();
        return false;
    }
    if (!llama_pop_completes(ctx)) {
        why = "what is pruned at boundary " + std::to_string(pop_boundary) + " of this model cannot be completed";
        return false;
    }
    this->chunk = chunk;
    answers     = mode == "answer";
    return true;
}

bool pop_server::is_incomplete(llama_seq_id seq_id) const {
    return chunk > 0 && llama_pop_n_incomplete(ctx, seq_id) > 0;
}

uint64_t pop_server::complete(llama_seq_id seq_id, pop_cache_record & record, bool has_images) {
    int32_t n_done = 0;
    if (!llama_pop_complete(ctx, seq_id, chunk, &n_done)) {
        llama_pop_set_lost(ctx, seq_id, llama_pop_first_incomplete(ctx, seq_id)); // it would fail again
        return 0;
    }
    update_record(seq_id, record, has_images);
    return n_done;
}

void pop_server::update_record(llama_seq_id seq_id, pop_cache_record & record, bool has_images) const {
    if (llama_pop_n_incomplete(ctx, seq_id) == 0 && llama_pop_n_lost(ctx, seq_id) == 0) {
        record.complete(pop_cache_record::NONE);
    } else if (!has_images) {
        record.complete(llama_pop_first_incomplete(ctx, seq_id));
    }
}

bool pop_server::complete_with_next(llama_seq_id seq_id) {
    if (!joins || !llama_pop_complete_with_next(ctx, seq_id, std::max(chunk - 1, 1))) { // the token is a row, too
        return false;
    }
    asked    = seq_id;
    n_before = llama_pop_n_completed(ctx);
    return true;
}

uint64_t pop_server::joined(pop_cache_record & record, bool has_images) {
    const uint64_t n = llama_pop_n_completed(ctx) - n_before;
    update_record(asked, record, has_images);
    joins = n > 0; // drafts of another model and image features cannot join
    asked = -1;
    return n;
}

void pop_server::move(llama_seq_id seq_id, pop_cache_record & record, int32_t n_keep) {
    record.move(n_keep);
    if (is_incomplete(seq_id)) {
        llama_pop_set_lost(ctx, seq_id, std::max(n_keep, llama_pop_first_incomplete(ctx, seq_id)));
    }
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
