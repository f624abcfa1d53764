"""Means and ratios with 95% intervals by the bootstrap, for everything that the commands measure.

The draws are the same at every call with as many values: results are reproducible, and ratios of two columns are
paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

_RESAMPLES = 10000


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


class Ratio(_Estimate):
    """A ratio of two medians."""

    default_format = ".3f"


def bootstrap_mean(values: np.ndarray) -> Mean:
    """Returns the mean of ``values``, [n], one value for each sample."""
    means = values[_draws(len(values))].mean(axis=1)
    return Mean(float(values.mean()), *_interval(means))


def bootstrap_increase(values: np.ndarray, baseline: np.ndarray) -> Mean:
    """Returns by what share the mean of ``values`` exceeds that of ``baseline``; both are [n] over the same samples."""
    draws = _draws(len(values))
    increases = values[draws].mean(axis=1) / baseline[draws].mean(axis=1) - 1
    return Mean(float(values.mean() / baseline.mean() - 1), *_interval(increases))


def bootstrap_ratio(values: np.ndarray, others: np.ndarray) -> Ratio:
    """Returns the median of ``values`` over the median of ``others``; both are [n] over the same rounds."""
    draws = _draws(len(values))
    ratios = np.median(values[draws], axis=1) / np.median(others[draws], axis=1)
    return Ratio(float(np.median(values) / np.median(others)), *_interval(ratios))


def _draws(n: int) -> np.ndarray:
    """Returns which samples each resample has, [resamples, n]."""
    return np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
    return low, high
