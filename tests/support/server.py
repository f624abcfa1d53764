"""The one way to start an HTTP server and to ask it: for tests, for the fuzzers, and for the scripts in tools/.

``serve`` starts ``pop-gguf serve``, ``running`` any other Python program that takes ``--port``. ``rpc_servers`` starts
what ``serve --rpc`` spreads a model over.
"""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from pypop_gguf.memory import resident_bytes
from tests.support.process import accepts_connections, free_port, running_process

# Options of `pop-gguf serve` for four slots of 1024 tokens. Options of llama-server may follow.
OPTIONS = ("--threads", 1, "--context", 4096, "--parallel", 4, "--server-options")
# A chat template in which a tool call is one JSON object, as Llama 3 writes it.
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

_TIMEOUT_S = 120


class Server:
    """A running server: its address, its process, and a client that asks it.

    Attributes:
        client: Sends requests to paths of the server. Threads may share it.
    """

    def __init__(self, client: httpx.Client, process: subprocess.Popen, log: Path) -> None:
        self.client, self.process, self._log = client, process, log
        self.url, self.port = str(client.base_url).rstrip("/"), client.base_url.port

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str):
        """Returns the answer to a GET, parsed if it is JSON. A bad status raises httpx.HTTPStatusError."""
        response = self.client.get(path).raise_for_status()
        return response.json() if "json" in response.headers.get("Content-Type", "") else response.text

    def post(self, path: str, **body) -> dict:
        """Returns the JSON that answers a JSON body. An error status raises httpx.HTTPStatusError."""
        return self.client.post(path, json=body).raise_for_status().json()

    def complete(self, prompt: str, **options) -> dict:
        """Returns a greedy completion by llama-server's own endpoint, with timings and the number of reused tokens."""
        return self.post("/completion", prompt=prompt, **{"temperature": 0, "n_predict": 12, **options})

    def stream(self, path: str, **body) -> Iterator[dict]:
        """Returns the events of a streamed answer, as :func:`stream_events` yields them."""
        return stream_events(self.client, path, body)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"llamacpp:{name} ")]
        return float(lines[0].split()[1])

    def resident_bytes(self) -> int:
        """Returns the memory in bytes that the process holds now. This works on Linux only."""
        return resident_bytes(self.process.pid)


def stream_events(client: httpx.Client, path: str, body: dict, headers: dict | None = None) -> Iterator[dict]:
    """Yields the events of a streamed answer, each as soon as it arrives. Closing the iterator hangs up."""
    with client.stream("POST", path, json={**body, "stream": True}, headers=headers) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def ask(server: Server, path: str, body: bytes | None = None, headers: dict | None = None):
    """Returns status, text and headers of an answer, also of an error. A body makes the request a POST."""
    method, sent = "GET" if body is None else "POST", {"Content-Type": "application/json", **(headers or {})}
    response = server.client.request(method, path, content=body, headers=sent)
    return response.status_code, response.text, response.headers


def serve(model: Path, log: Path, *options: object) -> contextlib.AbstractContextManager[Server]:
    """Runs ``pop-gguf serve``; the options are those of that command."""
    return running(["-m", "pypop_gguf", "serve", model], options, log, "/health")


@contextlib.contextmanager
def running(program: Sequence[object], options: Sequence[object], log: Path, answers: str) -> Iterator[Server]:
    """Runs a server from the moment it answers a GET of the path ``answers`` until the block ends.

    Args:
        program: What Python runs: ``-m`` and a module, or ``-c`` and code, with arguments.
        options: The arguments after ``--port``.
        log: File for all that the server prints.
        answers: A path that has an answer once the server is ready.
    """
    port = free_port()
    with new_client(port) as client:

        def is_ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get(answers, timeout=5).is_success
            return False

        with running_process([sys.executable, *program, "--port", port, *options], log, is_ready) as process:
            yield Server(client, process, log)


@contextlib.contextmanager
def rpc_servers(number: int, directory: Path, threads: int = 1) -> Iterator[dict[str, subprocess.Popen]]:
    """Runs ``pop-gguf rpc-server`` several times on this machine; yields the processes by HOST:PORT."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for _ in range(number):
            port = free_port()
            command = [sys.executable, "-m", "pypop_gguf", "rpc-server", "--port", port, "--threads", threads]
            is_ready = functools.partial(accepts_connections, port)
            process = running_process(command, directory / f"rpc-{port}.txt", is_ready)
            servers[f"127.0.0.1:{port}"] = stack.enter_context(process)
        yield servers


def new_client(port: int) -> httpx.Client:
    """Each request has a connection of its own, because one that stays open would hold a thread of the server."""
    return httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Connection": "close"},
        timeout=_TIMEOUT_S,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )
