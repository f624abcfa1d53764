"""Shows POP on the bundled model: converts it, answers a prompt, and times the prompt with and without POP.

``make demo`` runs this script.
"""

from __future__ import annotations

import statistics
import sys

from tests.support.paths import BUNDLED, ROOT

TARGET = ROOT / "demo" / "lab-llama-12l-q8_0.gguf"
RUNS = 15

PROMPT = (
    "Once upon a time, there was a little girl named Lily. She lived in a small house near the woods with her mom, "
    "her dad and her dog, Max. Every morning Lily and Max went out to play. They ran in the grass, they looked for "
    "bugs and they counted the birds in the big tree. "
) * 6 + "One day, Lily found a shiny key under the big tree."


def time_to_first_token_ms(llm, prompt: str, **options) -> float:
    llm.reset()
    llm.create_completion(prompt, max_tokens=1, temperature=0, **options)
    return llm.timings.time_to_first_token_ms


def main() -> int:
    from pypop_gguf import PopLlama
    from pypop_gguf.cli import main as pop_gguf

    TARGET.parent.mkdir(exist_ok=True)
    print(f"$ pop-gguf convert {BUNDLED.relative_to(ROOT)} --outtype q8_0 --outfile {TARGET.relative_to(ROOT)}\n")
    status = pop_gguf(["convert", str(BUNDLED), "--outtype", "q8_0", "--outfile", str(TARGET)])
    if status:
        return status

    llm = PopLlama(str(TARGET), n_ctx=1024, verbose=False)
    text = llm.create_completion(PROMPT, max_tokens=60, temperature=0)["choices"][0]["text"]
    full = llm.create_completion(PROMPT, max_tokens=60, temperature=0, pop=False)["choices"][0]["text"]
    n_prompt = llm.timings.prompt_tokens

    # The two take turns, so that a slow moment of the machine falls on both.
    pruned_ms, full_ms = [], []
    for _ in range(RUNS):
        pruned_ms.append(time_to_first_token_ms(llm, PROMPT))
        full_ms.append(time_to_first_token_ms(llm, PROMPT, pop=False))
    with_pop, without = statistics.median(pruned_ms), statistics.median(full_ms)
    boundary, n_layer = llm.pop.boundary, llm.pop.n_layer
    ratio = f"{without / with_pop:.2f}x"

    print(f"\nPrompt    ...{PROMPT[-51:]}")
    print(f"With POP  {text.strip()}")
    print(f"Without   {full.strip()}")
    print(f"\nBoundary             layer {boundary} of {n_layer} (prefill skips {n_layer - boundary})")
    print(f"Prompt               {n_prompt} tokens")
    print(f"Time to first token  {with_pop:.1f} ms with POP, {without:.1f} ms without ({ratio}), median of {RUNS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
