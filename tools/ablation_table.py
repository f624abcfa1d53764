"""Measures the paper's ablations and POP's rivals on a real model in PyTorch, and each layer alone beside its score.

A third of the layers is skipped, with keys and values as they are. The KL divergence to the whole model is taken on the
prompts of `real_quality` and the answers that the whole model writes in the engine. Each layer is also skipped alone,
which shows whether the scores of the importance estimate order the layers by their measured cost. The figures go to
bench/real/ablations/MODEL.jsonl, and a run that was interrupted goes on where it stopped. `make quality` shows them.

    python -m tools.ablation_table smollm2-135m --data DATA --prompts 5
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf.fitting import steps
from pypop_gguf.fitting.measure import Meter
from pypop_gguf.fitting.texts import encode_chat
from pypop_gguf.quality.results import Results
from pypop_gguf.quality.score import compare
from pypop_gguf.statistics import Mean, bootstrap_mean
from pypop_gguf.terminal import available_cores, progress
from tests.support.paths import ROOT
from tools.real_models import MODELS, fetch
from tools.real_quality import make_prompts
from tools.reporting import one_line_errors

RESULTS = ROOT / "bench" / "real" / "ablations"
SCORES = "scores"  # the task of the layers' scores; all other tasks are kinds of prompts
CALIBRATION = 32  # texts for the scores and for Wanda
_TOKENS = 256  # of each of these texts


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--prompts", type=int, default=10, metavar="N", help="prompts of each kind (10); 0: scores alone"
    )
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    import torch

    from pypop_gguf.importance.calibration import Sample, load_samples
    from pypop_gguf.importance.decoder import find_decoder_layers
    from pypop_gguf.importance.load_model import load_for_importance
    from pypop_gguf.importance.scores import compute_importance
    from tools import ablations

    torch.set_num_threads(arguments.threads)
    source = fetch(arguments.model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = Results(RESULTS / f"{arguments.model}.jsonl", source)
    model, tokenizer = load_for_importance(source)
    layers = find_decoder_layers(model)
    names = _names(len(layers))
    calibration, _ = load_samples(tokenizer, None, max_samples=CALIBRATION, max_tokens=_TOKENS)
    if results.get(SCORES, names[-1], "whole") is None:
        influence = ablations.block_influence(model, layers, calibration)
        prefill = compute_importance(model, calibration).prefill
        for name, importance, change in zip(names, prefill.tolist(), influence.tolist()):
            results.add(SCORES, name, "whole", {"importance": importance, "influence": change})
    influence = results.column(SCORES, "whole", "influence", names)
    if arguments.prompts < 1:
        return 0
    variants = [*ablations.variants(len(layers), round(len(layers) / 3), influence)]
    variants += [ablations.Variant(name, (il,)) for il, name in enumerate(names)]
    [sparsity] = {variant.sparsity for variant in variants if variant.sparsity}
    sparse = ablations.wanda(model, layers, calibration, sparsity)
    sparse_layers = find_decoder_layers(sparse)

    llm = steps.open_whole(source, arguments.threads)
    meter = Meter(llm, {})
    prompts = list(make_prompts(arguments.data, arguments.prompts))
    with progress(total=len(prompts), description=arguments.model, unit="prompts") as bar:
        for kind, number, text in prompts:
            missing = [variant for variant in variants if results.get(kind, str(number), variant.name) is None]
            if missing:
                tokens = encode_chat(llm, [{"role": "user", "content": text}], steps.CONTEXT)
                answer = meter.answer(tokens, steps.ANSWER)
                sample = Sample((*tokens, *answer), len(tokens))
                whole = ablations.continuation_log_probs(model, layers, sample, ablations.Variant("whole"))
                for variant in missing:
                    chosen = (sparse, sparse_layers) if variant.sparsity else (model, layers)
                    found = ablations.continuation_log_probs(*chosen, sample, variant)
                    results.add(kind, str(number), variant.name, dataclasses.asdict(compare(found, whole, answer)))
            bar.update()
    print(section(results))
    return 0


def _names(n_layer: int) -> list[str]:
    return [f"layer {il}" for il in range(n_layer)]


def section(results: Results) -> str:
    """Returns the rows of the model as a table in Markdown, and how well the scores order its layers."""
    rows, kinds = [], kinds_of(results)
    alone = _names(results.n_layer)
    for variant in results.variants():
        if variant in alone or variant == "whole":
            continue
        rows.append(f"| {variant} | {_mean(results, kinds, variant):.3f} | {_top1(results, kinds, variant):.1f}% |")
    costs = _costs(results)
    n = len(costs)
    title = f"| Variant, a third of {results.n_layer} layers | KL divergence, {n} prompts | Same likeliest token |"
    ranks = ["| Score of a layer | All layers | All but the last |", "| --- | --- | --- |"]
    for score, label in (("importance", "importance of `convert`"), ("influence", "block influence of ShortGPT")):
        values = results.column(SCORES, "whole", score, alone)
        found = (rank_correlation(values[:end], costs[:, :end]) for end in (None, -1))
        ranks.append(f"| {label} | {' | '.join(f'{one:.2f}' for one in found)} |")
    intro = (
        "Does a score tell which layers cost much when they are skipped? This is its rank correlation (Spearman) with "
        f"the KL divergence where that layer alone is skipped, over {n} prompts:"
    )
    return "\n".join([title, "| --- | --- | --- |", *rows, "", intro, "", *ranks])


def kinds_of(results: Results) -> list[str]:
    """Returns the kinds of prompts that were measured, none if the model has scores alone."""
    return [task for task in results.tasks() if task != SCORES]


def layer_costs(results: Results) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the importance of each layer, and the mean KL divergence where it alone is skipped, both [n_layer]."""
    importance = results.column(SCORES, "whole", "importance", _names(results.n_layer))
    return importance, _costs(results).mean(axis=0) if kinds_of(results) else None


def _mean(results: Results, kinds: Sequence[str], variant: str) -> Mean:
    return bootstrap_mean(
        np.concatenate([results.column(kind, variant, "kl", results.items(kind, [variant])) for kind in kinds])
    )


def _top1(results: Results, kinds: Sequence[str], variant: str) -> float:
    shares = [results.column(kind, variant, "top1", results.items(kind, [variant])) for kind in kinds]
    return 100 * float(np.concatenate(shares).mean())


def _costs(results: Results) -> np.ndarray:
    """Returns the KL divergence of each prompt where each layer alone is skipped, [n_prompts, n_layer]."""
    alone, found = _names(results.n_layer), []
    for kind in kinds_of(results):
        items = results.items(kind, alone)
        found.append(np.stack([results.column(kind, name, "kl", items) for name in alone], axis=1))
    return np.concatenate(found)


def rank_correlation(scores: np.ndarray, costs: np.ndarray) -> Mean:
    """Returns Spearman's correlation of scores with mean costs; its interval is over resampled prompts.

    Args:
        scores: One for each layer, [n_layer].
        costs: Of each layer on each prompt, [n_prompts, n_layer].
    """

    def correlate(means: np.ndarray) -> float:
        return float(np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(means)))[0, 1])

    chance = np.random.default_rng(0)
    drawn = [correlate(costs[chance.integers(len(costs), size=len(costs))].mean(axis=0)) for _ in range(2000)]
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return Mean(correlate(costs.mean(axis=0)), low, high)


if __name__ == "__main__":
    sys.exit(main())
