// The pass that changes graphs. llama_model::build_graph() (patch pop/0002) calls it on every graph that an
// architecture's builder has finished.

#pragma once

struct ggml_cgraph;
struct llm_graph_params;
class llm_graph_result;

// Rewrites the graph as params.pop says, and sets res.pop_rewritten:
// - PRUNED keeps what it takes to fill every layer's memory. The layers from the boundary on fill theirs from the state
//   at the boundary. The states of the tokens that are run whole are kept for their continuation.
// - CONTINUATION keeps what follows from the kept states. A chunk of completion without outputs keeps only what fills
//   the memory.
// - BELOW keeps what the layers below the boundary compute.
// - WHOLE drops nothing, but may keep states for completion, as PRUNED may.
// If a layer beyond the boundary depends on more than the state there, the graph stays whole: that is always right.
void pop_rewrite_graph(const llm_graph_params & params, llm_graph_result & res);

// The floating-point operations of a graph's matrix products and attentions. Everything else is small beside them, also
// the scans of recurrent layers.
double pop_flops(ggml_cgraph * gf);
