"""tools/soak.py: mixed traffic gets the answers that each request gets alone, and a fault is reported."""

import contextlib
import re
import socket
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.support.server import new_client, serve
from tools import soak
from tools.soak_traffic import Traffic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from Linux")


@pytest.fixture(scope="module")
def answers(served_gguf) -> dict:
    return soak.expected_answers(served_gguf, 6, seed=1)


@pytest.fixture
def server(served_gguf, tmp_path: Path):
    with serve(served_gguf, tmp_path / "log.txt", *soak.SERVER_OPTIONS) as running:
        yield running


def run(server, answers: dict, n_requests: int, max_growth: float = 9.0, complete: str = "off") -> soak.Report:
    """A soak of some requests, however long they take. A run as short as this one says nothing about growth, so much of
    it is allowed."""
    options = dict(minutes=30, n_clients=8, seed=1, max_growth=max_growth, complete=complete)
    return soak.soak(server, answers, n_requests=n_requests, **options)


def test_mixed_requests_are_answered_as_alone(server, answers, capsys):
    report = run(server, answers, 150)
    assert report.faults == [] and sum(report.requests.values()) == 150
    assert set(report.requests) == {"answer", "bad", "cancel", "hang_up", "look", "no_http"}
    assert report.requests["answer"] > 40
    soak.print_report(report, 8, server.log)
    assert f"passed: {report.requests['answer']} greedy answers equal" in capsys.readouterr().out


@pytest.mark.parametrize("complete", ["idle", "answer"])
def test_whole_answers_on_completed_caches_are_the_expected_ones(served_gguf, tmp_path, complete, capsys):
    expected = soak.expected_answers(served_gguf, 6, seed=1, complete=complete)
    assert len(expected[True].keys() & expected[False].keys()) >= 2
    with serve(served_gguf, tmp_path / "log.txt", "--complete", complete, *soak.SERVER_OPTIONS) as server:
        report = run(server, expected, 100, complete=complete)
    assert report.faults == [] and report.requests["answer_again"] > 5
    assert report.n_completed > 100 and report.n_reused > 20
    soak.print_report(report, 8, server.log)
    assert f"{report.n_completed} tokens completed, and {report.n_reused} reused" in capsys.readouterr().out


def test_wrong_answer_is_a_fault(server, answers, capsys):
    wrong = {pop: dict(zip(found, [*list(found.values())[1:], "another"])) for pop, found in answers.items()}
    report = run(server, wrong, 60)
    assert re.match(r"pop (True|False), '.+': '.*' instead of '.*'$", report.faults[0])
    soak.print_report(report, 8, server.log)
    assert f"FAULT {report.faults[0]}\n" in capsys.readouterr().out


def test_server_that_ends_is_a_fault(server, answers):
    timer = threading.Timer(2, server.process.kill)
    timer.start()
    assert "the server ended with status -9" in run(server, answers, 10_000).faults
    timer.join()


def test_memory_that_grows_more_than_allowed_is_a_fault(server, answers):
    [fault] = run(server, answers, 60, max_growth=-1.0).faults
    assert re.match(r"memory grew by -?\d+\.\d+%$", fault)


def test_growth_is_measured_after_the_warm_up():
    assert soak.warm_and_last_bytes([1] * 30 + [100] * 6 + [110] * 48 + [120] * 6) == (100, 120)


def test_request_without_an_answer_is_a_fault(answers):
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        traffic = Traffic(stack.enter_context(new_client(silent.getsockname()[1])), answers, 10, stuck_s=0.2)
        clients = [threading.Thread(target=traffic.client, args=(seed,)) for seed in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    assert any(re.match(r"stuck: \w+ had no answer in 0.2 s", fault) for fault in traffic.faults)


def test_answer_that_makes_no_sense_is_a_fault(answers):
    cut = httpx.MockTransport(lambda request: httpx.Response(200, content=b'{"content": "cut'))
    with httpx.Client(transport=cut, base_url="http://127.0.0.1:1") as http:
        for seed in range(20):  # each client ends with its first fault, and most ask for an answer first
            traffic = Traffic(http, answers, 20)
            traffic.client(seed)
            assert traffic.faults
            if "JSONDecodeError" in traffic.faults[0]:
                break
        else:
            pytest.fail("no client has asked for an answer in one piece first")


def test_expected_answers_differ_between_pruned_and_whole_prompts(answers):
    assert {pop: len(found) for pop, found in answers.items()} == {True: 6, False: 6}
    assert not set(answers[True]) & set(answers[False])
