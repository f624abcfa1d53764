"""Scores of choices on a real model: those of lm-evaluation-harness on the same questions, and those of PyTorch.

The questions were written for this test. pip fetches the model.
"""

import json

import numpy as np
import pytest
import torch

from pypop_gguf import PopError, PopLlama
from pypop_gguf.cli import main
from pypop_gguf.importance import forms
from pypop_gguf.quality import answers
from pypop_gguf.quality.score import Tokenizer
from pypop_gguf.quality.tasks import encode_choice
from tools.real_models import fetch

pytestmark = pytest.mark.slow
N_LAYER, B = 30, 20
LETTERS = [
    ("geography", "What is the capital of France?", ["Lyon", "Paris", "Nice", "Lille"], 1),
    ("geography", "Which of these is an ocean?", ["Pacific", "Sahara", "Andes", "Amazon"], 0),
    ("biology", "Which animal lays eggs?", ["Dog", "Cow", "Hen", "Horse"], 2),
    ("biology", "What do plants take in to make sugar?", ["Helium", "Iron", "Salt", "Carbon dioxide"], 3),
    ("mathematics", "How much is 7 times 8?", ["54", "56", "63", "48"], 1),
    ("mathematics", "Which number is prime?", ["9", "15", "21", "13"], 3),
    ("physics", "What is measured in volts?", ["Voltage", "Mass", "Length", "Time"], 0),
    ("physics", "At what temperature in Celsius does water boil at sea level?", ["50", "90", "100", "120"], 2),
    ("computer_science", "What does a compiler read?", ["Music", "Source code", "Paper", "Light"], 1),
    ("computer_science", "How many bits has a byte?", ["2", "4", "16", "8"], 3),
    ("history", "In which century did the French Revolution begin?", ["18th", "16th", "20th", "12th"], 0),
    ("history", "Who built the pyramids of Giza?", ["Romans", "Vikings", "Egyptians", "Mayans"], 2),
]
ENDINGS = [
    ("A woman is sitting at a piano. She", ["plays a song.", "swims across the lake.", "bakes it.", "is a car."], 0),
    ("A man ties his shoes. Then he", ["drinks the shoes.", "goes out for a run.", "was born.", "melts away."], 1),
    ("The dog sees a ball in the air. It", ["reads a book.", "pays.", "jumps and catches the ball.", "rains."], 2),
    ("The water in the pot boils. The cook", ["sleeps in it.", "paints.", "flies home.", "puts in the pasta."], 3),
    ("It starts to rain. The children", ["run into the house.", "boil.", "eat the clouds and the sky.", "freeze."], 0),
    ("She drops the glass. It", ["sings.", "breaks on the floor.", "grows into a tree.", "goes to school."], 1),
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: {choices}
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
LETTER_TEXT = (
    "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\\n\\n"
    "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
)


def items() -> dict[str, list[dict]]:
    letters = [dict(subject=s, question=q, choices=c, answer=a) for s, q, c, a in LETTERS]
    return {"letters": letters, "endings": [dict(context=c, choices=e, answer=a) for c, e, a in ENDINGS]}


@pytest.fixture(scope="module")
def model():
    try:
        return fetch("smollm2-135m")
    except PopError as error:
        pytest.skip(str(error))


def test_shares_of_right_choices_are_those_of_lm_evaluation_harness(model, tmp_path, capsys):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]' in the source tree"
    )
    for name, lines in items().items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text, choices = ("{{context}}", "choices")
        if name == "letters":
            text, choices = LETTER_TEXT, '["A", "B", "C", "D"]'
        (tmp_path / f"{name}.yaml").write_text(
            TASK.format(name=f"harness_{name}", data=data, text=text, choices=choices)
        )
    command = ["eval", model, tmp_path / "letters.jsonl", tmp_path / "endings.jsonl", "--boundary", B, "--json"]
    command += ["--lm-eval", "harness_letters,harness_endings", "--task-dir", tmp_path, "--threads", 1]
    assert main([*map(str, command)]) == 0
    found = json.loads(capsys.readouterr().out)
    ours = {task["task"]: {row["boundary"]: row for row in task["boundaries"]} for task in found["tasks"]}
    for boundary in (N_LAYER, B):
        harness = found["lm_eval"][str(boundary)]
        assert ours["letters"][boundary]["accuracy"]["value"] == harness["harness_letters"]["acc,none"]
        assert ours["endings"][boundary]["accuracy"]["value"] == harness["harness_endings"]["acc,none"]
        assert ours["endings"][boundary]["accuracy_norm"]["value"] == harness["harness_endings"]["acc_norm,none"]
    assert ours["endings"][N_LAYER]["accuracy_norm"]["value"] >= 0.5  # The questions are not beyond the model.


def test_likelihoods_are_those_of_pytorch_on_the_unpacked_weights(model):
    transformers = pytest.importorskip("transformers")
    llm = PopLlama(str(model), pop=False, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    tokenizer = Tokenizer(llm)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).eval()
    same, errors = [], []
    for line in [line for lines in items().values() for line in lines]:
        choice = forms.read_choice(line)
        found = answers.score_choice(llm, tokenizer, choice, N_LAYER)
        prompt, endings = encode_choice(tokenizer, choice)
        expected = []
        for ending in endings:
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + ending])).logits[0].double()
            log_p = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
            expected.append(log_p[torch.arange(len(ending)), torch.tensor(ending)].sum().item())
        same.append(found.argmax() == np.argmax(expected))
        errors.append(np.abs(found - expected).mean())
    # The engine rounds activations to 8 bits, so a choice between endings that are nearly as likely may differ.
    assert np.mean(same) >= 0.85 and np.mean(errors) < 0.3, (same, errors)
