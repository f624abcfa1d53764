"""A model that is spread over RPC servers: the commands that take ``--rpc``, and what happens when a server is lost.

tests/engine/test_devices.py compares the logits with those of one machine.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pypop_gguf.cli import main
from tests.support.process import free_port
from tests.support.server import OPTIONS, rpc_servers, serve

QUESTION = "Once upon a time, there was a little girl named Lily."
LOST_S = 60  # It takes half a minute until a connection that nobody has closed counts as lost.


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rpc") / "lab.gguf"
    assert main(["convert", str(bundled_gguf), "--boundary", "8", "--outfile", str(path)]) == 0
    return path


@pytest.fixture
def servers(tmp_path):
    with rpc_servers(2, tmp_path) as running:
        yield running


def run(*arguments: object, text: str = "", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pypop_gguf", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=LOST_S, **options)


def test_server_on_two_machines_answers_as_on_one(model, servers, tmp_path):
    def answer(*options) -> tuple:
        with serve(model, tmp_path / "log.txt", *options, *OPTIONS, "--verbosity", 4) as server:
            done = server.complete(QUESTION)
            # llama.cpp names the device of each piece of the model's weights, at this verbosity.
            assert all(f"[{address}] model buffer" in server.log for address in servers) is bool(options)
            return done["content"], done["timings"]["pruned_n"]

    one, two = answer(), answer("--rpc", ",".join(servers))
    assert one == two and one[1] > 0


def test_server_that_loses_a_machine_ends_with_one_line(model, servers, tmp_path):
    address, process = list(servers.items())[1]
    with serve(model, tmp_path / "log.txt", "--rpc", ",".join(servers), *OPTIONS) as server:
        assert server.complete(QUESTION)["timings"]["pruned_n"] > 0
        process.kill()
        with pytest.raises(httpx.TransportError):
            server.complete("Another prompt, which has to be read.")
        assert server.process.wait(LOST_S) == 1
        lines = server.log.splitlines()
        assert lines[-1] == f"error: the RPC server {address} is lost: start it again, and then this program"
        assert "abort" not in server.log.lower()


def test_machine_serves_the_next_program_after_one_was_killed(model, servers):
    chat = ["chat", model, "--rpc", ",".join(servers), "--temperature", 0, "--max-tokens", 8, "--context", 512]
    first = run(*chat, text=QUESTION)
    assert first.returncode == 0 and len(first.stdout.strip()) > 5, first.stderr
    command = [sys.executable, "-m", "pypop_gguf", *map(str, chat[:-4])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        killed.stdin.write(QUESTION)
        killed.stdin.close()
        killed.stdout.read(1)  # It answers now.
        killed.send_signal(signal.SIGKILL)
    assert run(*chat, text=QUESTION).stdout == first.stdout


def test_bench_measures_on_two_machines(model, servers):
    first, second = servers
    done = run(
        "bench",
        model,
        "--prompt",
        16,
        "--parallel",
        1,
        "--runs",
        1,
        "--decode",
        2,
        "--json",
        "--rpc",
        first,
        "--rpc",
        second,
    )
    assert done.returncode == 0, done.stderr
    assert "split over 1 RPC servers" in done.stdout
    for lists in (["--rpc", first], ["--rpc", first, "--rpc", first]):
        done = run("bench", model, "--prompt", 16, *lists)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ("127.0.0.1:{closed}", "cannot be reached"),
        ("127.0.0.1", "is no address"),
        ("127.0.0.1:99999", "is no address"),
        ("127.0.0.1:{busy}", "gives no answer"),
        ("no-such-machine.invalid:50052", "no machine has this name"),
        ("no..machine:50052", "no machine has this name"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "chat", "bench"])
def test_server_that_does_not_answer_is_told_in_one_line(model, capsys, monkeypatch, command, servers, message):
    monkeypatch.setattr("pypop_gguf.rpc._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as busy:  # accepts, and says nothing
        servers = servers.format(closed=free_port(), busy=busy.getsockname()[1])
        more = ["--rpc", servers, "--prompt", "16"] if command == "bench" else []
        assert main([command, str(model), "--rpc", servers, *more]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]


def test_program_that_is_no_rpc_server_ends_the_command_in_one_line(model):
    with socket.create_server(("127.0.0.1", 0)) as web:
        command = [sys.executable, "-m", "pypop_gguf", "chat", str(model), "--rpc", f"127.0.0.1:{web.getsockname()[1]}"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as chat:
            for _ in range(2):
                connection, _address = web.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.recv(100)
            error = chat.stderr.read()
        assert chat.returncode == 1 and len(error.splitlines()) == 1 and "run the same version" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port 0 is out of range"),
        (["--host", "localhost"], "is no IPv4 address"),
        (["--host", "192.0.2.1"], "is no address of this machine"),
        (["--threads", "0"], "--threads 0 is out of range"),
    ],
)
def test_rpc_server_refuses_bad_arguments_in_one_line(capsys, arguments, message):
    assert main(["rpc-server", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]


def test_rpc_server_listens_on_this_machine_alone_unless_told(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(command))
    main(["rpc-server", "--port", str(free_port())])
    assert "127.0.0.1" in ran[0] and capsys.readouterr().err == ""
    main(["rpc-server", "--port", str(free_port()), "--host", "0.0.0.0"])
    assert "0.0.0.0" in ran[1] and "can take over this process" in capsys.readouterr().err


# A machine that goes down closes nothing. A network namespace with its link down stands for it.

NAMESPACE, LINK, HERE, THERE = "pop-rpc", "poprpc", "10.213.77.1", "10.213.77.2"


@pytest.fixture
def other_machine():
    """A network namespace that is reached over a pair of virtual links."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    if not shutil.which("ip"):
        pytest.skip("needs the program ip")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError:
        pytest.skip("needs the right to make network namespaces")
    try:
        ip("link", "add", LINK, "type", "veth", "peer", "name", f"{LINK}1", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/24", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/24", "dev", f"{LINK}1")
        ip("-n", NAMESPACE, "link", "set", f"{LINK}1", "up")
        yield ip
    finally:
        subprocess.run(["ip", "link", "del", LINK], capture_output=True)
        ip("netns", "del", NAMESPACE)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while idle", "while it computes"])
def test_machine_that_is_cut_off_ends_the_server_with_one_line(model, other_machine, tmp_path, when):
    port = free_port()
    rpc = [sys.executable, "-m", "pypop_gguf", "rpc-server", "--host", THERE, "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(["ip", "netns", "exec", NAMESPACE, *rpc], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((THERE, port), timeout=1):
                break
            time.sleep(0.1)
        with serve(model, tmp_path / "log.txt", "--rpc", f"{THERE}:{port}", *OPTIONS) as server:
            assert server.complete(QUESTION)["timings"]["pruned_n"] > 0
            stream = server.stream("/completion", prompt=QUESTION, n_predict=900, ignore_eos=True)
            if when == "while it computes":
                next(stream)
            other_machine("link", "set", LINK, "down")
            began = time.monotonic()
            if when == "while idle":
                with pytest.raises(httpx.TransportError):
                    server.complete("Another prompt, which has to be read.")
            assert server.process.wait(LOST_S) == 1
            print(f"{when}: noticed after {time.monotonic() - began:.0f} s")
            assert server.log.splitlines()[-1].startswith(f"error: the RPC server {THERE}:{port} is lost")
    finally:
        process.terminate()
        process.wait()
