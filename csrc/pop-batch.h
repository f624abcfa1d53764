// Which tokens may share a micro-batch. llama_batch_allocr holds one of these and asks same() wherever it adds a token;
// llama_context::decode() turns it on for batches that may be pruned.

#pragma once

#include <cstdint>
#include <vector>

struct llama_pop_batch {
    bool active = false;

    // called at the start of every attempt to split a batch
    void reset(const int8_t * output, int32_t n_tokens) {
        full.assign(output, output + n_tokens);
    }

    // recurrent snapshots need the last n_tail tokens of a sequence in one micro-batch: if one of them asks for logits, all
    // of them run the whole model
    void keep_tail(const std::vector<int32_t> & idxs, uint32_t n_tail) {
        const size_t first = idxs.size() > n_tail ? idxs.size() - n_tail : 0;

        bool any = false;
        for (size_t i = first; i < idxs.size(); ++i) {
            any = any || full[idxs[i]];
        }
        for (size_t i = first; any && i < idxs.size(); ++i) {
            full[idxs[i]] = 1;
        }
    }

    bool same(int32_t i, int32_t j) const {
        return !active || (full[i] != 0) == (full[j] != 0);
    }

private:
    std::vector<int8_t> full; // [n_tokens] runs the whole model
};
