"""Measures what fitted projections cost: the time to read a prompt with an adapter and without, in turns.

    python -m tools.bench_adapter MODEL.gguf --boundary 11 --rank 32 --prompt 512,2048 --runs 5

The adapter is random, because its time does not depend on its values. Run it from the source tree with nothing else on
the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.fitting.adapter_file import write_pairs
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.llama import PopLlama
from pypop_gguf.terminal import available_cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model of pop-gguf random-model")
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter (default: 32)")
    parser.add_argument("--prompt", default="512,2048", help="lengths of the prompts in tokens (default: 512,2048)")
    parser.add_argument("--runs", type=int, default=5, help="number of pairs of runs (default: 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads")
    arguments = parser.parse_args()
    prompts = [int(n) for n in arguments.prompt.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "random.gguf"
        _write_random(adapter, arguments.model, arguments.boundary, arguments.rank)
        print(
            f"{arguments.model.stem}, boundary {arguments.boundary}, rank {arguments.rank}, "
            f"{adapter.stat().st_size / 1e6:.1f} MB, {arguments.threads} threads"
        )
        for n_prompt in prompts:
            _measure(arguments, adapter, n_prompt)
    return 0


def _write_random(target: Path, model: Path, boundary: int, rank: int) -> None:
    """Writes an adapter that changes every value projection above the boundary."""
    header = read_header(model)
    architecture = header.get_field("general.architecture").contents()

    def field(name: str) -> int:
        return int(header.get_field(f"{architecture}.{name}").contents())

    n_in, n_head = field("embedding_length"), field("attention.head_count")
    n_out = field("attention.head_count_kv") * (n_in // n_head)
    chance = np.random.default_rng(0)
    pairs = {
        f"blk.{il}.attn_v.weight": (
            chance.standard_normal((rank, n_in)) / 1e3,
            chance.standard_normal((n_out, rank)) / 1e3,
        )
        for il in range(boundary + 1, field("block_count"))
    }
    fingerprint = library.fingerprint(model)
    write_pairs(target, pairs, architecture=architecture, boundary=boundary, fingerprint=fingerprint)


def _measure(arguments: argparse.Namespace, adapter: Path, n_prompt: int) -> None:
    options = dict(
        n_ctx=n_prompt, n_batch=n_prompt, n_threads=arguments.threads, n_threads_batch=arguments.threads, verbose=False
    )
    llm = PopLlama(str(arguments.model), pop_boundary=arguments.boundary, pop_adapter=False, **options)
    llama_cpp = sys.modules["llama_cpp"]
    second = llama_cpp.llama_init_from_model(llm.model, llm.context_params)
    native.set_boundary(second, arguments.boundary)
    with library.captured_log():
        native.load_adapter(second, llm.model, adapter)
    tokens = (llama_cpp.llama_token * n_prompt)(*(token % llm.n_vocab() for token in range(n_prompt)))
    batch = llama_cpp.llama_batch_get_one(tokens, n_prompt)

    def seconds(context) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    times = {"without": [], "with": []}
    for run in range(arguments.runs + 1):
        pair = [("without", llm.ctx), ("with", second)]
        for name, context in pair if run % 2 else reversed(pair):
            took = seconds(context)
            if run:  # the first run warms up
                times[name].append(took)
    ratios = np.array(times["without"]) / np.array(times["with"])
    flops = [
        native.graph_flops(context, boundary=arguments.boundary, n_tokens=min(n_prompt, 512), n_seqs=1, n_outputs=0)
        for context in (llm.ctx, second)
    ]
    print(
        f"{n_prompt:5} tokens: without {1e3 * np.median(times['without']):.0f} ms, "
        f"with {1e3 * np.median(times['with']):.0f} ms, speed {np.median(ratios):.3f} "
        f"[{ratios.min():.3f}, {ratios.max():.3f}] of without in {arguments.runs} pairs; "
        f"operations of the pruned graph +{flops[1] / flops[0] - 1:.2%}",
        flush=True,
    )
    llama_cpp.llama_free(second)
    llm.close()


if __name__ == "__main__":
    sys.exit(main())
