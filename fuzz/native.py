"""Fuzzes what the native library reads: ``pop.*`` keys of models, and adapters, in a process of its own.

    python -m fuzz.native --cases 20000 --seed 1

Half of the cases are models with wrong ``pop.*`` keys, some with other damage. If llama.cpp loads such a file, there
has to be a boundary of 1..L and a decoded batch, or one line of error. If ``read_metadata`` accepts it, the native
library has to read the same. The other half are adapters of both versions for a valid model. Where the process dies,
the failed assertion is named: one of llama.cpp's own is counted, and one of ours is a failure.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from fuzz import harness
from fuzz.gguf_cases import File, Key, Kind, mutated, number, string, valid
from fuzz.harness import Failure
from pypop_gguf import PopError, library
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import read_metadata
from tests.support.adapter_v1 import write_pairs
from tests.support.gguf_files import N_EMBD, write_model

WORKER = Path(__file__).with_name("native_worker.py")
N_LAYER = 4
_OURS = re.compile(r"csrc/pop-|pop-[a-z]+\.(cpp|h):")


class Worker:
    """The process that reads files. It is started again when it has died."""

    def __init__(self, model: Path, errors: IO[bytes]):
        self._model, self._errors, self._process = model, errors, None

    def ask(self, kind: str, path: Path) -> tuple[dict, str]:
        """Returns the answer and the last step; no answer if that step has killed the process."""
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                [sys.executable, WORKER, self._model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # a backtrace would take a second
            )
            self._process.stdout.readline()
        self._process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        self._process.stdin.flush()
        step = ""
        for line in self._process.stdout:
            answer = json.loads(line)
            if "outcome" in answer:
                return answer, step
            step = answer["step"]
        return {}, step

    def last_words(self) -> str:
        """Returns how the process died that gave no answer."""
        status = self._process.wait()
        self._process = None
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")
        if report := re.search(r"SUMMARY: \w+Sanitizer: (\S+)|runtime error: ", text):
            # A failed allocation ends a process only under a sanitizer. Without one, the file is refused.
            return "no memory" if report[1] in ("out-of-memory", "allocation-size-too-big") else f"sanitizer: {text}"
        found = re.findall(r"([\w/.+-]+/)?([\w.-]+/[\w.-]+:\d+): (.*)", text)
        return f"{found[-1][1]}: {found[-1][2]}" if found else f"exit status {status}: {text[-300:]!r}"

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


def base_of(path: Path) -> File:
    """Reads a file as :mod:`fuzz.gguf_cases` represents it."""
    header, raw = read_header(path), path.read_bytes()
    keys = []
    for name, field in header.fields.items():
        start = 8 + len(name.encode())
        keys.append(Key(name.encode(), struct.unpack_from("<I", field.raw, start)[0], field.raw[start + 4 :]))
    return File(keys, header.tensor_infos, header.n_tensors, raw[header.data_offset :])


def write_adapters(directory: Path, fingerprint: str, rank: int = 2) -> list[Path]:
    """Writes adapters of versions 1 and 2 for boundary 2 of the model."""
    chance = np.random.default_rng(3)
    names = [f"blk.3.{name}.weight" for name in ("attn_k", "attn_v")]
    options = {"architecture": "llama", "boundary": 2, "fingerprint": fingerprint}
    pairs = {name: (chance.normal(size=(rank, N_EMBD)), chance.normal(size=(N_EMBD, rank))) for name in names}
    write_pairs(directory / "v1.gguf", pairs, **options)
    replacements = {
        name: (
            chance.normal(size=(N_EMBD, N_EMBD)).astype(np.float32),
            chance.normal(size=N_EMBD).astype(np.float32),
        )
        for name in names
    }
    write_replacements(directory / "v2.gguf", replacements, **options)
    return [directory / "v1.gguf", directory / "v2.gguf"]


def model_case(chance: random.Random, worker: Worker, base: File, path: Path) -> str:
    keys = base.keys + [key for key in valid(chance, n_layer=N_LAYER) if key.name.startswith(b"pop.")]
    only_pop = chance.random() < 0.8
    path.write_bytes(mutated(chance, File(keys, base.infos, base.n_tensors, base.data), only_pop).bytes())
    answer, step = worker.ask("model", path)
    if not answer:
        return "died: " + died(worker, step)
    outcome = answer["outcome"]
    if outcome not in ("accepted", "refused"):
        return outcome
    if not 1 <= answer["boundary"] <= answer["n_layer"] or answer["min_tokens"] < 0 or answer["decoded"] != 0:
        raise Failure(f"out of range: {answer}")
    if outcome == "refused" and (not answer["why"] or "\n" in answer["why"] or answer["pruned"]):
        raise Failure(f"refused without a line, or pruned all the same: {answer}")
    try:
        metadata = read_metadata(path)
    except PopError:
        return f"{outcome}, refused by read_metadata"
    expected = (metadata and metadata.boundary) or answer["n_layer"]
    if (
        outcome == "refused"
        or answer["boundary"] != expected
        or answer["min_tokens"] != ((metadata and metadata.min_tokens) or 0)
    ):
        raise Failure(f"read_metadata accepts {metadata}, the native library has {answer}")
    return "accepted by both"


def adapter_case(chance: random.Random, worker: Worker, base: File, path: Path) -> str:
    file = base
    for _ in range(chance.choice([0, 1, 1, 2])):
        fault = chance.random()
        if fault < 0.4:  # another text, number or type
            keys = list(file.keys)
            at = chance.randrange(len(keys))
            kind = chance.choice([Kind.UINT32, Kind.STRING, Kind.UINT32, Kind.STRING, Kind.FLOAT32, Kind.ARRAY])
            value = {
                Kind.STRING: string(
                    chance.choice([b"", b"1", b"2", b"lora", b"0" * 16, b"99999999999999999999", b"\xff"]), "<"
                ),
                Kind.ARRAY: struct.pack("<IQ", chance.choice([4, 6, 8]), 0),
            }.get(kind) or number(kind, chance.choice([0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1]), "<")
            keys[at] = Key(keys[at].name, kind, value)
            file = File(keys, file.infos, file.n_tensors, file.data)
        elif fault < 0.8:  # names, shapes, types and offsets of tensors
            infos = bytearray(file.infos)
            at = chance.randrange(len(infos))
            infos[at] = chance.choice([0, 1, 2, 3, 8, 48, 64, 255, infos[at] ^ 1])
            file = File(file.keys, bytes(infos), file.n_tensors, file.data)
        elif fault < 0.9:
            file = mutated(chance, file, only_pop=chance.random() < 0.5)
        else:  # cut short
            file = File(file.keys, file.infos, file.n_tensors, file.data[: chance.randrange(len(file.data) + 1)])
    path.write_bytes(file.bytes())
    answer, step = worker.ask("adapter", path)
    if not answer:
        return "adapter died: " + died(worker, step)
    if answer["outcome"] == "accepted" and (not 1 <= answer["boundary"] <= N_LAYER or answer["decoded"] != 0):
        raise Failure(f"an adapter that cannot be right: {answer}")
    if answer["outcome"] == "refused" and (not answer["why"] or "\n" in answer["why"]):
        raise Failure(f"refused without a line: {answer}")
    return f"adapter {answer['outcome']}"


def died(worker: Worker, step: str) -> str:
    words = worker.last_words()
    # An assertion names its file. A signal does not, but before the first call of ours it comes from llama.cpp.
    if (
        _OURS.search(words)
        or words.startswith("sanitizer")
        or ("exit status" in words and step not in ("load", "context"))
    ):
        raise Failure(f"the process died at step {step!r}: {words}")
    return f"{step}: {words}".replace(",", ";")


def main() -> int:
    arguments = harness.parse(__doc__.splitlines()[0], 2000)
    with harness.directory() as directory, tempfile.TemporaryFile() as errors:
        good = write_model(directory / "good.gguf", n_layer=N_LAYER)
        base = base_of(good)
        adapters = [base_of(path) for path in write_adapters(directory, library.fingerprint(good))]
        worker, path = Worker(good, errors), directory / "case.gguf"

        def one(chance: random.Random) -> str:
            try:
                if chance.random() < 0.5:
                    return model_case(chance, worker, base, path)
                return adapter_case(chance, worker, chance.choice(adapters), path)
            except Failure:
                if arguments.keep:
                    arguments.keep.mkdir(exist_ok=True)
                    (arguments.keep / f"{len(list(arguments.keep.iterdir()))}.gguf").write_bytes(path.read_bytes())
                raise

        try:
            return harness.run(arguments, one, seconds=30)
        finally:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
