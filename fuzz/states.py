"""Fuzzes saved states: a damaged state is refused, or loads, and the process goes on either way.

    python -m fuzz.states --cases 3000 --seed 1

A case saves the state of a whole context or of one sequence, in memory or in a file, and damages it: it is cut short,
made longer, or some of its bytes are changed, mostly in the numbers before the keys and values. If it is refused, no
token may stay in the cache. If it loads, the context decodes another token or says that it cannot. In both cases the
cache is then cleared, and a prompt has to get the logits that it had before.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from fuzz import harness
from fuzz.batches import squared_error
from fuzz.harness import Failure
from pypop_gguf import library
from tests.support.engine import Engine, llama_cpp

_MODELS = ("llama", "gemma3", "lfm2")  # attention, sliding windows, recurrent layers
_N_SEQ = 2
_TOLERANCE = 1e-6  # squared error of logits; the cells of a prompt may be others than before
_NUMBERS = [0, 1, 2, 3, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


class Subject:
    """A context with two sequences that are read anew for each case."""

    def __init__(self, path: Path, scratch: Path, unified: bool) -> None:
        self.engine, self.scratch = Engine(path, n_seq_max=_N_SEQ, kv_unified=unified), scratch
        self.tokens = [[3 + (7 * i + s) % 90 for i in range(20 + 9 * s)] for s in range(_N_SEQ)]
        self.expected = self.read()

    def read(self) -> np.ndarray:
        """Reads both sequences into an empty cache and returns the logits of their last tokens."""
        llama_cpp.llama_memory_clear(self.engine.memory, True)
        return np.stack([self.engine.prefill(tokens, sequence=s) for s, tokens in enumerate(self.tokens)])

    def last_position(self, sequence: int) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self.engine.memory, sequence)

    def save(self, whole: bool, in_file: bool) -> bytes:
        context, file = self.engine.context, self.scratch / "saved"
        if in_file:
            array = (ctypes.c_int32 * 4)(1, 2, 3, 4)
            arguments = (str(file).encode(), array, 4) if whole else (str(file).encode(), 0, array, 4)
            (llama_cpp.llama_state_save_file if whole else llama_cpp.llama_state_seq_save_file)(context, *arguments)
            return file.read_bytes()
        if not whole:
            return self.engine.state()
        data = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(context))()
        return bytes(data[: llama_cpp.llama_state_get_data(context, data, len(data))])

    def load(self, state: bytes, whole: bool, in_file: bool) -> bool:
        context, file = self.engine.context, self.scratch / "damaged"
        if in_file:
            file.write_bytes(state)
            array, count = (ctypes.c_int32 * 64)(), ctypes.c_size_t()
            path = str(file).encode()
            if whole:
                return llama_cpp.llama_state_load_file(context, path, array, 64, ctypes.byref(count))
            return llama_cpp.llama_state_seq_load_file(context, path, 0, array, 64, ctypes.byref(count)) != 0
        data = (ctypes.c_uint8 * max(1, len(state))).from_buffer_copy(state or b"\0")
        if whole:
            return llama_cpp.llama_state_set_data(context, data, len(state)) != 0
        return llama_cpp.llama_state_seq_set_data(context, data, len(state), 0) != 0

    def decodes(self, sequence: int) -> bool:
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        batch.n_tokens = 1
        batch.token[0], batch.pos[0], batch.logits[0] = 5, min(self.last_position(sequence) + 1, 2**31 - 1), True
        batch.n_seq_id[0], batch.seq_id[0][0] = 1, sequence
        status = llama_cpp.llama_decode(self.engine.context, batch)
        llama_cpp.llama_batch_free(batch)
        return status == 0


def damage(chance: random.Random, state: bytes) -> bytes:
    """Returns the state with other bytes. Its counts and positions come first, so they are hit most often."""
    kind = chance.random()
    if kind < 0.25:
        return state[: chance.choice([chance.randrange(len(state)), chance.randrange(600), len(state) - 1])]
    if kind < 0.3:
        return state + chance.randbytes(chance.randint(1, 99))
    changed = bytearray(state)
    for _ in range(chance.choice([1, 1, 1, 2, 9])):
        at = chance.randrange(chance.choice([60, 600, len(state)])) % (len(state) - 4)
        if chance.random() < 0.7:
            at -= at % 4
            changed[at : at + 4] = chance.choice(_NUMBERS).to_bytes(4, "little")
        else:
            changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def case(chance: random.Random, subjects: list[Subject]) -> str:
    subject = chance.choice(subjects)
    whole, in_file = chance.random() < 0.5, chance.random() < 0.5
    subject.read()
    state = damage(chance, subject.save(whole, in_file))
    loaded = subject.load(state, whole, in_file)
    if loaded:
        outcome = "loaded" if subject.decodes(0) else "loaded and not decoded"
    else:
        outcome = "refused"
        left = [s for s in range(_N_SEQ if whole else 1) if subject.last_position(s) != -1]
        # A file that is refused by its header or its tokens has not changed the cache.
        if left and (len(left) < (_N_SEQ if whole else 1) or subject.last_position(0) != len(subject.tokens[0]) - 1):
            raise Failure(f"sequences {left} kept a part of a state that was refused")
    error = squared_error(subject.read(), subject.expected)
    if not error <= _TOLERANCE:
        raise Failure(f"logits after a damaged state differ by {error}")
    return outcome


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", type=Path, help="directory of the tests' models (default: they are written)")

    arguments = harness.parse(__doc__.splitlines()[0], 1000, add)

    def body() -> int:
        with library.captured_log(), tempfile.TemporaryDirectory() as base, harness.directory() as scratch:
            models = arguments.models
            if not models:
                from tests.support import tiny_models

                models = Path(base)
                tiny_models.write(models, tiny_models.configs())
            paths = [models / name / "model.gguf" for name in _MODELS]
            subjects = [Subject(path, scratch, unified) for path in paths for unified in (False, True)]
            return harness.run(arguments, lambda chance: case(chance, subjects), seconds=60)

    return harness.in_a_child(arguments, body)


if __name__ == "__main__":
    sys.exit(main())
