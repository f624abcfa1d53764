"""Runs the cases of metadata.py and texts.py guided by coverage, with atheris (libFuzzer).

    pip install atheris
    python -m fuzz.guided metadata --cases 100000

The bytes that atheris chooses take the place of random numbers, so each case is of the same kinds and has to keep the
same promises. The run ends at the first failure and leaves its bytes in a file ``crash-...``. With that file as an
argument, it runs that case alone.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib
import random
import sys
import types

import atheris

from fuzz import harness

_LONGEST = 4096  # bytes for one case
_SECONDS = 5  # longest time of a case, which is slower under atheris


class Chosen(random.Random):
    """Random numbers that are taken from given bytes, and zeros after their end."""

    def __init__(self, data: bytes):
        super().__init__()
        self.setstate((data, 0))

    def getrandbits(self, k: int) -> int:
        n = -(-k // 8)
        taken = self._data[self._at : self._at + n].ljust(n, b"\0")
        self._at += n
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16

    def getstate(self) -> tuple:
        return self._data, self._at

    def setstate(self, state: tuple) -> None:
        self._data, self._at = state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fuzzer", choices=["metadata", "texts"])
    parser.add_argument("--cases", type=int, default=100_000, help="number of cases (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of atheris (default: 1)")
    parser.add_argument("file", nargs="?", help="file of a failed case, which then runs alone")
    arguments = parser.parse_args()
    fuzzer = importlib.import_module(f"fuzz.{arguments.fuzzer}")
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and (function.__module__ or "").startswith("pypop_gguf"):
            atheris.instrument_func(function)  # the import hook of atheris does not see an editable install
    outcomes: collections.Counter[str] = collections.Counter()
    with harness.directory() as directory:
        runs = [f"-runs={arguments.cases}", f"-seed={arguments.seed}", f"-max_len={_LONGEST}", "-len_control=0"]
        options = [arguments.file] if arguments.file else runs

        def case(data: bytes) -> None:
            outcomes[fuzzer.case(Chosen(data), directory)] += 1
            if sum(outcomes.values()) == arguments.cases:  # atheris ends the process after the last case
                counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
                print(f"{arguments.cases} cases: {counts}", flush=True)

        atheris.Setup([sys.argv[0], f"-timeout={_SECONDS}", "-rss_limit_mb=1024", *options], case)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
