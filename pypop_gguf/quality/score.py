"""Measures what pruning costs: continuations scored by the whole model on the cache that a pruned prompt has left.

Measures only; pypop_gguf/boundary_rules.py decides. The full model is the same engine with POP off, so quantization falls on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.llama import PopLlama, llama_cpp

_RESAMPLES = 10000


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its 95% interval (bootstrap over samples)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Score:
    """One sample at one boundary; means over the tokens of its continuation.

    Attributes:
        nll: Negative log-likelihood, nats a token.
        kl: Divergence KL(whole model || POP), nats a token; 0 at the whole model's own.
        top1: Share of tokens where both models' likeliest token is the same.
        tokens: Tokens of the continuation.
    """

    nll: float
    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Quality:
    """A boundary over all samples. Samples count alike, however long.

    Attributes:
        boundary: First layer that prefill skips; L is the whole model.
        loss_increase: Mean NLL over the whole model's, minus 1.
    """

    boundary: int
    samples: int
    nll: Mean
    kl: Mean
    top1: Mean
    loss_increase: Mean


class Tokenizer:
    """A model's own tokenizer, as :func:`pypop_gguf.importance.calibration.load_samples` uses a Hugging Face one."""

    def __init__(self, llm: PopLlama) -> None:
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
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template=self.chat_template,
            eos_token=self._text(self._llm.token_eos()),
            bos_token=self._text(self.bos_token_id),
            add_generation_prompt=add_generation_prompt,
        )
        return formatter(messages=messages).prompt

    def _text(self, token: int) -> str:
        return self._llm.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""


def score_sample(llm: PopLlama, sample: Sample, boundaries: Iterable[int]) -> dict[int, Score]:
    """Scores one continuation, by the whole model first.

    Args:
        llm: Its head, tail and fewest tokens hold.
        sample: Prompt and continuation, at most ``n_ctx`` tokens.
        boundaries: 1..L each.

    Returns:
        Boundary -> score; L, the whole model, is always there.
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
    """:func:`score_sample` of each, as each is done."""
    boundaries = list(boundaries)
    for sample in samples:
        yield score_sample(llm, sample, boundaries)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, F64 [n, n_vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(log_p: np.ndarray, whole: np.ndarray, continuation: list[int]) -> Score:
    """A continuation's score from log-probabilities, F64 [n, n_vocab], POP's and the whole model's."""
    rows = np.arange(len(continuation))
    return Score(
        nll=float(-log_p[rows, continuation].mean()),
        kl=float((np.exp(whole) * (whole - log_p)).sum(axis=1).mean()),
        top1=float((log_p.argmax(axis=1) == whole.argmax(axis=1)).mean()),
        tokens=len(continuation),
    )


def _resampled(n: int) -> np.ndarray:
    """The same draws for every column, so that ratios of two are paired. [resamples, n]"""
    return np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))


def bootstrap_mean(values: np.ndarray) -> Mean:
    """Of one value a sample, [n]."""
    return Mean(
        float(values.mean()), *np.percentile(values[_resampled(len(values))].mean(axis=1), (2.5, 97.5)).tolist()
    )


def summarize(scores: list[dict[int, Score]]) -> list[Quality]:
    """Means over samples for each boundary, deepest layers kept first.

    Raises:
        PopError: No samples.
    """
    if not scores:
        raise PopError("no sample was scored")
    n_layer = max(scores[0])
    picked = _resampled(len(scores))

    def column(boundary: int, name: str) -> np.ndarray:
        return np.array([getattr(score[boundary], name) for score in scores])

    whole = column(n_layer, "nll")
    result = []
    for boundary in sorted(scores[0], reverse=True):
        nll = column(boundary, "nll")
        increases = nll[picked].mean(axis=1) / whole[picked].mean(axis=1) - 1
        increase = Mean(float(nll.mean() / whole.mean() - 1), *np.percentile(increases, (2.5, 97.5)).tolist())
        others = (bootstrap_mean(column(boundary, name)) for name in ("kl", "top1"))
        result.append(Quality(boundary, len(scores), bootstrap_mean(nll), *others, increase))
    return result
