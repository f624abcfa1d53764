"""Runs llama-cpp-python's own tests, as they are, with another class in the place of ``llama_cpp.Llama``: part of ``test_upstream.py``.

``pop MODELS.json SOURCE OUT.json`` takes ``PopLlama`` with a boundary, ``forgetful`` one that loads no states, ``stock`` leaves
``llama_cpp`` alone. Models that the tests download are those of MODELS.json, by file name; SOURCE is llama-cpp-python's unpacked source.
OUT.json gets the outcome of each test and how many tokens were pruned in it.
"""

import json
import multiprocessing
import os
import sys
import types
from pathlib import Path

import pytest

# The boundary of each model by its file's name; vocabularies have none, and the encoder has no prompt to prune.
BOUNDARIES = {"qwen35.gguf": 5, "falcon-h1.gguf": 3, "mamba.gguf": 2, "lab.gguf": 8}


def pruning(forgetful: bool):
    from pypop_gguf import PopLlama, native

    class Recorded(PopLlama):
        opened = []

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
    """A pytest plugin."""

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
    mode, models, source, out = (
        sys.argv[1],
        json.loads(Path(sys.argv[2]).read_text()),
        Path(sys.argv[3]),
        Path(sys.argv[4]).resolve(),
    )
    import huggingface_hub

    huggingface_hub.hf_hub_download = lambda _repository, filename: models[Path(filename).name]
    sys.modules.setdefault("scipy.special", types.SimpleNamespace(log_softmax=None))  # imported there and not used
    multiprocessing.cpu_count = lambda: 1  # threads; a tiny model has no work for more
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
    os.chdir(source)  # the tests name a vocabulary file relative to it
    options = [
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "--tb=short",
    ]
    status = pytest.main([*options, "tests"], plugins=[outcomes])
    out.write_text(json.dumps(outcomes.tests))
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else status


if __name__ == "__main__":
    sys.exit(main())
