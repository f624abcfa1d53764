"""``pop-gguf eval``: what pruning costs a model, as it is quantized, on texts of one's own.

For each sample the context is read with the boundary, and the continuation scored by the whole model on that cache, next to the
whole model's own score. pypop_gguf/quality/score.py measures, pypop_gguf/quality/tasks.py says on what.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama, library
from pypop_gguf.bench.plan import cores
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.llama import llama_cpp
from pypop_gguf.quality import tasks
from pypop_gguf.quality.score import Mean, Quality, Tokenizer, bootstrap_mean, score_samples, summarize
from pypop_gguf.quality.tasks import Question, Task
from pypop_gguf.terminal import aligned

DESCRIPTION = """\
Scores continuations by the whole model on the cache that a pruned prompt has left: negative log-likelihood, KL divergence to the
whole model and agreement of the likeliest token, as means over samples with 95% intervals. Where answers can be checked, also
generates them (greedy) and counts exact matches. Ctrl-C prints what was measured so far."""

EPILOG = """\
FILE is plain text (cut into pieces) or JSON Lines: "text"; "prompt" and "response", with "answer" also a question; "messages";
GSM8K's "question" and "answer"; HumanEval's "prompt", "canonical_solution", "test" and "entry_point"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="texts or questions; each is a task")
    parser.add_argument(
        "--recall", type=int, default=0, metavar="N", help="also N built-in texts to recall a code from (needs no FILE)"
    )
    parser.add_argument(
        "--boundary",
        type=numbers,
        metavar="B,B",
        help="first layer that prefill skips (default: the file's, or two thirds of the layers)",
    )
    parser.add_argument(
        "--lm-eval", metavar="TASK,TASK", help="also tasks of lm-evaluation-harness, at most --samples documents each"
    )
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="with harness tasks of your own (YAML)")
    parser.add_argument(
        "--mmproj", type=Path, metavar="FILE.gguf", help="the model's projector, for harness tasks with images"
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="run what the model writes for HumanEval's problems: only where you trust it",
    )
    parser.add_argument("--no-generate", action="store_true", help="score only")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``eval`` and ``tune`` share."""
    parser.add_argument("--samples", type=int, default=40, metavar="N", help="at most, of each file (default: 40)")
    parser.add_argument(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a sample, prompt and continuation, at most (default: 512)",
    )
    parser.add_argument(
        "--head", type=int, metavar="H", help="first prompt tokens that run every layer (default: the file's, or 0)"
    )
    parser.add_argument("--tail", type=int, metavar="T", help="last prompt tokens that do (default: the file's, or 1)")
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE.gguf",
        help="fitted projections, one file a boundary, used there (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores this process may use)")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints.

    Raises:
        PopError: The arguments do not fit the model, or a file has nothing to measure on.
    """
    if not arguments.files and not arguments.recall and not arguments.lm_eval:
        raise PopError("nothing to measure on: give a FILE of texts, --recall N or --lm-eval TASK")
    if arguments.lm_eval:
        from pypop_gguf.quality import lm_eval as lm_eval_model  # tells what is missing before anything is measured
    if arguments.recall < 0:
        raise PopError(f"--recall {arguments.recall} is out of range: give at least 0")
    llm, boundaries = open_model(arguments, arguments.boundary, arguments.mmproj)
    tokenizer = Tokenizer(llm)
    chosen = [
        tasks.of_file(
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
        chosen.append(tasks.recall(tokenizer, arguments.recall, arguments.context, arguments.seed))
    report_skipped(chosen)

    results, interrupted = [], False
    for task in chosen:
        scores, answered = [], []
        progress = Progress(task.name, len(task.samples) + (0 if arguments.no_generate else len(task.questions)))
        try:
            for score in progress.over(score_samples(llm, task.samples, boundaries)):
                scores.append(score)
            if not arguments.no_generate:
                for answer in progress.over(answers(llm, task, boundaries)):
                    answered.append(answer)
        except KeyboardInterrupt:
            interrupted = True
        progress.end()
        if scores:
            results.append((task, summarize(scores), exact_matches(answered)))
        if interrupted:
            print("interrupted: these are the samples that were done", file=sys.stderr)
            break
    harness = {}
    if arguments.lm_eval and not interrupted:
        names = arguments.lm_eval.split(",")
        for boundary in [llm.pop.n_layer, *boundaries]:
            harness[boundary] = lm_eval_model.evaluate(llm, boundary, names, arguments.task_dir, arguments.samples)
    if arguments.json:
        print(json.dumps({"tasks": [_as_json(*result) for result in results], "lm_eval": harness}, indent=2))
    else:
        print("\n".join([_tables(arguments, llm, results), *_harness_table(harness)]))
    return 130 if interrupted else 0


def numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 20,22") from None


def open_model(
    arguments: argparse.Namespace, boundaries: list[int] | None, mmproj: Path | None = None
) -> tuple[PopLlama, list[int]]:
    """The model with a context of ``--context`` tokens, its projector where one is given, and the boundaries to measure.

    Raises:
        PopError: It cannot be read or pruned there, or a number is out of range.
    """
    for name, least in (("samples", 1), ("context", 16), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise PopError(f"--{name} {value} is out of range: give at least {least}")
    stored = read_metadata(arguments.model)
    support = library.describe_model(arguments.model)
    if support.refusal:
        raise PopError(f"{arguments.model} ({support.architecture}): {support.refusal}")
    n_layer = support.n_layer
    if boundaries is None:
        of_file = stored.boundary if stored else None
        boundaries = [n_layer - n_layer // 3 if of_file is None else of_file]
    for boundary in boundaries:
        if not 1 <= boundary <= n_layer:
            raise PopError(f"--boundary {boundary} is out of range: give 1 to {n_layer}")
    threads = arguments.threads or cores()
    if mmproj and not mmproj.is_file():
        raise PopError(f"--mmproj {mmproj}: no such file")
    llm = PopLlama(
        str(arguments.model),
        pop_boundary=boundaries[-1],
        pop_head=arguments.head,
        pop_tail=arguments.tail,
        pop_min_tokens=0,
        pop_adapter=arguments.adapter,
        n_ctx=arguments.context,
        n_batch=arguments.context,
        n_threads=threads,
        n_threads_batch=threads,
        chat_handler=llama_cpp.llama_chat_format.MTMDChatHandler(str(mmproj), verbose=False) if mmproj else None,
        verbose=False,
    )
    trained = int(llm.metadata.get(f"{support.architecture}.context_length", arguments.context))
    if arguments.context > trained:
        raise PopError(
            f"--context {arguments.context} is more than the {trained} tokens that the model was trained for: give fewer"
        )
    return llm, boundaries


def report_skipped(chosen: Iterable[Task]) -> None:
    """Names the lines that were not used, a few of them in full."""
    for task in chosen:
        if task.skipped:
            more = f", and {len(task.skipped) - 3} more" if len(task.skipped) > 3 else ""
            print(
                f"{task.name}: {len(task.skipped)} lines not used ({'; '.join(task.skipped[:3])}{more})",
                file=sys.stderr,
            )


class Progress:
    """A line on stderr with samples done and the time left; nothing where stderr is no terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done, self._started = name, total, 0, time.perf_counter()

    def over(self, results: Iterable) -> Iterator:
        self._show()
        for result in results:
            self._done += 1
            self._show()
            yield result

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        if sys.stderr.isatty():
            spent = time.perf_counter() - self._started
            left = f", {spent / self._done * (self._total - self._done) / 60:.1f} min left" if self._done else ""
            print(f"\r\033[K{self._name}: {self._done}/{self._total}{left}", end="", file=sys.stderr, flush=True)


def answers(llm: PopLlama, task: Task, boundaries: Iterable[int]) -> Iterator[dict[int, bool]]:
    """Of each question of a task: boundary -> whether the answer is right; L, the whole model, is always there."""
    for question in task.questions:
        yield {boundary: _answer(llm, task, question, boundary) for boundary in [llm.pop.n_layer, *boundaries]}


def _answer(llm: PopLlama, task: Task, question: Question, boundary: int) -> bool:
    tokens = llm.tokenize(question.prompt.encode())
    room = llm.n_ctx() - len(tokens)
    if room < 1:
        return False  # as a question that does not fit is answered
    llm.reset()  # what the whole model has read would be reused
    done = llm.create_completion(
        question.prompt, max_tokens=min(task.max_tokens, room), temperature=0, stop=list(task.stop), boundary=boundary
    )
    return question.check(done["choices"][0]["text"])


def exact_matches(answered: list[dict[int, bool]]) -> dict[int, Mean]:
    """Share of right answers at each boundary; empty where nothing was asked."""
    return {b: bootstrap_mean(np.array([float(each[b]) for each in answered])) for b in answered[0]} if answered else {}


def _as_json(task: Task, qualities: list[Quality], matches: dict[int, Mean]) -> dict:
    rows = [
        {
            **dataclasses.asdict(quality),
            "exact_match": dataclasses.asdict(matches[quality.boundary]) if matches else None,
        }
        for quality in qualities
    ]
    return {"task": task.name, "skipped_lines": list(task.skipped), "boundaries": rows}


def _tables(arguments: argparse.Namespace, llm: PopLlama, results: list) -> str:
    n_layer = llm.pop.n_layer
    lines = [
        f"model  {arguments.model.name}, {n_layer} layers; head {llm.pop.head}, tail {llm.pop.tail}; at most {arguments.context} tokens a sample",
        "Per token of the continuation, mean over samples [95% interval]; KL to the whole model in nats.",
    ]
    for task, qualities, matches in results:
        rows = [("boundary", "samples", "NLL", "loss increase", "KL", "same top token", "exact match")]
        for quality in qualities:
            whole = quality.boundary == n_layer
            rows.append(
                (
                    f"{quality.boundary}{' (whole)' if whole else fitted(llm, quality.boundary)}",
                    quality.samples,
                    quality.nll,
                    "" if whole else percent(quality.loss_increase),
                    "" if whole else quality.kl,
                    "" if whole else percent(quality.top1),
                    percent(matches[quality.boundary]) if matches else "N/A",
                )
            )
        lines += ["", task.name, *aligned(rows)]
    return "\n".join(lines)


def _harness_table(harness: dict[int, dict[str, dict]]) -> list[str]:
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


def fitted(llm: PopLlama, boundary: int) -> str:
    return " (fitted)" if boundary in llm.pop.adapters else ""


def percent(mean: Mean) -> str:
    return f"{mean.value:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
