"""Runs llama.cpp's own converter on a Hugging Face directory. Called by ``convert``.

The converter is a process of its own: it brings its own version of the gguf package, and is kept from running code that comes
with a model, which it would ask Transformers for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pypop_gguf.errors import PopError
from pypop_gguf.library import vendor_dir

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BAR = re.compile(r"Writing:[^\]]*\]")  # the converter's progress; an error starts on the same line, right behind it
_NO_SPACE = re.compile(r"OSError: (\d+ requested and \d+ written|\[Errno \d+\] (No space|File too large|Disk quota))")
# Every class that a model brings goes through these two; the others import them by name, so they are replaced first.
_WITHOUT_REMOTE_CODE = """
import os, runpy, sys
from transformers import dynamic_module_utils
resolve = dynamic_module_utils.resolve_trust_remote_code
def refuse(*_, **__):
    raise ValueError("the model brings Python code of its own, which is not run: give --trust-remote-code where you trust it")
def resolved(trust_remote_code, model_name, has_local_code, has_remote_code, *args, **kwargs):
    return False if has_local_code or not has_remote_code else refuse()
dynamic_module_utils.resolve_trust_remote_code, dynamic_module_utils.get_class_in_module = resolved, refuse
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


def model_directory(model: str, trust_remote_code: bool = False) -> Path:
    """The local directory of a Hugging Face model, downloaded first where ``model`` is a hub id.

    Args:
        model: Directory or hub id.
        trust_remote_code: Download its Python files too.

    Raises:
        PopError: Neither here nor on the hub, or without configuration or safetensors weights.
    """
    directory = Path(model)
    if not directory.exists():
        if not _HUB_ID.fullmatch(model):
            raise PopError(f"{model}: no such file or directory")
        directory = _download(model, [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES)
    if not (directory / "config.json").is_file():
        raise PopError(f"{directory}: no config.json there: not a Hugging Face model directory")
    if not any(directory.glob("model*.safetensors*")):  # else the converter takes what it finds instead
        raise PopError(f"{directory}: no *.safetensors weights there; other formats may hold code and are not loaded")
    return directory


def _download(hub_id: str, files: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, allow_patterns=files))
    except ImportError as error:
        raise PopError(f"a hub id needs huggingface_hub ({error}): pip install 'pypop-gguf[convert]'") from error
    except Exception as error:  # the hub raises whatever its HTTP library raises
        reason = f"no such directory here, and the hub gave none ({type(error).__name__})"
        raise PopError(f"{hub_id}: {reason}; check name and connection") from error


def convert(
    directory: Path, target: Path, outtype: str, options: list[str], verbose: bool, trust_remote_code: bool = False
) -> None:
    """Writes a GGUF with llama.cpp's converter, its progress on stderr.

    Args:
        directory: Hugging Face model.
        target: GGUF to write; may be left half-written on failure.
        outtype: f32, f16, bf16, q8_0 or auto.
        options: Further options of the converter.
        verbose: Show all that the converter logs instead of its progress bar only.
        trust_remote_code: Let it run Python code that comes with the model.

    Raises:
        PopError: No space, or with the converter's own last line.
    """
    script = vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    python = [sys.executable] if trust_remote_code else [sys.executable, "-c", _WITHOUT_REMOTE_CODE]
    command = [*python, str(script), str(directory), "--outtype", outtype, "--outfile", str(target), *options]
    last, bar = "", None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            for line in process.stderr:  # text mode ends a line at \r as well, which progress bars use
                if verbose:
                    print(line.rstrip(), file=sys.stderr, flush=True)
                if not line.startswith("Writing:"):
                    last = line.strip() or last
                elif not verbose and (bar := _BAR.match(line)):
                    print(bar[0], end="\r", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()
            raise
    if bar:
        print(end="\r\033[K" if sys.stderr.isatty() else "\n", file=sys.stderr)
    if process.returncode != 0 and _NO_SPACE.search(last):
        raise PopError(f"cannot write {target}: the disk is full, or allows no file of this size")
    if process.returncode != 0:
        raise PopError(
            f"{directory}: llama.cpp's converter cannot convert this: {last.removeprefix('ERROR:hf-to-gguf:')}"
        )
