// How the cached tokens of llama-server were read, and which of them another request may use. Every server_prompt has a
// record: in slots, in the prompt cache, and at the end of slot files. Patch pop/0006 calls this from tools/server;
// patch upstream/0013 adds the LoRA adapters.

#pragma once

#include "common.h"

#include <cstdint>
#include <string>
#include <vector>

// How a request reads its prompt.
struct pop_reading {
    static constexpr int32_t NONE = INT32_MAX;

    bool        prunes;              // the layers from the boundary on may skip the prompt
    bool        moves;               // cached chunks may be used at other positions than they were read at
    std::string adapters;            // the LoRA adapters and their scales, empty if there are none
    int32_t     adapted_from = NONE; // index of the first token that is read with the adapters

    // A request with "pop": false asks for what the whole model computes, so it uses no chunk that has moved.
    pop_reading(bool prunes, bool moves) : prunes(prunes), moves(prunes && moves) {}

    // Adapters that their invocation tokens activate (aLoRA) begin at invocation_start, others act on all tokens.
    void use_adapters(const std::vector<common_adapter_lora_info> & adapters, int32_t invocation_start);
};

// How cached tokens were read.
struct pop_cache_record {
    static constexpr int32_t NONE = INT32_MAX;

    int32_t     pruned_from = NONE; // index of the first pruned token; whether a later one was pruned is not recorded
    int32_t     moved_from  = NONE; // index of the first token that was read at another position
    std::string adapters;           // as in pop_reading
    int32_t     adapted_from = NONE;

    // Returns how many of the first n_past cached tokens a request may use.
    int32_t n_usable(int32_t n_past, const pop_reading & reading) const;

    // Returns whether a request may use chunks of the cached tokens at other positions.
    bool may_move(const pop_reading & reading) const;

    // Called when the tokens from n_keep on have moved to other positions.
    void move(int32_t n_keep);

    // Called when completion has made the first n_whole tokens whole, or all of them if n_whole is NONE.
    void complete(int32_t n_whole);

    // Called when a request begins to read its prompt after n_past cached tokens. prunes says whether it really prunes
    // in a way that changes results.
    void begin(int32_t n_past, bool prunes, const pop_reading & reading);

    // Appends the record to a slot file, with a checksum of the whole file. Returns the number of bytes, 0 if it fails.
    size_t write(const std::string & path) const;

    // Reads the record at the end of a slot file. Returns its number of bytes, 0 if the file has none, as those of
    // stock llama.cpp. Throws std::runtime_error if the file is damaged.
    size_t read(const std::string & path);
};
