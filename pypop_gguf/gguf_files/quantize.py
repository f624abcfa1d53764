"""Quantizes a GGUF file with llama.cpp's own quantizer. ``pop-gguf convert`` calls it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from pypop_gguf.errors import PopError

FLOAT_TYPES = ("f32", "f16", "bf16")
CONVERTER_TYPES = (*FLOAT_TYPES, "q8_0")  # the types that llama.cpp's converter writes by itself
QUANTIZER_TYPES = (
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_0",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "q8_0",
)


def quantize(source: Path, target: Path, outtype: str) -> None:
    """Writes ``source`` to ``target`` as ``outtype`` and keeps all keys. A split source becomes one file.

    Args:
        source: A GGUF of a float type.
        target: File to write; it may be left half-written if this fails.
        outtype: One of ``QUANTIZER_TYPES``.

    Raises:
        PopError: llama.cpp refuses, for example because the source is quantized already, or the disk is full.
    """
    from pypop_gguf import library

    llama_cpp = library.load()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    parameters.nthread = os.cpu_count() or 1
    with library.captured_log() as errors:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    if status != 0:
        reason = errors[0].split(": ", 1)[-1] if errors else "no reason given"
        if "iostream" in reason:  # This is all that C++ says about a failed write.
            raise PopError(f"cannot write {target}: the disk is full, or allows no file of this size")
        raise PopError(f"{source}: llama.cpp cannot quantize this to {outtype}: {reason}")
