"""Log-probabilities of completions, and the echo of prompts, where llama-cpp-python's are wrong.

Its log-probabilities of an echoed prompt belong to the next token each, unless the model begins a prompt with a BOS
token; those after an empty prompt do so if it does begin with one. It cannot echo a prompt of token ids.
``llama.py`` calls these functions with what the call has read and generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pypop_gguf import library

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()


def text_of(llm: llama_cpp.Llama, tokens: Sequence[int], before: Sequence[int] | None = None) -> str:
    """Returns the text of tokens. What is no whole letter is left out, as llama-cpp-python does."""
    previous = None if before is None else list(before)
    return llm.detokenize(list(tokens), prev_tokens=previous).decode("utf-8", errors="ignore")


def completion_logprobs(
    llm: llama_cpp.Llama,
    prompt: Sequence[int],
    generated: Sequence[int],
    n_top: int,
    *,
    echo: bool,
    n_characters: int,
) -> dict[str, list]:
    """Returns the field ``logprobs`` of a completion, in the format of OpenAI and as llama-cpp-python fills it.

    A leading BOS token is not shown, and the first shown token of an echoed prompt has no log-probability.

    Args:
        llm: The model, whose ``scores`` hold the logits after each position, F32 [n, n_vocab].
        prompt: Tokens of the prompt.
        generated: Tokens that were generated.
        n_top: Number of the likeliest tokens to show beside each.
        echo: Whether the tokens of the prompt are shown.
        n_characters: Length of the prompt, which is the offset of the generated text.
    """
    bos = llm.token_bos()
    tokens = [*prompt, *generated]
    begin = len(prompt) if not echo else 1 if prompt[0] == bos else 0
    fields: dict[str, list] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for at in range(begin, len(tokens)):
        if tokens[at] == bos:
            continue
        before = tokens[begin:at]
        text = text_of(llm, tokens[at : at + 1], before)
        fields["tokens"].append(text)
        fields["text_offset"].append((0 if echo else n_characters) + len(text_of(llm, before)))
        if echo and len(fields["tokens"]) == 1:
            fields["token_logprobs"].append(None)
            fields["top_logprobs"].append(None)
            continue
        logprobs = llm.logits_to_logprobs(llm.scores[at - 1])
        likeliest = np.lexsort((np.arange(len(logprobs)), logprobs))[::-1][:n_top]
        top = {text_of(llm, [int(i)], before): float(logprobs[i]) for i in likeliest}
        fields["token_logprobs"].append(float(logprobs[tokens[at]]))
        fields["top_logprobs"].append({**top, text: float(logprobs[tokens[at]])})
    return fields
