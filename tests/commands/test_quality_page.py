"""The page docs/quality.md: its cells are what the files of results say."""

import json
import random

import pytest

pytest.importorskip("matplotlib")
from pypop_gguf.quality.results import Results
from tools import quality_page, quality_plots, real_table


def write_results(path, n_items: int, lost: int) -> None:
    """Writes results of which the pruned variant loses the first ``lost`` questions of GSM8K."""
    header = {"model": "SmolLM2-135M-Instruct.Q4_1.gguf", "layers": 30, "bytes": 1, "fingerprint": "0"}
    rows = []
    for i in range(n_items):
        for variant, score in (("whole", 1.0), ("b20", float(i >= lost)), ("b20 fitted head 1", 1.0)):
            rows.append(("gsm8k", f"{i}-0", variant, {"exact_match": score}))
            kl = {"whole": 0.0, "b20": 0.25}.get(variant, 0.01) * random.Random(i).choice((0.5, 1.5))
            rows.append(("kl-code", f"{i}-0", variant, {"kl": kl, "top1": 1.0}))
    rows.append(("gsm8k", "99-0", "whole", {"exact_match": 0.0}))  # It has no pair, so it changes no difference.
    keys = ("task", "item", "variant", "figures")
    lines = [json.dumps(header), *(json.dumps(dict(zip(keys, row))) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_page_has_paired_differences_and_the_budget_that_they_allow(tmp_path, monkeypatch):
    write_results(tmp_path / "smollm2-135m.jsonl", 20, lost=8)
    out = tmp_path / "quality.md"
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / "reading.md").write_text("## Reading\n\nBy hand.\n")
    monkeypatch.setattr("sys.argv", ["quality_page", "--results", str(tmp_path), "--out", str(out)])
    assert quality_page.main() == 0
    text = out.read_text()
    [row] = [line.split(" | ") for line in text.splitlines() if line.startswith("| GSM8K")]
    assert row[1] == "21" and row[2].startswith("95.2 [")
    assert row[3].startswith("**-40.0 [") and row[4].startswith("+0.0 [+0.0, +0.0]")
    assert "b 20, plain" in text and "b 20, fitted" in text and "By hand." in text
    assert "over 1 row, no task loses" in text and "GSM8K loses 40.0 points" in text
    for name in ("kl.png", "losses.png"):
        assert (tmp_path / "quality" / name).read_bytes().startswith(b"\x89PNG")


def write_rows(path, layers: int, rows: list[tuple]) -> None:
    header = {"model": "model.gguf", "layers": layers, "bytes": 1, "fingerprint": "0"}
    keys = ("task", "item", "variant", "figures")
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in (header, *(dict(zip(keys, row)) for row in rows))))


def test_further_parts_show_ablations_ranks_of_layers_and_what_a_fit_depends_on(tmp_path):
    # The importance has the order of the measured costs, and the influence has the reverse order.
    rows = [("scores", f"layer {il}", "whole", {"importance": il + 1.0, "influence": 9.0 - il}) for il in range(4)]
    for item in ("0", "1"):
        rows += [("code", item, f"layer {il}", {"kl": 0.1 * il + 0.01, "top1": 1.0}) for il in range(4)]
        rows.append(("code", item, "POP", {"kl": 0.25, "top1": 0.75}))
    write_rows(tmp_path / "ablations" / "smollm2-135m.jsonl", 4, rows)
    rows = [("kinds: code", "0", name, {"kl": kl}) for name, kl in (("plain", 0.5), ("code", 0.125), ("all", 0.25))]
    write_rows(tmp_path / "sensitivity" / "smollm2-135m.jsonl", 4, rows)
    text = "\n".join(quality_page.further_sections(tmp_path))
    assert "| POP | 0.250 [0.250, 0.250] | 75.0% |" in text and "| layer 1 |" not in text
    assert "| importance of `convert` | 1.00 [1.00, 1.00] | 1.00" in text and "ShortGPT | -1.00 [-1.00" in text
    assert "| Prompts of | Prompts | Plain | Fitted to code | Fitted to all |" in text
    assert "| code | 1 | 0.5000 [0.5000, 0.5000] | 0.1250 [0.1250, 0.1250] | 0.2500" in text
    assert ": lengths" not in text


def test_a_model_with_scores_alone_gets_a_plot(tmp_path):
    rows = [("scores", f"layer {il}", "whole", {"importance": 4.0 - il, "influence": 1.0}) for il in range(4)]
    write_rows(tmp_path / "ablations" / "smollm2-135m.jsonl", 4, rows)
    text = "\n".join(quality_page.further_sections(tmp_path))
    assert "model.gguf: importance of its layers" in text and "(quality/layers-model.png)" in text
    results = Results(tmp_path / "ablations" / "smollm2-135m.jsonl")
    quality_plots.plot_layers(results, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_page_without_results_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality_page", "--results", str(tmp_path), "--out", str(tmp_path / "q.md")])
    assert quality_page.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run python -m tools.real_table" in error


def test_counts_of_single_tasks_override_the_common_one():
    counts = real_table._read_counts("20,mmlu=300")
    assert (counts["mmlu"], counts["gsm8k"], counts["kl"]) == (300, 20, 20)
