"""The built-in tasks of ``pop-gguf eval``, which need no file: code recall, and variables to follow over several steps.

Their texts have a length that is asked for, up to the context of the model.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.quality.grading import Grader, expect_begin, expect_names
from pypop_gguf.quality.score import Tokenizer
from pypop_gguf.quality.tasks import Item, Question, Task, make_id

# Code recall: the things that have a code, and the sentences between the codes.
_OWNERS = (  # noqa: SIM905 - a list has 34 lines
    "apple basket bridge candle carpet castle compass dragon engine feather garden hammer harbour helmet "
    "island jacket kettle ladder lantern magnet mirror orange pencil pillow planet rabbit ribbon river "
    "saddle ticket tunnel violin wagon window"
).split()
_FILLERS = [
    "The rain had stopped an hour ago.",
    "Nobody was in a hurry that day.",
    "A dog barked somewhere behind the houses.",
    "They had a lovely time until it was time to go home.",
    "The shop on the corner was still open.",
    "She counted the steps without thinking.",
    "It was colder than the day before.",
    "He looked out and saw nothing new.",
    "The tea had gone cold by then.",
    "Two boys ran past, laughing.",
]
# Variable tracking has the form of RULER's (arXiv 2404.06654). A second chain is there to be told apart.
_CHAINS, _STEPS = 2, 3
_TRACKING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def make_recall_task(tokenizer: Tokenizer, n_samples: int, max_tokens: int, seed: int) -> Task:
    """Makes texts of about ``max_tokens`` tokens with two-digit codes, and asks for a code from each depth."""
    chance = random.Random(seed)
    items = []
    for number in range(n_samples):
        prompt, answer = _make_recall_prompt(tokenizer, chance, max_tokens - 4, number / max(1, n_samples - 1))
        items.append(_make_item(tokenizer, number, prompt, answer, expect_begin(answer), 8, max_tokens))
    return Task(f"recall-{max_tokens}", items)


def make_tracking_task(tokenizer: Tokenizer, n_samples: int, max_tokens: int, seed: int) -> Task:
    """Makes texts of about ``max_tokens`` tokens in which variables take over a value from one another.

    The question asks for all variables with one of two values. Each value goes through three variables.
    """
    chance = random.Random(seed)
    items = []
    for number in range(n_samples):
        prompt, names, known = _make_tracking_prompt(tokenizer, chance, max_tokens - 32)
        answer = ", ".join(names)
        items.append(_make_item(tokenizer, number, prompt, answer, expect_names(names, known), 32, max_tokens))
    return Task(f"tracking-{max_tokens}", items)


def _make_item(
    tokenizer: Tokenizer, number: int, prompt: str, answer: str, grade: Grader, answer_tokens: int, max_tokens: int
) -> Item:
    # Prompt and answer are encoded as one text, as the model would see them.
    tokens, n_prompt = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    if len(tokens) > max_tokens:
        raise PopError(f"--context {max_tokens} is too short for these built-in texts: give at least {len(tokens)}")
    sample = Sample(tuple(tokens), min(n_prompt, len(tokens) - 1))
    return Item(make_id(number, prompt), sample, Question(prompt, grade, answer_tokens, ("\n",)))


def _make_recall_prompt(tokenizer: Tokenizer, chance: random.Random, max_tokens: int, depth: float) -> tuple[str, str]:
    owners = chance.sample(_OWNERS, 8)
    codes = {owner: chance.randrange(10, 100) for owner in owners}
    asked = owners[round(depth * (len(owners) - 1))]
    end = f"\nWhat is the code of the {asked}? The code of the {asked} is"
    facts = [f"The code of the {owner} is {code}." for owner, code in codes.items()]

    def text(n_fillers: int) -> str:
        parts = list(facts)
        for i in range(n_fillers):  # They are spread evenly between the facts.
            parts.insert(1 + i * len(parts) // max(1, n_fillers) % len(parts), chance.choice(_FILLERS))
        return " ".join(parts) + end

    return _fill(tokenizer, text, max_tokens), str(codes[asked])


def _make_tracking_prompt(
    tokenizer: Tokenizer, chance: random.Random, max_tokens: int
) -> tuple[str, list[str], list[str]]:
    """Returns the prompt, the variables that are asked for, and all variables."""
    letters = string.ascii_uppercase
    known: list[str] = []
    while len(known) < _CHAINS * _STEPS:
        name = "".join(chance.choices(letters, k=5))
        if name not in known:
            known.append(name)
    values = chance.sample(range(10000, 100000), _CHAINS)
    chains = [known[i * _STEPS : (i + 1) * _STEPS] for i in range(_CHAINS)]
    turns = [i for i in range(_CHAINS) for _ in range(_STEPS)]
    chance.shuffle(turns)  # It mixes the chains; each keeps its own order.
    done = [0] * _CHAINS
    facts = []
    for chain in turns:
        step = done[chain]
        source = f"VAR {chains[chain][step - 1]}" if step else str(values[chain])
        facts.append(f"VAR {chains[chain][step]} = {source}.")
        done[chain] += 1
    places = sorted(chance.random() for _ in facts)
    asked = chance.randrange(_CHAINS)
    value = values[asked]
    end = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {_STEPS} variables are assigned the value {value}, "
        "they are:"
    )

    def text(n_fillers: int) -> str:
        parts = [_FILLERS[i % len(_FILLERS)] for i in range(n_fillers)]
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            parts.insert(round(place * n_fillers), fact)
        return _TRACKING + " ".join(parts) + end

    return _fill(tokenizer, text, max_tokens), chains[asked], known


def _fill(tokenizer: Tokenizer, text: Callable[[int], str], max_tokens: int) -> str:
    """Returns the text with as many fillers as fit."""

    def count(prompt: str) -> int:
        return len(tokenizer(prompt)["input_ids"])

    per_filler = count(" ".join(_FILLERS)) / len(_FILLERS)
    n_fillers = max(0, int((max_tokens - count(text(0))) / per_filler))
    prompt = text(n_fillers)
    while n_fillers and count(prompt) > max_tokens:
        n_fillers -= 1
        prompt = text(n_fillers)
    return prompt
