"""Checks that the tables of docs/fitting-experiments.md say what was measured."""

import json
import re
import statistics
from pathlib import Path

from pypop_gguf.bench.runs import read_csv
from tests.support.pages import cells, section
from tests.support.paths import ROOT

KL_KINDS = ("", "mathematics", "code", "recall", "summary")
KL_MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct, Q4_1", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M"}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_costs_with_a_longer_tail_match_the_raw_figures():
    shown = re.findall(r"^\| [SQ].+\|$", section("docs/fitting-experiments.md", "A longer tail"), re.MULTILINE)
    assert len(shown) == 21
    for name, skipped, tail, _, *costs in map(cells, shown):
        n_skipped, n_layer = map(int, skipped.split(" of "))
        model = next(key for key, label in KL_MODELS.items() if name.startswith(label))
        trained = ".trained" if name.endswith(", trained") else ""
        rows = read_jsonl(ROOT / "bench" / "real" / "tail" / f"{model}{trained}.tail{tail}.jsonl")
        for kind, cost in zip(KL_KINDS, costs, strict=True):
            found = [
                row["costs"][str(n_layer - n_skipped)]["fitted"]["kl"] for row in rows if kind in ("", row["kind"])
            ]
            mean = statistics.mean(found)
            assert cost == (f"{mean:.4f}" if mean < 0.1 else f"{mean:.3f}"), (name, skipped, tail, kind)


def test_costs_of_two_boundaries_match_the_raw_figures():
    costs: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for row in read_jsonl(ROOT / "bench" / "real" / "two-boundaries.jsonl"):
        variant = re.sub(r"first 0\.(\d+)", r"first \1%", row["variant"].split(": mean")[0]).removeprefix("boundary ")
        of_case = costs.setdefault((row["model"].split(".")[0][:7], variant), {})
        assert (row["task"], row["item"]) not in of_case
        of_case[row["task"], row["item"]] = row["kl"]
    text = section("docs/fitting-experiments.md", "Two boundaries in one prompt")
    shown = [cells(row) for row in re.findall(r"^\| [SQ].+\|$", text, re.MULTILINE)]
    shown = [row for row in shown if len(row) == 7]
    assert len(shown) == 18
    for name, variant, *values in shown:
        of_case = costs[name.split(".")[0][:7], variant]
        for kind, value in zip(KL_KINDS, values, strict=True):
            found = [kl for (task, _), kl in of_case.items() if task.startswith(f"kl-{kind}")]
            assert f"{statistics.mean(found):.3f}" == value, (name, variant, kind)


def test_costs_of_all_ideas_match_the_raw_figures():
    rows = read_jsonl(ROOT / "bench" / "real" / "ideas.jsonl")
    models = list(dict.fromkeys(row["model"] for row in rows))
    sizes = {"kl-": (40, 40, 24), "recall": (12, 12, 10), "hotpotqa": (12, 12, 10)}
    forms = {"kl-": ("kl", 1, ".3f"), "recall": ("exact_match", 100, ".0f"), "hotpotqa": ("f1", 100, ".0f")}
    text = section("docs/fitting-experiments.md", "All ideas at half of the layers")
    heading, *shown = [cells(row) for row in re.findall(r"^\| .+\|$", text, re.MULTILINE)]
    assert all(model.startswith(name.split(":")[0]) for model, name in zip(models, heading[2::3], strict=True))
    assert sorted(row[0] for row in shown) == sorted({row["variant"] for row in rows})
    for variant, _, *values in shown:
        expected = []
        for number, model in enumerate(models):
            mine = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
            for task, (figure, scale, form) in forms.items():
                found = {row["item"]: row[figure] for row in mine if row["task"].startswith(task)}
                assert len(found) == sizes[task][number], (variant, model, task)
                expected.append(format(scale * statistics.mean(found.values()), form))
        assert values == expected, variant


def test_times_with_a_longer_tail_match_the_raw_runs():
    runs = [
        run for run in read_csv(ROOT / "bench" / "tail-epyc-2-cores.csv") if (run.phase, run.engine) == ("main", "pop")
    ]
    text = section("docs/fitting-experiments.md", "A longer tail")
    shown = [cells(row) for row in re.findall(r"^\| \d.+\|$", text, re.MULTILINE)]
    assert len(shown) == 3
    for skipped, tail, *times in shown:
        boundary = 24 - int(skipped.split()[0])
        mine = [run for run in runs if run.boundary == boundary and run.setting.model.endswith(f" tail {tail}")]
        medians = [statistics.median(run.ttft_ms for run in mine if run.n_prompt == n) for n in (128, 512, 2048)]
        assert times == [f"{median:.0f} ms" for median in medians]
