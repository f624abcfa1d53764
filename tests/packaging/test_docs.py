"""Checks README and docs: links have targets, README shows measured figures, examples run, pages are current."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf.cli import main
from pypop_gguf.quality.results import Results, name_variant
from pypop_gguf.status import PopStatus, Timings
from tests.support.pages import cells, section, table_rows
from tests.support.paths import ROOT
from tools import cli_docs, platforms
from tools.equal_quality import read_measured
from tools.quality_rows import make_rows, mean_score

PAGES = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "third_party/README.md")
]
# tools/quality_page.py copies reading.md into quality.md, where its links are checked.
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "reading.md")
EXAMPLES = ["README.md", "docs/index.md", "docs/python.md", "docs/faq.md"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """Return the page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as both GitHub and mkdocs name them."""
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


def test_table_of_platforms_is_what_its_rows_say():
    said = (ROOT / "docs" / "platforms.md").read_text()
    assert said == platforms.page(), "run `python -m tools.platforms docs/platforms.md`"


def test_install_section_names_demo_and_test():
    commands = section("README.md", "Install")
    assert re.search(r"^ +make demo\b", commands, re.MULTILINE)
    assert re.search(r"^ +make test\b", commands, re.MULTILINE)


# The boundaries that `pop-gguf prepare` has chosen
CHOSEN = {"smollm2-135m": 24, "qwen2.5-coder-0.5b": 18, "qwen2.5-coder-1.5b": 21}


def test_readme_shows_what_prepare_has_chosen():
    expected = []
    for setting, (cases, costs) in read_measured(ROOT / "bench/real-epyc-2-cores.csv", ROOT / "bench/real/kl").items():
        [name] = [name for name in CHOSEN if name in setting.model.lower()]
        boundary = CHOSEN[name]
        times = {case.n_prompt: case for case in cases if (case.boundary, case.n_parallel) == (boundary, 1)}
        speedups = [f"{times[n].speedup.value:.2f} ({times[n].off_after.value:.2f})" for n in (128, 512, 2048)]
        results = Results(ROOT / "bench" / "real" / f"{name}.jsonl")
        variant = name_variant(boundary, setting.n_layer, fitted=True, head=1)
        [row] = [row for row in make_rows(name, results) if row.variant == variant]
        before, loss = 100 * mean_score(results), row.mean_loss
        after = f"{before:.1f} -> {before + 100 * loss.value:.1f} [{100 * loss.low:+.1f}, {100 * loss.high:+.1f}]"
        model = re.sub(r"\.(Q\w+)$", r", \1", setting.model)
        skipped = f"{setting.n_layer - boundary} of {setting.n_layer}"
        expected.append([model, skipped, *speedups, f"{costs['fitted'][boundary]:.4f}", after])
    shown = [row for row in table_rows("README.md") if len(row) == 7 and "->" in row[6]]
    assert sorted(shown) == sorted(expected)


def test_readme_costs_are_those_of_the_page_about_the_fit():
    def rows(text: str) -> list[list[str]]:
        return [
            cells(row)[:5]
            for row in re.findall(r"^\| *(\S.*? of \d+ \| [\d.]+ \| [\d.]+ \| [\d.]+% .+) \|$", text, re.MULTILINE)
        ]

    shown = rows(section("README.md", "What it costs"))
    assert len(shown) >= 9
    assert shown == rows(section("docs/fitted-projections.md", "What it brings"))


def test_python_page_names_every_argument_and_field():
    from pypop_gguf import PopLlama

    text = (ROOT / "docs" / "python.md").read_text().replace('"', "")  # texts are in quotes there
    names = {field.name for kind in (PopStatus, Timings) for field in dataclasses.fields(kind)}
    names |= set(Timings().as_dict())
    for method in (
        PopLlama.__init__,
        PopLlama.create_completion,
        PopLlama.create_chat_completion,
        PopLlama.score,
        PopLlama.complete_cache,
    ):
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
    """Return a directory with the model.gguf of the examples."""
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
    pytest.importorskip("material", reason="mkdocs-material is not installed: run `make docs` once")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} <= {page.name for page in pages}
    for page in pages:  # links may lead elsewhere, but a page may load nothing from there
        loaded = re.findall(
            r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\s\">]+)|<link\b[^>]*\bhref=\"?([^\s\">]+)", page.read_text()
        )
        away = [source for pair in loaded for source in pair if re.match(r"(https?:)?//", source)]
        assert not away, page
