"""Checks docs/speed.md and other pages with measured times or memory: their figures are those of the raw runs."""

import csv
import re
import statistics

import numpy as np
import pytest

from pypop_gguf.bench.report import summarize
from pypop_gguf.bench.runs import read_csv
from pypop_gguf.gguf_files.geometries import GEOMETRIES
from pypop_gguf.statistics import bootstrap_ratio
from tests.engine.test_kernels import FLOATS, MIN_ROWS_AVX2, MIN_ROWS_AVX_VNNI, TYPES
from tests.support.pages import cells, section, table_rows
from tests.support.paths import ROOT
from tools import bench_network, memory_table
from tools.equal_quality import BUDGETS, format_table, read_measured
from tools.layer_times import limits

# The name that README and docs/speed.md give a model, and its name in the raw runs.
MODELS = {
    "1B, Q4_K_M": "llama-3.2-1b-q4_k_m",
    "1B, Q8_0": "llama-3.2-1b-q8_0",
    "8B, Q4_K_M": "llama-3.1-8b-q4_k_m",
}
KERNEL_MODELS = {
    "SmolLM2-135M-Instruct, Q4_1": "SmolLM2-135M-Instruct.Q4_1",
    "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M": "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M",
    "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M": "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M",
    "Random weights, 1B, Q4_K_M": "1b",
}

EXACT_TITLE = "Without any change of the answer"
EXACT_MODELS = {
    "Gemma 3n E2B": "gemma-3n-e2b",
    "Gemma 3n E4B": "gemma-3n-e4b",
    "Gemma 4 E2B": "gemma-4-e2b",
    "Gemma 4 E4B": "gemma-4-e4b",
}


@pytest.fixture(scope="module")
def measured() -> dict:
    """Map (model, prompt tokens, sequences) to the case of the raw runs that the tables show.

    Where the last prompt token was measured with continuation and without, the tables show continuation.
    """
    cases = {}
    for setting, found in summarize(read_csv(ROOT / "bench" / "epyc-zen4-2-cores.csv")).items():
        for case in sorted(found, key=lambda case: case.way, reverse=True):  # "repeated" first, "continued" replaces it
            cases[setting.model, case.n_prompt, case.n_parallel] = case
    return cases


def find_case(measured: dict, model: str, prompt: str):
    n_prompt, _, eight = prompt.partition(", ")
    assert eight in ("", "eight at once")
    return measured.get((MODELS[model], int(n_prompt), 8 if eight else 1))


def speedup_and_limit(case) -> list[str]:
    if case is None:
        return ["N/A", ""]
    ratio = case.speedup
    interval = "(one round)" if case.runs == 1 else f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    return [f"{ratio.value:.2f} {interval}", f"{case.limit:.2f}"]


def test_speeds_with_kernels_match_the_raw_runs():
    cases = {
        (setting.model, case.n_prompt, f"{setting.n_layer - case.boundary} of {setting.n_layer}"): case
        for setting, found in summarize(read_csv(ROOT / "bench" / "kernels-epyc-2-cores.csv")).items()
        for case in found
    }
    rows = table_rows("docs/speed.md")
    rows = [row for row in rows if row[0] in KERNEL_MODELS and len(row) > 6 and row[3].endswith(" ms")]
    assert len(rows) >= 10
    for model, n_prompt, skipped, *shown in rows:
        case = cases[KERNEL_MODELS[model], int(n_prompt), skipped]
        times = [f"{ms:.0f} ms" for ms in (case.baseline_ms, case.pop_ms)]
        assert shown == [*times, speedup_and_limit(case)[0], f"{case.off_before.value:.2f}"], (model, n_prompt)


def test_speeds_of_the_peer_match_the_raw_runs():
    text = (ROOT / "bench" / "peers-epyc-2-cores.txt").read_text()
    measured = {}
    for part in text.split("== ")[1:]:
        model = part.splitlines()[0].replace("-Instruct", "").replace("random-model llama-3.2-1b", "Random weights, 1B")
        model = model.replace("random-model llama-3.1-8b", "Random weights, 8B")
        for n_prompt, engine, *speeds in re.findall(
            r"^ *(\d+) +(\w+) +([\d.]+) +([\d.]+) +([\d.]+)", part, re.MULTILINE
        ):
            measured.setdefault((model, n_prompt), {})[engine] = [float(speed) for speed in speeds]
    rows = {tuple(row[:2]): row[2:7] for row in table_rows("docs/speed.md") if len(row) == 8}
    rows = {case: row for case, row in rows.items() if case in measured}
    assert rows.keys() == measured.keys()
    for case, engines in measured.items():
        (stock, *_), (peer, *_), (ours, low, high) = engines["stock"], engines["peer"], engines["ours"]
        shown = [
            f"{stock:.0f}",
            f"{peer:.0f}",
            f"{ours:.0f} [{low:.0f}, {high:.0f}]",
            f"{ours / stock:.2f}",
            f"{ours / peer:.2f}",
        ]
        assert rows[case] == shown, case


def test_speeds_at_equal_quality_match_the_raw_figures():
    measured = read_measured(ROOT / "bench" / "real-epyc-2-cores.csv", ROOT / "bench" / "real" / "kl")
    expected = [cells(row) for row in format_table(measured).splitlines()]
    page = table_rows("docs/speed.md")
    shown = [[row[0].replace(", ", "."), *row[1:]] for row in page if len(row) == 7 and row[1] in map(str, BUDGETS)]
    assert shown == [[*row[:2], *row[3:]] for row in expected if row[2] == "fitted"]
    assert not any(row[3] != "none" for row in expected if row[2] == "plain")


def exact_rows() -> list[list[str]]:
    """Return the rows that docs/speed.md has of models whose upper layers share a cache, from the raw runs."""
    names = {f"{name}-q4_k_m": model for model, name in EXACT_MODELS.items()}
    by_time = limits(read_rows("exact-layers-epyc-2-cores.csv"))
    rows = []
    runs = read_csv(ROOT / "bench" / "exact-epyc-2-cores.csv")
    flops = {(run.setting.model, run.n_prompt): run.flops_ratio for run in runs if run.flops_ratio}
    for setting, cases in summarize(runs).items():
        for case in cases:
            skipped = f"{setting.n_layer - case.boundary} of {setting.n_layer}"
            times = [f"{ms:.0f} ms" for ms in (case.baseline_ms, case.pop_ms)]
            off = case.off_after.value
            row = [names[setting.model], str(case.n_prompt), skipped, *times, speedup_and_limit(case)[0], f"{off:.2f}"]
            for limit in (1 / flops[setting.model, case.n_prompt], by_time[setting.model, case.n_prompt]):
                row += [f"{limit:.2f}", f"{case.speedup.value / off / limit:.0%}"]
            rows.append(row)
    return rows


def test_exact_gains_match_the_raw_runs():
    shown = [cells(row) for row in re.findall(r"^\| Gemma .+\|$", section("docs/speed.md", EXACT_TITLE), re.MULTILINE)]
    assert sorted(shown) == sorted(exact_rows())
    for model, _, skipped, *_ in shown:
        geometry = GEOMETRIES[EXACT_MODELS[model]]
        assert skipped == f"{geometry.n_shared + 1} of {geometry.n_layer}"


def test_several_answers_at_once_match_the_raw_runs():
    speeds: dict[tuple, list[float]] = {}
    for column, instructions in enumerate(("", "avxvnni-", "avx2-")):
        for row in read_rows(f"several-epyc-{instructions}2-cores.csv"):
            ours = "POP_KERNELS=off" not in row["version"]
            case = row["model"], row["n_parallel"], 2 * column + ours
            speeds.setdefault(case, []).append(int(row["n_parallel"]) / float(row["decode_ms_per_token"]) * 1e3)
    expected: dict[tuple, dict[int, str]] = {}
    for (model, answers, column), values in sorted(speeds.items()):
        assert len(values) in (15, 19)
        expected.setdefault((model, answers), {})[column] = f"{statistics.median(values):.0f}"
    [header] = [row for row in table_rows("docs/speed.md") if row[1:2] == ["Answers at once"]]
    assert [re.sub(r",.*", "", name) for name in header[2:]] == [
        name for name in ("AVX-512 VNNI", "AVX-VNNI", "AVX2") for _ in range(2)
    ]
    rows = [row for row in table_rows("docs/speed.md") if len(row) == 8 and "-Instruct" in row[0]]
    assert {(row[0].replace(", ", "."), row[1]): dict(enumerate(row[2:])) for row in rows} == expected


def test_kernels_compute_as_few_rows_as_pay():
    """From the least number of rows on, ours are the faster kernels; below it they are not by a tenth."""
    least: dict[str, int] = {}
    measured: set[tuple[str, int]] = set()
    for line in (ROOT / "bench" / "kernels-few-rows-epyc-2-cores.txt").read_text().splitlines():
        if line.startswith("# AVX"):
            least = MIN_ROWS_AVX2 if line.startswith("# AVX2:") else MIN_ROWS_AVX_VNNI
        elif re.match(r"[A-Z]+\d", line):
            name, _, rows, off, ours, *_ = line.split()
            gain = float(ours) / float(off)
            assert gain > 1 if int(rows) >= least.get(name, 2) else gain < 1.1, line
            measured.add((name, int(rows)))
    assert {name for name, _ in measured} == {name for name in TYPES if name not in FLOATS}
    assert {(name, least.get(name, 2)) for name in TYPES if name not in (*FLOATS, "IQ1_M")} <= measured


def test_long_prompts_match_the_raw_runs():
    seconds: dict[tuple, dict[str, list[float]]] = {}
    memory: dict[tuple, dict[str, float]] = {}
    limits = {}
    for row in read_rows("long-epyc-2-cores.csv"):
        cache = "Q8_0" if "cache in Q8_0" in row["version"] else "F16"
        case = row["n_prompt"], "off" if row["flash_attn"] == "off" else "on", cache
        engine = {"stock": "stock", "stock-2": "stock", "pop": "pop"}.get(row["engine"], "all layers")
        seconds.setdefault(case, {}).setdefault(engine, []).append(float(row["ttft_ms"]) / 1e3)
        most = memory.setdefault(case, {})
        most[engine] = max(most.get(engine, 0), int(row["peak_bytes"]) / 2**20)
        if row["flops_ratio"]:
            limits[case] = 1 / float(row["flops_ratio"])
    expected = []
    for case, engines in seconds.items():
        pop = statistics.median(engines["pop"])
        times, ratios = [], []
        for runs in (engines.get("stock"), engines["all layers"]):
            median = statistics.median(runs) if runs else None
            spread = f" [{min(runs):.1f}, {max(runs):.1f}]" if runs and len(runs) > 1 else ""
            times.append(f"{median:.1f} s{spread}" if median else "N/A")
            ratios.append(f"{median / pop:.2f}" if median else "N/A")
        reached = statistics.median(engines["all layers"]) / pop / limits[case]
        peaks = [f"{memory[case][name]:.0f} MiB" if name in engines else "N/A" for name in ("stock", "pop")]
        expected.append([*case, *times, f"{pop:.1f} s", *ratios, f"{limits[case]:.2f}", f"{reached:.0%}", *peaks])
    shown = [cells(row) for row in numbered_rows(section("docs/speed.md", "Long prompts"))]
    assert sorted([row[0].replace(",", ""), *row[1:]] for row in shown) == sorted(expected)


def test_no_other_architecture_shares_caches():
    rows = [cells(row) for row in re.findall(r"^\| \S+ \| \d.+\|$", (ROOT / "docs/architectures.md").read_text(), re.M)]
    served = [(name, int(n_layer), int(lossless)) for name, n_layer, lossless, *_ in rows if lossless]
    assert f"{len(served)} served" in (ROOT / "docs/architectures.md").read_text()
    assert [name for name, n_layer, lossless in served if lossless < n_layer - 1] == []
    assert f"the {len(served)} other models" in " ".join(section("docs/speed.md", EXACT_TITLE).split())


def read_rows(name: str) -> list[dict]:
    with (ROOT / "bench" / name).open() as file:
        return list(csv.DictReader(file))


def columns_of(lines: list[str]) -> list[list[str]]:
    """Return the cells of an aligned table that a tool prints, without its header."""
    return [re.split(r" {2,}", line.strip()) for line in lines[1:]]


def test_memory_and_loading_match_the_raw_runs():
    text = section("docs/speed.md", "Memory and loading")
    rows = read_rows("memory-epyc-2-cores.csv")
    shown = [[cell.replace(",", "").replace(" MiB", "") for cell in cells(row)] for row in numbered_rows(text)]
    assert shown == columns_of(memory_table.memory_table(rows))
    names = {"stock": "Stock `Llama`", "whole": "`PopLlama(pop=False)`", "pop": "`PopLlama`"}
    loads = columns_of(memory_table.load_table(rows))
    shown = {name: rest for name, *rest in map(cells, re.findall(r"^\| .*`.+\|$", text, re.MULTILINE))}
    assert shown == {names[name]: [f"{time} ms" for time in times] for name, *times in loads}


def test_memory_on_lavapipe_matches_the_raw_runs():
    values = {}
    for row in read_rows("memory-lavapipe-2-cores.csv"):
        megabytes = f"{int(row['value']) / 1e6:.1f} MB"
        values.setdefault((f"{int(row['context']):,}", row["sequences"]), {})[row["engine"]] = megabytes
    expected = [[*case, engines["whole"], engines["pop"]] for case, engines in values.items()]
    shown = [cells(row) for row in numbered_rows(section("docs/gpu.md", "Memory"))]
    assert sorted(shown) == sorted(expected) and len(shown) == 6


def test_split_models_match_the_raw_runs():
    rows = read_rows("network-epyc-2-cores.csv")
    for row in rows:
        row |= {name: float(row[name]) for name in ("ttft_ms", "decode_ms_per_token")}
    shown = [
        [cell.replace(" ms", "") for cell in cells(row)]
        for row in numbered_rows(section("docs/server.md", "Several machines"))
    ]
    assert shown == columns_of(bench_network.table(rows))


def numbered_rows(text: str) -> list[str]:
    return re.findall(r"^\| \d.+\|$", text, re.MULTILINE)


def test_tables_of_completion_match_the_raw_runs():
    found: dict[tuple, dict[tuple, list[float]]] = {}
    for row in read_rows("completion-epyc-2-cores.csv"):
        values = found.setdefault((row["model"], row["boundary"]), {})
        values.setdefault((row["way"], row["quantity"]), []).append(float(row["value"]))
    text = section("docs/how-it-works.md", "Completing the cache later")
    rows = [cells(row)[2:] for row in re.findall(r"^\|.* ms \|$", text, re.MULTILINE)]

    def medians(values, way, digits):
        return [f"{statistics.median(values[way, quantity]):.{n}f} ms" for quantity, n in digits.items()]

    names = {"stock": "stock llama.cpp", "whole": "all layers", "off": "`off`", "answer": "`answer`"}
    digits = {"first_ms": 0, "last_ms": 0, "longest_gap_ms": 0, "median_gap_ms": 1}
    modes = [[name, *medians(values, way, digits)] for values in found.values() for way, name in names.items()]
    assert len(found) == 4 and [row for row in rows if len(row) == 5] == modes

    chunks = []
    for values in found.values():
        ways = "tokens behind chunks of 64", "tokens in chunks of 64"
        (before, longest_before), (joined, longest) = (
            medians(values, way, {"whole_ms": 0, "longest_token_ms": 0}) for way in ways
        )
        ratio = bootstrap_ratio(*(np.array(values[way, "whole_ms"]) for way in reversed(ways)))
        longest = f"{longest_before.removesuffix(' ms')} -> {longest}"
        chunks.append([before, joined, f"{ratio:.2f}", longest])
    assert [row for row in rows if len(row) == 4] == chunks


def test_whole_requests_match_the_raw_runs():
    times: dict[tuple, dict[tuple, list[float]]] = {}
    with (ROOT / "bench" / "requests-epyc-2-cores.csv").open() as file:
        for row in csv.DictReader(file):
            name = f"Chat, turn {row['part']}" if row["request"] == "chat" else row["request"].capitalize()
            of_case = times.setdefault((name, row["prompt_tokens"], row["answer_tokens"]), {})
            for column in ("first_ms", "last_ms"):
                of_case.setdefault((column, row["pop"]), []).append(float(row[column]))
    shown = [
        cells(row) for row in re.findall(r"^\| .+ ms \|.*$", section("docs/speed.md", "Whole requests"), re.MULTILINE)
    ]
    assert [tuple(row[:3]) for row in shown] == list(times)
    for row, of_case in zip(shown, times.values(), strict=True):
        for column, whole, pop in (("first_ms", row[3], row[4]), ("last_ms", row[6], row[7])):
            medians = [f"{statistics.median(of_case[column, side]):.0f} ms" for side in ("False", "True")]
            assert medians == [whole, pop], row


def test_speed_page_matches_the_raw_runs(measured):
    text = section("docs/speed.md", "Pruning alone")
    header = re.search(r"^\| Prompt tokens \|.+\|$", text, re.MULTILINE)
    models = cells(header[0])[1::2]
    rows = [cells(row) for row in re.findall(r"^\| \d.+\|$", text, re.MULTILINE)]
    assert models and rows
    for prompt, *shown in rows:
        expected = [cell for model in models for cell in speedup_and_limit(find_case(measured, model, prompt))]
        assert shown == expected, prompt


def test_speed_page_has_every_case_of_the_raw_runs(measured):
    text = section("docs/speed.md", "Pruning alone")
    for _, n_prompt, n_parallel in measured:
        prompt = f"{n_prompt}, eight at once" if n_parallel == 8 else str(n_prompt)
        assert re.search(rf"^\| {prompt} \|", text, re.MULTILINE), prompt


def test_reading_beside_writing_is_of_the_raw_runs(measured):
    mixed = measured["llama-3.2-1b-q4_k_m", 128, 8].mixed
    ratio = f"{mixed.speedup.value:.2f} [{mixed.speedup.low:.2f}, {mixed.speedup.high:.2f}]"
    stock, pop = f"{mixed.baseline_tokens_per_s:.0f}", f"{mixed.pop_tokens_per_s:.0f}"
    said = f"{stock} tokens a second in stock llama.cpp and {pop} with POP, a speed-up of {ratio}"
    assert said in " ".join((ROOT / "docs" / "speed.md").read_text().split())
