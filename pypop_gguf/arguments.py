"""What ``PopLlama``'s ``pop_*`` arguments mean for the model that it has opened: the boundary, the ends of prompts, the adapters."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pypop_gguf import library, native
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata

if TYPE_CHECKING:
    from pypop_gguf.llama import PopLlama

_INT32_MAX = 2**31 - 1  # the native library's numbers of tokens and layers


def check_boundary_type(name: str, boundary: int | str | None) -> None:
    if isinstance(boundary, bool) or not (boundary is None or boundary == "lossless" or isinstance(boundary, int)):
        raise TypeError(f'{name} must be a layer number, "lossless" or None, not {boundary!r}')


def resolve_boundary(llm: PopLlama, boundary: int | str) -> int:
    """Validates a boundary by setting it; every eval() sets the one it needs again, which then costs nothing.

    Raises:
        PopError: The model cannot be pruned there.
    """
    model, ctx = llm._model.model, llm._ctx.ctx
    if boundary == "lossless":
        return native.lossless_boundary(model)
    if abs(boundary) > _INT32_MAX:
        raise PopError(f"boundary {boundary} is out of range: choose 1 to {native.n_layer(model)}")
    if reason := native.refusal(model, boundary):
        raise PopError(reason)
    native.set_boundary(ctx, boundary)
    return boundary


def choose_boundary(
    llm: PopLlama, *, pop: bool, asked: int | str | None, stored: PopMetadata | None
) -> tuple[int, str]:
    """The boundary, L where prompts are not pruned, and where it comes from: ``PopStatus.source``."""
    model = llm._model.model
    n_layer, lossless = native.n_layer(model), native.lossless_boundary(model)
    boundary, source = n_layer, "off"
    if not pop:
        return boundary, source
    if asked is not None:
        boundary, source = resolve_boundary(llm, asked), "argument"
    elif stored is not None and stored.boundary is not None:
        boundary, source = stored.boundary, "file"
    elif native.refusal(model) is None and lossless < n_layer - 1:
        boundary, source = lossless, "lossless"
    elif native.refusal(model) is None:
        print(
            f"pypop_gguf: {os.path.basename(llm.model_path)} has no pop.boundary, so prompts are read by all "
            f"{n_layer} layers; `pop-gguf convert` writes one, or pass pop_boundary=",
            file=sys.stderr,
        )
    if boundary < n_layer and llm._logits_everywhere:  # the default of llama-cpp-python's own server
        print(
            f"pypop_gguf: logits_all=True asks every token of a prompt for logits, so all {n_layer} layers read it; set it to False",
            file=sys.stderr,
        )
    return boundary, source if boundary < n_layer else "off"


def choose_ends(llm: PopLlama, asked: dict[str, int | None], stored: PopMetadata | None) -> tuple[int, int, int]:
    """Head, tail and fewest tokens; head and tail are the context's from now on."""
    chosen = []
    for name, default, low, high in (
        ("head", 0, 0, _INT32_MAX),
        ("tail", 1, 1, llm.n_batch),
        ("min_tokens", 0, 0, _INT32_MAX),
    ):
        value = asked[f"pop_{name}"]
        if value is None:
            of_file = getattr(stored, name, None)
            value = default if of_file is None else of_file
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise PopError(
                f"pop_{name} is {value!r}: give a whole number, {low} to {high}{' (n_batch)' if name == 'tail' else ''}"
            )
        chosen.append(value)
    native.set_ends(llm._ctx.ctx, n_head=chosen[0], n_tail=chosen[1])
    return tuple(chosen)


def add_adapters(llm: PopLlama, asked, boundary: int) -> dict[int, str]:
    """Loads what was asked for or lies beside the model; returns the files by the boundary that each is for."""
    single, pruned = isinstance(asked, (str, os.PathLike)), boundary < native.n_layer(llm._model.model)
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
    with library.captured_log():  # what it says is in the error
        files = {native.load_adapter(llm._ctx.ctx, llm._model.model, path): os.fspath(path) for path in asked}
    if single and pruned and list(files) != [boundary]:
        [(found, path)] = files.items()
        raise PopError(
            f"{path} was fitted for boundary {found}, this model is pruned at {boundary}: give both the same"
        )
    return files
