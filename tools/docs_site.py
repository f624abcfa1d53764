"""Adds files outside docs/ to the documentation site, under the same paths. mkdocs.yml names this file as a hook.

A link such as ``../bench/runs.csv`` in a page of docs/ works in a checkout, and this hook rewrites it for the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "third_party/*.md", "bench/*")


def on_files(files: Files, config) -> Files:
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    if page.file.generated_by:  # this page lies at the root of the repository
        return re.sub(r"\]\((\.\./)?docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")
