// POP in llama-server: the boundary of the server's model, and how many tokens of each slot were pruned. Patch pop/0006
// calls this from tools/server; it uses the C API alone.

#pragma once

#include "llama.h"
#include "pop-cache-record.h"

#include <cstdint>
#include <string>
#include <vector>

// The part of the server that belongs to its model's context.
class pop_server {
public:
    // Opens the context with llama_pop_open(), with what lies beside the model. asked is 1..L or an enum
    // llama_pop_boundary. Returns false, and the reason in why, if that is refused.
    bool init(llama_context * ctx, const std::string & path_model, int32_t asked, std::string & why);

    // Called when a slot begins to read a prompt of n_tokens of which n_past are cached. Sequence ids are slot ids.
    // has_images says, here and below, that some position in the slot is not the index of its token, as behind images.
    void begin_prompt(llama_seq_id        seq_id,
                      pop_cache_record &  record,
                      int32_t             n_past,
                      int32_t             n_tokens,
                      const pop_reading & reading,
                      bool                has_images);

    int32_t boundary() const { return pop_boundary; }
    int32_t n_layer() const { return pop_n_layer; }

    // Returns the number of tokens that a slot has pruned since begin_prompt().
    uint64_t n_pruned(llama_seq_id seq_id) const;

    // Returns the boundary that the prompt in this slot is read with, n_layer() if it is not pruned.
    int32_t boundary_of(llama_seq_id seq_id) const;

    // Returns the record of a prompt that is to be restored from a slot file, and sets n_record to its size in bytes. A
    // file of stock llama.cpp has none and does not say how it was read, so its tokens count as pruned and, if the
    // server has adapters, as read with unknown ones. Throws std::runtime_error if the file is damaged.
    pop_cache_record restored_record(const std::string & path, bool has_adapters, size_t & n_record) const;

    // Lets the context keep what completion needs: mode is off, idle or answer, chunk a number of tokens. Returns
    // false, and the reason in why, if the model's cache cannot be completed.
    bool init_completion(const std::string & mode, int32_t chunk, bool swa_full, std::string & why);

    // Returns whether pruned prompts are completed at all.
    bool completes() const { return chunk > 0; }

    // Returns whether chunks run between the tokens of answers, too.
    bool completes_answers() const { return answers; }

    bool is_incomplete(llama_seq_id seq_id) const;

    // Completes a chunk of a slot, whose LoRA adapters are set, and returns how many tokens it had. The record then
    // says up to where all tokens are whole. With images it says so only once all tokens of the slot are.
    uint64_t complete(llama_seq_id seq_id, pop_cache_record & record, bool has_images);

    // Lets the next token join a chunk of a slot, whose LoRA adapters are set. Only this slot may be in the next batch.
    // Returns false if the last token that was asked to join could not.
    bool complete_with_next(llama_seq_id seq_id);

    // Returns the slot that was asked to join a chunk in the last batch, -1 if none was.
    llama_seq_id joining() const { return asked; }

    // Returns how many tokens that slot has completed thereby, and updates its record as complete() does.
    uint64_t joined(pop_cache_record & record, bool has_images);

    // Called when the tokens of a slot from n_keep on have moved to other positions. Those that are incomplete stay so:
    // completed now, they would attend to another text.
    void move(llama_seq_id seq_id, pop_cache_record & record, int32_t n_keep);

private:
    struct slot {
        bool     prunes          = false;
        uint64_t n_pruned_before = 0;
    };

    llama_context *   ctx          = nullptr;
    int32_t           pop_n_layer  = 0;
    int32_t           pop_boundary = 0;
    int32_t           min_tokens   = 0;
    bool              exact        = false; // pruning at this boundary changes no result
    int32_t           chunk        = 0;     // tokens that are completed at once, 0 if completion is off
    bool              answers      = false; // see completes_answers()
    std::vector<slot> slots;
    bool              joins    = true; // tokens of the answers that are being given can join chunks
    llama_seq_id      asked    = -1;   // see joining()
    uint64_t          n_before = 0;    // tokens completed before that

    void update_record(llama_seq_id seq_id, pop_cache_record & record, bool has_images) const;
};
