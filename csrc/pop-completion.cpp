#include "pop-completion.h"

#include "llama-batch.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "pop-memory.h"
#include "pop-model.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

llama_kv_cache * pop_completion::find_cache(llama_memory_i & memory) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory)) {
        return iswa->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(&memory);
}

pop_completion::pop_completion(llama_memory_i &           memory,
                               const llama_model &        model,
                               ggml_type                  type,
                               ggml_backend_buffer_type_t buft) :
    memory(memory), kv(*find_cache(memory)), model(model), ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true })) {
    const int64_t n_cells = (int64_t) kv.get_size() * kv.get_n_stream();

    marks.resize(n_cells);
    states = ggml_new_tensor_2d(ctx.get(), type, pop_state_size(model.arch, model.hparams), n_cells);
    ggml_set_name(states, "pop_completion");
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buf) {
        throw std::runtime_error("there is no memory for the states that completion needs");
    }
}

uint32_t pop_completion::any_boundary() const {
    const auto it = std::find_if(works_at.begin(), works_at.end(), [](const auto & at) { return at.second.chunks; });
    return it == works_at.end() ? 0 : it->first;
}

size_t pop_completion::row_of(llama_seq_id seq_id, uint32_t idx) const {
    return (size_t) kv.get_stream(seq_id) * kv.get_size() + idx;
}

// The mark of the token right before a position of a sequence.
pop_completion::mark pop_completion::mark_before(llama_seq_id seq_id, llama_pos pos) const {
    const auto & order = kv.get_cells(seq_id).seq_pos_get(seq_id);
    const auto   it    = order.lower_bound({ pos, 0 });
    return it == order.begin() ? mark() : marks[row_of(seq_id, std::prev(it)->second)];
}

uint16_t pop_completion::index_of(const llama_adapter_loras & loras) {
    const auto it = std::find(all_loras.begin(), all_loras.end(), loras);
    if (it != all_loras.end()) {
        return it - all_loras.begin();
    }
    if (all_loras.size() >= n_loras_kept) {
        forget_loras();
    }
    if (all_loras.size() == LOST) {
        throw std::runtime_error("completion knows no more than 65535 different sets of LoRA adapters at once");
    }
    all_loras.push_back(loras);
    return all_loras.size() - 1;
}

// Drops the sets of LoRA adapters that no incomplete token was read with.
void pop_completion::forget_loras() {
    std::map<uint16_t, uint16_t>     renumbered;
    std::vector<llama_adapter_loras> used;
    for (auto & m : marks) {
        if (m.boundary) {
            const auto [it, is_new] = renumbered.emplace(m.loras, used.size());
            if (is_new) {
                used.push_back(all_loras[m.loras]);
            }
            m.loras = it->second;
        }
    }
    all_loras    = std::move(used);
    n_loras_kept = std::max<size_t>(MIN_LORAS_KEPT, 2 * all_loras.size());
}

void pop_completion::begin_ubatch(const llama_ubatch &        ubatch,
                                  llama_memory_context_i &    mctx,
                                  uint32_t                    b_pruned,
                                  bool                        causal,
                                  const llama_adapter_loras & loras) {
    auto & label = ubatch.data->pop;
    if (label.part == POP_CONTINUATION) {
        return; // the pruned pass before it has the same tokens
    }
    cur_loras   = index_of(loras);
    label.cells = pop_memory::cells_of(mctx, kv);

    uint32_t lowest = b_pruned ? b_pruned : LOST;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            const uint16_t before = mark_before(ubatch.seq_id[i][s], ubatch.pos[i]).boundary;
            lowest                = before ? std::min<uint32_t>(lowest, before) : lowest;
        }
    }
    // A chunk is causal. It does not repeat what image features add to the layers from the boundary on.
    const auto works = works_at.find(lowest);
    const bool can   = causal && works != works_at.end() && works->second.chunks &&
                       (ubatch.token || !pop_reads_features_above(model, lowest));
    label.keeps      = can ? lowest : 0;
}

void pop_completion::ubatch_done(const llama_ubatch & ubatch, bool pruned, bool kept) {
    const auto & label = ubatch.data->pop;
    if (label.part == POP_CONTINUATION) {
        if (label.completes) {
            chunk_done(ubatch);
        }
        return;
    }
    const uint16_t own = kept && label.keeps ? label.keeps : LOST;

    std::vector<bool>     whole(ubatch.n_tokens, !pruned);
    std::vector<uint32_t> order(ubatch.n_tokens);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        order[i] = i;
    }
    for (const int32_t i : label.rows) {
        whole[i] = true;
    }
    std::stable_sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return ubatch.pos[i] < ubatch.pos[j]; });

    for (const uint32_t i : order) {
        uint16_t b = whole[i] ? 0 : own;
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            const uint16_t before = mark_before(ubatch.seq_id[i][s], ubatch.pos[i]).boundary;
            b                     = before == LOST ? LOST : before && b == 0 ? own : b;
        }
        marks[label.cells[i]] = { b, cur_loras };
    }
}

void pop_completion::copy_stream(const llama_kv_cache & cache, uint32_t src, uint32_t dst) {
    if (&cache != &kv) {
        return; // the cache of the windows has no states of its own
    }
    const size_t n = kv.get_size();
    std::copy_n(marks.begin() + src * n, n, marks.begin() + dst * n);

    ggml_context_ptr views(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    const auto       view = [&](uint32_t stream) {
        auto * t = ggml_view_2d(views.get(), states, states->ne[0], n, states->nb[1], stream * n * states->nb[1]);
        ggml_backend_view_init(t);
        return t;
    };
    ggml_backend_tensor_copy(view(src), view(dst));
}

void pop_completion::restored(llama_seq_id seq_id) {
    if (seq_id < 0) {
        std::fill(marks.begin(), marks.end(), mark());
        return;
    }
    for (const auto & at : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        marks[row_of(seq_id, at.second)] = mark();
    }
}

void pop_completion::set_lost(llama_seq_id seq_id, llama_pos p0) {
    const auto & order = kv.get_cells(seq_id).seq_pos_get(seq_id);
    for (auto it = order.lower_bound({ p0, 0 }); it != order.end(); ++it) {
        marks[row_of(seq_id, it->second)].boundary = LOST;
    }
}

// The marked tokens of a sequence in the order in which they are completed. All tokens of an image may have the same
// position, and their cells may be in any order, so the search ends at the first position without a mark.
std::vector<pop_completion::cell> pop_completion::marked(llama_seq_id seq_id) const {
    const auto & cells = kv.get_cells(seq_id);
    const auto & order = cells.seq_pos_get(seq_id);

    std::vector<cell> res;
    llama_pos         cur = -1;
    bool              any = true; // token at the position cur is marked
    for (auto it = order.rbegin(); it != order.rend(); ++it) {
        if (it->first != cur) {
            if (!any) {
                break;
            }
            cur = it->first;
            any = false;
        }
        if (marks[row_of(seq_id, it->second)].boundary != 0) {
            res.push_back({ it->first, it->second });
            any = true;
        }
    }
    std::sort(res.begin(), res.end(), [&](const cell & a, const cell & b) {
        const auto & ext_a = cells.ext_get(a.idx);
        const auto & ext_b = cells.ext_get(b.idx);
        return std::tie(a.pos, ext_a.y, ext_a.x, a.idx) < std::tie(b.pos, ext_b.y, ext_b.x, b.idx);
    });
    return res;
}

// How many tokens of a sequence can be completed, and how many others are not the whole model's.
std::pair<uint32_t, uint32_t> pop_completion::count(llama_seq_id seq_id) const {
    const auto all = marked(seq_id);
    const auto first =
        std::find_if(all.begin(), all.end(), [&](const cell & at) { return mark_of(seq_id, at).boundary == LOST; });
    return { first - all.begin(), all.end() - first };
}

uint32_t pop_completion::n_incomplete(llama_seq_id seq_id) const {
    return count(seq_id).first;
}

uint32_t pop_completion::n_lost(llama_seq_id seq_id) const {
    return count(seq_id).second;
}

llama_pos pop_completion::first_incomplete(llama_seq_id seq_id) const {
    const auto all = marked(seq_id);
    return all.empty() ? -1 : all.front().pos;
}

void pop_completion::chunk_done(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const bool joined = i >= first_new(ubatch);
        if (!joined || mark_before(ubatch.seq_id[i][0], ubatch.pos[i]).boundary == 0) {
            marks[ubatch.data->pop.cells[i]] = mark();
        }
        n_completed += !joined;
    }
}
