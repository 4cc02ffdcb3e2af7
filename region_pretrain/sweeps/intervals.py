"""Paired differences of fine-tunings, with an interval that respects their two levels of seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

#: Seed of the pre-training (None without one) and of the fine-tuning, and its machine if known.
Seeds = tuple[int | None, int] | tuple[int | None, int, str]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        mean: the mean over all pairs.
        standard_error: of the mean; None if the seeds do not allow an estimate.
        low, high: bounds of the 95 % interval of the mean; None without a standard error.
    """

    mean: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """``+5.3``, or ``+5.3 ± 1.2 [+2.1, +8.5]``: standard error and interval."""
        if self.standard_error is None:
            return f"{self.mean:+.1f}"
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.mean:+.1f} ± {self.standard_error:.1f} {interval}"


def _partners(
    values: Mapping[Seeds, float | None], reference: Mapping[Seeds, float | None]
) -> dict[tuple[int | None, int], tuple[Seeds, Seeds]]:
    found: dict[tuple[int | None, int], tuple[Seeds, Seeds]] = {}
    for seeds, others in itertools.product(values, reference):
        (pretrain, finetune, *machine), (other, same, *where) = seeds, others
        if finetune == same and (pretrain == other or None in (pretrain, other)):
            key = other if pretrain is None else pretrain, finetune
            if key not in found or (machine == where and found[key][0][2:] != found[key][1][2:]):
                found[key] = seeds, others
    return found


def pair(
    values: Mapping[Seeds, float | None], reference: Mapping[Seeds, float | None]
) -> dict[tuple[int | None, int], float | None]:
    """Differences of the runs with equal fine-tuning seeds.

    Pre-training seeds must be equal as well, but a run without pre-training is paired with the runs
    of every pre-training seed. If a run has partners on several machines, it is paired with that on
    its own: with the same seeds, rounding alone makes fine-tunings on two processors differ.

    Returns:
        Seeds -> value - reference; None if one of them is undefined.
    """
    pairs: dict[tuple[int | None, int], float | None] = {}
    for key, (seeds, others) in _partners(values, reference).items():
        a, b = values[seeds], reference[others]
        pairs[key] = None if None in (a, b) else a - b
    return pairs


def pairs_of_two_machines(values: Mapping[Seeds, Any], reference: Mapping[Seeds, Any]) -> int:
    """How many of the pairs of :func:`pair` are known to compare runs of different machines."""
    partners = _partners(values, reference).values()
    return sum(len(a) == len(b) == 3 and a[2] != b[2] for a, b in partners)


def difference(pairs: Mapping[Seeds, float | None]) -> Difference | None:
    """The mean of paired differences with its standard error and 95 % interval.

    With one fine-tuning per pre-training, or without pre-training, the pairs are independent: this
    is the paired t interval. With K pre-training seeds x M fine-tuning seeds they are not. Pairs of
    one pre-training share its quality. Pairs of one fine-tuning seed share the label subset, the
    order and, if the reference is not pre-trained, the reference's run, so the means of the
    pre-trainings are correlated too, and a t interval or a bootstrap over these means would be too
    narrow. Both seeds are therefore crossed random effects, with the mean squares of a two-way
    analysis of variance without replication::

        variance of the mean = (MS_pretrain + MS_finetune - MS_residual) / (K M)

    A component of variance that would be negative is 0: without one of the seeds' the variance is
    ``MS / (K M)`` of the other, and without both it is that of K M independent pairs, as where the
    residual likelihood is largest. The degrees of freedom are Satterthwaite's.
    An incomplete grid, or a single seed on one level, gives the mean only.

    Args:
        pairs: from :func:`pair`.

    Returns:
        None if there are no pairs or one is undefined.
    """
    if not pairs or None in pairs.values():
        return None
    mean = float(np.mean(list(pairs.values())))
    rows, columns = ({seeds[level]: None for seeds in pairs} for level in (0, 1))
    if len(pairs) == len(columns) > 1 and (len(rows) == len(columns) or list(rows) == [None]):
        variance = float(np.var(list(pairs.values()), ddof=1)) / len(pairs)
        return _with_interval(mean, variance, len(pairs) - 1)
    if min(len(rows), len(columns)) > 1 and len(pairs) == len(rows) * len(columns):
        table = np.array([[pairs[row, column] for column in columns] for row in rows])
        return _with_interval(mean, *_crossed(table))
    return Difference(mean)


def _crossed(table: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of a (K, M) table with crossed random effects, and its freedom."""
    k, m = table.shape
    table = table - table.mean()
    rows, columns = table.mean(1), table.mean(0)
    residual = table - rows[:, None] - columns
    degrees = np.array([k - 1, m - 1, (k - 1) * (m - 1)])
    sums = np.array([m * (rows**2).sum(), k * (columns**2).sum(), (residual**2).sum()])
    squares = sums / degrees
    if (pooled := sums.sum() / degrees.sum()) >= max(squares[:2]):
        return pooled / (k * m), float(degrees.sum())
    # The largest of three: it leaves out the level whose own component would be negative.
    signs = np.array([(1, 1, -1), (1, 0, 0), (0, 1, 0)])
    terms = max(signs * squares, key=np.sum)
    return terms.sum() / (k * m), terms.sum() ** 2 / (terms**2 / degrees).sum()


def _with_interval(mean: float, variance: float, freedom: float) -> Difference:
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, 0.975)) * error
    return Difference(mean, error, mean - half, mean + half)
