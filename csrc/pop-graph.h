// The pruning pass. llama_model::build_graph() calls it on every graph that an architecture's builder has finished.

#pragma once

struct ggml_cgraph;
struct llm_graph_params;
class  llm_graph_result;

// Where params.pop_boundary is set, rewrites the graph to skip the layers from there on: what remains is what it takes to
// fill every layer's memory, and res.pop_pruned becomes true. A graph in which a skipped layer depends on more than the
// state at the boundary is left whole: a whole graph is always right.
void llama_pop_prune_graph(const llm_graph_params & params, llm_graph_result & res);

// Floating-point operations of a graph's matrix products and attentions; all else is small beside them, recurrent scans
// included.
double pop_flops(ggml_cgraph * gf);
