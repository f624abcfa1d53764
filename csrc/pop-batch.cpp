#include "pop-batch.h"

#include <algorithm>
#include <map>

void pop_batch::begin_split(const llama_batch & batch) {
    if (!prunes) {
        return;
    }
    runs_whole.assign(batch.logits, batch.logits + batch.n_tokens);

    std::map<llama_seq_id, int32_t> n_left; // tokens left of the tail before the next token that asks for logits
    for (int32_t i = batch.n_tokens - 1; i >= 0; --i) {
        runs_whole[i] = runs_whole[i] || batch.pos[i] < n_head || in_whole_sequence(batch, i);
        for (int32_t s = 0; s < batch.n_seq_id[i]; ++s) {
            int32_t & n   = n_left[batch.seq_id[i][s]];
            runs_whole[i] = runs_whole[i] || n > 0;
            n             = batch.logits[i] ? n_tail - 1 : n - 1;
        }
    }
}

void pop_batch::run_snapshot_tail_whole(const std::vector<int32_t> & idxs, uint32_t n_snapshot) {
    const auto first = idxs.size() > n_snapshot ? idxs.end() - n_snapshot : idxs.begin();
    if (std::any_of(first, idxs.end(), [&](int32_t i) { return runs_whole[i] != 0; })) {
        std::for_each(first, idxs.end(), [&](int32_t i) { runs_whole[i] = 1; });
    }
}

int32_t pop_batch::next_token(const std::vector<int32_t> & idxs, const std::vector<bool> & used) {
    return *std::find_if(idxs.begin(), idxs.end(), [&](int32_t i) { return !used[i]; });
}

pop_ubatch_label pop_batch::label_ubatch(const std::vector<int32_t> & idxs) const {
    pop_ubatch_label res;
    if (!prunes) {
        return res;
    }
    for (size_t i = 0; i < idxs.size(); ++i) {
        if (runs_whole[idxs[i]]) {
            res.rows.push_back(i);
        }
    }
    if (res.rows.size() < idxs.size()) {
        res.part = res.rows.empty() ? POP_PRUNED : POP_CONTINUES;
    }
    return res;
}

bool pop_batch::in_whole_sequence(const llama_batch & batch, int32_t i) const {
    const auto * seqs = batch.seq_id[i];
    return std::any_of(seqs, seqs + batch.n_seq_id[i], [&](llama_seq_id s) { return whole_seqs.count(s) > 0; });
}
