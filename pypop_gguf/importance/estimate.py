"""Computes layer importance from calibration texts, with torch, for ``pop-gguf convert`` and ``prepare``."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.terminal import progress


@dataclass(frozen=True)
class CalibrationOptions:
    """Options for loading the model and reading the texts.

    Attributes:
        source: Hugging Face directory or GGUF file.
        device: Device of torch, or "auto".
        dtype: Type of the weights, or "auto".
        trust_remote_code: Whether Python code that comes with the model may run.
        texts: File of texts; None for the bundled ones.
        max_samples: Largest number of samples.
        max_tokens: Longest sample, in tokens.
        seed: Seed for choosing samples and drawing labels.
    """

    source: Path
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    texts: Path | None = None
    max_samples: int = 200
    max_tokens: int = 512
    seed: int = 0


def estimate_importance(options: CalibrationOptions, n_layer: int, stored: PopMetadata) -> PopMetadata:
    """Estimates the importance of each layer. This imports torch.

    Args:
        options: How the model and the texts are read.
        n_layer: Number of layers that llama.cpp sees.
        stored: The keys that the file has already.

    Returns:
        The stored keys with this importance, and with what it was estimated from.

    Raises:
        PopError: The model or the texts cannot be used, or the model has not ``n_layer`` layers.
    """
    from pypop_gguf.importance.calibration import load_samples
    from pypop_gguf.importance.load_model import load_for_importance

    model, tokenizer = load_for_importance(
        options.source, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    samples, info = load_samples(
        tokenizer, options.texts, max_samples=options.max_samples, max_tokens=options.max_tokens, seed=options.seed
    )
    for note in info.skipped:
        print(f"{info.source}: {note}", file=sys.stderr)
    from pypop_gguf.importance.scores import compute_importance  # The loader has reported it if torch is missing.

    with progress(total=len(samples), description="importance", unit="samples") as bar:
        scores = compute_importance(model, samples, seed=options.seed, progress=bar.update_to)
    if len(scores.prefill) != n_layer:
        raise PopError(f"torch sees {len(scores.prefill)} layers, llama.cpp {n_layer}: leave out the importance")
    return dataclasses.replace(
        stored,
        importance_prefill=scores.prefill,
        importance_decode=scores.decode,
        calibration_source=info.source,
        calibration_samples=info.n_samples,
        calibration_tokens=info.n_tokens,
        calibration_seed=info.seed,
        calibration_sha256=info.sha256,
    )
