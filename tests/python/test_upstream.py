"""llama-cpp-python's own tests, all 26 and unmodified, with ``PopLlama`` in the place of ``llama_cpp.Llama`` and prompts pruned.

Their texts lie in the source that the build unpacks. They download models; here each gets a stand-in of the same kind, from
``upstream_models.py``. What each test needed beyond that:

- ``test_llama_cpp_tokenization``: nothing, its vocabulary file comes with the source.
- ``test_real_model``: Qwen 3.5's ids of "Hello, world!", which the stand-in has by exchanging two pairs of tokens. It knows no ``Llama``
  and runs the patched library unpruned.
- ``test_real_llama``, ``test_real_llama_repeated_prompt_cache``: a model that writes " jumps over the lazy dog.", "true" and "rot". The
  stand-in does by a bigram in its output layer; it is a hybrid as Qwen 3.5 is.
- ``test_recurrent_model_prompt_cache_reset``, ``test_hybrid_model_prompt_cache_reset``, ``test_exact_cached_prompt_reuse_matches_fresh``,
  ``test_loaded_exact_cached_prompt_reuse_matches_fresh``, ``test_ram_cache_exact_prompt_hit_matches_fresh``,
  ``test_shorter_prompt_prefix_reuse_matches_fresh``: a random Mamba, a random Falcon H1, and the bundled model as the transformer.
- ``test_real_llama_embeddings``: a random BERT, which is an encoder and not pruned.
- ``test_llama_cpp_version`` and the six of chat formats, grammars and speculation: nothing, they open no model.

scipy, which the tests import and do not use, is replaced where it is missing.
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
NOT_PRUNED = {
    "test_llama_cpp_version",
    "test_llama_cpp_tokenization",
    "test_real_model",
    "test_real_llama_embeddings",
}  # see above


@pytest.fixture(scope="module")
def source() -> Path:
    found = [path.parents[1] for path in ROOT.glob("build/*/llama-cpp-python/tests/test_llama.py")]
    if not found:
        pytest.skip("llama-cpp-python's source is not unpacked here: build in the source tree, as `make test` does")
    assert f'"{llama_cpp.__version__}"' in (found[0] / "llama_cpp" / "__init__.py").read_text()
    return found[0]


@pytest.fixture(scope="module")
def models(source, bundled_gguf, tmp_path_factory) -> Path:
    """A JSON file that names the stand-ins."""
    base = tmp_path_factory.mktemp("upstream")
    written = upstream_models.write(base, source / "vendor" / "llama.cpp" / "models")
    (base / "lab.gguf").symlink_to(bundled_gguf)
    (base / "models.json").write_text(
        json.dumps({name: str(path) for name, path in {**written, "stories15M-q4_0.gguf": base / "lab.gguf"}.items()})
    )
    return base / "models.json"


@pytest.fixture
def run(source, models, tmp_path):
    """Runs them all in a process of its own; returns the outcomes by the tests' names."""

    def run(mode: str) -> dict[str, dict]:
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
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
        assert len(outcomes) == 26 and all(outcome["outcome"] in ("passed", "failed") for outcome in outcomes.values())
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
    assert len(pruned) == 20 and {name for name in pruned if not pruned[name]} == NOT_PRUNED


def test_all_pass_with_the_unpatched_llama(run):
    """The stand-ins do not only suit PopLlama."""
    if not (STOCK / "llama_cpp" / "lib").is_dir():
        pytest.skip("the unpatched llama-cpp-python is not built: run `make test`")
    assert failed(run("stock")) == {}


def test_a_class_that_loads_no_states_is_found_out(run):
    """They can fail."""
    loading = [
        f"test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_{kind}"
        for kind in ("transformer", "recurrent", "hybrid")
    ]
    assert sorted(name.split("_model_path")[0] for name in failed(run("forgetful"))) == sorted(
        [*loading, "test_real_llama"]
    )
