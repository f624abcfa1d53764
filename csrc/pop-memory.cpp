#include "pop-memory.h"

#include "llama-batch.h"

#include <algorithm>
#include <vector>

using slot_info = llama_kv_cache::slot_info;

namespace {

// One micro-batch to process. Its tokens' cells are those of the original's streams [s0, s0 + cells.size()), picked by
// cells.
struct part {
    llama_ubatch ubatch;
    size_t       i_original;
    uint32_t     s0 = 0;

    std::vector<std::vector<int32_t>> cells; // the cells of each stream; if empty, the original's own slots
};

} // namespace

// Makes a micro-batch of its own from some rows of another.
static llama_ubatch take_rows(const llama_ubatch & from, const std::vector<int32_t> & rows, uint32_t n_streams) {
    // A field that llama.cpp adds to data_t makes this line a compile error: it would have to be copied below.
    const auto & [token, embd, pos, n_seq_id, seq_id, seq_id_unq, seq_idx, output, batch_idxs, seq_id_data, pop] =
        *from.data;

    const size_t n      = rows.size();
    const size_t n_embd = from.embd ? embd.size() / from.n_tokens : 0;

    auto data = std::make_shared<llama_ubatch::data_t>();
    data->seq_idx.resize(seq_idx.size(), -1);
    data->pos.resize(n * from.n_pos);

    for (size_t i = 0; i < n; ++i) {
        const int32_t row = rows[i];
        data->token.push_back(token[row]);
        data->output.push_back(output[row]);
        data->n_seq_id.push_back(n_seq_id[row]);
        data->batch_idxs.push_back(batch_idxs[row]);
        for (uint32_t j = 0; j < from.n_pos; ++j) {
            data->pos[j * n + i] = pos[(size_t) j * from.n_tokens + row];
        }
        data->embd.insert(data->embd.end(), embd.begin() + row * n_embd, embd.begin() + (row + 1) * n_embd);
        data->seq_id_data.insert(data->seq_id_data.end(), seq_id[row], seq_id[row] + n_seq_id[row]);
    }

    llama_seq_id * ids = data->seq_id_data.data();
    for (size_t i = 0; i < n; ++i) {
        data->seq_id.push_back(ids);
        ids += data->n_seq_id[i];
    }
    for (const llama_seq_id id : seq_id_unq) { // in the original's order
        if (std::find(data->seq_id_data.begin(), data->seq_id_data.end(), id) != data->seq_id_data.end()) {
            data->seq_idx[id] = data->seq_id_unq.size();
            data->seq_id_unq.push_back(id);
        }
    }

    // with a stream for each sequence the tokens stand in equal parts, one for each stream
    llama_ubatch res = from;
    res.b_equal_seqs = n_streams > 0;
    res.n_tokens     = n;
    res.n_seqs       = n_streams > 0 ? n_streams : n;
    res.n_seq_tokens = n / res.n_seqs;
    res.n_seqs_unq   = data->seq_id_unq.size();
    res.token        = from.token ? data->token.data() : nullptr;
    res.embd         = from.embd ? data->embd.data() : nullptr;
    res.pos          = data->pos.data();
    res.n_seq_id     = data->n_seq_id.data();
    res.seq_id       = data->seq_id.data();
    res.seq_id_unq   = data->seq_id_unq.data();
    res.seq_idx      = data->seq_idx.data();
    res.output       = data->output.data();
    res.data         = std::move(data);

    return res;
}

// Appends the original, now pruned, and behind it its continuations. The kept states lie in the order of their tokens.
static void split_off_continuations(const llama_ubatch & ubatch,
                                    size_t               i_original,
                                    bool                 kv_unified,
                                    std::vector<part> &  parts) {
    const std::vector<int32_t> rows = ubatch.data->pop.rows;

    std::vector<part> continuations;
    if (kv_unified || !ubatch.equal_seqs()) { // one stream
        continuations.push_back({ take_rows(ubatch, rows, 0), i_original, 0, { rows } });
    } else {
        // one continuation has the same number of tokens in each of its streams, which lie side by side
        std::vector<std::vector<int32_t>> of_stream(ubatch.n_seqs);
        for (int32_t row : rows) {
            of_stream[row / ubatch.n_seq_tokens].push_back(row);
        }
        for (uint32_t s0 = 0, s1; s0 < ubatch.n_seqs; s0 = s1) {
            part                 cur = { {}, i_original, s0, {} };
            std::vector<int32_t> taken;
            for (s1 = s0; s1 < ubatch.n_seqs && of_stream[s1].size() == of_stream[s0].size(); ++s1) {
                taken.insert(taken.end(), of_stream[s1].begin(), of_stream[s1].end());
                cur.cells.emplace_back();
                for (int32_t row : of_stream[s1]) {
                    cur.cells.back().push_back(row - s1 * ubatch.n_seq_tokens);
                }
            }
            if (!taken.empty()) {
                cur.ubatch = take_rows(ubatch, taken, s1 - s0);
                continuations.push_back(std::move(cur));
            }
        }
    }

    std::fill(ubatch.output, ubatch.output + ubatch.n_tokens, 0);
    ubatch.data->pop.part = POP_PRUNED;
    parts.push_back({ ubatch, i_original, 0, {} });

    uint32_t first = 0;
    for (auto & cur : continuations) {
        cur.ubatch.data->pop.part        = POP_CONTINUATION;
        cur.ubatch.data->pop.first_state = first;
        first += cur.ubatch.n_tokens;
        parts.push_back(std::move(cur));
    }
}

static std::vector<part> split_all(const std::vector<llama_ubatch> & ubatches, bool kv_unified) {
    std::vector<part> parts;
    for (size_t i = 0; i < ubatches.size(); ++i) {
        if (ubatches[i].data->pop.part == POP_CONTINUES) {
            split_off_continuations(ubatches[i], i, kv_unified, parts);
        } else {
            parts.push_back({ ubatches[i], i, 0, {} });
        }
    }
    return parts;
}

// The cache cells of each part.
static std::vector<slot_info> slots_of(const std::vector<slot_info> & original, const std::vector<part> & parts) {
    std::vector<slot_info> res;
    for (const auto & cur : parts) {
        const slot_info & all = original[cur.i_original];
        if (cur.cells.empty()) {
            res.push_back(all);
            continue;
        }
        slot_info some = {};
        for (size_t s = 0; s < cur.cells.size(); ++s) {
            some.strm.push_back(all.strm[cur.s0 + s]);
            some.idxs.emplace_back();
            for (int32_t cell : cur.cells[s]) {
                some.idxs.back().push_back(all.idxs[cur.s0 + s][cell]);
            }
        }
        some.s0 = *std::min_element(some.strm.begin(), some.strm.end());
        some.s1 = *std::max_element(some.strm.begin(), some.strm.end());
        res.push_back(std::move(some));
    }
    return res;
}

static std::vector<llama_ubatch> ubatches_of(const std::vector<part> & parts) {
    std::vector<llama_ubatch> res;
    for (const auto & cur : parts) {
        res.push_back(cur.ubatch);
    }
    return res;
}

bool pop_memory::supports_continuation(llama_memory_i & memory) {
    return dynamic_cast<llama_kv_cache *>(&memory) || dynamic_cast<llama_kv_cache_iswa *>(&memory);
}

void pop_memory::add_continuations(llama_memory_context_i & mctx, bool kv_unified) {
    const auto replace = [](llama_kv_cache_context & ctx, const std::vector<part> & parts) {
        ctx.sinfos   = slots_of(ctx.sinfos, parts);
        ctx.ubatches = ubatches_of(parts);
    };

    if (auto * kv = dynamic_cast<llama_kv_cache_context *>(&mctx)) {
        replace(*kv, split_all(kv->ubatches, kv_unified));
    } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa_context *>(&mctx)) {
        const auto parts = split_all(iswa->ubatches, kv_unified);
        replace(static_cast<llama_kv_cache_context &>(*iswa->ctx_base), parts);
        replace(static_cast<llama_kv_cache_context &>(*iswa->ctx_swa), parts);
        iswa->ubatches = ubatches_of(parts);
    }
}

std::vector<int32_t> pop_memory::cells_of(llama_memory_context_i & mctx, const llama_kv_cache & kv) {
    const auto * iswa = dynamic_cast<llama_kv_cache_iswa_context *>(&mctx);
    const auto & ctx  = !iswa                         ? static_cast<llama_kv_cache_context &>(mctx)
                        : iswa->get_base()->kv == &kv ? *iswa->get_base()
                                                      : *iswa->get_swa();
    const auto & slot = ctx.sinfos[ctx.i_cur];

    std::vector<int32_t> res;
    for (size_t s = 0; s < slot.n_stream(); ++s) {
        for (const uint32_t idx : slot.idxs[s]) {
            res.push_back(slot.strm[s] * kv.get_size() + idx);
        }
    }
    return res;
}

llama_ubatch * pop_memory::only_ubatch(llama_memory_context_i & mctx) {
    auto * iswa = dynamic_cast<llama_kv_cache_iswa_context *>(&mctx);
    auto * kv   = iswa ? static_cast<llama_kv_cache_context *>(iswa->ctx_base.get())
                       : dynamic_cast<llama_kv_cache_context *>(&mctx);
    return kv && kv->ubatches.size() == 1 ? &kv->ubatches[0] : nullptr;
}

void pop_memory::append_chunk(llama_memory_context_i &      mctx,
                              const std::vector<uint32_t> & idxs,
                              const std::vector<uint32_t> & idxs_swa,
                              const llama_ubatch &          ubatch) {
    const auto append = [&](llama_kv_cache_context & ctx, std::vector<uint32_t> cells) {
        slot_info slots = ctx.sinfos[0];
        cells.push_back(slots.idxs[0][0]);
        slots.idxs[0] = std::move(cells);
        ctx.sinfos.push_back(std::move(slots));
        ctx.ubatches.push_back(ubatch);
    };
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa_context *>(&mctx)) {
        append(static_cast<llama_kv_cache_context &>(*iswa->ctx_base), idxs);
        append(static_cast<llama_kv_cache_context &>(*iswa->ctx_swa), idxs_swa);
        iswa->ubatches.push_back(ubatch);
    } else {
        append(dynamic_cast<llama_kv_cache_context &>(mctx), idxs);
    }
}

void pop_memory::limit_cells(llama_kv_cache_context & ctx) {
    const auto &       ubatch = ctx.get_ubatch();
    const llama_seq_id seq_id = ubatch.seq_id[0][0];
    const llama_pos    last   = ubatch.pos[ubatch.n_tokens - 1];

    uint32_t n = 0;
    for (const auto & at : ctx.kv->get_cells(seq_id).seq_pos_get(seq_id)) {
        if (at.first > last) {
            break;
        }
        n = std::max(n, at.second + 1);
    }
    ctx.n_kv = std::min<uint32_t>(ctx.n_kv, GGML_PAD(n, 256)); // llama_kv_cache::get_n_kv() pads to 256, too
}

void pop_memory::limit_cells(llama_kv_cache_iswa_context & ctx) {
    limit_cells(static_cast<llama_kv_cache_context &>(*ctx.ctx_base));
    limit_cells(static_cast<llama_kv_cache_context &>(*ctx.ctx_swa));
}

namespace {

template <typename base> struct chunk_context : base {
    using base::base;

    bool apply() override {
        const bool done = base::apply();
        pop_memory::limit_cells(*this);
        return done;
    }
};

} // namespace

llama_memory_context_ptr pop_memory::make_chunk(llama_kv_cache &                kv,
                                                llama_kv_cache::slot_info_vec_t slots,
                                                const llama_ubatch &            ubatch) {
    return std::make_unique<chunk_context<llama_kv_cache_context>>(&kv, std::move(slots),
                                                                   std::vector<llama_ubatch>{ ubatch });
}

llama_memory_context_ptr pop_memory::make_chunk(llama_kv_cache_iswa &           kv,
                                                llama_kv_cache::slot_info_vec_t slots,
                                                llama_kv_cache::slot_info_vec_t slots_swa,
                                                const llama_ubatch &            ubatch) {
    return std::make_unique<chunk_context<llama_kv_cache_iswa_context>>(&kv, std::move(slots), std::move(slots_swa),
                                                                        std::vector<llama_ubatch>{ ubatch });
}
