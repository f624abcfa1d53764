"""Starts a program that listens on a port of this machine, waits until it is ready, and stops it.

It needs Python's standard library alone, because tests/installed_wheel.py runs where only the wheel is installed.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

START_S, STOP_S = 60, 20


class NotReady(Exception):
    """A program ended before it was ready, or was not ready in time. The message ends with what the program printed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running_process(
    command: Sequence[object], log: Path, is_ready: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Runs a program from the moment it is ready until the block ends.

    Args:
        command: The program and its arguments, which are made strings.
        log: File for all that the program prints.
        is_ready: Asked again and again until it returns true.
        environment: Variables of the program; default: those of this process.

    Raises:
        NotReady: The program ended, or was not ready within a minute.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + START_S
        while not is_ready():
            printed = log.read_text(errors="replace")[-4000:]
            if process.poll() is not None:
                raise NotReady(f"{command[0]} ended with status {process.returncode}: {printed}")
            if time.monotonic() > deadline:
                raise NotReady(f"{command[0]} was not ready in {START_S} s: {printed}")
            time.sleep(0.05)
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen, seconds: float = STOP_S) -> int:
    """Asks a process to end and returns its exit status.

    Raises:
        subprocess.TimeoutExpired: The process did not end in time and was killed.
    """
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
