"""The scripts of tools/: each is described in one line of tools/README.md."""

import re

from tests.support.paths import ROOT


def test_every_script_has_one_line_in_the_readme():
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    lines = re.findall(r"^\| `(\w+)` \|", (ROOT / "tools" / "README.md").read_text(), re.MULTILINE)
    assert sorted(lines) == sorted(scripts)
