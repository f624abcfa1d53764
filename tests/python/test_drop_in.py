"""``PopLlama`` does what ``llama_cpp.Llama`` does: the same results at the lossless boundary, its promises below it.

``plain`` is the parent, which test_stock.py compares with the unpatched build. Other files test states and caches
(test_states.py), images (test_vision.py), and llama-cpp-python's own tests (test_upstream.py).
"""

import copy
import json
import pickle
import shutil

import huggingface_hub
import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from pypop_gguf import PopLlama, native
from tests.engine.test_batches import write_lora
from tests.support.gguf_files import STRING, insert_raw_key

PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map. " * 3
MESSAGES = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": PROMPT}]
PAINT_IT = [{"role": "user", "content": "Paint the ball red, please."}]  # short, because descriptions of tools are long
# llama_cpp.Llama's default is without flash attention.
ONE_THREAD = dict(n_threads=1, n_threads_batch=1, flash_attn=False, verbose=False)
OPTIONS = dict(n_ctx=512, n_batch=64, **ONE_THREAD)
LOSSLESS, DEEP = 11, 4
PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "coats": {"type": "integer"}},
    "required": ["colour", "coats"],
}
TOOLS = [{"type": "function", "function": {"name": "paint", "description": "Paints the ball.", "parameters": PAINT}}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}<assistant> "
)


@pytest.fixture(scope="module")
def plain(bundled_gguf):
    llm = llama_cpp.Llama(str(bundled_gguf), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), pop_boundary=LOSSLESS, **OPTIONS)
    yield llm
    llm.close()


def fresh(llm):
    llm.reset()
    return llm


def joined(chunks) -> str:
    return "".join(
        chunk["choices"][0].get("text") or chunk["choices"][0].get("delta", {}).get("content") or "" for chunk in chunks
    )


def close_to(actual, expected) -> bool:
    """Whether both are equal, up to the rounding of logarithms when sums are taken in another order."""
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(close_to(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(close_to, actual, expected))
    return abs(actual - expected) < 2e-2 if isinstance(expected, (float, np.floating)) else actual == expected


def without_e(llm):
    """A logits processor that forbids all tokens with the letter e."""
    tokens = [token for token in range(llm.n_vocab()) if b"e" in llm.detokenize([token])]

    def process(_input_ids, logits):
        logits[tokens] = -np.inf
        return logits

    return llama_cpp.LogitsProcessorList([process])


COMPLETIONS = {
    "greedy": lambda llm: {},
    "stop": lambda llm: dict(stop=[" was", "fox"]),
    "stop across tokens": lambda llm: dict(stop="e fo"),
    "logit bias": lambda llm: dict(logit_bias={llm.tokenize(b" red", add_bos=False)[-1]: 60.0}),
    "logits processor": lambda llm: dict(logits_processor=without_e(llm)),
    "stopping criteria": lambda llm: dict(
        stopping_criteria=llama_cpp.StoppingCriteriaList([lambda ids, _logits: len(ids) % 50 == 0])
    ),
    "grammar": lambda llm: dict(grammar=llama_cpp.LlamaGrammar.from_string('root ::= ("red" | "blue") " " [0-9]+')),
    "JSON schema": lambda llm: dict(grammar=llama_cpp.LlamaGrammar.from_json_schema(json.dumps(PAINT))),
    "seed": lambda llm: dict(temperature=1.0, seed=42),
    "penalties": lambda llm: dict(repeat_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
    "sampling": lambda llm: dict(temperature=0.9, top_k=20, top_p=0.8, min_p=0.02, typical_p=0.9, seed=3),
    "mirostat": lambda llm: dict(temperature=0.9, mirostat_mode=2, mirostat_tau=4.0, seed=3),
    "echo": lambda llm: dict(echo=True),
    "suffix": lambda llm: dict(suffix=" and so the fox went home."),
}


@pytest.mark.parametrize("case", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_completion_equals_the_parents_and_its_own_stream(llm, plain, case):
    def options(llm):  # made anew for each call, because a grammar is good for one
        return {"max_tokens": 32, "temperature": 0, **case(llm)}

    expected = fresh(plain).create_completion(PROMPT, **options(plain))
    actual = fresh(llm).create_completion(PROMPT, **options(llm))
    assert (actual["choices"], actual["usage"]) == (expected["choices"], expected["usage"])
    assert actual["timings"]["pruned_n"] == actual["usage"]["prompt_tokens"] - 1
    chunks = list(fresh(llm).create_completion(PROMPT, stream=True, **options(llm)))
    assert joined(chunks) == actual["choices"][0]["text"].removeprefix(PROMPT)  # a stream echoes nothing
    assert chunks[-1]["choices"][0]["finish_reason"] == actual["choices"][0]["finish_reason"]


def test_promises_are_kept_where_pruning_changes_the_answer(llm, plain):
    def answer(name):
        done = fresh(llm).create_completion(
            PROMPT, **{"max_tokens": 48, "temperature": 0, **COMPLETIONS[name](llm)}, boundary=DEEP
        )
        assert done["timings"]["pruned_n"] == done["usage"]["prompt_tokens"] - 1
        return done["choices"][0]

    assert (
        answer("greedy")["text"]
        != fresh(plain).create_completion(PROMPT, max_tokens=48, temperature=0)["choices"][0]["text"]
    )
    assert not {"fox", " was"} & set(answer("stop")["text"].split()) and answer("stop")["finish_reason"] == "stop"
    assert answer("logit bias")["text"].startswith(" red")
    assert "e" not in answer("logits processor")["text"]
    assert answer("grammar")["text"].split()[0] in ("red", "blue")
    assert answer("JSON schema")["text"].startswith("{")
    assert answer("seed") == answer("seed") != answer("greedy")
    assert answer("echo")["text"].startswith(PROMPT)


def test_logprobs_equal_the_parents(bundled_gguf):
    """The object keeps them with logits_all=True, as in the parent, or with a draft model, where prompts are pruned."""
    plain = llama_cpp.Llama(str(bundled_gguf), logits_all=True, **OPTIONS)
    drafted = PopLlama(str(bundled_gguf), pop_boundary=LOSSLESS, draft_model=LlamaPromptLookupDecoding(), **OPTIONS)
    call = dict(max_tokens=12, temperature=0)
    expected = plain.create_completion(PROMPT, logprobs=3, **call)["choices"][0]
    actual = drafted.create_completion(PROMPT, logprobs=3, **call)
    assert actual["choices"][0]["text"] == expected["text"] and actual["timings"]["pruned_n"] > 50
    for name in ("tokens", "text_offset"):
        assert actual["choices"][0]["logprobs"][name] == expected["logprobs"][name]
    assert np.allclose(
        actual["choices"][0]["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"], atol=2e-2
    )
    expected = fresh(plain).create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **call)["choices"][0]
    actual = fresh(drafted).create_chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **call)["choices"][0]
    assert close_to(actual, expected)
    plain.close()
    drafted.close()


@pytest.mark.parametrize("n_tokens", [2, 10])
def test_draft_model_changes_no_text_and_leaves_prompts_pruned(bundled_gguf, n_tokens):
    draft = LlamaPromptLookupDecoding(num_pred_tokens=n_tokens)
    drafted, alone = (
        PopLlama(str(bundled_gguf), pop_boundary=DEEP, draft_model=model, **OPTIONS) for model in (draft, None)
    )
    repeated = "red blue green red blue green red blue green " * 6  # what follows can be looked up
    for prompt in (repeated, PROMPT):
        expected, actual = (llm.create_completion(prompt, max_tokens=48, temperature=0) for llm in (alone, drafted))
        assert actual["choices"] == expected["choices"]
        assert actual["timings"]["pruned_n"] == expected["timings"]["pruned_n"] > 30
    drafted.close()
    alone.close()


# Chats


@pytest.mark.filterwarnings("ignore:Detected duplicate leading")  # some formats add a BOS token of their own
def test_every_chat_format_gives_the_parents_answer(llm, plain):
    answered = 0
    for name in sorted(llama_cpp.llama_chat_format.LlamaChatCompletionHandlerRegistry()._chat_handlers):
        answers = []
        for one in (plain, llm):
            one.reset()
            one.chat_format = name
            try:
                done = one.create_chat_completion(MESSAGES, max_tokens=6, temperature=0)
                answers.append(done["choices"])
            except Exception as error:  # some formats need a tokenizer of their own
                answers.append(f"{type(error).__name__}: {error}")
        assert answers[0] == answers[1], name
        if isinstance(answers[0], list):
            assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1, name
            answered += 1
    llm.chat_format = plain.chat_format = "llama-2"
    assert answered > 20


def test_template_of_the_file_is_used(bundled_gguf, tmp_path):
    path = tmp_path / "template.gguf"
    shutil.copy(bundled_gguf, path)
    insert_raw_key(path, "tokenizer.chat_template", STRING, len(TEMPLATE).to_bytes(8, "little") + TEMPLATE.encode())
    plain, llm = llama_cpp.Llama(str(path), **OPTIONS), PopLlama(str(path), pop_boundary=LOSSLESS, **OPTIONS)
    assert llm.chat_format == plain.chat_format == "chat_template.default"
    expected, actual = (one.create_chat_completion(MESSAGES, max_tokens=16, temperature=0) for one in (plain, llm))
    assert (actual["choices"], actual["usage"]) == (expected["choices"], expected["usage"])
    text = f"<s><system> You tell stories.\n<user> {PROMPT}\n<assistant> "
    assert actual["usage"]["prompt_tokens"] == len(llm.tokenize(text.encode(), add_bos=False, special=True))
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1
    plain.close()
    llm.close()


CHATS = {
    "tool by name": dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "paint"}}),
    "tool or words": dict(tools=TOOLS, tool_choice="auto"),
    "JSON": dict(response_format={"type": "json_object"}),
    "JSON schema": dict(response_format={"type": "json_object", "schema": PAINT}),
    "stop": dict(stop=["."]),
}


@pytest.mark.parametrize("boundary", [LOSSLESS, DEEP])
@pytest.mark.parametrize("name", CHATS)
def test_chat_with_tools_and_schemas(llm, plain, name, boundary):
    def ask(one, **more):
        one.reset()
        one.chat_format = "chatml-function-calling" if "tools" in CHATS[name] else "chatml"
        return one.create_chat_completion(PAINT_IT, max_tokens=64, temperature=0, **CHATS[name], **more)

    before = native.n_pruned(llm.ctx)
    try:
        (choice,) = ask(llm, boundary=boundary)["choices"]
        assert native.n_pruned(llm.ctx) - before > 15
        if boundary == LOSSLESS:
            (expected,) = ask(plain)["choices"]
            for message in (choice["message"], expected["message"]):  # the ids of calls are random
                for call in message.get("tool_calls", []):
                    call["id"] = ""
            assert choice == expected
        if name == "tool by name":
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == "paint" and json.loads(call["function"]["arguments"])["colour"] in (
                "red",
                "blue",
            )
        elif name == "JSON schema":
            assert set(json.loads(choice["message"]["content"])) == {"colour", "coats"}
        elif name == "stop":
            assert "." not in choice["message"]["content"]
        if "tools" not in CHATS[name]:
            assert joined(ask(llm, boundary=boundary, stream=True)) == choice["message"]["content"]
        elif name == "tool by name":
            parts = [
                chunk["choices"][0]["delta"].get("tool_calls") or []
                for chunk in ask(llm, boundary=boundary, stream=True)
            ]
            assert (
                "".join(call["function"]["arguments"] or "" for calls in parts for call in calls)
                == call["function"]["arguments"]
            )
    finally:
        llm.chat_format = plain.chat_format = "llama-2"


def test_chat_as_the_openai_packages_object(llm, plain):
    done = fresh(llm).create_chat_completion_openai_v1(MESSAGES, max_tokens=8, temperature=0)
    expected = fresh(plain).create_chat_completion_openai_v1(MESSAGES, max_tokens=8, temperature=0)
    assert done.choices == expected.choices and done.timings["pruned_n"] > 50
    chunks = fresh(llm).create_chat_completion_openai_v1(MESSAGES, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.choices[0].message.content


# The object


@pytest.mark.parametrize(
    "pooling", [llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_LAST]
)
def test_embeddings_are_the_whole_models(bundled_gguf, pooling):
    options = dict(embedding=True, pooling_type=pooling, **OPTIONS)
    plain, llm = (
        llama_cpp.Llama(str(bundled_gguf), **options),
        PopLlama(str(bundled_gguf), pop_boundary=DEEP, **options),
    )
    texts = ["A little fox lived near the river.", PROMPT[:150]]
    expected, actual = (one.create_embedding(texts) for one in (plain, llm))
    assert actual["usage"] == expected["usage"]
    for one, other in zip(actual["data"], expected["data"]):
        assert np.allclose(one["embedding"], other["embedding"], atol=1e-5) and np.any(one["embedding"])
    assert all(map(np.allclose, llm.embed(texts, normalize=True), plain.embed(texts, normalize=True)))
    plain.close()
    llm.close()


def test_lora_acts_on_pruned_prompts(reference_models, tmp_path):
    model = reference_models["llama"]
    write_lora(tmp_path / "lora.gguf", model)
    tokens = model.tokens(40)

    def answer(kind, **options):
        llm = kind(str(model.gguf), n_ctx=64, **ONE_THREAD, **options)
        answered = [token for token, _ in zip(llm.generate(tokens, temp=0), range(12))]
        pruned = llm.timings.pruned_tokens if kind is PopLlama else None
        llm.close()
        return answered, pruned

    lora = dict(lora_path=str(tmp_path / "lora.gguf"))
    expected = {scale: answer(llama_cpp.Llama, lora_scale=scale, **lora)[0] for scale in (1.0, 0.1)}
    for scale in expected:
        assert answer(PopLlama, pop_boundary=5, lora_scale=scale, **lora) == (expected[scale], 39)
    assert expected[1.0] != expected[0.1] != answer(llama_cpp.Llama)[0]
    assert answer(PopLlama, pop_boundary=2, **lora) != answer(PopLlama, pop_boundary=2)


def test_copies_by_pickle_answer_as_the_object_does(bundled_gguf):
    llm = PopLlama(
        str(bundled_gguf), pop_boundary=DEEP, pop_tail=4, pop_head=2, chat_format="chatml", seed=5, **OPTIONS
    )
    expected = llm.create_chat_completion(MESSAGES, max_tokens=16, temperature=0)
    for other in (pickle.loads(pickle.dumps(llm)), copy.deepcopy(llm)):
        answered = other.create_chat_completion(MESSAGES, max_tokens=16, temperature=0)
        assert (
            answered["choices"] == expected["choices"]
            and answered["timings"]["pruned_n"] == expected["timings"]["pruned_n"] > 50
        )
        assert other.pop == llm.pop
        other.close()
    llm.close()


def test_from_pretrained_takes_our_arguments(bundled_gguf, monkeypatch):
    class FileSystem:
        def ls(self, repository, recursive):
            return [{"name": f"{repository}/{name}"} for name in ("README.md", bundled_gguf.name)]

    def download(repo_id, filename, subfolder, **_options):
        assert (repo_id, subfolder) == ("lab/llama", ".")
        return str(bundled_gguf.with_name(filename))

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    llm = PopLlama.from_pretrained("lab/llama", "*.gguf", pop_boundary=DEEP, **OPTIONS)
    assert type(llm) is PopLlama and llm.pop.boundary == DEEP
    llm.create_completion(PROMPT, max_tokens=1)
    assert llm.timings.pruned_tokens > 50
    llm.close()


def test_arguments_that_llama_no_longer_has_are_accepted_and_change_nothing(bundled_gguf):
    removed = dict(
        f16_kv=True, low_vram=False, mul_mat_q=True, n_gqa=8, n_parts=-1, rms_norm_eps=1e-5, rpc_servers=None
    )
    answers = []
    for more in ({}, removed):
        llm = PopLlama(str(bundled_gguf), pop_boundary=DEEP, **OPTIONS, **more)
        answers.append(llm.create_completion(PROMPT, max_tokens=8, temperature=0)["choices"])
        llm.close()
    assert answers[0] == answers[1]


def test_seed_of_the_object_counts(bundled_gguf):
    texts = []
    for kind, seed in ((llama_cpp.Llama, 11), (PopLlama, 11), (PopLlama, 12)):
        options = dict(pop_boundary=LOSSLESS) if kind is PopLlama else {}
        llm = kind(str(bundled_gguf), seed=seed, **OPTIONS, **options)
        texts.append(
            [llm.create_completion(PROMPT, max_tokens=16, temperature=1.0)["choices"][0]["text"] for _ in range(2)]
        )
        llm.close()
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_pieces_that_programs_are_made_of_equal_the_parents(llm, plain):
    tokens = plain.tokenize(PROMPT.encode())
    assert llm.tokenize(PROMPT.encode()) == tokens and llm.detokenize(tokens) == plain.detokenize(tokens)
    assert (llm.n_vocab(), llm.n_embd(), llm.token_eos(), llm.token_bos()) == (
        plain.n_vocab(),
        plain.n_embd(),
        plain.token_eos(),
        plain.token_bos(),
    )
    answers = []
    for one in (plain, llm):
        one.reset()
        one.eval(tokens)
        sampled = [one.sample(temp=0)]
        for _ in range(4):
            one.eval([sampled[-1]])
            sampled.append(one.sample(temp=0))
        generator = one.generate(tokens, temp=0)
        sampled += [next(generator) for _ in range(3)]
        generator.close()
        answers.append(sampled)
    assert answers[0] == answers[1]
