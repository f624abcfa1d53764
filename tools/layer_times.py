"""Measures the limit of pruning by time, for models that lose nothing: `python -m tools.layer_times MODEL.gguf ...`.

The limit that `pop-gguf bench` prints counts operations of matrices. This script times every operation of a whole pass
with llama.cpp's evaluation callback, which computes them one by one, and so counts all kinds of them. Each operation is
started alone, which takes some percent longer, most of all for one token. Three parts have to remain at the lossless
boundary: the layers below it, the keys and values of the layer there, and the layers above with the output for the last
token. The third is timed in a pass of one token behind the prompt. The limit is the time of the whole pass over the sum
of the three. No pruned pass is timed.

RUNS.csv gets a line for each part of each pass. Lines that it already has count, too, so other threads and other builds
need a new file.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pypop_gguf import native
from tests.support.engine import F16, Engine, llama_cpp
from tools.reporting import one_line_errors

COLUMNS = ("model", "n_prompt", "round", "pass", "part", "ms")
# Names of what computes keys and values. The norm of the keys has the same name as that of the queries: it is left out.
_KEYS = ("Kcur", "Vcur", "cache_k", "cache_v", "attn_norm")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--prompt", default="128,512,2048", metavar="N,N", help="tokens (default: 128,512,2048)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, required=True, metavar="RUNS.csv")
    arguments = parser.parse_args(argv)
    lengths = [int(length) for length in arguments.prompt.split(",")]
    for model in arguments.models:
        with Timer(model, max(lengths), arguments.threads) as timer:
            timer.passes(lengths[0])  # the first passes also read the file
            for n_prompt in lengths:
                for i in range(arguments.rounds):
                    for name, parts in timer.passes(n_prompt).items():
                        rows = [(model.stem, n_prompt, i, name, part, f"{1e3 * parts[part]:.3f}") for part in parts]
                        _append(arguments.csv, rows)
    with arguments.csv.open() as file:
        for (name, n_prompt), limit in limits(csv.DictReader(file)).items():
            print(f"{name}, {n_prompt} tokens: at most {limit:.2f} times as fast")
    return 0


def limits(rows: Iterable[dict[str, str]]) -> dict[tuple[str, int], float]:
    """Returns the limit for each model and number of prompt tokens, from the medians of the parts' times."""
    times: dict[tuple[str, int], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        of_case = times.setdefault((row["model"], int(row["n_prompt"])), {})
        of_case.setdefault((row["pass"], row["part"]), []).append(float(row["ms"]))
    result = {}
    for case, found in times.items():
        ms = {part: statistics.median(values) for part, values in found.items()}
        remains = ms["prompt", "below"] + ms["prompt", "keys"] + ms["token", "above"]
        result[case] = sum(ms["prompt", part] for part in ("below", "keys", "above")) / remains
    return result


def _append(path: Path, rows: list[tuple]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([*([COLUMNS] if is_new else []), *rows])


class Timer:
    """A model whose operations are timed one by one. Use it in a ``with`` block, which frees it."""

    def __init__(self, model: Path, n_tokens: int, n_threads: int):
        base = llama_cpp.llama_cpp._lib
        base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._name_of, self._started = base.ggml_get_name, 0.0
        self._operations: list[tuple[str, float]] = []  # names and seconds
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        self._engine = Engine(
            model,
            native.OFF,
            n_ctx=n_tokens + 32,
            n_batch=n_tokens,
            n_ubatch=512,
            type_k=F16,
            type_v=F16,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            cb_eval=self._callback,
        )
        self._boundary = native.lossless_boundary(self._engine.model)

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *error) -> None:
        self._engine.__exit__(*error)

    def _see(self, tensor, asks, _data) -> bool:
        now = time.perf_counter()
        if asks:
            self._started = now
        else:
            self._operations.append((self._name_of(tensor).decode(), now - self._started))
        return True

    def passes(self, n_prompt: int) -> dict[str, dict[str, float]]:
        """Returns the seconds of each part of the whole pass of a prompt, and of that of one more token."""
        llama_cpp.llama_memory_clear(self._engine.memory, True)
        self._operations.clear()
        self._engine.prefill([(7 * i) % 1000 + 10 for i in range(n_prompt)])
        prompt = self._parts()
        self._operations.clear()
        self._engine.step(7, n_prompt)
        return {"prompt": prompt, "token": self._parts()}

    def _parts(self) -> dict[str, float]:
        """Adds up the operations of the last passes. A layer ends with the operation that is named ``l_out``."""
        found = dict.fromkeys(("below", "keys", "above"), 0.0)
        layer, is_normed, first_name = 0, False, self._operations[0][0]
        for name, seconds in self._operations:
            if name == first_name:  # a micro-batch begins
                layer, is_normed = 0, False
            stem, _, number = name.partition(" ")[0].rpartition("-")
            layer = int(number) if stem and number.isdigit() else layer
            part = "below" if layer < self._boundary else "above"
            if layer == self._boundary and (not is_normed or any(key in name for key in _KEYS)):
                part, is_normed = "keys", is_normed or stem == "attn_norm"
            found[part] += seconds
            layer += stem == "l_out"
        return found


if __name__ == "__main__":
    sys.exit(main())
