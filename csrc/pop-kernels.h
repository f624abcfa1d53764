// Products of weights, quantized or of 16 bits, with several rows, such as the tokens of a prompt, and attention of
// many queries, on x86 processors with AVX2 or more. On Arm processors with dot products of bytes, products of
// quantized weights are computed too, where POP_KERNELS=on in the environment asks for it. ggml's CPU backend calls
// these functions. POP_KERNELS=off leaves all of it to ggml, whose results are then those of stock llama.cpp bit for
// bit. A mark in an operation leaves it alone to ggml, for contexts that shall not use these kernels.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// The place of the mark among the op_params of an operation. No product or attention of ggml uses the last one.
enum { POP_KERNELS_OFF_PARAM = GGML_MAX_OP_PARAMS / sizeof(int32_t) - 1 };

// Chooses as POP_KERNELS in the environment does; null: as without it. Call it while nothing is computed.
void pop_kernels_choose(const char * setting);

// Returns whether our kernels use the tiles of AMX, so that ggml's must not: both configure the tiles, and ggml's
// expect their own configuration. The first call decides it for the life of the process. Our kernels take the tiles
// only with the setting "on", since nobody has measured them.
bool pop_kernels_take_tiles(void);

// ggml may have rearranged the weights at load: then group_rows rows stand together, and take turns after `turn` bytes.
// Otherwise group_rows is 1.

// The bytes of work buffer that the product, GGML_OP_MUL_MAT or GGML_OP_MUL_MAT_ID, needs here; 0 if ggml computes it.
size_t pop_kernels_work_size(int n_threads, const struct ggml_tensor * dst, int group_rows, int turn);

// Computes the product, called by all threads; false if ggml is to compute it.
bool pop_kernels_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst, int group_rows, int turn);

// These two functions do the same for attention (GGML_OP_FLASH_ATTN_EXT) of many queries.
size_t pop_kernels_attention_work_size(int n_threads, const struct ggml_tensor * dst);
bool   pop_kernels_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
