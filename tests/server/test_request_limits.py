"""Limits on what a request may ask of the server's parsers, tokenizer and samplers.

csrc/pop-limits.h checks each request; some parsers limit themselves (third_party/patches/upstream).
"""

import json
import re

import pytest

from tests.support.server import OPTIONS, TOOL_TEMPLATE, ask, serve


@pytest.fixture
def server(served_gguf, tmp_path):
    """A server for one test, which has to answer another request after it."""
    with serve(served_gguf, tmp_path / "log.txt", *OPTIONS[:-1]) as running:
        yield running
        assert running.complete("The cat", n_predict=2)["tokens_predicted"] == 2


def nested(n: int, opening: str, inner: str, closing: str) -> str:
    return opening * n + inner + closing * n


def bounded() -> dict[str, tuple[str, bytes, str]]:
    """Requests that would take upstream's parsers too much stack, memory or time: path, body, and the error."""

    def completion(**fields) -> tuple[str, bytes]:
        return "/completion", json.dumps({"prompt": "a", "n_predict": 1, **fields}).encode()

    def raw(field: str) -> tuple[str, bytes]:
        return "/completion", f'{{"prompt": "a", "n_predict": 1, {field}}}'.encode()

    def chat(field: str) -> tuple[str, bytes]:
        return (
            "/v1/chat/completions",
            f'{{"max_tokens": 1, {field}, "messages": [{{"role": "user", "content": "a"}}]}}'.encode(),
        )

    brackets = nested(100_000, "[", "", "]")
    chain = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(400_000)) + 'a400000 ::= "a"\n'
    doubling = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1} | a{i + 1}\n" for i in range(60)) + "a60 ::= a0\n"
    references = {
        "$ref": "#/$defs/a0",
        "$defs": {**{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(50_000)}, "a50000": {}},
    }
    fan_out = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    copies = {f"a{i}": {"properties": {"x": fan_out[f"a{i}"]}} for i in range(60)} | {"a60": {"type": "integer"}}
    types = {"type": "integer"}
    for _ in range(60):
        types = {"type": ["object", "object"], "properties": {"x": types}}
    itself = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}
    name = {"type": "object", "properties": {"a" * 1_000_000: {}}, "additionalProperties": {"type": "string"}}
    collide = {
        "type": "object",
        "properties": {chr(i): {"items": {"const": i}} for i in range(0x4E00, 0x9C00)},
        "additionalProperties": False,
    }
    optional = {
        "type": "object",
        "properties": {f"a{i}": {"type": "integer"} for i in range(20_000)},
        "additionalProperties": False,
    }
    circle = json.dumps({"parsers": [{"type": "ref", "name": "a"}], "rules": {"a": 0}, "root": 0})
    lazy = {"grammar": 'root ::= "a"', "grammar_lazy": True}
    return {
        "nested JSON": (*raw(f'"x": {brackets}'), "nested deeper"),
        "nested template arguments": (*chat(f'"chat_template_kwargs": {{"a": {brackets}}}'), "nested deeper"),
        "nested schema": (*raw('"json_schema": ' + nested(50_000, '{"items":', "{}", "}")), "nested deeper"),
        "schema of references": (*completion(json_schema=references), "nested deeper"),
        "schema of itself": (*completion(json_schema=itself), "nested deeper"),
        "schema of references that fan out": (
            *completion(json_schema={"$ref": "#/$defs/a0", "$defs": copies}),
            "the schema is too large",
        ),
        "schema of types that fan out": (*completion(json_schema=types), "the schema is too large"),
        "schema with a long name": (*completion(json_schema=name), "a name of more than 256 characters"),
        "schema of names that are no rules'": (*completion(json_schema=collide), "the schema is too large"),
        "schema of optional properties": (*completion(json_schema=optional), "the schema is too large"),
        "nested grammar": (*completion(grammar="root ::= " + nested(200_000, "(", '"a"', ")")), "nested deeper"),
        "chained grammar": (*completion(grammar=chain), "failed to parse grammar"),
        "doubling grammar": (*completion(grammar=doubling), "failed to parse grammar"),
        "trigger of no kind": (
            *completion(**lazy, grammar_triggers=[{"type": 9, "value": "a"}]),
            "trigger is neither a token",
        ),
        "endless trigger": (
            *completion(**lazy, grammar_triggers=[{"type": 2, "value": "(\\w|\\s)*(\\w|.)*#"}]),
            "trigger is neither a token",
        ),
        "circle of parsers": (*completion(chat_parser=circle), "is not for clients"),
        "memory of a sampler": (
            *completion(dry_multiplier=1, dry_penalty_last_n=2**31 - 1),
            '"dry_penalty_last_n\\" is more than',
        ),
        "long trigger": (
            *completion(**lazy, grammar_triggers=[{"type": 1, "value": nested(50_000, "(", "a", ")")}]),
            "longer than 1024 bytes",
        ),
        "prompts": (*completion(prompt=["a"] * 200_000), "prompts in one request: give 1024 at most"),
    }


@pytest.mark.parametrize("kind", bounded())
def test_nested_and_endless_requests_are_refused(server, kind):
    path, body, reason = bounded()[kind]
    status, text, _ = ask(server, path, body)
    assert status == 400 and reason in text


@pytest.mark.parametrize("schema", ["property", "reference"])
def test_long_names_in_schemas_are_taken(server, schema):
    """Upstream's regular expression recurses for each character."""
    name = "!" * 1_000_000
    of = {
        "property": {"type": "object", "properties": {name: {}}, "additionalProperties": False},
        "reference": {"$ref": f"#/$defs/{name}", "$defs": {name: {}}},
    }
    status, text, _ = ask(
        server, "/completion", json.dumps({"prompt": "a", "n_predict": 1, "json_schema": of[schema]}).encode()
    )
    assert status == 200, text


def test_properties_whose_names_no_rule_can_have_stay_apart(server):
    kinds = {"a!b": 1, "a?b": "x", "a!!b": True, "a-b": None, "猫": 2, "犬": "y", "-": 3}
    schema = {
        "type": "object",
        "properties": {name: {"const": value} for name, value in kinds.items()},
        "required": list(kinds),
    }
    status, text, _ = ask(
        server, "/completion", json.dumps({"prompt": "a", "n_predict": 200, "json_schema": schema}).encode()
    )
    assert status == 200 and json.loads(json.loads(text)["content"]) == kinds


def test_deep_brackets_that_the_model_writes_end_in_an_error(served_gguf, tmp_path):
    """The model is led to open one list inside another in a call.

    The bundled model has one token for each byte, so that its next token can be chosen by a bias.
    """
    (tmp_path / "template.jinja").write_text(TOOL_TEMPLATE)
    lists = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    parameters = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/a"}},
        "required": ["x"],
        "$defs": {"a": lists},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    fields = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [tool],
        "tool_choice": "required",
        "max_tokens": 700,
    }
    with serve(
        served_gguf, tmp_path / "log.txt", *OPTIONS, "--chat-template-file", tmp_path / "template.jinja"
    ) as server:
        curly, square = (server.post("/tokenize", content=bracket)["tokens"][-1] for bracket in "{[")
        fields["logit_bias"] = [[curly, 100], [square, 90]]
        few, error, _ = ask(server, "/v1/chat/completions", json.dumps({**fields, "max_tokens": 200}).encode())
        assert few == 200 and "[" * 100 in error
        status, error, _ = ask(server, "/v1/chat/completions", json.dumps(fields).encode())
        assert status == 400 and "nested deeper" in error
        assert server.complete("The cat", n_predict=2)["tokens_predicted"] == 2


def test_nested_arguments_of_tools_are_refused(served_gguf, tmp_path):
    """They are JSON in a text, and this template has it parsed."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
    template += "{{ k }}{{ v | tojson }}{% endfor %}{% endfor %}{{ m.content }}{% endfor %}"
    call = {
        "type": "function",
        "id": "1",
        "function": {"name": "f", "arguments": f'{{"a": {nested(100_000, "[", "", "]")}}}'},
    }
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    with serve(served_gguf, tmp_path / "log.txt", *OPTIONS, "--chat-template", template) as server:
        status, text, _ = ask(
            server, "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 1}).encode()
        )
        assert status == 400 and "nested deeper" in text
        assert server.complete("The cat", n_predict=2)["tokens_predicted"] == 2


# Qwen3-Coder writes calls this way. Its grammar depends on which types a parameter may have.
CODER_TEMPLATE = "{% for t in tools or [] %}<tool_call>\n<function={{ t.function.name }}>\n<parameter=x>{% endfor %}"
CODER_TEMPLATE += "{{ messages[0].content }}"


def with_parameter(schema: dict, definitions: dict) -> bytes:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    fields = {"tool_choice": "required", "max_tokens": 1, "verbose": True}
    return json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": [tool], **fields}).encode()


@pytest.fixture
def coder(served_gguf, tmp_path):
    with serve(served_gguf, tmp_path / "log.txt", *OPTIONS, "--chat-template", CODER_TEMPLATE) as running:
        yield running
        assert running.complete("The cat", n_predict=2)["tokens_predicted"] == 2


@pytest.mark.parametrize("keyword", ["anyOf", "allOf", "type"])
def test_types_of_references_that_fan_out_are_refused(coder, keyword):
    """Each schema leads to the next one twice, 60 deep. Upstream follows each reference and would never end."""

    def doubled(reference: dict) -> dict:
        return {"type": ["string", "string"], "allOf": [reference]} if keyword == "type" else {keyword: [reference] * 2}

    definitions = {f"a{i}": doubled({"$ref": f"#/$defs/a{i + 1}"}) for i in range(60)} | {"a60": {"type": "integer"}}
    status, text, _ = ask(coder, "/v1/chat/completions", with_parameter({"$ref": "#/$defs/a0"}, definitions))
    assert status == 400 and "the schema is too large" in text


def test_types_of_references_in_a_circle_are_those_that_upstream_finds(coder):
    """A is B or a string, B is A and (a string or an integer). So both can only be strings, written without quotes."""
    a, b = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}
    string, integer = {"type": "string"}, {"type": "integer"}
    definitions = {"A": {"anyOf": [b, string]}, "B": {"allOf": [a, {"anyOf": [string, integer]}]}}
    for schema, is_string in [({"allOf": [a, b]}, True), (a, True), (string, True), (integer, False)]:
        status, text, _ = ask(coder, "/v1/chat/completions", with_parameter(schema, definitions))
        assert status == 200, text
        rule = re.search(
            r"^tool-f-arg-x ::= (.*)$", json.loads(text)["__verbose"]["generation_settings"]["grammar"], re.MULTILINE
        )[1]
        assert ("xml-arg-string" in rule) is is_string, (schema, rule)


def test_brackets_in_texts_do_not_count_as_nesting(server):
    status, text, _ = ask(server, "/completion", json.dumps({"prompt": '[{"\\' * 200, "n_predict": 1}).encode())
    assert status == 200, text


def test_brackets_in_literals_of_a_grammar_do_not_count_as_nesting(server):
    """Nor do those in a set of characters or in a comment. A group goes on over the end of a line."""
    grammar = "root ::= (" + '"(" [(\\]] # ((\n' * 300 + ")"
    status, text, _ = ask(
        server, "/completion", json.dumps({"prompt": "a", "n_predict": 2, "grammar": grammar}).encode()
    )
    assert status == 200 and json.loads(text)["content"].startswith("("), text


# Fields that OpenAI's endpoints have and this server does not serve

PROMPT, INPUT = {"prompt": "The cat", "max_tokens": 1}, {"input": "The cat"}
UNSERVED = [
    ("/v1/completions", {**PROMPT, "echo": True, "logprobs": 1}, '"echo" is not served: PopLlama with logits_all=True'),
    ("/completion", {**PROMPT, "echo": True}, '"echo" is not served'),
    (
        "/v1/completions",
        {**PROMPT, "suffix": " sat."},
        '"suffix" is not served: send the text after the gap to /infill',
    ),
    ("/v1/completions", {**PROMPT, "best_of": 3}, '"best_of" is not served: ask for "n" answers'),
    ("/v1/embeddings", {**INPUT, "dimensions": 16}, '"dimensions" is not served'),
]


@pytest.mark.parametrize(("path", "body", "error"), UNSERVED)
def test_fields_that_are_not_served_are_refused(server, path, body, error):
    """They were left out without a word. lm-evaluation-harness scored every choice alike."""
    status, text, _ = ask(server, path, json.dumps(body).encode())
    assert status == 400 and json.loads(text)["error"]["message"].startswith(error), text


def test_fields_that_ask_for_nothing_else_are_served(server):
    fields = {"echo": False, "suffix": None, "best_of": 1, "n": 1}
    status, text, _ = ask(server, "/v1/completions", json.dumps({**PROMPT, **fields}).encode())
    assert status == 200, text
    status, text, _ = ask(server, "/v1/completions", json.dumps({**PROMPT, "n": 2, "best_of": 2}).encode())
    assert status == 200 and len(json.loads(text)["choices"]) == 2
