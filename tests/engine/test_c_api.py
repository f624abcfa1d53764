"""The C API's own reading of ``pop.boundary``, for callers that are not Python; ``PopLlama`` checks the file itself."""

import pytest

from pypop_gguf import _library
from tests.support.engine import Engine
from tests.support.gguf_files import STRING, UINT32, write_model

OFF, FROM_FILE = 0, -1
N_LAYER = 6


def set_boundary(engine, boundary: int) -> str | None:
    """None, or why it was refused."""
    context = _library._context(engine.context)
    return None if _library._native.llama_pop_set_boundary(context, boundary) else _library._last_error()


def boundary_of(engine) -> int:
    return _library._native.llama_pop_get_boundary(_library._context(engine.context))


def test_boundary_comes_from_the_file_and_off_turns_it_off(tmp_path):
    path = write_model(tmp_path / "a.gguf", ("pop.version", 1, UINT32), ("pop.boundary", 4, UINT32))
    with Engine(path) as engine:
        assert boundary_of(engine) == N_LAYER  # a context starts with POP off
        assert set_boundary(engine, FROM_FILE) is None and boundary_of(engine) == 4
        assert set_boundary(engine, OFF) is None and boundary_of(engine) == N_LAYER


def test_fewest_tokens_come_from_the_file(tmp_path):
    keys = ("pop.version", 1, UINT32), ("pop.boundary", 4, UINT32)
    for name, more, expected in (("a", [], 0), ("b", [("pop.min_tokens", 24, UINT32)], 24)):
        with Engine(write_model(tmp_path / f"{name}.gguf", *keys, *more)) as engine:
            assert _library._native.llama_pop_min_tokens(_library._model(engine.model)) == expected


def test_file_without_a_boundary_means_off(tmp_path):
    with Engine(write_model(tmp_path / "a.gguf"), boundary=3) as engine:
        assert set_boundary(engine, FROM_FILE) is None and boundary_of(engine) == N_LAYER


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ([("pop.version", 2, UINT32), ("pop.boundary", 4, UINT32)], "update pypop-gguf"),
        ([("pop.version", 1, UINT32), ("pop.boundary", 0, UINT32)], "not an integer from 1 to 6"),
        ([("pop.version", 1, UINT32), ("pop.boundary", 7, UINT32)], "not an integer from 1 to 6"),
        ([("pop.version", 1, UINT32), ("pop.boundary", "four", STRING)], "not an integer from 1 to 6"),
        ([("pop.boundary", 4, UINT32)], "without pop.version"),
        ([("pop.version", 1, UINT32), ("pop.tail", 0, UINT32)], "pop.tail is not an integer from 1"),
    ],
    ids=["newer-version", "zero", "above-the-last", "text", "no-version", "no-tail"],
)
def test_unusable_key_is_refused_and_changes_nothing(tmp_path, keys, advice):
    with Engine(write_model(tmp_path / "a.gguf", *keys), boundary=3) as engine:
        assert advice in set_boundary(engine, FROM_FILE)
        assert boundary_of(engine) == 3
