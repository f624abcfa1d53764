"""The private parts of llama-cpp-python that this package relies on, behind functions that say what they are used for.

All other files use the public interface of ``llama_cpp`` or call these functions, so this is the file to check when the
pinned llama-cpp-python moves. third_party/README.md lists the names, and tests/python/test_parent.py looks for each of
them. This module does not import ``llama_cpp``, because the module that loads that package needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pypop_gguf.errors import PopError

if TYPE_CHECKING:
    from llama_cpp import Llama

# The libraries


def native_library(llama_cpp: ModuleType) -> Any:
    """Returns the ctypes library of llama.cpp, which tells its path and whether it is a build with POP."""
    return llama_cpp.llama_cpp._lib


def library_path(library: Any) -> str:
    """Returns the file that a ctypes library was loaded from."""
    return library._name


def ggml_library() -> Any:
    """Returns the ctypes library of ggml, which has to load the backends that are libraries of their own."""
    return importlib.import_module("llama_cpp._ggml").libggml


def log_callback(llama_cpp: ModuleType) -> Any:
    """Returns the callback that prints llama.cpp's log as ``verbose`` asks."""
    return llama_cpp._logger.llama_log_callback


# A model


def let_close(llm: Llama) -> None:
    """Gives the stack of open resources to an object whose ``Llama.__init__`` may never run: ``__del__`` closes it."""
    llm._stack = contextlib.ExitStack()


class _Closed:
    """Stands for what a closed model has freed: each use is an error instead of a crash."""

    def __getattr__(self, name: str) -> Any:
        raise PopError("this model was closed: make a new PopLlama to go on")


def mark_closed(llm: Llama) -> None:
    """Replaces the parts of an object that ``Llama.close`` has freed."""
    closed: Any = _Closed()
    llm._ctx = llm._model = llm._batch = closed
    tokenizer: Any = getattr(llm, "tokenizer_", None)  # one that the user has given has no model
    if hasattr(tokenizer, "_model"):
        tokenizer._model = closed


def set_requires_eval(llm: Llama, requires_eval: bool) -> None:
    """Says whether a token has to be decoded before the next one can be sampled, because no logits are there."""
    llm._requires_eval = requires_eval


def seed(llm: Llama) -> int:
    """Returns the seed of the sampler, which a saved state keeps. ``Llama.set_seed`` sets it."""
    return llm._seed


def decode(llm: Llama, tokens: Sequence[int], n_past: int, *, every_token: bool, last_token: bool) -> None:
    """Decodes tokens after ``n_past`` positions; every token asks for logits, or the last one, or none.

    Raises:
        RuntimeError: llama.cpp could not decode, for example because the context is full.
    """
    batch = llm._batch
    batch.set_batch(batch=tokens, n_past=n_past, logits_all=every_token)
    batch.batch.logits[len(tokens) - 1] = every_token or last_token  # set_batch() always asks for the last one's
    llm._ctx.decode(batch)


def drop_cache_from(llm: Llama, n_tokens: int) -> bool:
    """Drops the cached positions from ``n_tokens`` on; False if this memory cannot drop only a part."""
    return llm._ctx.kv_cache_seq_rm(-1, n_tokens, -1)


def clear_cache(llm: Llama) -> None:
    """Drops all that is cached."""
    llm._ctx.kv_cache_clear()


# Chat handlers that read images


class Overlay:
    """Stands for another object, and shares all of its attributes but those that are given here.

    This way a chat handler can be given a model or a module with other functions, while the real one stays as it is.
    """

    def __init__(self, below: Any, **own: Any) -> None:
        self.__dict__.update(own, _below=below)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._below, name, value)


def reads_images(handler: Any) -> bool:
    """Returns whether a chat handler reads images, and the text around them, by llama.cpp's library mtmd."""
    return hasattr(handler, "_mtmd_cpp")


def mtmd(handler: Any) -> Any:
    """Returns the module with mtmd's functions that a chat handler uses."""
    return handler._mtmd_cpp


def share_log(llama_cpp: ModuleType, handler: Any) -> None:
    """Gives the log of mtmd to the callback of llama.cpp's log: by itself mtmd prints where ``verbose`` is off too.

    This happens once, so that a callback of the user's is not replaced by the next model.
    """
    _share_log_once(llama_cpp, handler._mtmd_cpp)


@functools.cache
def _share_log_once(llama_cpp: ModuleType, mtmd: Any) -> None:
    mtmd.mtmd_helper_log_set(log_callback(llama_cpp), None)


def load_projector(handler: Any, llm: Llama) -> None:
    """Loads the projector as the handler itself would do at its first call."""
    handler._init_mtmd_context(llm)


def model_for_handler(
    llm: Llama, handler: Any, *, reset: Callable, clear_cache: Callable, evaluate: Callable
) -> Overlay:
    """Returns a stand-in for a model: it chats by this handler, which clears and fills the cache by these functions."""
    context = Overlay(llm._ctx, kv_cache_clear=clear_cache)
    return Overlay(llm, chat_handler=handler, reset=reset, eval=evaluate, _ctx=context)


@contextlib.contextmanager
def handler_with(handler: Any, **functions: Callable) -> Iterator[Any]:
    """Yields a stand-in for a chat handler that calls these functions in the place of mtmd's.

    The stand-in is of a subclass of the handler's class and shares the handler's ``__dict__``, so the handler keeps
    what its methods store. Only its ``_mtmd_cpp`` is another one.
    """
    mtmd = Overlay(handler._mtmd_cpp, **functions)
    kind: Any = type(type(handler).__name__, (type(handler),), {"_mtmd_cpp": property(lambda self: mtmd)})
    stand_in = object.__new__(kind)
    stand_in.__dict__ = handler.__dict__
    try:
        yield stand_in
    finally:
        del kind._mtmd_cpp  # a class is freed late, and would hold the model until then
