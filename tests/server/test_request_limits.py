"""How far a request may lead the server's parsers, the tokenizer and the samplers: see csrc/pop-limits.h and patch 0010."""

import json

import pytest

from tests.support.server import OPTIONS, TOOL_TEMPLATE, ask, serve


@pytest.fixture
def server(served_gguf, tmp_path):
    """One for each test, which still serves after it."""
    with serve(served_gguf, tmp_path / "log.txt", *OPTIONS[:-1]) as running:
        yield running
        assert running.complete("The cat", n_predict=2)["tokens_predicted"] == 2


def nested(n: int, opening: str, inner: str, closing: str) -> str:
    return opening * n + inner + closing * n


def bounded() -> dict[str, tuple[str, bytes, str]]:
    """What upstream's parsers would follow to the end of the stack, of memory or of time: path, body, and the error."""

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
        "schema with a long name": (*completion(json_schema=name), "a name of more than 1024 bytes"),
        "schema of names that are no rules'": (*completion(json_schema=collide), "the schema is too large"),
        "schema of optional properties": (*completion(json_schema=optional), "the schema is too large"),
        "nested grammar": (
            *completion(grammar="root ::= " + nested(200_000, "(", '"a"', ")")),
            "failed to parse grammar",
        ),
        "chained grammar": (*completion(grammar=chain), "failed to parse grammar"),
        "doubling grammar": (*completion(grammar=doubling), "failed to parse grammar"),
        "trigger of no kind": (
            *completion(**lazy, grammar_triggers=[{"type": 9, "value": "a"}]),
            "trigger is neither a token (0) nor a word (1)",
        ),
        "endless trigger": (
            *completion(**lazy, grammar_triggers=[{"type": 2, "value": "(\\w|\\s)*(\\w|.)*#"}]),
            "trigger is neither a token",
        ),
        "circle of parsers": (*completion(chat_parser=circle), "is not for clients"),
        "memory of a sampler": (*completion(dry_multiplier=1, dry_penalty_last_n=2**31 - 1), "Value must be between"),
        "nested trigger": (
            *completion(**lazy, grammar_triggers=[{"type": 2, "value": nested(50_000, "(", "a", ")")}]),
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
    """A regular expression went through them, one call within the other for each character."""
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
    """A call that may hold lists of lists only, led to open one after the other. The bundled model has one token for each byte."""
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
    """They are JSON in a text, which some templates want to have parsed."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}{{ v | tojson }}"
    template += "{% endfor %}{% endfor %}{{ m.content }}{% endfor %}"
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
        assert status in (400, 500) and "nested deeper" in text
        assert server.complete("The cat", n_predict=2)["tokens_predicted"] == 2


def test_types_of_references_that_fan_out_are_found_once(served_gguf, tmp_path):
    """Two references to what has two references, 60 deep: followed one by one they would never end."""
    template = "{% for t in tools or [] %}<tool_call>\n<function={{ t.function.name }}>\n<parameter=x>{% endfor %}{{ messages[0].content }}"
    schemas = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)} | {
        "a60": {"type": "integer"}
    }
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": schemas}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with serve(served_gguf, tmp_path / "log.txt", *OPTIONS, "--chat-template", template) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": [tool], "max_tokens": 4}).encode()
        status, text, _ = ask(server, "/v1/chat/completions", body)
        assert status == 200 or "model produced output that does not match" in text  # it knows no tools


def test_brackets_in_texts_do_not_count_as_nesting(server):
    status, text, _ = ask(server, "/completion", json.dumps({"prompt": '[{"\\' * 200, "n_predict": 1}).encode())
    assert status == 200, text
