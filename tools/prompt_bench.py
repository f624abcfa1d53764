"""Speed of whole prompts in several engines that take turns: `python -m tools.kernel_bench --model MODEL.gguf`.

The engines are stock llama.cpp, this package with all layers, and any peer whose `llama-bench` is given. A share is the
part of the peak of the cores that the products and attentions of the prompt reach; the operations are counted as
`pop-gguf bench` counts them.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import subprocess
from pathlib import Path

from pypop_gguf import library
from pypop_gguf.bench.engine import Engine
from pypop_gguf.errors import PopError
from pypop_gguf.terminal import aligned
from tests.support.paths import STOCK

UBATCH = 512


def peer_speed(peer: str, model: Path, n_prompt: int, n_threads: int) -> float:
    """Returns the tokens per second of one prompt in a peer.

    Args:
        peer: Path of the peer's `llama-bench`, with options of its own after it.
        model: GGUF file.
        n_prompt: Tokens of the prompt.
        n_threads: Threads.

    Raises:
        PopError: The program cannot be run, or does not answer as `llama-bench` does.
    """
    asked = ["-m", model, "-p", n_prompt, "-n", 0, "-t", n_threads, "-r", 1, "-o", "json"]
    command = [*shlex.split(peer), *map(str, asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PopError(f"--peer {peer}: {error.strerror}; give the path of a llama-bench") from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise PopError(f"--peer {peer} ended with status {done.returncode}: {reason[-1] if reason else 'no reason'}")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        results = json.loads(done.stdout[done.stdout.index("[") :])
        return next(float(one["avg_ts"]) for one in results if one["n_prompt"] == n_prompt and one["n_gen"] == 0)
    raise PopError(f"--peer {peer} printed no speed of {n_prompt} tokens: give the path of a llama-bench")


def compare(
    model: Path, prompts: list[int], *, peer: str | None, n_threads: int, rounds: int, peak: float | None
) -> list[str]:
    """Measures prompts in all engines by turns and returns a table.

    Args:
        model: GGUF file.
        prompts: Lengths of the prompts in tokens.
        peer: As in :func:`peer_speed`; None measures no peer.
        n_threads: Threads of each engine.
        rounds: How often each engine reads each prompt.
        peak: GMAC/s of a core, for the shares; None leaves them out.

    Raises:
        PopError: An engine failed.
    """
    n_layer = library.describe_model(model).n_layer
    rows: list[list[object]] = [["prompt", "engine", "tokens/s", "slowest", "fastest", "share of peak", "over stock"]]
    for n_prompt in prompts:
        with contextlib.ExitStack() as stack:
            engines = {
                name: stack.enter_context(contextlib.closing(_start(name, model, package, n_threads, n_prompt)))
                for name, package in (("stock", STOCK), ("ours", None))
            }
            macs = _count_flops(engines["ours"], n_layer, n_prompt) / 2
            speeds: dict[str, list[float]] = {name: [] for name in ("stock", "ours", *(["peer"] if peer else []))}
            for turn in range(rounds):
                for name in list(speeds)[:: -1 if turn % 2 else 1]:
                    if name == "peer":
                        speeds[name].append(peer_speed(str(peer), model, n_prompt, n_threads))
                    else:
                        ms = engines[name].ask("prefill", n_prompt=n_prompt, boundary=None)["ttft_ms"]
                        speeds[name].append(1e3 * n_prompt / ms)
        stock = statistics.median(speeds["stock"])
        for name, values in speeds.items():
            speed = statistics.median(values)
            share = f"{speed * macs / n_prompt / 1e9 / peak / n_threads:.0%}" if peak else "N/A"
            measured = (f"{x:.1f}" for x in (speed, min(values), max(values)))
            rows.append([n_prompt, name, *measured, share, f"{speed / stock:.2f}"])
    return aligned(rows)


def _start(name: str, model: Path, package: Path | None, n_threads: int, n_prompt: int) -> Engine:
    engine = Engine(
        name,
        model,
        package,
        n_threads=n_threads,
        n_ubatch=UBATCH,
        flash_attn="auto",
        n_prompt=n_prompt,
        n_decode=1,
        n_parallel=1,
    )
    engine.warm_up(n_prompt)
    return engine


def _count_flops(engine: Engine, n_layer: int, n_prompt: int) -> float:
    micro_batches = [
        {
            "boundary": n_layer,
            "n_tokens": min(UBATCH, n_prompt - start),
            "n_seqs": 1,
            "n_outputs": int(start + UBATCH >= n_prompt),
        }
        for start in range(0, n_prompt, UBATCH)
    ]
    return engine.ask("flops", micro_batches=micro_batches)["flops"]
