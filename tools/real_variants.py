"""Opens the variants of a real model that ``real_table`` measures: pruned, fitted, trained, completed, and rivals.

Adapters, and rivals that llama-quantize makes by removing layers, are made once and kept in build/table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypop_gguf import PopLlama, native
from pypop_gguf.errors import PopError
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.texts import WRITTEN_TOKENS, read_prompts
from pypop_gguf.quality.results import WHOLE, name_variant
from pypop_gguf.quality.tasks import Item, Question
from tests.support.paths import ROOT

KINDS = {
    "plain": "the skipped layers' own projections, as in the paper",
    "head": "the skipped layers' own projections, but the first token runs all layers",
    "alone": "projections fitted to the state at the boundary alone, and the first token runs all layers",
    "fitted": "fitted projections, and the first token runs all layers",
    "trained": "fitted projections that were trained for 10 minutes, and the first token runs all layers",
    "completed": "fitted, and 64 tokens of the cache are completed before each further token of a written answer",
    "removed": "a third of the layers removed for prompt and answer: those that POP skips",
    "shortgpt": "a third of the layers removed for prompt and answer: those of least influence",
}
CONTEXT = 2560
KEPT = ROOT / "build" / "table"
TRAINED = 10  # minutes
COMPLETED = 64  # tokens before each further token of an answer
QUANTIZE = ROOT / "build" / "stock" / "quantize" / "llama-quantize"


@dataclass(frozen=True)
class Variant:
    """One way to read prompts.

    Attributes:
        name: Its name in the results.
        llm: The model, or a copy with layers removed.
        boundary: First layer that prefill skips, L for none.
        head: Number of first tokens that run all layers.
        adapter: Fitted projections for this boundary, or None.
        writes_only: Whether it differs from others only where an answer of several tokens is written.
    """

    name: str
    llm: PopLlama
    boundary: int
    head: int = 0
    adapter: Any = None
    writes_only: bool = False

    def measures(self, item: object) -> bool:
        return not self.writes_only or (isinstance(item, Item) and isinstance(item.question, Question))

    def enter(self) -> None:
        """Sets the context of the model up for this variant."""
        native.clear_adapters(self.llm.ctx)
        if self.adapter is not None:
            native.add_adapter(self.llm.ctx, self.adapter)
        native.set_ends(self.llm.ctx, n_head=self.head, n_tail=1)


def _open(path: Path, n_threads: int, **options: Any) -> PopLlama:
    return PopLlama(
        str(path),
        pop=False,
        pop_adapter=False,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_attn=True,
        verbose=False,
        **options,
    )


def open_variants(
    name: str, source: Path, boundaries: list[int], kinds: list[str], n_threads: int
) -> Iterator[Variant]:
    """Yields the variants that were asked for, the whole model first."""
    adapters = {boundary: KEPT / f"{name}.b{boundary}.gguf" for boundary in boundaries}
    if {"fitted", "completed", "trained"} & set(kinds):
        _fit(source, adapters, n_threads)
    alone = {boundary: path.with_suffix(".alone.gguf") for boundary, path in adapters.items()}
    if "alone" in kinds:
        _fit(source, alone, n_threads, further_inputs=False)
    trained = {boundary: path.with_suffix(".trained.gguf") for boundary, path in adapters.items()}
    if "trained" in kinds:
        _train(source, adapters, trained, n_threads)
    llm = _open(source, n_threads)
    n_layer = llm.pop.n_layer
    yield Variant(WHOLE, llm, n_layer)
    for boundary in sorted(boundaries, reverse=True):
        if "plain" in kinds:
            yield Variant(name_variant(boundary, n_layer), llm, boundary)
        if "head" in kinds:
            yield Variant(name_variant(boundary, n_layer, head=steps.HEAD), llm, boundary, steps.HEAD)
        if "alone" in kinds:
            adapter = native.adapter_init(llm.model, alone[boundary])
            label = name_variant(boundary, n_layer, fitted=True, head=steps.HEAD) + " alone"
            yield Variant(label, llm, boundary, steps.HEAD, adapter)
        if "fitted" in kinds:
            adapter = native.adapter_init(llm.model, adapters[boundary])
            label = name_variant(boundary, n_layer, fitted=True, head=steps.HEAD)
            yield Variant(label, llm, boundary, steps.HEAD, adapter)
        if "trained" in kinds:
            adapter = native.adapter_init(llm.model, trained[boundary])
            label = name_variant(boundary, n_layer, fitted=True, head=steps.HEAD) + " trained"
            yield Variant(label, llm, boundary, steps.HEAD, adapter)
    if "completed" in kinds:
        completing = _open(source, n_threads, pop_complete="answer", pop_complete_chunk=COMPLETED)
        for boundary in sorted(boundaries, reverse=True):
            adapter = native.adapter_init(completing.model, adapters[boundary])
            label = name_variant(boundary, n_layer, fitted=True, head=steps.HEAD) + " completed"
            yield Variant(label, completing, boundary, steps.HEAD, adapter, writes_only=True)
    n_removed = round(n_layer / 3)
    for kind in ("removed", "shortgpt"):
        if kind in kinds:
            layers = list(range(n_layer - n_removed, n_layer))
            if kind == "shortgpt":
                layers = _least_influence(name, source, n_removed)
            rival = _open(_remove_layers(name, source, kind, layers), n_threads)
            yield Variant(f"{kind} {n_removed}", rival, n_layer - n_removed)


def _fit(source: Path, adapters: dict[int, Path], n_threads: int, further_inputs: bool = True) -> None:
    """Writes the adapters that are missing."""
    missing = {boundary: path.with_suffix(".part") for boundary, path in adapters.items() if not path.exists()}
    if missing:
        llm = steps.open_whole(source, n_threads)
        steps.fit(llm, source, read_prompts(llm, None, steps.CONTEXT)[0], missing, further_inputs)
        llm.close()
        for boundary, part in missing.items():
            part.replace(adapters[boundary])


def _train(source: Path, fitted: dict[int, Path], trained: dict[int, Path], n_threads: int) -> None:
    """Writes the trained adapters that are missing, from the fitted ones."""
    from pypop_gguf.fitting import training

    for boundary, path in trained.items():
        if not path.exists():
            part = Path(shutil.copy(fitted[boundary], path.with_suffix(".part")))
            llm = steps.open_whole(source, n_threads)
            prompts = read_prompts(llm, None, steps.CONTEXT, WRITTEN_TOKENS)[0]
            print(training.train(llm, source, part, prompts, TRAINED, n_threads))
            llm.close()
            part.replace(path)


def _remove_layers(name: str, source: Path, kind: str, layers: list[int]) -> Path:
    """Returns a copy without these layers."""
    options = ["--prune-layers", ",".join(map(str, layers))]
    return quantize_once(source, KEPT / f"{name}.{kind}-{len(layers)}.gguf", "COPY", options)


def quantize_once(source: Path, target: Path, kind: str, options: list[str]) -> Path:
    """Returns a copy of this type, which llama-quantize writes once.

    Raises:
        PopError: llama-quantize is not built, or fails.
    """
    if not target.exists():
        if not QUANTIZE.exists():
            raise PopError(f"{QUANTIZE} is missing: run `make test-slow`, which builds it")
        part = target.with_suffix(".part")
        command = [QUANTIZE, *options, source, part, kind]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode != 0:
            raise PopError(f"llama-quantize failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
        part.replace(target)
    return target


def _least_influence(name: str, source: Path, n: int) -> list[int]:
    """Returns the layers that change their input least, by the measure of ShortGPT on the bundled texts."""
    kept = KEPT / f"{name}.influence.json"
    if not kept.exists():
        from pypop_gguf.importance.calibration import load_samples
        from pypop_gguf.importance.decoder import find_decoder_layers
        from pypop_gguf.importance.load_model import load_for_importance
        from tools.ablations import block_influence

        model, tokenizer = load_for_importance(source)
        samples, _ = load_samples(tokenizer, None, max_samples=32)
        kept.write_text(json.dumps(block_influence(model, find_decoder_layers(model), samples).tolist()))
    influence = json.loads(kept.read_text())
    return sorted(sorted(range(len(influence)), key=influence.__getitem__)[:n])
