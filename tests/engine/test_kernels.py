"""The kernels of csrc/pop-kernels.cpp, which compute products of weights with several rows.

They are compared with the exact product of the dequantized weights, and with ggml's own kernels, which a process with
POP_KERNELS=off runs. With fewer rows, ggml's kernels run in any case. `make arm` runs these tests for Arm, in qemu,
`make windows` for Windows, in wine, and `make amx` for x86 with emulated tiles of AMX.
"""

import platform
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pypop_gguf import library
from tests.support import emulation
from tests.support.products import Ggml, Product, in_emulator, in_process, with_amx
from tests.support.report import report

MIN_ROWS = 9  # Fewer stay with ggml where nobody has measured them.
MIN_ROWS_AVX512 = {"F16": 9, "BF16": 9, "IQ1_M": 9, "Q8_0": 6}  # of all other types 2
MIN_ROWS_AVX_VNNI = {**MIN_ROWS_AVX512, "IQ1_M": 8}
MIN_ROWS_AVX_VNNI |= dict.fromkeys(("Q5_0", "Q2_K", "Q6_K", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"), 3)
MIN_ROWS_AVX2 = {**MIN_ROWS_AVX_VNNI, "Q8_0": 8}
SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4")
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
CODE_BOOKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
FLOATS = ("F16", "BF16")
TYPES = (*SMALL_BLOCKS, *SUPER_BLOCKS, *CODE_BOOKS, *FLOATS)
# Rows, outputs, inputs: full and partial tiles, chunks and groups of rows. ggml rearranges some types of weights where
# the number of outputs is a multiple of 8.
SHAPES = ((9, 100, 512), (31, 17, 256), (33, 64, 768), (70, 15, 512), (70, 40, 256), (13, 1, 512), (600, 24, 256))
# These are for types whose blocks are small enough.
SHORT_SHAPES = ((9, 16, 32), (31, 17, 64), (33, 100, 896), (70, 40, 928), (12, 33, 37), (10, 16, 261))

IS_X86, IS_ARM = platform.machine() in ("x86_64", "AMD64"), platform.machine() in ("aarch64", "arm64")
AMX = "x86-64 with AMX"
# `make arm` and `make windows` compute the products in each of their emulators, and `make amx` with emulated tiles.
EMULATORS = tuple(emulation.EMULATORS) or ((AMX,) if emulation.AMX_PROGRAMS else (None,))

pytestmark = pytest.mark.skipif(not (IS_X86 or IS_ARM), reason="the kernels are for x86 and Arm")


@dataclass(frozen=True)
class Machine:
    """A computer that multiplies matrices: this one, or, where an emulator is named, the one that it imitates."""

    emulator: str | None

    def compute(self, asked: list[Product], kernels: str | None) -> list[np.ndarray]:
        """Returns the outputs. POP_KERNELS is ``kernels``, or not in the environment."""
        if self.emulator == AMX:
            # Only our kernels get tiles. ggml then computes few rows in the same way as beside ours.
            return with_amx(asked, kernels, granted=kernels == "on")[0]
        if self.emulator:
            return in_emulator(asked, kernels, self.emulator)
        return [output for output, _ in in_process(asked, kernels)]

    @property
    def is_arm(self) -> bool:
        return self.emulator in emulation.ARM or IS_ARM

    @property
    def instructions(self) -> tuple[str, ...]:
        """Values of POP_KERNELS with which our kernels run."""
        return ("on",) if self.is_arm or self.emulator == AMX else ("on", "avxvnni", "avx2")

    def min_rows(self, name: str) -> int:
        """Returns the least number of rows that our kernels multiply with these weights."""
        if self.is_arm or self.emulator == AMX:
            return MIN_ROWS
        found = library.load().llama_print_system_info()  # in wine, llama.cpp finds the same processor
        if b"AVX512_VNNI = 1" in found:
            return MIN_ROWS_AVX512.get(name, 2)
        if b"AVX512 = 1" in found:
            return MIN_ROWS
        return (MIN_ROWS_AVX_VNNI if b"AVX_VNNI = 1" in found else MIN_ROWS_AVX2).get(name, 2)

    def has_kernel(self, name: str, instructions: str) -> bool:
        """Returns whether our kernels compute products of these weights with these instructions."""
        if self.emulator == AMX:
            return name != "BF16"  # `make amx` builds without AVX512-BF16
        if self.emulator in emulation.ARM:
            return name not in FLOATS and self.emulator != "cortex-a57"
        found = library.load().llama_print_system_info()
        if self.is_arm:
            return name not in FLOATS and b"DOTPROD = 1" in found
        needed = {"F16": b"AVX512_VNNI = 1", "BF16": b"AVX512_BF16 = 1"}.get(name, b"")
        return not needed or (instructions == "on" and needed in found)


@pytest.fixture(params=EMULATORS, scope="module")
def machine(request) -> Machine:
    return Machine(request.param)


def products(ggml: Ggml, name: str, shapes: tuple, n_threads: int = 1) -> list[Product]:
    kind, chance = GGMLQuantizationType[name], np.random.default_rng(5)
    made = []
    for rows, outputs, inputs in shapes:
        weights = ggml.quantize(kind, chance.standard_normal((outputs, inputs)))
        # Rows and blocks of very different sizes tell whether the scales meet the right numbers.
        sizes = np.exp(chance.standard_normal((rows, 1))) * np.repeat(
            np.exp(chance.standard_normal((rows, -(-inputs // 32)))), 32, axis=1
        )
        values = chance.standard_normal((rows, inputs)) * sizes[:, :inputs]
        made.append(Product(int(kind), weights, values.astype(np.float32), n_threads))
    return made


def shapes_of(name: str) -> tuple:
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return tuple(shape for shape in SHAPES + SHORT_SHAPES if shape[-1] % block == 0)


def squared_errors(computed: list[np.ndarray], asked: list[Product]) -> np.ndarray:
    """Returns the squared error of each product over the square of the exact product."""
    errors = []
    for output, product in zip(computed, asked, strict=True):
        weights = dequantize(product.weights, GGMLQuantizationType(product.kind)).astype(np.float64)
        exact = product.input.astype(np.float64) @ weights.T
        errors.append(((output - exact) ** 2).sum() / (exact**2).sum())
    return np.array(errors)


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.mark.parametrize("name", TYPES)
def test_as_exact_as_ggml(machine, ggml, name):
    asked = products(ggml, name, shapes_of(name))
    stock = machine.compute(asked, "off")
    stock_errors = squared_errors(stock, asked)
    for instructions in machine.instructions:
        computed = machine.compute(asked, instructions)
        errors = squared_errors(computed, asked)
        # Rounding differs, so a small product may be a little off either way. All together may not.
        assert errors.mean() <= 1.01 * stock_errors.mean(), instructions
        assert (errors <= 1.3 * stock_errors).all(), instructions
        # In qemu 7.2, ggml's own product of an odd number of blocks of Q5_0 is wrong where GCC 12 has used SVE2.
        assert errors.max() <= 1e-3, instructions
        same = all(map(np.array_equal, computed, stock))
        assert same != machine.has_kernel(name, instructions), instructions
        if not same:
            report(model=name, error=float(errors.max()))


@pytest.mark.parametrize("name", ("Q4_1", "Q6_K"))
def test_kernels_for_arm_wait_to_be_asked_for(machine, ggml, name):
    asked = products(ggml, name, ((31, 17, 256),))
    (unasked,), (off,) = machine.compute(asked, None), machine.compute(asked, "off")
    assert np.array_equal(unasked, off) == machine.is_arm


@pytest.mark.parametrize("name", TYPES)
def test_same_with_any_number_of_threads(machine, ggml, name):
    one, *others = (machine.compute(products(ggml, name, shapes_of(name), n), "on") for n in (1, 2, 2))
    for outputs in others:
        assert all(map(np.array_equal, outputs, one))


@pytest.mark.parametrize("name", TYPES)
def test_few_rows_stay_with_ggml(machine, ggml, name):
    asked = products(ggml, name, tuple((rows, 40, 512) for rows in range(1, machine.min_rows(name))))
    assert all(map(np.array_equal, machine.compute(asked, "on"), machine.compute(asked, "off")))


@pytest.mark.parametrize("name", TYPES)
def test_a_few_more_rows_are_as_exact(machine, ggml, name):
    if machine.min_rows(name) == MIN_ROWS:
        pytest.skip(f"products of {name} with fewer than {MIN_ROWS} rows stay with ggml here")
    asked = products(ggml, name, tuple((rows, 40, 512) for rows in range(machine.min_rows(name), MIN_ROWS)))
    stock, computed = machine.compute(asked, "off"), machine.compute(asked, "on")
    assert not any(map(np.array_equal, computed, stock))
    assert squared_errors(computed, asked).mean() <= 1.1 * squared_errors(stock, asked).mean()


@pytest.mark.parametrize("name", ("Q4_0", "Q4_K"))
def test_input_of_more_dimensions(machine, ggml, name):
    (flat,) = products(ggml, name, ((3 * 2 * 7, 40, 512),))
    stacked = Product(flat.kind, flat.weights, flat.input.reshape(3, 2, 7, 512))
    a, b = machine.compute([flat, stacked], "on")
    assert np.array_equal(a, b.reshape(a.shape))


@pytest.mark.parametrize("outputs", (40, 35))  # ggml rearranges the weights of the first
@pytest.mark.parametrize("name", TYPES)
def test_experts(machine, ggml, name, outputs):
    kind, chance, n_experts = GGMLQuantizationType[name], np.random.default_rng(6), 5
    weights = np.stack([ggml.quantize(kind, chance.standard_normal((outputs, 512))) for _ in range(n_experts)])
    values = chance.standard_normal((60, 1, 512)).astype(np.float32)
    experts = np.stack([chance.permutation(4)[:2] for _ in range(60)])  # nobody meets the last one
    one, two = (Product(int(kind), weights, values, n, experts=experts) for n in (1, 2))
    output, again = machine.compute([one, two], "on")
    (stock,) = machine.compute([one], "off")
    exact = np.stack([dequantize(w, kind).astype(np.float64) for w in weights])[experts] @ values[..., None]
    errors = [((x - exact[..., 0]) ** 2).sum() for x in (output, stock)]
    assert errors[0] <= 1.05 * errors[1]
    assert np.array_equal(output, again)
    assert np.array_equal(output, stock) != machine.has_kernel(name, "on")


@pytest.mark.parametrize("name", ("Q4_0", "Q6_K"))
def test_zeros_and_tiny_numbers(machine, ggml, name):
    kind, weights = GGMLQuantizationType[name], np.ones((20, 512))
    values = np.zeros((12, 512), np.float32)
    values[1], values[2], values[3, 0] = 1e-38, 1e-42, 1.0
    (output,) = machine.compute([Product(int(kind), ggml.quantize(kind, weights), values)], "on")
    assert np.isfinite(output).all()
    assert not output[0].any() and not output[4:].any()
    assert np.allclose(output[3], 1.0, rtol=0.1)
