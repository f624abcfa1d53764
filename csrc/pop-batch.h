// What becomes of a micro-batch. llama_batch_allocr holds a llama_pop_batch: it asks same() wherever it adds a token and
// labels the result; llama_context::decode() says for each batch what is allowed.

#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

struct ggml_tensor;
struct llama_adapter_lora;

enum llama_pop_part : uint8_t {
    LLAMA_POP_WHOLE,     // every layer
    LLAMA_POP_PRUNED,    // the layers below the boundary; above it only what fills the caches
    LLAMA_POP_MIXED,     // some of its tokens need the whole model: becomes a pruned pass and continuations
    LLAMA_POP_CONTINUED, // the layers from the boundary on, from the states that a pruned pass has kept
};

// a micro-batch's label, in llama_ubatch::data_t
struct llama_pop_ubatch {
    llama_pop_part       part = LLAMA_POP_WHOLE;
    std::vector<int32_t> rows;      // PRUNED, MIXED: the tokens that need the whole model
    uint32_t             first = 0; // CONTINUED: which of the kept states is its first token's
};

// what the pass makes of a graph; graph reuse compares it
struct llama_pop_graph {
    llama_pop_part part     = LLAMA_POP_WHOLE;
    uint32_t       boundary = 0;
    uint32_t       n_rows   = 0;       // PRUNED: boundary states to keep for continuations
    uint32_t       first    = 0;       // CONTINUED: as above
    ggml_tensor *  states   = nullptr; // F32 [n_embd, n_ubatch or more], the context's

    llama_adapter_lora * adapter = nullptr; // PRUNED: fitted projections

    bool operator==(const llama_pop_graph & other) const {
        return part == other.part && boundary == other.boundary && n_rows == other.n_rows && first == other.first &&
               states == other.states && adapter == other.adapter;
    }
};

struct llama_pop_batch {
    bool prunes = false; // micro-batches in which no token needs the whole model are pruned
    bool mixes  = false; // tokens of both kinds may share a micro-batch

    int32_t n_head = 0; // of each sequence, this many first positions need the whole model
    int32_t n_tail = 1; // of each sequence, this many tokens up to each that asks for logits do

    std::set<llama_seq_id> whole; // sequences whose tokens all do

    // called at the start of every attempt to split a batch
    void reset(const llama_batch & batch) {
        full.assign(batch.logits, batch.logits + batch.n_tokens);

        std::map<llama_seq_id, int32_t> n_left; // of the tail of the nearest later token that asks
        for (int32_t i = batch.n_tokens - 1; i >= 0; --i) {
            int32_t & n = n_left[batch.seq_id[i][0]];
            full[i] = full[i] || n > 0 || batch.pos[i] < n_head || in_whole_sequence(batch, i);
            n       = batch.logits[i] ? n_tail - 1 : n - 1;
        }
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

    // of a sequence's tokens, the first that no micro-batch has taken
    static int32_t next(const std::vector<int32_t> & idxs, const std::vector<bool> & used) {
        return *std::find_if(idxs.begin(), idxs.end(), [&](int32_t i) { return !used[i]; });
    }

    bool same(int32_t i, int32_t j) const {
        return !prunes || mixes || (full[i] != 0) == (full[j] != 0);
    }

    llama_pop_ubatch label(const std::vector<int32_t> & idxs) const {
        llama_pop_ubatch res;
        if (!prunes) {
            return res;
        }
        for (size_t i = 0; i < idxs.size(); ++i) {
            if (full[idxs[i]]) {
                res.rows.push_back(i);
            }
        }
        if (res.rows.size() < idxs.size()) {
            res.part = res.rows.empty() ? LLAMA_POP_PRUNED : LLAMA_POP_MIXED;
        }
        return res;
    }

private:
    bool in_whole_sequence(const llama_batch & batch, int32_t i) const {
        return std::any_of(batch.seq_id[i], batch.seq_id[i] + batch.n_seq_id[i], [&](llama_seq_id s) { return whole.count(s) > 0; });
    }

    std::vector<int8_t> full; // [n_tokens] needs the whole model
};
