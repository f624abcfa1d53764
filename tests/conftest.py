"""Models and helpers shared by the tests: tiny random ones of several architectures, and the bundled trained one."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # the helper modules beside this file

BUNDLED = ROOT / "models" / "lab-llama-12l"
STOCK = ROOT / "build" / "stock" / "package"


@dataclass
class ReferenceModel:
    """A model twice: in transformers and as an F32 GGUF."""

    name: str
    torch_model: object
    gguf: Path

    @property
    def layers(self):
        return self.torch_model.model.layers

    @property
    def n_vocab(self) -> int:
        return self.torch_model.config.vocab_size

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(3, self.n_vocab, count).tolist()


def _tiny_configs():
    import transformers

    common = dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    return {
        "llama": transformers.LlamaConfig(num_hidden_layers=6, **common),
        "qwen3": transformers.Qwen3Config(num_hidden_layers=6, **common),
        # 7 layers: five with a sliding window shorter than the test prompts, one that sees everything, one more
        "gemma3": transformers.Gemma3TextConfig(
            num_hidden_layers=7, sliding_window=16, query_pre_attn_scalar=16, **common
        ),
    }


@pytest.fixture(scope="session")
def reference_models(tmp_path_factory) -> dict[str, ReferenceModel]:
    """llama, qwen3 and gemma3 with random weights, and the bundled model, by name."""
    import torch
    import transformers

    from pypop_gguf import _library

    base = tmp_path_factory.mktemp("reference")
    models = {}
    for name, config in _tiny_configs().items():
        torch.manual_seed(7)
        models[name] = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        models[name].save_pretrained(base / name)
        # gemma's converter counts the entries to tell real rows of the embedding from padding
        vocab = {str(token): token for token in range(config.vocab_size)}
        (base / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    models["bundled"] = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    (base / "bundled").mkdir()
    for file in BUNDLED.iterdir():
        (base / "bundled" / file.name).symlink_to(file)
    script = Path(__file__).parent / "convert_without_vocab.py"
    done = subprocess.run(
        [sys.executable, script, _library.vendor_dir() / "llama.cpp", *(base / name for name in models)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: ReferenceModel(name, model, base / name / "model.gguf") for name, model in models.items()}


@pytest.fixture(scope="session")
def stock():
    """Runs a piece of Python with the unpatched llama-cpp-python in a process of its own; returns what it prints as JSON."""
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
    """The bundled model with its tokenizer as F16, by llama.cpp's own converter: no ``pop.*`` keys."""
    from pypop_gguf import _library

    path = tmp_path_factory.mktemp("bundled") / "lab-llama-12l-f16.gguf"
    script = _library.vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    done = subprocess.run(
        [sys.executable, script, BUNDLED, "--outtype", "f16", "--outfile", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path
