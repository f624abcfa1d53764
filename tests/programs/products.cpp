// Computes products of weights with the library, as tests/support/products.py does in Python. That file also runs this
// program, where the library is for another processor or system: `make arm`, `make windows` and `make amx` build it.
//
//     products < products > outputs
//
// A product is ten integers of 64 bits: ggml's type of the weights, the number of threads, the three dimensions of the
// weights, the four of the input, and the experts that each row meets (0: there are no experts). The weights, the input
// in F32 and the experts' numbers in I32 follow. Outputs are in F32.

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef _WIN32
#    include <fcntl.h>
#    include <io.h>
#endif

static void require(bool holds, const char * what) {
    if (!holds) {
        fprintf(stderr, "products: %s\n", what);
        exit(1);
    }
}

template <class F> static F function_of(ggml_backend_dev_t device, const char * name) {
    return (F) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name);
}

// Returns where llama.cpp would put the weights of this product.
static ggml_backend_buffer_type_t weights_type(ggml_backend_dev_t device,
                                               ggml_tensor *      weights,
                                               ggml_tensor *      product) {
    const auto get   = function_of<ggml_backend_dev_get_extra_bufts_t>(device, "ggml_backend_dev_get_extra_bufts");
    const auto extra = get ? get(device) : nullptr;
    for (int i = 0; extra && extra[i]; i++) {
        weights->buffer      = ggml_backend_buft_alloc_buffer(extra[i], 0);
        const bool supported = ggml_backend_dev_supports_op(device, product);
        ggml_backend_buffer_free(weights->buffer);
        weights->buffer = nullptr;
        if (supported) {
            return extra[i];
        }
    }
    return ggml_backend_dev_buffer_type(device);
}

static void read_values(ggml_tensor * t) {
    std::vector<char> values(ggml_nbytes(t));
    require(fread(values.data(), 1, values.size(), stdin) == values.size(), "a product is incomplete");
    ggml_backend_tensor_set(t, values.data(), 0, values.size());
}

static void compute(ggml_backend_dev_t device, const int64_t * header) {
    const ggml_init_params params     = { 1024 * 1024, nullptr, true };
    ggml_context * const   of_weights = ggml_init(params);
    ggml_context * const   of_rest    = ggml_init(params);

    ggml_tensor * weights = ggml_new_tensor(of_weights, (ggml_type) header[0], 3, header + 2);
    ggml_tensor * input   = ggml_new_tensor(of_rest, GGML_TYPE_F32, 4, header + 5);
    ggml_tensor * experts = nullptr;
    ggml_tensor * output;
    if (header[9]) {
        experts = ggml_new_tensor_2d(of_rest, GGML_TYPE_I32, header[9], input->ne[2]);
        output  = ggml_mul_mat_id(of_rest, weights, input, experts);
    } else {
        output = ggml_mul_mat(of_rest, weights, input);
    }
    const auto    type           = weights_type(device, weights, output);
    const auto    weights_buffer = ggml_backend_alloc_ctx_tensors_from_buft(of_weights, type);
    ggml_cgraph * graph          = ggml_new_graph(of_rest);
    ggml_build_forward_expand(graph, output);
    const auto buffer = ggml_backend_alloc_ctx_tensors_from_buft(of_rest, ggml_backend_dev_buffer_type(device));
    read_values(weights);
    read_values(input);
    if (experts) {
        read_values(experts);
    }
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    function_of<ggml_backend_set_n_threads_t>(device, "ggml_backend_set_n_threads")(backend, (int) header[1]);
    require(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "ggml_backend_graph_compute");

    std::vector<char> values(ggml_nbytes(output));
    ggml_backend_tensor_get(output, values.data(), 0, values.size());
    fwrite(values.data(), 1, values.size(), stdout);
    ggml_backend_free(backend);
    ggml_backend_buffer_free(buffer);
    ggml_backend_buffer_free(weights_buffer);
    ggml_free(of_rest);
    ggml_free(of_weights);
}

int main() {
#ifdef _WIN32
    // Otherwise Windows takes some of the bytes for ends of lines or of the file.
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    require(device != nullptr, "no CPU library");
    for (int64_t header[10]; fread(header, sizeof(header), 1, stdin) == 1;) {
        compute(device, header);
    }
}
