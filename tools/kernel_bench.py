"""Speed of the products of quantized weights, of our kernels and of ggml's own: `python -m tools.kernel_bench`.

A product's speed is in billions of multiplications and additions per second (GMAC/s). With one thread, the time is that
of the processor, so that other programs disturb it less. The share is that of the peak of a core, which
tools/kernel_peak.cpp measures where there is a C++ compiler.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tests.support.products import Ggml, Product, in_process

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
SHAPES = ("896x768", "2048x2048", "2048x8192", "4096x4096")


def peak() -> float | None:
    """Returns GMAC/s of a core, or None where no compiler is found."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("kernel_peak.cpp")
        subprocess.run([compiler, "-O2", "-march=native", source, "-o", program], check=True)
        return float(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTPUTSxINPUTS")
    parser.add_argument("--rows", nargs="+", type=int, default=(32, 128, 512))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=("off", "on"), help="values of POP_KERNELS")
    arguments = parser.parse_args()

    ggml, chance, best = Ggml(), np.random.default_rng(0), peak()
    if best:
        print(f"peak of a core: {best:.0f} GMAC/s")
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
    main()
