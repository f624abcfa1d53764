#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"
#include "pop-completion.h"
#include "pop-memory.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

using slot_info = llama_kv_cache::slot_info;

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

// Makes the micro-batch of a chunk. If a further token joins it, that token's own micro-batch is joins, and the last
// cell is the one that it is going to have.
llama_ubatch pop_completion::make_ubatch(llama_seq_id              seq_id,
                                         const std::vector<cell> & chunk,
                                         uint32_t                  b,
                                         const llama_ubatch *      joins) const {
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
        const auto & ext     = cells.ext_get(chunk[i].idx);
        const bool   further = joins && i + 1 == n;
        data->token.push_back(further ? joins->token[0] : ext.tok);
        data->output.push_back(further);
        data->n_seq_id.push_back(1);
        data->batch_idxs.push_back(i);
        data->seq_id.push_back(&data->seq_id_data[i]);
        const llama_pos image_pos[] = { chunk[i].pos, ext.y, ext.x, 0 };
        for (uint32_t j = 0; j < n_pos; ++j) {
            data->pos[j * n + i] = image ? image_pos[j] : chunk[i].pos;
        }
        data->pop.cells.push_back(row_of(seq_id, chunk[i].idx));
    }
    if (image) { // pop_reads_features_above() is false, so nothing reads it
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

// Tokens that were read differently are not in the same chunk.
std::vector<pop_completion::cell> pop_completion::chunk_cells(llama_seq_id seq_id, uint32_t n_max) const {
    auto chunk = marked(seq_id);
    if (chunk.empty() || mark_of(seq_id, chunk[0]).boundary == LOST) {
        return {};
    }
    const auto & cells   = kv.get_cells(seq_id);
    const mark   first   = mark_of(seq_id, chunk[0]);
    const auto   is_text = [&](const cell & at) { return cells.ext_get(at.idx).tok != LLAMA_TOKEN_NULL; };
    // tokens and image features make different graphs
    const auto end = std::find_if(chunk.begin(), chunk.end(), [&](const cell & at) {
        const mark m = mark_of(seq_id, at);
        return m.boundary != first.boundary || m.loras != first.loras || is_text(at) != is_text(chunk[0]);
    });
    chunk.resize(std::min<size_t>(n_max, end - chunk.begin()));
    return chunk;
}

void pop_completion::check_loras(llama_seq_id seq_id, const llama_adapter_loras & loras) const {
    const auto chunk = chunk_cells(seq_id, 1);
    if (!chunk.empty() && all_loras[mark_of(seq_id, chunk[0]).loras] != loras) {
        throw std::runtime_error("the tokens to complete were read with other LoRA adapters: set the same ones again");
    }
}

llama_memory_context_ptr pop_completion::next_chunk(llama_seq_id                seq_id,
                                                    uint32_t                    n_max,
                                                    const llama_adapter_loras & loras) {
    check_loras(seq_id, loras);
    auto chunk = chunk_cells(seq_id, n_max);
    if (chunk.empty()) {
        return nullptr;
    }
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
    const llama_ubatch ubatch = make_ubatch(seq_id, chunk, mark_of(seq_id, chunk[0]).boundary, nullptr);
    if (iswa) {
        return pop_memory::make_chunk(*iswa, slots_of(kv, idxs), slots_of(*iswa->get_swa(), in_window), ubatch);
    }
    return pop_memory::make_chunk(kv, slots_of(kv, idxs), ubatch);
}

uint32_t pop_completion::first_new(const llama_ubatch & ubatch) {
    const auto & label = ubatch.data->pop;
    const bool   chunk = label.part == POP_CONTINUATION && label.completes;
    return chunk ? ubatch.n_tokens - (ubatch.output[ubatch.n_tokens - 1] ? 1 : 0) : 0;
}

bool pop_completion::join(const request & what, llama_memory_context_i & mctx, const llama_adapter_loras & loras) {
    const llama_seq_id seq_id = what.seq_id;

    llama_ubatch * own = pop_memory::only_ubatch(mctx);
    if (!own || own->n_tokens != 1 || own->n_seq_id[0] != 1 || own->seq_id[0][0] != seq_id || !own->output[0] ||
        !own->token) {
        return false;
    }
    auto chunk = chunk_cells(seq_id, what.n_max);
    if (chunk.empty() || kv.get_cells(seq_id).ext_get(chunk[0].idx).tok == LLAMA_TOKEN_NULL) {
        return false;
    }
    // the token goes on from a state at the boundary of the chunk, so that has to be the state that is kept of it
    const mark first = mark_of(seq_id, chunk[0]);
    const auto works = works_at.find(first.boundary);
    if (all_loras[first.loras] != loras || mark_before(seq_id, own->pos[0]).boundary < first.boundary ||
        works == works_at.end() || !works->second.joins) {
        return false;
    }
    std::vector<uint32_t> in_window;
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&memory)) {
        const auto & swa    = *iswa->get_swa();
        const auto   cells  = pop_memory::cells_of(mctx, swa);
        const auto & window = swa.get_cells(seq_id);
        const auto   idx    = cells[0] % swa.get_size();

        in_window = window_cells(seq_id, chunk);
        if (in_window.empty() ||
            (!window.is_empty(idx) && window.pos_get(idx) > chunk[0].pos - (llama_pos) model.hparams.n_swa)) {
            return false; // the token takes a cell that the chunk reads
        }
        chunk.resize(in_window.size());
    }
    std::vector<uint32_t> idxs;
    for (const auto & at : chunk) {
        idxs.push_back(at.idx);
    }
    chunk.push_back({ own->pos[0], (uint32_t) pop_memory::cells_of(mctx, kv)[0] % kv.get_size() });
    own->output[0]           = 0;
    own->data->pop.part      = POP_BELOW;
    own->data->pop.completes = first.boundary;
    llama_ubatch joined      = make_ubatch(seq_id, chunk, first.boundary, own);
    pop_memory::append_chunk(mctx, idxs, in_window, joined);
    return true;
}

namespace {

// While a chunk runs, there are no outputs, and the computation also ends if stop is set. Afterwards, also after an
// exception, all is as it was: what the last decode() has computed can still be read.
class chunk_scope {
public:
    chunk_scope(llama_context & ctx, uint32_t & n_outputs, ggml_abort_callback before, void * data) :
        ctx(ctx), n_outputs(n_outputs), n_outputs_before(n_outputs), before(before), data(data) {
        n_outputs = 0;
        ctx.set_abort_callback(should_stop, this);
    }

    ~chunk_scope() {
        n_outputs = n_outputs_before;
        ctx.set_abort_callback(before, data);
    }

    chunk_scope(const chunk_scope &) = delete;

private:
    static bool should_stop(void * scope) {
        const auto & self = *(const chunk_scope *) scope;
        return self.ctx.pop.completion->stop || (self.before && self.before(self.data));
    }

    llama_context &     ctx;
    uint32_t &          n_outputs;
    const uint32_t      n_outputs_before;
    ggml_abort_callback before;
    void *              data;
};

} // namespace

// A chunk that is given up leaves its marks, and the next try writes all of it again.
uint32_t llama_context::pop_complete(llama_seq_id seq_id, uint32_t n_max) {
    synchronize();
    sched_reserve();
    memory_update(false);

    const chunk_scope scope(*this, n_outputs, abort_callback, abort_callback_data);

    auto &   completion = *pop.completion;
    uint32_t n_done     = 0;
    while (n_done < n_max && !completion.stop) {
        auto mctx = completion.next_chunk(seq_id, std::min(n_max - n_done, cparams.n_ubatch), *loras);
        if (!mctx) {
            break;
        }
        const auto & ubatch = mctx->get_ubatch();
        ggml_status  status;
        if (!process_ubatch(ubatch, LLM_GRAPH_TYPE_DEFAULT, mctx.get(), status)) {
            if (status == GGML_STATUS_ABORTED) {
                break;
            }
            throw std::runtime_error("the chunk could not be computed");
        }
        synchronize();
        completion.chunk_done(ubatch);
        n_done += ubatch.n_tokens;
    }
    completion.stop = false;
    return n_done;
}
