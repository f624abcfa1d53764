"""Measures on what a fit depends: the kind of the texts, the length of the prompt, and the weights' type.

Each is measured with a third of the layers skipped, as the KL divergence to the whole model over the answers that it
writes, on the prompts of `real_quality`. The figures go to bench/real/sensitivity/MODEL.jsonl, and a run that was
interrupted goes on where it stopped.

`kinds` compares fits on code alone, on all other bundled texts and on all, each on as many tokens as the code has.
`lengths` measures prompts of several lengths, which ask for a summary of essays.
`types` fits to F16, Q8_0 and Q4_0 copies of the model, which llama-quantize writes from the weights as they are, and
uses each fit on each copy.

    python -m tools.fit_sensitivity smollm2-135m kinds --data DATA
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from pypop_gguf import PopLlama, library
from pypop_gguf.fitting import steps, texts
from pypop_gguf.fitting.measure import Meter
from pypop_gguf.quality.results import Results
from pypop_gguf.statistics import bootstrap_mean
from pypop_gguf.terminal import aligned, available_cores, check_ranges, integer_list
from tests.support.paths import ROOT
from tools.real_models import MODELS, fetch
from tools.real_quality import make_prompts, read_essays
from tools.real_variants import KEPT, quantize_once
from tools.reporting import one_line_errors

RESULTS = ROOT / "bench" / "real" / "sensitivity"
FIT_TEXTS = Path(texts.__file__).with_name("data") / "fit.jsonl"
TYPES = ("F16", "Q8_0", "Q4_0")
TITLES = {"kinds": "Prompts of", "lengths": "Tokens of the prompt", "types": "Used on"}


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("by", choices=TITLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="prompts of each kind or length (10)")
    parser.add_argument("--lengths", type=integer_list, default=[100, 500, 2000, 8000], help="tokens of the prompts")
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    check_ranges(arguments, prompts=1, lengths=(64, None), threads=1)
    source = fetch(arguments.model)
    n_layer = library.describe_model(source).n_layer
    arguments.boundary = n_layer - round(n_layer / 3)
    for directory in (KEPT, RESULTS):
        directory.mkdir(parents=True, exist_ok=True)
    results = Results(RESULTS / f"{arguments.model}.jsonl", source)
    {"kinds": by_kinds, "lengths": by_lengths, "types": by_types}[arguments.by](arguments, source, results)
    print("\n".join(aligned(make_rows(results, arguments.by))))
    return 0


def by_kinds(arguments: argparse.Namespace, source: Path, results: Results) -> None:
    llm = steps.open_whole(source, arguments.threads)
    rows = [json.loads(line) for line in FIT_TEXTS.read_text(encoding="utf-8").splitlines()]
    chosen = {
        "code": [row for row in rows if row["kind"] == "code"],
        "all but code": [row for row in rows if row["kind"] != "code"],
        "all": rows,
    }
    encoded = {
        name: texts.encode_chats(llm, [row["messages"] for row in some], steps.CONTEXT) for name, some in chosen.items()
    }
    n_tokens = sum(map(len, encoded["code"]))
    for name, prompts in encoded.items():
        meter = _fit(llm, source, _spread(prompts, n_tokens), arguments, f"fit-{name.replace(' ', '-')}")
        for kind, number, text in make_prompts(arguments.data, arguments.prompts):
            _measure(results, llm, meter, f"kinds: {kind}", number, text, arguments.boundary, name)


def by_lengths(arguments: argparse.Namespace, source: Path, results: Results) -> None:
    llm = steps.open_whole(source, arguments.threads)
    _fit(llm, source, texts.read_prompts(llm, None, steps.CONTEXT)[0], arguments, f"b{arguments.boundary}")
    llm.close()
    essays = "\n\n".join(read_essays())
    longest = max(arguments.lengths) + steps.ANSWER
    llm = PopLlama(
        str(source),
        pop=False,
        pop_adapter=False,
        pop_head=steps.HEAD,
        n_ctx=longest,
        n_batch=longest,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )
    meter = Meter(llm, {arguments.boundary: _kept(arguments, f"b{arguments.boundary}")})
    tokens = llm.tokenize(essays.encode(), add_bos=False)
    for number in range(arguments.prompts):
        for length in arguments.lengths:
            # The question and the chat template take about 40 tokens of a prompt.
            start = number * longest % (len(tokens) - longest)
            part = llm.detokenize(tokens[start : start + length - 40]).decode(errors="replace")
            text = f"Summarize this text in three sentences.\n\n{part}"
            _measure(results, llm, meter, f"lengths: {length}", number, text, arguments.boundary, "all")


def by_types(arguments: argparse.Namespace, source: Path, results: Results) -> None:
    copies = {name: quantize_once(source, _kept(arguments, name), name, ["--allow-requantize"]) for name in TYPES}
    for fitted_to, copy in copies.items():
        llm = steps.open_whole(copy, arguments.threads)
        _fit(llm, copy, texts.read_prompts(llm, None, steps.CONTEXT)[0], arguments, f"fit-{fitted_to}")
        llm.close()
    for used_on, copy in copies.items():
        llm = steps.open_whole(copy, arguments.threads)
        for fitted_to in TYPES:
            meter = Meter(llm, {arguments.boundary: _kept(arguments, f"fit-{fitted_to}")})
            for kind, number, text in make_prompts(arguments.data, arguments.prompts):
                item = f"{kind} {number}"
                _measure(results, llm, meter, f"types: {used_on}", item, text, arguments.boundary, fitted_to)
        llm.close()


def _kept(arguments: argparse.Namespace, name: str) -> Path:
    return KEPT / f"{arguments.model}.{name}.gguf"


def _fit(llm: PopLlama, source: Path, prompts: list[list[int]], arguments: argparse.Namespace, name: str) -> Meter:
    """Fits once and keeps the adapter."""
    adapter = _kept(arguments, name)
    if not adapter.exists():
        part = adapter.with_suffix(".part")
        steps.fit(llm, source, prompts, {arguments.boundary: part})
        part.replace(adapter)
    return Meter(llm, {arguments.boundary: adapter})


def _spread(prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """Returns prompts from all over the list, about ``n_tokens`` tokens in all."""
    step = max(1.0, sum(map(len, prompts)) / n_tokens)
    return [prompts[int(i * step)] for i in range(int(len(prompts) / step))]


def _measure(
    results: Results, llm: PopLlama, meter: Meter, task: str, item: object, text: str, boundary: int, name: str
) -> None:
    """Measures one prompt, plain and with a fit of this name."""
    if results.get(task, str(item), name) is None:
        tokens = texts.encode_chat(llm, [{"role": "user", "content": text}], llm.n_ctx())
        print(f"{task}, fitted on {name}, prompt {item}", file=sys.stderr)
        cost = meter.measure(tokens, steps.ANSWER)[boundary]
        results.add(task, str(item), "plain", dataclasses.asdict(cost.plain))
        results.add(task, str(item), name, dataclasses.asdict(cost.fitted))


def make_rows(results: Results, by: str) -> list[list[str]]:
    """Returns the KL divergence by task and fit, with 95% intervals over the prompts. The first row is the heading."""
    tasks = [task for task in results.tasks() if task.startswith(f"{by}: ")]
    fits = _used(results, tasks)
    rows = [[TITLES[by], "Prompts", "Plain", *(f"Fitted to {fit}" for fit in fits[1:])]]
    for task in tasks:
        cells = []
        for fit in fits:
            items = results.items(task, [fit])
            cells.append(f"{bootstrap_mean(results.column(task, fit, 'kl', items)):.4f}" if items else "N/A")
        rows.append([task.removeprefix(f"{by}: "), str(len(results.items(task, ["plain"]))), *cells])
    return rows


def _used(results: Results, tasks: Iterable[str]) -> list[str]:
    return [fit for fit in results.variants() if any(results.items(task, [fit]) for task in tasks)]


if __name__ == "__main__":
    sys.exit(main())
