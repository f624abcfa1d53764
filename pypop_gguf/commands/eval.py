"""``pop-gguf eval``: measures what pruning costs a model file, as it is quantized, on texts of the user's own.

For each sample a pruned pass reads the prompt, and the whole model scores the text after it on the cache that this pass
has left. The score is compared with that of the whole model alone. pypop_gguf/quality/ has the tasks and measures; this
module runs them and prints tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from pypop_gguf import PopLlama
from pypop_gguf.errors import PopError
from pypop_gguf.quality.answers import answer_questions, share_of_right_answers
from pypop_gguf.quality.model import add_model_arguments, label_boundary, open_model
from pypop_gguf.quality.score import Quality, Score, Tokenizer, score_samples, summarize
from pypop_gguf.quality.tasks import Task, make_recall_task, read_task, report_skipped
from pypop_gguf.statistics import Mean
from pypop_gguf.terminal import aligned, integer_list, progress

DESCRIPTION = """\
Measures what pruning costs. A pruned pass reads each prompt, and the whole model then scores the text after it on the
cache that this pass has left. The table shows the negative log-likelihood, the KL divergence to the whole model, and
how often both find the same token the likeliest. These are means over samples, with 95% intervals. Where answers can be
checked, they are also generated greedily, and exact matches are counted. Ctrl-C prints what was measured so far."""

EPILOG = """\
FILE is plain text, which is cut into pieces, or JSON Lines. A line has one of these sets of keys: "text"; "prompt" and
"response"; "messages"; "question" and "answer", as in GSM8K; "prompt", "canonical_solution", "test" and "entry_point",
as in HumanEval. A line with "prompt", "response" and "answer" is also a question."""

# What is measured of one task: the task, the means for each boundary, and the share of right answers at each boundary.
Result = tuple[Task, list[Quality], dict[int, Mean]]


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
        "--boundary",
        type=integer_list,
        metavar="B,B",
        help="boundaries to measure (default: the file's, or two thirds of the layers)",
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
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        PopError: The arguments do not fit the model, or a file has nothing to measure on.
    """
    if not arguments.files and not arguments.recall and not arguments.lm_eval:
        raise PopError("nothing to measure on: give a FILE of texts, --recall N or --lm-eval TASK")
    if arguments.lm_eval:
        from pypop_gguf.quality import lm_eval  # It reports a missing harness before anything is measured.
    if arguments.recall < 0:
        raise PopError(f"--recall {arguments.recall} is out of range: give at least 0")
    llm, boundaries = open_model(arguments, arguments.boundary, arguments.mmproj)
    tokenizer = Tokenizer(llm)
    tasks = [
        read_task(
            tokenizer,
            path,
            max_samples=arguments.samples,
            max_tokens=arguments.context,
            seed=arguments.seed,
            run_code=arguments.run_code,
        )
        for path in arguments.files
    ]
    if arguments.recall:
        tasks.append(make_recall_task(tokenizer, arguments.recall, arguments.context, arguments.seed))
    if arguments.no_generate:
        tasks = [dataclasses.replace(task, questions=[]) for task in tasks]
    report_skipped(tasks)

    results, interrupted = _measure(llm, tasks, boundaries)
    harness = {}
    if arguments.lm_eval and not interrupted:
        names = arguments.lm_eval.split(",")
        for boundary in [llm.pop.n_layer, *boundaries]:
            harness[boundary] = lm_eval.evaluate(llm, boundary, names, arguments.task_dir, arguments.samples)
    if arguments.json:
        print(json.dumps({"tasks": [_as_json(*result) for result in results], "lm_eval": harness}, indent=2))
    else:
        title = f"model  {arguments.model.name}, {llm.pop.n_layer} layers; head {llm.pop.head}, tail {llm.pop.tail}"
        print(f"{title}; at most {arguments.context} tokens a sample")
        print("\n".join([*_format_tables(llm, results), *_format_harness_table(harness)]))
    return 130 if interrupted else 0


def _measure(llm: PopLlama, tasks: list[Task], boundaries: list[int]) -> tuple[list[Result], bool]:
    """Returns the results, and whether Ctrl-C has ended the measurement early."""
    results = []
    for task in tasks:
        scores: list[dict[int, Score]] = []
        answered: list[dict[int, bool]] = []
        interrupted = False
        total = len(task.samples) + len(task.questions)
        try:
            with progress(total=total, description=task.name, unit="samples") as bar:
                for score in score_samples(llm, task.samples, boundaries):
                    scores.append(score)
                    bar.update()
                for answer in answer_questions(llm, task, boundaries):
                    answered.append(answer)
                    bar.update()
        except KeyboardInterrupt:
            interrupted = True
        if scores:
            results.append((task, summarize(scores), share_of_right_answers(answered)))
        if interrupted:
            print("interrupted: the tables show the samples that were done", file=sys.stderr)
            return results, True
    return results, False


def _as_json(task: Task, qualities: list[Quality], matches: dict[int, Mean]) -> dict:
    rows = [
        {
            **dataclasses.asdict(quality),
            "exact_match": dataclasses.asdict(matches[quality.boundary]) if matches else None,
        }
        for quality in qualities
    ]
    return {"task": task.name, "skipped_lines": list(task.skipped), "boundaries": rows}


def _format_tables(llm: PopLlama, results: list[Result]) -> list[str]:
    lines = ["Per token of the continuation, mean over samples [95% interval]; KL to the whole model in nats."]
    for task, qualities, matches in results:
        rows: list[tuple] = [("boundary", "samples", "NLL", "loss increase", "KL", "same top token", "exact match")]
        for quality in qualities:
            whole = quality.boundary == llm.pop.n_layer
            rows.append(
                (
                    label_boundary(llm, quality.boundary),
                    quality.samples,
                    quality.nll,
                    "" if whole else f"{quality.loss_increase:.1%}",
                    "" if whole else quality.kl,
                    "" if whole else f"{quality.top1:.1%}",
                    f"{matches[quality.boundary]:.1%}" if matches else "N/A",
                )
            )
        lines += ["", task.name, *aligned(rows)]
    return lines


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
