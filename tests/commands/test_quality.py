"""The answers of the bundled model stay usable if prefill skips a third of its layers. The README shows three."""

import random

import pytest

from pypop_gguf import PopLlama

WORDS = ["mirror", "engine", "island", "dragon", "ladder", "orange", "carpet", "jacket", "garden", "magnet", "hammer"]
SENTENCES = ["The children ran to the river.", "She was happy.", "He went home with his dog.", "It was a sunny day."]
STORIES = [
    "Lily and her mom went to the garden. They planted a small seed in the ground. Every day, Lily gave the seed some "
    "water. After a week,",
    "Sara was sad because her kite was stuck in a tall tree. Her brother Tim said,",
    "Once upon a time, there was a little dog named Max. Max loved to play in the park. One day, Max saw a big red "
    "ball. He",
]


def recall_prompt(seed: int) -> tuple[str, str]:
    """Returns a text that gives codes to things and asks for one of them, and the answer."""
    chosen = random.Random(seed)
    names = chosen.sample(WORDS, 6)
    codes = {name: f"{chosen.randrange(10, 100)}" for name in names}
    parts = [f"The code of the {name} is {codes[name]}." for name in names]
    parts.insert(3, chosen.choice(SENTENCES))
    return f"{' '.join(parts)}\nWhat is the code of the {names[1]}? The code of the {names[1]} is", codes[names[1]]


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    return PopLlama(str(bundled_gguf), pop_boundary=8, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def answer(llm, prompt: str, max_tokens: int, **options) -> str:
    return llm.create_completion(prompt, max_tokens=max_tokens, temperature=0, **options)["choices"][0]["text"]


def share_recalled(llm, **options) -> float:
    prompts = [recall_prompt(seed) for seed in range(30)]
    return sum(answer(llm, prompt, 3, **options).strip().startswith(code) for prompt, code in prompts) / len(prompts)


def test_a_third_skipped_recalls_what_the_prompt_said(llm):
    full, third, most = (share_recalled(llm, boundary=boundary) for boundary in (12, 8, 3))
    assert full >= 0.8
    assert third >= full - 0.1
    assert most <= third - 0.3  # The measure recognizes a boundary that is too low.


@pytest.mark.parametrize("prompt", STORIES)
def test_a_third_skipped_goes_on_in_words(llm, prompt):
    llm.reset()
    words = answer(llm, prompt, 24).replace('"', " ").replace(",", " ").replace(".", " ").split()
    assert len(words) >= 10
    assert len(set(words)) > len(words) / 2  # It is no loop of one word.
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1
