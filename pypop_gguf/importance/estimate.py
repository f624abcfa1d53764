"""Computes layer importance and fitted projections from calibration texts, with torch, for ``pop-gguf convert``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.terminal import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pypop_gguf.fitting.fit import Difference
    from pypop_gguf.importance.calibration import CalibrationInfo, Sample


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
    device: str
    dtype: str
    trust_remote_code: bool
    texts: Path | None
    max_samples: int
    max_tokens: int
    seed: int


class Calibration:
    """The model in torch and the texts. They are loaded, and torch is imported, when they are first needed."""

    def __init__(self, options: CalibrationOptions) -> None:
        self._options = options
        self._loaded: tuple[PreTrainedModel, list[Sample], CalibrationInfo] | None = None

    def _load(self) -> tuple[PreTrainedModel, list[Sample], CalibrationInfo]:
        if self._loaded is None:
            from pypop_gguf.importance.calibration import load_samples
            from pypop_gguf.importance.load_model import load_for_importance

            options = self._options
            model, tokenizer = load_for_importance(
                options.source,
                device=options.device,
                dtype=options.dtype,
                trust_remote_code=options.trust_remote_code,
            )
            samples, info = load_samples(
                tokenizer,
                options.texts,
                max_samples=options.max_samples,
                max_tokens=options.max_tokens,
                seed=options.seed,
            )
            for note in info.skipped:
                print(f"{info.source}: {note}", file=sys.stderr)
            self._loaded = model, samples, info
        return self._loaded

    def estimate_importance(self, n_layer: int) -> PopMetadata:
        """Returns the importance of each layer, and what it was estimated from.

        Raises:
            PopError: The model or the texts cannot be used, or the model has not ``n_layer`` layers.
        """
        model, samples, info = self._load()
        from pypop_gguf.importance.scores import compute_importance  # The loader has reported it if torch is missing.

        with progress(total=len(samples), description="importance", unit="samples") as bar:
            scores = compute_importance(model, samples, seed=self._options.seed, progress=bar.update_to)
        if len(scores.prefill) != n_layer:
            raise PopError(f"torch sees {len(scores.prefill)} layers, llama.cpp {n_layer}: use --no-importance")
        return PopMetadata(
            importance_prefill=scores.prefill,
            importance_decode=scores.decode,
            calibration_source=info.source,
            calibration_samples=info.n_samples,
            calibration_tokens=info.n_tokens,
            calibration_seed=info.seed,
            calibration_sha256=info.sha256,
        )

    def fit_projections(
        self, boundary: int, target: Path, *, rank: int, distill_steps: int, fingerprint: str
    ) -> list[Difference]:
        """Fits the projections above the boundary and writes them to ``target`` as an adapter.

        Args:
            boundary: First layer that prefill skips.
            target: GGUF to write.
            rank: Rank of the fitted differences.
            distill_steps: Steps of gradient descent that follow.
            fingerprint: Fingerprint of the model file that the adapter is for.

        Returns:
            The differences as they were fitted, before the gradient descent.

        Raises:
            PopError: The model or the texts cannot be used, or the file cannot be written.
        """
        model, samples, _ = self._load()
        from pypop_gguf.fitting.distill import distill
        from pypop_gguf.fitting.fit import find_projections, fit_values, memory_bytes
        from pypop_gguf.fitting.hf_to_adapter import write_adapter

        needed = memory_bytes(find_projections(model, boundary))
        print(f"fitting needs {needed / 1e9:.2f} GB beside the model", file=sys.stderr)
        with progress(total=len(samples), description="fit", unit="texts") as bar:
            fitted = fit_values(model, samples, boundary, rank=rank, progress=bar.update_to)
        trained = fitted
        if distill_steps:
            with progress(total=distill_steps, description="distill", unit="steps") as bar:
                trained = distill(
                    model,
                    samples,
                    boundary,
                    fitted,
                    steps=distill_steps,
                    rank=rank,
                    seed=self._options.seed,
                    progress=bar.update_to,
                )
        write_adapter(target, model, boundary, trained, fingerprint)
        return fitted
