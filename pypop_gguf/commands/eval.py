"""``pop-gguf eval``: measures what pruning costs a model file, as it is quantized, on texts and questions.

For each sample a pruned pass reads the prompt, and the whole model scores the text after it on the cache that this pass
has left. The score is compared with that of the whole model alone. Questions are answered in the same way.
pypop_gguf/quality/ has the tasks, the measures and the file of results; this module runs them and prints tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama
from pypop_gguf.errors import PopError
from pypop_gguf.quality import score as scoring
from pypop_gguf.quality.answers import answer
from pypop_gguf.quality.builtin import make_recall_task, make_tracking_task
from pypop_gguf.quality.grading import METRICS
from pypop_gguf.quality.model import add_model_arguments, label_boundary, open_model
from pypop_gguf.quality.results import Results, name_variant
from pypop_gguf.quality.score import Quality, Score, Tokenizer, summarize
from pypop_gguf.quality.tasks import Item, Task, read_task, report_skipped
from pypop_gguf.statistics import Difference, Mean, bootstrap_mean, paired_difference
from pypop_gguf.terminal import aligned, check_ranges, integer_list, progress

DESCRIPTION = """\
Measures what pruning costs. A pruned pass reads each prompt, and the whole model then scores the text after it on the
cache that this pass has left. The table shows the negative log-likelihood, the KL divergence to the whole model, and
how often both find the same token the likeliest. These are means over samples, with 95% intervals. Questions with known
answers are also asked: choices by the likelihood of their endings, all others by greedy generation. The table shows the
share of right answers and how far it is from that of the whole model on the same questions. Ctrl-C prints what was
measured so far."""

EPILOG = """\
FILE is plain text, which is cut into pieces, or JSON Lines. A line has one of these sets of keys: "text"; "prompt" and
"response"; "messages"; "question" and "answer", as in GSM8K; "prompt", "canonical_solution", "test" and "entry_point",
as in HumanEval; "question", "choices" and "answer", as in MMLU; "context" or "ctx", "choices" or "endings", and
"answer" or "label", as in HellaSwag; "context", "question" and "answer", as in HotpotQA. A line with "prompt",
"response" and "answer" is also a question."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one task.

    Attributes:
        task: The task.
        qualities: The means for each boundary, the whole model first.
        answers: For each metric of the answers: the share of right ones and the difference to the whole model, by
            boundary.
    """

    task: Task
    qualities: list[Quality]
    answers: dict[str, dict[int, tuple[Mean, Difference]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="model to measure")
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="file of texts or questions, which becomes one task"
    )
    parser.add_argument(
        "--recall",
        type=int,
        default=0,
        metavar="N",
        help="also measure N built-in texts from which a code is recalled (needs no FILE)",
    )
    parser.add_argument(
        "--tracking",
        type=int,
        default=0,
        metavar="N",
        help="also measure N built-in texts in which variables are followed over several steps (needs no FILE)",
    )
    parser.add_argument(
        "--boundary",
        type=integer_list,
        metavar="B,B",
        help="boundaries to measure (default: the file's, or the lossless one if upper layers share a cache, or two "
        "thirds of the layers)",
    )
    parser.add_argument(
        "--lm-eval",
        metavar="TASK,TASK",
        help="also run these tasks of lm-evaluation-harness, with at most --samples documents each",
    )
    parser.add_argument(
        "--task-dir",
        type=Path,
        metavar="DIR",
        help="directory with your own tasks for lm-evaluation-harness (YAML files)",
    )
    parser.add_argument(
        "--mmproj",
        type=Path,
        metavar="FILE.gguf",
        help="projector of the model, for tasks of lm-evaluation-harness with images",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run the programs that the model writes for HumanEval's problems; use it only if you trust them",
    )
    parser.add_argument("--no-generate", action="store_true", help="score only, and answer no questions")
    add_model_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="file that gets the figures of every question as they are measured, without its text; what it has already "
        "is not measured again",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        PopError: The arguments do not fit the model, or a file has nothing to measure on.
    """
    if not arguments.files and not arguments.recall and not arguments.tracking and not arguments.lm_eval:
        raise PopError("nothing to measure on: give a FILE of texts, --recall N, --tracking N or --lm-eval TASK")
    if arguments.lm_eval:
        from pypop_gguf.quality import lm_eval  # It reports a missing harness before anything is measured.

        names = arguments.lm_eval.split(",")
        lm_eval.check_tasks(names, arguments.task_dir)
    check_ranges(arguments, recall=0, tracking=0)
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise PopError(f"{arguments.out.parent}: no such directory; make it first, or give another --out")
    llm, boundaries = open_model(arguments, arguments.boundary, arguments.mmproj)
    results = Results(arguments.out, arguments.model if arguments.out else None)
    tasks = _read_tasks(arguments, Tokenizer(llm))
    report_skipped(tasks)

    measured, interrupted = _measure(llm, tasks, boundaries, results)
    harness: dict[int, dict] = {}
    try:
        if arguments.lm_eval and not interrupted:
            for boundary in [llm.pop.n_layer, *boundaries]:
                harness[boundary] = lm_eval.evaluate(llm, boundary, names, arguments.task_dir, arguments.samples)
    except KeyboardInterrupt:
        interrupted = True
    finally:  # A failure of the harness loses nothing of what was measured before.
        if arguments.json:
            print(json.dumps({"tasks": [_as_json(result) for result in measured], "lm_eval": harness}, indent=2))
        else:
            title = f"model  {arguments.model.name}, {llm.pop.n_layer} layers; head {llm.pop.head}, tail {llm.pop.tail}"
            print(f"{title}; at most {arguments.context} tokens a sample")
            print("\n".join([*_format_tables(llm, measured), *_format_harness_table(harness)]))
    return 130 if interrupted else 0


def _read_tasks(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[Task]:
    limits = dict(max_tokens=arguments.context, seed=arguments.seed)
    tasks = [
        read_task(tokenizer, path, max_samples=arguments.samples, run_code=arguments.run_code, **limits)
        for path in arguments.files
    ]
    if arguments.recall:
        tasks.append(make_recall_task(tokenizer, arguments.recall, **limits))
    if arguments.tracking:
        tasks.append(make_tracking_task(tokenizer, arguments.tracking, **limits))
    if arguments.no_generate:
        return [
            dataclasses.replace(task, items=[dataclasses.replace(item, question=None) for item in task.items])
            for task in tasks
        ]
    return tasks


def _measure(llm: PopLlama, tasks: list[Task], boundaries: list[int], results: Results) -> tuple[list[Result], bool]:
    """Returns what was measured, and whether Ctrl-C has ended the measurement early."""
    tokenizer = Tokenizer(llm)
    measured = []
    for task in tasks:
        done: list[tuple[Item, dict[int, dict[str, float]]]] = []
        interrupted = False
        try:
            with progress(total=len(task.items), description=task.name, unit="samples") as bar:
                for item in task.items:
                    done.append((item, _measure_item(llm, tokenizer, task, item, boundaries, results)))
                    bar.update()
        except KeyboardInterrupt:
            interrupted = True
        if done:
            measured.append(_summarize(llm, task, done))
        if interrupted:
            print("interrupted: the tables show the samples that were done", file=sys.stderr)
            return measured, True
    return measured, False


def _measure_item(
    llm: PopLlama, tokenizer: Tokenizer, task: Task, item: Item, boundaries: list[int], results: Results
) -> dict[int, dict[str, float]]:
    """Returns the figures of one item for L, the whole model, and each boundary; those in ``results`` are taken."""
    found: dict[int, dict[str, float]] = {}
    missing = []
    for boundary in dict.fromkeys([llm.pop.n_layer, *boundaries]):
        kept = results.get(task.name, item.id, _name(llm, boundary))
        # The kept results may come from a run that did not score, or that asked no questions.
        asked = item.question is None or (kept is not None and kept.keys() & METRICS.keys())
        if kept is None or "nll" not in kept or not asked:
            missing.append(boundary)
        else:
            found[boundary] = kept
    if missing:
        scores = scoring.score_sample(llm, item.sample, missing)
        for boundary in missing:
            figures: dict[str, float] = dataclasses.asdict(scores[boundary])
            if item.question is not None:
                figures |= answer(llm, tokenizer, item.question, boundary)
            found[boundary] = results.add(task.name, item.id, _name(llm, boundary), figures)
    return found


def _name(llm: PopLlama, boundary: int) -> str:
    pop = llm.pop
    return name_variant(boundary, pop.n_layer, fitted=boundary in pop.adapters, head=pop.head, tail=pop.tail)


def _summarize(llm: PopLlama, task: Task, done: list[tuple[Item, dict[int, dict[str, float]]]]) -> Result:
    scores = [{boundary: Score.from_figures(figures) for boundary, figures in found.items()} for _, found in done]
    answers: dict[str, dict[int, tuple[Mean, Difference]]] = {}
    for metric in METRICS:
        answered = [found for item, found in done if item.question is not None and metric in found[llm.pop.n_layer]]
        if answered:
            columns = {boundary: np.array([found[boundary][metric] for found in answered]) for boundary in answered[0]}
            whole = columns[llm.pop.n_layer]
            answers[metric] = {
                at: (bootstrap_mean(column), paired_difference(column, whole)) for at, column in columns.items()
            }
    return Result(task, summarize(scores), answers)


def _as_json(result: Result) -> dict:
    rows = []
    for quality in result.qualities:
        row: dict = {**dataclasses.asdict(quality), "exact_match": None, "differences": {}}
        for metric, found in result.answers.items():
            mean, difference = found[quality.boundary]
            row[metric] = dataclasses.asdict(mean)
            row["differences"][metric] = {
                **dataclasses.asdict(difference),
                "within_noise": difference.within_noise,
            }
        rows.append(row)
    return {"task": result.task.name, "skipped_lines": list(result.task.skipped), "boundaries": rows}


def _format_tables(llm: PopLlama, results: list[Result]) -> list[str]:
    lines = [
        "Per token of the continuation, mean over samples [95% interval]; KL to the whole model in nats. Differences "
        "of answers are to the whole model on the same questions."
    ]
    for result in results:
        head: list = ["boundary", "samples", "NLL", "loss increase", "KL", "same top token"]
        for metric in result.answers:
            head += [METRICS[metric], "difference"]
        rows = [head if result.answers else [*head, "answers"]]
        for quality in result.qualities:
            whole = quality.boundary == llm.pop.n_layer
            row: list = [
                label_boundary(llm, quality.boundary),
                quality.samples,
                quality.nll,
                "" if whole else f"{quality.loss_increase:.1%}",
                "" if whole else quality.kl,
                "" if whole else f"{quality.top1:.1%}",
            ]
            for found in result.answers.values():
                mean, difference = found[quality.boundary]
                row += [f"{mean:.1%}", "" if whole else _format_difference(difference)]
            rows.append(row if result.answers else [*row, "N/A"])
        lines += ["", result.task.name, *aligned(rows)]
    return lines


def _format_difference(difference: Difference) -> str:
    return f"{difference:+.1%}" + (", within noise" if difference.within_noise else "")


def _format_harness_table(harness: dict[int, dict[str, dict]]) -> list[str]:
    if not harness:
        return []
    rows = [("task", "metric", *(f"b = {boundary}" for boundary in harness))]
    whole = next(iter(harness.values()))
    for name, metrics in whole.items():
        for metric in metrics:
            rows.append(
                (name, metric.removesuffix(",none"), *(f"{found[name][metric]:.4f}" for found in harness.values()))
            )
    return ["", "lm-evaluation-harness (the largest boundary is the whole model)", *aligned(rows)]
