"""The real ``openai`` client against ``pop-gguf serve``: chat, streaming, tools, JSON, embeddings, cancelling."""

import itertools
import json
import time

import openai
import pytest

from tests.support.server import TOOL_TEMPLATE, serve

TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints the ball.",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"enum": ["red", "blue"]},
                "coats": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["colour", "coats"],
        },
    },
}
MESSAGES = [{"role": "user", "content": "Tell me about a red ball and a small dog that lived near the river."}]


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory):
    from pypop_gguf.cli import main

    path = tmp_path_factory.mktemp("openai") / "lab.gguf"
    assert main(["convert", str(bundled_gguf), "--boundary", "8", "--outfile", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve")
    (directory / "template.jinja").write_text(TOOL_TEMPLATE)
    options = (
        "--threads",
        1,
        "--context",
        4096,
        "--server-options",
        "--chat-template-file",
        directory / "template.jinja",
    )
    with serve(model, directory / "log.txt", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "lab", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **options}
    )


def test_chat_is_pruned_and_says_so(client):
    done = chat(client, extra_body={"cache_prompt": False})
    assert done.choices[0].message.content and done.usage.completion_tokens == 16
    assert done.model_extra["timings"]["pruned_n"] == done.usage.prompt_tokens - 1
    whole = chat(client, extra_body={"cache_prompt": False, "pop": False})
    assert whole.model_extra["timings"]["pruned_n"] == 0


def test_stream_brings_the_same_text_and_the_timings_last(client):
    text = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 16
    assert any("pruned_n" in (chunk.model_extra.get("timings") or {}) for chunk in chunks[-2:])


def test_tool_is_called_with_arguments_of_its_schema(client, server):
    # A model may write words before it calls a tool. This toy model would never come to the call, so a bias on the
    # opening brace makes it begin with one.
    (brace,) = server.post("/tokenize", content="{", add_special=False)["tokens"][-1:]
    done = chat(client, tools=[TOOL], tool_choice="required", max_tokens=128, logit_bias={brace: 100})
    call = done.choices[0].message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "paint" and done.choices[0].finish_reason == "tool_calls"
    assert arguments["colour"] in ("red", "blue") and 1 <= arguments["coats"] <= 9
    assert done.model_extra["timings"]["pruned_n"] > 0


def test_answer_follows_a_json_schema(client):
    schema = TOOL["function"]["parameters"]
    done = chat(
        client,
        response_format={"type": "json_schema", "json_schema": {"name": "paint", "schema": schema}},
        max_tokens=128,
    )
    assert set(json.loads(done.choices[0].message.content)) == {"colour", "coats"}


def test_json_mode_writes_nothing_but_json(client):
    text = chat(client, response_format={"type": "json_object"}, max_tokens=64).choices[0].message.content
    assert text.lstrip().startswith("{")


def test_closing_a_stream_stops_the_work(client, server):
    stream = chat(client, stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert server.metric("requests_processing") == 1
    stream.close()
    for _ in itertools.takewhile(lambda _: server.metric("requests_processing"), range(200)):
        time.sleep(0.05)
    assert server.metric("requests_processing") == 0


def test_a_prompt_that_does_not_fit_is_refused_in_words(client):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        chat(client, messages=[{"role": "user", "content": "ball " * 5000}])


def test_embeddings_are_the_whole_models(bundled_gguf, model, tmp_path):
    """Embeddings are computed by every layer, so a file with a boundary and one without give the same."""
    vectors = []
    for name, path in (("pruned", model), ("plain", bundled_gguf)):
        with (
            serve(
                path,
                tmp_path / f"{name}.txt",
                "--threads",
                1,
                "--context",
                512,
                "--server-options",
                "--embeddings",
                "--pooling",
                "mean",
            ) as server,
            openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
        ):
            done = client.embeddings.create(model="lab", input=["a red ball", "a small dog"], encoding_format="float")
            vectors.append([one.embedding for one in done.data])
    assert vectors[0] == vectors[1] and len(vectors[0]) == 2 and vectors[0][0] != vectors[0][1]
