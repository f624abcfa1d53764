// Completion: the layers that pruned tokens have skipped run for them later, which makes their cache the whole model's.
//
// For each cell of the cache that needs it a pop_completion keeps the state of its token at a boundary, and a mark that
// says which boundary that is. llama_context (patch pop/0008) calls begin_ubatch() before each micro-batch of decode(),
// pop_context calls ubatch_done() after it, and llama_context::pop_complete() runs the chunks (pop-chunks.cpp). A chunk
// can also run in a decode() of one further token: see join().
//
// A token is the whole model's if it was run whole and the token before it in its sequence is the whole model's. Other
// tokens attend to caches that are not. Completion goes in the order of positions, so the marked tokens end a sequence.
// The state that is kept of a token is the one at the lowest boundary of all marked tokens before it and its own,
// because only up to there its state is the whole model's.
//
// The marks describe what the cache holds, so they move with it: whatever writes keys and values also writes marks, and
// a removal, a copy within a stream or a shift of positions changes neither.

#pragma once

#include "llama-adapter.h"
#include "llama-memory.h"

#include "ggml-cpp.h"

#include <atomic>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class llama_kv_cache;
struct llama_model;
struct llama_ubatch;

struct pop_completion {
    // The memory is of a kind that find_cache() knows. The states have this type and lie in a buffer of the type buft.
    // It throws an exception if there is no room for them.
    pop_completion(llama_memory_i & memory, const llama_model & model, ggml_type type, ggml_backend_buffer_type_t buft);

    // The cache whose cells number the states, or nullptr if this kind of memory cannot be completed.
    static llama_kv_cache * find_cache(llama_memory_i & memory);

    // Fills the micro-batch's label: its cells, and the boundary whose states its graph has to keep. b_pruned is the
    // boundary that its tokens are pruned at, 0 if they are not or if nothing is lost there.
    void begin_ubatch(const llama_ubatch &        ubatch,
                      llama_memory_context_i &    mctx,
                      uint32_t                    b_pruned,
                      bool                        causal,
                      const llama_adapter_loras & loras);

    // Marks the tokens of a micro-batch that was computed. kept says whether its graph has kept their states.
    void ubatch_done(const llama_ubatch & ubatch, bool pruned, bool kept);

    // A copy of a sequence into another stream has copied all cells of the cache.
    void copy_stream(const llama_kv_cache & cache, uint32_t src, uint32_t dst);

    // The cells of a sequence, or of all with -1, were restored from a state, which counts as the whole model's.
    void restored(llama_seq_id seq_id);

    // The tokens of a sequence from a position on are not the whole model's, and their states are not there.
    void set_lost(llama_seq_id seq_id, llama_pos p0);

    uint32_t n_incomplete(llama_seq_id seq_id) const;
    uint32_t n_lost(llama_seq_id seq_id) const;

    // The position of the first token that is not the whole model's, -1 if there is none.
    llama_pos first_incomplete(llama_seq_id seq_id) const;

    // The memory context of the next chunk of a sequence, of n_max tokens at most; nullptr if there is none. It throws
    // an exception if the tokens were read with other LoRA adapters.
    llama_memory_context_ptr next_chunk(llama_seq_id seq_id, uint32_t n_max, const llama_adapter_loras & loras);

    // The tokens of a chunk are the whole model's now. A token that has joined it is if all before it are.
    void chunk_done(const llama_ubatch & ubatch);

    // Throws an exception if the first marked tokens of a sequence were read with other LoRA adapters.
    void check_loras(llama_seq_id seq_id, const llama_adapter_loras & loras) const;

    struct request {
        llama_seq_id seq_id = -1; // none
        uint32_t     n_max  = 0;  // tokens of the chunk
    };

    request asked; // of the next decode()

    // Called before decode() computes its micro-batches. If there is a chunk as requested, and one token of the same
    // sequence alone is decoded, the layers below the boundary run that token, and then those from there on the chunk
    // and the token together, so their weights are read once. Returns false, and changes nothing, if there is not.
    bool join(const request & what, llama_memory_context_i & mctx, const llama_adapter_loras & loras);

    // The index of the first token of a micro-batch that was not in the cache before this decode().
    static uint32_t first_new(const llama_ubatch & ubatch);

    uint64_t n_completed = 0; // tokens

    ggml_tensor * states = nullptr; // [pop_state_size(), cells of all streams]

    // How completion works at a boundary.
    struct ways {
        bool chunks = false;
        bool joins  = false; // a further token can join a chunk
    };

    std::map<uint32_t, ways> works_at; // the boundaries that llama_context::pop_try_completion() has built graphs for

    // A boundary at which completion works, 0 if there is none.
    uint32_t any_boundary() const;

    std::atomic<bool> stop = false; // the chunk that is running, or else the next one, shall be given up

private:
    static constexpr uint16_t LOST           = UINT16_MAX; // what the token lacks cannot be computed
    static constexpr size_t   MIN_LORAS_KEPT = 64;         // sets of adapters among which none is dropped

    struct mark {
        uint16_t boundary = 0; // whose state is kept, 0 if the token is whole, or LOST
        uint16_t loras    = 0; // index of the adapters in use
    };

    struct cell {
        llama_pos pos;
        uint32_t  idx; // within the stream
    };

    size_t       row_of(llama_seq_id seq_id, uint32_t idx) const;
    mark         mark_of(llama_seq_id seq_id, const cell & at) const { return marks[row_of(seq_id, at.idx)]; }
    mark         mark_before(llama_seq_id seq_id, llama_pos pos) const;
    uint16_t     index_of(const llama_adapter_loras & loras);
    void         forget_loras();
    llama_ubatch make_ubatch(llama_seq_id              seq_id,
                             const std::vector<cell> & chunk,
                             uint32_t                  b,
                             const llama_ubatch *      joins) const;

    // The cells of the next chunk of a sequence in the order of positions; none if there is no chunk.
    std::vector<cell> chunk_cells(llama_seq_id seq_id, uint32_t n_max) const;

    std::vector<cell>             marked(llama_seq_id seq_id) const;
    std::pair<uint32_t, uint32_t> count(llama_seq_id seq_id) const;
    std::vector<uint32_t>         window_cells(llama_seq_id seq_id, const std::vector<cell> & chunk) const;

    llama_memory_i &    memory;
    llama_kv_cache &    kv;
    const llama_model & model;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    std::vector<mark>                marks;     // [cells of all streams]
    std::vector<llama_adapter_loras> all_loras; // the sets of adapters that tokens were read with
    size_t n_loras_kept = MIN_LORAS_KEPT;       // how many there may be before unused ones are dropped

    uint16_t cur_loras = 0;
};
