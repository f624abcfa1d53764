"""Turns the ``pop_*`` arguments of ``PopLlama`` into the boundary, the ends and the adapters of an opened model."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pypop_gguf import library, native
from pypop_gguf.errors import PopError, notice
from pypop_gguf.status import PopStatus

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()

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
    """The settings of a context that was opened.

    Attributes:
        status: What ``PopLlama.pop`` shows.
        lossless: Boundary from which on pruning changes nothing.
        adapters: The adapter files in use, by the boundary that each is for.
        runs_whole: Whether no prompt can be pruned, whatever a call asks for.
    """

    status: PopStatus
    lossless: int
    adapters: dict[int, str]
    runs_whole: bool = False


def check_boundary_type(name: str, boundary: int | str | None) -> None:
    """Checks the type of an argument that is a boundary.

    Raises:
        TypeError: The argument of this name is no boundary.
    """
    if isinstance(boundary, bool) or not (boundary is None or boundary == "lossless" or isinstance(boundary, int)):
        raise TypeError(f'{name} must be a layer number, "lossless" or None, not {boundary!r}')


def check_keywords(keywords: Iterable[str]) -> None:
    """Checks the names of the arguments that go to ``llama_cpp.Llama``.

    Raises:
        TypeError: ``llama_cpp.Llama`` takes no argument of one of these names, and has never done so.
    """
    unknown = sorted(set(keywords) - _PARAMETERS_OF_PARENT - _PARAMETERS_REMOVED_FROM_PARENT)
    if unknown:
        raise TypeError(f"PopLlama() got an unexpected keyword argument {unknown[0]!r}")


def flash_attn_type(flash_attn: bool | None) -> int:
    """Returns llama.cpp's number for on, off or, for None, its automatic choice."""
    if flash_attn is None:
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    return llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def check_sizes(keywords: Mapping[str, Any]) -> None:
    """Checks the sizes among the arguments that go to ``llama_cpp.Llama``: a negative one would end the process.

    Raises:
        PopError: A size is out of range.
    """
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 0)):
        size = keywords.get(name, least)
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= _INT32_MAX:
            raise PopError(f"{name} is {size!r}: give a whole number, at least {least}")


def open_context(
    llm: llama_cpp.Llama,
    *,
    pop: bool,
    pop_boundary: int | str | None,
    pop_head: int | None,
    pop_tail: int | None,
    pop_min_tokens: int | None,
    pop_adapter: str | os.PathLike | Sequence[str | os.PathLike] | bool | None,
    pop_kernels: bool,
    logits_everywhere: bool,
) -> Opened:
    """Gives the context of a model its kernels, boundary, ends and adapters.

    The engine decides all but the kernels (``llama_pop_open``).

    Args:
        llm: The model with its context.
        pop: As in ``PopLlama``, like the arguments with the prefix ``pop_``.
        pop_boundary: As in ``PopLlama``.
        pop_head: As in ``PopLlama``.
        pop_tail: As in ``PopLlama``.
        pop_min_tokens: As in ``PopLlama``.
        pop_adapter: As in ``PopLlama``.
        pop_kernels: As in ``PopLlama``.
        logits_everywhere: Whether every token asks for logits, so that nothing can be pruned.

    Raises:
        PopError: A value is out of range, the model cannot be pruned at the boundary, or an adapter does not fit.
    """
    n_layer = native.n_layer(llm.model)
    native.set_kernels(llm.ctx, pop_kernels)
    reason = _why_whole(llm, logits_everywhere)
    choice = native.open_context(
        llm.ctx,
        llm.model_path if pop_adapter is None and not reason else None,
        boundary=_requested_boundary(llm, pop_boundary) if pop else native.OFF,
        n_head=_requested_number("pop_head", pop_head, f"0 to {_INT32_MAX}"),
        n_tail=_requested_number("pop_tail", pop_tail, f"1 to {llm.n_batch} (n_batch)"),
        min_tokens=_requested_number("pop_min_tokens", pop_min_tokens, f"0 to {_INT32_MAX}"),
    )
    unset = pop and pop_boundary is None and choice.source == "off" and "pop.boundary" not in llm.metadata
    if reason and choice.boundary < n_layer:
        if logits_everywhere or pop_boundary is not None:  # logits_all is the default of llama-cpp-python's own server
            advice = "; set it to False" if logits_everywhere else ""
            notice(f"{reason}, so all {n_layer} layers read it{advice}")
        native.set_boundary(llm.ctx, native.OFF)
        choice = dataclasses.replace(choice, boundary=n_layer, source="off")
    elif unset and not reason and native.refusal(llm.model) is None:
        notice(
            f"{os.path.basename(llm.model_path)} has no pop.boundary, so prompts are read by all {n_layer} layers; "
            "`pop-gguf prepare` makes its prompts faster"
        )
    if choice.has_adapter:
        adapters = {choice.boundary: str(native.adapter_path(llm.model_path, choice.boundary))}
    else:
        adapters = _add_adapters(llm, pop_adapter, choice.boundary)
    ends = choice.n_head, choice.n_tail, choice.min_tokens
    status = PopStatus(choice.boundary < n_layer, choice.boundary, n_layer, choice.source, *ends, tuple(adapters))
    return Opened(status, native.lossless_boundary(llm.model), adapters, bool(reason))


def _why_whole(llm: llama_cpp.Llama, logits_everywhere: bool) -> str | None:
    """Returns why the engine can prune no prompt of this context, or None. csrc/pop-context.cpp has the same rules."""
    if logits_everywhere:
        return "logits_all=True asks every token of a prompt for logits"
    if llm.context_params.embeddings:
        return "embedding=True asks every token of a prompt for an embedding"
    attention = llm.context_params.attention_type
    architecture = llm.metadata.get("general.architecture")
    causal = llm.metadata.get(f"{architecture}.attention.causal") != "false"
    if attention == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL or (
        attention == llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED and not causal
    ):
        return "the attention is not causal, and lets each token of a prompt see those after it"
    return None


def checked_boundary(llm: llama_cpp.Llama, boundary: int | str) -> int:
    """Sets a boundary that the model can be pruned at, and returns its number.

    Raises:
        PopError: The model cannot be pruned there.
    """
    number = _requested_boundary(llm, boundary)
    if number == native.LOSSLESS:
        return native.lossless_boundary(llm.model)
    native.set_boundary(llm.ctx, number)
    return number


def _requested_boundary(llm: llama_cpp.Llama, boundary: int | str | None) -> int:
    """Returns what the engine is asked for: a layer, or a special value, which a user may not give as a number."""
    if boundary is None:
        return native.DEFAULT
    if boundary == "lossless":
        return native.LOSSLESS
    assert isinstance(boundary, int)
    if abs(boundary) > _INT32_MAX:
        raise PopError(f"boundary {boundary} is out of range: choose 1 to {native.n_layer(llm.model)}")
    if reason := native.refusal(llm.model, boundary):
        raise PopError(reason)
    return boundary


def _requested_number(name: str, asked: int | None, allowed: str) -> int:
    """Returns a number of tokens for the engine, -1 for the file's value. The engine checks the allowed range.

    Only what the engine cannot be asked for is refused here.
    """
    if asked is None:
        return -1
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked <= _INT32_MAX:
        raise PopError(f"{name} is {asked!r}: give a whole number, {allowed}")
    return asked


def _add_adapters(llm: llama_cpp.Llama, asked, boundary: int) -> dict[int, str]:
    """Loads the adapters that were asked for; returns their files by boundary."""
    if asked is True:
        raise PopError("pop_adapter=True names no file: give a path, or leave it out to take the one beside the model")
    single = isinstance(asked, (str, os.PathLike))
    paths = [asked] if single else asked or []
    with library.captured_log():  # the error tells what the log says
        files = {native.load_adapter(llm.ctx, llm.model, path): os.fspath(path) for path in paths}
    if single and boundary < native.n_layer(llm.model) and list(files) != [boundary]:
        [(found, path)] = files.items()
        raise PopError(
            f"{path} was fitted for boundary {found}, this model is pruned at {boundary}: give both the same"
        )
    return files
