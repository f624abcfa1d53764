"""Standard streams that are closed, full, cut off, or not in UTF-8: a command works, or one line says what is wrong."""

import os
import subprocess
import sys
import time

import pytest

from tests.support.process import free_port

PROGRAM = [sys.executable, "-m", "pypop_gguf"]
SHORT = ["--threads", "1", "--context", "64"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are streams of Unix")


@pytest.fixture(scope="module")
def commands(bundled_gguf, tmp_path_factory):
    """A run of each subcommand by name; whether it reports its results on stdout."""
    base = tmp_path_factory.mktemp("streams")
    text = base / "texts.txt"
    text.write_text(
        "\n\n".join(f"Once upon a time there was a fox who had {n} maps and a river." * 4 for n in range(4))
    )
    pruned = base / "pruned.gguf"
    subprocess.run([*PROGRAM, "convert", bundled_gguf, "--boundary", "8", "--outfile", pruned], check=True)
    measured = ["--boundary", "8", "--samples", "1", *SHORT]
    return {
        "convert": ["convert", bundled_gguf, "--boundary", "7", "--outfile", base / "copy.gguf"],
        "inspect": ["inspect", pruned],
        "inspect --json": ["inspect", pruned, "--json"],
        "eval": ["eval", pruned, text, *measured],
        "tune": ["tune", pruned, "--text", text, "--max-kl", "9", *measured],
        "chat": ["chat", pruned, "--max-tokens", "4", *SHORT],
        "random-model": ["random-model", "llama-3.2-1b", "--layers", "1", "--outfile", base / "random.gguf"],
        "--help": ["--help"],
        "tune --help": ["tune", "--help"],
        "--version": ["--version"],
        "unknown": ["unknown"],
    }


NAMES = [
    "convert",
    "inspect",
    "inspect --json",
    "eval",
    "tune",
    "chat",
    "--help",
    "tune --help",
    "--version",
    "unknown",
]
every_command = pytest.mark.parametrize("name", NAMES)


def run(command, redirection="", question=b"Once upon a time", **environment):
    """Runs a command in a shell with a redirection, and returns what it has printed and its status."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *map(str, [*PROGRAM, *command])],
        input=question,
        capture_output=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        timeout=300,
    )


def assert_one_line(done):
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    return done.stderr.decode().splitlines()[-1]


@every_command
@pytest.mark.parametrize("where", ["<&- 2>&-", "2>/dev/full"])
def test_results_come_without_stderr(commands, name, where):
    expected, done = run(commands[name]), run(commands[name], where)
    if where == "<&- 2>&-" and name == "chat":  # which has no question then
        return
    assert done.returncode == expected.returncode
    assert done.stdout.split()[:3] == expected.stdout.split()[:3]


@every_command
@pytest.mark.parametrize(("where", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")])
def test_results_that_cannot_be_written_are_an_error(commands, name, where, why):
    done = run(commands[name], where)
    if name == "unknown":  # which prints nothing on stdout
        assert done.returncode == 2
        return
    line = assert_one_line(done)
    assert line == f"pop-gguf: error: cannot write to stdout: {why}; send it to an open file with space"


@every_command
def test_pipe_that_ends_early_ends_the_command_in_silence(commands, name):
    done = run(commands[name], "| true")
    assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr and b"Exception" not in done.stderr


@every_command
@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_results_come_in_other_encodings(commands, name, encoding):
    done = run(commands[name], question="Once".encode(encoding), PYTHONIOENCODING=encoding)
    assert done.returncode == run(commands[name], question=b"Once").returncode and b"Traceback" not in done.stderr
    done.stdout.decode(encoding)


def test_no_file_takes_the_place_of_a_closed_stream(commands, tmp_path):
    """Otherwise what a library prints on stderr would go into the model that is written."""
    target = tmp_path / "copy.gguf"
    expected = tmp_path / "expected.gguf"
    for path, where in ((expected, ""), (target, "<&- >&- 2>&-")):
        run([*commands["convert"][:-1], path, "--outtype", "q8_0"], where)
    assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("question", "encoding", "message"),
    [
        (
            b"Caf\xe9?\n",
            "utf-8",
            "stdin is not UTF-8 text: byte 3 is 0xe9; convert it, for example with `iconv -f latin1",
        ),
        (b"Caf\xe9?\n", "ascii", "stdin is not UTF-8 text: byte 3 is 0xe9"),
        ("Café?".encode("utf-16"), "utf-8", "stdin is not UTF-8 text: byte 0 is 0xff"),
        (b"", "utf-8", "nothing to read on stdin"),
        (b"\xef\xbb\xbf \r\n", "utf-8", "nothing to read on stdin"),
    ],
)
def test_question_that_is_no_text_is_refused(commands, question, encoding, message):
    for environment in ({"PYTHONIOENCODING": encoding}, {"LC_ALL": "C"}):
        line = assert_one_line(run(commands["chat"], question=question, **environment))
        assert message in line and "/new" not in line and "surrogates" not in line


@pytest.mark.parametrize(("question", "encoding"), [("Café?", "utf-8"), ("Café?", "latin-1"), ("\ufeffOnce", "utf-8")])
def test_question_in_the_encoding_of_the_stream_is_answered(commands, question, encoding):
    done = run(commands["chat"], question=question.encode(encoding), PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize("where", ["<&-", "</dev/null"])
def test_chat_without_a_question_says_so(commands, where):
    assert "stdin" in assert_one_line(run(commands["chat"], where))


def test_text_of_an_argument_that_is_not_utf8_is_named(commands):
    done = run([*commands["chat"], "--system", os.fsdecode(b"Caf\xe9")])
    assert "--system is not UTF-8 text" in assert_one_line(done)


@pytest.mark.parametrize("where", ["<&- >&- 2>&-", "<&- 2>&-", ">/dev/full 2>/dev/full"])
def test_server_answers_whatever_its_streams_are(commands, where):
    from urllib.request import urlopen

    port = free_port()
    command = [*PROGRAM, "serve", commands["inspect"][1], "--port", port, *SHORT]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {where}', "sh", *map(str, command)])
    try:
        for _ in range(600):
            try:
                assert b"ok" in urlopen(f"http://127.0.0.1:{port}/health").read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        else:
            pytest.fail("no answer")
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_python_program_loads_a_model_whatever_its_streams_are(commands, tmp_path, where):
    code = "import sys; from pypop_gguf import PopLlama\n"
    code += "llm = PopLlama(sys.argv[1], n_ctx=64, verbose=False, logits_all=True)\n"
    code += (
        "open(sys.argv[2], 'w').write(str(llm.create_completion('Once', max_tokens=3)['usage']['completion_tokens']))"
    )
    command = [sys.executable, "-c", code, str(commands["inspect"][1]), str(tmp_path / "out")]
    done = subprocess.run(["sh", "-c", f'"$@" {where}', "sh", *command], capture_output=True)
    assert done.returncode in (0, 120) and (tmp_path / "out").read_text() == "3" and done.stdout == b""
