"""Checks that ``pop-gguf bench`` can measure what was asked for, and describes the conditions of the measurement."""

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
from pypop_gguf.boundary_rules import check_support, default_boundary, own_boundary
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import parse_metadata
from pypop_gguf.rpc import reachable_servers
from pypop_gguf.terminal import available_cores, check_ranges

_LEAST_ROUNDS = 3  # of --advise: fewer tell nothing about how far rounds are apart
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


@dataclass(frozen=True)
class Plan:
    """The arguments of ``pop-gguf bench`` after they were checked."""

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
    cache_type: str
    stock: Path | None
    repeat: bool
    mixed: bool
    rpc: list[list[str]]

    @property
    def baseline(self) -> str:
        return "stock" if self.stock else "off"

    @property
    def control_runs(self) -> int:
        """Rounds of two baseline processes: 0 beside a single round, which tells nothing of the spread."""
        return self.runs if self.runs > 1 else 0

    @property
    def before_runs(self) -> int:
        """Rounds with POP off before the first pruned pass."""
        return (self.control_runs + 1) // 2

    def measures_mixed(self, n_parallel: int) -> bool:
        return self.mixed and n_parallel > 1

    def n_steps(self, n_parallel: int, n_prompt: int) -> int:
        """Returns the steps of the mixed case, in each of which a writing sequence writes one token."""
        writers = n_parallel // 2
        return -(-(n_parallel - writers) * n_prompt // (self.ubatch - writers))

    def micro_batches(self, n_parallel: int, n_tokens: int, boundary: int, n_outputs: int) -> Iterator[dict[str, int]]:
        """Yields the arguments of ``graph_flops`` for each micro-batch that llama.cpp makes of ``n_tokens`` a sequence.

        Only the last micro-batch has outputs.
        """
        step = self.ubatch // n_parallel
        for start in range(0, n_tokens, step):
            size = min(step, n_tokens - start)
            yield {
                "boundary": boundary,
                "n_tokens": size * n_parallel,
                "n_seqs": n_parallel,
                "n_outputs": n_outputs if start + size == n_tokens else 0,
            }


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Checks the arguments.

    Raises:
        PopError: They do not fit the model.
    """
    if arguments.model is None:
        raise PopError("give a GGUF file to measure, or --from-csv FILE")
    reader = read_header(arguments.model)
    metadata = parse_metadata(reader, arguments.model)
    support = library.describe_model(arguments.model)
    n_layer = support.n_layer
    check_support(arguments.model, support)
    if arguments.advise:
        boundaries = [own_boundary(support, metadata) or n_layer]
    else:
        boundaries = arguments.boundary or [default_boundary(support, metadata)]
    context = reader.get_field(f"{support.architecture}.context_length")

    longest = int(context.contents()) if context else None
    check_ranges(arguments, boundary=(1, n_layer), decode=1, ubatch=1, threads=1)
    check_ranges(
        arguments,
        prompt=(2, longest and longest - arguments.decode),
        runs=_LEAST_ROUNDS if arguments.advise else 1,
        parallel=(1, min(_MAX_SEQUENCES, arguments.ubatch)),
    )
    if arguments.cache_type != "F16" and arguments.flash_attn == "off":
        raise PopError(f"--cache-type {arguments.cache_type} needs flash attention: remove --flash-attn off")
    if arguments.stock and not (arguments.stock / "llama_cpp" / "__init__.py").is_file():
        raise PopError(f"--stock {arguments.stock}: no llama_cpp package in it; give a directory that has one")
    return Plan(
        model=arguments.model,
        n_layer=n_layer,
        boundaries=boundaries,
        prompts=arguments.prompt,
        parallels=arguments.parallel,
        n_decode=arguments.decode,
        runs=arguments.runs,
        threads=arguments.threads or available_cores(),
        ubatch=arguments.ubatch,
        flash_attn=arguments.flash_attn,
        cache_type=arguments.cache_type,
        stock=arguments.stock,
        repeat=arguments.repeat,
        mixed=arguments.mixed,
        rpc=_list_servers(arguments.rpc or []),
    )


def _list_servers(lists: list[str]) -> list[list[str]]:
    """Returns the RPC servers of each of the two processes, or two empty lists."""
    if lists and len(lists) != 2:
        raise PopError("two processes hold the model, and a server serves one: give --rpc twice, with other servers")
    servers = [server for text in lists for server in reachable_servers(text)]
    if len(set(servers)) < len(servers):
        raise PopError("--rpc names a server in both lists: a server serves one process, so give each once")
    return [text.split(",") for text in lists] or [[], []]


def describe_setting(plan: Plan, baseline_info: dict) -> Setting:
    """Returns the conditions. ``baseline_info`` is what the baseline's worker has answered to ``load``."""
    versions = [f"pypop-gguf {__version__}{_describe_commit()}"]
    if plan.stock:
        versions.append(f"stock llama-cpp-python {baseline_info['version']}")
    if any(plan.rpc):
        versions.append(f"split over {len(plan.rpc[0])} RPC servers")
    if plan.cache_type != "F16":
        versions.append(f"cache in {plan.cache_type}")
    if kernels := os.environ.get("POP_KERNELS"):
        versions.append(f"POP_KERNELS={kernels}")
    return Setting(
        machine=", ".join([_name_cpu(), f"{available_cores()} cores", *baseline_info["devices"]]),
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


def _name_cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _describe_commit() -> str:
    """Returns the commit of the source tree that this runs from; an empty text for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return f" ({subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()})"
    return ""
