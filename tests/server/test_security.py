"""Input from strangers does no harm: requests to the server, templates in GGUF files, code in Hugging Face directories.

SECURITY.md says what is promised, and names what llama.cpp does not limit.
"""

import concurrent.futures
import contextlib
import json
import os
import pickle
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf import PopLlama
from pypop_gguf.cli import main
from tests.support.gguf_files import STRING, insert_raw_key
from tests.support.paths import BUNDLED
from tests.support.server import OPTIONS, ask, serve

TIMEOUT_S = 2


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("security") / "lab.gguf"
    assert main(["convert", str(bundled_gguf), "--boundary", "8", "--outfile", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("log") / "log.txt", *OPTIONS, "--timeout", TIMEOUT_S) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serves(request):
    """Checks after each test with the shared server that it still answers."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        assert running.process.poll() is None, running.log[-2000:]
        assert running.complete("The cat", n_predict=2)["tokens_predicted"] == 2


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


# Who may ask


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of sockets")
def test_server_listens_on_this_machine_alone(server):
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [row[1] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == server.port]
    assert listening == [f"0100007F:{server.port:04X}"]  # 127.0.0.1 and the port, as Linux writes them


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "127.0.0.1,::"], True),
        (["--server-options", "--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--server-options", "--host", "127.0.0.1"], False),
        (["--host", "0.0.0.0", "--api-key-file", "{keys}"], False),
    ],
)
def test_open_address_without_a_key_is_told(model, tmp_path, capsys, monkeypatch, arguments, warned):
    (tmp_path / "keys").write_text("secret\n")
    ran = []
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(command))
    main(["serve", str(model), *(argument.format(keys=tmp_path / "keys") for argument in arguments)])
    assert ran and ("is open to all who reach it: give --api-key-file" in capsys.readouterr().err) is warned


def test_kernels_of_the_server_can_be_off(model, monkeypatch):
    monkeypatch.setenv("POP_KERNELS", "on")  # so that the test leaves the environment as it was
    ran = []
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(os.environ["POP_KERNELS"]))
    main(["serve", str(model)])
    main(["serve", str(model), "--kernels", "off"])
    assert ran == ["on", "off"]


PATHS = ["/props", "/slots", "/metrics", "/models", "/v1/models", "/lora-adapters", "/v1/stream"]
POSTED = [
    "/completion",
    "/completions",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/infill",
    "/v1/embeddings",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/props",
    "/slots/0?action=erase",
    "/lora-adapters",
    "/v1/streams/lookup",
]


def test_key_is_asked_for_everywhere_but_health(model, tmp_path):
    (tmp_path / "keys").write_text("open sesame\n")
    with serve(model, tmp_path / "log.txt", "--api-key-file", tmp_path / "keys", *OPTIONS[:-1]) as server:
        for headers in (
            {},
            {"Authorization": "Bearer open"},
            {"Authorization": "Bearer"},
            {"X-Api-Key": "open sesame, open"},
            {"Cookie": "open sesame"},
        ):
            assert {ask(server, path, None, headers)[0] for path in PATHS} == {401}
            assert {ask(server, path, b'{"prompt": "a"}', headers)[0] for path in POSTED} == {401}
        assert ask(server, "/health")[0] == 200
        for headers in ({"Authorization": "Bearer open sesame"}, {"X-Api-Key": "open sesame"}):
            assert ask(server, "/completion", b'{"prompt": "a", "n_predict": 1}', headers)[0] == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://example.com", False),
        ("http://localhost.example.com", False),
        ("null", False),
    ],
)
def test_pages_of_other_origins_cannot_read_answers(server, origin, allowed):
    for path, body in (("/props", None), ("/completion", b'{"prompt": "a", "n_predict": 1}')):
        headers = ask(server, path, body, {"Origin": origin})[2]
        assert headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)


# How much they may send


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from Linux")
@pytest.mark.parametrize("length", [100 * 2**20 + 1, 10**15])
def test_body_over_100_mb_is_refused(server, length):
    before = server.resident_bytes()
    head = f"POST /completion HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    with connect(server) as client:
        client.sendall(head.encode())
        for _ in range(101):  # the rest of the longer body is never sent
            client.sendall(b"[" * min(2**20, length))
            length -= 2**20
            if length <= 0:
                break
        answer = client.recv(100)
    assert answer.startswith(b"HTTP/1.1 413 " if length <= 0 else b"HTTP/1.1 4")
    # The server reads up to its limit of 100 MB into a string, which doubles as it grows.
    assert server.resident_bytes() - before < 400e6


def test_prompt_that_is_too_long_is_refused_while_others_are_served(server):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        refused = pool.submit(ask, server, "/completion", json.dumps({"prompt": "a " * 1_000_000}).encode())
        assert server.complete("The dog", n_predict=2)["tokens_predicted"] == 2
        status, text, _ = refused.result()
    assert status == 400 and "exceeds the available context size (1024 tokens)" in text


def test_more_requests_than_slots_wait_and_are_all_answered(server):
    bodies = [json.dumps({"prompt": f"Number {i}", "n_predict": 20}).encode() for i in range(60)]
    most = 0
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(ask, server, "/completion", body) for body in bodies]
        while not all(answer.done() for answer in answers):
            most = max(most, server.metric("requests_processing"))
    assert {answer.result()[0] for answer in answers} == {200}
    # The server counts the busy slots of each batch itself, so a moment that this test has not seen is counted too.
    assert most <= 4 and 1 < server.metric("n_busy_slots_per_decode") <= 4


def test_request_for_a_busy_slot_leaves_its_answer_alone(server):
    """A slot loads from the prompt cache for its next request, and never while it answers one."""

    def body(prompt: str, n: int) -> bytes:
        return json.dumps(
            {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": 1, "ignore_eos": True}
        ).encode()

    others = [
        body(f"{name} sat on the tree and said a long word to all of the birds", 1) for name in ("Dogs", "Cats", "Cows")
    ]
    victim = body("Once upon a time there was a", 200)
    for other in others:  # each moves the one before it to the prompt cache
        ask(server, "/completion", other)
    alone = json.loads(ask(server, "/completion", victim)[1])["content"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, "/completion", victim)
        while not first.done() and not server.metric("requests_processing"):
            pass
        assert {status for status, *_ in pool.map(lambda other: ask(server, "/completion", other), others)} == {200}
        assert json.loads(first.result()[1])["content"] == alone


def test_slow_clients_are_timed_out_and_others_served_meanwhile(server):
    """Each client stops in the middle of its headers, of its body or of a chunk."""
    head = "POST /completion HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    pieces = [
        "POST /compl",
        head,
        head + 'Content-Length: 999\r\n\r\n{"prompt"',
        head + "Transfer-Encoding: chunked\r\n\r\n9\r\n{",
    ]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        for client, i in zip(clients, range(100)):
            client.sendall(pieces[i % 4].encode())
        assert server.complete("The cow", n_predict=2)["tokens_predicted"] == 2
        ended, _, _ = select.select(clients, [], [], 0)
        assert len(ended) < len(clients)  # the server did not wait for one client after another
        for client in clients:
            client.settimeout(60)
            while client.recv(1000):  # an error message may come before the connection ends
                pass


def answer_to(server, raw: bytes) -> bytes:
    """Return the start of the answer to what a client sends before it hangs up. It is empty if the server hangs up."""
    with connect(server) as client, contextlib.suppress(ConnectionError):
        client.settimeout(TIMEOUT_S + 8)
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        return client.recv(1000)
    return b""


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_are_no_http_or_no_json_do_no_harm(server, seed):
    chance = random.Random(seed)
    good = b'POST /completion HTTP/1.1\r\nHost: a\r\nContent-Length: 32\r\n\r\n{"prompt": "a", "n_predict": 1 }'
    statuses = set()
    for _ in range(50):
        raw = bytearray(good)
        for _ in range(chance.randrange(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        answer = answer_to(server, bytes(raw) if chance.random() < 0.8 else chance.randbytes(500))
        assert not answer or re.match(rb"HTTP/1\.1 [245]\d\d ", answer), answer
        statuses.add(answer[9:10])
    assert (
        b"4" in statuses or b"5" in statuses
    )  # some were refused, and the connection stayed open long enough to say so
    assert answer_to(server, good).startswith(b"HTTP/1.1 200 ")


BAD = {
    "not an object": b"[]",
    "no prompt": b"{}",
    "prompt of another type": b'{"prompt": {"a": 1}}',
    "tokens that are none": b'{"prompt": [-5, 1000000000]}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "cut short": b'{"prompt": "a',
    "empty": b"",
    "numbers that are none": b'{"prompt": "a", "n_predict": "many"}',
    "left recursion": b'{"prompt": "a", "grammar": "root ::= root \\"a\\" | \\"b\\""}',
    "repetitions": b'{"prompt": "a", "grammar": "root ::= (((\\"a\\"{0,2000}){0,2000}){0,2000})"}',
    "too many answers": b'{"prompt": "a", "n": 1000000}',
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_request_is_an_error(server, body):
    status, text, _ = ask(server, "/v1/completions" if b'"n"' in body else "/completion", body)
    assert status in (400, 500) and json.loads(text)["error"]["message"]


# Paths and other people's prompts


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/slots/0?action=save", {"filename": "a.bin"}, 501),
        ("/slots/0?action=restore", {"filename": "/etc/passwd"}, 501),
        ("/models/load", {"model": "/etc/passwd"}, 404),
        ("/props", {"chat_template": "{{ 1 }}"}, 501),
        ("/tools", {"name": "read_file", "arguments": {"path": "/etc/passwd"}}, 403),
        ("/cors-proxy?url=http://127.0.0.1:1/", {}, 403),
    ],
)
def test_endpoints_that_reach_further_are_off(server, path, body, status):
    assert ask(server, path, json.dumps(body).encode())[0] == status


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/%2e%2e/etc/passwd", "/etc/passwd"]
)
def test_no_file_is_served(server, path):
    with connect(server) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 404 ") and b"root:" not in answer


@pytest.mark.parametrize(
    "fields",
    [{"model": "/etc/passwd"}, {"lora": [{"id": 0, "scale": 1.0, "path": "/etc/passwd"}]}, {"mmproj": "/etc/passwd"}],
)
def test_names_in_a_request_open_no_file(server, fields):
    status, text, _ = ask(server, "/completion", json.dumps({"prompt": "a", "n_predict": 1, **fields}).encode())
    assert status == 200 and json.loads(text)["tokens_predicted"] == 1


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/tmp/outside.bin", "a/../../outside.bin", "..", "", "a\x00b", "..\\outside.bin"]
)
def test_slots_are_saved_in_their_directory_alone(model, tmp_path_factory, name):
    base = tmp_path_factory.mktemp("slots")
    (base / "inside").mkdir()
    with serve(model, base / "log.txt", *OPTIONS, "--slot-save-path", base / "inside") as server:
        server.complete("The cat", id_slot=0, n_predict=1)
        for action in ("save", "restore"):
            assert ask(server, f"/slots/0?action={action}", json.dumps({"filename": name}).encode())[0] == 400
    assert sorted(path.name for path in base.rglob("*")) == ["inside", "log.txt"]


def test_prompts_of_others_are_not_shown(server):
    server.complete("My secret is xyzzy, and", n_predict=3)
    for path in ("/slots", "/metrics", "/props", "/v1/models", "/health"):
        status, text, _ = ask(server, path)
        assert status == 200 and "xyzzy" not in text


# Templates

ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch {marker}') }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch {marker}') }}",
    "format": "{{ '{{0.__class__}}'.format(1).__class__.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{{ messages.append(1) }}",
    "range": "{% for i in range(1000000000) %}{% endfor %}",
}


def with_template(model: Path, path: Path, template: str) -> Path:
    shutil.copy(model, path)
    raw = template.encode()
    insert_raw_key(path, "tokenizer.chat_template", STRING, struct.pack("<Q", len(raw)) + raw)
    return path


@pytest.mark.parametrize("kind", ATTACKS)
def test_template_of_a_file_stays_in_its_sandbox(model, tmp_path, kind):
    template = ATTACKS[kind].replace("{marker}", str(tmp_path / "marker"))
    llm = PopLlama(str(with_template(model, tmp_path / "evil.gguf", template)), n_ctx=128, n_threads=1, verbose=False)
    with pytest.raises(Exception, match=r"unsafe|Range too big|undefined|^/etc/passwd$"):
        llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=1)
    llm.close()
    assert not (tmp_path / "marker").exists()


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("kind", ["classes", "globals", "import"])
def test_server_refuses_templates_that_reach_for_python(model, tmp_path, kind):
    """llama-server's own template interpreter has no Python objects."""
    path = with_template(model, tmp_path / "evil.gguf", ATTACKS[kind].replace("{marker}", str(tmp_path / "marker")))
    command = [sys.executable, "-m", "pypop_gguf", "serve", str(path), "--threads", "1", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "chat template parsing error" in done.stderr + done.stdout
    assert not (tmp_path / "marker").exists()


def test_another_template_starts_a_server_whose_file_has_an_endless_one(model, tmp_path):
    """llama-server tries a file's template when it loads the model, and limits neither its loops nor its depth."""
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    path = with_template(model, tmp_path / "evil.gguf", endless)
    with serve(path, tmp_path / "log.txt", *OPTIONS, "--chat-template", "chatml") as server:
        body = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}'
        assert ask(server, "/v1/chat/completions", body)[0] == 200


# Models from Hugging Face


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickled_weights_are_not_loaded(tmp_path, capsys):
    model = Path(shutil.copytree(BUNDLED, tmp_path / "model"))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    (model / "model.safetensors").rename(model / "others.safetensors")  # the converter looks for another name
    assert main(["convert", str(model), "--outfile", str(tmp_path / "a.gguf")]) == 1
    assert "weights there" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists() and not (tmp_path / "a.gguf").exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "marker").exists()


def with_code(directory: Path, marker: Path, config: dict, **tokenizer) -> Path:
    """Makes a model directory ask for a Python module of its own, for configuration, model and tokenizer."""
    (directory / "evil.py").write_text(
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    (directory / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}})
    )
    path = directory / "tokenizer_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    evil = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    path.write_text(json.dumps({**own, **tokenizer, "auto_map": evil}))
    return directory


def test_code_beside_a_model_is_not_run(tmp_path):
    """Transformers and llama.cpp's converter both have a class of their own for this model."""
    model = Path(shutil.copytree(BUNDLED, tmp_path / "model"))
    with_code(model, tmp_path / "marker", json.loads((model / "config.json").read_text()))
    few = ["--calibration-samples", "2", "--calibration-tokens", "16"]
    assert main(["convert", str(model), "--importance", *few, "--outfile", str(tmp_path / "a.gguf")]) == 0
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_tokenizer_runs_only_where_it_is_trusted(tmp_path, capsys, trusted, monkeypatch):
    """llama.cpp's converter lets Transformers run the code of many kinds of tokenizers, this one among them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    directory = Path(shutil.copytree(BUNDLED, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.model")))
    (directory / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}'
    )
    config = {**json.loads((directory / "config.json").read_text()), "architectures": ["DreamModel"]}
    with_code(directory, tmp_path / "marker", config, tokenizer_class="EvilTokenizer")
    command = ["convert", str(directory), "--no-importance", "--outfile", str(tmp_path / "a.gguf")]
    # The converter fails either way, because it does not know this kind of tokenizer.
    assert main([*command, *["--trust-remote-code"] * trusted]) == 1
    assert (tmp_path / "marker").exists() is trusted
    assert ("which is not run: give --trust-remote-code where you trust it" in capsys.readouterr().err) is not trusted
