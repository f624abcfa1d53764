"""The questions of known sets: how they are asked and graded, by arithmetic that is written apart from the package."""

import json
import math
import re

import numpy as np
import pytest

from pypop_gguf import PopLlama
from pypop_gguf.importance import forms
from pypop_gguf.quality import answers, builtin, code_runner, grading, tasks
from pypop_gguf.quality.score import Tokenizer
from pypop_gguf.quality.tasks import Question
from tests.support import pop_reference

MMLU = {
    "subject": "high_school_physics",
    "question": "What falls?",
    "choices": ["Up", "An apple", "c", "d"],
    "answer": 1,
}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man opens an oven.",
    "ctx_b": "he",
    "endings": ["takes out [step] a  cake.", "sleeps.", "flies to the moon and back.", "eats it."],
    "label": "0",
}
HOTPOTQA = {"context": ["Oslo — Oslo lies in Norway.", "Rome — Rome is old."], "question": "Where?", "answer": "Norway"}


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    return PopLlama(
        str(bundled_gguf), pop_boundary=6, n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn=False, verbose=False
    )


def read(llm, tmp_path, *items: dict, max_tokens: int = 512, run_code: bool = False) -> tasks.Task:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    options = dict(max_samples=9, max_tokens=max_tokens, seed=0, run_code=run_code)
    return tasks.read_task(Tokenizer(llm), path, **options)


def test_mmlu_is_asked_for_the_letter():
    choice = forms.read_choice(MMLU)
    assert choice.prompt == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What falls?\nA. Up\nB. An apple\nC. c\nD. d\nAnswer:"
    )
    assert choice.endings == (" A", " B", " C", " D") and choice.answer == 1
    assert forms.read_choice({**MMLU, "answer": "B"}) == choice


def test_hellaswag_is_asked_for_the_ending_without_the_marks_of_its_pages():
    choice = forms.read_choice(HELLASWAG)
    assert choice.prompt == "Baking: A man opens an oven. He"
    assert choice.endings[0] == " takes out a cake." and choice.answer == 0
    plain = {"context": choice.prompt, "choices": HELLASWAG["endings"], "answer": 0}
    assert forms.read_choice(plain) == choice


@pytest.mark.parametrize(
    "context",
    [
        [["Oslo", ["Oslo lies", " in Norway."]], ["Rome", ["Rome is old."]]],
        {"title": ["Oslo", "Rome"], "sentences": [["Oslo lies", " in Norway."], ["Rome is old."]]},
        "Oslo — Oslo lies in Norway.\nRome — Rome is old.",
    ],
    ids=["pairs", "lists", "text"],
)
def test_hotpotqas_own_files_are_asked_as_the_plain_one(context):
    assert forms.read_passages({**HOTPOTQA, "context": context}) == forms.read_passages(HOTPOTQA)


@pytest.mark.parametrize(
    "broken",
    [
        {**MMLU, "answer": 4},
        {**MMLU, "answer": True},
        {**MMLU, "choices": ["a"]},
        {**MMLU, "choices": ["a", 2, "c", "d"]},
        {**HELLASWAG, "ctx_a": None},
        {**HELLASWAG, "endings": ["[x]", "b"]},
        {**HOTPOTQA, "context": [["Oslo"]]},
        {**HOTPOTQA, "answer": ""},
    ],
)
def test_broken_question_is_named_with_its_line(llm, tmp_path, broken):
    task = read(llm, tmp_path, MMLU, broken)
    assert len(task.items) == 1 and task.skipped[0].startswith('line 2: no "')


def test_question_that_does_not_fit_into_the_context_is_named(llm, tmp_path):
    task = read(llm, tmp_path, MMLU, HOTPOTQA, max_tokens=40)
    assert task.questions == [] and len(task.samples) == 2
    assert [note.split(": ")[1][:30] for note in task.skipped] == ["its question needs a context of"[:30]] * 2


def test_likelihoods_of_endings_are_those_of_pytorch_after_a_pruned_prompt(llm, reference_models):
    model, tokenizer = reference_models["bundled"], Tokenizer(llm)
    for item in (MMLU, HELLASWAG):
        choice = forms.read_choice(item)
        for boundary in (12, 6):
            found = answers.score_choice(llm, tokenizer, choice, boundary)
            expected = []
            prompt = tokenizer(choice.prompt)["input_ids"]
            for ending in choice.endings:
                tokens = tokenizer(choice.prompt + ending)["input_ids"]
                logits = pop_reference.logits(
                    model.torch_model, model.layers, tokens[:-1], boundary, len(prompt)
                ).astype(np.float64)
                log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                expected.append(sum(log_p[i, token] for i, token in enumerate(tokens[len(prompt) :])))
            assert found == pytest.approx(expected, abs=0.02)  # The cache of the engine is F16.


def test_choice_is_the_likeliest_ending_and_the_likeliest_by_letter():
    choice = forms.ChoiceForm("p", (" four", " two times as long", " no"), 1)
    # Log-likelihoods a letter are -1.5, -0.4 and -1.0.
    assert answers.grade_choice(choice, np.array([-6.0, -6.8, -2.0])) == {"accuracy": 0.0, "accuracy_norm": 1.0}
    assert answers.grade_choice(choice, np.array([-6.0, -1.0, -2.0]))["accuracy"] == 1.0
    as_long = forms.ChoiceForm("p", (" one", " two"), 0)
    assert answers.grade_choice(as_long, np.array([-1.0, -2.0])) == {"accuracy": 1.0, "accuracy_norm": 1.0}
    letters = forms.ChoiceForm("p", (" A", " B"), 0)
    assert answers.grade_choice(letters, np.array([-1.0, -2.0])) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", 7),
        ("#### $1,234.50 in all, of 9", 1234.5),
        (r"The answer is \boxed{18} dollars, or 2 notes.", 18),
        (r"\boxed{x} = 4", 4),
        ("#### Step 1\nAdd.\n#### \\[ \\boxed{\\$1,020} \\]", 1020),
        ("#### Step 1\nAdd 3.\n#### 8 of 9", 8),
        ("It costs 5, then -6", -6),
        ("none", None),
    ],
)
def test_number_of_an_answer(text, number):
    assert grading.find_number(text) == number


@pytest.mark.parametrize(
    ("text", "exact", "f1"),
    [
        ("The United States, of America!", 1, 1),
        ("United States", 0, 2 * 1 * 0.5 / 1.5),  # precision 1, recall 2 of 4
        ("a united kingdom of Great Britain", 0, 2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4)),
        ("no", 0, 0),
        ("", 0, 0),
    ],
)
def test_words_are_graded_as_hotpotqa_does(text, exact, f1):
    assert grading.expect_words("united states of america")(text) == {
        "exact_match": exact,
        "f1": pytest.approx(f1),
    }


def test_closed_answer_shares_nothing_with_a_longer_one():
    assert grading.expect_words("yes")("yes it is") == {"exact_match": 0, "f1": 0}
    assert grading.expect_words("yes")("Yes.") == {"exact_match": 1, "f1": 1}


def test_program_may_go_on_or_begin_again():
    problem = {
        "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef root(x):\n    """Root."""\n',
        "test": "def check(f):\n    assert f(9) == 3\n",
        "entry_point": "root",
    }
    grade = code_runner.expect_passes(problem)
    assert grade("    return math.sqrt(x)") == {"passed": 1}
    assert grade("def root(x):\n    return math.sqrt(helper(x))") == {"passed": 1}
    assert grade("def root(x):\n    return x") == {"passed": 0}
    assert grade("def root(x):\n    exit(0)\n    return 3") == {"passed": 0}


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_sums_and_programs_are_asked_through_the_chat_template(llm, tmp_path, monkeypatch):
    gsm8k = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
    program = {"prompt": "def one():\n", "canonical_solution": "    return 1\n", "test": "x", "entry_point": "one"}
    plain = [read(llm, tmp_path, item, run_code=True).questions[0] for item in (gsm8k, program)]
    assert [question.is_chat for question in plain] == [False, False]
    monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", TEMPLATE)
    sums, code = (read(llm, tmp_path, item, run_code=True).questions[0] for item in (gsm8k, program))
    assert sums.is_chat and sums.prompt.startswith("<user>What is 1 + 1?\n\n") and sums.prompt.endswith("<bot>")
    assert sums.stop == () and plain[0].stop == ("Question:",)
    assert code.is_chat and "def one():" in code.prompt and code.prompt.endswith("<bot>```python\n")
    assert code.stop == ("\n```",)
    assert read(llm, tmp_path, program).questions == []  # Code does not run unless the user asks for it.


def test_tracked_variables_hold_the_value_that_is_asked_for(llm):
    task = builtin.make_tracking_task(Tokenizer(llm), 6, 400, seed=1)
    for item in task.items:
        text, end = item.question.prompt.split("\nQuestion: ")
        asked = end.split("assigned the value ")[1].split()[0]
        values = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d+)\.", text):
            values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
        names = [name for name, value in values.items() if value == asked]
        assert len(values) == 6 and len(names) == 3
        assert item.question.grade(f" {names[2]}, {names[0]} and {names[1]}.") == {"exact_match": 1, "f1": 1}
        found = item.question.grade(f" {names[0]}, {next(name for name in values if name not in names)}")
        assert found == {"exact_match": 0, "f1": pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))}
        assert 250 < len(item.sample.tokens) <= 410


def test_generated_answer_is_graded_and_ends_at_the_stop(llm):
    seen = []

    def grade(text: str) -> dict[str, float]:
        seen.append(text)
        return {"exact_match": 0.5}

    question = Question("Once upon a time, there was a", grade, 12, (" ",))
    assert answers.answer(llm, Tokenizer(llm), question, 6) == {"exact_match": 0.5}
    assert len(seen) == 1 and " " not in seen[0] and math.isfinite(len(seen[0]))
