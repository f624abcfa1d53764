"""Measures what pruning costs: the whole model scores continuations on the cache that a pruned prompt has left.

It only measures; pypop_gguf/boundary_rules.py decides. The whole model is the same file in the same engine with POP
off, so the effects of quantization are on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pypop_gguf import library
from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.llama import PopLlama
from pypop_gguf.statistics import Mean, bootstrap_increase, bootstrap_mean


@dataclass(frozen=True)
class Score:
    """The score of one sample at one boundary, as means over the tokens of its continuation.

    Attributes:
        nll: Negative log-likelihood, nats a token.
        kl: KL divergence KL(whole model || pruned), nats a token; 0 for the whole model itself.
        top1: Share of tokens for which both find the same token the likeliest.
        tokens: Tokens of the continuation.
    """

    nll: float
    kl: float
    top1: float
    tokens: int

    @classmethod
    def from_figures(cls, figures: Mapping[str, float]) -> Score:
        """Returns the score that is among the figures of an item."""
        return cls(figures["nll"], figures["kl"], figures["top1"], int(figures["tokens"]))


@dataclass(frozen=True)
class Quality:
    """The means of one boundary over all samples. Each sample counts the same, however long it is.

    Attributes:
        boundary: First layer that prefill skips; L is the whole model.
        samples: Number of samples.
        nll: Mean of ``Score.nll``; ``kl`` and ``top1`` likewise.
        loss_increase: By what share the mean NLL exceeds that of the whole model.
    """

    boundary: int
    samples: int
    nll: Mean
    kl: Mean
    top1: Mean
    loss_increase: Mean


class Tokenizer:
    """The tokenizer of a model file, with the methods of a Hugging Face tokenizer that importance.calibration uses."""

    def __init__(self, llm: PopLlama) -> None:
        """Takes the tokenizer of an opened model.

        Raises:
            PopError: The file has none.
        """
        llama_cpp = library.load()
        vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise PopError(f"{llm.model_path} has no tokenizer, so it reads no text: take a file that has one")
        self._llm = llm
        self.bos_token_id = llm.token_bos()
        self.model_max_length = llm.n_ctx()
        self.chat_template = llm.metadata.get("tokenizer.chat_template")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {
            "input_ids": self._llm.tokenize(text.encode(), add_bos=add_special_tokens, special=not add_special_tokens)
        }

    def apply_chat_template(
        self, messages: list[dict], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        formatter = library.load().llama_chat_format.Jinja2ChatFormatter(
            template=self.chat_template,
            eos_token=self._text(self._llm.token_eos()),
            bos_token=self._text(self.bos_token_id),
            add_generation_prompt=add_generation_prompt,
        )
        return formatter(messages=messages).prompt

    def _text(self, token: int) -> str:
        return self._llm.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""


def score_sample(llm: PopLlama, sample: Sample, boundaries: Iterable[int]) -> dict[int, Score]:
    """Scores one continuation, first after a prompt that was read by the whole model.

    Args:
        llm: The model; its head, tail and least number of tokens apply.
        sample: Prompt and continuation, at most ``n_ctx`` tokens.
        boundaries: 1..L each.

    Returns:
        The score of each boundary; L, the whole model, is always there.
    """
    prompt, continuation = list(sample.tokens[: sample.prompt_len]), list(sample.tokens[sample.prompt_len :])
    n_layer = llm.pop.n_layer
    whole = log_softmax(llm.score(prompt, continuation, pop=False))
    result = {n_layer: compare(whole, whole, continuation)}
    for boundary in boundaries:
        if boundary != n_layer:
            result[boundary] = compare(
                log_softmax(llm.score(prompt, continuation, boundary=boundary)), whole, continuation
            )
    return result


def score_samples(llm: PopLlama, samples: Iterable[Sample], boundaries: Iterable[int]) -> Iterator[dict[int, Score]]:
    """Yields the :func:`score_sample` of each sample."""
    boundaries = list(boundaries)
    for sample in samples:
        yield score_sample(llm, sample, boundaries)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities, F64 [n, n_vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(log_p: np.ndarray, whole: np.ndarray, continuation: list[int]) -> Score:
    """Returns the score of a continuation from the log-probabilities of both models, F64 [n, n_vocab] each."""
    rows = np.arange(len(continuation))
    return Score(
        nll=float(-log_p[rows, continuation].mean()),
        kl=float((np.exp(whole) * (whole - log_p)).sum(axis=1).mean()),
        top1=float((log_p.argmax(axis=1) == whole.argmax(axis=1)).mean()),
        tokens=len(continuation),
    )


def summarize(scores: list[dict[int, Score]]) -> list[Quality]:
    """Returns the means over samples for each boundary, the whole model first.

    Raises:
        PopError: No samples.
    """
    if not scores:
        raise PopError("no sample was scored: give a file with more texts")
    n_layer = max(scores[0])

    def column(boundary: int, name: str) -> np.ndarray:
        return np.array([getattr(score[boundary], name) for score in scores])

    whole = column(n_layer, "nll")
    return [
        Quality(
            boundary,
            len(scores),
            nll=bootstrap_mean(column(boundary, "nll")),
            kl=bootstrap_mean(column(boundary, "kl")),
            top1=bootstrap_mean(column(boundary, "top1")),
            loss_increase=bootstrap_increase(column(boundary, "nll"), whole),
        )
        for boundary in sorted(scores[0], reverse=True)
    ]
