"""Fuzzes batches: in random mixtures of sequences, each sequence gets the logits that it gets alone.

    python -m fuzz.batches --cases 2000 --seed 1

A case draws a model, a boundary, head and tail, the size of micro-batches, unified or separate caches, continuation
on or off, and which sequences run whole. It has about ten batches. They hold parts of up to five sequences, in blocks
or interleaved, that ask for logits anywhere. Between batches sequences end, and others begin in their place. Every
row of logits is compared with that of a context that holds this sequence only and gets its parts in batches of their
own. The effect of POP, compared with the whole model, is measured too. A case that fails runs again with POP off,
which is stock llama.cpp: if that fails too, the fault is llama.cpp's and is counted as such.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from fuzz import harness
from fuzz.harness import Failure
from pypop_gguf import library, native
from tests.support.engine import Engine, llama_cpp

# Squared errors, because batches of other shapes group the same sums differently, and random Gemma amplifies
# rounding. See tests/engine/test_batches.py.
TOLERANCE = {"llama": 1e-7, "qwen3": 1e-7, "gemma3": 1e-6, "mixtral": 1e-7, "deepseek2": 1e-7, "lfm2": 1e-7}
_LONGEST = 96  # tokens of a sequence
_MAX_SEQUENCES = 5
_N_VOCAB = 128


class Mixture:
    """The random choices of a case, and the number of tokens in each of its sequences."""

    def __init__(self, chance: random.Random, models: Path):
        self.name = chance.choice(list(TOLERANCE))
        self.path = models / self.name / "model.gguf"
        self.n_seq = chance.randint(1, _MAX_SEQUENCES)
        self.unified = chance.random() < 0.5
        self.options = dict(
            n_ubatch=chance.choice([1, 2, 3, 5, 8, 16, 16, 32, 64]),
            n_batch=512,
            swa_full=chance.random() < 0.5,
        )
        self.n_layer = 7 if self.name == "gemma3" else 6
        self.boundary = chance.randint(1, self.n_layer)
        self.head = chance.choice([0, 0, 0, 1, 4, 17])
        self.tail = chance.choice([1, 1, 1, 2, 5, 30])
        self.continues = chance.random() < 0.7
        self.whole = {s for s in range(self.n_seq) if chance.random() < 0.15}
        self.share = chance.choice([0.0, 0.0, 0.1, 0.5, 1.0])  # share of the tokens inside a part that ask for logits
        self.past = [0] * self.n_seq

    def turn_off(self) -> None:
        self.boundary, self.head, self.tail, self.whole = self.n_layer, 0, 1, set()

    def engine(self, boundary: int, n_seq: int) -> Engine:
        result = Engine(
            self.path, boundary, n_seq_max=n_seq, kv_unified=self.unified, n_ctx=128 * n_seq, **self.options
        )
        native.set_ends(result.context, n_head=self.head, n_tail=self.tail)
        native.set_continuation(result.context, self.continues)
        return result

    def batch(self, chance: random.Random) -> list[tuple[int, int, int, bool]]:
        """Returns entries (token, position, sequence, asks) of some sequences, each in order."""
        parts = []
        for s in chance.sample(range(self.n_seq), chance.randint(1, self.n_seq)):
            count = min(chance.choice([1, 1, 2, 3, 7, 16, 33, 60]), _LONGEST - self.past[s])
            asks = [chance.random() < self.share for _ in range(count)]
            if count and chance.random() < 0.8:
                asks[-1] = True
            parts.append([(chance.randrange(3, _N_VOCAB), self.past[s] + i, s, asks[i]) for i in range(count)])
            self.past[s] += count
        if chance.random() < 0.5:  # in blocks
            return [entry for part in parts for entry in part]
        result = []  # interleaved at random
        while any(parts):
            result.append(chance.choice([part for part in parts if part]).pop(0))
        return result

    def __str__(self) -> str:
        return " ".join(
            f"{name}={value}" for name, value in vars(self).items() if name not in ("path", "past", "n_layer")
        )


class Compared:
    """Counts and errors over all cases."""

    def __init__(self):
        self.batches = self.rows = self.pruned = 0
        self.error = dict.fromkeys(TOLERANCE, 0.0)  # the largest error of those that are allowed
        self.effect: dict[str, list[float]] = {name: [] for name in TOLERANCE}

    def line(self) -> str:
        shown = [
            f"{name} {self.error[name]:.1e} (effect {np.median(self.effect[name]):.1e})"
            for name in TOLERANCE
            if self.effect[name]
        ]
        return (
            f"{self.batches} batches, {self.rows} rows of logits, {self.pruned} tokens pruned; "
            f"largest squared error, and POP's median effect: {', '.join(shown)}"
        )


def case(chance: random.Random, models: Path, compared: Compared) -> str:
    state = chance.getstate()
    try:
        return mixture_case(chance, models, compared)
    except Failure:
        chance.setstate(state)
        try:
            mixture_case(chance, models, Compared(), pop=False)
        except Failure:
            return "wrong without POP too"
        raise


def mixture_case(chance: random.Random, models: Path, compared: Compared, pop: bool = True) -> str:
    mixture = Mixture(chance, models)
    if not pop:
        mixture.turn_off()
    engines: list[Engine] = []

    def opened(boundary: int, n_seq: int = 1) -> Engine:
        engines.append(mixture.engine(boundary, n_seq))
        return engines[-1]

    try:
        mixed = opened(mixture.boundary, mixture.n_seq)
        for s in mixture.whole:
            native.set_sequence(mixed.context, s, prunes=False)
        alone = [opened(mixture.n_layer if s in mixture.whole else mixture.boundary) for s in range(mixture.n_seq)]
        unpruned = opened(mixture.n_layer)  # has sequence 0, to measure the effect of POP
        for _ in range(chance.randint(4, 16)):
            for s in range(mixture.n_seq):
                ends = mixture.past[s] and chance.random() < 0.1
                if mixture.past[s] >= _LONGEST or ends:  # another sequence begins in its place
                    mixture.past[s] = 0
                    for engine, own in ((mixed, s), (alone[s], 0), *([(unpruned, 0)] if s == 0 else [])):
                        if not llama_cpp.llama_memory_seq_rm(engine.memory, own, -1, -1):
                            raise Failure(f"sequence cannot be removed: {mixture}")
            entries = mixture.batch(chance)
            compare(mixture, entries, mixed, alone, unpruned, compared)
        return mixture.name
    except Failure:
        raise
    except AssertionError as error:
        raise Failure(f"{error}: {mixture}") from error
    finally:
        for engine in engines:
            engine.__exit__()


def compare(
    mixture: Mixture, entries, mixed: Engine, alone: list[Engine], unpruned: Engine, compared: Compared
) -> None:
    before = mixed.n_pruned, sum(engine.n_pruned for engine in alone)
    got = mixed.decode(entries)
    compared.batches += 1
    for s in sorted({entry[2] for entry in entries}):
        mine = [i for i, entry in enumerate(entries) if entry[2] == s]
        part = [(*entries[i][:2], 0, entries[i][3]) for i in mine]
        expected = alone[s].decode(part)
        whole = unpruned.decode(part) if s == 0 else {}
        for own, row in expected.items():
            error = squared_error(got[mine[own]], row)
            compared.rows += 1
            if not error <= TOLERANCE[mixture.name]:
                raise Failure(f"squared error {error:.1e} of entry {mine[own]}: {mixture}; batch {entries}")
            compared.error[mixture.name] = max(compared.error[mixture.name], error)
            if s == 0 and s not in mixture.whole and alone[0].n_pruned and mixture.boundary < mixture.n_layer - 1:
                compared.effect[mixture.name].append(squared_error(whole[own], row))
    after = mixed.n_pruned, sum(engine.n_pruned for engine in alone)
    if after[0] - before[0] != after[1] - before[1]:
        raise Failure(f"{after[0] - before[0]} tokens pruned, {after[1] - before[1]} alone: {mixture}; batch {entries}")
    compared.pruned += after[0] - before[0]


def squared_error(actual: np.ndarray, expected: np.ndarray) -> float:
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", type=Path, help="directory with tiny models (default: write them with torch)")

    arguments = harness.parse(__doc__.splitlines()[0], 200, add)
    return harness.in_a_child(arguments, lambda: fuzz(arguments))


def fuzz(arguments: argparse.Namespace) -> int:
    with library.captured_log(), tempfile.TemporaryDirectory() as temporary:
        models = arguments.models
        if models is None:
            from tests.support import tiny_models

            models = Path(temporary)
            tiny_models.write(models, tiny_models.configs())
        compared = Compared()
        status = harness.run(arguments, lambda chance: case(chance, models, compared), seconds=120, counted="mixtures")
    print(compared.line())
    return status


if __name__ == "__main__":
    sys.exit(main())
