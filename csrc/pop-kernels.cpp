#include "pop-kernels.h"

#include "ggml-cpu-impl.h"
#include "pop-kernels-setting.h"

void pop_kernels_choose(const char * setting) {
    pop_setting() = pop_read_setting(setting);
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#    include "pop-kernels-groups.h"
#    include "pop-kernels-job.h"

#    include <algorithm>

// Fewer rows are decoding rather than a prompt: reading the weights from memory limits their speed.
static constexpr int64_t MIN_ROWS = 9;

// Rows that one pass over the weights takes. Their sums stay in the second-level cache.
static constexpr int64_t MAX_PASS_ROWS = 512;

// A pop_scratch is the part of the work buffer that belongs to a thread.
template <class S> struct alignas(64) pop_scratch {
    pop_tile<S> tile;
    uint8_t     packed[288 * pop_tile<S>::outputs]; // a chunk of the last outputs, where they do not fill a tile
    float       sums[MAX_PASS_ROWS][pop_tile<S>::outputs];
};

// Asks for the chunk of the weights that comes next, a few cache lines for each group of rows.
class pop_prefetch {
public:
    pop_prefetch(const uint8_t * start, size_t stride, int64_t n_rows, int bytes, int64_t n_steps) :
        start(start), stride(stride), lines(bytes / 64 + 1), n(n_rows * lines), per_step((n + n_steps - 1) / n_steps) {}

    void step() {
        for (const int64_t end = std::min(next + per_step, n); next < end; next++) {
            _mm_prefetch((const char *) start + next / lines * stride + next % lines * 64, _MM_HINT_T0);
        }
    }

private:
    const uint8_t * start;
    size_t          stride;
    int64_t         lines;
    int64_t         n;
    int64_t         per_step;
    int64_t         next = 0;
};

// Quantizes a row of the input.
template <class S, class F> static void quantize_row(const pop_product_job & job, int64_t row) {
    const float * x = job.input_row(row);
    for (int64_t c = 0; c < job.n_chunks; c++) {
        pop_quantize<S, F>(x + c * pop_chunk, (int) job.chunk_inputs(c), job.x[c * job.n_rows + row]);
    }
}

// Computes the outputs of a tile of an expert's weights for the rows from `first` to `end`, MAX_PASS_ROWS at most.
template <class S, class F>
static void compute_tile(
    const pop_product_job & job, int64_t expert, int64_t tile, int64_t first, int64_t end, void * memory) {
    constexpr int rows        = pop_rows<S, F>();
    constexpr int outputs     = pop_tile<S>::outputs;
    constexpr int chunk_bytes = F::group_rows * (F::is_k ? F::block : 8 * F::block);
    static_assert(chunk_bytes * outputs / F::group_rows <= (int) sizeof(pop_scratch<S>::packed), "a chunk fits");

    pop_scratch<S> & scratch = *(pop_scratch<S> *) memory;

    const int64_t   first_out = tile * outputs;
    const int64_t   n_outputs = std::min<int64_t>(outputs, job.n_out - first_out);
    const size_t    stride    = F::group_rows * job.weights->nb[1];
    const uint8_t * weights =
        (const uint8_t *) job.weights->data + expert * job.weights->nb[2] + first_out * job.weights->nb[1];
    const bool    direct   = n_outputs == outputs && job.is_regular(); // the last sums go there at once
    const int64_t n_groups = (n_outputs + F::group_rows - 1) / F::group_rows;

    for (int64_t c = 0; c < job.n_chunks; c++) {
        const int       n_in   = (int) job.chunk_inputs(c);
        const int       bytes  = F::group_rows * (F::is_k ? F::block : n_in / 32 * F::block);
        const uint8_t * packed = weights + c * chunk_bytes;
        const uint8_t * from   = packed;
        size_t          step   = stride;
        if (n_outputs < outputs) {
            step = chunk_bytes;
            memset(scratch.packed, 0, sizeof(scratch.packed));
            for (int64_t i = 0; i < n_groups; i++) {
                memcpy(scratch.packed + i * step, packed + i * stride, bytes);
            }
            from = scratch.packed;
        }
        for (int v = 0; v < pop_vectors; v++) {
            F::template unpack<S>(from + v * S::lanes / F::group_rows * step, step, n_in / 32, scratch.tile, v);
        }
        const int64_t n_next = c + 1 < job.n_chunks ? n_groups : 0;
        pop_prefetch  next(packed + chunk_bytes, stride, n_next, bytes, (end - first + rows - 1) / rows);
        const bool    is_last = direct && c + 1 == job.n_chunks;
        for (int64_t r = first; r < end; r += rows) {
            float * const sums   = scratch.sums[r - first];
            const int     n_rows = (int) std::min<int64_t>(rows, end - r);
            pop_multiply_rows<S, F>(n_rows, job.x + c * job.n_rows + r, scratch.tile, n_in / 4 / F::group,
                                    c == 0 ? nullptr : sums, is_last ? job.output_row(r) + first_out : sums,
                                    is_last ? job.output->nb[1] / sizeof(float) : outputs);
            next.step();
        }
    }
    for (int64_t r = first; r < end && !direct; r++) {
        memcpy(job.output_row(r) + first_out, scratch.sums[r - first], n_outputs * sizeof(float));
    }
}

// The functions for a type of weights, for one instruction set
struct pop_kernel {
    void (*quantize)(const pop_product_job & job, int64_t row);
    void (*compute)(
        const pop_product_job & job, int64_t expert, int64_t tile, int64_t first, int64_t end, void * scratch);
    int64_t outputs;
    size_t  scratch;
};

template <class S, class F> static const pop_kernel * make_kernel() {
    static const pop_kernel kernel = { quantize_row<S, F>, compute_tile<S, F>, pop_tile<S>::outputs,
                                       sizeof(pop_scratch<S>) };
    return &kernel;
}

template <class S> static const pop_kernel * kernel_of(ggml_type type, bool in_groups) {
    if (in_groups) {
        switch (type) {
            case GGML_TYPE_Q4_0:
                return make_kernel<S, pop_q4_0_groups>();
            case GGML_TYPE_IQ4_NL:
                return make_kernel<S, pop_iq4_nl_groups>();
            case GGML_TYPE_Q2_K:
                return make_kernel<S, pop_q2_k_groups>();
            case GGML_TYPE_Q4_K:
                return make_kernel<S, pop_q4_k_groups>();
            default:
                return nullptr;
        }
    }
    switch (type) {
        case GGML_TYPE_Q4_0:
            return make_kernel<S, pop_q4_0>();
        case GGML_TYPE_Q4_1:
            return make_kernel<S, pop_q4_1>();
        case GGML_TYPE_Q5_0:
            return make_kernel<S, pop_q5_0>();
        case GGML_TYPE_Q5_1:
            return make_kernel<S, pop_q5_1>();
        case GGML_TYPE_Q8_0:
            return make_kernel<S, pop_q8_0>();
        case GGML_TYPE_IQ4_NL:
            return make_kernel<S, pop_iq4_nl>();
        case GGML_TYPE_Q2_K:
            return make_kernel<S, pop_q2_k>();
        case GGML_TYPE_Q3_K:
            return make_kernel<S, pop_q3_k>();
        case GGML_TYPE_Q4_K:
            return make_kernel<S, pop_q4_k>();
        case GGML_TYPE_Q5_K:
            return make_kernel<S, pop_q5_k>();
        case GGML_TYPE_Q6_K:
            return make_kernel<S, pop_q6_k>();
        case GGML_TYPE_IQ4_XS:
            return make_kernel<S, pop_iq4_xs>();
        default:
            return nullptr;
    }
}

static const pop_kernel * find_kernel(ggml_type type, bool in_groups) {
    switch (pop_setting().load()) {
        case POP_KERNELS_OFF:
            return nullptr;
        case POP_KERNELS_AVX2:
            return kernel_of<pop_avx2>(type, in_groups);
        case POP_KERNELS_AVX_VNNI:
            break;
        case POP_KERNELS_BEST:
#    if defined(POP_KERNELS_HAS_AVX512_VNNI)
            return kernel_of<pop_avx512_vnni>(type, in_groups);
#    endif
            break;
    }
#    if defined(POP_KERNELS_HAS_AVX_VNNI)
    return kernel_of<pop_avx_vnni>(type, in_groups);
#    else
    return kernel_of<pop_avx2>(type, in_groups);
#    endif
}

static const pop_kernel * find_kernel(const ggml_tensor * dst, bool in_groups) {
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * input   = dst->src[1];
    if (dst->op_params[POP_KERNELS_OFF_PARAM] || input->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 ||
        (weights->extra && !in_groups) || weights->ne[3] != 1 || weights->nb[0] != ggml_type_size(weights->type) ||
        input->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        return nullptr;
    }
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        // Unpacking the weights of an expert for a row or two would cost more than it saves.
        const ggml_tensor * ids = dst->src[2];
        if (ids->ne[1] < MIN_ROWS || ids->ne[0] * ids->ne[1] < 4 * weights->ne[2]) {
            return nullptr;
        }
    } else if (ggml_nrows(input) < MIN_ROWS || weights->ne[2] != 1) {
        return nullptr;
    }
    return find_kernel(weights->type, in_groups);
}

static size_t aligned(size_t n) {
    return (n + 63) / 64 * 64;
}

size_t pop_kernels_work_size(int n_threads, const ggml_tensor * dst, bool in_groups) {
    const pop_kernel * kernel = find_kernel(dst, in_groups);
    if (!kernel) {
        return 0;
    }
    const pop_product_job job(dst);

    const size_t pairs = job.ids ? (job.n_rows + job.weights->ne[2] + 1) * sizeof(int32_t) : 0;
    return 64 + n_threads * aligned(kernel->scratch) + job.n_chunks * job.n_rows * sizeof(pop_activations) + pairs;
}

bool pop_kernels_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, bool in_groups) {
    const pop_kernel * kernel = params->use_ref ? nullptr : find_kernel(dst, in_groups);
    if (!kernel) {
        return false;
    }
    pop_product_job job(dst);
    const int       ith = params->ith;
    const int       nth = params->nth;

    char * const work    = (char *) aligned((size_t) params->wdata);
    char * const scratch = work + ith * aligned(kernel->scratch);
    GGML_ASSERT(pop_kernels_work_size(nth, dst, in_groups) <= params->wsize);

    job.x      = (pop_activations *) (work + nth * aligned(kernel->scratch));
    job.pairs  = (int32_t *) (job.x + job.n_chunks * job.n_rows);
    job.starts = job.pairs + job.n_rows;

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
        if (job.ids) {
            job.sort_pairs();
        }
    }
    if (job.ids) {
        ggml_barrier(params->threadpool);
    }
    for (int64_t r = job.n_rows * ith / nth; r < job.n_rows * (ith + 1) / nth; r++) {
        kernel->quantize(job, r);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_experts = job.ids ? job.weights->ne[2] : 1;
    int64_t       most_rows = job.ids ? 0 : job.n_rows; // of an expert
    for (int64_t e = 0; job.ids && e < n_experts; e++) {
        most_rows = std::max<int64_t>(most_rows, job.starts[e + 1] - job.starts[e]);
    }
    // The work is divided into tiles times parts of the rows, so that each thread gets several. A part unpacks its
    // weights anew.
    const int64_t n_tiles = (job.n_out + kernel->outputs - 1) / kernel->outputs;
    int64_t       n_parts = (most_rows + MAX_PASS_ROWS - 1) / MAX_PASS_ROWS;
    while (n_experts * n_tiles * n_parts < 4 * nth && most_rows / n_parts > 96) {
        n_parts *= 2;
    }
    const int64_t n = n_experts * n_tiles * n_parts;
    for (int64_t i = ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t part   = i % n_parts;
        const int64_t tile   = i / n_parts % n_tiles;
        const int64_t expert = i / n_parts / n_tiles;
        const int64_t first  = job.ids ? job.starts[expert] : 0;
        const int64_t n_rows = job.ids ? job.starts[expert + 1] - first : job.n_rows;
        const int64_t from   = first + n_rows * part / n_parts;
        const int64_t end    = first + n_rows * (part + 1) / n_parts;
        if (from < end) {
            kernel->compute(job, expert, tile, from, end, scratch);
        }
    }
    return true;
}

#else

size_t pop_kernels_work_size(int, const ggml_tensor *, bool) {
    return 0;
}

bool pop_kernels_mul_mat(const ggml_compute_params *, ggml_tensor *, bool) {
    return false;
}

#endif
