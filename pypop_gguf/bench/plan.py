"""What ``pop-gguf bench`` is asked to measure, checked against the model, and the conditions it measures under."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf import __version__, library
from pypop_gguf.bench.runs import Setting
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import metadata_of

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


@dataclass(frozen=True)
class Plan:
    """The checked arguments."""

    model: Path
    n_layer: int
    boundaries: list[int]
    prompts: list[int]
    parallels: list[int]
    n_decode: int
    runs: int
    threads: int
    ubatch: int
    flash_attn: str
    stock: Path | None
    repeat: bool
    mixed: bool

    @property
    def baseline(self) -> str:
        return "stock" if self.stock else "off"

    @property
    def before_runs(self) -> int:
        return (self.runs + 1) // 2

    def measures_mixed(self, n_parallel: int) -> bool:
        return self.mixed and n_parallel > 1

    def n_steps(self, n_parallel: int, n_prompt: int) -> int:
        """Steps of the mixed case: tokens that a writing sequence writes meanwhile."""
        writers = n_parallel // 2
        return -(-(n_parallel - writers) * n_prompt // (self.ubatch - writers))

    def micro_batches(
        self, n_parallel: int, n_tokens: int, boundary: int, n_outputs: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """How llama.cpp splits ``n_tokens`` of each sequence: (n_tokens, n_seqs, boundary, n_outputs); only the last has outputs."""
        step = self.ubatch // n_parallel
        for start in range(0, n_tokens, step):
            size = min(step, n_tokens - start)
            yield size * n_parallel, n_parallel, boundary, n_outputs if start + size == n_tokens else 0


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The checked arguments.

    Raises:
        PopError: They do not fit the model.
    """
    if arguments.model is None:
        raise PopError("give a GGUF file to measure, or --from-csv FILE")
    reader = read_header(arguments.model)
    metadata = metadata_of(reader, arguments.model)
    support = library.describe_model(arguments.model)
    n_layer = support.n_layer
    if support.refusal:
        raise PopError(f"{arguments.model} ({support.architecture}): {support.refusal}")
    of_file = metadata.boundary if metadata else None
    boundaries = arguments.boundary or [n_layer - n_layer // 3 if of_file is None else of_file]
    context = reader.get_field(f"{support.architecture}.context_length")

    _check_range("--boundary", boundaries, 1, n_layer)
    longest = int(context.contents()) if context else None
    _check_range("--decode", [arguments.decode], 1, None)
    _check_range("--prompt", arguments.prompt, 2, longest and longest - arguments.decode)
    _check_range("--runs", [arguments.runs], 1, None)
    _check_range("--ubatch", [arguments.ubatch], 1, None)
    _check_range("--parallel", arguments.parallel, 1, min(_MAX_SEQUENCES, arguments.ubatch))
    threads = cores() if arguments.threads is None else arguments.threads
    _check_range("--threads", [threads], 1, None)
    if arguments.stock and not (arguments.stock / "llama_cpp" / "__init__.py").is_file():
        raise PopError(f"--stock {arguments.stock}: no llama_cpp package in it")
    return Plan(
        arguments.model,
        n_layer,
        boundaries,
        arguments.prompt,
        arguments.parallel,
        arguments.decode,
        arguments.runs,
        threads,
        arguments.ubatch,
        arguments.flash_attn,
        arguments.stock,
        arguments.repeat,
        arguments.mixed,
    )


def _check_range(option: str, values: list[int], low: int, high: int | None) -> None:
    for value in values:
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise PopError(f"{option} {value} is out of range for this model and these settings: give {allowed}")


def setting_of(plan: Plan, baseline_info: dict) -> Setting:
    """The conditions; ``baseline_info`` is the baseline worker's answer to ``load``."""
    versions = [f"pypop-gguf {__version__}{_commit()}"]
    if plan.stock:
        versions.append(f"stock llama-cpp-python {baseline_info['version']}")
    return Setting(
        machine=", ".join([_cpu(), f"{cores()} cores", *baseline_info["devices"]]),
        model=plan.model.stem,
        file_type=baseline_info["model"],
        n_layer=plan.n_layer,
        threads=plan.threads,
        ubatch=plan.ubatch,
        flash_attn=plan.flash_attn,
        n_decode=plan.n_decode,
        version=", ".join(versions),
        baseline=plan.baseline,
    )


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source tree this runs from; nothing for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return f" ({subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()})"
    return ""
