"""Means, differences and ratios with 95% intervals by the bootstrap, for everything that the commands measure.

The draws are the same at every call with as many values: results are reproducible, and differences and ratios of two
columns are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

_RESAMPLES = 10000
_DRAWN_AT_ONCE = 10**7  # samples, so that a large set needs no gigabytes
_SIGNIFICANCE = 0.05  # A difference with a larger p-value is within noise.


@dataclass(frozen=True)
class _Estimate:
    """A value with its 95% interval. A format applies to all three numbers: ``f"{mean:.1%}"``."""

    value: float
    low: float
    high: float

    default_format: ClassVar[str] = ""

    def __format__(self, spec: str) -> str:
        value, low, high = (format(number, spec or self.default_format) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


class Mean(_Estimate):
    """A mean over samples, or a relative change of one."""

    default_format = ".4f"


@dataclass(frozen=True)
class Difference(_Estimate):
    """A mean difference between two columns over the same samples.

    Attributes:
        p_value: Chance of a difference at least as large, if each pair could as well be the other way round.
    """

    p_value: float

    default_format = "+.4f"

    @property
    def within_noise(self) -> bool:
        return self.p_value >= _SIGNIFICANCE


class Ratio(_Estimate):
    """A ratio of two medians."""

    default_format = ".3f"


def bootstrap_mean(values: np.ndarray) -> Mean:
    """Returns the mean of ``values``, [n], one value for each sample."""
    return Mean(float(values.mean()), *_interval(_resample(_means, values)))


def bootstrap_mean_of_groups(groups: Sequence[np.ndarray]) -> Mean:
    """Returns the mean of the groups' means. Each group, [n] with an n of its own, is resampled by itself."""
    means = [_resample(_means, values, seed=i) for i, values in enumerate(groups)]
    return Mean(float(np.mean([values.mean() for values in groups])), *_interval(np.mean(means, axis=0)))


def paired_difference(values: np.ndarray, baseline: np.ndarray) -> Difference:
    """Returns by how much the mean of ``values`` exceeds that of ``baseline``; both are [n] over the same samples.

    The p-value is McNemar's exact one where all samples that differ differ by as much, as right and wrong answers do.
    Elsewhere it comes from 10,000 random exchanges within the pairs.
    """
    differences = values - baseline
    means = _interval(_resample(_means, differences))
    return Difference(float(differences.mean()), *means, _p_value(differences[differences != 0]))


def _p_value(differences: np.ndarray) -> float:
    """Returns the two-sided p-value of the differences that are not 0, [n]."""
    n = len(differences)
    if n == 0:
        return 1.0
    if np.ptp(np.abs(differences)) == 0:
        fewer = min(int((differences > 0).sum()), int((differences < 0).sum()))
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    signs = np.random.default_rng(0).integers(2, size=(_RESAMPLES, n)) * 2 - 1
    sums = np.abs(signs @ differences)
    # The sample itself counts as one of the draws. The margin keeps rounding from parting equal sums.
    return float((1 + (sums >= abs(differences.sum()) * (1 - 1e-9)).sum()) / (1 + _RESAMPLES))


def bootstrap_increase(values: np.ndarray, baseline: np.ndarray) -> Mean:
    """Returns by what share the mean of ``values`` exceeds that of ``baseline``; both are [n] over the same samples."""
    increases = _resample(lambda drawn, others: _means(drawn) / _means(others) - 1, values, baseline)
    return Mean(float(values.mean() / baseline.mean() - 1), *_interval(increases))


def bootstrap_ratio(values: np.ndarray, others: np.ndarray) -> Ratio:
    """Returns the median of ``values`` over the median of ``others``; both are [n] over the same rounds."""
    ratios = _resample(lambda drawn, their: np.median(drawn, axis=1) / np.median(their, axis=1), values, others)
    return Ratio(float(np.median(values) / np.median(others)), *_interval(ratios))


def _means(drawn: np.ndarray) -> np.ndarray:
    return drawn.mean(axis=1)


def _resample(statistic: Callable[..., np.ndarray], *columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """Computes a statistic of each resample, [resamples].

    Args:
        statistic: Takes some resamples of each column, [some, n], and returns [some].
        columns: Each is [n], over the same samples.
        seed: Of the draws.
    """
    n, chance = len(columns[0]), np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // n)
    found = []
    for start in range(0, _RESAMPLES, step):
        draws = chance.integers(n, size=(min(step, _RESAMPLES - start), n))
        found.append(statistic(*(column[draws] for column in columns)))
    return np.concatenate(found)


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
    return low, high
