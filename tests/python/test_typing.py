"""What mypy sees in a program that uses the package, which is laid out as in a wheel."""

import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from pypop_gguf import library
from tests.support.paths import ROOT

PROGRAM = """
import threading
from typing_extensions import assert_type

from pypop_gguf import Cancelled, PopError, PopLlama, PopStatus, Timings

llm = PopLlama("model.gguf", n_ctx=4096, pop_boundary=8)
assert_type(llm.pop, PopStatus)
assert_type(llm.timings, Timings)
assert_type(llm.timings.prefill_ms, float | None)
assert_type(llm.tokenize(b"Once"), list[int])  # the parent's
assert_type(PopLlama.from_pretrained("repository", "*.gguf"), PopLlama)

done = llm.create_completion("Once", max_tokens=4, pop=False, progress=lambda done, total: done < 100)
assert_type(done["choices"][0]["text"], str)
assert_type(done["timings"]["pruned_n"], int)
assert_type(llm("Once", boundary="lossless")["timings"]["prompt_ms"], float | None)
for chunk in llm.create_completion("Once", stream=True, cancel=threading.Event()):
    assert_type(chunk["choices"][0]["text"], str)
answer = llm.create_chat_completion([{"role": "user", "content": "Who?"}], temperature=0)
assert_type(answer["choices"][0]["message"]["content"], str | None)
for part in llm.create_chat_completion([{"role": "user", "content": "Who?"}], stream=True):
    assert_type(part["model"], str)
error: PopError = Cancelled(1, 2)
"""
WRONG = {
    "a misspelt argument": ('PopLlama("model.gguf", pop_bondary=8)', "pop_bondary"),
    "a boundary of another kind": ('PopLlama("model.gguf", pop_boundary="deep")', "pop_boundary"),
    "a misspelt argument of a call": ('PopLlama("model.gguf")("Once", temprature=0)', "temprature"),
    "a stream taken for a result": ('PopLlama("model.gguf")("Once", stream=True)["choices"]', "not indexable"),
    "a name that is not there": ('PopLlama("model.gguf").popp', "popp"),
}


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy on the package in an environment of its own, where no editable install hooks into imports."""
    base = tmp_path_factory.mktemp("typing")
    venv.create(base / "venv", with_pip=False)
    packages = next((base / "venv").glob("lib/python*/site-packages"))
    shutil.copytree(
        ROOT / "pypop_gguf", packages / "pypop_gguf", ignore=shutil.ignore_patterns("__pycache__", "_vendor")
    )
    (packages / "pypop_gguf" / "_vendor").symlink_to(library.vendor_dir())
    shutil.copy(ROOT / "third_party" / "pypop_gguf.pth", packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--python-executable",
            base / "venv" / "bin" / "python",
            *arguments,
        ]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=base)

    return run


def test_types_of_a_program_resolve(mypy):
    done = mypy("-c", PROGRAM)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("line, complaint", WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_found(mypy, line, complaint):
    done = mypy("-c", f"from pypop_gguf import PopLlama\n{line}\n")
    assert done.returncode == 1 and complaint in done.stdout, done.stdout


def test_stub_takes_what_the_parent_takes(mypy):
    done = mypy("-p", "pypop_gguf.llama")
    assert done.returncode == 0, done.stdout


def test_stub_says_what_the_code_does():
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "pypop_gguf.llama"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
