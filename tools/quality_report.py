"""Measures what pruning costs two small trained models, in the engine and in PyTorch, and writes docs/quality.md.

``make quality DATA=dir OTHER=model.gguf`` runs this. DATA holds calibration.jsonl and the held-out texts stories.jsonl,
arithmetic.jsonl and recall.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pypop_gguf.cli import main as pop_gguf
from pypop_gguf.importance.calibration import load_samples
from pypop_gguf.importance.decoder import find_decoder_layers
from pypop_gguf.importance.load_model import load_for_importance
from pypop_gguf.importance.scores import compute_importance
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality import tasks
from pypop_gguf.quality.answers import answer_questions, share_of_right_answers
from pypop_gguf.quality.score import Quality, Tokenizer, compare, score_samples, summarize
from pypop_gguf.statistics import Mean, bootstrap_mean
from pypop_gguf.terminal import available_cores
from tests.support.paths import BUNDLED as MODEL
from tests.support.paths import ROOT
from tools.ablations import Variant, block_influence, continuation_log_probs, variants, wanda
from tools.quality_page import BUDGET, TASKS, TYPES, Figures, page, plot_curves, plot_importance

ENDS = ((0, 1), (0, 4), (0, 16), (8, 1))  # head, tail
N_SAMPLES, CONTEXT = 40, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with the texts")
    parser.add_argument("--other", type=Path, help="GGUF file of a second small model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md", help="page to write")
    arguments = parser.parse_args()
    plots = arguments.out.with_suffix("")
    plots.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        figures = _measure(arguments, plots, Path(directory))
    plot_curves(figures.curves, plots / "curves.png")
    plot_importance(figures.profiles, plots / "importance.png")
    arguments.out.write_text(page(figures, (plots / "reading.md").read_text()))
    return 0


def _measure(arguments: argparse.Namespace, plots: Path, scratch: Path) -> Figures:
    files = {}
    for outtype in TYPES:
        files[outtype] = scratch / f"{outtype}.gguf"
        command = ["convert", str(MODEL), "--outtype", outtype, "--outfile", str(files[outtype]), "--no-importance"]
        assert pop_gguf(command) == 0
    other = None
    if path := arguments.other:
        other = path.stem, _engine(path, arguments.data, range(1, 5), only=("stories",))
    command = ["tune", str(files["q8_0"]), "--text", str(arguments.data / "stories.jsonl"), "--max-kl", str(BUDGET)]
    assert pop_gguf([*command, "--plot", str(plots / "tune.png")]) == 0
    whole_recall, ablations, profiles = _torch(arguments.data)
    return Figures(
        curves={outtype: _engine(path, arguments.data, range(3, 12)) for outtype, path in files.items()},
        exact=_exact_answers(files["q8_0"], arguments.data, (10, 9, 8, 7, 6, 5, 4)),
        ends={pair: _engine(files["q8_0"], arguments.data, (6, 8), *pair) for pair in ENDS},
        whole_recall=whole_recall,
        ablations=ablations,
        profiles=profiles,
        other=other,
        samples=N_SAMPLES,
    )


def _engine(
    path: Path, data: Path, boundaries: Iterable[int], head: int = 0, tail: int = 1, only=TASKS
) -> dict[str, list[Quality]]:
    llm = PopLlama(
        str(path),
        pop_boundary=1,
        pop_head=head,
        pop_tail=tail,
        pop_adapter=False,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=available_cores(),
        n_threads_batch=available_cores(),
        verbose=False,
    )
    result = {}
    for name in only:
        task = tasks.read_task(
            Tokenizer(llm), data / f"{name}.jsonl", max_samples=N_SAMPLES, max_tokens=CONTEXT, seed=0, run_code=False
        )
        print(f"{path.stem} {name} head {head} tail {tail}", file=sys.stderr)
        result[name] = summarize(list(score_samples(llm, task.samples, boundaries)))
    llm.close()
    return result


def _exact_answers(path: Path, data: Path, boundaries: Iterable[int]) -> dict[str, dict[int, Mean]]:
    """Lets the engine answer the questions of each task: share of right answers by task and boundary."""
    llm = PopLlama(
        str(path),
        pop_boundary=1,
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=available_cores(),
        n_threads_batch=available_cores(),
        verbose=False,
    )
    tokenizer = Tokenizer(llm)
    common = dict(max_samples=N_SAMPLES, max_tokens=CONTEXT, seed=0, run_code=False)
    with tempfile.TemporaryDirectory() as directory:  # eval reads these two keys as GSM8K has them
        arithmetic = Path(directory) / "arithmetic.jsonl"
        records = [json.loads(line) for line in (data / "arithmetic.jsonl").read_text().splitlines()]
        as_gsm8k = [
            {"question": r["prompt"][len("Question: ") : -len("\nAnswer:")], "answer": r["response"]} for r in records
        ]
        arithmetic.write_text("".join(json.dumps(record) + "\n" for record in as_gsm8k))
        chosen = [
            tasks.read_task(tokenizer, data / "recall.jsonl", **common),
            tasks.read_task(tokenizer, arithmetic, **common),
        ]
    chosen.append(tasks.make_recall_task(tokenizer, N_SAMPLES, 400, seed=0))
    result = {}
    for task in chosen:
        print(f"{path.stem} {task.name}, answers", file=sys.stderr)
        result[task.name] = share_of_right_answers(list(answer_questions(llm, task, boundaries)))
    llm.close()
    return result


def _torch(data: Path) -> tuple[Mean, dict[str, list], dict[str, np.ndarray]]:
    """Measures in PyTorch: exact recall of the whole model, the ablations, and the scores of the layers."""
    model, tokenizer = load_for_importance(MODEL)
    layers = find_decoder_layers(model)
    calibration, _ = load_samples(tokenizer, data / "calibration.jsonl", max_samples=120)
    influence = block_influence(model, layers, calibration)
    scores = compute_importance(model, calibration)
    profiles = {"prefill": scores.prefill, "decode": scores.decode, "influence": influence}
    samples = {name: load_samples(tokenizer, data / f"{name}.jsonl", max_samples=N_SAMPLES)[0] for name in TASKS}
    whole = {
        name: [
            continuation_log_probs(model, layers, sample, Variant("whole", tail=sample.prompt_len))
            for sample in of_task
        ]
        for name, of_task in samples.items()
    }
    exact = [_exact(log_p, sample) for log_p, sample in zip(whole["recall"], samples["recall"], strict=True)]
    shares = {}
    for n_skipped in (len(layers) // 3, len(layers) // 2):
        rows = []
        for variant in variants(len(layers), n_skipped, influence):
            print(f"{n_skipped} of {len(layers)}: {variant.name}", file=sys.stderr)
            changed = wanda(model, layers, calibration, variant.sparsity) if variant.sparsity else model
            of_changed = find_decoder_layers(changed)
            kls, matches = [], []
            for name, of_task in samples.items():
                log_ps = [continuation_log_probs(changed, of_changed, sample, variant) for sample in of_task]
                continuations = [list(sample.tokens[sample.prompt_len :]) for sample in of_task]
                kls.append(
                    bootstrap_mean(
                        np.array([compare(*each).kl for each in zip(log_ps, whole[name], continuations, strict=True)])
                    )
                )
                if name == "recall":
                    matches = [_exact(log_p, sample) for log_p, sample in zip(log_ps, of_task, strict=True)]
            rows.append((variant.name, kls, bootstrap_mean(np.array(matches))))
        shares[f"{n_skipped} of {len(layers)} layers"] = rows
    return bootstrap_mean(np.array(exact)), shares, profiles


def _exact(log_p: np.ndarray, sample) -> float:
    return float((log_p.argmax(axis=1) == np.array(sample.tokens[sample.prompt_len :])).all())


if __name__ == "__main__":
    sys.exit(main())
