"""``--gpu-layers`` of the commands that open a model: how many layers llama.cpp is asked to put on a GPU."""

import io
import types

import llama_cpp
import pytest

from pypop_gguf import cli, library

COMMANDS = ["chat", "eval", "tune", "prepare"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> str:
    """A tiny random model."""
    path = str(tmp_path_factory.mktemp("random") / "tiny.gguf")
    assert cli.main(["random-model", "tiny", path, "--outtype", "q8_0"]) == 0
    return path


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The numbers of layers that llama.cpp was asked to put on a GPU, for each model that was opened."""
    found: list[int] = []
    load = llama_cpp.llama_cpp.llama_model_load_from_file

    def loading(path, parameters):
        found.append(parameters.n_gpu_layers)
        return load(path, parameters)

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_load_from_file", loading)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"3 4 5"), encoding="utf-8", isatty=bool))
    return found


@pytest.fixture
def run(quantized, short_texts, tmp_path):
    """Runs a command on the model, with these options."""

    def run(command: str, *options: str) -> int:
        texts, few = str(short_texts), ["--boundary", "4", "--samples", "2", "--threads", "1"]
        arguments = {
            "chat": [quantized, "--max-tokens", "2", "--context", "64", "--threads", "1"],
            "eval": [quantized, texts, "--no-generate", *few],
            "tune": [quantized, "--text", texts, "--max-kl", "9", *few],
            "prepare": [quantized, "--text", texts, "--outfile", str(tmp_path / "out.gguf"), *few],
        }[command]
        return cli.main([command, *arguments, *options])

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_llama_cpp_is_asked_for_these_layers(command, run, asked):
    assert run(command, "--gpu-layers", "3") == 0
    assert asked[0] == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_all_layers_are_the_default(command, run, asked):
    assert run(command) == 0
    assert asked[0] == 0x7FFFFFFF  # what llama-cpp-python makes of -1


@pytest.mark.parametrize("number", ["-2", "all", "2147483648"])
def test_no_number_of_layers_is_refused(number, run, capsys):
    with pytest.raises(SystemExit):
        run("chat", "--gpu-layers", number)
    assert f"'{number}' is no number of layers: give 0 or more, or -1 for all" in capsys.readouterr().err


def test_memory_of_a_device_that_is_too_small_is_told_with_advice():
    """The lines are those of CUDA, Vulkan and a CPU."""
    cuda = [
        "ggml_backend_cuda_buffer_type_alloc_buffer: "
        "allocating 4403.49 MiB on device 0: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 4617398272",
    ]
    assert library.load_failure("a.gguf", cuda) == (
        "a.gguf: llama.cpp cannot load this model: allocating 4403.49 MiB on device 0: cudaMalloc failed: out of "
        "memory; put fewer layers on the GPU (--gpu-layers, n_gpu_layers)"
    )
    vulkan = ["alloc_tensor_range: failed to allocate Vulkan0 buffer of size 4617398272"]
    assert "--gpu-layers" in library.load_failure("a.gguf", vulkan)
    assert "--gpu-layers" not in library.load_failure("a.gguf", [vulkan[0].replace("Vulkan0", "CPU")])
