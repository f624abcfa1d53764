"""Files of results, runs that are resumed from them, and differences between variants on the same questions."""

import itertools
import json
import math

import numpy as np
import pytest

from pypop_gguf import PopError, statistics
from pypop_gguf.cli import main
from pypop_gguf.commands import eval as command
from pypop_gguf.quality.results import Results, name_variant
from pypop_gguf.statistics import bootstrap_increase, paired_difference


def run(capsys, model, out, *options: object) -> dict:
    arguments = [
        "eval",
        model,
        "--recall",
        4,
        "--context",
        128,
        "--boundary",
        6,
        "--threads",
        1,
        "--out",
        out,
        "--json",
    ]
    assert main([*map(str, arguments), *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumed_run_measures_only_what_is_missing(bundled_gguf, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.jsonl"
    expected = run(capsys, bundled_gguf, out)
    whole = out.read_bytes()
    header, *rows = rows_of(out)
    assert header["model"] == bundled_gguf.name and len(rows) == 2 * 4
    assert {row["variant"] for row in rows} == {"whole", "b6"}
    assert set(rows[0]["figures"]) == {"nll", "kl", "top1", "tokens", "exact_match"}
    assert "code of the" not in out.read_text()  # no texts

    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # interrupted in the middle of a line
    asked, answer = [], command.answer
    monkeypatch.setattr(command, "answer", lambda *given: asked.append(given[-1]) or answer(*given))
    assert run(capsys, bundled_gguf, out) == expected
    assert len(asked) == 4 and out.read_bytes() == whole

    assert run(capsys, bundled_gguf, out) == expected and len(asked) == 4
    run(capsys, bundled_gguf, out, "--tail", 8)  # another variant, for which the whole model is not asked again
    assert len(asked) == 8 and {row["variant"] for row in rows_of(out)[9:]} == {"b6 tail 8"}


def test_run_that_scored_only_is_completed(bundled_gguf, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    scored = run(capsys, bundled_gguf, out, "--no-generate")
    assert scored["tasks"][0]["boundaries"][0]["exact_match"] is None
    assert run(capsys, bundled_gguf, out)["tasks"][0]["boundaries"][0]["exact_match"] is not None


def test_file_with_questions_of_several_sets_counts_each_by_itself(bundled_gguf, tmp_path, capsys):
    lines = [
        {"question": "How many?", "choices": ["1", "2"], "answer": 0},
        {"context": "A dog sees a ball. It", "choices": ["runs.", "is a large planet of ice."], "answer": 0},
        {"prompt": "The code of the hat is 41. The code of the hat is", "response": " 41", "answer": "41"},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, command = (
        tmp_path / "results.jsonl",
        ["eval", bundled_gguf, tmp_path / "mixed.jsonl", "--threads", 1, "--json"],
    )
    assert main([*map(str, command), "--out", str(out)]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    rows = [row["figures"] for row in rows_of(out)[1:] if row["variant"] == "whole"]
    assert [set(row) & {"accuracy", "accuracy_norm", "exact_match"} for row in rows] == [
        {"accuracy"},
        {"accuracy", "accuracy_norm"},
        {"exact_match"},
    ]
    whole = task["boundaries"][0]
    assert whole["samples"] == 3 and whole["differences"]["accuracy"]["within_noise"]
    assert whole["accuracy"]["value"] == (rows[0]["accuracy"] + rows[1]["accuracy"]) / 2
    assert whole["accuracy_norm"]["value"] == rows[1]["accuracy_norm"]


def refused(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": "other.gguf", "layers": 3}\n', "has results of other.gguf"),
        ("what\n", "line 1 is not a result"),
        ('{"precious": 1}', "is no file of results"),
        ('{"model": "a", "layers": 1}\n{"task": "t", "item": "1", "variant": "b"}\n', "line 2 is not a result"),
        (
            '{"model": "a", "layers": 1}\n{"task": "t", "item": "1", "variant": "b", "figures": {"kl": NaN}}\n',
            "line 2 is not a result",
        ),
    ],
)
def test_file_that_is_not_of_this_model_is_refused_in_one_line(bundled_gguf, tmp_path, capsys, text, message):
    out = tmp_path / "results.jsonl"
    out.write_text(text)
    assert message in refused(capsys, "eval", bundled_gguf, "--recall", 1, "--out", out)
    assert out.read_text() == text


def test_unusable_options_are_refused_in_one_line(bundled_gguf, tmp_path, capsys):
    assert "no such directory" in refused(capsys, "eval", bundled_gguf, "--recall", 1, "--out", "nowhere/x.jsonl")
    assert "Is a directory" in refused(capsys, "eval", bundled_gguf, "--recall", 1, "--out", tmp_path)
    assert "--tracking -1 is out of range" in refused(capsys, "eval", bundled_gguf, "--tracking", -1)
    for task in ("--recall", "--tracking"):
        assert "--context 32 is too short for" in refused(capsys, "eval", bundled_gguf, task, 1, "--context", 32)


def test_columns_pair_the_items_that_both_variants_have(tmp_path):
    results = Results()
    for item, variant, value in (
        ("1", "whole", 1),
        ("1", "b6", 0),
        ("2", "whole", 1),
        ("3", "b6", 1),
        ("3", "whole", 0),
    ):
        results.add("t", item, variant, {"f1": value})
    assert results.items("t", ["b6", "whole"]) == ["1", "3"]
    assert results.column("t", "b6", "f1", ["1", "3"]).tolist() == [0, 1]
    with pytest.raises(PopError, match="No such file"):
        Results(tmp_path / "nowhere" / "x.jsonl").add("t", "1", "b", {"kl": 1.0})


def test_variants_are_named_by_all_that_changes_figures():
    assert name_variant(12, 12, fitted=True, head=1) == "whole"
    assert name_variant(6, 12) == "b6" and name_variant(6, 12, fitted=True, head=1) == "b6 fitted head 1"
    assert name_variant(6, 12, tail=16) == "b6 tail 16"


def test_p_value_of_right_and_wrong_is_mcnemars():
    # 9 questions were lost and 2 won: by the binomial distribution, 2 * (1 + 11 + 55) / 2048.
    values = np.array([0.0] * 9 + [1.0] * 2 + [1.0] * 20)
    whole = np.array([1.0] * 9 + [0.0] * 2 + [1.0] * 20)
    found = paired_difference(values, whole)
    assert found.value == pytest.approx(-7 / 31)
    assert found.p_value == pytest.approx(2 * (1 + 11 + 55) / 2048) and found.within_noise
    assert found.low < found.value < found.high
    assert not paired_difference(values[:9], whole[:9]).within_noise
    assert paired_difference(whole, whole).p_value == 1


def test_p_value_of_graded_answers_is_that_of_all_exchanges_within_pairs():
    differences = np.array([-0.5, -0.25, 0.1, -0.3, -0.4, 0.05, -0.2])
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(sign * value for sign, value in zip(chosen, differences))) for chosen in signs]
    exact = np.mean([total >= abs(differences.sum()) - 1e-12 for total in sums])
    found = paired_difference(differences, np.zeros(7))
    assert found.p_value == pytest.approx(exact, abs=0.01) and math.isclose(found.value, differences.mean())


def test_intervals_do_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(1).random((2, 50))
    expected = bootstrap_increase(*values)
    monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", 700)
    assert bootstrap_increase(*values) == expected
