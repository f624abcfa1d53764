#include "pop-completion.h"

#include "llama-batch.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "pop-memory.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

using slot_info = llama_kv_cache::slot_info;

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
    states = ggml_new_tensor_2d(ctx.get(), type, model.hparams.n_embd, n_cells);
    ggml_set_name(states, "pop_completion");
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buf) {
        throw std::runtime_error("there is no memory for the states that completion needs");
    }
}

uint32_t pop_completion::any_boundary() const {
    const auto it = std::find_if(works_at.begin(), works_at.end(), [](const auto & at) { return at.second; });
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
    if (all_loras.size() == LOST) {
        throw std::runtime_error("completion knows no more than 65535 different sets of LoRA adapters");
    }
    all_loras.push_back(loras);
    return all_loras.size() - 1;
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
    const bool can   = causal && works != works_at.end() && works->second &&
                       (ubatch.token || lowest >= model.hparams.n_deepstack_layers);
    label.keeps      = can ? lowest : 0;
}

void pop_completion::ubatch_done(const llama_ubatch & ubatch, bool pruned, bool kept) {
    const auto & label = ubatch.data->pop;
    if (label.part == POP_CONTINUATION) {
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
    const auto all   = marked(seq_id);
    const auto first = std::find_if(all.begin(), all.end(),
                                    [&](const cell & at) { return marks[row_of(seq_id, at.idx)].boundary == LOST; });
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

// The cells of a chunk's first tokens in the cache of the windows: as many as are there, and none if the window of the
// first token is not.
std::vector<uint32_t> pop_completion::window_cells(llama_seq_id seq_id, const std::vector<cell> & chunk) const {
    const auto & swa   = *static_cast<llama_kv_cache_iswa &>(memory).get_swa();
    const auto & order = swa.get_cells(seq_id).seq_pos_get(seq_id);
    const auto   n_swa = (llama_pos) model.hparams.n_swa;

    const llama_pos oldest = std::max(chunk.front().pos - n_swa + 1, kv.seq_pos_min(seq_id));

    std::vector<uint32_t> res;
    if (order.empty() || order.begin()->first > oldest) {
        return res;
    }
    for (const auto & at : chunk) {
        const auto it = order.lower_bound({ at.pos, 0 });
        if (it == order.end() || it->first != at.pos) {
            break;
        }
        res.push_back(it->second);
    }
    return res;
}

llama_ubatch pop_completion::make_ubatch(llama_seq_id seq_id, const std::vector<cell> & chunk, uint32_t b) const {
    const auto &   cells = kv.get_cells(seq_id);
    const size_t   n     = chunk.size();
    const uint32_t n_pos = model.hparams.n_pos_per_embd();
    const bool     image = cells.ext_get(chunk[0].idx).tok == LLAMA_TOKEN_NULL;

    auto data = std::make_shared<llama_ubatch::data_t>();
    data->seq_idx.resize(LLAMA_MAX_SEQ, -1);
    data->seq_idx[seq_id] = 0;
    data->seq_id_unq      = { seq_id };
    data->seq_id_data.assign(n, seq_id);
    data->pos.resize(n * n_pos);
    for (size_t i = 0; i < n; ++i) {
        const auto & ext = cells.ext_get(chunk[i].idx);
        data->token.push_back(ext.tok);
        data->output.push_back(0);
        data->n_seq_id.push_back(1);
        data->batch_idxs.push_back(i);
        data->seq_id.push_back(&data->seq_id_data[i]);
        const llama_pos image_pos[] = { chunk[i].pos, ext.y, ext.x, 0 };
        for (uint32_t j = 0; j < n_pos; ++j) {
            data->pos[j * n + i] = image ? image_pos[j] : chunk[i].pos;
        }
        data->pop.cells.push_back(row_of(seq_id, chunk[i].idx));
    }
    if (image) { // only the layers below the boundary read it
        data->embd.resize(n * model.hparams.n_embd_inp());
    }
    data->pop.part      = POP_CONTINUATION;
    data->pop.completes = b;

    const bool   streams = kv.get_n_stream() > 1;
    llama_ubatch res     = {};
    res.b_equal_seqs     = streams;
    res.n_tokens         = n;
    res.n_seqs           = streams ? 1 : n;
    res.n_seq_tokens     = streams ? n : 1;
    res.n_seqs_unq       = 1;
    res.n_pos            = n_pos;
    res.token            = image ? nullptr : data->token.data();
    res.embd             = image ? data->embd.data() : nullptr;
    res.pos              = data->pos.data();
    res.n_seq_id         = data->n_seq_id.data();
    res.seq_id           = data->seq_id.data();
    res.seq_id_unq       = data->seq_id_unq.data();
    res.seq_idx          = data->seq_idx.data();
    res.output           = data->output.data();
    res.data             = std::move(data);
    return res;
}

llama_memory_context_ptr pop_completion::next_chunk(llama_seq_id                seq_id,
                                                    uint32_t                    n_max,
                                                    const llama_adapter_loras & loras) {
    auto chunk = marked(seq_id);
    if (chunk.empty()) {
        return nullptr;
    }
    const auto & cells   = kv.get_cells(seq_id);
    const mark   first   = marks[row_of(seq_id, chunk[0].idx)];
    const auto   is_text = [&](const cell & at) { return cells.ext_get(at.idx).tok != LLAMA_TOKEN_NULL; };
    if (first.boundary == LOST) {
        return nullptr;
    }
    if (all_loras[first.loras] != loras) {
        throw std::runtime_error("the tokens to complete were read with other LoRA adapters: set the same ones again");
    }
    // tokens and image features make different graphs
    const auto end = std::find_if(chunk.begin(), chunk.end(), [&](const cell & at) {
        const mark & m = marks[row_of(seq_id, at.idx)];
        return m.boundary != first.boundary || m.loras != first.loras || is_text(at) != is_text(chunk[0]);
    });
    chunk.resize(std::min<size_t>(n_max, end - chunk.begin()));

    const auto slots_of = [seq_id](const llama_kv_cache & cache, std::vector<uint32_t> idxs) {
        slot_info res = {};
        res.s0 = res.s1 = cache.get_stream(seq_id);
        res.strm        = { (llama_seq_id) res.s0 };
        res.idxs        = { std::move(idxs) };
        return std::vector<slot_info>{ res };
    };
    std::vector<uint32_t> in_window;
    auto *                iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory);
    if (iswa) {
        in_window = window_cells(seq_id, chunk);
        if (in_window.empty()) { // what has left the window does not come back
            set_lost(seq_id, chunk[0].pos);
            return nullptr;
        }
        chunk.resize(in_window.size());
    }
    std::vector<uint32_t> idxs;
    for (const auto & at : chunk) {
        idxs.push_back(at.idx);
    }
    const llama_ubatch ubatch = make_ubatch(seq_id, chunk, first.boundary);
    if (iswa) {
        return pop_memory::make_chunk(*iswa, slots_of(kv, idxs), slots_of(*iswa->get_swa(), in_window), ubatch);
    }
    return pop_memory::make_chunk(kv, slots_of(kv, idxs), ubatch);
}

void pop_completion::chunk_done(const llama_ubatch & ubatch) {
    for (const int32_t row : ubatch.data->pop.cells) {
        marks[row] = mark();
    }
}
