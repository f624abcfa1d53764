"""Eight clients at once against both servers a GGUF can have, with POP and without: throughput and time to first token.

    python -m tools.bench_server MODEL.gguf --boundary 11 --prompt 512 --answer 32 --rounds 3 --csv bench/server-NAME.csv

`native` is pop-gguf serve (llama-server, continuous batching), `python` llama-cpp-python's own server (one request at a time) with PopLlama
in the place of Llama; it needs pip install fastapi uvicorn sse-starlette starlette-context pydantic-settings. The model is one
of `pop-gguf random-model`, whose tokenizer has a token for each number. Every client reads a prompt of its own. Each round starts every
server anew, in turns. Run from the source tree with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pypop_gguf.terminal import available_cores

PYTHON_SERVER = """
import sys
from pypop_gguf import PopLlama
import llama_cpp
llama_cpp.Llama = PopLlama
from llama_cpp.server.__main__ import main
main()
"""
COLUMNS = [
    "date",
    "engine",
    "pop",
    "round",
    "clients",
    "prompt_tokens",
    "answer_tokens",
    "threads",
    "wall_s",
    "tokens_per_s",
    "ttft_median_ms",
    "ttft_worst_ms",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--answer", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="native,python")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    layers = json.loads(
        subprocess.check_output([sys.executable, "-m", "pypop_gguf", "inspect", "--json", arguments.model])
    )["n_layer"]
    cases = list(itertools.product(arguments.engines.split(","), (True, False)))
    rows = []
    for number in range(arguments.rounds):
        for engine, pop in cases if number % 2 == 0 else reversed(cases):
            row = _measure(arguments, engine, pop, arguments.boundary if pop else layers)
            rows.append(
                {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "engine": engine, "pop": pop, "round": number, **row}
            )
            print({name: rows[-1][name] for name in COLUMNS[1:4] + COLUMNS[8:]}, flush=True)
            if arguments.csv:
                _append(arguments.csv, rows[-1])
    _summarize(rows)
    return 0


def _measure(arguments: argparse.Namespace, engine: str, pop: bool, boundary: int) -> dict:
    prompts = [_prompt(seed, arguments.prompt) for seed in range(arguments.clients)]
    with _running(arguments, engine, boundary) as url:
        _request(url, _prompt(-1, 32), 2)  # pages the weights in
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
            first = list(pool.map(lambda prompt: _request(url, prompt, arguments.answer), prompts))
        wall = time.perf_counter() - started
    return {
        "clients": arguments.clients,
        "prompt_tokens": arguments.prompt,
        "answer_tokens": arguments.answer,
        "threads": arguments.threads,
        "wall_s": round(wall, 3),
        "tokens_per_s": round(arguments.clients * (arguments.prompt + arguments.answer) / wall, 2),
        "ttft_median_ms": round(1e3 * float(np.median(first)), 1),
        "ttft_worst_ms": round(1e3 * max(first), 1),
    }


def _prompt(seed: int, n_tokens: int) -> str:
    """With its BOS that many tokens."""
    chance = random.Random(seed)
    return " ".join(str(chance.randrange(250)) for _ in range(n_tokens - 1))


def _request(url: str, prompt: str, n_answer: int) -> float:
    """Seconds to the first token, once the whole answer is there."""
    body = {
        "model": "random",
        "prompt": prompt,
        "max_tokens": n_answer,
        "temperature": 0,
        "stream": True,
        "logit_bias": {"2": -100},
    }
    body["repeat_penalty"] = 1  # llama-cpp-python's server would take 1.1
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=1200) as response:
        for line in response:
            if line.startswith(b"data: {"):
                if json.loads(line.removeprefix(b"data: ")).get("choices"):
                    first = first or time.perf_counter() - started
    assert first is not None, "the server sent no token"
    return first


@contextlib.contextmanager
def _running(arguments: argparse.Namespace, engine: str, boundary: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    n_ctx = arguments.prompt + arguments.answer + 16
    if engine == "native":
        command = [
            "-m",
            "pypop_gguf",
            "serve",
            arguments.model,
            "--boundary",
            boundary,
            "--port",
            port,
            "--threads",
            arguments.threads,
        ]
        command += [
            "--parallel",
            arguments.clients,
            "--context",
            n_ctx * arguments.clients,
            "--server-options",
            "--no-cache-prompt",
            "--no-warmup",
        ]
    else:
        pruned = arguments.model.with_suffix(f".b{boundary}.gguf")  # that server knows no pop_boundary=
        if not pruned.exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pypop_gguf",
                    "convert",
                    arguments.model,
                    "--boundary",
                    str(boundary),
                    "--outfile",
                    pruned,
                ],
                check=True,
            )
        command = [
            "-c",
            PYTHON_SERVER,
            "--model",
            pruned,
            "--port",
            port,
            "--n_ctx",
            n_ctx,
            "--n_threads",
            arguments.threads,
        ]
        # by default that server asks for the logits of every prompt token, and nothing is pruned
        command += ["--n_threads_batch", arguments.threads, "--verbose", "false", "--logits_all", "false"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, f"the {engine} server ended with {process.returncode}"
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(url + "/v1/models", timeout=5).read()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _summarize(rows: list[dict]) -> None:
    for engine, pop in dict.fromkeys((row["engine"], row["pop"]) for row in rows):
        chosen = [row for row in rows if (row["engine"], row["pop"]) == (engine, pop)]
        spread = lambda name: (
            f"{np.median([row[name] for row in chosen]):.1f} [{min(row[name] for row in chosen)}, {max(row[name] for row in chosen)}]"
        )
        print(
            f"{engine:7} {'POP' if pop else 'whole':6} {spread('tokens_per_s')} tokens/s, first token {spread('ttft_median_ms')} ms"
        )


if __name__ == "__main__":
    sys.exit(main())
