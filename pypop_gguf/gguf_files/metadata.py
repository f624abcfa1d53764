"""Reads, checks and lists the ``pop.*`` keys of a GGUF file. docs/metadata.md is their normative table.

All Python code that asks what such a key says, or whether it is valid, asks here. ``prepare``, ``convert``
and ``tune`` write the keys.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header

VERSION = 1  # This package writes this pop.version, and reads none that is newer.

_MAX_TOKENS = 2**31 - 1  # llama.cpp counts tokens in int32.
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp ends the process if a file has more.
# Key -> attribute of PopMetadata; all are uint32.
_ENDS = {"pop.head": "head", "pop.tail": "tail", "pop.min_tokens": "min_tokens"}
# Key -> attribute of Curve, and the type in the file, for an array that of its items.
_CURVE_ARRAYS = {
    "pop.curve.boundary": ("boundary", GGUFValueType.UINT32),
    "pop.curve.kl": ("kl", GGUFValueType.FLOAT32),
    "pop.curve.loss_increase": ("loss_increase", GGUFValueType.FLOAT32),
    "pop.curve.speedup": ("speedup", GGUFValueType.FLOAT32),
}
_CURVE_SCALARS = {
    "pop.curve.samples": ("samples", GGUFValueType.UINT32),
    "pop.curve.source": ("source", GGUFValueType.STRING),
}
# Key -> attribute of PopMetadata, and the type in the file.
_CALIBRATION = {
    "pop.calibration.source": ("calibration_source", GGUFValueType.STRING),
    "pop.calibration.samples": ("calibration_samples", GGUFValueType.UINT32),
    "pop.calibration.tokens": ("calibration_tokens", GGUFValueType.UINT32),
    "pop.calibration.seed": ("calibration_seed", GGUFValueType.UINT32),
    "pop.calibration.sha256": ("calibration_sha256", GGUFValueType.STRING),
}
_IMPORTANCE = {
    "pop.importance.prefill": "importance_prefill",
    "pop.importance.decode": "importance_decode",
}


@dataclass(frozen=True)
class Curve:
    """The quality that was measured at some boundaries. The lists have one entry for each boundary.

    Attributes:
        boundary: First layers that prefill skips.
        kl: KL divergences to the whole model, nats a token of the continuation.
        loss_increase: Relative increases of the negative log-likelihood.
        speedup: Limits of the speed-up, for a prompt of 512 tokens.
        samples: Number of samples behind the means.
        source: Name of the file that the samples are from.
    """

    boundary: list[int]
    kl: list[float]
    loss_increase: list[float]
    speedup: list[float]
    samples: int
    source: str


@dataclass(frozen=True)
class PopMetadata:
    """The POP metadata of a file. An attribute is None if the file does not set it.

    Attributes:
        boundary: 0-based index of the first layer that prefill skips, 1..L; L = off.
        head: First tokens of a sequence that run every layer.
        tail: Last tokens of a prompt that run every layer, at least 1.
        min_tokens: Prompts with fewer new tokens are not pruned.
        importance_prefill: Fisher score of each layer for prompt tokens, float32 [L].
        importance_decode: Fisher score of each layer for the last prompt token and generated tokens, float32 [L].
        curve: Quality that ``pop-gguf tune`` has measured.
        calibration_source: Name of the calibration file, or "bundled".
        calibration_samples: Number of samples behind the scores.
        calibration_tokens: Number of their tokens.
        calibration_seed: Seed by which samples and labels were drawn.
        calibration_sha256: Hash of the text of the samples.
    """

    boundary: int | None = None
    head: int | None = None
    tail: int | None = None
    min_tokens: int | None = None
    importance_prefill: np.ndarray | None = None
    importance_decode: np.ndarray | None = None
    curve: Curve | None = None
    calibration_source: str | None = None
    calibration_samples: int | None = None
    calibration_tokens: int | None = None
    calibration_seed: int | None = None
    calibration_sha256: str | None = None

    def key_values(self) -> list[tuple[str, Any, GGUFValueType]]:
        """Returns the keys to write: key, value, and type in the file.

        An array is of uint32 if all its items are int, else of float32.
        """
        result: list[tuple[str, Any, GGUFValueType]] = [("pop.version", VERSION, GGUFValueType.UINT32)]
        if self.boundary is not None:
            result.append(("pop.boundary", self.boundary, GGUFValueType.UINT32))
        for key, attribute in _ENDS.items():
            if (value := getattr(self, attribute)) is not None:
                result.append((key, value, GGUFValueType.UINT32))
        for key, attribute in _IMPORTANCE.items():
            if (scores := getattr(self, attribute)) is not None:
                result.append((key, [float(score) for score in scores], GGUFValueType.ARRAY))
        if self.curve is not None:
            result += [
                (key, getattr(self.curve, name), GGUFValueType.ARRAY) for key, (name, _) in _CURVE_ARRAYS.items()
            ]
            result += [(key, getattr(self.curve, name), kind) for key, (name, kind) in _CURVE_SCALARS.items()]
        for key, (attribute, kind) in _CALIBRATION.items():
            if (value := getattr(self, attribute)) is not None:
                result.append((key, value, kind))
        return result


def trunk_layers(reader: GGUFHeader) -> int:
    """Returns the number of layers of the model's trunk, L: its blocks without those for multi-token prediction.

    Raises:
        PopError: The file has no usable ``<architecture>.block_count``.
    """
    architecture = reader.get_field("general.architecture")
    n_layer = 0
    if architecture is not None and architecture.types == [GGUFValueType.STRING]:
        with contextlib.suppress(UnicodeDecodeError):
            name = architecture.contents()
            blocks, extra = (reader.get_field(f"{name}.{key}") for key in ("block_count", "nextn_predict_layers"))
            # llama.cpp takes no other type either.
            if blocks is not None and all(
                field is None or field.types == [GGUFValueType.UINT32] for field in (blocks, extra)
            ):
                n_layer = blocks.contents() - (extra.contents() if extra else 0)
    if not 1 <= n_layer <= MAX_LAYERS:
        raise PopError(f"{reader.path}: no usable block_count: not a language model; give one")
    return n_layer


def read_metadata(path: str | os.PathLike) -> PopMetadata | None:
    """Reads and checks the ``pop.*`` keys of a file; of a split one, those of the first shard.

    Keys that this version does not know are ignored.

    Returns:
        The metadata, or None if the file has no ``pop.*`` key.

    Raises:
        PopError: The file cannot be read, a newer version wrote it, or a key has the wrong type, length or range.
    """
    return parse_metadata(read_header(path), path)


def parse_metadata(reader: GGUFHeader, path: str | os.PathLike) -> PopMetadata | None:
    """Checks the ``pop.*`` keys of a header that was read already. See :func:`read_metadata`."""
    if not any(key.startswith("pop.") for key in reader.fields):
        return None

    def refuse(key: str, found: str, expected: str) -> PopError:
        return PopError(f"{path}: {key} is {found}, not {expected}; write it again with `pop-gguf convert`")

    def value(key: str, kind: GGUFValueType) -> Any:
        field = reader.get_field(key)
        if field is None:
            return None
        if field.types[:1] != [kind]:
            raise refuse(key, f"of type {field.types[0].name.lower()}", kind.name.lower())
        try:
            return field.contents()
        except UnicodeDecodeError:
            raise refuse(key, "damaged", "UTF-8 text") from None

    version = value("pop.version", GGUFValueType.UINT32)
    if not version:
        raise refuse("pop.version", "missing" if version is None else "0", f"1 to {VERSION}")
    if version > VERSION:
        raise PopError(f"{path}: pop.version {version} is newer than {VERSION}: update pypop-gguf")

    n_layer = trunk_layers(reader)
    found: dict[str, Any] = {}
    boundary = found["boundary"] = value("pop.boundary", GGUFValueType.UINT32)
    if boundary is not None and not 1 <= boundary <= n_layer:
        raise refuse("pop.boundary", str(boundary), f"1 to {n_layer}")
    for key, attribute in _ENDS.items():
        found[attribute] = value(key, GGUFValueType.UINT32)
        if found[attribute] is not None and found[attribute] > _MAX_TOKENS:
            raise refuse(key, str(found[attribute]), f"at most {_MAX_TOKENS}")
    if found["tail"] == 0:
        raise refuse("pop.tail", "0", "at least 1")
    for key, attribute in _IMPORTANCE.items():
        field = reader.get_field(key)
        if field is None:
            continue
        if field.types == [GGUFValueType.ARRAY, GGUFValueType.FLOAT32] and field.count != n_layer:
            raise refuse(key, f"an array of {field.count}", f"{n_layer} float32 numbers")
        if field.types != [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]:
            raise refuse(
                key, f"of type {' of '.join(kind.name.lower() for kind in field.types)}", f"{n_layer} float32 numbers"
            )
        found[attribute] = np.asarray(field.contents(), dtype=np.float32)
        if not (np.isfinite(found[attribute]).all() and (found[attribute] >= 0).all()):
            raise refuse(key, "negative or not finite somewhere", "scores of at least 0")
    if any(key in reader.fields for key in (*_CURVE_ARRAYS, *_CURVE_SCALARS)):
        found["curve"] = _parse_curve(reader, value, refuse, n_layer)
    for key, (attribute, kind) in _CALIBRATION.items():
        found[attribute] = value(key, kind)
    return PopMetadata(**found)


def _parse_curve(reader: GGUFHeader, value: Callable, refuse: Callable, n_layer: int) -> Curve:
    found: dict[str, Any] = {}
    for key, (name, kind) in _CURVE_ARRAYS.items():
        field = reader.get_field(key)
        if field is None or field.types != [GGUFValueType.ARRAY, kind]:
            raise refuse(key, "missing or of another type", f"an array of {kind.name.lower()}")
        found[name] = list(field.contents())
        if len(found[name]) != len(found["boundary"]) or not np.isfinite(found[name]).all():
            raise refuse(
                key, "of another length than pop.curve.boundary, or not finite", "one number for each boundary"
            )
    if not all(1 <= boundary <= n_layer for boundary in found["boundary"]):
        raise refuse("pop.curve.boundary", str(found["boundary"]), f"boundaries of 1 to {n_layer}")
    for key, (name, kind) in _CURVE_SCALARS.items():
        if (scalar := value(key, kind)) is None:
            raise refuse(key, "missing", kind.name.lower())
        found[name] = scalar
    return Curve(**found)
