"""Checks what an installed wheel does on its own: it prunes a prompt of a model written on the spot, and serves it.

cibuildwheel runs this after each build, tests/packaging/test_wheel.py in an empty environment. Nothing but the wheel
and its dependencies is needed. The working directory must not be the source tree. The script prints which processor
features llama.cpp uses, and on Linux which of the CPU libraries it has loaded.
"""

import contextlib
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import llama_cpp
from support.process import accepts_connections, free_port, running_process

from pypop_gguf import PopLlama
from pypop_gguf.cli import main

BOUNDARY = 5
PROMPT = " ".join(map(str, range(64)))  # the tokenizer has a token for each number


def cpu_libraries() -> list[str]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({Path(line.split()[-1]).name for line in lines if "ggml-cpu" in line})


def check_answer(model: Path) -> None:
    llm = PopLlama(str(model), pop_boundary=BOUNDARY, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    result = llm.create_completion(PROMPT, max_tokens=4, temperature=0)
    assert result["usage"]["completion_tokens"] == 4, result
    assert llm.timings.pruned_tokens > 50, llm.timings
    print(f"pruned {llm.timings.pruned_tokens} tokens;", *cpu_libraries(), llama_cpp.llama_print_system_info().decode())


def ask(url: str, body: dict | None = None) -> dict:
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as response:
        return json.loads(response.read())


def refuse(url: str, body: dict) -> str:
    """Returns the reason with which the server refuses a request."""
    try:
        answer = ask(url, body)
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()
    raise AssertionError(answer)


def check_server(model: Path, log: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pypop_gguf", "serve", model, "--port", port, "--boundary", BOUNDARY]

    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return ask(f"{url}/health") == {"status": "ok"}
        return False

    with running_process([*command, "--threads", 1, "--context", 256, "--parallel", 1], log, is_ready):
        timings = ask(f"{url}/completion", {"prompt": PROMPT, "n_predict": 4, "temperature": 0})["timings"]
        refusal = refuse(f"{url}/completion", {"prompt": PROMPT, "json_schema": {"type": "nothing"}})
    deadline = time.monotonic() + 10
    while accepts_connections(port):
        assert time.monotonic() < deadline, "the server has outlived the command"
    assert timings["predicted_n"] == 4 and timings["pruned_n"] > 50, timings
    assert "unrecognized type nothing" in refusal, refusal  # an exception that one library threw and another caught
    print(f"served {timings['pruned_n']} pruned tokens")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "tiny.gguf"
        assert main(["random-model", "tiny", str(path)]) == 0
        check_answer(path)
        check_server(path, Path(base) / "server.log")
