"""A running ``pop-gguf serve``, or another server, on a free port of the loopback address, for tests and as they ask it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

# four slots of 1024 tokens; options of llama-server may follow
OPTIONS = ("--threads", 1, "--context", 4096, "--parallel", 4, "--server-options")
# A call is one JSON object, as Llama 3 writes them.
TOOL_TEMPLATE = """
{%- for tool in tools or [] %}<|im_start|>system
Tool: {{ tool | tojson }}<|im_end|>
{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Server:
    """The address of a running server, and its process."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self._log = f"http://127.0.0.1:{port}", process, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            text = response.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def complete(self, prompt: str, **options) -> dict:
        """A greedy completion by llama-server's own endpoint, which names all that it did."""
        return self.post("/completion", prompt=prompt, **{"temperature": 0, "n_predict": 12, **options})

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"llamacpp:{name} ")]
        return float(lines[0].split()[1])


def ask(server, path: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, str, dict]:
    """Status, text and headers of an answer, errors too."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(errors="replace"), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace"), dict(error.headers)


def serve(model: Path, log: Path, *options: object) -> contextlib.AbstractContextManager[Server]:
    return running(["-m", "pypop_gguf", "serve", model], options, log, "/health")


@contextlib.contextmanager
def running(program: Sequence[object], options: Sequence[object], log: Path, answers: str) -> Iterator[Server]:
    """A program of Python's and its options, ``--port`` first, from when it answers a GET of ``answers``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *map(str, program), "--port", str(port), *map(str, options)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ}
        )
    server = Server(port, process, log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert process.poll() is None, server.log
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                server.get(answers)
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"no answer in 60 s: {server.log}")
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
