"""Prefill-only pruning (POP) for GGUF models on llama.cpp.

Importing the package is cheap. The native library is loaded when ``PopLlama`` is first used, so inspecting files never
needs it.
"""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING

from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled, PopStatus, Timings

if TYPE_CHECKING:
    from pypop_gguf.llama import PopLlama

__all__ = ["Cancelled", "PopError", "PopLlama", "PopStatus", "Timings", "__version__"]

try:
    __version__ = _metadata.version("pypop-gguf")
except _metadata.PackageNotFoundError:  # the source tree, not installed
    __version__ = "unknown"


def __getattr__(name: str):
    if name == "PopLlama":
        from pypop_gguf.llama import PopLlama

        return PopLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
