#include "pop-kernels.h"

#include "ggml-cpu-impl.h"
#include "pop-kernels-simd.h"

#if defined(POP_HAS_X86_KERNELS)

#    include "pop-attention.h"
#    include "pop-kernels-setting.h"

#    include <algorithm>

// Fewer queries are decoding rather than a prompt.
static constexpr int64_t MIN_QUERIES = 9;

// A pop_attention_job holds what the threads need to know about an attention.
struct pop_attention_job {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    ggml_tensor *       dst;

    int64_t n_group; // heads that share keys and values
    int64_t n_rows;  // of such heads: queries times n_group
    float   scale;   // of the products, for powers of two

    explicit pop_attention_job(const ggml_tensor * t) :
        q(t->src[0]), k(t->src[1]), v(t->src[2]), mask(t->src[3]), sinks(t->src[4]), dst(const_cast<ggml_tensor *>(t)),
        n_group(q->ne[2] / k->ne[2]), n_rows(q->ne[1] * n_group) {
        memcpy(&scale, t->op_params, sizeof(scale));
        scale *= 1.44269504f; // log2(e)
    }
};

// Computes the rows of a tile, for the heads that share keys and values number `shared` of sequence i3.
template <class S>
static void attend(const pop_attention_job & job, int64_t i3, int64_t shared, int64_t first_row, float * memory) {
    constexpr int rows = pop_tile_rows<S>;

    const int     n_key   = (int) job.k->ne[0];
    const int     n_value = (int) job.v->ne[0];
    const int64_t n_valid = std::min<int64_t>(rows, job.n_rows - first_row);

    const pop_attention_memory<S> m(memory, n_key, n_value);
    alignas(64) float             maximum[rows];
    alignas(64) float             sum[rows] = {};
    std::fill_n(maximum, rows, -INFINITY);
    memset(m.sums, 0, n_value * rows * sizeof(float));
    memset(m.queries, 0, n_key * rows * sizeof(float));

    const auto query_of = [&](int64_t r) { return (first_row + r) / job.n_group; };
    const auto head_of  = [&](int64_t r) { return shared * job.n_group + (first_row + r) % job.n_group; };
    const auto part_of  = [&](const ggml_tensor * t, int64_t key) {
        return (const char *) t->data + key * t->nb[1] + shared * t->nb[2] + i3 / (job.q->ne[3] / t->ne[3]) * t->nb[3];
    };
    for (int64_t r = 0; r < n_valid; r++) {
        const float * x = (const float *) ((const char *) job.q->data + query_of(r) * job.q->nb[1] +
                                           head_of(r) * job.q->nb[2] + i3 * job.q->nb[3]);
        for (int i = 0; i < n_key; i++) {
            m.queries[i * rows + r] = x[i] * job.scale;
        }
    }
    for (int64_t key = 0; key < job.k->ne[1]; key += pop_keys) {
        const int n_keys = (int) std::min<int64_t>(pop_keys, job.k->ne[1] - key);

        alignas(64) uint32_t bits[2][rows];
        bool                 sees_all     = n_keys == pop_keys;
        bool                 sees_nothing = true;
        bool                 is_bits      = true;
        pop_tile_mask        read         = { n_keys == 64 ? ~(uint64_t) 0 : ((uint64_t) 1 << n_keys) - 1, true };
        const uint16_t *     mask_row     = nullptr;
        for (int64_t r = 0; r < rows; r++) {
            if (job.mask && r < n_valid && (r == 0 || query_of(r) != query_of(r - 1))) {
                mask_row = (const uint16_t *) ((const char *) job.mask->data + query_of(r) * job.mask->nb[1] +
                                               i3 % job.mask->ne[3] * job.mask->nb[3]);
                read     = pop_read_mask(mask_row + key, n_keys);
                sees_all &= read.keep == ~(uint64_t) 0;
                is_bits &= read.is_bits;
            }
            sees_nothing &= read.keep == 0;
            bits[0][r] = (uint32_t) read.keep;
            bits[1][r] = (uint32_t) (read.keep >> 32);
        }
        if (sees_nothing) {
            continue;
        }
        pop_convert<S>(job.k->type, part_of(job.k, key), job.k->nb[1], n_keys, n_key, m.tile);
        for (int j = 0; j < pop_keys; j += 4) {
            pop_add_products<S, true>(m.tile + j * n_key, 1, n_key, m.queries, n_key, m.weights + j * rows);
        }
        for (int64_t r = 0; !is_bits && r < n_valid; r++) {
            const ggml_fp16_t * row =
                (const ggml_fp16_t *) ((const char *) job.mask->data + query_of(r) * job.mask->nb[1] +
                                       i3 % job.mask->ne[3] * job.mask->nb[3]);
            for (int j = 0; j < n_keys; j++) {
                m.weights[j * rows + r] += 1.44269504f * GGML_FP16_TO_FP32(row[key + j]);
            }
        }
        pop_softmax<S>(m.weights, sees_all ? nullptr : bits, maximum, sum, m.sums, n_value);
        pop_convert<S>(job.v->type, part_of(job.v, key), job.v->nb[1], n_keys, n_value, m.tile);
        for (int i = 0; i < n_value; i += 4) {
            pop_add_products<S, false>(m.tile + i, n_value, 1, m.weights, pop_keys, m.sums + i * rows);
        }
    }
    for (int64_t r = 0; r < n_valid; r++) {
        float total  = sum[r];
        float factor = 1.0f;
        if (job.sinks) { // one more key for each head, without a value
            const float sink = ((const float *) job.sinks->data)[head_of(r)] * 1.44269504f;
            const float base = std::max(maximum[r], sink);
            factor           = exp2f(maximum[r] - base);
            total            = total * factor + exp2f(sink - base);
        }
        factor      = total == 0.0f ? 0.0f : factor / total;
        float * out = (float *) ((char *) job.dst->data + head_of(r) * job.dst->nb[1] + query_of(r) * job.dst->nb[2] +
                                 i3 * job.dst->nb[3]);
        for (int i = 0; i < n_value; i++) {
            out[i] = m.sums[i * rows + r] * factor;
        }
    }
}

struct pop_attention_kernel {
    void (*attend)(const pop_attention_job & job, int64_t i3, int64_t shared, int64_t first_row, float * memory);
    size_t (*floats)(int n_key, int n_value);
    int rows;
};

template <class S> static const pop_attention_kernel * make_kernel() {
    static const pop_attention_kernel kernel = { attend<S>, pop_attention_memory<S>::floats, pop_tile_rows<S> };
    return &kernel;
}

// Keys and values of these types are converted to F32 for each tile.
static bool is_convertible(const ggml_tensor * t) {
    return ggml_get_type_traits(t->type)->to_float && t->nb[0] == ggml_type_size(t->type) && t->ne[0] % 16 == 0;
}

static const pop_attention_kernel * find_kernel(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    float params[3]; // scale, factor of a mask that depends on the distance, cap of the products
    memcpy(params, dst->op_params, sizeof(params));

    if (pop_setting() == POP_KERNELS_OFF || dst->op_params[POP_KERNELS_OFF_PARAM] || q->type != GGML_TYPE_F32 ||
        !is_convertible(k) || !is_convertible(v) || dst->type != GGML_TYPE_F32 || q->ne[1] < MIN_QUERIES ||
        params[1] != 0.0f || params[2] != 0.0f || k->ne[2] != v->ne[2] || k->ne[3] != v->ne[3] ||
        q->nb[0] != sizeof(float) || (mask && (mask->type != GGML_TYPE_F16 || mask->ne[2] != 1))) {
        return nullptr;
    }
#    if defined(POP_KERNELS_HAS_AVX512_VNNI)
    if (pop_setting_is_best()) {
        return make_kernel<pop_avx512_vnni>();
    }
#    endif
    return make_kernel<pop_avx2>();
}

static size_t floats_per_thread(const pop_attention_kernel * kernel, const ggml_tensor * dst) {
    return (kernel->floats((int) dst->src[1]->ne[0], (int) dst->src[2]->ne[0]) + 15) / 16 * 16;
}

size_t pop_kernels_attention_work_size(int n_threads, const ggml_tensor * dst) {
    const pop_attention_kernel * kernel = find_kernel(dst);
    return kernel ? 64 + n_threads * floats_per_thread(kernel, dst) * sizeof(float) : 0;
}

bool pop_kernels_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    const pop_attention_kernel * kernel = params->use_ref ? nullptr : find_kernel(dst);
    if (!kernel) {
        return false;
    }
    GGML_ASSERT(pop_kernels_attention_work_size(params->nth, dst) <= params->wsize);
    const pop_attention_job job(dst);

    float * memory = (float *) (((size_t) params->wdata + 63) / 64 * 64) + params->ith * floats_per_thread(kernel, dst);

    const int64_t n_shared = job.k->ne[2];
    const int64_t n_tiles  = (job.n_rows + kernel->rows - 1) / kernel->rows;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // The last rows see the most keys. They come first, so that no thread is left with a long one.
    const int64_t n = n_tiles * n_shared * job.q->ne[3];
    for (int64_t i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t part = i % (n_shared * job.q->ne[3]);
        const int64_t tile = n_tiles - 1 - i / (n_shared * job.q->ne[3]);
        kernel->attend(job, part / n_shared, part % n_shared, tile * kernel->rows, memory);
    }
    return true;
}

#else

size_t pop_kernels_attention_work_size(int, const ggml_tensor *) {
    return 0;
}

bool pop_kernels_attention(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
