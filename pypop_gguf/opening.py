"""What the ``pop_*`` arguments of ``PopLlama`` mean for the model it has opened: its boundary, ends and adapters."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pypop_gguf import _library
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.status import PopStatus

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = _library.load()

_INT32_MAX = 2**31 - 1  # numbers of tokens and layers are of this type in the native library
_PARAMETERS_OF_PARENT = frozenset(
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
)
# The parent drops any name that it does not know. Its own server and LangChain still pass these, which it once knew.
_PARAMETERS_REMOVED_FROM_PARENT = frozenset(
    {"f16_kv", "low_vram", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps", "rpc_servers"}
)


@dataclass(frozen=True)
class Opened:
    """How a context has been set up.

    Attributes:
        status: What ``PopLlama.pop`` shows.
        lossless: Boundary from which on pruning changes nothing.
        adapters: The adapter files in use, by the boundary that each is for.
    """

    status: PopStatus
    lossless: int
    adapters: dict[int, str]


def check_boundary_type(name: str, boundary: int | str | None) -> None:
    """
    Raises:
        TypeError: The argument of this name is no boundary.
    """
    if isinstance(boundary, bool) or not (boundary is None or boundary == "lossless" or isinstance(boundary, int)):
        raise TypeError(f'{name} must be a layer number, "lossless" or None, not {boundary!r}')


def check_keywords(keywords: Iterable[str]) -> None:
    """
    Raises:
        TypeError: ``llama_cpp.Llama`` takes no argument of one of these names, and has never done so.
    """
    unknown = sorted(set(keywords) - _PARAMETERS_OF_PARENT - _PARAMETERS_REMOVED_FROM_PARENT)
    if unknown:
        raise TypeError(f"PopLlama() got an unexpected keyword argument {unknown[0]!r}")


def open_context(
    llm: llama_cpp.Llama,
    stored: PopMetadata | None,
    *,
    pop: bool,
    pop_boundary: int | str | None,
    pop_head: int | None,
    pop_tail: int | None,
    pop_min_tokens: int | None,
    pop_adapter: str | os.PathLike | Sequence[str | os.PathLike] | bool | None,
    logits_everywhere: bool,
) -> Opened:
    """Decides which boundary, ends and adapters the context of a model gets, and sets them.

    Args:
        llm: The model with its context.
        stored: The ``pop.*`` keys of its file, which count where an argument is None.
        pop: As in ``PopLlama``, like the arguments with the prefix ``pop_``.
        pop_boundary: As in ``PopLlama``.
        pop_head: As in ``PopLlama``.
        pop_tail: As in ``PopLlama``.
        pop_min_tokens: As in ``PopLlama``.
        pop_adapter: As in ``PopLlama``.
        logits_everywhere: Whether every token asks for logits, so that nothing can be pruned.

    Raises:
        PopError: A value is out of range, the model cannot be pruned at the boundary, or an adapter does not fit.
    """
    n_layer = _library.n_layer(llm.model)
    boundary, source = _choose_boundary(llm, pop_boundary, stored) if pop else (n_layer, "off")
    if boundary < n_layer:
        _library.set_boundary(llm.ctx, boundary)
        if logits_everywhere:  # the default of llama-cpp-python's own server
            print(
                "pypop_gguf: logits_all=True asks every token of a prompt for logits, so all "
                f"{n_layer} layers read it; set it to False",
                file=sys.stderr,
            )
    ends = (
        _choose_number("head", pop_head, stored, default=0, low=0, high=_INT32_MAX),
        _choose_number("tail", pop_tail, stored, default=1, low=1, high=llm.n_batch, meaning=" (n_batch)"),
        _choose_number("min_tokens", pop_min_tokens, stored, default=0, low=0, high=_INT32_MAX),
    )
    _library.set_ends(llm.ctx, *ends[:2])
    adapters = _add_adapters(llm, pop_adapter, boundary)
    status = PopStatus(boundary < n_layer, boundary, n_layer, source, *ends, tuple(adapters))
    return Opened(status, _library.lossless_boundary(llm.model), adapters)


def checked_boundary(llm: llama_cpp.Llama, boundary: int | str) -> int:
    """The number of a boundary that the model can be pruned at; its context has it from now on.

    Raises:
        PopError: The model cannot be pruned there.
    """
    if boundary == "lossless":
        return _library.lossless_boundary(llm.model)
    assert isinstance(boundary, int)
    if abs(boundary) > _INT32_MAX:
        raise PopError(f"boundary {boundary} is out of range: choose 1 to {_library.n_layer(llm.model)}")
    if reason := _library.refusal(llm.model, boundary):
        raise PopError(reason)
    _library.set_boundary(llm.ctx, boundary)
    return boundary


def _choose_boundary(llm: llama_cpp.Llama, asked: int | str | None, stored: PopMetadata | None) -> tuple[int, str]:
    """The boundary, L if prompts are not pruned, and ``PopStatus.source``."""
    n_layer, lossless = _library.n_layer(llm.model), _library.lossless_boundary(llm.model)
    boundary, source = n_layer, "off"
    if asked is not None:
        boundary, source = checked_boundary(llm, asked), "argument"
    elif stored is not None and stored.boundary is not None:
        boundary, source = stored.boundary, "file"
    elif _library.refusal(llm.model) is None and lossless < n_layer - 1:
        boundary, source = lossless, "lossless"
    elif _library.refusal(llm.model) is None:
        print(
            f"pypop_gguf: {os.path.basename(llm.model_path)} has no pop.boundary, so prompts are read by all "
            f"{n_layer} layers; `pop-gguf convert` writes one, or pass pop_boundary=",
            file=sys.stderr,
        )
    return boundary, source if boundary < n_layer else "off"


def _choose_number(
    name: str,
    asked: int | None,
    stored: PopMetadata | None,
    *,
    default: int,
    low: int,
    high: int,
    meaning: str = "",
) -> int:
    """The argument's value, else the file's, else the default."""
    value = asked
    if value is None:
        value = getattr(stored, name, None)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PopError(f"pop_{name} is {value!r}: give a whole number, {low} to {high}{meaning}")
    return value


def _add_adapters(llm: llama_cpp.Llama, asked, boundary: int) -> dict[int, str]:
    """Loads the adapters that were asked for, else the one beside the model; returns their files by boundary."""
    single, pruned = isinstance(asked, (str, os.PathLike)), boundary < _library.n_layer(llm.model)
    if asked is None:
        beside = os.path.splitext(llm.model_path)[0] + f".pop-b{boundary}.gguf"
        asked = [beside] if pruned and os.path.isfile(beside) else []
    elif isinstance(asked, bool):
        if asked:
            raise PopError(
                "pop_adapter=True names no file: give a path, or leave it out to take the one beside the model"
            )
        asked = []
    elif single:
        asked = [asked]
    with _library.captured_log():  # a failure is told by the error
        files = {_library.add_adapter(llm.ctx, llm.model, path): os.fspath(path) for path in asked}
    if single and pruned and list(files) != [boundary]:
        [(found, path)] = files.items()
        raise PopError(
            f"{path} was fitted for boundary {found}, this model is pruned at {boundary}: give both the same"
        )
    return files
