"""What an installed wheel does on its own: prunes a prompt of a model written on the spot, and serves it over HTTP.

cibuildwheel runs this after each build, tests/test_wheel.py in an empty environment; nothing but the wheel and its
dependencies is needed. The working directory must not be the source tree. Prints which processor features, and on Linux
which library of the CPU, took the prompt.
"""

import os
import tempfile
from pathlib import Path

import llama_cpp
from support.server import serve

from pypop_gguf import PopLlama
from pypop_gguf.cli import main

BOUNDARY = 5
PROMPT = " ".join(map(str, range(64)))  # the tokenizer has a token for each number


def cpu_libraries() -> list[str]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({Path(line.split()[-1]).name for line in lines if "ggml-cpu" in line})


def answers(model: Path) -> None:
    llm = PopLlama(str(model), pop_boundary=BOUNDARY, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    result = llm.create_completion(PROMPT, max_tokens=4, temperature=0)
    assert result["usage"]["completion_tokens"] == 4, result
    assert llm.timings.pruned_tokens > 50, llm.timings
    print(f"pruned {llm.timings.pruned_tokens} tokens;", *cpu_libraries(), llama_cpp.llama_print_system_info().decode())


def serves(model: Path, log: Path) -> None:
    with serve(model, log, "--boundary", BOUNDARY, "--threads", 1, "--context", 256, "--parallel", 1) as server:
        assert server.get("/health") == {"status": "ok"}
        timings = server.complete(PROMPT, n_predict=4)["timings"]
    assert timings["predicted_n"] == 4 and timings["pruned_n"] > 50, timings
    print(f"served {timings['pruned_n']} pruned tokens")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "tiny.gguf"
        assert main(["random-model", "tiny", str(path)]) == 0
        answers(path)
        if os.name == "nt":
            print("not served: on Windows the command does not become the server's process")
        else:
            serves(path, Path(base) / "server.log")
