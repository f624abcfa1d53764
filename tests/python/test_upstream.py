"""llama-cpp-python's own tests, unmodified, with ``PopLlama`` in the place of ``llama_cpp.Llama`` and prompts pruned.

The tests lie in the source that the build unpacks. They download models. Here each model has a stand-in of the same
kind, which ``upstream_models.py`` writes. This is what the tests need beyond that:

- ``test_llama_cpp_tokenization`` needs nothing, because its vocabulary file comes with the source.
- ``test_real_model`` expects Qwen 3.5's ids of "Hello, world!". The stand-in has them, because two pairs of its tokens
  are exchanged. The test uses no ``Llama``, so it runs the patched library without pruning.
- ``test_real_llama`` and ``test_real_llama_repeated_prompt_cache`` expect a model that writes " jumps over the lazy
  dog.", "true" and "rot". The output layer of the stand-in is a bigram table that does so. The stand-in is a hybrid, as
  Qwen 3.5 is.
- The tests of cached prompts run on a random Mamba, a random Falcon H1, and the bundled model as the transformer.
- ``test_real_llama_embeddings`` runs on a random BERT, which is an encoder and not pruned.
- ``test_llama_cpp_version`` and the tests of chat formats, grammars and speculation open no model.

The tests import scipy without using it, so it is replaced if it is missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from tests.support import upstream_models
from tests.support.paths import ROOT

STOCK = ROOT / "build" / "stock" / "package"
# The tests in test_llama.py that read no prompt with PopLlama, or one that cannot be pruned.
NOT_PRUNED = {
    "test_llama_cpp_version",
    "test_llama_cpp_tokenization",
    "test_real_model",
    "test_real_llama_embeddings",
}


@pytest.fixture(scope="module")
def source() -> Path:
    found = [path.parents[1] for path in ROOT.glob("build/*/llama-cpp-python/tests/test_llama.py")]
    if not found:
        pytest.skip("llama-cpp-python's source is not unpacked here: build in the source tree, as `make test` does")
    assert f'"{llama_cpp.__version__}"' in (found[0] / "llama_cpp" / "__init__.py").read_text()
    return found[0]


@pytest.fixture(scope="module")
def models(source, bundled_gguf, tmp_path_factory) -> Path:
    """A JSON file with the path of each stand-in."""
    base = tmp_path_factory.mktemp("upstream")
    written = upstream_models.write(base, source / "vendor" / "llama.cpp" / "models")
    (base / "lab.gguf").symlink_to(bundled_gguf)
    (base / "models.json").write_text(
        json.dumps({name: str(path) for name, path in {**written, "stories15M-q4_0.gguf": base / "lab.gguf"}.items()})
    )
    return base / "models.json"


@pytest.fixture
def run(source, models, tmp_path):
    """Runs all tests in a process of its own; returns their outcomes by name."""

    def run(mode: str) -> dict[str, dict]:
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "POP_KERNELS": "off",  # Some expected values are those of llama.cpp's own rounding.
            **({"PYTHONPATH": str(STOCK)} if mode == "stock" else {}),
        }
        worker = [
            sys.executable,
            ROOT / "tests" / "support" / "upstream_worker.py",
            mode,
            models,
            source,
            tmp_path / "out.json",
        ]
        done = subprocess.run([*map(str, worker)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        outcomes = json.loads((tmp_path / "out.json").read_text())
        assert len(outcomes) > 20  # a suite that was not found passes too
        assert {outcome["outcome"] for outcome in outcomes.values()} <= {"passed", "failed"}  # none was skipped
        return outcomes

    return run


def failed(outcomes: dict[str, dict]) -> dict[str, list[str]]:
    return {
        name.split("::")[1]: outcome["lines"] for name, outcome in outcomes.items() if outcome["outcome"] != "passed"
    }


def test_all_pass_with_prompts_pruned(run):
    outcomes = run("pop")
    assert failed(outcomes) == {}
    pruned = {
        name.split("::")[1]: outcome["pruned"] > 0
        for name, outcome in outcomes.items()
        if name.startswith("test_llama.py")
    }
    assert {name for name in pruned if not pruned[name]} == NOT_PRUNED and len(pruned) > 2 * len(NOT_PRUNED)


def test_all_pass_with_the_unpatched_llama(run):
    """The stand-ins are not made to suit PopLlama alone."""
    if not (STOCK / "llama_cpp" / "lib").is_dir():
        pytest.skip("the unpatched llama-cpp-python is not built: run `make test`")
    assert failed(run("stock")) == {}


def test_a_class_that_loads_no_states_is_found_out(run):
    """This shows that the tests can fail."""
    loading = [
        f"test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_{kind}"
        for kind in ("transformer", "recurrent", "hybrid")
    ]
    assert sorted(name.split("_model_path")[0] for name in failed(run("forgetful"))) == sorted(
        [*loading, "test_real_llama"]
    )
