"""Programs of others that run on ``PopLlama`` or on ``pop-gguf serve``: llama-cpp-python's own server and LangChain."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import llama_cpp
import pytest
from langchain_community.chat_models import ChatLlamaCpp
from langchain_openai import ChatOpenAI

from pypop_gguf import PopLlama
from pypop_gguf.cli import main
from tests.support.paths import ROOT
from tests.support.server import running, serve

PAGE = (ROOT / "docs" / "integrations.md").read_text()
PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map."
ONE_THREAD = dict(n_threads=1, n_threads_batch=1, verbose=False)


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("integrations") / "model.gguf"
    assert main(["convert", str(bundled_gguf), "--boundary", "8", "--no-importance", "--outfile", str(path)]) == 0
    return path


@pytest.fixture
def chat(model, monkeypatch):
    """Opens LangChain's model with the arguments of docs/integrations.md."""
    own = dict(
        rope_freq_base=0,
        rope_freq_scale=0,
        n_ctx=256,
        n_batch=64,
        n_threads=1,
        verbose=False,
        temperature=0,
        max_tokens=12,
    )

    def open_model(kind, **options):
        monkeypatch.setattr(llama_cpp, "Llama", kind)
        return ChatLlamaCpp(model_path=str(model), **own, model_kwargs={"n_threads_batch": 1, **options})

    return open_model


# llama-cpp-python's own server


@pytest.fixture(scope="module")
def fastapi_server(model, tmp_path_factory):
    code, options = re.search(r'python -c "(.+?)" \\\n +(.+)', PAGE).groups()
    assert options == "--model model.gguf --logits_all false --flash_attn true"
    arguments = [
        "--model",
        model,
        "--logits_all",
        "false",
        "--flash_attn",
        "true",
        "--n_ctx",
        256,
        "--n_threads",
        1,
        "--n_threads_batch",
        1,
        "--verbose",
        "false",
    ]
    with running(["-c", code], arguments, tmp_path_factory.mktemp("server") / "log.txt", "/v1/models") as server:
        yield server


def streamed(server, path: str, **body) -> list[dict]:
    request = urllib.request.Request(
        server.url + path, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return [json.loads(line.removeprefix(b"data: ")) for line in response if line.startswith(b"data: {")]


def test_llama_cpp_pythons_server_prunes(fastapi_server, model):
    llm = PopLlama(str(model), n_ctx=256, **ONE_THREAD)
    expected = llm.create_completion(PROMPT, max_tokens=12, temperature=0)
    body = dict(prompt=PROMPT, max_tokens=12, temperature=0, repeat_penalty=1)
    assert fastapi_server.post("/v1/completions", **body)["choices"][0]["text"] == expected["choices"][0]["text"]
    fastapi_server.post("/v1/completions", prompt="Another", max_tokens=1)  # so that its cache no longer holds PROMPT
    chunks = streamed(fastapi_server, "/v1/completions", **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected["choices"][0]["text"]
    timings = chunks[-1]["timings"]
    assert timings["pruned_n"] == timings["prompt_n"] - 1 > 10 and timings["boundary"] == 8
    llm.close()


def test_chat_of_llama_cpp_pythons_server_is_the_objects(fastapi_server, model):
    llm = PopLlama(str(model), n_ctx=256, **ONE_THREAD)
    messages = [{"role": "user", "content": PROMPT}]
    expected = llm.create_chat_completion(messages, max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
    done = fastapi_server.post(
        "/v1/chat/completions", messages=messages, max_tokens=12, temperature=0, repeat_penalty=1
    )
    assert done["choices"][0]["message"]["content"] == expected
    llm.close()


# LangChain


def test_langchain_in_process_prunes(chat, model):
    llm = PopLlama(str(model), n_ctx=256, **ONE_THREAD)
    messages = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": PROMPT}]
    expected = llm.create_chat_completion(messages, max_tokens=12, temperature=0, repeat_penalty=1.1)["choices"][0][
        "message"
    ]["content"]
    pop = chat(PopLlama)
    given = [("system", "You tell stories."), ("human", PROMPT)]
    pop.streaming = False
    assert pop.invoke(given).content == expected
    assert pop.client.timings.pruned_tokens == pop.client.timings.prompt_tokens - 1
    pop.client.reset()
    assert "".join(chunk.content for chunk in pop.stream(given)) == expected
    assert pop.client.timings.pruned_tokens > 10
    llm.close()
    pop.client.close()


def test_langchain_with_pruning_off_answers_as_with_the_parent(chat):
    parent = llama_cpp.Llama
    answers = []
    for kind, options in ((PopLlama, {"pop": False}), (parent, {}), (PopLlama, {"pop_boundary": 1})):
        llm = chat(kind, **options)
        answers.append(llm.invoke(PROMPT).content)
        llm.client.close()
    assert answers[0] == answers[1] != answers[2]


def test_langchain_binds_tools(chat):
    llm = chat(PopLlama, chat_format="chatml-function-calling")
    colour = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    paint = {"type": "function", "function": {"name": "paint", "description": "Paints the ball.", "parameters": colour}}
    llm.streaming, llm.max_tokens = False, 64
    bound = llm.bind_tools([paint], tool_choice={"type": "function", "function": {"name": "paint"}})
    (call,) = bound.invoke("Paint the ball").tool_calls
    assert call["name"] == "paint" and call["args"]["colour"] in ("red", "blue")
    assert llm.client.timings.pruned_tokens > 10
    llm.client.close()


def test_langchain_against_the_server(model, tmp_path):
    with serve(model, tmp_path / "log.txt", "--threads", 1, "--context", 512) as server:
        llm = ChatOpenAI(
            base_url=server.url + "/v1", api_key="none", model="any", temperature=0, max_tokens=12, max_retries=0
        )
        text = llm.invoke(PROMPT).content
        assert text and server.metric("prompt_tokens_pruned_total") > 10
        assert "".join(chunk.content for chunk in llm.stream(PROMPT)) == text
        pruned = server.metric("prompt_tokens_pruned_total")
        llm.bind(extra_body={"pop": False}).invoke(PROMPT)
        assert server.metric("prompt_tokens_pruned_total") == pruned


def test_example_of_the_page_runs(model):
    (example,) = re.findall(r"^```python\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=model.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "pruned_tokens=" in done.stdout and "pruned_tokens=0" not in done.stdout, (
        done.stderr
    )


def test_logits_of_every_token_are_said_to_cost_the_pruning(model, capfd):
    llm = PopLlama(str(model), n_ctx=64, logits_all=True, **ONE_THREAD)
    advice = capfd.readouterr().err
    assert advice.count("\n") == 1 and "logits_all=True" in advice
    llm.create_completion("Once upon a time", max_tokens=1)
    assert llm.timings.pruned_tokens == 0
    llm.close()
