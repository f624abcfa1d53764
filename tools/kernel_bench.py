"""Speed of the products of weights, of our kernels and of ggml's own: `python -m tools.kernel_bench`.

A product's speed is in billions of multiplications and additions per second (GMAC/s). With one thread, the time is that
of the processor, so that other programs disturb it less. The share is that of the peak of a core, which
tools/kernel_peak.cpp measures where there is a C++ compiler.

`--model MODEL.gguf` measures whole prompts in the place of single products, and `--peer LLAMA_BENCH` adds another
engine to them (tools/prompt_bench.py).
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tests.support.paths import STOCK
from tests.support.products import Ggml, Product, in_process
from tools import prompt_bench
from tools.reporting import one_line_errors

TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("F16", "BF16"),
)
SHAPES = ("896x768", "2048x2048", "2048x8192", "4096x4096")


def peak() -> float | None:
    """Returns GMAC/s of a core of an x86 processor, or None for others and where no compiler is found."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or platform.machine() not in ("x86_64", "AMD64"):
        return None
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("kernel_peak.cpp")
        subprocess.run([compiler, "-O2", "-march=native", source, "-o", program], check=True)
        return float(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTPUTSxINPUTS")
    parser.add_argument("--rows", nargs="+", type=int, default=(32, 128, 512))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=("off", "on"), help="values of POP_KERNELS")
    parser.add_argument(
        "--model", type=Path, metavar="MODEL.gguf", help="measure prompts of --rows tokens in this model"
    )
    parser.add_argument(
        "--peer",
        metavar="LLAMA_BENCH",
        help="with --model: also measure the engine of this llama-bench; options may follow the path",
    )
    parser.add_argument("--rounds", type=int, default=5, help="with --model: how often each engine reads a prompt")
    arguments = parser.parse_args(argv)

    best = peak()
    peak_of = f", peak of a core {best:.0f} GMAC/s" if best else ""
    print(f"threads: {arguments.threads}{peak_of}")
    if not arguments.model:
        bench_products(arguments, best)
        return 0
    if not (STOCK / "llama_cpp").is_dir():
        print("the unpatched llama-cpp-python is not built: run `make test`", file=sys.stderr)
        return 1
    table = prompt_bench.compare(
        arguments.model,
        arguments.rows,
        peer=arguments.peer,
        n_threads=arguments.threads,
        rounds=arguments.rounds,
        peak=best,
    )
    print(*table, sep="\n")
    return 0


def bench_products(arguments: argparse.Namespace, best: float | None) -> None:
    """Prints the speed of each product, row by row."""
    ggml, chance = Ggml(), np.random.default_rng(0)
    print("type    outputs x inputs  rows  " + "  ".join(f"{setting:>8}" for setting in arguments.settings) + "  share")
    for shape in arguments.shapes:
        outputs, inputs = map(int, shape.split("x"))
        weights = chance.standard_normal((outputs, inputs), dtype=np.float32)
        for name in arguments.types:
            kind = GGMLQuantizationType[name]
            quantized = ggml.quantize(kind, weights)
            products = []
            for rows in arguments.rows:
                repeat = max(5, int(2e10 / (rows * outputs * inputs)))
                values = chance.standard_normal((rows, inputs), dtype=np.float32)
                products.append(Product(int(kind), quantized, values, arguments.threads, repeat))
            timed = [in_process(products, setting) for setting in arguments.settings]
            for i, rows in enumerate(arguments.rows):
                speeds = [rows * outputs * inputs / results[i][1] / 1e9 for results in timed]
                share = f"{speeds[-1] / best / arguments.threads:6.0%}" if best else ""
                print(
                    f"{name:7} {shape:>16}  {rows:4}  " + "  ".join(f"{speed:8.1f}" for speed in speeds) + f" {share}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
