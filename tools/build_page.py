"""Builds llama.cpp's own web page from the pinned source with npm: ``python -m tools.build_page``, or ``make page``.

``build/page/dist`` is the page, with ``tools/page/pop.js`` in it, and ``build/page/LICENSES`` the notices of the
packages that npm has put into it. CMakeLists.txt builds the page into llama-server if it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "page" / "pop.js"
SOURCE = ROOT / "build" / "page-source"
PAGE = ROOT / "build" / "page"
# Packages whose style sheets or fonts go into the page: the maps that name the others cover scripts alone.
STYLES = ("katex", "highlight.js", "tailwindcss", "tw-animate-css")


def main() -> None:
    npm, npx = shutil.which("npm"), shutil.which("npx")
    if not npm or not npx:
        sys.exit("build_page: npm is missing: install Node.js 20 or newer, and run it again")
    fetch = ROOT / "third_party" / "fetch_source.py"
    subprocess.run([sys.executable, fetch, SOURCE, "--cache", ROOT / "build" / "sdist", "--pristine"], check=True)
    ui = SOURCE / "vendor" / "llama.cpp" / "tools" / "ui"
    built = PAGE.with_name("page.new")
    shutil.rmtree(built, ignore_errors=True)
    environment = {**os.environ, "LLAMA_UI_OUT_DIR": str(built / "dist")}

    def run(*command: str) -> None:
        print("build_page:", *command[1:], flush=True)
        if status := subprocess.run(command, cwd=ui, env=environment).returncode:
            sys.exit(f"build_page: {' '.join(command[1:])} failed with status {status}: its reason stands above")

    if not (ui / "node_modules" / ".package-lock.json").is_file():
        run(npm, "ci", "--no-audit", "--no-fund")
    run(npm, "run", "build-pwa-assets")
    run(npx, "vite", "build", "--sourcemap", "hidden")

    (built / "LICENSES").write_text(notices(ui, take_maps(built / "dist")), encoding="utf-8")
    add_script(built / "dist", SCRIPT.read_text(encoding="utf-8"))
    shutil.rmtree(PAGE, ignore_errors=True)
    built.rename(PAGE)
    size = sum(file.stat().st_size for file in PAGE.rglob("*") if file.is_file())
    print(f"build_page: the page is in {PAGE.relative_to(ROOT)}, {size / 1e6:.1f} MB")


def add_script(page: Path, script: str) -> None:
    """Puts a script into a built page, before the page's own, and into what its service worker keeps."""
    index, worker = page / "index.html", page / "sw.js"
    html = index.read_text(encoding="utf-8")
    if html.count("<head>") != 1 or "</script" in script:
        sys.exit("build_page: index.html is no longer one page with a <head>: change add_script()")
    index.write_text(html.replace("<head>", f"<head><script>{script}</script>"), encoding="utf-8")
    # The worker loads the page anew when its revision is another one.
    revision = hashlib.sha256(index.read_bytes()).hexdigest()[:32]
    text, found = re.subn(r'(\{url:"\./",revision:")[^"]*"', rf'\g<1>{revision}"', worker.read_text(encoding="utf-8"))
    if found != 1:
        sys.exit("build_page: sw.js no longer names the revision of the page: change add_script()")
    worker.write_text(text, encoding="utf-8")


def take_maps(page: Path) -> set[str]:
    """Deletes the source maps, and returns the names of the npm packages that they name."""
    packages = set(STYLES)
    for file in page.rglob("*.map"):
        for source in json.loads(file.read_text(encoding="utf-8"))["sources"]:
            if match := re.search(r".*node_modules/((?:@[^/]+/)?[^/]+)/", source):
                packages.add(match[1])
        file.unlink()
    return packages


def notices(ui: Path, packages: set[str]) -> str:
    """Returns the licences of npm packages, and of what the page's own source has copied."""
    parts = []
    for name in sorted(packages):
        directory = ui / "node_modules" / name
        about = json.loads((directory / "package.json").read_text(encoding="utf-8"))
        parts.append((f"{name} {about['version']}, {about.get('license', 'see below')}", directory))
    parts += [(directory.name, directory) for directory in sorted((ui / "src/lib/vendors").iterdir())]
    texts = ["The web page that llama-server shows is llama.cpp's (MIT, see LICENSE) and contains these packages.\n"]
    for title, directory in parts:
        if directory.is_dir():
            files = [file for file in sorted(directory.iterdir()) if re.match(r"(?i)licen[cs]e|notice", file.name)]
            texts += [title, "=" * len(title), *(file.read_text(encoding="utf-8") for file in files if file.is_file())]
    return "\n".join(texts)


if __name__ == "__main__":
    main()
