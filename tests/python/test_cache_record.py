"""``CacheRecord`` alone, without a model: which cached positions a prompt may reuse."""

import numpy as np
import pytest

from pypop_gguf.cache_record import CacheRecord

N_LAYER, LOSSLESS = 12, 11


@pytest.fixture
def record() -> CacheRecord:
    """Ten positions: four by boundary 8, four by boundary 6, two by every layer."""
    record = CacheRecord(16, N_LAYER, LOSSLESS)
    record.mark(0, 4, 8)
    record.mark(4, 8, 6)
    record.mark(8, 10, N_LAYER)
    return record


@pytest.mark.parametrize(
    "boundary, usable", [(1, 10), (6, 10), (7, 4), (8, 4), (9, 0), (10, 0), (LOSSLESS, 0), (N_LAYER, 0)]
)
def test_prompt_reuses_what_as_many_layers_have_read(record, boundary, usable):
    assert record.usable(10, boundary) == usable


def test_only_cached_positions_count(record):
    assert record.usable(3, 8) == 3 and record.usable(0, N_LAYER) == 0


def test_positions_that_are_read_again_have_the_new_boundary(record):
    record.mark(4, 8, 9)
    assert record.usable(10, 8) == 10
    record.mark(5, 10, 3)
    assert record.usable(10, 8) == 5


@pytest.mark.parametrize("boundary", [LOSSLESS, N_LAYER])
def test_lossless_boundary_counts_as_the_whole_model(record, boundary):
    record.mark(0, 10, boundary)
    assert record.boundaries[:10].tolist() == [N_LAYER] * 10
    assert record.usable(10, LOSSLESS) == record.usable(10, N_LAYER) == 10


@pytest.mark.parametrize(
    "start, end, expected", [(0, 6, [12, 12, 12, 5, 5, 5]), (0, 2, [12, 12]), (2, 5, [12, 5, 5]), (4, 6, [5, 5])]
)
def test_head_is_read_by_every_layer(start, end, expected):
    record = CacheRecord(16, N_LAYER, LOSSLESS, n_head=3)
    record.boundaries[:] = -1
    record.mark(start, end, 5)
    assert record.boundaries[start:end].tolist() == expected
    assert set(np.delete(record.boundaries, np.s_[start:end])) == {-1}


def test_empty_range_marks_nothing(record):
    before = record.boundaries.copy()
    record.mark(5, 5, 1)
    assert np.array_equal(record.boundaries, before)


def test_forgotten_positions_are_of_no_use_to_any_prompt(record):
    record.forget(2, 4)
    assert record.usable(10, 1) == 2


def test_state_gives_back_the_boundaries_and_stays_as_it_was(record):
    state = record.to_state(10)
    assert state.dtype == np.int32 and state.tolist() == [8] * 4 + [6] * 4 + [N_LAYER] * 2
    record.mark(0, 10, 1)
    other = CacheRecord(32, N_LAYER, LOSSLESS)
    other.from_state(10, state)
    assert [other.usable(10, boundary) for boundary in (6, 8, 9)] == [10, 4, 0]
    other.mark(0, 10, 1)
    assert state.tolist() == [8] * 4 + [6] * 4 + [N_LAYER] * 2


def test_state_without_boundaries_is_the_whole_models(record):
    record.from_state(6, None)
    assert record.usable(6, N_LAYER) == 6 and record.boundaries[6] == 6


def test_boundaries_that_mean_something_else_in_a_state_are_of_no_use(record):
    record.from_state(10, record.to_state(10), unusable={6})
    assert record.usable(10, 1) == 4
