"""README and docs: links lead somewhere, figures are those of the raw runs, examples run, the command line's page is what --help says."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf.bench.report import summarize
from pypop_gguf.bench.runs import read_csv
from pypop_gguf.cli import main
from pypop_gguf.status import PopStatus, Timings
from tests.support.paths import ROOT
from tools import cli_docs

PAGES = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "third_party/README.md")
]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "reading.md")  # a part of quality.md
EXAMPLES = ["README.md", "docs/index.md", "docs/python.md", "docs/faq.md"]
COLUMNS = [
    ("llama-3.2-1b-q4_k_m", 1),
    ("llama-3.2-1b-q8_0", 3),
    ("llama-3.1-8b-q4_k_m", 5),
]  # model, cell of its speed-up


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as both GitHub and mkdocs name them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_command_line_is_what_help_says():
    assert (ROOT / "docs" / "cli.md").read_text() == cli_docs.page(), "run `python -m tools.cli_docs docs/cli.md`"


def test_first_screen_names_demo_and_test():
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    assert re.search(r"^ +make demo\b", screen, re.MULTILINE) and re.search(r"^ +make test\b", screen, re.MULTILINE)


@pytest.fixture(scope="module")
def measured() -> dict:
    """(model, prompt tokens, sequences): the case of the raw runs that tables show, the continued one where both were measured."""
    cases = {}
    for setting, found in summarize(read_csv(ROOT / "bench" / "epyc-zen4-2-cores.csv")).items():
        for case in sorted(found, key=lambda case: case.way, reverse=True):  # continued over repeated
            cases[setting.model, case.n_prompt, case.n_parallel] = case
    return cases


@pytest.mark.parametrize("page, n_rows", [("README.md", 5), ("docs/speed.md", 8)])
def test_speed_ups_are_those_of_the_raw_runs(measured, page, n_rows):
    rows = re.findall(r"^\| (\d+)(, eight at once)? \|(.+)\|$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) == n_rows
    for n_prompt, eight, rest in rows:
        cells = ["", *(cell.strip() for cell in rest.split("|"))]
        for model, at in COLUMNS:
            case = measured.get((model, int(n_prompt), 8 if eight else 1))
            ratio = case and case.speedup
            if case is None:
                expected = ["N/A", ""]
            elif case.runs == 1:
                expected = [f"{ratio.value:.2f} (one round)", f"{case.bound:.2f}"]
            else:
                expected = [f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", f"{case.bound:.2f}"]
            assert cells[at : at + 2] == expected, (n_prompt, model)


def test_reading_beside_writing_is_of_the_raw_runs(measured):
    mixed = measured["llama-3.2-1b-q4_k_m", 128, 8].mixed
    ratio = f"{mixed.speedup.value:.2f} [{mixed.speedup.low:.2f}, {mixed.speedup.high:.2f}]"
    said = f"{mixed.baseline_tokens_per_s:.0f} tokens a second in stock, {mixed.pop_tokens_per_s:.0f} with POP, {ratio}"
    assert said in (ROOT / "docs" / "speed.md").read_text()


def test_python_page_names_every_argument_and_field():
    from pypop_gguf import PopLlama

    text = (ROOT / "docs" / "python.md").read_text()
    names = {field.name for kind in (PopStatus, Timings) for field in dataclasses.fields(kind)} | set(
        Timings().as_dict()
    )
    for method in (PopLlama.__init__, PopLlama.create_completion, PopLlama.create_chat_completion, PopLlama.score):
        parameters = inspect.signature(method).parameters.values()
        names |= {
            f"{parameter.name}={parameter.default}"
            for parameter in parameters
            if parameter.kind == parameter.KEYWORD_ONLY
        }
    missing = [name for name in sorted(names) if not re.search(rf"(?<!\w){name}(?!\w)", text)]
    assert not missing


@pytest.fixture(scope="module")
def model_directory(bundled_gguf, tmp_path_factory) -> Path:
    """A directory with the model.gguf of the examples."""
    directory = tmp_path_factory.mktemp("examples")
    arguments = ["convert", bundled_gguf, "--boundary", "8", "--no-importance", "--outfile", directory / "model.gguf"]
    assert main([*map(str, arguments)]) == 0
    return directory


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(model_directory, page):
    blocks = re.findall(r"^```python\n(.+?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=model_directory, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_site_builds_and_reads_offline(tmp_path):
    pytest.importorskip("material", reason='mkdocs-material is not installed: pip install ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:  # links may lead away; what a page loads may not
        loaded = re.findall(
            r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\s\">]+)|<link\b[^>]*\bhref=\"?([^\s\">]+)", page.read_text()
        )
        away = [source for pair in loaded for source in pair if re.match(r"(https?:)?//", source)]
        assert not away, page
