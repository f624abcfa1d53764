"""Models that the tests share, and two helpers.

The environment variable ``POP_TEST_MODELS`` names a directory where tools/sanitized.py has written the models, for
processes that cannot load torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.paths import BUNDLED, STOCK

WRITTEN = os.environ.get("POP_TEST_MODELS")


@pytest.fixture(scope="session")
def reference_models(tmp_path_factory) -> dict[str, tiny_models.ReferenceModel]:
    """Tiny random models of several architectures, and the bundled trained model, by name."""
    if WRITTEN:
        return {
            path.parent.name: tiny_models.ReferenceModel(path.parent.name, None, path)
            for path in Path(WRITTEN).glob("*/model.gguf")
        }
    import torch
    import transformers

    base = tmp_path_factory.mktemp("reference")
    models = tiny_models.write(base, tiny_models.configs())
    (base / "bundled").mkdir()
    for file in BUNDLED.iterdir():
        (base / "bundled" / file.name).symlink_to(file)
    tiny_models.to_gguf([base / "bundled"])
    bundled = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    return {**models, "bundled": tiny_models.ReferenceModel("bundled", bundled, base / "bundled" / "model.gguf")}


@pytest.fixture(scope="session")
def shared_cache_models(tmp_path_factory) -> dict[str, tiny_models.ReferenceModel]:
    """Tiny Gemma 3n and Gemma 4 by name. Their upper layers read the caches of lower layers."""
    return tiny_models.write(tmp_path_factory.mktemp("shared"), tiny_models.shared_cache_configs())


@pytest.fixture(params=[True, False], ids=["continued", "repeated"])
def continuation(request, monkeypatch) -> bool:
    """Lets the contexts of a test continue from the boundary, or repeat the layers below it, for tokens that run whole.

    No user needs the second way, so ``PopLlama`` has no argument for it. It is set as soon as a context is opened.
    """
    from pypop_gguf import PopLlama, native
    from tests.support.engine import Engine

    def set_after_opening(kind, context: str) -> None:
        opened = kind.__init__

        def open_and_set(self, *arguments, **options):
            opened(self, *arguments, **options)
            native.set_continuation(getattr(self, context), request.param)

        monkeypatch.setattr(kind, "__init__", open_and_set)

    set_after_opening(PopLlama, "ctx")
    set_after_opening(Engine, "context")
    return request.param


@pytest.fixture(scope="session")
def stock():
    """Runs Python code with the unpatched llama-cpp-python, in a process of its own.

    The fixture is a function of the code and its arguments. It returns the JSON value that the code has printed.
    """
    if not (STOCK / "llama_cpp" / "lib").is_dir():
        pytest.skip("the unpatched llama-cpp-python is not built: run `make test`")

    def run(code: str, *arguments: object):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={"PYTHONPATH": str(STOCK), "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def bundled_gguf(tmp_path_factory) -> Path:
    """The bundled model as F16 without ``pop.*`` keys, from llama.cpp's own converter."""
    from pypop_gguf import library

    path = tmp_path_factory.mktemp("bundled") / "lab-llama-12l-f16.gguf"
    if WRITTEN:
        return Path(shutil.copy(Path(WRITTEN, "bundled.gguf"), path))
    script = library.vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    done = subprocess.run(
        [sys.executable, script, BUNDLED, "--outtype", "f16", "--outfile", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def served_gguf(tmp_path_factory) -> Path:
    """The bundled model as F32 that skips the upper 4 of its 12 layers, for tests of the server."""
    if WRITTEN:
        return Path(WRITTEN, "served.gguf")
    path = tmp_path_factory.mktemp("served") / "lab.gguf"
    tiny_models.write_served(path)
    return path


@pytest.fixture
def kernels_off():
    """Leaves products and attention to llama.cpp's kernels, which round in another order than ours."""
    from tests.support.products import Ggml

    choose = Ggml().function("pop_kernels_choose", "void (*)(const char *)")
    choose(b"off")
    yield
    choose(os.environ.get("POP_KERNELS", "").encode())


@pytest.fixture(scope="session")
def short_texts(tmp_path_factory) -> Path:
    """A file of 30 short stories to fit on: with the bundled prompts a fit would take half a minute."""
    path = tmp_path_factory.mktemp("texts") / "stories.jsonl"
    stories = [
        f"Once upon a time, {name} had a red {thing}. One day {name} took the {thing} to the park and met a friend. "
        f"They played with the {thing} until it was dark, and then {name} went home to"
        for name in ("Lily", "Tom", "Max", "Sara", "Ben")
        for thing in ("ball", "kite", "dog", "boat", "cake", "hat")
    ]
    path.write_text("".join(json.dumps({"prompt": story, "response": " sleep."}) + "\n" for story in stories))
    return path
