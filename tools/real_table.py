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
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypop_gguf import PopLlama, library, native
from pypop_gguf.errors import PopError
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.measure import Meter
from pypop_gguf.fitting.texts import encode_chats, read_prompts
from pypop_gguf.quality.answers import answer
from pypop_gguf.quality.builtin import make_recall_task, make_tracking_task
from pypop_gguf.quality.results import WHOLE, Results, name_variant
from pypop_gguf.quality.score import Tokenizer, compare, log_softmax
from pypop_gguf.quality.tasks import Item, Question, make_id, read_task, report_skipped
from pypop_gguf.terminal import aligned, available_cores, integer_list
from tests.support.paths import ROOT
from tools.real_models import MODELS, fetch
from tools.real_quality import make_prompts

FILES = ("mmlu", "hellaswag", "gsm8k", "humaneval", "hotpotqa")
LENGTHS = {"recall-500": 500, "recall-2000": 2000, "tracking-500": 500}  # tokens
KL = "kl"
TASKS = (*FILES, *LENGTHS, KL)
SHARES = (1 / 4, 1 / 3, 1 / 2)  # of the layers that are skipped
KINDS = {
    "plain": "the skipped layers' own projections, as in the paper",
    "head": "the same, and the first token runs all layers",
    "fitted": "fitted projections, and the first token runs all layers",
    "completed": "the same, and 64 tokens of the cache are completed before each further token of a written answer",
    "removed": "a third of the layers removed for prompt and answer: those that POP skips",
    "shortgpt": "a third of the layers removed for prompt and answer: those of least influence",
}
CONTEXT = 2560
KEPT = ROOT / "build" / "table"
RESULTS = ROOT / "bench" / "real"
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

    def measures(self, item: Item | Prompt) -> bool:
        return not self.writes_only or (isinstance(item, Item) and isinstance(item.question, Question))

    def enter(self) -> None:
        """Sets the context of the model up for this variant."""
        native.clear_adapters(self.llm.ctx)
        if self.adapter is not None:
            native.add_adapter(self.llm.ctx, self.adapter)
        native.set_ends(self.llm.ctx, n_head=self.head, n_tail=1)


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer, which the whole model writes, shows the KL divergence."""

    id: str
    text: str


Work = tuple[str, "Item | Prompt"]  # the name of the task, and one of its items


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
    variants = list(_open_variants(arguments.model, source, boundaries, arguments.variants, arguments.threads))
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


def _open_variants(
    name: str, source: Path, boundaries: list[int], kinds: list[str], n_threads: int
) -> Iterator[Variant]:
    """Yields the variants that were asked for, the whole model first."""
    fits = "fitted" in kinds or "completed" in kinds
    adapters = {boundary: KEPT / f"{name}.b{boundary}.gguf" for boundary in boundaries} if fits else {}
    missing = {boundary: path.with_suffix(".part") for boundary, path in adapters.items() if not path.exists()}
    if missing:
        llm = steps.open_whole(source, n_threads)
        steps.fit(llm, source, read_prompts(llm, None, steps.CONTEXT)[0], missing)
        llm.close()
        for boundary, part in missing.items():
            part.replace(adapters[boundary])
    llm = _open(source, n_threads)
    n_layer = llm.pop.n_layer
    yield Variant(WHOLE, llm, n_layer)
    for boundary in sorted(boundaries, reverse=True):
        if "plain" in kinds:
            yield Variant(name_variant(boundary, n_layer), llm, boundary)
        if "head" in kinds:
            yield Variant(name_variant(boundary, n_layer, head=steps.HEAD), llm, boundary, steps.HEAD)
        if "fitted" in kinds:
            adapter = native.adapter_init(llm.model, adapters[boundary])
            label = name_variant(boundary, n_layer, fitted=True, head=steps.HEAD)
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
    [tokens] = encode_chats(llm, [[{"role": "user", "content": prompt.text}]], CONTEXT)
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
