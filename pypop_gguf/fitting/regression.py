"""Ridge regression of what a skipped layer writes to its cache, from sums over many tokens. It needs numpy alone.

For a boundary and a weight W of a layer above it, x is what the product of W reads in a pruned pass, and y is what it
writes in a whole pass over the same text. Fitted are a weight W' and a shift s, so that ``W' x + s`` is near y:
``(W' - W)`` is penalized with lambda, so that few tokens change little.

Further inputs are states of layers below, which know what x has forgotten. They pass a bottleneck P, which all
weights share, and each weight has a matrix V behind it: ``W' x + V P s`` plus the shift is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

RANK = 256  # most numbers that pass the bottleneck
LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean variance of an input
_LEAST, _LEAST_FURTHER = 1e-2, 1e-1  # penalties of own and further inputs where the bottleneck is found
_LEAST_VARIANCE = 1e-10  # A share of the largest: inputs that vary less are left out of the bottleneck.
_ITERATIONS = 6  # of the search for leading directions; their span hardly changes after that
_ROUNDING = 1e-4  # two inputs that differ by less than this share of their size are the same numbers


@dataclass(frozen=True)
class Relation:
    """How one input follows from another, column by column: ``x = scale * base + offset``. Both are F64 [n_in]."""

    scale: np.ndarray
    offset: np.ndarray

    def extended(self, n_in: int) -> Relation:
        """Returns the relation of inputs to which further columns are added, up to ``n_in``, that are the same."""
        n = n_in - len(self.scale)
        return Relation(np.append(self.scale, np.ones(n)), np.append(self.offset, np.zeros(n)))


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


def _narrow(rows: np.ndarray, bottleneck: np.ndarray) -> np.ndarray:
    """Replaces the last rows, one for each column of the bottleneck, by their products with it."""
    n = len(rows) - bottleneck.shape[1]
    return np.concatenate([rows[:n], bottleneck @ rows[n:]])


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
        scaled = x * np.sqrt(weights)[:, None]
        self.gram += scaled.T @ scaled  # NumPy computes half of a matrix times its own transpose, and mirrors it.
        return x

    def narrowed(self, bottleneck: np.ndarray) -> InputSums:
        """Returns the sums where the last columns pass a bottleneck, F32 [rank, n]."""
        sums = InputSums(len(self.sum) - bottleneck.shape[1] + len(bottleneck))
        sums.weight, sums.sum = self.weight, _narrow(self.sum, bottleneck)
        sums.origin, sums.gram = _narrow(self.origin, bottleneck), _narrow(_narrow(self.gram, bottleneck).T, bottleneck)
        return sums

    def covariance(self) -> np.ndarray:
        """Returns the covariance of the input times the sum of the weights, F64 [n_in, n_in]."""
        return self.gram - np.outer(self.sum, self.sum / self.weight)


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

    def narrowed(self, bottleneck: np.ndarray) -> OutputSums:
        """Returns the sums for the input whose last columns pass a bottleneck, F32 [rank, n]."""
        sums = OutputSums(len(self.cross) - bottleneck.shape[1] + len(bottleneck), len(self.sum))
        sums.sum, sums.square, sums.cross = self.sum, self.square, _narrow(self.cross, bottleneck)
        return sums

    def covariance(self, inputs: InputSums) -> np.ndarray:
        """Returns the covariance of input and output times the sum of the weights, F64 [n_in, n_out]."""
        return self.cross - np.outer(inputs.sum, self.sum / inputs.weight)


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
        xx = inputs.covariance() * np.outer(scale, scale)
        xy = outputs.covariance(inputs) * scale[:, None]
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
        weight: F32 [n_out, n_in]; columns for further inputs follow those of the model's own weight.
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


def find_bottleneck(inputs: InputSums, outputs: Iterable[tuple[OutputSums, float]], n_own: int) -> np.ndarray:
    """Finds what of the further inputs says most about all outputs, beyond what the own input says about them.

    This is reduced-rank regression: each weight's error counts as a share of the variance of its outputs.

    Args:
        inputs: The own input in the first ``n_own`` columns, then the further inputs.
        outputs: The outputs of each weight, and a factor that its error is multiplied by.
        n_own: Columns of the own input.

    Returns:
        F32 [rank, n_in - n_own], of further inputs.
    """
    mean = inputs.sum / inputs.weight
    # The covariance in float32, which is enough here and takes half of the memory.
    xx = inputs.gram - np.outer(inputs.sum.astype(np.float32), mean.astype(np.float32))
    own, mixed, further = xx[:n_own, :n_own], xx[:n_own, n_own:], xx[n_own:, n_own:]
    predictor = np.linalg.solve(own + _LEAST * np.trace(own) / n_own * np.eye(n_own, dtype=np.float32), mixed)
    rest = further - mixed.T @ predictor
    variances = np.maximum(np.diag(rest), 0)
    sizes = np.sqrt(variances)  # of very different orders, and 0 where an activation never changes
    scale = np.divide(1, sizes, out=np.zeros_like(sizes), where=variances > _LEAST_VARIANCE * variances.max())
    rest *= np.outer(scale, scale)
    factor = np.linalg.cholesky((rest + rest.T) / 2 + _LEAST_FURTHER * np.eye(len(rest), dtype=np.float32))
    parts = []
    for one, factor_of_error in outputs:
        xy = one.covariance(inputs)
        variance = max(one.square - float(one.sum @ one.sum) / inputs.weight, 1e-30)
        parts.append((xy[n_own:] - predictor.T @ xy[:n_own]) * scale[:, None] * factor_of_error / np.sqrt(variance))
    target = np.linalg.solve(factor, np.concatenate(parts, axis=1))
    rank = min(RANK, n_own // 2, target.shape[1])
    basis = _leading_directions(target, rank)
    rows = np.linalg.solve(factor.T, basis).T * scale
    return (rows * np.sqrt(inputs.weight)).astype(np.float32)


def _leading_directions(matrix: np.ndarray, n: int) -> np.ndarray:
    """The n leading left singular vectors of a matrix, nearly: by subspace iteration, which is fast."""
    basis = np.random.default_rng(0).standard_normal((len(matrix), n))
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    return basis


def solve(fitted: Moments, held_out: Moments, weight: np.ndarray) -> FittedWeight:
    """Solves the regression with each of ``LAMBDAS`` and keeps the solution that errs least on other tokens.

    Args:
        fitted: Tokens to fit on.
        held_out: Other tokens.
        weight: The model's own weight, F32 [n_out, n_in]. Where the input has more columns, these are further inputs.

    Returns:
        The replacement. If no solution is better than the model's own weight, that weight, with a shift if one helps.
    """
    n_own, n_in = weight.shape[1], len(fitted.xx)
    own = np.pad(weight.astype(np.float64), ((0, 0), (0, n_in - n_own)))
    before = held_out.error(own, np.zeros(len(own)))
    best = FittedWeight(own.astype(np.float32), np.zeros(len(own), dtype=np.float32), np.inf, before, before)
    variances = np.diag(fitted.xx)
    level = np.repeat(variances[:n_own].mean(), n_in)
    if n_own < n_in:
        level[n_own:] = variances[n_own:].mean()
    solution = own  # to which an infinite penalty leads
    for penalty in (np.inf, *LAMBDAS):
        if np.isfinite(penalty):
            ridge = fitted.xx + np.diag(penalty * level)
            solution = np.linalg.solve(ridge, fitted.xy + (penalty * level * own).T).T
        shift = fitted.mean_y - solution @ fitted.mean_x
        error = held_out.error(solution, shift)
        if error < best.error_after:
            best = FittedWeight(solution.astype(np.float32), shift.astype(np.float32), penalty, before, error)
    return best
