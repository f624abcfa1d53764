"""Random bodies of requests to llama-server, for http_requests.py.

Their values are invalid, too large, too many, too long, or lead to one another without end.
"""

from __future__ import annotations

import json
import random

_NUMBERS = [
    0,
    1,
    2,
    3,
    0.5,
    -1,
    -2,
    100,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**63,
    -(2**63),
    2**64,
    1e-30,
    1e30,
    1e308,
    -1e308,
]
_FLAGS = [
    "stream",
    "cache_prompt",
    "pop",
    "return_tokens",
    "return_progress",
    "timings_per_token",
    "verbose",
    "post_sampling_probs",
    "echo",
]
_FLAGS += [
    "backend_sampling",
    "ignore_eos",
    "grammar_lazy",
    "parse_tool_calls",
    "parallel_tool_calls",
    "reasoning_control",
    "add_generation_prompt",
]
_AMOUNTS = [
    "n_indent",
    "n_keep",
    "n_discard",
    "n_cmpl",
    "n",
    "n_cache_reuse",
    "t_max_predict_ms",
    "top_k",
    "top_p",
    "min_p",
    "top_n_sigma",
]
_AMOUNTS += [
    "xtc_probability",
    "xtc_threshold",
    "typical_p",
    "temperature",
    "dynatemp_range",
    "dynatemp_exponent",
    "repeat_last_n",
]
_AMOUNTS += [
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
]
_AMOUNTS += [
    "dry_penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "adaptive_target",
    "adaptive_decay",
    "seed",
    "n_probs",
]
_AMOUNTS += [
    "logprobs",
    "top_logprobs",
    "min_keep",
    "sse_ping_interval",
    "reasoning_budget_tokens",
    "thinking_budget_tokens",
    "id_slot",
    "chat_format",
]
_TEXTS = [
    "generation_prompt",
    "reasoning_format",
    "reasoning_effort",
    "chat_template",
    "input_prefix",
    "input_suffix",
    "suffix",
    "grammar_type",
]
_TEXTS += [
    "reasoning_budget_start_tag",
    "reasoning_budget_end_tag",
    "reasoning_budget_message",
    "model",
    "user",
    "content",
    "input",
    "query",
]
_LISTS = [
    "stop",
    "samplers",
    "dry_sequence_breakers",
    "preserved_tokens",
    "response_fields",
    "reasoning_budget_end_tags",
    "tokens",
    "documents",
]
_OTHERS = [
    "lora",
    "stream_options",
    "chat_template_kwargs",
    "continue_final_message",
    "message_delimiters",
    "multimodal_data",
    "input_extra",
]
PATHS = [
    "/completion",
    "/v1/completions",
    "/v1/chat/completions",
    "/infill",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/messages",
]
PATHS += [
    "/v1/responses",
    "/embedding",
    "/v1/embeddings",
    "/rerank",
    "/props",
    "/slots/0?action=erase",
    "/lora-adapters",
    "/v1/messages/count_tokens",
]


def text(chance: random.Random) -> str:
    piece = chance.choice(
        [
            "a",
            "The cat",
            "!",
            "[",
            "(",
            "{",
            '"',
            "\\",
            "\0",
            "\n",
            "é",
            "猫",
            "\ud800",
            "%s",
            "<|im_end|>",
            "{{ 1 }}",
            "^(a*)*$",
            " ",
        ]
    )
    return piece * chance.choice([0, 1, 1, 1, 2, 50, 1000, 1000, 200_000])


def number(chance: random.Random) -> float:
    return chance.choice([*_NUMBERS, chance.uniform(-2, 2), chance.randint(-10, 5000)])


def anything(chance: random.Random, depth: int = 0) -> object:
    kind = chance.random()
    if kind < 0.3:
        return number(chance)
    if kind < 0.6:
        return text(chance)
    if kind < 0.75 or depth > 3:
        return chance.choice([None, True, False])
    many = chance.choice([0, 1, 2, 5, 300 if depth == 0 else 3])
    if kind < 0.9:
        return [anything(chance, depth + 1) for _ in range(many)]
    return {text(chance)[:100]: anything(chance, depth + 1) for _ in range(many)}


def texts(chance: random.Random) -> list:
    return [text(chance) for _ in range(chance.choice([0, 1, 3, 500]))]


def schema(chance: random.Random, depth: int = 0) -> object:
    kind = chance.choice(
        ["object", "object", "array", "string", "integer", "ref", "any", "const", "pattern", "types", "circle", "wild"]
    )
    if depth > 4 and kind in ("object", "array", "any", "types", "circle"):
        kind = "string"

    def inner() -> dict:
        return schema(chance, depth + 1)

    if kind == "object":
        count = chance.choice([0, 1, 3, 3, 2000 if depth == 0 else 2])
        named = chance.random() < 0.5
        names = [chr(0x4E00 + i) if named else text(chance) for i in range(count)]
        made = {
            "type": "object",
            "properties": {name: {"const": i} if count > 9 else inner() for i, name in enumerate(names)},
        }
        made |= {"required": names[: chance.randint(0, 3)]} if chance.random() < 0.5 else {}
        made |= (
            {"additionalProperties": chance.choice([False, True, {"type": "string"}])} if chance.random() < 0.5 else {}
        )
    elif kind == "array":
        made = {"type": "array", "items": inner(), "minItems": number(chance), "maxItems": number(chance)}
    elif kind == "string":
        made = {
            "type": "string",
            "minLength": number(chance),
            "maxLength": number(chance),
            "format": chance.choice(["date", "uuid", "time", "x"]),
        }
    elif kind == "integer":
        made = {"type": "integer", "minimum": number(chance), "maximum": number(chance)}
    elif kind == "ref":
        name = chance.choice(["a", "b", text(chance)])
        made = {
            "$ref": f"#/$defs/{name}",
            "$defs": {"a": inner(), "b": {"$ref": "#/$defs/a"}, name: {"$ref": "#/$defs/b"}},
        }
    elif kind == "any":
        made = {chance.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(chance.randint(0, 4))]}
    elif kind == "const":
        made = {chance.choice(["const", "enum"]): anything(chance, 2)}
    elif kind == "types":
        made = {
            "type": [chance.choice(["object", "null", "integer", ["array"]]) for _ in range(3)],
            "properties": {"x": inner()},
        }
    elif kind == "circle":
        count = chance.choice([2, 3, 12])
        references = [{"$ref": f"#/$defs/c{i}"} for i in range(count)]
        keyword = lambda: chance.choice(["anyOf", "allOf"])  # noqa: E731
        made = {
            "$defs": {
                f"c{i}": {keyword(): [*chance.sample(references, chance.randint(1, count)), inner()]}
                for i in range(count)
            }
        }
        made |= {keyword(): references}
    elif kind == "pattern":
        patterns = ["(a|b)", "(" * 500, "[a-z]{1,9999}", "((a{0,99}){0,99}){0,99}", "\\d+", ".*", text(chance)]
        made = {"type": "string", "pattern": chance.choice(["^", ""]) + chance.choice(patterns) + "$"}
    else:
        made = anything(chance, 1)
    return made


def grammar(chance: random.Random) -> str:
    if chance.random() < 0.2:
        return text(chance)
    atoms = [
        '"a"',
        "[a-z]",
        ".",
        "root",
        "b",
        '""',
        '"' + "é" * 500 + '"',
        "[^\\x00]",
        "\\U0010FFFF",
        "<[1]>",
        "!<[2]>",
    ]
    marks = ["", "*", "+", "?", "{3}", "{0,2000}", "{2,}", "{0,99999999999}"]

    def alternatives(depth: int = 0) -> str:
        parts = []
        for _ in range(chance.randint(1, 3)):
            atom = f"({alternatives(depth + 1)})" if depth < 3 and chance.random() < 0.4 else chance.choice(atoms)
            parts.append(atom + chance.choice(marks))
        return chance.choice([" ", " | "]).join(parts)

    return f"root ::= {alternatives()}\nb ::= {alternatives()}\n"


def triggers(chance: random.Random) -> list:
    words = [
        "a",
        "",
        " ",
        "e",
        "(a*)*b",
        "(\\w|\\s|.)*(\\w|\\s|.)*(\\w|\\s|.)*#",
        "(" * 900,
        "[",
        "a{0,999}",
        text(chance),
    ]
    return [
        {"type": chance.choice([0, 1, 2, 3, 4, -1]), "value": chance.choice(words), "token": number(chance)}
        for _ in range(chance.randint(0, 3))
    ]


def parser(chance: random.Random) -> str:
    kinds = [{"type": "ref", "name": "a"}, {"type": "epsilon"}, {"type": "any"}, {"type": "choice", "children": [0, 0]}]
    kinds += [
        {"type": "sequence", "children": [1, 0]},
        {"type": "repetition", "child": 0, "min_count": 0, "max_count": -1},
    ]
    kinds += [{"type": "rule", "name": "a", "child": 0, "trigger": False}]
    return json.dumps(
        {
            "parsers": [chance.choice(kinds) for _ in range(3)],
            "rules": {"a": chance.randint(0, 3)},
            "root": chance.randint(0, 3),
        }
    )


def tools(chance: random.Random) -> list:
    def named() -> dict:
        return {"name": chance.choice(["f", text(chance)]), "description": "x", "parameters": schema(chance)}

    return [{"type": "function", "function": named()} for _ in range(chance.randint(0, 3))]


def messages(chance: random.Random) -> list:
    made = []
    for _ in range(chance.choice([0, 1, 1, 1, 3])):
        parts = [[{"type": "text", "text": text(chance)}], [{"type": "image_url", "image_url": {"url": text(chance)}}]]
        content = chance.choice([text(chance), *parts, None, anything(chance)])
        made.append(
            {"role": chance.choice(["user", "user", "assistant", "system", "tool", text(chance)]), "content": content}
        )
        if chance.random() < 0.2:
            made[-1]["tool_calls"] = [
                {
                    "type": "function",
                    "id": "1",
                    "function": {"name": "f", "arguments": chance.choice(["{}", text(chance)])},
                }
            ]
    return made


def field(chance: random.Random) -> dict:
    """Return one field, or several that belong together."""
    made = {
        "flag": lambda: {chance.choice(_FLAGS): chance.random() < 0.5},
        "amount": lambda: {chance.choice(_AMOUNTS): number(chance)},
        "text": lambda: {chance.choice(_TEXTS): text(chance)},
        "list": lambda: {chance.choice(_LISTS): texts(chance)},
        "wild": lambda: {
            chance.choice(
                [*_FLAGS, *_AMOUNTS, *_TEXTS, *_LISTS, *_OTHERS, "logit_bias", "grammar", "json_schema", "tools"]
            ): anything(chance)
        },
        "bias": lambda: {
            "logit_bias": chance.choice(
                [{str(number(chance)): number(chance)}, [[number(chance), number(chance)], [text(chance), False]]]
            )
        },
        "schema": lambda: {"json_schema": schema(chance)},
        "format": lambda: {
            "response_format": {
                "type": chance.choice(["json_schema", "json_object"]),
                "json_schema": {"schema": schema(chance)},
            }
        },
        "grammar": lambda: {"grammar": grammar(chance)},
        "lazy": lambda: {
            "grammar": grammar(chance),
            "grammar_lazy": True,
            "grammar_triggers": triggers(chance),
            "preserved_tokens": ["a", "e"],
        },
        "parser": lambda: {"chat_parser": parser(chance)},
        "tools": lambda: {
            "tools": tools(chance),
            "tool_choice": chance.choice(["auto", "required", "none", text(chance)]),
        },
        "breakers": lambda: {
            "dry_multiplier": 1,
            "dry_sequence_breakers": texts(chance) or ["\n"],
            "dry_penalty_last_n": number(chance),
        },
        "sampler": lambda: {
            "samplers": chance.choice(
                [["dry", "top_k", "penalties", "xtc", "mirostat", "adaptive_p"], "kfypmxt" * 99, texts(chance)]
            )
        },
    }
    return made[chance.choice(list(made))]()


def body(chance: random.Random, path: str) -> dict:
    made: dict[str, object] = {"n_predict": chance.choice([0, 1, 8])}
    if "chat" in path or "messages" in path or "template" in path:
        made = {"max_tokens": chance.choice([0, 1, 8]), "messages": messages(chance)}
    elif path == "/infill":
        made |= {"input_prefix": text(chance)[:2000], "input_suffix": text(chance)[:2000]}
    elif "completion" in path:
        prompts = [
            "The cat",
            text(chance),
            anything(chance),
            [1, number(chance)],
            ["a", text(chance)],
            {"prompt_string": text(chance)},
        ]
        made["prompt"] = chance.choice(prompts)
    elif "responses" in path:
        made["input"] = chance.choice(["The cat", text(chance), messages(chance)])
    for _ in range(chance.randint(0, 3)):
        made |= field(chance)
    for key in ("n_predict", "max_tokens", "max_completion_tokens"):  # the time of an answer is not what is asked here
        if isinstance(made.get(key), (int, float)):
            made[key] = min(max(made[key], -2), 8) if made[key] != -1 else 8
    return made
