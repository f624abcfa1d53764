"""The configuration of nginx in docs/server.md: conversations stay on one server, and a stopped server is replaced."""

import contextlib
import http.server
import threading

import httpx
import pytest

from tests.support.nginx import NGINX, proxy
from tests.support.process import stop
from tests.support.server import OPTIONS, serve

pytestmark = pytest.mark.skipif(not NGINX, reason="needs the program nginx")

# nginx chooses by the ports, which differ each time: so many conversations do not all come to the same server.
CONVERSATIONS = [f"conversation {number}" for number in range(20)]
PROMPT = "Once upon a time, there was a little girl named Lily. She had a {}."


@pytest.fixture
def servers(served_gguf, tmp_path):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serve(served_gguf, tmp_path / f"{number}.txt", *OPTIONS)) for number in range(2)]


def ask(client: httpx.Client, conversation: str) -> dict:
    body = {"prompt": PROMPT.format(conversation), "n_predict": 4, "temperature": 0}
    answer = client.post("/completion", json=body, headers={"X-Conversation": conversation})
    return answer.raise_for_status().json()


def count_read(server) -> float:
    return server.metric("prompt_tokens_total")


def test_conversations_stay_on_their_server_and_leave_a_stopped_one(servers, tmp_path):
    with proxy(tmp_path, *(server.port for server in servers)) as client:
        places = {}
        for conversation in CONVERSATIONS:
            before = [count_read(server) for server in servers]
            first = ask(client, conversation)
            read_by = [count_read(server) - n for server, n in zip(servers, before, strict=True)]
            places[conversation] = read_by.index(max(read_by))
            assert sum(n > 0 for n in read_by) == 1
            again = ask(client, conversation)
            assert again["content"] == first["content"] and again["timings"]["cache_n"] > first["timings"]["cache_n"]
            assert count_read(servers[1 - places[conversation]]) == before[1 - places[conversation]]
        assert set(places.values()) == {0, 1}  # Both servers have work.

        stop(servers[0].process)
        before = count_read(servers[1])
        for conversation in CONVERSATIONS:
            assert ask(client, conversation)["content"]
        assert count_read(servers[1]) > before


def test_streams_pass_through_and_a_client_without_the_header_stays(servers, tmp_path):
    body = {"prompt": PROMPT.format("dog"), "n_predict": 8, "temperature": 0, "stream": True}
    with proxy(tmp_path, *(server.port for server in servers)) as client:
        for _ in range(2):
            with client.stream("POST", "/completion", json=body) as response:
                assert sum(line.startswith("data: {") for line in response.iter_lines()) > 2
    assert sorted(count_read(server) > 0 for server in servers) == [False, True]


class Loading(http.server.BaseHTTPRequestHandler):
    """Answers as llama-server does while it loads its model, which takes too short here."""

    asked = 0

    def do_POST(self) -> None:
        Loading.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(503)

    def log_message(self, *_arguments) -> None:
        pass


def test_server_that_loads_its_model_is_replaced(servers, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Loading) as loading:
        threading.Thread(target=loading.serve_forever).start()
        try:
            with proxy(tmp_path, loading.server_port, servers[1].port) as client:
                for conversation in CONVERSATIONS:
                    assert ask(client, conversation)["content"]
        finally:
            loading.shutdown()
    assert Loading.asked > 0
