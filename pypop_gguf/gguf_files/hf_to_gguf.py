"""Runs llama.cpp's own converter on a Hugging Face directory. ``pop-gguf convert`` calls it.

The converter is a process of its own, because it brings its own version of the gguf package. It runs no Python code
that comes with a model, unless the user trusts it (no_remote_code.py).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from pypop_gguf.errors import PopError
from pypop_gguf.library import vendor_dir
from pypop_gguf.terminal import progress

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PERCENT = re.compile(r"Writing: *(\d+)%")  # the converter's progress bar
_NO_SPACE = re.compile(r"OSError: (\d+ requested and \d+ written|\[Errno \d+\] (No space|File too large|Disk quota))")
_NO_REMOTE_CODE = Path(__file__).with_name("no_remote_code.py")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


def model_directory(model: str, trust_remote_code: bool = False) -> Path:
    """Returns the local directory of a Hugging Face model, which is downloaded first if ``model`` is a hub id.

    Args:
        model: Directory or hub id.
        trust_remote_code: Whether to download its Python files too.

    Raises:
        PopError: The model is neither here nor on the hub, or it has no configuration or no safetensors weights.
    """
    directory = Path(model)
    if not directory.exists():
        if not _HUB_ID.fullmatch(model):
            raise PopError(
                f"{model}: no such file or directory; give a Hugging Face directory, a hub id or a GGUF file"
            )
        directory = _download(model, [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES)
    if not (directory / "config.json").is_file():
        raise PopError(f"{directory}: no config.json there; give the directory of a Hugging Face model")
    if not any(directory.glob("model*.safetensors*")):  # Otherwise the converter would take other files.
        raise PopError(f"{directory}: no *.safetensors weights there; other formats may hold code and are not loaded")
    return directory


def _download(hub_id: str, files: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_id, allow_patterns=files))
    except ImportError as error:
        raise PopError(
            f"a hub id needs huggingface_hub ({error}): pip install '.[convert]' in the source tree"
        ) from error
    except Exception as error:  # The hub raises whatever its HTTP library raises.
        reason = f"no such directory here, and the hub gave none ({type(error).__name__})"
        raise PopError(f"{hub_id}: {reason}; check name and connection") from error


def convert(
    directory: Path, target: Path, *, outtype: str, options: list[str], verbose: bool, trust_remote_code: bool = False
) -> None:
    """Writes a GGUF with llama.cpp's converter, and shows its progress on stderr.

    Args:
        directory: Hugging Face model.
        target: GGUF to write; it may be left half-written if the converter fails.
        outtype: f32, f16, bf16, q8_0 or auto.
        options: Further options of the converter.
        verbose: Whether to show all that the converter logs, instead of a progress bar.
        trust_remote_code: Whether it may run Python code that comes with the model.

    Raises:
        PopError: There is no space, or the converter has failed; the message has its last line.
    """
    script = vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    python = [sys.executable] if trust_remote_code else [sys.executable, str(_NO_REMOTE_CODE)]
    escaped = target.with_name(target.name.replace("{", "{{").replace("}", "}}"))  # The converter formats the name.
    command = [*python, str(script), str(directory), "--outtype", outtype, "--outfile", str(escaped), *options]
    last = ""
    with contextlib.ExitStack() as stack:
        bar = None if verbose else stack.enter_context(progress(total=100, description="converting", in_log=False))
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace"))
        assert process.stderr is not None
        try:
            for line in process.stderr:  # In text mode, the \r of a progress bar ends a line too.
                if verbose:
                    print(line.rstrip(), file=sys.stderr, flush=True)
                if not line.startswith("Writing:"):
                    last = line.strip() or last
                elif bar is not None and (percent := _PERCENT.match(line)):
                    bar.update_to(int(percent[1]), 100)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 and _NO_SPACE.search(last):
        raise PopError(f"cannot write {target}: the disk is full, or allows no file of this size")
    if process.returncode != 0:
        reason = last.removeprefix("ERROR:hf-to-gguf:")
        raise PopError(f"{directory}: llama.cpp's converter cannot convert this: {reason}")
