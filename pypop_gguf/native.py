"""The C API of csrc/llama-pop.h as Python functions, one for each in the header's order. The header says what they do.

The declarations are read from the header that is installed beside the library, so the two cannot differ. A model or a
context is the address that llama-cpp-python has for it. A call that fails raises PopError with llama.cpp's reason.
"""

from __future__ import annotations

import functools
import math
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from pypop_gguf import library, parent
from pypop_gguf.errors import PopError

# Values of a boundary besides 1..L: enum llama_pop_boundary.
OFF, DEFAULT, LOSSLESS = 0, -1, -2

# enum llama_pop_states, by the names that ``set_completion`` takes.
STATES = {"off": -1, "f32": 0, "f16": 1, "bf16": 30}

# enum llama_pop_source, as PopStatus.source names it.
SOURCES = ("off", "argument", "file", "lossless")


@dataclass(frozen=True)
class Choice:
    """The settings that ``open_context`` has chosen for a context.

    Attributes:
        boundary: First layer that prefill skips, 1..L; L where nothing is pruned.
        source: Where it comes from, one of ``SOURCES``.
        n_head: First tokens of a sequence that run every layer.
        n_tail: Last tokens of a prompt that run every layer.
        min_tokens: Prompts with fewer new tokens shall not be pruned.
        has_adapter: Whether an adapter file lay beside the model and is in use.
    """

    boundary: int
    source: str
    n_head: int
    n_tail: int
    min_tokens: int
    has_adapter: bool


def declarations(header: str) -> str:
    """Returns the header without what only a preprocessor or a C++ compiler reads."""
    without_cplusplus = re.sub(r"#ifdef __cplusplus.*?#endif", "", header, flags=re.DOTALL)
    without_preprocessor = re.sub(r"^#.*$", "", without_cplusplus, flags=re.MULTILINE)
    return without_preprocessor.replace("LLAMA_API ", "")


_binding = threading.Lock()


def _bound() -> tuple[FFI, Any]:
    # Two threads that bind at once would get an FFI each, and the types of one are not those of the other.
    with _binding:
        return _bind()


@functools.cache
def _bind() -> tuple[FFI, Any]:
    llama_cpp = library.load()
    ffi = FFI()
    ffi.cdef("typedef int32_t llama_pos; typedef int32_t llama_seq_id;")
    ffi.cdef("struct llama_context; struct llama_model; struct llama_adapter_lora;")
    header = library.vendor_dir() / "llama_cpp" / "lib" / "llama-pop.h"
    ffi.cdef(declarations(header.read_text(encoding="utf-8")))
    return ffi, ffi.dlopen(parent.library_path(parent.native_library(llama_cpp)))


def _context(ctx: int):
    return _bound()[0].cast("struct llama_context *", ctx)


def _model(model: int):
    return _bound()[0].cast("struct llama_model *", model)


def _functions():
    return _bound()[1]


def _check(done: bool) -> None:
    if not done:
        raise PopError(last_error())


def _checked_number(number: int) -> int:
    _check(number >= 0)
    return number


def open_context(
    ctx: int,
    model_path: str | os.PathLike | None,
    *,
    boundary: int = DEFAULT,
    n_head: int = -1,
    n_tail: int = -1,
    min_tokens: int = -1,
) -> Choice:
    """Decides which boundary, ends and adapter a context gets, and sets them: ``llama_pop_open``.

    Args:
        ctx: Context.
        model_path: The model's file, beside which an adapter may lie; None loads no adapter.
        boundary: 1..L, ``DEFAULT`` (the file's, else off or lossless), ``LOSSLESS`` or ``OFF``.
        n_head: First tokens of a sequence that run every layer; -1 takes the file's value, as for the next two.
        n_tail: Last tokens of a prompt that run every layer, 1 to ``n_batch``.
        min_tokens: Prompts with fewer new tokens shall not be pruned.

    Raises:
        PopError: A value is out of range, the file's keys or its adapter are unusable, or the model cannot be pruned
            there. The context keeps what it had.
    """
    ffi, functions = _bound()
    request = ffi.new("struct llama_pop_request *", [boundary, n_head, n_tail, min_tokens])[0]
    path = ffi.NULL if model_path is None else os.fsencode(model_path)
    choice = ffi.new("struct llama_pop_choice *")
    with library.captured_log():  # the error has the reason
        _check(functions.llama_pop_open(_context(ctx), request, path, choice))
    return Choice(
        choice.boundary, SOURCES[choice.source], choice.n_head, choice.n_tail, choice.min_tokens, choice.has_adapter
    )


def adapter_path(model_path: str | os.PathLike, boundary: int) -> Path:
    """Returns the adapter file that belongs to a model file and a boundary."""
    ffi, functions = _bound()
    path = os.fsencode(model_path)
    size = functions.llama_pop_adapter_path(path, boundary, ffi.NULL, 0)
    _check(size >= 0)
    text = ffi.new("char[]", size + 1)
    functions.llama_pop_adapter_path(path, boundary, text, size + 1)
    return Path(os.fsdecode(ffi.string(text)))


def set_boundary(ctx: int, boundary: int) -> None:
    """Sets a context's boundary, 1..L or ``OFF``."""
    _check(_functions().llama_pop_set_boundary(_context(ctx), boundary))


def get_boundary(ctx: int) -> int:
    """Returns the boundary in force, L where nothing is pruned."""
    return _functions().llama_pop_get_boundary(_context(ctx))


def set_ends(ctx: int, *, n_head: int, n_tail: int) -> None:
    """Sets how many first tokens of a sequence and last tokens of a prompt run every layer."""
    _check(_functions().llama_pop_set_ends(_context(ctx), n_head, n_tail))


def set_sequence(ctx: int, seq_id: int, *, prunes: bool) -> None:
    """Sets whether the tokens of one sequence are pruned at all."""
    _check(_functions().llama_pop_set_sequence(_context(ctx), seq_id, prunes))


def set_continuation(ctx: int, continues: bool) -> None:
    """Sets whether tokens that run whole continue from the boundary; if not, a micro-batch of their own runs them."""
    _check(_functions().llama_pop_set_continuation(_context(ctx), continues))


def set_kernels(ctx: int, enabled: bool) -> None:
    """Sets whether a context uses our kernels, where they are faster, or llama.cpp's alone."""
    _check(_functions().llama_pop_set_kernels(_context(ctx), enabled))


def continues(ctx: int) -> bool:
    """Returns whether tokens that run whole continue from the boundary in force."""
    return _functions().llama_pop_continues(_context(ctx))


def adapter_init(model: int, path: str | os.PathLike):
    """Loads an adapter file for a model, which owns the result."""
    adapter = _functions().llama_pop_adapter_init(_model(model), os.fsencode(path))
    _check(adapter != _bound()[0].NULL)
    return adapter


def adapter_boundary(adapter) -> int:
    """Returns the boundary that an adapter was fitted for."""
    return _functions().llama_pop_adapter_boundary(adapter)


def add_adapter(ctx: int, adapter) -> None:
    """Lets pruned tokens of a context use an adapter at its boundary."""
    _check(_functions().llama_pop_add_adapter(_context(ctx), adapter))


def clear_adapters(ctx: int) -> None:
    """Takes all adapters of a context out of use."""
    _check(_functions().llama_pop_clear_adapters(_context(ctx)))


def fingerprint(model: int) -> int:
    """Returns a hash of the model's norm weights. ``library.fingerprint`` does the same for a file."""
    value = _functions().llama_pop_fingerprint(_model(model))
    _check(value != 0)
    return value


def set_completion(ctx: int, states: str) -> None:
    """Lets a context keep the states that pruned tokens are completed from later, as one of ``STATES``."""
    _check(_functions().llama_pop_set_completion(_context(ctx), STATES[states]))


def completes(ctx: int) -> bool:
    """Returns whether completion is on and works at the boundary in force."""
    return _functions().llama_pop_completes(_context(ctx))


def n_incomplete(ctx: int, seq_id: int = 0) -> int:
    """Returns how many tokens of a sequence ``complete`` has left to do."""
    return _checked_number(_functions().llama_pop_n_incomplete(_context(ctx), seq_id))


def n_lost(ctx: int, seq_id: int = 0) -> int:
    """Returns how many tokens of a sequence are not the whole model's and can never be completed."""
    return _checked_number(_functions().llama_pop_n_lost(_context(ctx), seq_id))


def first_incomplete(ctx: int, seq_id: int = 0) -> int:
    """Returns the position of the first token that is not the whole model's, or the one behind the last token."""
    return _checked_number(_functions().llama_pop_first_incomplete(_context(ctx), seq_id))


def complete(ctx: int, n_max: int, seq_id: int = 0) -> int:
    """Completes up to ``n_max`` tokens of a sequence, the lowest positions first; returns how many it has completed."""
    ffi, functions = _bound()
    done = ffi.new("int32_t *")
    _check(functions.llama_pop_complete(_context(ctx), seq_id, n_max, done))
    return done[0]


def complete_with_next(ctx: int, n_max: int, seq_id: int = 0) -> None:
    """Lets the next token that is decoded also complete up to ``n_max`` tokens of its sequence, if that is possible."""
    _check(_functions().llama_pop_complete_with_next(_context(ctx), seq_id, n_max))


def n_completed(ctx: int) -> int:
    """Returns how many tokens were completed since completion was turned on."""
    return _functions().llama_pop_n_completed(_context(ctx))


def stop(ctx: int) -> None:
    """Stops the ``complete`` that is running, or else the next one; any thread may call it."""
    _check(_functions().llama_pop_stop(_context(ctx)))


def set_lost(ctx: int, pos: int, seq_id: int = 0) -> None:
    """Says that the tokens from a position on are not the whole model's and cannot be completed."""
    _check(_functions().llama_pop_set_lost(_context(ctx), seq_id, pos))


def n_layer(model: int) -> int:
    """Returns the number of layers, L."""
    return _functions().llama_pop_n_layer(_model(model))


def lossless_boundary(model: int) -> int:
    """Returns the last layer that writes to the cache."""
    return _functions().llama_pop_lossless_boundary(_model(model))


def refusal(model: int, boundary: int = 1) -> str | None:
    """Returns why the architecture of this model cannot be pruned at a boundary, or None if it can."""
    return None if _functions().llama_pop_supports(_model(model), boundary) else last_error()


def n_pruned(ctx: int) -> int:
    """Returns how many tokens were pruned since the context was made."""
    return _functions().llama_pop_n_pruned(_context(ctx))


def n_pruned_in(ctx: int, seq_id: int) -> int:
    """Returns how many tokens of one sequence were pruned."""
    return _functions().llama_pop_n_pruned_in(_context(ctx), seq_id)


def plan_us(ctx: int) -> int:
    """Returns the microseconds spent on building and planning graphs since the context was made."""
    return _functions().llama_pop_plan_us(_context(ctx))


def graph_flops(ctx: int, *, boundary: int, n_tokens: int, n_seqs: int, n_outputs: int) -> float:
    """Counts the operations of the matrix products and attentions in the real graph of one micro-batch.

    Args:
        ctx: Context; attention counts all its positions, so size ``n_ctx`` to the prompt.
        boundary: 1..L; the graph is pruned there if ``n_outputs`` is 0.
        n_tokens: Tokens of the micro-batch over all sequences, at most ``n_ubatch``.
        n_seqs: Its sequences.
        n_outputs: Tokens that ask for logits; if there is one, the graph is that of the whole model.
    """
    flops = _functions().llama_pop_graph_flops(_context(ctx), boundary, n_tokens, n_seqs, n_outputs)
    _check(not math.isnan(flops))
    return flops


def observer_init(ctx: int, boundary: int):
    """Makes an observer of the products that a pass pruned at a boundary computes straight from the state there."""
    observer = _functions().llama_pop_observer_init(_context(ctx), boundary)
    _check(observer != _bound()[0].NULL)
    return observer


def observer_add(observer, weight: str) -> None:
    """Lets an observer copy the products of one more weight, whatever they serve."""
    _check(_functions().llama_pop_observer_add(observer, weight.encode()))


def observer_free(observer) -> None:
    """Frees an observer that is not attached."""
    _check(_functions().llama_pop_observer_free(observer))


def observe(ctx: int, observer) -> None:
    """Attaches an observer to a context; None detaches it."""
    _check(_functions().llama_pop_observe(_context(ctx), _bound()[0].NULL if observer is None else observer))


def observer_weight(observer, i: int) -> str | None:
    """The name of the i-th weight whose products are observed, None if there are not that many."""
    name = _functions().llama_pop_observer_weight(observer, i)
    return None if name == _bound()[0].NULL else _bound()[0].string(name).decode()


def observer_get(observer, weight: str, with_input: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns copies of what the products of a weight have read and written, F32 [n, n_in] and [n, n_out].

    Args:
        observer: The observer.
        weight: Name of the weight.
        with_input: Whether to copy what they have read. Without, that array has no rows.
    """
    ffi, functions = _bound()
    product = ffi.new("struct llama_pop_product *")
    _check(functions.llama_pop_observer_get(observer, weight.encode(), product))

    def matrix(data, n_rows: int, n_columns: int) -> np.ndarray:
        view = np.frombuffer(ffi.buffer(data, 4 * n_rows * n_columns), dtype=np.float32)
        return view.reshape(n_rows, n_columns).copy()

    n_read = product.n_tokens if with_input else 0
    return matrix(product.input, n_read, product.n_in), matrix(product.output, product.n_tokens, product.n_out)


def observer_clear(observer) -> None:
    """Lets an observer forget what it has copied."""
    _check(_functions().llama_pop_observer_clear(observer))


def last_error() -> str:
    """Returns the reason of the last failure on this thread."""
    ffi, functions = _bound()
    return ffi.string(functions.llama_pop_last_error()).decode("utf-8", "replace")


def load_adapter(ctx: int, model: int, path: str | os.PathLike) -> int:
    """Loads an adapter file and lets a context use it; returns the boundary that it is for."""
    adapter = adapter_init(model, path)
    try:
        add_adapter(ctx, adapter)
    except PopError as error:
        raise PopError(f"{path}: {error}") from error
    return adapter_boundary(adapter)
