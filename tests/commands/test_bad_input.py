"""Errors of users: one line that says what to do, exit status 1, and nothing new in the target's directory."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf import PopError, PopLlama, cli
from tests.support.gguf_files import write_keys, write_model
from tests.support.paths import BUNDLED

PROGRESS = ("converting ", "quantizing ", "writing ", "Loading weights", "Converting and de-quantizing", "importance: ")


@pytest.fixture
def out(tmp_path) -> Path:
    """The target's directory; it holds one file that has to survive."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "old.gguf").write_bytes(b"what stood here before")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def error_line(stderr: str) -> str:
    """Returns the line of the error. All lines before it are progress."""
    *before, last = stderr.splitlines()
    assert last.startswith("pop-gguf: error: ")
    assert all(line.startswith(PROGRESS) for line in before if line), before
    return last


@pytest.fixture
def refused(out, capfd):
    """Runs ``convert`` onto the old file and returns the line that it fails with."""

    def run(model, *arguments, outfile=out / "old.gguf") -> str:
        before = contents(out)
        capfd.readouterr()
        assert cli.main(["convert", str(model), "--outfile", str(outfile), *map(str, arguments)]) == 1
        output = capfd.readouterr()
        assert output.out == ""
        assert contents(out) == before
        return error_line(output.err)

    return run


def damaged_files(good: Path) -> dict[str, tuple[bytes, str]]:
    raw = good.read_bytes()
    return {
        "empty": (b"", "not a GGUF file"),
        "text": (b"a page about logging in\n" * 9, "not a GGUF file"),
        "magic alone": (raw[:4], "damaged or cut short"),
        "half a header": (raw[:300], "damaged or cut short"),
        "absurd counts": (raw[:8] + struct.pack("<QQ", 2**60, 2**60) + raw[24:], "damaged or cut short"),
        "data cut short": (raw[:-1], "damaged or cut short"),
    }


@pytest.mark.parametrize("kind", ["empty", "text", "magic alone", "half a header", "absurd counts", "data cut short"])
def test_damaged_file_is_told_by_every_reader(tmp_path, refused, capfd, kind):
    raw, reason = damaged_files(write_model(tmp_path / "good.gguf"))[kind]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    line = refused(path)
    assert reason in line and str(path) in line
    assert cli.main(["inspect", str(path)]) == 1
    assert error_line(capfd.readouterr().err) == line
    with pytest.raises(PopError, match=reason):
        PopLlama(str(path), verbose=False)


@pytest.mark.parametrize("name", ["missing.gguf", "missing/model", "../missing"])
def test_missing_model_is_named(refused, tmp_path, name):
    line = refused(tmp_path / name)
    assert "no such file" in line and str(tmp_path / name) in line


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens but cannot be read")
def test_unreadable_file_is_named(refused):
    assert "cannot read /proc/self/mem: " in refused("/proc/self/mem")


@pytest.mark.parametrize("architecture", ["dream", "llada"])
def test_diffusion_model_is_refused(refused, tmp_path, architecture):
    assert "diffusion model" in refused(write_model(tmp_path / "a.gguf", architecture=architecture))


def test_encoder_is_refused(refused, tmp_path):
    assert "(an encoder)" in refused(write_model(tmp_path / "a.gguf", architecture="bert"))


def test_architecture_that_llama_cpp_does_not_know_is_named(refused, tmp_path):
    path = write_keys(tmp_path / "a.gguf", architecture="made-up")
    assert "llama.cpp cannot load this model" in (line := refused(path)) and "'made-up'" in line


def test_missing_tensor_is_named(refused, tmp_path):
    path = write_model(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"))
    assert "blk.3.ffn_up.weight" in refused(path)


def test_missing_shard_is_named(refused, tmp_path):
    write_model(tmp_path / "m", split_max_tensors=30)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    line = refused(tmp_path / "m-00001-of-00002.gguf", "--outtype", "q8_0")
    assert "m-00002-of-00002.gguf" in line


def test_quantized_file_is_not_quantized_again(refused, tmp_path):
    path = tmp_path / "q8_0.gguf"
    assert (
        cli.main(["convert", str(write_model(tmp_path / "a.gguf")), "--outtype", "q8_0", "--outfile", str(path)]) == 0
    )
    assert "cannot quantize this to q4_0" in refused(path, "--outtype", "q4_0")


ARGUMENTS = {
    ("--boundary", "0"): 'give a layer, from 1 to the model\'s last, or "lossless"',
    ("--boundary", "7"): 'give 1 to 6 or "lossless"',
    ("--boundary", "x"): 'give a layer, from 1 to the model\'s last, or "lossless"',
    ("--prune-ratio", "-0.1"): "give at least 0 and less than 1",
    ("--prune-ratio", "1"): "give at least 0 and less than 1",
    ("--max-importance-loss", "2"): "give 0 to 1",
    ("--no-importance", "--max-importance-loss", "0.1"): "drop one of them",
    ("--no-importance", "--calibration", __file__): "drop one of them",
    ("--calibration", "missing.txt"): "missing.txt: no such file; give a file of calibration texts",
    ("--importance", "--calibration-samples", "0"): "--calibration-samples 0 is out of range: give at least 1",
    ("--importance", "--calibration-tokens", "7"): "--calibration-tokens 7 is out of range: give at least 8",
    ("--importance", "--seed", "-1"): "--seed -1 is out of range: give 0 to 4294967295",
    ("--importance", "--seed", "4294967296"): "--seed 4294967296 is out of range",
    ("--outtype", "f16"): "a GGUF keeps its tensors",
    ("--mmproj",): "--mmproj and --model-name a Hugging Face model",
}


@pytest.mark.parametrize(("arguments", "advice"), ARGUMENTS.items(), ids=map(" ".join, ARGUMENTS))
def test_bad_argument_is_told_before_the_work_starts(refused, tmp_path, arguments, advice):
    assert advice in refused(write_model(tmp_path / "a.gguf"), *arguments)


@pytest.mark.parametrize(
    "arguments", [["--boundary", "3", "--prune-ratio", "0.5"], ["--outtype", "q9"], ["--bondary", "3"]]
)
def test_wrong_usage_exits_with_2(tmp_path, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(write_model(tmp_path / "a.gguf")), *arguments])
    assert caught.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("text", ["", "short"], ids=["empty", "too short"])
def test_calibration_file_without_text_is_refused(refused, bundled_gguf, tmp_path, text):
    (tmp_path / "texts.txt").write_text(text)
    assert "has no usable text" in refused(bundled_gguf, "--calibration", tmp_path / "texts.txt")


def test_target_directory_has_to_exist(refused, tmp_path, out):
    source = write_model(tmp_path / "a.gguf")
    for directory in (out / "missing", out / "old.gguf"):
        assert f"{directory}: no such directory; make it first" in refused(source, outfile=directory / "a.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory that root cannot write to")
def test_target_directory_has_to_be_writable(refused, tmp_path):
    assert "cannot write to /proc" in refused(write_model(tmp_path / "a.gguf"), outfile="/proc/a.gguf")


# A Hugging Face model


@pytest.fixture
def hf_model(tmp_path) -> Path:
    return Path(shutil.copytree(BUNDLED, tmp_path / "model"))


def test_directory_without_config_or_weights_is_refused(refused, hf_model):
    (hf_model / "model.safetensors").rename(hf_model / "pytorch_model.bin")
    assert "no *.safetensors weights there" in refused(hf_model)
    (hf_model / "config.json").unlink()
    assert "no config.json there; give the directory of a Hugging Face model" in refused(hf_model)


def test_architecture_that_the_converter_does_not_know_is_named(refused, hf_model):
    config = json.loads((hf_model / "config.json").read_text())
    (hf_model / "config.json").write_text(json.dumps({**config, "architectures": ["MadeUpForCausalLM"]}))
    assert "Model MadeUpForCausalLM is not supported" in refused(hf_model)


def test_weights_cut_short_are_refused(refused, hf_model):
    weights = hf_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1_000_000])
    line = refused(hf_model)
    assert "llama.cpp's converter cannot convert this: " in line and "Writing:" not in line


def test_encoder_from_hugging_face_is_refused(refused, tmp_path):
    sentencepiece, transformers = (pytest.importorskip(name) for name in ("sentencepiece", "transformers"))
    config = transformers.XLMRobertaConfig(
        vocab_size=602,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path / "encoder")
    sentencepiece.SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(tmp_path / "encoder" / "sentencepiece.bpe"),
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    assert "(an encoder)" in refused(tmp_path / "encoder")


def test_projector_of_a_text_model_is_refused_and_nothing_written(refused):
    line = refused(BUNDLED, "--mmproj", "--no-importance")
    assert "this model has no projector: leave out --mmproj" in line and "LlamaForCausalLM is not supported" in line


# These tests need a process of their own.

LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # The shell may have started the tests with Ctrl-C ignored.
size = int(sys.argv.pop(1))
if size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_module("pypop_gguf", run_name="__main__")
"""
posix_only = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")


def test_hub_id_is_refused_offline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pypop_gguf", "convert", "nobody/no-such-model", "--outfile", tmp_path / "a.gguf"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "nobody/no-such-model: no such directory here, and the hub gave none" in error_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


@posix_only
@pytest.mark.parametrize(
    ("source", "arguments", "limit"),
    [("gguf", [], 5_000_000), ("gguf", ["--outtype", "q8_0"], 3_000_000), ("hf", ["--no-importance"], 5_000_000)],
    ids=["copy", "quantizer", "converter"],
)
def test_full_disk_leaves_the_old_file_alone(bundled_gguf, out, source, arguments, limit):
    model = bundled_gguf if source == "gguf" else BUNDLED
    before = contents(out)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), "convert", model, "--outfile", out / "old.gguf", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "cannot write " in error_line(done.stderr)
    assert contents(out) == before


@posix_only
@pytest.mark.parametrize(
    ("source", "sign"),
    [("hf", b"with llama.cpp's converter"), ("gguf", b"| 1/")],
    ids=["converter", "importance"],
)
def test_ctrl_c_leaves_nothing_behind(bundled_gguf, out, source, sign):
    import fcntl
    import termios

    model = bundled_gguf if source == "gguf" else BUNDLED
    before = contents(out)
    command = [sys.executable, "-c", LIMITED, "0", "convert", model, "--importance", "--outfile", out / "old.gguf"]
    terminal, stderr = os.openpty()  # Only a terminal gets the progress of each sample.
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with subprocess.Popen(command, stderr=stderr, start_new_session=True) as process:
        os.close(stderr)
        seen, interrupted = b"", False
        with contextlib.suppress(OSError):  # Linux reports it as an error when the other end is closed.
            while piece := os.read(terminal, 1024):
                seen += piece
                if sign in seen and not interrupted:
                    os.killpg(process.pid, signal.SIGINT)  # A terminal sends it to all processes too.
                    interrupted = True
    os.close(terminal)
    assert interrupted and process.returncode == 130
    assert seen.endswith(b"\r\033[Kpop-gguf: interrupted; no file was left half-written\r\n")
    assert b"Traceback" not in seen
    assert contents(out) == before


# The address of the server


def test_port_in_use_is_told_in_one_line_before_the_model_is_loaded(bundled_gguf, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(bundled_gguf), "--port", str(port)]) == 1
    said = capfd.readouterr().err
    assert said == f"pop-gguf: error: port {port} is in use by another program: give another --port\n"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_host_that_is_not_this_machine_is_told_in_one_line(bundled_gguf, capfd, host):
    assert cli.main(["serve", str(bundled_gguf), "--host", host, "--port", "0", "--api-key-file", "/dev/null"]) == 1
    assert f"--host {host} is no address of this machine: give one" in capfd.readouterr().err.splitlines()[-1]
