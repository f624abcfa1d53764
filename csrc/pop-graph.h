// The pass that changes graphs. llama_model::build_graph() calls it on every graph that an architecture's builder has finished.

#pragma once

struct ggml_cgraph;
struct llm_graph_params;
class  llm_graph_result;

// Rewrites the graph as params.pop says, and sets res.pop_rewritten:
// PRUNED: what remains is what it takes to fill every layer's memory; the layers from the boundary on do it from the state
//   there, and the states of the tokens that need the whole model are kept.
// CONTINUED: what remains is what follows from the kept states.
// A graph in which a layer beyond the boundary depends on more than the state there is left whole: a whole graph is always right.
void llama_pop_rewrite_graph(const llm_graph_params & params, llm_graph_result & res);

// Floating-point operations of a graph's matrix products and attentions; all else is small beside them, recurrent scans
// included.
double pop_flops(ggml_cgraph * gf);
