"""Ridge regression of what a skipped layer writes to its cache, from sums over many tokens. It needs numpy alone.

For a boundary and a weight W of a layer above it, x is what the product of W reads in a pruned pass, and y is what it
writes in a whole pass over the same text. Fitted are a weight W' and a shift s, so that ``W' x + s`` is near y:
``(W' - W)`` is penalized with lambda, so that few tokens change little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean variance of an input
_ROUNDING = 1e-4  # two inputs that differ by less than this share of their size are the same numbers


@dataclass(frozen=True)
class Relation:
    """How one input follows from another, column by column: ``x = scale * base + offset``. Both are F64 [n_in]."""

    scale: np.ndarray
    offset: np.ndarray


def relate(base: np.ndarray, x: np.ndarray) -> Relation | None:
    """Finds out whether an input follows from another one of the same tokens, as the inputs of two layers do that
    normalize the same state and scale it by weights of their own.

    Args:
        base: F32 [n_tokens, n_in].
        x: F32 [n_tokens, n_in].

    Returns:
        None if it does not.
    """
    if base.shape != x.shape or len(x) < 3:
        return None
    centred = base.astype(np.float64) - base.mean(axis=0, dtype=np.float64)
    mean = x.mean(axis=0, dtype=np.float64)
    scale = (centred * (x - mean)).sum(axis=0) / np.maximum((centred**2).sum(axis=0), 1e-30)
    offset = mean - scale * base.mean(axis=0, dtype=np.float64)
    worst = np.abs(base * scale + offset - x).max()
    return Relation(scale, offset) if worst <= _ROUNDING * np.abs(x).max() else None


class InputSums:
    """Weighted sums over one input: the weights of the tokens, x, and x x' [n_in, n_in].

    Attributes:
        origin: The mean of the tokens that were added first. It is subtracted from every x, because float32 sums of
            squares would lose the small differences of numbers that are far from zero.
    """

    def __init__(self, n_in: int) -> None:
        self.weight, self.sum = 0.0, np.zeros(n_in)
        self.origin = np.zeros(n_in, dtype=np.float32)
        self.gram = np.zeros((n_in, n_in), dtype=np.float32)

    def add(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Adds the inputs of some tokens, F32 [n_tokens, n_in], with a weight F32 for each. Returns them less the
        origin."""
        if self.weight == 0:
            self.origin = x.mean(axis=0)
        x = x - self.origin
        self.weight += float(weights.sum(dtype=np.float64))
        self.sum += weights.astype(np.float64) @ x
        self.gram += (x * weights[:, None]).T @ x
        return x


class OutputSums:
    """Weighted sums over one output and an input less its origin: y, x y' [n_in, n_out], and the square of y."""

    def __init__(self, n_in: int, n_out: int) -> None:
        self.sum, self.square = np.zeros(n_out), 0.0
        self.cross = np.zeros((n_in, n_out), dtype=np.float32)

    def add(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> None:
        """Adds some tokens: F32 [n_tokens, n_in], F32 [n_tokens, n_out], and a weight F32 for each token."""
        weighted = y * weights[:, None]
        self.sum += weights.astype(np.float64) @ y
        self.square += float(weights.astype(np.float64) @ np.square(y, dtype=np.float64).sum(axis=1))
        self.cross += x.T @ weighted


@dataclass(frozen=True)
class Moments:
    """The sums over tokens that the regression needs, in float64, after the relation was applied to the input.

    Attributes:
        weight: Weights of the tokens, added up.
        xx: Covariance of the input times ``weight``, [n_in, n_in].
        xy: The same of input and output, [n_in, n_out].
        yy: Squared deviation of the output from its mean, over all tokens and rows.
        mean_x: [n_in].
        mean_y: [n_out].
    """

    weight: float
    xx: np.ndarray
    xy: np.ndarray
    yy: float
    mean_x: np.ndarray
    mean_y: np.ndarray

    @classmethod
    def from_sums(cls, inputs: InputSums, outputs: OutputSums, relation: Relation) -> Moments:
        n, scale = inputs.weight, relation.scale
        mean_x, mean_y = inputs.sum / n, outputs.sum / n
        xx = (inputs.gram - n * np.outer(mean_x, mean_x)) * np.outer(scale, scale)
        xy = (outputs.cross - n * np.outer(mean_x, mean_y)) * scale[:, None]
        yy = outputs.square - n * float(mean_y @ mean_y)
        return cls(n, xx, xy, yy, (inputs.origin + mean_x) * scale + relation.offset, mean_y)

    def error(self, weight: np.ndarray, shift: np.ndarray) -> float:
        """Squared error of ``W x + s``, as a share of the output's squared deviation from its mean."""
        bias = weight @ self.mean_x + shift - self.mean_y
        squared = self.yy - 2 * float((weight.T * self.xy).sum()) + float((weight @ self.xx * weight).sum())
        return (squared + self.weight * float(bias @ bias)) / max(self.yy, 1e-30)


@dataclass(frozen=True)
class FittedWeight:
    """A replacement of one weight.

    Attributes:
        weight: F32 [n_out, n_in].
        shift: F32 [n_out].
        penalty: The lambda that errs least on the tokens held out.
        error_before: Error of the model's own weight on the tokens held out; see :meth:`Moments.error`.
        error_after: Error of the replacement on them.
    """

    weight: np.ndarray
    shift: np.ndarray
    penalty: float
    error_before: float
    error_after: float


def solve(fitted: Moments, held_out: Moments, weight: np.ndarray) -> FittedWeight:
    """Solves the regression with each of ``LAMBDAS`` and keeps the solution that errs least on other tokens.

    Args:
        fitted: Tokens to fit on.
        held_out: Other tokens.
        weight: The model's own weight, F32 [n_out, n_in].

    Returns:
        The replacement. If no solution is better than the model's own weight, that weight, with a shift if one helps.
    """
    own = weight.astype(np.float64)
    before = held_out.error(own, np.zeros(len(own)))
    best = FittedWeight(weight, np.zeros(len(own), dtype=np.float32), np.inf, before, before)
    level = np.trace(fitted.xx) / len(fitted.xx)
    solution = own  # to which an infinite penalty leads
    for penalty in (np.inf, *LAMBDAS):
        if np.isfinite(penalty):
            ridge = fitted.xx + penalty * level * np.eye(len(fitted.xx))
            solution = np.linalg.solve(ridge, fitted.xy + penalty * level * own.T).T
        shift = fitted.mean_y - solution @ fitted.mean_x
        error = held_out.error(solution, shift)
        if error < best.error_after:
            best = FittedWeight(solution.astype(np.float32), shift.astype(np.float32), penalty, before, error)
    return best
