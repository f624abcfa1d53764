"""What the benchmark records and computes, on a tiny random model. How long anything takes is not judged here."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from pypop_gguf import PopError, PopLlama, library
from pypop_gguf.bench import report as bench_report
from pypop_gguf.bench import runs as bench_runs
from pypop_gguf.cli import main
from pypop_gguf.commands import random_model
from pypop_gguf.gguf_files import quantize
from tests.support.paths import ROOT, STOCK

WORKER = ROOT / "pypop_gguf" / "bench" / "worker.py"
TYPES = ("q4_k_m", "q8_0", "q4_0", "f16")
STOCK_OPTIONS = ["--stock", str(STOCK)] if (STOCK / "llama_cpp" / "lib").is_dir() else []
needs_stock = pytest.mark.skipif(
    not STOCK_OPTIONS, reason="the unpatched llama-cpp-python is not built: run `make test`"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Writes a model of the tiny geometry in each type."""
    base = tmp_path_factory.mktemp("random")
    for outtype in TYPES:
        assert main(["random-model", "tiny", str(base / f"{outtype}.gguf"), "--outtype", outtype]) == 0
    return {outtype: base / f"{outtype}.gguf" for outtype in TYPES}


def ask_worker(model: Path, *requests: dict, ours: bool = True) -> list[dict]:
    """Returns a worker's answers to these requests, after it has loaded the model with a context of 40 tokens."""
    load = {"request": "load", "model": str(model), "ours": ours, "n_threads": 1, "n_ubatch": 512, "flash_attn": "off"}
    context = {"request": "context", "n_prompt": 32, "n_decode": 8, "n_parallel": 1, "unified": False}
    done = subprocess.run(
        [sys.executable, WORKER],
        input="".join(json.dumps(request) + "\n" for request in (load, context, *requests)),
        env={**os.environ, "PYTHONPATH": "" if ours else str(STOCK), "POP_KERNELS": "off"},
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(requests) + 2 and not any("error" in answer for answer in answers), (
        answers,
        done.stderr,
    )
    return answers[2:]


def prefill(boundary: int | None = None) -> dict:
    return {"request": "prefill", "n_prompt": 32, "boundary": boundary}


def tensor_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("outtype", TYPES)
def test_random_model_of_each_type_has_finite_logits(tiny, outtype):
    # The worker itself refuses logits that are not finite.
    off, pruned = ask_worker(tiny[outtype], prefill(), prefill(4))
    assert (off["pruned"], pruned["pruned"]) == (0, 31)
    assert off["logits_sha256"] != pruned["logits_sha256"]


def test_random_model_has_a_token_for_each_number(tiny):
    llm = PopLlama(str(tiny["q8_0"]), pop_boundary=4, n_ctx=64, verbose=False)
    tokens = llm.tokenize(b"17 4 200")
    assert tokens == [1, 259 + 17, 259 + 4, 259 + 200] and llm.detokenize(tokens[1:]) == b" 17 4 200"
    llm.close()


@pytest.mark.parametrize("name", ["qwen3-8b", "gemma-3-12b"])
def test_random_model_of_other_architectures_loads_and_is_pruned(tmp_path, name):
    small = dict(n_layer=7, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, head_dim=64, n_vocab=512)
    path = tmp_path / "small.gguf"
    random_model.write_model(dataclasses.replace(random_model.GEOMETRIES[name], **small), name, path, "q4_k_m")
    assert ask_worker(path, prefill(5))[0]["pruned"] == 31


@pytest.mark.parametrize("outtype", ["q4_k_m", "q8_0", "q4_0"])
def test_random_model_has_the_tensor_types_that_llama_cpp_gives(tiny, tmp_path, outtype):
    quantize.quantize(tiny["f16"], tmp_path / "quantized.gguf", outtype)
    assert tensor_types(tiny[outtype]) == tensor_types(tmp_path / "quantized.gguf")


def test_random_model_is_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main(["random-model", "tiny", str(tmp_path / name), "--layers", "1", "--seed", seed]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@needs_stock
def test_worker_with_pop_off_equals_stock_bit_for_bit(tiny):
    requests = [prefill(), {"request": "decode", "n": 2}, prefill()]
    ours, stock = (ask_worker(tiny["q4_k_m"], *requests, ours=ours) for ours in (True, False))
    assert [answer.get("logits_sha256") for answer in ours] == [answer.get("logits_sha256") for answer in stock]


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory) -> tuple[Path, str]:
    """Runs the command once. Returns its CSV and what it has printed."""
    path = tmp_path_factory.mktemp("bench") / "runs.csv"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pypop_gguf",
            "bench",
            tiny["q4_0"],
            "--prompt",
            "32",
            "--parallel",
            "2",
            "--boundary",
            "4,6",
            "--runs",
            "2",
            "--decode",
            "2",
            "--threads",
            "1",
            "--repeat",
            "--mixed",
            "--kernels",
            "off",
            "--csv",
            path,
            *STOCK_OPTIONS,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_bench_records_every_run(measured):
    with measured[0].open() as file:
        rows = list(csv.DictReader(file))
    baseline = "stock" if STOCK_OPTIONS else "off"
    found = [(row["phase"], row["engine"], row["boundary"]) for row in rows]
    control = [("control", baseline, "0"), ("control", f"{baseline}-2", "0")]
    before = [("before", baseline, "0"), ("before", "pop-off", "0")]
    ways = [(name, boundary) for boundary in ("4", "6") for name in ("pop", "pop-repeat")]
    turns = [[(phase, *way) for way in [(baseline, "0"), *ways, ("pop-off", "0")]] for phase in ("main", "mixed")]
    assert found == control + control[::-1] + before + [way for turn in turns for way in turn + turn[::-1]]
    assert {row["flash_attn"] for row in rows} == {"auto"}
    assert all("POP_KERNELS=off" in row["version"] for row in rows)
    assert all(float(row["ttft_ms"]) > 0 and float(row["decode_ms_per_token"]) > 0 for row in rows)
    pruned = [row for row in rows if row["phase"] == "main" and row["engine"] in ("pop", "pop-repeat")]
    assert all(0 < float(row["flops_ratio"]) < 1 for row in pruned)
    # With "pop", the last tokens are in the pruned pass; with "pop-repeat", they are in a pass of their own.
    ratios = {(row["engine"], row["boundary"]): float(row["flops_ratio"]) for row in pruned}
    assert ratios["pop", "4"] > ratios["pop-repeat", "4"]
    assert all(float(row["plan_ms"]) > 0 for row in pruned)


def test_bench_tables_show_the_limit_and_name_the_baseline(measured):
    assert "limit: the speed-up to expect if time were proportional to operations" in measured[1]
    assert ("stock llama.cpp in a process of its own" in measured[1]) == bool(STOCK_OPTIONS)
    assert ("no --stock given" in measured[1]) == (not STOCK_OPTIONS)
    lines = [line.split() for line in measured[1].splitlines() if line.strip().startswith("32 ")]
    ways = [["32", "2", boundary, way] for boundary in ("4", "6") for way in ("continued", "repeated")]
    assert [line[:4] for line in lines] == ways * 3
    assert all(float(line[4]) > 0 and float(line[5]) > 0 for line in lines[-4:])  # tokens per second


def test_from_csv_gives_the_same_tables_and_a_plot(measured, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", "--from-csv", str(measured[0]), "--plot", str(tmp_path / "figure.png")]) == 0
    assert capsys.readouterr().out == measured[1]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_json_output_has_what_the_tables_show(measured, capsys):
    assert main(["bench", "--from-csv", str(measured[0]), "--json"]) == 0
    (setting,) = json.loads(capsys.readouterr().out)
    assert [(case["boundary"], case["way"]) for case in setting["cases"]] == [
        (4, "continued"),
        (4, "repeated"),
        (6, "continued"),
        (6, "repeated"),
    ]
    assert all(
        case["speedup"]["low"] <= case["speedup"]["value"] <= case["speedup"]["high"] for case in setting["cases"]
    )


def test_one_round_has_one_run_of_each_engine_and_names_the_type_of_the_cache(tiny, tmp_path, capsys):
    command = ["bench", str(tiny["q8_0"]), "--boundary", "4", "--prompt", "32", "--parallel", "1", "--decode", "1"]
    command += ["--runs", "1", "--threads", "1", "--cache-type", "Q8_0", "--csv", str(tmp_path / "runs.csv")]
    assert main(command) == 0
    runs = bench_runs.read_csv(tmp_path / "runs.csv")
    assert [(run.phase, run.engine) for run in runs] == [("main", "off"), ("main", "pop"), ("main", "pop-off")]
    assert all("cache in Q8_0" in run.setting.version for run in runs)
    assert "cache in Q8_0" in capsys.readouterr().out
    assert main([*command, "--flash-attn", "off"]) == 1
    assert "--cache-type Q8_0 needs flash attention" in capsys.readouterr().err


def test_interrupted_bench_keeps_its_rows_and_prints_what_it_has(tiny, tmp_path):
    path = tmp_path / "runs.csv"
    # The shell may have started the tests with Ctrl-C ignored, and children inherit that.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from pypop_gguf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "bench", tiny["q8_0"], "--prompt", ",".join(map(str, range(32, 64)))]
    command += ["--parallel", "1", "--runs", "1", "--decode", "1", "--threads", "1", "--csv", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    n_lines, n_of_first_case = 0, 4  # the header, and one run of each engine
    while n_lines < n_of_first_case and process.poll() is None:
        time.sleep(0.05)
        n_lines = len(path.read_text().splitlines()) if path.exists() else 0
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "interrupted after" in err, err
    assert len(bench_runs.read_csv(path)) >= n_of_first_case - 1
    assert "time to the first token" in out


def test_existing_csv_is_continued_and_a_foreign_one_refused(measured, tmp_path):
    first = bench_runs.read_csv(measured[0])
    copy = tmp_path / "copy.csv"
    copy.write_bytes(measured[0].read_bytes())
    recorder = bench_runs.Recorder(copy)
    recorder.add(first[0])
    recorder.close()
    assert bench_runs.read_csv(copy) == [*first, first[0]]
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PopError, match="not a table of this version"):
        bench_runs.Recorder(tmp_path / "foreign.csv")


def stock_setting() -> bench_runs.Setting:
    return bench_runs.Setting("cpu", "model", "F16", 8, 1, 512, "off", 2, "1", "stock")


def runs_of(engine: str, times_ms: list[float], decode_ms: float, flops_ratio: float | None = None):
    boundary = 6 if engine.startswith("pop") else 0
    for turn, ttft_ms in enumerate(times_ms):
        yield bench_runs.Run(
            "s", "t", stock_setting(), "main", engine, boundary, 64, 1, turn, ttft_ms, decode_ms, flops_ratio, 0.9, None
        )


@pytest.mark.parametrize(
    ("engine", "flops_ratio", "limit_ms"),
    [
        ("pop-repeat", 0.7, 80.0),
        ("pop", 0.7, 72.5),
        ("pop", None, None),
    ],
)
def test_limit_is_the_share_of_operations_plus_one_token(engine, flops_ratio, limit_ms):
    # One token takes 10 ms, and 2 of 8 layers remain for a continued one. Medians ignore the outlier.
    stock = runs_of("stock", [100.0, 99.0, 900.0], 10.0)
    pop = runs_of(engine, [90.0, 89.0, 91.0], 10.0, flops_ratio)
    limit, reached = limit_ms and 100 / limit_ms, limit_ms and limit_ms / 90
    ((case,),) = bench_report.summarize([*stock, *pop]).values()
    assert case.speedup.value == pytest.approx(100 / 90)
    assert case.speedup.low <= case.speedup.value <= case.speedup.high
    assert (case.limit, case.reached) == (pytest.approx(limit), pytest.approx(reached))
    assert case.planning == pytest.approx(0.01)
    assert ("N/A" in bench_report.format_tables(stock_setting(), [case]).splitlines()[7]) == (limit is None)


def refused(capsys, *arguments: object) -> str:
    assert main(["bench", *map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boundary", "0"], "--boundary 0 is out of range"),
        (["--boundary", "4,9"], "--boundary 9 is out of range"),
        (["--prompt", "1"], "--prompt 1 is out of range"),
        (["--prompt", "4090"], "--prompt 4090 is out of range"),
        (["--decode", "0"], "--decode 0 is out of range"),
        (["--parallel", "64", "--ubatch", "32"], "--parallel 64 is out of range"),
        (["--stock", "nowhere"], "--stock nowhere: no llama_cpp package in it"),
        (["--csv", "nowhere/runs.csv"], "cannot write nowhere/runs.csv"),
        (["--from-csv", "nowhere.csv"], "--from-csv measures nothing"),
    ],
)
def test_bad_options_are_refused_in_one_line(tiny, capsys, options, message):
    assert message in refused(capsys, tiny["q8_0"], *options)


def test_missing_files_are_refused_in_one_line(capsys):
    assert "nowhere.gguf: no such file" in refused(capsys, "nowhere.gguf")
    assert "nowhere.csv: cannot read it" in refused(capsys, "--from-csv", "nowhere.csv")
    assert "give a GGUF file to measure" in refused(capsys)


def test_patched_library_is_no_stock(tiny, capsys):
    options = ["--stock", library.vendor_dir(), "--prompt", "32", "--parallel", "1"]
    assert "its llama.cpp has POP" in refused(capsys, tiny["q8_0"], *options).splitlines()[-1]


def test_plot_without_matplotlib_is_refused_before_measuring(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--plot needs matplotlib" in refused(capsys, tiny["q8_0"], "--plot", tmp_path / "figure.png")


def cancel_bench(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.bench_cancel", *map(str, options)], capture_output=True, text=True
    )


def test_cancel_bench_records_every_abort(tiny, tmp_path):
    path = tmp_path / "cancel.csv"
    options = ["--boundary", 4, "--prompt", 1024, "--ubatch", 64, "--aborts", 2, "--threads", 1, "--csv", path]
    done = cancel_bench(tiny["q8_0"], *options)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["abort"]) for row in rows] == [
        (engine, i) for engine in ("python", "server") for i in "01"
    ]
    assert all(float(row[name]) > 0 for row in rows for name in ("latency_ms", "micro_batch_ms", "rss_mib"))
    assert done.stdout.count("next answer equals the one before the aborts") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ubatch", 0], "--ubatch 0: give numbers from 1"),
        (["--aborts", 0], "--aborts 0 is out of range"),
        (["--prompt", 4096, "--csv", "nowhere/cancel.csv"], "nowhere/cancel.csv"),
    ],
)
def test_cancel_bench_refuses_bad_options_in_one_line(tiny, options, message):
    done = cancel_bench(tiny["q8_0"], "--boundary", 4, *options)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
