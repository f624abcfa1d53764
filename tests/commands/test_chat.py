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


class Terminal:
    """A pseudo-terminal in which the program runs until the block of its ``with`` ends."""

    def __init__(self, *arguments: object) -> None:
        import fcntl
        import pty
        import termios

        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
            os.execv(sys.executable, [*PROGRAM, *map(str, arguments), *OPTIONS])
        self._seen, self._said_at = b"", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._terminal)

    def expect(self, pattern: str) -> str:
        """Waits until this is shown after what was said last, and returns all that is shown after it."""
        deadline = time.monotonic() + 60
        while not re.search(pattern, text := self._seen[self._said_at :].decode(errors="replace")):
            assert time.monotonic() < deadline, f"no {pattern!r} in {text!r}"
            if select.select([self._terminal], [], [], 0.5)[0]:
                self._seen += os.read(self._terminal, 4096)
        return text

    def say(self, line: str) -> None:
        self._said_at = len(self._seen)
        os.write(self._terminal, line.encode() + b"\n")

    def ask(self, question: str) -> tuple[str, list[int]]:
        """Returns what the answer has shown, and its prompt tokens, those from the cache, and those pruned."""
        self.say(question)
        shown = self.expect(r"first token after \d+ ms: .*\][\s\S]*> ")
        return shown, [
            int(n) for n in re.search(r": (\d+) prompt .* (\d+) from the cache, (\d+) pruned", shown).groups()
        ]

    def end(self) -> int:
        """Says /bye and returns the status of the program."""
        os.write(self._terminal, b"/bye\n")
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


@unix_only
def test_terminal_shows_progress_time_to_first_token_and_obeys_commands(bundled_gguf):
    with Terminal(bundled_gguf) as terminal:
        terminal.expect(r"prompts are read by all 12 layers\. /help lists commands\.[\s\S]*> ")
        terminal.say("/pop 8")
        terminal.expect(r"prompts are read by 8 of 12 layers\s[\s\S]*> ")
        shown, (prompt, cached, pruned) = terminal.ask(QUESTION)
        assert re.search(r"\r +\r[^\r]*\w[^\r]*\r\n\[first token", shown)  # The bar is removed, the answer is not.
        assert pruned == prompt - 1 and cached == 0 and " completed" not in shown
        assert re.search(r"reading: +0% \| {20}\| 0/\d+ tokens", shown)
        _, (_, cached, _) = terminal.ask("And then?")
        assert cached > 0
        terminal.say("/pop 99")
        terminal.expect(r"give /pop on, /pop off or /pop 1 to 12[\s\S]*> ")
        terminal.say("long " * 600)
        terminal.expect(r"exceed context window[\s\S]*/new begins a new conversation[\s\S]*> ")
        terminal.say("/new")
        terminal.expect(r"a new conversation[\s\S]*> ")
        terminal.say("/pop off")
        terminal.expect(r"prompts are read by all 12 layers[\s\S]*> ")
        _, (_, _, pruned) = terminal.ask(QUESTION)
        assert pruned == 0
        assert terminal.end() == 0


@unix_only
@pytest.mark.parametrize("mode", ["off", "idle", "answer"])
def test_what_was_completed_is_not_read_again_by_all_layers(bundled_gguf, mode):
    with Terminal(bundled_gguf, "--complete", mode) as terminal:
        terminal.expect("> ")
        for pause in (0, 1, 4, 16):  # seconds that the thread of "idle" gets
            terminal.say("/new")
            terminal.expect(r"a new conversation[\s\S]*> ")
            terminal.say("/pop 8")
            terminal.expect(r"8 of 12 layers[\s\S]*> ")
            shown, (first, _, pruned) = terminal.ask(f"I have {pause} balls. {QUESTION}")
            assert pruned > 10 and (" completed" in shown) == (mode == "answer")
            time.sleep(pause)
            terminal.say("/pop off")
            terminal.expect(r"all 12 layers[\s\S]*> ")
            _, (_, cached, _) = terminal.ask("And then?")
            if cached >= first or mode != "idle":
                break
        assert (cached >= first) == (mode != "off")
        assert terminal.end() == 0
