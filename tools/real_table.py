"""Measures a real model on known tasks: whole, and with a quarter, a third and half of its layers skipped.

DATA has mmlu.jsonl, hellaswag.jsonl, gsm8k.jsonl, humaneval.jsonl and hotpotqa.jsonl. The built-in tasks and the KL
divergence on four kinds of prompts are measured beside them. The figures go to bench/real/MODEL.jsonl, without texts. A
run that was interrupted goes on where it stopped, and takes turns between the tasks. Adapters, and rivals that
llama-quantize makes by removing layers, are made once and kept in build/table. OMP_WAIT_POLICY=passive keeps threads
that wait from taking time from other programs.

    python -m tools.real_table smollm2-135m --data DATA --run-code --count 100,mmlu=300
    python -m tools.quality_page
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf import PopLlama, library
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.measure import Meter
from pypop_gguf.fitting.texts import encode_chat
from pypop_gguf.quality.answers import answer
from pypop_gguf.quality.builtin import make_recall_task, make_tracking_task
from pypop_gguf.quality.results import Results
from pypop_gguf.quality.score import Tokenizer, compare, log_softmax
from pypop_gguf.quality.tasks import Item, make_id, read_task, report_skipped
from pypop_gguf.terminal import aligned, available_cores, integer_list
from tests.support.paths import ROOT
from tools.real_models import MODELS, fetch
from tools.real_quality import make_prompts
from tools.real_variants import CONTEXT, KEPT, KINDS, Variant, open_variants
from tools.reporting import one_line_errors

FILES = ("mmlu", "hellaswag", "gsm8k", "humaneval", "hotpotqa")
LENGTHS = {"recall-500": 500, "recall-2000": 2000, "tracking-500": 500}  # tokens
KL = "kl"
TASKS = (*FILES, *LENGTHS, KL)
SHARES = (1 / 4, 1 / 3, 1 / 2)  # of the layers that are skipped
RESULTS = ROOT / "bench" / "real"


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer, which the whole model writes, shows the KL divergence."""

    id: str
    text: str


Work = tuple[str, "Item | Prompt"]  # the name of the task, and one of its items


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--boundary", type=integer_list, metavar="B,B", help="default: a quarter, a third, half")
    parser.add_argument(
        "--variants", type=_names_of(KINDS), default=["plain", "fitted"], metavar="V,V", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--tasks", type=_names_of(TASKS), default=list(TASKS), metavar="T,T", help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--count",
        type=_read_counts,
        default=dict.fromkeys(TASKS, 100),
        metavar="N,TASK=N",
        help="items of each task, and of single tasks (default: 100); kl has four kinds of N prompts",
    )
    parser.add_argument("--run-code", action="store_true", help="run the programs that the model writes for HumanEval")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path, help="default: bench/real/MODEL.jsonl")
    arguments = parser.parse_args()
    if hasattr(os, "nice"):
        os.nice(10)

    source = fetch(arguments.model)
    KEPT.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out or RESULTS / f"{arguments.model}.jsonl", source)
    n_layer = library.describe_model(source).n_layer
    boundaries = arguments.boundary or [n_layer - round(share * n_layer) for share in SHARES]
    variants = list(open_variants(arguments.model, source, boundaries, arguments.variants, arguments.threads))
    work = list(_read_work(arguments, variants[0].llm))
    _measure(variants, work, results)
    print(_format_seconds(results, variants))
    return 0


def _names_of(allowed):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(allowed)):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return names

    return parse


def _read_counts(text: str) -> dict[str, int]:
    counts = dict.fromkeys(TASKS, 100)
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if (name and name not in TASKS) or not number.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not a number, or TASK=NUMBER of {', '.join(TASKS)}")
        counts.update(dict.fromkeys([name] if name else TASKS, int(number)))
    return counts


def _read_work(arguments: argparse.Namespace, llm: PopLlama) -> Iterator[Work]:
    """Yields the items of all tasks in turns: at each moment, the same share of each task is done."""
    tokenizer, queues = Tokenizer(llm), []
    for name in arguments.tasks:
        count = arguments.count[name]
        if count < 1 or (name == "humaneval" and not arguments.run_code):
            continue
        if name == KL:
            prompts = list(make_prompts(arguments.data, count))
            queues.append([(f"{KL}-{kind}", Prompt(make_id(number, text), text)) for kind, number, text in prompts])
            continue
        if name in LENGTHS:
            make = make_tracking_task if name.startswith("tracking") else make_recall_task
            task = make(tokenizer, count, LENGTHS[name], seed=0)
        else:
            path = arguments.data / f"{name}.jsonl"
            task = read_task(tokenizer, path, max_samples=count, max_tokens=CONTEXT, seed=0, run_code=True)
            report_skipped([task])
        queues.append([(name, item) for item in task.items if item.question is not None])
    order = [((i + 0.5) / len(queue), n, i) for n, queue in enumerate(queues) for i in range(len(queue))]
    for _, n, i in sorted(order):
        yield queues[n][i]


def _measure(variants: list[Variant], work: list[Work], results: Results) -> None:
    started = shown = time.monotonic()
    n_measured = 0
    for number, (task, item) in enumerate(work):
        measured = [variant for variant in variants if variant.measures(item)]
        missing = [variant for variant in measured if results.get(task, item.id, variant.name) is None]
        if missing:
            n_measured += 1
            for variant, figures in _measure_item(variants[0], missing, item):
                results.add(task, item.id, variant.name, figures)
        if (now := time.monotonic()) - shown > 60 and n_measured:
            shown = now
            left = (now - started) / n_measured * (len(work) - number - 1)
            print(f"{number + 1} of {len(work)} items, {left / 3600:.1f} h left", file=sys.stderr, flush=True)


def _measure_item(
    whole: Variant, variants: list[Variant], item: Item | Prompt
) -> Iterator[tuple[Variant, dict[str, float]]]:
    if isinstance(item, Prompt):
        yield from _measure_kl(whole, variants, item)
        return
    assert item.question is not None
    for variant in variants:
        started = time.monotonic()
        variant.enter()
        figures = answer(variant.llm, Tokenizer(variant.llm), item.question, variant.boundary)
        yield variant, {**figures, "seconds": time.monotonic() - started}


def _measure_kl(whole: Variant, variants: list[Variant], prompt: Prompt) -> Iterator[tuple[Variant, dict[str, float]]]:
    whole.enter()
    llm = whole.llm
    tokens = encode_chat(llm, [{"role": "user", "content": prompt.text}], CONTEXT)
    written = Meter(llm, {}).answer(tokens, steps.ANSWER)
    expected = log_softmax(llm.score(tokens, written, pop=False))
    for variant in variants:
        started = time.monotonic()
        variant.enter()
        found = log_softmax(variant.llm.score(tokens, written, boundary=variant.boundary))
        figures = dataclasses.asdict(compare(found, expected, written))
        yield variant, {**figures, "seconds": time.monotonic() - started}


def _format_seconds(results: Results, variants: list[Variant]) -> str:
    """Returns a table of the mean time that an item has taken."""
    rows: list[list] = [["seconds per item", *(variant.name for variant in variants)]]
    for task in results.tasks():
        row: list = [task]
        for variant in variants:
            items = results.items(task, [variant.name])
            row.append(f"{results.column(task, variant.name, 'seconds', items).mean():.2f}" if items else "N/A")
        rows.append(row)
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    sys.exit(main())
