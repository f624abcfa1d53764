"""Faults of the machine: killed runs, full and read-only disks, too little memory, files cut short, forks, libraries.

A target is always the old file or the whole new one, and the next run removes what a killed run has left.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pypop_gguf import PopError
from pypop_gguf.gguf_files.writer import replacing
from tests.commands.test_bad_input import error_line

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and mounts of Linux")
TEXTS = "Once upon a time there was a small frog who could not jump, and all the other frogs laughed at him. " * 40


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pypop_gguf", *map(str, arguments)]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a piece of Python in a process of its own, which may die without llama.cpp starting a debugger."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory) -> Path:
    """The bundled model with a boundary."""
    path = tmp_path_factory.mktemp("faults") / "model.gguf"
    assert (
        subprocess.run(
            command("convert", bundled_gguf, "--boundary", 8, "--outfile", path), capture_output=True
        ).returncode
        == 0
    )
    return path


# Runs that are killed with SIGKILL


def kill_at_random(arguments: list[str], directory: Path, seconds: float, seed: int) -> bool:
    """Kills a run at a random time, or shortly after it has begun to write. Returns whether that was before its end."""
    moment = random.Random(seed)
    for path in directory.glob("*.part*"):
        path.unlink()  # else it could not be seen when the run begins to write
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if seed % 3 == 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.uniform(0, seconds))
    else:
        while process.poll() is None and not any(name.endswith(".part") for name in os.listdir(directory)):
            time.sleep(0.0005)
        time.sleep(moment.uniform(0, 0.03))
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["copy", "quantize", "tune"])
def test_killed_run_leaves_the_old_file_or_the_whole_new_one(bundled_gguf, model, tmp_path, what, kills):
    (tmp_path / "texts.txt").write_text(TEXTS)
    target, source = tmp_path / "out" / "target.gguf", model if what == "tune" else bundled_gguf
    target.parent.mkdir()
    to_target = {
        "copy": ["convert", source, "--boundary", 7],
        "quantize": ["convert", source, "--boundary", 7, "--outtype", "q8_0"],
        "tune": [
            "tune",
            source,
            "--text",
            tmp_path / "texts.txt",
            "--max-kl",
            9,
            "--boundary",
            6,
            "--samples",
            2,
            "--context",
            64,
            "--threads",
            1,
        ],
    }[what]
    run = command(*to_target, "--outfile", target)
    began = time.monotonic()
    assert subprocess.run(run, capture_output=True).returncode == 0
    seconds, new = time.monotonic() - began, target.read_bytes()

    old, killed = source.read_bytes(), 0
    for seed in range(kills):
        target.write_bytes(old)
        killed += kill_at_random(run, target.parent, seconds, seed)
        assert target.read_bytes() in (old, new)
        assert {path.name for path in target.parent.iterdir()} <= {
            "target.gguf",
            "target.gguf.part",
            "target.gguf.part-quantized",
        }
    assert killed > kills // 3
    assert subprocess.run(run, capture_output=True).returncode == 0
    assert [path.name for path in target.parent.iterdir()] == ["target.gguf"] and target.read_bytes() == new


STOPPED_AT_EACH_STEP = """
import itertools, os, signal, sys
from pathlib import Path
from pypop_gguf.gguf_files.writer import part_path, replace_together, writing

directory, how = Path(sys.argv[1]), sys.argv[2]
model, adapter, projector = targets = [directory / name for name in ("m.gguf", "m.pop-b4.gguf", "mmproj-m.gguf")]

def write(text):
    with writing(model) as part:
        parts = {model: part, adapter: part_path(model, "adapter"), projector: part_path(model, "projector")}
        for path in (*parts.values(), part_path(model, "16bit")):
            path.write_text(text)
        replace_together(parts)

def stopped_at(step):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.scandir", "fcntl.flock"):
            count += 1
            if count == step:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
    child = os.fork()
    if not child:
        sys.addaudithook(hook)
        try:
            write("new")
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

states = set()
for step in itertools.count(1):
    write("old")
    stopped = stopped_at(step)
    found = [path.read_text() if path.exists() else None for path in targets]
    assert found[0] in ("old", "new") and set(found[1:]) <= {found[0], None}, (step, found)
    left = [path for path in directory.iterdir() if path not in targets and path.read_text()]
    assert how == "kill" or not left, (step, left)
    states.add(tuple(found))
    write("newest")
    assert {path: path.read_text() for path in directory.iterdir()} == dict.fromkeys(targets, "newest"), step
    if not stopped:
        break
print(step - 1, len(states))
"""


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_run_killed_or_interrupted_at_any_step_leaves_a_model_with_its_own_companions_or_none(tmp_path, how):
    result = python(STOPPED_AT_EACH_STEP, tmp_path, how)
    assert result.returncode == 0, result.stderr
    steps, states = map(int, result.stdout.split())
    assert steps > 15 and states >= 5  # old, old without one and without both, new without both and without one, new


def test_killed_eval_leaves_nothing(model, tmp_path):
    (tmp_path / "texts.txt").write_text(TEXTS)
    before, seen = model.read_bytes(), sorted(model.parent.iterdir())
    run = command("eval", model, tmp_path / "texts.txt", "--samples", 2, "--context", 64, "--threads", 1)
    for seed in range(0, 6, 2):
        kill_at_random(run, tmp_path, 3, seed)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
    assert sorted(model.parent.iterdir()) == seen and model.read_bytes() == before


def test_second_run_for_a_target_is_refused_while_the_first_lives_and_replaces_what_a_killed_one_left(tmp_path):
    hold = "import sys, time; from pathlib import Path; from pypop_gguf.gguf_files.writer import replacing\n"
    hold += (
        "with replacing(Path(sys.argv[1])) as part: part.write_text('half'); print('held', flush=True); time.sleep(60)"
    )
    target = tmp_path / "a.gguf"
    process = subprocess.Popen([sys.executable, "-c", hold, str(target)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(PopError, match=rf"another run is writing {target}: wait until it has ended"), replacing(target):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["half"]
    with replacing(tmp_path / "b.gguf") as part:  # another target is written all the same
        part.write_text("b")
    process.kill()
    process.wait()
    process.stdout.close()
    with replacing(target) as part:
        part.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.gguf": "whole", "b.gguf": "b"}


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 30 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("name", ["convert", "prepare"])
def test_disk_that_is_too_small_is_told_before_anything_is_written(bundled_gguf, small_disk, name):
    (small_disk / "filler").write_bytes(bytes(20 << 20))
    done = subprocess.run(
        command(name, bundled_gguf, "--boundary", 7, "--outfile", small_disk / "a.gguf"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "not enough space in" in error_line(done.stderr)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_disk_that_fills_up_while_it_is_written_leaves_the_old_file(bundled_gguf, small_disk):
    """After the first bytes have been written, another program fills the disk."""
    code = """
import pathlib, sys
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files import writer as gguf_copy
source, disk = map(pathlib.Path, sys.argv[1:])
gguf_copy._CHUNK_BYTES = 1 << 20
def fill(done, total):
    if not (disk / "filler").exists():
        try: (disk / "filler").write_bytes(bytes(30 << 20))
        except OSError: pass
try: gguf_copy.copy_with_metadata(source, disk / "target.gguf", PopMetadata(boundary=7), fill)
except PopError as error: print(error)
"""
    (small_disk / "target.gguf").write_bytes(b"what stood here before")
    done = python(code, bundled_gguf, small_disk)
    assert done.stdout.strip() == f"cannot write {small_disk / 'target.gguf'}: No space left on device"
    assert {path.name for path in small_disk.iterdir()} == {"target.gguf", "filler"}
    assert (small_disk / "target.gguf").read_bytes() == b"what stood here before"


def test_permission_that_is_lost_while_writing_leaves_the_old_file(bundled_gguf):
    """The code runs as a user who is not root, because root may write anywhere."""
    code = """
import os, pathlib, sys
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
directory = pathlib.Path(sys.argv[1])
if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
def lose(done, total):
    if done == total: directory.chmod(0o500)
try: copy_with_metadata(directory / "source.gguf", directory / "target.gguf", PopMetadata(boundary=7), lose)
except PopError as error: print(error)
"""
    with tempfile.TemporaryDirectory() as base:  # other users cannot enter pytest's own directories
        directory = Path(base, "out")
        directory.mkdir()
        shutil.copy(bundled_gguf, directory / "source.gguf")
        (directory / "target.gguf").write_bytes(b"what stood here before")
        os.chmod(base, 0o755)
        if os.geteuid() == 0:
            os.chown(directory, 65534, 65534)
        done = python(code, directory)
        assert done.stdout.strip() == f"cannot write {directory / 'target.gguf'}: Permission denied", done.stderr
        assert (directory / "target.gguf").read_bytes() == b"what stood here before"


# Memory

LIMITED = """
import resource, sys
from pypop_gguf import PopError, PopLlama
def limit(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
one = dict(n_threads=1, n_threads_batch=1, verbose=False)
"""


@pytest.mark.parametrize(
    ("megabytes", "n_ctx", "reason"),
    [(300, 2**20, "insufficient memory"), (60, 2048, "insufficient memory"), (5, 256, "Cannot allocate memory")],
)
def test_context_that_does_not_fit_into_memory_is_an_error(model, megabytes, n_ctx, reason):
    code = LIMITED + "import pypop_gguf.llama; limit(int(sys.argv[2]))\n"
    code += "try: PopLlama(sys.argv[1], n_ctx=int(sys.argv[3]), n_batch=2048, n_ubatch=2048, **one)\n"
    code += "except PopError as error: print(error)"
    done = python(code, model, megabytes, n_ctx)
    assert (
        done.returncode == 0 and reason in done.stdout and done.stdout.startswith((str(model), f"cannot read {model}"))
    ), done


def test_work_that_outgrows_memory_ends_in_upstreams_abort(model):
    """ggml's CPU backend allocates its work buffer with `new`, and nothing catches the exception that this throws."""
    code = (
        LIMITED
        + "llm = PopLlama(sys.argv[1], n_ctx=2048, n_batch=2048, n_ubatch=2048, flash_attn=False, **one)\n"
        + "limit(int(sys.argv[2]))\n"
    )
    code += "llm.eval([5 + i % 1000 for i in range(2000)]); print(llm.n_tokens)"
    assert python(code, model, 200).stdout == "2000\n"
    done = python(code, model, 4)
    assert done.returncode == -signal.SIGABRT and "std::bad_alloc" in done.stderr


# Files cut short


@pytest.mark.parametrize("use_mmap", [True, False])
def test_file_cut_short_under_a_running_model(model, tmp_path, use_mmap):
    """If the file is mapped, the system kills the process. If it was read into memory, nothing happens."""
    copy = shutil.copy(model, tmp_path / "copy.gguf")
    code = "import os, sys; from pypop_gguf import PopLlama\n"
    code += (
        f"llm = PopLlama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, use_mmap={use_mmap}, verbose=False)\n"
    )
    code += "os.truncate(sys.argv[1], 1_000_000); llm.eval(list(range(5, 100))); print(llm.n_tokens)"
    done = python(code, copy)
    if use_mmap:
        assert done.returncode == -signal.SIGBUS
    else:
        assert (done.returncode, done.stdout) == (0, "95\n"), done.stderr


def test_file_cut_short_before_it_is_loaded_is_refused_at_every_length(model, tmp_path):
    from pypop_gguf import PopLlama

    whole = model.read_bytes()
    for length in [*random.Random(3).sample(range(len(whole)), 24), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(PopError, match=r"damaged or cut short|not a GGUF file"):
            PopLlama(str(tmp_path / "cut.gguf"), verbose=False)


# The native library

WITHOUT = """
import shutil, sys
from pathlib import Path
from pypop_gguf import library
vendor = Path(shutil.copytree(library.vendor_dir(), Path(sys.argv[1], "_vendor"), symlinks=True))
library.vendor_dir = lambda: vendor
lib = vendor / "llama_cpp" / "lib"
{fault}
try: import pypop_gguf.llama
except ImportError as error: print(error)
"""
FAULTS = {
    "missing": ("(lib / 'libllama.so').unlink()", "build it again"),
    "part missing": ("(lib / 'libggml-cpu.so').unlink()", "build it again"),
    "damaged": ("(lib / 'libllama.so').write_bytes(b'not a library')", "build it again"),
    "all missing": ("shutil.rmtree(lib)", "build it again"),
    # The library asks the loader for this file in place of one that it needs and has: same length, another name.
    "no driver": (
        "file = lib / 'libllama.so'; file.write_bytes(file.read_bytes().replace(b'libggml.so\\0', b'libcuda.so\\0'))",
        "libcuda.so is missing): install the driver",
    ),
}


@pytest.mark.parametrize(("fault", "mend"), FAULTS.values(), ids=FAULTS)
def test_library_that_cannot_be_loaded_is_an_import_error_that_names_the_mend(tmp_path, fault, mend):
    done = python(WITHOUT.format(fault=fault), tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    assert mend in done.stdout and str(tmp_path) in done.stdout


def test_library_without_pop_is_refused(tmp_path, stock):
    """An unpatched build has taken the place of the carried one."""
    from tests.support.paths import STOCK

    fault = f"shutil.rmtree(lib); shutil.copytree({str(STOCK / 'llama_cpp' / 'lib')!r}, lib)"
    done = python(WITHOUT.format(fault=fault), tmp_path)
    assert done.returncode == 0 and "a build without POP" in done.stdout, done.stderr


# Forks

FORKED = """
import os, signal, sys
from pypop_gguf import PopError, PopLlama
llm = PopLlama(sys.argv[1], n_ctx=64, n_threads=2, n_threads_batch=2, verbose=False)
llm.create_completion("Once", max_tokens=2)
calls = [lambda: llm.create_completion("Once", max_tokens=2), lambda: llm.eval([5, 6]), lambda: llm.score([5], [6]),
         lambda: llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=2),
         lambda: next(llm.generate([5, 6]))]
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    for call in calls:
        try: call(); print("went on", flush=True)
        except PopError as error: print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(len(llm.create_completion("Once", max_tokens=2)["choices"]))
"""


def test_model_that_was_loaded_before_a_fork_is_refused_in_the_child(model):
    """A child process has none of the model's threads, so a computation would wait for them for ever."""
    done = python(FORKED, model)
    lines = done.stdout.splitlines()
    assert (
        len(lines) == 6 and lines[-1] == "1" and all("before a fork" in line and "spawn" in line for line in lines[:5])
    ), done


def test_model_is_loaded_in_a_child_of_a_fork(model):
    code = """
import os, sys
from pypop_gguf import PopLlama
pid = os.fork()
if pid == 0:
    llm = PopLlama(sys.argv[1], n_ctx=64, n_threads=2, verbose=False)
    print(llm.create_completion("Once", max_tokens=2)["usage"]["completion_tokens"], flush=True)
    os._exit(0)
print(os.waitpid(pid, 0)[1])
"""
    assert python(code, model).stdout == "2\n0\n"
