#include "pop-graph.h"

#include "ggml.h"

double pop_flops(ggml_cgraph * gf) {
    double flops = 0.0;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        switch (t->op) {
            case GGML_OP_MUL_MAT:
            case GGML_OP_MUL_MAT_ID:
                flops += 2.0 * t->src[0]->ne[0] * ggml_nelements(t);
                break;
            case GGML_OP_OUT_PROD:
                flops += 2.0 * t->src[0]->ne[1] * ggml_nelements(t);
                break;
            case GGML_OP_FLASH_ATTN_EXT:
                {
                    // K'Q and V times that, for each query and head: q [d_k, n_q, n_head], k [d_k, n_kv], v [d_v, n_kv]
                    const ggml_tensor * q    = t->src[0];
                    const double        rows = (double) q->ne[1] * q->ne[2] * q->ne[3];
                    flops += 2.0 * rows * t->src[1]->ne[1] * (t->src[1]->ne[0] + t->src[2]->ne[0]);
                }
                break;
            default:
                break;
        }
    }
    return flops;
}
