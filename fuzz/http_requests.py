"""Requests to the server: whatever their fields hold, an answer or an error comes in time, and the server goes on.

    python -m fuzz.http_requests --cases 5000 --seed 1
    python -m fuzz.http_requests --caches --cases 2000 --seed 1

With ``--caches``, a case is a session of valid requests that share cached tokens, and each request is answered as if it
were alone; see http_caches.py. Without it, each case is one request to `pop-gguf serve` with fields of llama-server's
and OpenAI's requests. Their values are invalid, too large, too many, too long, or lead to one another without end. The
server is started again after a case that ended or stopped it. The time that a grammar takes is not bounded
(SECURITY.md), so cases that are slow because of a grammar are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import random
import subprocess
import sys
from pathlib import Path

from fuzz import harness, http_caches
from fuzz.harness import Failure
from fuzz.http_cases import PATHS, body
from tests.support import tiny_models
from tests.support.server import serve

_SECONDS = 30  # for one request of at most 8 tokens
_OPTIONS = ("--threads", 1, "--context", 2048, "--parallel", 2, "--server-options", "--timeout", 60)


class NoAnswer(Exception):
    """No answer came in time, but the server still runs."""


class Running:
    """A server that is started again for the case after one that ended it."""

    def __init__(self, model: Path, log: Path) -> None:
        self._model, self._log, self._open, self._server = model, log, contextlib.ExitStack(), None

    def ask(self, path: str, content: bytes) -> int:
        """Send the request and read its answer to the end; return its status.

        Raises:
            NoAnswer: This request, or a plain one after it, got no answer in time.
            Failure: The server ended, or the plain request got an error.
        """
        if self._server is None:
            self._server = self._open.enter_context(serve(self._model, self._log, *_OPTIONS))
        try:
            status = self._request(path, content)
            if self._request("/completion", b'{"prompt": "The cat", "n_predict": 1}') != 200:
                raise Failure("the request after it had an error")
        except (OSError, http.client.HTTPException) as error:
            process = self._server.process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            died = process.poll()
            last = " ".join(self._server.log[-300:].split())
            self.close()
            if died is None and isinstance(error, TimeoutError):
                raise NoAnswer(f"none in {_SECONDS} s: {last}") from error
            raise Failure(f"{error!r}, the server ended with {died}: {last}") from error
        return status

    def _request(self, path: str, content: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(self._server.url.rsplit(":", 1)[1]), timeout=_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def close(self) -> None:
        if self._server is not None:
            self._server.process.kill()
            self._server = None
            self._open.close()


def case(chance: random.Random, running: Running, keep: Path | None) -> str:
    path = chance.choice(PATHS if chance.random() < 0.3 else PATHS[:3])
    asked = body(chance, path)
    content = json.dumps(asked).encode()
    try:
        return f"{path.split('?')[0]} {running.ask(path, content) // 100}xx"
    except (Failure, NoAnswer) as error:
        if isinstance(error, NoAnswer) and any(
            key in asked for key in ("grammar", "json_schema", "response_format", "tools")
        ):
            return "slow grammar"
        print(f"{path} {content[:1000].decode()}", file=sys.stderr)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"request-{len(list(keep.iterdir()))}.json").write_bytes(content)
        raise


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", type=Path, help="GGUF file to serve (default: the bundled model)")
        parser.add_argument("--caches", action="store_true", help="check sessions of requests that share cached tokens")

    arguments = harness.parse(__doc__.splitlines()[0], 1000, add)
    with harness.directory() as directory:
        model = arguments.model or directory / "lab.gguf"
        if not arguments.model:
            tiny_models.write_served(model)
        if arguments.caches:
            with contextlib.closing(http_caches.Servers(model, directory)) as servers:
                run = functools.partial(http_caches.case, servers=servers)
                return harness.run(arguments, run, seconds=60, counted="sessions")
        with contextlib.closing(Running(model, directory / "log.txt")) as running:
            return harness.run(arguments, lambda chance: case(chance, running, arguments.keep), seconds=60)


if __name__ == "__main__":
    sys.exit(main())
