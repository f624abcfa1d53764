"""Starts a worker process of the benchmark (worker.py), asks it, and turns its failures into PopError."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pypop_gguf.errors import PopError

_WORKER = Path(__file__).with_name("worker.py")


class Engine:
    """A worker process with a model loaded and a context for one case.

    Args:
        name: The engine's name in error messages.
        model: GGUF file.
        stock: Directory with an unpatched llama_cpp package; None for our library.
        n_threads: Threads of prefill and decode.
        n_ubatch: Tokens of a micro-batch.
        flash_attn: Flash attention: "on", "off", or "auto" for llama.cpp's choice.
        cache_type: Type of the cached keys and values: "F16" or "Q8_0".
        kernels: "on" or "off", as the option ``--kernels`` of the commands; None leaves it to the environment.
        n_prompt: Tokens of each sequence's prompt.
        n_decode: Tokens generated after the prompt.
        n_parallel: Number of sequences.
        unified: Whether all sequences share one cache.
        rpc: RPC servers that hold the layers; none leaves them to the devices of this machine.

    Raises:
        PopError: The worker fails, now or at a later request.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        stock: Path | None,
        *,
        n_threads: int,
        n_ubatch: int,
        flash_attn: str,
        cache_type: str = "F16",
        kernels: str | None = None,
        n_prompt: int,
        n_decode: int,
        n_parallel: int,
        unified: bool = False,
        rpc: Sequence[str] = (),
    ) -> None:
        self.name = name
        environment = dict(os.environ)
        if stock:
            path = [str(stock.resolve()), environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
            for variable in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"):  # They would replace the library in the package.
                environment.pop(variable, None)
        if kernels:
            environment["POP_KERNELS"] = kernels
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        try:
            self.info = self.ask(
                "load",
                model=str(model),
                ours=stock is None,
                n_threads=n_threads,
                n_ubatch=n_ubatch,
                flash_attn=flash_attn,
                cache_type=cache_type,
                rpc=rpc,
            )
            if stock and self.info["patched"]:
                raise PopError(f"--stock {stock}: its llama.cpp has POP; give an unpatched one")
            self.ask("context", n_prompt=n_prompt, n_decode=n_decode, n_parallel=n_parallel, unified=unified)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str, **parameters: object) -> dict:
        """Sends one request, by the name of a ``Worker`` method, and waits for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"request": request, **parameters}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
            raise PopError(f"engine {self.name} died with status {status}: {said[-1] if said else 'it said nothing'}")
        result = json.loads(answer)
        if "error" in result:
            raise PopError(f"engine {self.name}: {result['error']}")
        return result

    def warm_up(self, n_prompt: int, boundary: int | None = None) -> None:
        """Reads a prompt and generates one token without timing them."""
        self.ask("prefill", n_prompt=n_prompt, boundary=boundary)
        self.ask("decode", n=1)

    def close(self) -> None:
        """Ends the process, even in the middle of a pass."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()
