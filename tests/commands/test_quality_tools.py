"""eval and tune measure what PyTorch measures, and choose, write and refuse what they should."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama
from pypop_gguf.boundary_rules import choose_by_curve
from pypop_gguf.cli import main
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.quality import builtin, code_runner, tasks
from pypop_gguf.quality import score as quality
from pypop_gguf.quality.score import Score, Tokenizer
from tests.support import pop_reference

N_LAYER = 12
STORY = (
    "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog. "
    "One day the dog took the ball and ran to the park. "
)


@pytest.fixture
def texts(tmp_path):
    """Writes three pairs, and two lines that cannot be used."""
    path = tmp_path / "stories.jsonl"
    lines = [
        json.dumps({"prompt": STORY * (i + 1), "response": " Lily was happy and they went home together."})
        for i in range(3)
    ]
    path.write_text("\n".join([lines[0], "{broken", json.dumps({"prompt": "no answer"}), *lines[1:]]) + "\n")
    return path


def test_scores_equal_pytorch(reference_models):
    model = reference_models["bundled"]
    tokens = model.tokens(60)
    llm = PopLlama(
        str(model.gguf),
        pop_boundary=6,
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    scores = quality.score_sample(llm, Sample(tuple(tokens), 40), [6, 8])
    llm.close()
    whole, *others = (
        log_softmax(pop_reference.logits(model.torch_model, model.layers, tokens[:-1], boundary, 40))
        for boundary in (N_LAYER, 6, 8)
    )
    for boundary, log_p in zip((N_LAYER, 6, 8), (whole, *others)):
        nll = -np.mean([log_p[i, token] for i, token in enumerate(tokens[40:])])
        kl = np.mean(np.sum(np.exp(whole) * (whole - log_p), axis=1))
        assert scores[boundary].nll == pytest.approx(nll, abs=1e-4)
        assert scores[boundary].kl == pytest.approx(kl, abs=1e-4)
        assert scores[boundary].top1 == np.mean(np.argmax(whole, 1) == np.argmax(log_p, 1))
        assert scores[boundary].tokens == 20
    assert scores[6].kl > scores[8].kl > 1e-3  # The boundaries differ.


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def test_summary_is_the_mean_over_samples_with_paired_increase():
    scores = [
        {2: Score(2.0, 0.0, 1.0, 5), 1: Score(3.0, 0.5, 0.5, 5)},
        {2: Score(4.0, 0.0, 1.0, 50), 1: Score(6.0, 1.5, 0.0, 50)},
    ]
    whole, pruned = quality.summarize(scores)
    assert (whole.boundary, pruned.boundary) == (2, 1)
    assert (whole.nll.value, pruned.nll.value, pruned.kl.value, pruned.top1.value) == (3.0, 4.5, 1.0, 0.25)
    increase = pruned.loss_increase
    assert increase.value == pytest.approx(0.5)
    # Each sample rises by half, so there is no spread.
    assert increase.low == pytest.approx(0.5) and increase.high == pytest.approx(0.5)
    assert whole.loss_increase.value == 0 and pruned.kl.low == 0.5 and pruned.kl.high == 1.5
    with pytest.raises(PopError, match="no sample"):
        quality.summarize([])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (dict(max_kl=0.0), 5),
        (dict(max_kl=0.05), 4),
        (dict(max_kl=0.2), 2),
        (dict(max_loss_increase=3.0), 3),
        (dict(max_loss_increase=9.0), 1),
    ],
)
def test_lowest_boundary_within_the_budget_and_none_above_it_beyond(budget, expected):
    # At 3 the KL divergence is over 0.05, at 2 it is below again: nothing below a breach counts.
    curve = {6: (0.0, 0.0), 5: (0.0, 0.0), 4: (0.01, 0.01), 3: (0.1, 0.02), 2: (0.04, 0.05), 1: (0.3, 0.08)}
    assert choose_by_curve(6, curve, **budget).boundary == expected


def test_eval_prints_every_boundary_and_names_broken_lines(bundled_gguf, texts, capsys):
    assert (
        main(
            [
                "eval",
                "--threads",
                "1",
                str(bundled_gguf),
                str(texts),
                "--boundary",
                "6,8",
                "--recall",
                "3",
                "--context",
                "256",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "stories: 2 lines not used (line 2: not JSON" in err and 'line 3: no "response" text' in err
    rows = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in ("12", "8", "6")]
    assert [row[0] for row in rows] == ["12", "8", "6"] * 2
    assert "recall-256" in out and "N/A" in out  # The stories have no answers to check.


def test_eval_as_json_has_the_same_figures(bundled_gguf, texts, capsys):
    assert main(["eval", "--threads", "1", str(bundled_gguf), str(texts), "--boundary", "8", "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    whole, pruned = task["boundaries"]
    assert (whole["boundary"], pruned["boundary"], pruned["samples"]) == (12, 8, 3)
    assert whole["kl"]["value"] == 0 < pruned["kl"]["value"] and math.isfinite(pruned["nll"]["value"])
    assert len(task["skipped_lines"]) == 2


def test_generated_answers_are_the_boundarys_own(bundled_gguf, capsys):
    # The whole model answers each question first, and its cache must not help.
    command = [
        "eval",
        "--threads",
        "1",
        str(bundled_gguf),
        "--recall",
        "8",
        "--context",
        "128",
        "--boundary",
        "1",
        "--json",
    ]
    assert main(command) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    whole, pruned = (row["exact_match"]["value"] for row in task["boundaries"])
    assert whole > 0.5 > pruned


def test_a_longer_tail_comes_nearer_to_the_whole_model(bundled_gguf, texts, capsys):
    found = []
    for tail in ("1", "32"):
        assert (
            main(["eval", "--threads", "1", str(bundled_gguf), str(texts), "--boundary", "6", "--tail", tail, "--json"])
            == 0
        )
        found.append(json.loads(capsys.readouterr().out)["tasks"][0]["boundaries"][1]["kl"]["value"])
    assert found[1] < found[0]


def test_tune_writes_boundary_and_curve_and_draws_them(bundled_gguf, texts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = bundled_gguf.read_bytes()
    command = [
        "tune",
        "--threads",
        "1",
        str(bundled_gguf),
        "--text",
        str(texts),
        "--max-kl",
        "0.1",
        "--boundary",
        "4,8,11",
        "--tail",
    ]
    assert main([*command, "2", "--outfile", str(tmp_path / "tuned.gguf"), "--plot", str(tmp_path / "curve.png")]) == 0
    assert bundled_gguf.read_bytes() == before
    stored = read_metadata(tmp_path / "tuned.gguf")
    assert stored.curve.boundary == [11, 8, 4] and stored.tail == 2 and stored.head is None
    assert (
        stored.boundary
        == choose_by_curve(
            12, dict(zip(stored.curve.boundary, zip(stored.curve.kl, stored.curve.loss_increase))), max_kl=0.1
        ).boundary
    )
    assert stored.curve.speedup == sorted(stored.curve.speedup) and stored.curve.speedup[0] > 1
    assert main([*command, "64", "--outfile", str(tmp_path / "tail.gguf")]) == 0
    with_tail = read_metadata(tmp_path / "tail.gguf").curve.speedup
    assert all(less < more for less, more in zip(with_tail, stored.curve.speedup, strict=True))
    assert (stored.curve.samples, stored.curve.source) == (3, "stories.jsonl")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    llm = PopLlama(str(tmp_path / "tuned.gguf"), verbose=False)
    assert (llm.pop.boundary, llm.pop.tail, llm.pop.source) == (stored.boundary, 2, "file")
    llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "nan"], "--max-kl nan is out of range"),
        (["--max-loss-increase", "-1"], "--max-loss-increase -1 is out of range"),
        (["--max-kl", "1", "--boundary", "13"], "--boundary 13 is out of range: give 1 to 12"),
        (["--max-kl", "1", "--samples", "0"], "--samples 0 is out of range"),
        (["--max-kl", "1", "--context", "99999"], "--context 99999 is more than"),
        (["--max-kl", "1", "--tail", "0"], "pop_tail is 0"),
        (["--max-kl", "1", "--outfile", "nowhere/x.gguf"], "nowhere: no such directory"),
        (["--max-kl", "1", "--plot", "nowhere/x.png"], "--plot nowhere/x.png: no such directory"),
    ],
)
def test_tune_refuses_in_one_line(bundled_gguf, texts, capsys, options, message):
    assert message in refused(capsys, "tune", bundled_gguf, "--text", texts, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no usable text"), ("a b", "has no usable text (line 1: "), (None, "cannot read ")],
    ids=["empty", "too-short", "missing"],
)
def test_texts_that_cannot_be_used_are_refused_in_one_line(bundled_gguf, tmp_path, capsys, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    assert message in refused(capsys, "eval", bundled_gguf, path)
    assert message in refused(capsys, "tune", bundled_gguf, "--text", path, "--max-kl", "1")


def test_eval_without_anything_to_measure_is_refused(bundled_gguf, capsys):
    assert "nothing to measure on" in refused(capsys, "eval", bundled_gguf)


@pytest.mark.parametrize("command", ["eval", "tune"])
def test_interrupted_run_prints_what_it_has(bundled_gguf, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "long.txt").write_text(STORY * 60)
    score_sample, done = quality.score_sample, []

    def interrupted_at_the_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(None)
        return score_sample(*arguments)

    monkeypatch.setattr(quality, "score_sample", interrupted_at_the_third)
    arguments = {
        "eval": [str(tmp_path / "long.txt")],
        "tune": ["--text", str(tmp_path / "long.txt"), "--max-kl", "1", "--outfile", str(tmp_path / "x.gguf")],
    }
    assert (
        main(
            [
                command,
                str(bundled_gguf),
                *arguments[command],
                "--threads",
                "1",
                "--boundary",
                "8",
                "--context",
                "64",
                "--json",
            ]
        )
        == 130
    )
    out, err = capsys.readouterr()
    found = json.loads(out)
    (_, pruned) = (found["tasks"][0] if command == "eval" else found)["boundaries"]
    assert pruned["samples"] == 2 and pruned["kl"]["value"] > 0
    assert "interrupted" in err and not (tmp_path / "x.gguf").exists()


def test_tune_times_reads_when_asked(bundled_gguf, texts, capsys):
    command = [
        "tune",
        str(bundled_gguf),
        "--text",
        str(texts),
        "--max-kl",
        "1",
        "--threads",
        "1",
        "--boundary",
        "3",
        "--measure",
        "2",
    ]
    assert main([*command, "--json"]) == 0
    whole, pruned = json.loads(capsys.readouterr().out)["boundaries"]
    least, middle, most = pruned["measured_speedup"]
    assert whole["measured_speedup"] == [1, 1, 1] and 0 < least <= middle <= most


def test_a_plot_that_cannot_be_written_is_refused_before_measuring(bundled_gguf, texts, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    program = "import sys; from pypop_gguf.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["tune", bundled_gguf, "--text", texts, "--max-kl", "1", "--plot", closed / "x.png"]
    # Root gives up its right to write anywhere.
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        f"pop-gguf: error: --plot {closed / 'x.png'}: no permission to write there; give another --plot\n",
    )
    assert not list(closed.iterdir())


def refused(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_text_longer_than_the_context_is_cut_to_pieces(bundled_gguf, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(STORY * 60)
    assert (
        main(
            [
                "eval",
                "--threads",
                "1",
                str(bundled_gguf),
                str(tmp_path / "long.txt"),
                "--context",
                "64",
                "--samples",
                "3",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["tasks"][0]["boundaries"][0]["samples"] == 3


def is_right(question, text: str) -> bool:
    (figure,) = question.grade(text).values()
    return figure == 1


def test_questions_of_known_formats(bundled_gguf, tmp_path):
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    common = dict(max_samples=9, max_tokens=256, seed=0)

    def questions(line: dict, run_code: bool = False):
        (tmp_path / "task.jsonl").write_text(json.dumps(line))
        return tasks.read_task(Tokenizer(llm), tmp_path / "task.jsonl", run_code=run_code, **common).questions

    (sum_up,) = questions({"question": "How much is 1200 + 34?", "answer": "It is 1,234.\n#### 1,234"})
    assert sum_up.prompt == "Question: How much is 1200 + 34?\nAnswer:"
    assert (
        is_right(sum_up, " that makes #### 1234.")
        and is_right(sum_up, "1,200 and 34 are 1,234")
        and not is_right(sum_up, "#### 1235")
    )
    (code,) = questions({"prompt": "The code is", "response": " 28", "answer": "28"})
    assert is_right(code, " 28. Then") and not is_right(code, " 2") and not is_right(code, "")
    problem = {
        "prompt": "def two():\n",
        "canonical_solution": "    return 2\n",
        "test": "def check(f):\n    assert f() == 2\n",
        "entry_point": "two",
    }
    assert questions(problem) == []  # Code does not run unless the user asks for it.
    (program,) = questions(problem, run_code=True)
    assert (
        is_right(program, "    return 1 + 1\n")
        and not is_right(program, "    return 3\n")
        and not is_right(program, "    return (\n")
    )
    llm.close()


def test_code_that_does_not_end_fails():
    assert not code_runner.passes("while True: pass", seconds=1)
    assert not code_runner.passes("open('big', 'w').write('x' * (2 << 20))")
    assert not code_runner.passes("print('a\0b')")


def test_code_of_any_length_is_run():
    assert code_runner.passes("#" * 200_000 + "\nif __name__ == '__main__': print(len(input.__name__))")
    assert not code_runner.passes("#" * 200_000 + "\nraise ValueError")


def test_recall_hides_its_codes_at_every_depth(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    task = builtin.make_recall_task(Tokenizer(llm), 8, 400, seed=1)
    depths = []
    for sample, question in zip(task.samples, task.questions):
        asked = question.prompt.rsplit("code of the ", 1)[1].split()[0]
        code = question.prompt.split(f"The code of the {asked} is ")[1][:2]
        assert is_right(question, f" {code}.") and 300 < len(sample.tokens) <= 401
        depths.append(question.prompt.index(f"The code of the {asked} is ") / len(question.prompt))
    assert depths == sorted(depths) and depths[0] < 0.1 and depths[-1] > 0.6
    llm.close()


HARNESS_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
{extra}
"""


@pytest.mark.slow
def test_lm_evaluation_harness_runs_local_tasks(bundled_gguf, tmp_path, capsys):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]' in the source tree"
    )
    data = tmp_path / "data.jsonl"
    prompt = (
        "The code of the hat is 41. The code of the dog is 17.\\nWhat is the code of the dog? The code of the dog is"
    )
    data.write_text("".join(f'{{"prompt": "{prompt}", "answer": 1, "text": " 17"}}\n' for _ in range(3)))
    choices = 'doc_to_choice: ["41", "17", "99"]\nmetric_list: [{metric: acc}]'
    written = (
        'generation_kwargs: {until: ["."], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match, ignore_punctuation: true}]"
    )
    for name, kind, target, extra in (
        ("choose", "multiple_choice", "answer", choices),
        ("write", "generate_until", "text", written),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            HARNESS_TASK.format(name=name, data=data, kind=kind, target=target, extra=extra)
        )
    command = [
        "eval",
        "--threads",
        "1",
        str(bundled_gguf),
        "--lm-eval",
        "choose,write",
        "--task-dir",
        str(tmp_path),
        "--boundary",
        "1,8",
        "--json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["lm_eval"]
    assert list(found) == ["12", "1", "8"]
    assert found["12"]["choose"]["acc,none"] == found["12"]["write"]["exact_match,none"] == 1.0
    assert found["8"]["choose"]["acc,none"] == 1.0
    assert found["1"]["write"]["exact_match,none"] == 0.0  # The harness sees the effect of pruning.
    assert "no task nowhere" in refused(capsys, "eval", bundled_gguf, "--lm-eval", "nowhere")
