"""Measures what completion takes, and what a user sees of it.

    python -m tools.bench_completion MODEL.gguf --boundary 11 --stock build/stock/package --csv bench/NAME.csv

The first table has prompts: read by the whole model, pruned, and completed afterwards in chunks of several sizes. The
second one decodes tokens with a chunk each until the cache is the whole model's: the chunk before the token, or the
token in the chunk. The third one has answers in each mode of completion: when the first and the last token came, and
how long the user waited between two tokens. "whole" is PopLlama without pruning, and "stock" unpatched
llama-cpp-python. Prompts are random tokens. The engines take turns in each round, with the same prompt. The tables have
medians, the smallest and the largest value, and ratios with 95% intervals. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf import PopError
from pypop_gguf.memory import resident_bytes
from pypop_gguf.statistics import bootstrap_ratio
from pypop_gguf.terminal import ALL_LAYERS, aligned, available_cores, check_ranges, integer_list, progress
from tools.bench_common import append_row, check_table
from tools.reporting import one_line_errors, spread

MODES = ("stock", "whole", "off", "idle", "answer")
COLUMNS = [
    "date",
    "model",
    "boundary",
    "threads",
    "prompt_tokens",
    "answer_tokens",
    "round",
    "way",
    "quantity",
    "value",
]
ANSWER_QUANTITIES = ("first_ms", "last_ms", "longest_gap_ms", "median_gap_ms", "complete_ms", "incomplete", "rss_mib")


class Engine:
    """A process of completion_worker.py with a model."""

    def __init__(self, mode: str, stock: Path | None, **options: object) -> None:
        environment = dict(os.environ)
        if mode == "stock":
            path = [str(stock), environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._mode, self._errors = mode, tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.completion_worker", mode, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def ask(self, request: str, **parameters: object) -> dict:
        """Sends a request, by the name of a ``Worker`` method, and returns its answer.

        Raises:
            PopError: The process has ended.
        """
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"request": request, **parameters}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            raise PopError(f"the engine {self._mode} has ended: {said[-1]}")
        return json.loads(answer)

    def resident_mib(self) -> float:
        return (resident_bytes(self._process.pid) or 0) / 2**20

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    parser.add_argument("--answer", type=int, default=128, metavar="N", help="tokens of an answer (default: 128)")
    parser.add_argument(
        "--chunk",
        type=integer_list,
        default=[16, 64, 256],
        metavar="N,N",
        help="tokens that are completed at once (default: 16,64,256)",
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="number of rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N", help="number of threads")
    parser.add_argument("--stock", type=Path, help="directory with an unpatched llama_cpp package")
    parser.add_argument("--csv", type=Path, help="file to append every value to")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, prompt=2, answer=2, chunk=1, rounds=1, threads=1)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    prompts = measure_prompts(arguments)
    print("\n".join(prompt_table(prompts, arguments.chunk)), flush=True)
    print("\n".join(token_table(measure_tokens(arguments), arguments.chunk)), flush=True)
    print("\n".join(answer_table(measure_answers(arguments))))
    return 0


def measure_prompts(arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Returns the values of all rounds by the way and the quantity."""
    found: dict[tuple[str, str], list[float]] = {}
    ways: list[int | None] = [None, *arguments.chunk]
    with (
        contextlib.closing(_open("call", arguments)) as engine,
        progress(total=arguments.rounds + 1, description="prompts", unit="rounds") as bar,
    ):
        for number in range(arguments.rounds + 1):
            for chunk in _rotated(ways, number):
                done = engine.ask("prefill", seed=number, n_prompt=arguments.prompt, chunk=chunk)
                values = {"prompt_ms": done["prompt_ms"]}
                if chunk:
                    values |= {"complete_ms": sum(done["chunks_ms"]), "longest_chunk_ms": max(done["chunks_ms"])}
                _keep(found, arguments, number, f"chunks of {chunk}" if chunk else "whole", values)
            bar.update()
    return found


def measure_tokens(arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Returns the values of all rounds by the way and the quantity."""
    found: dict[tuple[str, str], list[float]] = {}
    ways = [(chunk, joins) for chunk in arguments.chunk for joins in (False, True)]
    with (
        contextlib.closing(_open("call", arguments)) as engine,
        progress(total=arguments.rounds + 1, description="tokens", unit="rounds") as bar,
    ):
        for number in range(arguments.rounds + 1):
            for chunk, joins in _rotated(ways, number):
                asked = dict(seed=number, n_prompt=arguments.prompt, n_answer=arguments.answer)
                ms = engine.ask("tokens", chunk=chunk, joins=joins, **asked)["tokens_ms"]
                values = {"whole_ms": sum(ms), "whole_after": len(ms), "longest_token_ms": max(ms)}
                _keep(found, arguments, number, _token_way(chunk, joins), values)
            bar.update()
    return found


def _token_way(chunk: int, joins: bool) -> str:
    return f"tokens {'in' if joins else 'behind'} chunks of {chunk}"


def measure_answers(arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Returns the values of all rounds by the mode and the quantity."""
    found: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        modes = [mode for mode in MODES if mode != "stock" or arguments.stock]
        engines = {mode: stack.enter_context(contextlib.closing(_open(mode, arguments))) for mode in modes}
        bar = stack.enter_context(progress(total=arguments.rounds + 1, description="answers", unit="rounds"))
        for number in range(arguments.rounds + 1):
            for mode in _rotated(modes, number):
                asked = dict(seed=number, n_prompt=arguments.prompt, n_answer=arguments.answer)
                done = engines[mode].ask("answer", **asked)
                gaps = np.diff(done["at_ms"])
                values = [done["at_ms"][0], done["at_ms"][-1], gaps.max(), np.median(gaps), done["complete_ms"]]
                values += [done["incomplete"], engines[mode].resident_mib()]
                _keep(found, arguments, number, mode, dict(zip(ANSWER_QUANTITIES, values, strict=True)))
            bar.update()
    return found


def _open(mode: str, arguments: argparse.Namespace) -> Engine:
    return Engine(
        mode,
        arguments.stock,
        boundary=arguments.boundary,
        model_path=str(arguments.model),
        n_ctx=arguments.prompt + arguments.answer,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        n_gpu_layers=ALL_LAYERS,
        flash_attn=True,
        verbose=False,
    )


def _rotated(ways: Sequence, number: int) -> list:
    """Returns them in an order in which each comes first as often as the others."""
    first = number % len(ways)
    return [*ways[first:], *ways[:first]]


def _keep(found: dict, arguments: argparse.Namespace, number: int, way: str, values: dict[str, float]) -> None:
    """Keeps the values of a round. Round 0 warms up and does not count."""
    if number == 0:
        return
    for quantity, value in values.items():
        found.setdefault((way, quantity), []).append(float(value))
        if arguments.csv:
            case = [arguments.boundary, arguments.threads, arguments.prompt, arguments.answer]
            row = [time.strftime("%Y-%m-%d %H:%M:%S"), arguments.model.stem, *case, number, way, quantity]
            append_row(arguments.csv, dict(zip(COLUMNS, [*row, round(float(value), 2)], strict=True)))


def prompt_table(found: dict, chunks: Sequence[int]) -> list[str]:
    """Returns the lines of the table of prompts."""
    whole = np.array(found["whole", "prompt_ms"])
    pruned = np.median([found[f"chunks of {chunk}", "prompt_ms"] for chunk in chunks], axis=0)
    rows = [("prompts", "ms", "of whole"), ("whole", spread(whole, None), ""), _row("pruned", pruned, whole)]
    for chunk in chunks:
        way = f"chunks of {chunk}"
        prompt, complete = (np.array(found[way, quantity]) for quantity in ("prompt_ms", "complete_ms"))
        rows += [_row(f"completed in {way}", complete, whole), _row("pruned and completed", prompt + complete, whole)]
        rows += [("longest chunk", spread(found[way, "longest_chunk_ms"], None), "")]
    return aligned(rows)


def token_table(found: dict, chunks: Sequence[int]) -> list[str]:
    """Returns the lines of the table of tokens that are decoded until the cache is the whole model's."""
    rows = [("tokens", "until whole, ms", "of one after the other", "tokens until whole", "longest, ms")]
    for chunk in chunks:
        before = np.array(found[_token_way(chunk, False), "whole_ms"])
        for joins in (False, True):
            way = _token_way(chunk, joins)
            count, longest = (spread(found[way, quantity], None) for quantity in ("whole_after", "longest_token_ms"))
            rows.append((*_row(way, np.array(found[way, "whole_ms"]), before), count, longest))
    return aligned(rows)


def answer_table(found: dict) -> list[str]:
    """Returns the lines of the table of answers."""
    rows = [("answers", *ANSWER_QUANTITIES)]
    for mode in MODES:
        if (mode, "first_ms") in found:
            rows.append((mode, *(spread(found[mode, quantity], None) for quantity in ANSWER_QUANTITIES)))
    return aligned(rows)


def _row(name: str, values: np.ndarray, whole: np.ndarray) -> tuple[str, str, str]:
    return name, spread(values, None), f"{bootstrap_ratio(values, whole):.3f}"


if __name__ == "__main__":
    sys.exit(main())
