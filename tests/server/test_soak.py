"""The soak in short: mixed traffic leaves answers right and nothing stuck, and what goes wrong is told."""

import random
import re
import signal
import sys
import threading
from pathlib import Path

import pytest

from tools import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from Linux")


@pytest.fixture(scope="module")
def model(served_gguf) -> Path:
    return served_gguf


@pytest.fixture(scope="module")
def answers(model) -> dict:
    return soak.reference(model, 6, seed=1)


@pytest.fixture
def run(model, answers, tmp_path, monkeypatch):
    """Runs a soak of some requests with these references; growth counts for nothing in a run this short."""

    def run(n_requests: int, answers: dict = answers, max_growth: float = 9.0) -> int:
        monkeypatch.setattr(soak, "reference", lambda *_: answers)
        return soak.soak(model, tmp_path / "log.txt", 2, 8, n_requests, 1, max_growth)

    return run


def test_mixed_requests_are_answered_as_alone(run, capsys):
    assert run(150) == 0
    text = capsys.readouterr().out
    counts = eval(re.match(r"150 requests in .* minutes by 8 clients: (\{.*\})", text)[1])
    assert set(counts) == {"answer", "bad", "cancel", "hang_up", "look", "no_http"} and counts["answer"] > 40
    assert f"passed: {counts['answer']} greedy answers equal to their references, none stuck" in text


def test_wrong_answer_is_a_fault(run, answers, capsys):
    others = {pop: dict(zip(found, [*list(found.values())[1:], "another"])) for pop, found in answers.items()}
    assert run(60, others) == 1
    assert re.search(r"^FAULT pop (True|False), '.+': '.*' instead of '.*'$", capsys.readouterr().out, re.MULTILINE)


def test_server_that_ends_is_a_fault(run, capsys, monkeypatch):
    resident = soak.resident_bytes

    def kill_and_read(process) -> int:
        process.send_signal(signal.SIGKILL)
        return resident(process)

    monkeypatch.setattr(soak, "resident_bytes", kill_and_read)
    assert run(10_000) == 1
    assert "FAULT the server ended with status -9" in capsys.readouterr().out


def test_memory_that_grows_is_a_fault(run, capsys, monkeypatch):
    sizes = iter(range(10**8, 10**9, 10**6))
    monkeypatch.setattr(soak, "resident_bytes", lambda process: next(sizes))
    assert run(60, max_growth=0.001) == 1
    assert re.search(r"^FAULT memory grew by \d+\.\d+%$", capsys.readouterr().out, re.MULTILINE)


def test_request_without_an_answer_is_a_fault(answers, monkeypatch):
    import socket

    monkeypatch.setattr(soak, "STUCK_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        traffic = soak.Traffic(silent.getsockname()[1], answers, 10)
        clients = [threading.Thread(target=traffic.client, args=(seed,)) for seed in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    assert any(re.match(r"stuck: \w+ had no answer in 0.2 s", fault) for fault in traffic.faults)


def test_references_are_far_from_a_tie_and_of_both_kinds(answers):
    assert {pop: len(found) for pop, found in answers.items()} == {True: 6, False: 6}
    assert not set(answers[True]) & set(answers[False])
    assert random.Random(0).choice(list(answers[True].values()))
