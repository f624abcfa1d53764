"""The configuration of nginx in docs/server.md: conversations stay on one server, and a stopped server is replaced."""

import contextlib
import re
import shutil

import httpx
import pytest

from tests.support.paths import ROOT
from tests.support.process import accepts_connections, free_port, running_process, stop
from tests.support.server import OPTIONS, new_client, serve

# nginx keeps its files here, so it needs no rights of root.
PLACES = """
daemon off; pid nginx.pid; error_log stderr; events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
"""
CONVERSATIONS = [f"conversation {number}" for number in range(8)]
PROMPT = "Once upon a time, there was a little girl named Lily. She had a {}."


@pytest.fixture
def proxy(served_gguf, tmp_path):
    """Yields a client of nginx, and the two servers behind it."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if not nginx:
        pytest.skip("needs the program nginx")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serve(served_gguf, tmp_path / f"{number}.txt", *OPTIONS)) for number in range(2)]
        port = free_port()
        text = re.search(r"^```nginx\n(.+?)^```$", (ROOT / "docs" / "server.md").read_text(), re.M | re.S)[1]
        for documented, used in ((8080, port), (8081, servers[0].port), (8082, servers[1].port)):
            assert f"127.0.0.1:{documented}" in text
            text = text.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{used}")
        (tmp_path / "nginx.conf").write_text(f"{PLACES}{text}}}\n")
        command = [nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
        stack.enter_context(running_process(command, tmp_path / "nginx.txt", lambda: accepts_connections(port)))
        yield stack.enter_context(new_client(port)), servers


def ask(client: httpx.Client, conversation: str) -> dict:
    body = {"prompt": PROMPT.format(conversation), "n_predict": 4, "temperature": 0}
    answer = client.post("/completion", json=body, headers={"X-Conversation": conversation})
    return answer.raise_for_status().json()


def count_read(server) -> float:
    return server.metric("prompt_tokens_total")


def test_conversations_stay_on_their_server_and_leave_a_stopped_one(proxy):
    client, servers = proxy
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
    assert set(places.values()) == {0, 1}  # both servers have work

    stop(servers[0].process)
    before = count_read(servers[1])
    for conversation in CONVERSATIONS:
        assert ask(client, conversation)["content"]
    assert count_read(servers[1]) > before


def test_streams_pass_through_and_a_client_without_the_header_stays(proxy):
    client, servers = proxy
    body = {"prompt": PROMPT.format("dog"), "n_predict": 8, "temperature": 0, "stream": True}
    for _ in range(2):
        with client.stream("POST", "/completion", json=body) as response:
            assert sum(line.startswith("data: {") for line in response.iter_lines()) > 2
    assert sorted(count_read(server) > 0 for server in servers) == [False, True]
