"""Who uses the tiles of AMX: ggml, or our kernels where they were asked for.

`make amx` compiles ggml and our kernels for x86-64 with AMX and runs these tests, in which the tiles are emulated. With
the same programs, test_kernels.py compares products with exact ones.
"""

import numpy as np
import pytest

from tests.engine.test_kernels import CODE_BOOKS, SMALL_BLOCKS, SUPER_BLOCKS, products, shapes_of, squared_errors
from tests.support import emulation
from tests.support.products import Ggml, with_amx

if not emulation.AMX_PROGRAMS:
    pytest.skip("kernels with AMX are tested by `make amx`", allow_module_level=True)

OF_GGML = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # ggml itself multiplies these with tiles


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, a, b))


@pytest.mark.parametrize("name", (*SMALL_BLOCKS, *SUPER_BLOCKS, *CODE_BOOKS))
def test_tiles_give_the_bits_of_vectors(name):
    asked = products(Ggml(), name, shapes_of(name), n_threads=2)
    tiles, (ours, others) = with_amx(asked, "on")
    assert ours and not others
    vectors, counts = with_amx(asked, None, granted=False)
    assert counts == (0, 0)
    assert same(tiles, vectors)


@pytest.mark.parametrize("name", OF_GGML)
def test_ggml_keeps_its_tiles_unless_ours_are_asked_for(name):
    asked = products(Ggml(), name, ((33, 64, 768),))
    off, counts = with_amx(asked, "off")
    unasked, same_counts = with_amx(asked, None)
    assert counts == same_counts
    assert not counts[0] and counts[1]
    assert same(off, unasked)
    # ggml's kernels were written on processors with AMX, so this is a test of the emulation.
    assert squared_errors(off, asked).max() <= 1e-3
    on, _ = with_amx(asked, "on")
    assert not same(on, off)


@pytest.mark.parametrize("name", ("Q3_K", "IQ4_NL"))
def test_other_types_use_vectors_unless_tiles_are_asked_for(name):
    asked = products(Ggml(), name, ((33, 64, 768),))
    unasked, counts = with_amx(asked, None)
    assert counts == (0, 0)
    on, (ours, _) = with_amx(asked, "on")
    assert ours
    assert same(on, unasked)


def test_vectors_compute_where_linux_refuses_the_tiles():
    asked = products(Ggml(), "Q4_0", ((33, 64, 768),))
    refused, counts = with_amx(asked, "on", granted=False)
    assert counts == (0, 0)
    tiles, _ = with_amx(asked, "on")
    assert same(refused, tiles)
