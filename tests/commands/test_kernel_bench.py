"""tools/kernel_bench.py with a peer. The peer is a script that prints what stock llama.cpp's llama-bench has printed.

The output was recorded from the llama-bench of the pinned llama.cpp with `-p 32 -n 0 -t 1 -r 1 -o json`, cut to some of
its fields.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from pypop_gguf import PopError
from pypop_gguf.cli import main as pop_gguf
from tests.support.paths import STOCK
from tools import kernel_bench
from tools.prompt_bench import peer_speed

RECORDED = """\
[
  {
    "build_commit": "0c1e570",
    "model_type": "llama 256M Q4_1",
    "n_threads": 1,
    "flash_attn": -1,
    "n_prompt": 32,
    "n_gen": 0,
    "avg_ns": 891837172,
    "stddev_ns": 0,
    "avg_ts": 35.880989,
    "stddev_ts": 0.000000,
    "samples_ns": [ 891837172 ],
    "samples_ts": [ 35.881 ]
  }
]
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script of the peer needs a first line that names Python")


@pytest.fixture
def peer(tmp_path):
    """Writes a peer with this output and status; it keeps its arguments in a file. Returns its path."""

    def write(output: str, status: int = 0) -> Path:
        program = tmp_path / "llama-bench"
        code = f"import json, sys\njson.dump(sys.argv[1:], open({str(tmp_path / 'asked.json')!r}, 'w'))\n"
        code += f"print({output!r})\nprint('out of memory', file=sys.stderr)\nsys.exit({status})\n"
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(0o755)
        return program

    return write


def test_speed_is_that_of_the_prompt(peer, tmp_path):
    other = json.dumps([{"n_prompt": 64, "n_gen": 0, "avg_ts": 1.0}, *json.loads(RECORDED)])
    for output in (RECORDED, "a line of another kind\n" + RECORDED, other):
        assert peer_speed(f"{peer(output)} -fa 1", Path("model.gguf"), 32, 2) == 35.880989
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked == ["-fa", "1", "-m", "model.gguf", "-p", "32", "-n", "0", "-t", "2", "-r", "1", "-o", "json"]


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [(RECORDED, 1, "ended with status 1: out of memory"), ("hello", 0, "printed no speed"), ("[{}]", 0, "no speed")],
)
def test_program_that_is_no_llama_bench_is_refused(peer, output, status, message):
    with pytest.raises(PopError, match=message):
        peer_speed(str(peer(output, status)), Path("model.gguf"), 32, 1)
    with pytest.raises(PopError, match="give the path of a llama-bench"):
        peer_speed("/nowhere/llama-bench", Path("model.gguf"), 32, 1)


@pytest.mark.skipif(not (STOCK / "llama_cpp" / "lib").is_dir(), reason="needs the stock build of `make test`")
def test_table_has_every_engine_with_its_share(peer, tmp_path, capsys, monkeypatch):
    model = tmp_path / "tiny.gguf"
    assert pop_gguf(["random-model", "tiny", str(model), "--outtype", "q4_0"]) == 0
    monkeypatch.setattr(kernel_bench, "peak", lambda: 1e-6)  # a slow core, so that every share can be read
    options = ["--model", str(model), "--peer", str(peer(RECORDED)), "--rows", "32", "--rounds", "2"]
    assert kernel_bench.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1]: cells for cells in (line.split() for line in lines[-3:])}
    assert list(rows) == ["stock", "ours", "peer"]
    assert rows["peer"][2:5] == ["35.9", "35.9", "35.9"]
    shares = [float(cells[5].rstrip("%")) / float(cells[2]) for cells in rows.values()]
    assert shares == pytest.approx([shares[0]] * 3, rel=0.01)  # the same operations in every engine
