#include "pop-kernels.h"

#include "ggml-cpu-impl.h"
#include "pop-kernels-setting.h"
#include "pop-kernels-simd.h"

void pop_kernels_choose(const char * setting) {
    pop_setting() = pop_read_setting(setting);
}

#if defined(POP_HAS_KERNELS)

#    include "pop-kernels-amx.h"
#    include "pop-kernels-float.h"
#    include "pop-kernels-groups.h"
#    include "pop-kernels-unpack-iq.h"

// Fewer rows stay with ggml, because ours unpack the weights first, which has to pay. See min_rows().
static constexpr int64_t MIN_ROWS = 9;

// The functions for a type of weights, for one instruction set
struct pop_kernel {
    void (*prepare)(const pop_product_job & job, int64_t row);
    void (*compute)(
        const pop_product_job & job, int64_t expert, int64_t tile, int64_t first, int64_t end, void * scratch);
    int64_t outputs;
    size_t  scratch;
    size_t  x_bytes;
};

template <class K> static const pop_kernel * make_kernel() {
    static const pop_kernel kernel = { K::prepare, pop_compute_tile<K>, K::tile::outputs, sizeof(pop_scratch<K>),
                                       K::x_bytes };
    return &kernel;
}

// Returns the kernel for weights that ggml has rearranged: `rows` of them stand together and take turns after `turn`
// bytes. It is null where there is none.
template <class S> static const pop_kernel * kernel_of_groups(ggml_type type, int rows, int turn) {
    const auto is = [&](ggml_type a_type, int some_rows, int some_turn) {
        return type == a_type && rows == some_rows && turn == some_turn;
    };
    if (is(GGML_TYPE_Q4_0, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_q4_0_groups<8, 8>>>();
    }
    if (is(GGML_TYPE_IQ4_NL, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_iq4_nl_groups<8, 8>>>();
    }
    if (is(GGML_TYPE_MXFP4, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_mxfp4_groups<8, 8>>>();
    }
    if (is(GGML_TYPE_Q2_K, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_q2_k_groups>>();
    }
    if (is(GGML_TYPE_Q4_K, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_q4_k_groups<8>>>();
    }
#    if !defined(POP_HAS_X86_KERNELS) // the groups that ggml has for Arm alone
    if (is(GGML_TYPE_Q4_0, 4, 8)) {
        return make_kernel<pop_quantized<S, pop_q4_0_groups<4, 8>>>();
    }
    if (is(GGML_TYPE_Q4_0, 4, 4)) {
        return make_kernel<pop_quantized<S, pop_q4_0_groups<4, 4>>>();
    }
    if (is(GGML_TYPE_Q8_0, 4, 8)) {
        return make_kernel<pop_quantized<S, pop_q8_0_groups<4, 8>>>();
    }
    if (is(GGML_TYPE_Q8_0, 4, 4)) {
        return make_kernel<pop_quantized<S, pop_q8_0_groups<4, 4>>>();
    }
    if (is(GGML_TYPE_IQ4_NL, 4, 4)) {
        return make_kernel<pop_quantized<S, pop_iq4_nl_groups<4, 4>>>();
    }
    if (is(GGML_TYPE_MXFP4, 4, 4)) {
        return make_kernel<pop_quantized<S, pop_mxfp4_groups<4, 4>>>();
    }
    if (is(GGML_TYPE_Q4_K, 8, 4)) {
        return make_kernel<pop_quantized<S, pop_q4_k_groups<4>>>();
    }
    if (is(GGML_TYPE_Q5_K, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_q5_k_groups<8>>>();
    }
    if (is(GGML_TYPE_Q5_K, 8, 4)) {
        return make_kernel<pop_quantized<S, pop_q5_k_groups<4>>>();
    }
    if (is(GGML_TYPE_Q6_K, 8, 8)) {
        return make_kernel<pop_quantized<S, pop_q6_k_groups<8>>>();
    }
    if (is(GGML_TYPE_Q6_K, 8, 4)) {
        return make_kernel<pop_quantized<S, pop_q6_k_groups<4>>>();
    }
#    endif
    return nullptr;
}

template <class S> static const pop_kernel * kernel_of(ggml_type type, int group_rows, int turn) {
    if (group_rows > 1) {
        return kernel_of_groups<S>(type, group_rows, turn);
    }
    switch (type) {
        case GGML_TYPE_F16:
            if constexpr (S::lanes == 16) {
                return make_kernel<pop_float<S, pop_f16>>();
            }
            return nullptr;
        case GGML_TYPE_BF16:
            if constexpr (S::has_dot_bf16) {
                return make_kernel<pop_float<S, pop_bf16>>();
            }
            return nullptr;
        case GGML_TYPE_Q4_0:
            return make_kernel<pop_quantized<S, pop_q4_0>>();
        case GGML_TYPE_Q4_1:
            return make_kernel<pop_quantized<S, pop_q4_1>>();
        case GGML_TYPE_Q5_0:
            return make_kernel<pop_quantized<S, pop_q5_0>>();
        case GGML_TYPE_Q5_1:
            return make_kernel<pop_quantized<S, pop_q5_1>>();
        case GGML_TYPE_Q8_0:
            return make_kernel<pop_quantized<S, pop_q8_0>>();
        case GGML_TYPE_IQ4_NL:
            return make_kernel<pop_quantized<S, pop_iq4_nl>>();
        case GGML_TYPE_MXFP4:
            return make_kernel<pop_quantized<S, pop_mxfp4>>();
        case GGML_TYPE_NVFP4:
            return make_kernel<pop_quantized<S, pop_nvfp4>>();
        case GGML_TYPE_Q2_K:
            return make_kernel<pop_quantized<S, pop_q2_k>>();
        case GGML_TYPE_Q3_K:
            return make_kernel<pop_quantized<S, pop_q3_k>>();
        case GGML_TYPE_Q4_K:
            return make_kernel<pop_quantized<S, pop_q4_k>>();
        case GGML_TYPE_Q5_K:
            return make_kernel<pop_quantized<S, pop_q5_k>>();
        case GGML_TYPE_Q6_K:
            return make_kernel<pop_quantized<S, pop_q6_k>>();
        case GGML_TYPE_IQ4_XS:
            return make_kernel<pop_quantized<S, pop_iq4_xs>>();
        case GGML_TYPE_IQ1_S:
            return make_kernel<pop_quantized<S, pop_iq1_s>>();
        case GGML_TYPE_IQ1_M:
            return make_kernel<pop_quantized<S, pop_iq1_m>>();
        case GGML_TYPE_IQ2_XXS:
            return make_kernel<pop_quantized<S, pop_iq2_xxs>>();
        case GGML_TYPE_IQ2_XS:
            return make_kernel<pop_quantized<S, pop_iq2_xs>>();
        case GGML_TYPE_IQ2_S:
            return make_kernel<pop_quantized<S, pop_iq2_s>>();
        case GGML_TYPE_IQ3_XXS:
            return make_kernel<pop_quantized<S, pop_iq3_xxs>>();
        case GGML_TYPE_IQ3_S:
            return make_kernel<pop_quantized<S, pop_iq3_s>>();
        default:
            return nullptr;
    }
}

bool pop_kernels_take_tiles(void) {
#    if defined(POP_KERNELS_HAS_AMX)
    static const bool taken = pop_setting() == POP_KERNELS_TILES && pop_amx::ask_permission();
    return taken;
#    else
    return false;
#    endif
}

// The least number of rows with which our kernels were faster than those of ggml. It was measured with AVX-512
// VNNI, AVX-VNNI and AVX2, and 2 threads; elsewhere it is not known.
static int64_t min_rows(ggml_type type) {
#    if defined(POP_HAS_X86_KERNELS) && (defined(POP_KERNELS_HAS_AVX512_VNNI) || !defined(__AVX512F__))
    constexpr bool is_wide = pop_best::lanes == 16;
    if (!pop_setting_is_best() || pop_kernels_take_tiles()) {
        return MIN_ROWS;
    }
    switch (type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
            return MIN_ROWS;
        case GGML_TYPE_IQ1_M:
            return is_wide ? MIN_ROWS : 8;
        case GGML_TYPE_Q8_0:
            return pop_best::has_dot ? 6 : 8;
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
            return is_wide ? 2 : 3;
        default:
            return 2;
    }
#    else
    (void) type;
    return MIN_ROWS;
#    endif
}

static const pop_kernel * best_kernel(ggml_type type, int group_rows, int turn) {
#    if defined(POP_KERNELS_HAS_AMX)
    if (pop_kernels_take_tiles()) {
        return kernel_of<pop_amx>(type, group_rows, turn);
    }
#    endif
    return kernel_of<pop_best>(type, group_rows, turn);
}

static const pop_kernel * find_kernel(ggml_type type, int group_rows, int turn) {
    switch (pop_setting().load()) {
        case POP_KERNELS_OFF:
            return nullptr;
        case POP_KERNELS_BEST:
            return best_kernel(type, group_rows, turn);
#    if defined(POP_HAS_X86_KERNELS)
        case POP_KERNELS_TILES:
            return best_kernel(type, group_rows, turn);
        case POP_KERNELS_AVX2:
            return kernel_of<pop_avx2>(type, group_rows, turn);
        case POP_KERNELS_AVX_VNNI:
            return kernel_of<pop_avx_vnni>(type, group_rows, turn);
#    endif
    }
    return nullptr;
}

static const pop_kernel * find_kernel(const ggml_tensor * dst, int group_rows, int turn) {
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * input   = dst->src[1];
    if (dst->op_params[POP_KERNELS_OFF_PARAM] || input->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 ||
        (weights->extra && group_rows == 1) || weights->ne[3] != 1 || weights->nb[0] != ggml_type_size(weights->type) ||
        input->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float)) {
        return nullptr;
    }
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        // Unpacking the weights of an expert for a row or two would cost more than it saves.
        const ggml_tensor * ids = dst->src[2];
        if (ids->ne[1] < MIN_ROWS || ids->ne[0] * ids->ne[1] < 4 * weights->ne[2]) {
            return nullptr;
        }
    } else if (ggml_nrows(input) < min_rows(weights->type) || weights->ne[2] != 1) {
        return nullptr;
    }
    return find_kernel(weights->type, group_rows, turn);
}

static size_t aligned(size_t n) {
    return (n + 63) / 64 * 64;
}

size_t pop_kernels_work_size(int n_threads, const ggml_tensor * dst, int group_rows, int turn) {
    const pop_kernel * kernel = find_kernel(dst, group_rows, turn);
    if (!kernel) {
        return 0;
    }
    const pop_product_job job(dst);

    const size_t pairs = job.ids ? (job.n_rows + job.weights->ne[2] + 1) * sizeof(int32_t) : 0;
    return 64 + n_threads * aligned(kernel->scratch) + job.n_chunks * job.n_rows * kernel->x_bytes + pairs;
}

bool pop_kernels_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, int group_rows, int turn) {
    const pop_kernel * kernel = params->use_ref ? nullptr : find_kernel(dst, group_rows, turn);
    if (!kernel) {
        return false;
    }
    pop_product_job job(dst);
    const int       ith = params->ith;
    const int       nth = params->nth;

    char * const work    = (char *) aligned((size_t) params->wdata);
    char * const scratch = work + ith * aligned(kernel->scratch);
    GGML_ASSERT(pop_kernels_work_size(nth, dst, group_rows, turn) <= params->wsize);

    job.x      = work + nth * aligned(kernel->scratch);
    job.pairs  = (int32_t *) (job.x + job.n_chunks * job.n_rows * kernel->x_bytes);
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
        kernel->prepare(job, r);
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
    int64_t       n_parts = (most_rows + pop_pass_rows - 1) / pop_pass_rows;
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

bool pop_kernels_take_tiles(void) {
    return false;
}

size_t pop_kernels_work_size(int, const ggml_tensor *, int, int) {
    return 0;
}

bool pop_kernels_mul_mat(const ggml_compute_params *, ggml_tensor *, int, int) {
    return false;
}

#endif
