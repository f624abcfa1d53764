"""The steps from a model file to measured adapters: `pop-gguf prepare`, `convert --fit-kv` and tools share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pypop_gguf import native
from pypop_gguf.errors import PopError
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.engine_fit import collect
from pypop_gguf.fitting.measure import Cost, Meter
from pypop_gguf.fitting.products import layer_of
from pypop_gguf.gguf_files.tensors import read_matrices
from pypop_gguf.llama import PopLlama
from pypop_gguf.speedup_limit import speedup_limits
from pypop_gguf.terminal import aligned, progress

CONTEXT = 1024  # tokens of the longest prompt that is read
ANSWER = 32  # tokens of an answer that is measured on
SAMPLES = 16  # prompts to measure on
HEAD = 1  # The state of the first token is unlike all others: no fit holds for it, so it runs every layer.


@dataclasses.dataclass(frozen=True)
class BoundaryCost:
    """Means over prompts of what one boundary costs.

    Attributes:
        boundary: First layer that prefill skips.
        plain_kl: KL divergence to the whole model in nats a token, with the skipped layers' own weights.
        plain_top1: Share of tokens whose likeliest is the whole model's, with them.
        fitted_kl: As ``plain_kl``, with the adapter.
        fitted_top1: As ``plain_top1``, with the adapter.
    """

    boundary: int
    plain_kl: float
    plain_top1: float
    fitted_kl: float
    fitted_top1: float


@dataclasses.dataclass(frozen=True)
class FitError:
    """Squared error of what one weight writes for tokens held out, as a share of the variance of the whole model's.

    Attributes:
        before: With the model's own weight.
        after: With the fitted one.
    """

    before: float
    after: float


def check_boundary(boundary: int, lossless: int) -> None:
    """Checks that something is left to fit above a boundary.

    Raises:
        PopError: It is out of range, or the layers above it write nothing to the cache.
    """
    if not 1 <= boundary < lossless:
        raise PopError(f"boundary {boundary} leaves nothing to fit: give 1 to {lossless - 1}")


def open_whole(source: Path, n_threads: int, tail: int = 1, n_gpu_layers: int = 0) -> PopLlama:
    """Opens a model for fitting and measuring, with pruning off and no adapter.

    Args:
        source: Its file.
        n_threads: Number of threads.
        tail: Last prompt tokens that run all layers where a prompt is pruned.
        n_gpu_layers: Number of layers that a GPU computes, the last ones first.

    Raises:
        PopError: The model cannot be loaded.
    """
    return PopLlama(
        str(source),
        pop=False,
        pop_adapter=False,
        pop_head=HEAD,
        pop_tail=tail,
        n_ctx=CONTEXT + ANSWER,
        n_batch=CONTEXT + ANSWER,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        n_gpu_layers=n_gpu_layers,
        verbose=False,
    )


def fit(
    llm: PopLlama,
    source: Path,
    prompts: Sequence[Sequence[int]],
    adapters: Mapping[int, Path],
    further_inputs: bool = True,
) -> dict[int, dict[str, FitError]]:
    """Fits keys and values at several boundaries and writes an adapter for each.

    Args:
        llm: The model, from :func:`open_whole`.
        source: Its file.
        prompts: Token ids of the prompts to fit on.
        adapters: The file to write for each boundary.
        further_inputs: Whether the fit also reads states below the boundary.

    Returns:
        The error of each weight at each boundary.

    Raises:
        PopError: There are too few prompts, the model holds values that are not finite, or a file cannot be written.
    """
    with progress(total=sum(map(len, prompts)), description="reading prompts to fit on", unit="tokens") as bar:
        sums = collect(llm, prompts, list(adapters), bar.update_to, further_inputs)
    weights = read_matrices(source, {name for one in sums for name in one.relations})
    architecture = llm.metadata["general.architecture"]
    fingerprint = f"{native.fingerprint(llm.model):016x}"
    errors: dict[int, dict[str, FitError]] = {}
    total = sum(len(one.relations) for one in sums)
    with progress(total=total, description="fitting keys and values", unit="weights") as bar:
        for one in sums:
            replacements, further = {}, {}
            errors[one.boundary] = {}
            for name in one.relations:
                fitted = one.solve(name, weights[name])
                n_own = weights[name].shape[1]
                replacements[name] = fitted.weight[:, :n_own], fitted.shift
                if n_own < fitted.weight.shape[1]:
                    further[name] = fitted.weight[:, n_own:]
                errors[one.boundary][name] = FitError(fitted.error_before, fitted.error_after)
                bar.update()
            write_replacements(
                adapters[one.boundary],
                replacements,
                architecture=architecture,
                boundary=one.boundary,
                fingerprint=fingerprint,
                bottlenecks=one.bottlenecks,
                further=further,
            )
    return errors


def measure(llm: PopLlama, prompts: Sequence[Sequence[int]], adapters: Mapping[int, Path]) -> list[BoundaryCost]:
    """Measures boundaries with their adapters on the model's own answers to other prompts.

    Args:
        llm: The model, from :func:`open_whole`.
        prompts: Token ids of each prompt.
        adapters: The adapter file of each boundary.

    Returns:
        The means for each boundary, in the order of ``adapters``.

    Raises:
        PopError: An adapter cannot be used.
    """
    meter = Meter(llm, adapters)
    costs = []
    with progress(total=len(prompts), description="measuring on other prompts", unit="prompts") as bar:
        for prompt in prompts:
            costs.append(meter.measure(prompt, ANSWER))
            bar.update()
    return average(costs)


def average(costs: Sequence[Mapping[int, Cost]]) -> list[BoundaryCost]:
    """Returns the means over prompts for each boundary."""
    return [
        BoundaryCost(
            boundary,
            plain_kl=float(np.mean([cost[boundary].plain.kl for cost in costs])),
            plain_top1=float(np.mean([cost[boundary].plain.top1 for cost in costs])),
            fitted_kl=float(np.mean([cost[boundary].fitted.kl for cost in costs])),
            fitted_top1=float(np.mean([cost[boundary].fitted.top1 for cost in costs])),
        )
        for boundary in costs[0]
    ]


def format_costs(llm: PopLlama, costs: Iterable[BoundaryCost], chosen: int | None) -> str:
    """Returns a table of what boundaries cost; the chosen one is marked.

    Args:
        llm: The model, which knows how many operations each boundary leaves.
        costs: From :func:`measure`.
        chosen: The boundary to mark.
    """
    costs, n_layer = list(costs), llm.pop.n_layer
    limits = speedup_limits(llm, [cost.boundary for cost in costs])
    rows: list[tuple] = [
        ("", "boundary", "layers skipped", "speed-up limit", "KL plain", "KL fitted", "same top token")
    ]
    for cost in costs:
        rows.append(
            (
                "*" if cost.boundary == chosen else "",
                f"{cost.boundary} of {n_layer}",
                f"{1 - cost.boundary / n_layer:.0%}",
                f"{limits[cost.boundary]:.2f}",
                f"{cost.plain_kl:.4f}",
                f"{cost.fitted_kl:.4f}",
                f"{cost.plain_top1:.1%} -> {cost.fitted_top1:.1%}",
            )
        )
    title = "cost of a pruned prompt, in nats per token of the model's own answers"
    return "\n".join([title + ("; * is written" if chosen else ""), *aligned(rows)])


def format_errors(errors: Mapping[str, FitError]) -> str:
    """Returns a table of how well each skipped layer was fitted, with a row for each layer.

    Args:
        errors: From :func:`fit`, at one boundary.
    """
    layers: dict[int, dict[str, FitError]] = {}
    for name, error in errors.items():
        layers.setdefault(layer_of(name), {})[name.split(".")[2]] = error
    parts = list(dict.fromkeys(part for layer in layers.values() for part in layer))
    rows: list[tuple] = [("layer", *parts)]
    for number, layer in sorted(layers.items()):
        cells = (f"{layer[part].before:.3f} -> {layer[part].after:.3f}" if part in layer else "" for part in parts)
        rows.append((number, *cells))
    title = "error of the fitted layers on texts held out, as a share of the variance"
    return "\n".join([title, *aligned(rows)])
