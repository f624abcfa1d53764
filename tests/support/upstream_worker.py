"""Runs llama-cpp-python's own tests unmodified with another class in the place of ``llama_cpp.Llama``.

tests/python/test_upstream.py starts it as ``MODE MODELS.json SOURCE OUT.json``. The mode ``pop`` takes ``PopLlama``
with a boundary, ``forgetful`` takes one that loads no states, and ``stock`` leaves ``llama_cpp`` as it is.
MODELS.json has the files to use in the place of those that the tests download. SOURCE is the unpacked source of
llama-cpp-python. OUT.json gets the outcome of each test and the number of tokens that were pruned in it.
"""

import json
import multiprocessing
import os
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

# The boundary of each model by its file name. Vocabulary files have none, and the encoder has no prompt to prune.
BOUNDARIES = {"qwen35.gguf": 5, "falcon-h1.gguf": 3, "mamba.gguf": 2, "lab.gguf": 8}


def pruning(forgetful: bool):
    from pypop_gguf import PopLlama, native

    class Recorded(PopLlama):
        opened: ClassVar[list[PopLlama]] = []

        def __init__(self, model_path, **options):
            super().__init__(model_path, pop_boundary=BOUNDARIES.get(Path(model_path).name), **options)
            self.opened.append(self)

        def load_state(self, state):
            if not forgetful:
                super().load_state(state)

        @classmethod
        def pruned(cls) -> int:
            models, cls.opened = cls.opened, []
            return sum(native.n_pruned(llm._ctx.ctx) for llm in models if llm.pop.enabled)

    return Recorded


class Outcomes:
    """A pytest plugin that records the outcome of each test."""

    def __init__(self, pruned) -> None:
        self.tests, self._pruned = {}, pruned

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            lines = str(report.longrepr).splitlines()[-12:] if report.failed else []
            self.tests[report.nodeid.split("/")[-1]] = {
                "outcome": report.outcome,
                "pruned": self._pruned(),
                "lines": lines,
            }


def main() -> int:
    mode, models, source, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]), sys.argv[4]
    out = Path(out).resolve()
    import huggingface_hub

    huggingface_hub.hf_hub_download = lambda _repository, filename: models[Path(filename).name]
    # The tests import scipy and do not use it.
    sys.modules.setdefault("scipy.special", types.SimpleNamespace(log_softmax=None))
    # The tests use so many threads, and tiny models have no work for more than one.
    multiprocessing.cpu_count = lambda: 1
    pruned = int
    if mode != "stock":
        kind = pruning(mode == "forgetful")
        pruned = kind.pruned
    import llama_cpp

    if mode == "stock":
        assert not hasattr(llama_cpp.llama_cpp._lib, "llama_pop_set_boundary")
    else:
        llama_cpp.Llama = kind
    outcomes = Outcomes(pruned)
    os.chdir(source)  # the tests give a path relative to it
    options = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "--import-mode=importlib"]
    status = pytest.main([*options, "--tb=short", "tests"], plugins=[outcomes])
    out.write_text(json.dumps(outcomes.tests))
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else status


if __name__ == "__main__":
    sys.exit(main())
