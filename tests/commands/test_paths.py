"""Names of files: what the file system takes loads everywhere, or one line says that the file has to be renamed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf import PopError, PopLlama, cli
from pypop_gguf.errors import shell_path
from pypop_gguf.gguf_files.metadata import read_metadata

GOLDEN = Path(__file__).parents[1] / "golden" / "pop-v1.gguf"
NAMES = [
    "with space.gguf",
    "Käse 文.gguf",
    "new\nline.gguf",
    "-dash.gguf",
    "q'uote\".gguf",
    "[a]*?.gguf",
    "$(x);&`y`.gguf",
    "%s{ftype}{}.gguf",
    "back\\slash.gguf",
    "~home.gguf",
    "no suffix",
    "1.GGUF",
    "x" * 246 + ".gguf",
]
NOT_UTF8 = os.fsdecode(b"caf\xe9.gguf")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other names")


def copy_to(directory: Path, name: str) -> Path:
    try:
        return Path(shutil.copy(GOLDEN, directory / name))
    except OSError:
        pytest.skip("this file system does not take the name")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_model_of_any_name_loads(tmp_path, name, kind):
    path = copy_to(tmp_path, name)
    llm = PopLlama(kind(path), n_ctx=64, verbose=False)
    llm.eval([1, 2])
    assert llm.model_path == str(path) and llm.pop.enabled
    llm.close()


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF8])
def test_commands_take_any_name_and_print_commands_that_a_shell_takes(tmp_path, name, capsys, monkeypatch):
    path = copy_to(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "--", name]) == 0
    if len(name) > 240:
        assert cli.main(["convert", "--boundary", "2", "--outfile", name, "--", name]) == 1
        assert re.search("name; give a shorter one\n$", capsys.readouterr().err)
        return
    assert cli.main(["convert", "--boundary", "2", f"--outfile={name}", "--", name]) == 0
    printed = capsys.readouterr()
    command = next(line for line in printed.out.splitlines() if line.startswith("next ")).removeprefix("next ").strip()
    bash = shutil.which("bash")
    if bash:
        words = subprocess.run([bash, "-c", f"printf '%s\\0' {command}"], capture_output=True, cwd=tmp_path).stdout
        assert os.path.abspath(os.fsdecode(words.split(b"\0")[2])) == str(path)
    assert read_metadata(path).boundary == 2
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_name_that_is_not_utf8_is_to_be_changed(tmp_path, capsys):
    path = copy_to(tmp_path, NOT_UTF8)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox.")
    with pytest.raises(PopError, match=r"caf\\udce9\.gguf: this name is not UTF-8 text, .*: rename it$"):
        PopLlama(path, verbose=False)
    with pytest.raises(PopError, match=r"rename it$"):
        PopLlama(GOLDEN, lora_path=path, verbose=False)
    for command in (["chat"], ["serve"], ["eval", str(text)], ["tune", "--text", str(text), "--max-kl", "1"]):
        assert cli.main([command[0], str(path), *command[1:]]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("rename it")


@pytest.mark.parametrize("name", ["a b", "-a", "a'b", "a\nb", "a", "ä", NOT_UTF8])
def test_path_in_a_command_is_one_word_of_one_line(name):
    word = shell_path(name)
    assert "\n" not in word and word.isprintable()
    if name.isprintable():
        assert shlex.split(word) == [f"./{name}" if name.startswith("-") else name]
