"""Fuzzes the reader of ``pop.*`` keys: a file has metadata within docs/metadata.md, or an error of one line.

    python -m fuzz.metadata --cases 1000000 --seed 1

A case may not end in another exception, take more than a second, or need more than 256 MB. In some cases the metadata
is also compared with that of ``gguf.GGUFReader``, where it reads the file, and printed with ``pop-gguf inspect``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np

from fuzz import harness
from fuzz.gguf_cases import File, mutated, tensor, valid
from fuzz.harness import Failure
from pypop_gguf import PopError, cli
from pypop_gguf.commands import inspect as inspect_gguf
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import PopMetadata, parse_metadata

_LONGEST_LINE = 400  # characters, without the name of the file


def case(chance: random.Random, directory: Path) -> str:
    path = directory / "case.gguf"
    order = "<" if chance.random() < 0.8 else ">"
    n_tensors = chance.randint(0, 3)
    infos = b"".join(tensor(b"t%d" % i, [2] * chance.randint(0, 4), 0, 64 * i, order) for i in range(n_tensors))
    file = File(valid(chance, order), infos, n_tensors, bytes(64 * n_tensors), order)
    file = mutated(chance, file)
    path.write_bytes(file.bytes())

    refusal, metadata = None, None
    try:
        header = read_header(path)
        metadata = parse_metadata(header, path)
    except PopError as error:
        refusal = str(error)
        check_line(refusal, path)
    if metadata is not None:
        check(metadata)
        if chance.random() < 0.05 and path.stat().st_size < 10_000:  # the other reader takes seconds for long arrays
            compare(metadata, path)
    if chance.random() < 0.1:
        inspect(path, refusal, chance.random() < 0.5, chance.random() < 0.05)
    if refusal is not None:
        return "damaged" if "damaged or cut short" in refusal else "refused"
    return "valid" if metadata is not None else "without pop keys"


def check_line(text: str, path: Path) -> None:
    shown = text.replace(str(path), "")
    if not text.isprintable() or str(path) not in text or len(shown) > _LONGEST_LINE:
        raise Failure(f"no clear line: {shown[:1000]!r}")


def check(metadata: PopMetadata) -> None:
    """Checks the ranges of docs/metadata.md. The number of layers may be wrong too, so it is taken from the arrays."""
    n_layer = 2**32
    for scores in (metadata.importance_prefill, metadata.importance_decode):
        if scores is not None:
            require(scores.dtype == np.float32 and scores.ndim == 1 and len(scores) >= 1, "scores")
            require(np.isfinite(scores).all() and (scores >= 0).all(), "scores are at least 0 and finite")
            n_layer = len(scores)
    require(metadata.boundary is None or 1 <= metadata.boundary <= n_layer, "boundary")
    for name in ("head", "tail", "min_tokens"):
        number = getattr(metadata, name)
        require(number is None or (name == "tail") <= number < 2**31, name)  # llama.cpp counts tokens in 31 bits
    for name in ("samples", "tokens", "seed"):
        number = getattr(metadata, f"calibration_{name}")
        require(number is None or 0 <= number < 2**32, name)
    for text in (metadata.calibration_source, metadata.calibration_sha256):
        require(text is None or isinstance(text, str), "text")
    if (curve := metadata.curve) is not None:
        require(all(1 <= boundary <= n_layer for boundary in curve.boundary), "boundaries of the curve")
        for figures in (curve.kl, curve.loss_increase, curve.speedup):
            require(len(figures) == len(curve.boundary) and np.isfinite(figures).all(), "figures of the curve")
        require(isinstance(curve.source, str) and 0 <= curve.samples < 2**32, "source and samples of the curve")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Failure(f"accepted out of range: {what}")


def compare(metadata: PopMetadata, path: Path) -> None:
    """Compares with what gguf.GGUFReader reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields = gguf.GGUFReader(path).fields
    except Exception:  # it refuses other files than ours does, with any exception
        return
    for key, mine, _kind in metadata.key_values():
        if key != "pop.version" and not np.array_equal(mine, fields[key].contents()):
            raise Failure(f"{key} is {mine!r} here, {fields[key].contents()!r} by gguf.GGUFReader")


def inspect(path: Path, refusal: str | None, as_json: bool, by_command: bool) -> None:
    """Checks that ``pop-gguf inspect`` prints the metadata, or fails with the same line."""
    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        if by_command:
            status = cli.main(["inspect", str(path), *(["--json"] if as_json else [])])
        else:
            try:
                status = inspect_gguf.run(argparse.Namespace(file=path, json=as_json))
            except PopError as error:
                status = 1
                print(f"pop-gguf: error: {error}", file=errors)
    output.flush()
    printed = output.buffer.getvalue().decode()
    if refusal is not None:
        if status != 1 or printed or errors.getvalue() != f"pop-gguf: error: {refusal}\n":
            raise Failure(f"inspect said {status} {errors.getvalue()!r} of a file that is refused: {refusal}")
    elif status == 1:  # the file has no pop keys, and no usable number of layers either
        check_line(errors.getvalue().removesuffix("\n"), path)
        if printed or "no usable block_count" not in errors.getvalue():
            raise Failure(f"inspect refuses what is read: {errors.getvalue()!r}")
    elif as_json:
        json.loads(printed, parse_constant=lambda name: (_ for _ in ()).throw(Failure(f"{name} in JSON")))
    elif status != 0 or "boundary" not in printed:
        raise Failure(f"inspect printed {printed!r}")


def main() -> int:
    arguments = harness.parse(__doc__.splitlines()[0], 100_000)
    with harness.directory() as directory:
        harness.limit_memory(256)

        def one(chance: random.Random) -> str:
            try:
                return case(chance, directory)
            except BaseException:
                if arguments.keep:
                    arguments.keep.mkdir(exist_ok=True)
                    kept = arguments.keep / f"case-{len(list(arguments.keep.iterdir()))}.gguf"
                    kept.write_bytes((directory / "case.gguf").read_bytes())
                raise

        return harness.run(arguments, one, seconds=1.0)


if __name__ == "__main__":
    sys.exit(main())
