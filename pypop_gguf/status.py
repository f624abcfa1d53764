"""The objects by which a ``PopLlama`` tells how it reads prompts, how long a call took, and that it was cancelled."""

from __future__ import annotations

from dataclasses import dataclass

from pypop_gguf.errors import PopError


@dataclass(frozen=True)
class PopStatus:
    """The way in which a ``PopLlama`` reads prompts.

    Attributes:
        enabled: Whether prompts are pruned.
        boundary: 0-based index of the first layer that prefill skips; ``n_layer`` when off.
        n_layer: Layers of the model, L.
        source: Where the boundary comes from: ``"argument"``, ``"file"`` (``pop.boundary``), ``"lossless"`` (upper
            layers share a cache, so a lower boundary changes nothing) or ``"off"``.
        head: First tokens of a sequence that run every layer all the same.
        tail: Last tokens of a prompt that run every layer all the same, the very last included.
        min_tokens: Prompts with fewer new tokens are not pruned.
        adapters: Boundaries at which fitted K/V projections fill the caches of the skipped layers.
    """

    enabled: bool
    boundary: int
    n_layer: int
    source: str
    head: int = 0
    tail: int = 1
    min_tokens: int = 0
    adapters: tuple[int, ...] = ()


@dataclass
class Timings:
    """The times and token counts of one call. Times are wall-clock milliseconds, or None if it did not get that far.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        reused_tokens: Tokens of the prompt that were found in the cache.
        pruned_tokens: Tokens of the prompt that only the layers below the boundary have read.
        generated_tokens: Tokens generated.
        prefill_ms: Time to read the part of the prompt that was not reused.
        time_to_first_token_ms: Time from the start of the call to the first token, sampling included.
        decode_ms_per_token: Mean time of the tokens after the first.
        boundary: Boundary that the prompt was read with; L if all layers have read all of it.
        completed_tokens: Tokens whose skipped layers were run later, during the call or since.
        complete_ms: Time that this took.
        incomplete_tokens: Cached tokens that are not the whole model's at the end of the call; None where completion is
            off.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    pruned_tokens: int = 0
    generated_tokens: int = 0
    prefill_ms: float | None = None
    time_to_first_token_ms: float | None = None
    decode_ms_per_token: float | None = None
    boundary: int | None = None
    completed_tokens: int = 0
    complete_ms: float = 0.0
    incomplete_tokens: int | None = None

    def count_completed(self, n_tokens: int, ms: float) -> None:
        """Counts tokens whose skipped layers were run."""
        self.completed_tokens += n_tokens
        self.complete_ms += ms

    def count_token(self, ms: float) -> None:
        """Counts one more generated token, which came ``ms`` after the start of the call."""
        if self.time_to_first_token_ms is None:
            self.time_to_first_token_ms = ms
        else:
            self.decode_ms_per_token = (ms - self.time_to_first_token_ms) / self.generated_tokens
        self.generated_tokens += 1

    def as_dict(self) -> dict[str, float | int | None]:
        """Returns the ``timings`` of a response: the names of llama.cpp's server, and some of ours."""
        read = self.prompt_tokens - self.reused_tokens
        after_first = self.generated_tokens - 1
        decode_ms = None if self.decode_ms_per_token is None else self.decode_ms_per_token * after_first
        return {
            "cache_n": self.reused_tokens,
            "prompt_n": read,
            "prompt_ms": self.prefill_ms,
            "prompt_per_token_ms": _ratio(self.prefill_ms, read),
            "prompt_per_second": _ratio(1e3 * read, self.prefill_ms),
            "predicted_n": self.generated_tokens,
            "predicted_ms": decode_ms,
            "predicted_per_token_ms": self.decode_ms_per_token,
            "predicted_per_second": _ratio(1e3 * after_first, decode_ms),
            "time_to_first_token_ms": self.time_to_first_token_ms,
            "pruned_n": self.pruned_tokens,
            "boundary": self.boundary,
            "completed_n": self.completed_tokens,
            "complete_ms": self.complete_ms,
            "incomplete_n": self.incomplete_tokens,
        }


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


class Cancelled(PopError):
    """A call was stopped by its ``cancel`` event or its ``progress`` function.

    Attributes:
        done: Prompt tokens that are in the cache, reused ones included. The next call goes on from there.
        total: Tokens of the prompt.
        lost: True if the cache was cleared: a recurrent memory cannot drop only the part of an image that was read.
    """

    def __init__(self, done: int, total: int, lost: bool = False) -> None:
        kept = (
            "what was read is lost: this model's memory cannot be taken back"
            if lost
            else "what was read stays in the cache"
        )
        super().__init__(f"cancelled after {done} of {total} prompt tokens; {kept}")
        self.done, self.total, self.lost = done, total, lost
