"""``pop-gguf chat``: through a pipe, and in a pseudo-terminal as a person sees it."""

import os
import re
import select
import struct
import subprocess
import sys
import time

import pytest

PROGRAM = [sys.executable, "-c", "import sys; from pypop_gguf.cli import main; sys.exit(main(sys.argv[1:]))", "chat"]
OPTIONS = ["--temperature", "0", "--max-tokens", "8", "--threads", "1", "--context", "512"]
unix_only = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")
QUESTION = "Once upon a time, there was a little girl named Lily."


def test_a_pipe_gets_the_answer_alone(bundled_gguf):
    done = subprocess.run([*PROGRAM, bundled_gguf, *OPTIONS], input=QUESTION, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.strip()) > 5 and done.stdout.count("\n") <= 2
    assert "reading" not in done.stderr and "first token" not in done.stderr


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [([], "", "nothing to read on stdin"), (["--max-tokens", "0"], "x", "--max-tokens 0 is out of range")],
)
def test_what_cannot_be_answered_is_refused_in_one_line(bundled_gguf, options, text, message):
    done = subprocess.run([*PROGRAM, bundled_gguf, *OPTIONS, *options], input=text, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


@unix_only
def test_answer_in_the_terminals_language_is_shown_as_text(bundled_gguf, tmp_path):
    """The vocabulary of this file clears the screen where the model says "bridge". A pipe gets what the model says."""
    import pty

    vocabulary = bundled_gguf.read_bytes()
    word, sequence = (len(text).to_bytes(8, "little") + text for text in (b"idge", b"\x1b[2J"))
    assert vocabulary.count(word) == 1
    path = tmp_path / "a.gguf"
    path.write_bytes(vocabulary.replace(word, sequence))
    command, question = [*PROGRAM, path, *OPTIONS], b"Once upon a time, there was a"
    piped = subprocess.run(command, input=question, capture_output=True).stdout
    ours, terminal = pty.openpty()
    subprocess.run(command, input=question, stdout=terminal, stderr=subprocess.DEVNULL)
    shown = os.read(ours, 2**16)
    assert b"\x1b[2J" in piped and b"\\x1b[2J" in shown and b"\x1b" not in shown


@unix_only
def test_terminal_shows_progress_time_to_first_token_and_obeys_commands(bundled_gguf):
    import fcntl
    import pty
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        os.execv(sys.executable, [*PROGRAM, str(bundled_gguf), *OPTIONS])
    seen = [b""]

    def expect(pattern: str) -> str:
        deadline, start = time.monotonic() + 60, len(seen[0])
        while not re.search(pattern, text := seen[0][expect.at :].decode(errors="replace")):
            assert time.monotonic() < deadline, f"no {pattern!r} in {text!r}"
            if select.select([terminal], [], [], 0.5)[0]:
                seen[0] += os.read(terminal, 4096)
        expect.at = max(start, expect.at)
        return text

    expect.at = 0

    def say(line: str) -> None:
        expect.at = len(seen[0])
        os.write(terminal, line.encode() + b"\n")

    try:
        expect(r"prompts are read by all 12 layers\. /help lists commands\.[\s\S]*> ")
        say("/pop 8")
        expect(r"prompts are read by 8 of 12 layers\s[\s\S]*> ")
        say(QUESTION)
        shown = expect(r"first token after \d+ ms: (\d+) prompt tokens, 0 from the cache, (\d+) pruned[\s\S]*> ")
        prompt, pruned = map(int, re.search(r": (\d+) prompt tokens, 0 from the cache, (\d+) pruned", shown).groups())
        assert re.search(r"\r +\r[^\r]*\w[^\r]*\r\n\[first token", shown)  # The bar is removed, the answer is not.
        assert pruned == prompt - 1 and re.search(r"reading: +0% \| {20}\| 0/\d+ tokens", shown)
        say("And then?")
        expect(r"first token after \d+ ms: \d+ prompt tokens, [1-9]\d* from the cache[\s\S]*> ")
        say("/pop 99")
        expect(r"give /pop on, /pop off or /pop 1 to 12[\s\S]*> ")
        say("long " * 600)
        expect(r"exceed context window[\s\S]*/new begins a new conversation[\s\S]*> ")
        say("/new")
        expect(r"a new conversation[\s\S]*> ")
        say("/pop off")
        expect(r"prompts are read by all 12 layers[\s\S]*> ")
        say(QUESTION)
        expect(r", 0 pruned[\s\S]*> ")
        os.write(terminal, b"/bye\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(terminal)
