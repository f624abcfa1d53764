"""Measures what fitted projections cost: the time to read a prompt with an adapter and without, in turns.

    python -m tools.bench_adapter MODEL.gguf --boundary 11 --prompt 512,2048 --runs 5

The adapter holds the model's own weights of keys and values, and further inputs as a fit has them, because its time
does not depend on its values. Sixteen tokens are also written after each prompt, where the adapter takes no part. Run
it from the source tree with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.llama import PopLlama
from pypop_gguf.terminal import ALL_LAYERS, available_cores, check_ranges, integer_list
from tests.support.scaled_adapter import write_scaled
from tools.reporting import one_line_errors

llama_cpp = library.load()

_DECODED = 16  # tokens after the prompt


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model of any kind with weights attn_k and attn_v")
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument(
        "--prompt", type=integer_list, default=[512, 2048], help="lengths of the prompts in tokens (default: 512,2048)"
    )
    parser.add_argument("--runs", type=int, default=5, help="number of pairs of runs (default: 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, prompt=(_DECODED, None), runs=1, threads=1)
    with tempfile.TemporaryDirectory() as directory:
        adapter = write_scaled(Path(directory) / "own.gguf", arguments.model, arguments.boundary)
        size = f"{adapter.stat().st_size / 1e6:.1f} MB"
        print(f"{arguments.model.stem}, boundary {arguments.boundary}, {size}, {arguments.threads} threads")
        for n_prompt in arguments.prompt:
            _measure(arguments, adapter, n_prompt)
    return 0


def _measure(arguments: argparse.Namespace, adapter: Path, n_prompt: int) -> None:
    n_threads = arguments.threads
    llm = PopLlama(
        str(arguments.model),
        pop_boundary=arguments.boundary,
        pop_adapter=False,
        n_ctx=n_prompt + _DECODED,
        n_batch=n_prompt,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        n_gpu_layers=ALL_LAYERS,
        verbose=False,
    )
    second = llama_cpp.llama_init_from_model(llm.model, llm.context_params)
    native.set_boundary(second, arguments.boundary)
    native.set_ends(second, n_head=llm.pop.head, n_tail=llm.pop.tail)
    with library.captured_log():
        native.load_adapter(second, llm.model, adapter)
    tokens = [token % llm.n_vocab() for token in range(1000, 1000 + n_prompt)]

    def seconds(context, tokens: list[int]) -> float:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        started = time.perf_counter()
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    # The times of each run, without the adapter and with it: of the prompt, and of the tokens after it.
    times = np.zeros((arguments.runs + 1, 2, 2))
    for run in range(arguments.runs + 1):
        for with_adapter in (0, 1) if run % 2 else (1, 0):
            context = second if with_adapter else llm.ctx
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            prompt = seconds(context, tokens)
            times[run, with_adapter] = prompt, sum(seconds(context, [token]) for token in tokens[:_DECODED])
    times = times[1:]  # The first run warms up.
    for i, what in enumerate((f"prompt of {n_prompt} tokens", f"{_DECODED} tokens after it")):
        without, with_adapter = 1e3 * np.median(times[:, :, i], axis=0)
        ratios = times[:, 0, i] / times[:, 1, i]
        print(
            f"{what}: without {without:.0f} ms, with {with_adapter:.0f} ms, speed {np.median(ratios):.3f} "
            f"[{ratios.min():.3f}, {ratios.max():.3f}] of without in {arguments.runs} pairs",
            flush=True,
        )
    llama_cpp.llama_free(second)
    llm.close()


if __name__ == "__main__":
    sys.exit(main())
