"""Fuzzes completion: whatever happens to sequences before, a completed cache is that of the whole model.

    python -m fuzz.completions --cases 2000 --seed 1

A case draws a model, a size of micro-batches and unified or separate caches. Two contexts do the same to up to four
sequences. One prunes and completes; the other runs every layer. Batches hold parts of several sequences, in blocks or
interleaved. Between them the boundary changes, sequences run whole or not, lose their tails, are copied, shifted, saved
and restored, and chunks are completed, some of which are stopped in the middle or joined by the next token. At last
everything is completed, and the next logits of each sequence are compared. Only sliding windows may lose what
completion needs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
from pathlib import Path

from fuzz import harness
from fuzz.batches import squared_error
from fuzz.harness import Failure
from pypop_gguf import library, native
from tests.support.engine import Engine, llama_cpp

# Squared errors. Chunks group the same sums in another way than batches do, and random Gemma amplifies rounding.
TOLERANCE = {"llama": 1e-9, "qwen3": 1e-9, "gemma3": 1e-6, "mixtral": 1e-9, "deepseek2": 1e-9}
_FLASH_ATTENTION = 1e-4  # it rounds to F16, and experts amplify that
_ALL = 2**31 - 1
_LONGEST = 80  # tokens of a sequence
_N_VOCAB = 128


class Pair:
    """A context that prunes and completes, and one that runs the whole model, with the same sequences.

    Attributes:
        past: Number of tokens of each sequence.
        n_completed: Tokens that were completed.
        n_stopped: Calls of ``complete`` that were stopped before they had done all.
        n_joined: Chunks that a further token has joined.
    """

    def __init__(self, chance: random.Random, models: Path):
        self.chance = chance
        self.name = chance.choice(list(TOLERANCE))
        self.n_seq = chance.randint(1, 4)
        self.options = dict(
            n_seq_max=self.n_seq,
            kv_unified=chance.random() < 0.5,
            n_ubatch=chance.choice([1, 3, 16, 16, 64]),
            n_ctx=256 * self.n_seq,
            swa_full=chance.random() < 0.8,
            flash_attn_type=chance.choice([0, 0, 1]) if self.name != "gemma3" else 0,
        )
        self.n_layer = 7 if self.name == "gemma3" else 6
        path = models / self.name / "model.gguf"
        self.pruned, self.whole = Engine(path, **self.options), Engine(path, **self.options)
        native.set_completion(self.pruned.context, "f32")
        self.past = [0] * self.n_seq
        self.copied = False
        self.n_completed = self.n_stopped = self.n_joined = 0

    def close(self) -> None:
        self.pruned.__exit__()
        self.whole.__exit__()

    def __str__(self) -> str:
        return f"{self.name} n_seq={self.n_seq} {self.options}"

    # Changes of the sequences

    def set_boundary(self) -> None:
        native.set_boundary(self.pruned.context, self.chance.choice([0, *range(1, self.n_layer)]))

    def set_sequence(self) -> None:
        native.set_sequence(self.pruned.context, self.any(), prunes=self.chance.random() < 0.7)

    def read(self) -> None:
        chance, parts = self.chance, []
        for s in chance.sample(range(self.n_seq), chance.randint(1, self.n_seq)):
            count = min(chance.choice([1, 1, 3, 16, 33]), _LONGEST - self.past[s])
            share = chance.choice([0.0, 0.0, 0.2, 1.0])
            parts.append(
                [(chance.randrange(3, _N_VOCAB), self.past[s] + i, s, chance.random() < share) for i in range(count)]
            )
            self.past[s] += count
        entries = [entry for part in parts for entry in part]
        if chance.random() < 0.5:
            entries = []
            while any(parts):
                entries.append(chance.choice([part for part in parts if part]).pop(0))
        if entries:
            self.pruned.decode(entries)
            self.whole.decode(entries)

    def drop_tail(self) -> None:
        s = self.any()
        self.past[s] = self.chance.randint(0, self.past[s])
        for engine in (self.pruned, self.whole):
            llama_cpp.llama_memory_seq_rm(engine.memory, s, self.past[s], -1)

    def copy(self) -> None:
        source, target = self.any(), self.any()
        # llama.cpp copies caches when it decodes, so one has to follow: a state saved before has the old ones
        if source == target or not 0 < self.past[source] < _LONGEST:
            return
        for engine in (self.pruned, self.whole):
            llama_cpp.llama_memory_seq_rm(engine.memory, target, -1, -1)
            llama_cpp.llama_memory_seq_cp(engine.memory, source, target, -1, -1)
            engine.step(7, self.past[source], target)
        self.past[target] = self.past[source] + 1
        self.copied = True

    def shift(self) -> None:
        """Completes a sequence and drops some of its middle: a token that is completed later sees the shorter text."""
        s = self.any()
        if self.past[s] < 12 or self.name == "deepseek2":  # whose keys llama.cpp cannot shift
            return
        if self.copied and self.options["kv_unified"]:  # a cell that two sequences share would move for both
            return
        self.complete(s, _ALL)
        first, dropped = self.chance.randint(1, 4), self.chance.randint(1, 6)
        for engine in (self.pruned, self.whole):
            llama_cpp.llama_memory_seq_rm(engine.memory, s, first, first + dropped)
            llama_cpp.llama_memory_seq_add(engine.memory, s, first + dropped, -1, -dropped)
            engine.step(7, self.past[s] - dropped, s)  # llama.cpp shifts keys when it decodes
        self.past[s] -= dropped - 1

    def restore(self) -> None:
        """Saves a completed sequence and restores it in the place of another."""
        source, target = self.any(), self.any()
        self.complete(source, _ALL)
        if self.past[source] == 0 or native.n_lost(self.pruned.context, source):
            return
        for engine in (self.pruned, self.whole):
            state = engine.state(source)
            llama_cpp.llama_memory_seq_rm(engine.memory, target, -1, -1)
            engine.restore(state, target)
        self.past[target] = self.past[source]

    def complete_some(self) -> None:
        s, n = self.any(), self.chance.choice([1, 5, 16, 64, _ALL])
        kind = self.chance.choice(["all", "all", "stopped before", "stopped within"])
        if kind == "stopped before":
            native.stop(self.pruned.context)
            if native.complete(self.pruned.context, n, s) != 0:
                raise Failure(f"a call that was stopped before has completed something: {self}")
            self.n_stopped += 1
        elif kind == "stopped within":
            timer = threading.Timer(self.chance.random() * 0.01, native.stop, [self.pruned.context])
            timer.start()
            before = native.n_incomplete(self.pruned.context, s)
            done = native.complete(self.pruned.context, n, s)
            timer.join()
            native.complete(self.pruned.context, 0, s)  # takes the stop, if that came too late
            self.n_completed += done
            self.n_stopped += done < min(n, before)
        else:
            self.complete(s, n)

    def join(self) -> None:
        """Decodes a token, which joins a chunk of its sequence or, now and then, asks in vain for one of another."""
        s = self.any()
        asked = s if self.chance.random() < 0.9 else self.any()
        if self.past[s] == _LONGEST:
            return
        before, left = native.n_completed(self.pruned.context), native.n_incomplete(self.pruned.context, s)
        native.complete_with_next(self.pruned.context, self.chance.choice([1, 5, 16, 64]), asked)
        token = self.chance.randrange(3, _N_VOCAB)
        for engine in (self.pruned, self.whole):
            engine.step(token, self.past[s], s)
        self.past[s] += 1
        done = native.n_completed(self.pruned.context) - before
        self.n_joined += done > 0
        self.n_completed += done
        if done > (left if s == asked else 0):
            raise Failure(f"{done} tokens were completed of {left}: {self}")

    def complete(self, s: int, n: int) -> None:
        before, lost = native.n_incomplete(self.pruned.context, s), native.n_lost(self.pruned.context, s)
        done = native.complete(self.pruned.context, n, s)
        left, lost_now = native.n_incomplete(self.pruned.context, s), native.n_lost(self.pruned.context, s)
        self.n_completed += done
        if lost_now == lost and (done != min(n, before) or left != before - done):
            raise Failure(f"{before} were left, {done} of {n} completed, {left} left now: {self}")
        if lost_now and self.name != "gemma3":
            raise Failure(f"{lost_now} tokens lost: {self}")

    def any(self) -> int:
        return self.chance.randrange(self.n_seq)

    def compare(self) -> tuple[float, bool]:
        """Returns the largest error without flash attention, and whether a sequence was lost."""
        worst, lost = 0.0, False
        for s in range(self.n_seq):
            if self.past[s] == 0:
                continue
            self.complete(s, _ALL)
            if native.n_lost(self.pruned.context, s):
                lost = True
                continue
            token = self.chance.randrange(3, _N_VOCAB)
            error = squared_error(*(each.step(token, self.past[s], s) for each in (self.pruned, self.whole)))
            exact = self.options["flash_attn_type"] == 0
            if not error <= (TOLERANCE[self.name] if exact else _FLASH_ATTENTION):
                raise Failure(f"squared error {error:.1e} of sequence {s}: {self}")
            worst = max(worst, error if exact else 0.0)
        return worst, lost


def case(chance: random.Random, models: Path, worst: dict[str, float]) -> str:
    pair = Pair(chance, models)
    happens = [pair.read] * 4 + [pair.complete_some] * 3 + [pair.join] * 3
    happens += [pair.set_boundary, pair.set_sequence, pair.drop_tail, pair.copy, pair.shift, pair.restore]
    try:
        pair.set_boundary()
        for _ in range(chance.randint(6, 24)):
            chance.choice(happens)()
        error, lost = pair.compare()
    except AssertionError as failed:
        raise Failure(f"{failed}: {pair}") from failed
    finally:
        pair.close()
    worst[pair.name] = max(worst[pair.name], error)
    if lost:
        return "lost to a window"
    if pair.n_joined:
        return "joined"
    return "stopped" if pair.n_stopped else "completed" if pair.n_completed else "nothing to complete"


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
        worst = dict.fromkeys(TOLERANCE, 0.0)
        status = harness.run(arguments, lambda chance: case(chance, models, worst), seconds=120, counted="mixtures")
    print(
        "largest squared error without flash attention: "
        + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
