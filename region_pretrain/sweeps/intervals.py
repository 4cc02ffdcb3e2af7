"""Paired differences of fine-tunings, with an interval that respects their two levels of seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
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
    values: Mapping[Seeds, Any], reference: Mapping[Seeds, Any]
) -> dict[tuple[int | None, int], list[tuple[Seeds, Seeds]]]:
    """Pre-training and fine-tuning seed -> runs of the same machine, or else of any two."""
    found: dict[tuple[int | None, int], list[tuple[Seeds, Seeds]]] = defaultdict(list)
    for seeds, others in itertools.product(values, reference):
        (pretrain, finetune, *_), (other, same, *_) = seeds, others
        if finetune == same and (pretrain == other or None in (pretrain, other)):
            found[other if pretrain is None else pretrain, finetune].append((seeds, others))
    return {key: [(a, b) for a, b in runs if a[2:] == b[2:]] or runs for key, runs in found.items()}


def pair(
    values: Mapping[Seeds, float | None], reference: Mapping[Seeds, float | None]
) -> dict[tuple[int | None, int], float | None]:
    """Differences of the runs with equal fine-tuning seeds.

    Pre-training seeds must be equal as well, but a run without pre-training is paired with the runs
    of every pre-training seed. With the same seeds, rounding alone makes runs on two processors
    differ: if runs of equal seeds share a machine, only these are compared. If they were repeated
    on several machines, their difference is the mean over these.

    Returns:
        Seeds -> value - reference; None if one of them is undefined.
    """
    pairs: dict[tuple[int | None, int], float | None] = {}
    for key, runs in _partners(values, reference).items():
        both = [(values[seeds], reference[others]) for seeds, others in runs]
        undefined = any(None in two for two in both)
        pairs[key] = None if undefined else statistics.fmean(a - b for a, b in both)
    return pairs


def pairs_of_two_machines(values: Mapping[Seeds, Any], reference: Mapping[Seeds, Any]) -> int:
    """How many of the pairs of :func:`pair` are known to compare runs of different machines."""
    partners = _partners(values, reference).values()
    return sum(len(a) == len(b) == 3 and a[2] != b[2] for (a, b), *_ in partners)


def difference(pairs: Mapping[Seeds, float | None]) -> Difference | None:
    """The mean of paired differences with its standard error and 95 % interval.

    With one fine-tuning per pre-training, or without pre-training, the pairs are independent:
    this is the paired t interval. With several of both they are not. Pairs of one pre-training
    share its quality. Pairs of one fine-tuning seed share the label subset, the order and, if the
    reference is not pre-trained, the reference's run, so the means of the pre-trainings are
    correlated too, and a t interval or a bootstrap over these means would be too narrow. Both
    seeds are therefore crossed random effects, whose variances maximise the restricted likelihood
    (REML; Patterson and Thompson, 1971) and are not negative. In a complete grid of K x M seeds,
    these are the mean squares of the two-way analysis of variance without replication::

        variance of the mean = (MS_pretrain + MS_finetune - MS_residual) / (K M)

    and without the effect of one or both seeds, ``MS / (K M)`` of the other one or of all pairs.
    The degrees of freedom are Satterthwaite's. Pairs may be missing; a single seed on one level,
    or too few pairs to tell the effects apart, give the mean only.

    Args:
        pairs: from :func:`pair`.

    Returns:
        None if there are no pairs or one is undefined.
    """
    if not pairs or None in pairs.values():
        return None
    values, n = np.array(list(pairs.values())), len(pairs)
    rows, columns = ([seeds[level] for seeds in pairs] for level in (0, 1))
    parts = [*(np.equal.outer(seeds, seeds) * 1.0 for seeds in (rows, columns)), np.eye(n)]
    mean, spread = float(values.mean()), float(values.std())
    if n == len(set(columns)) > 1 and (len(set(rows)) == n or set(rows) == {None}):
        variance, freedom = 1 / (n - 1), n - 1
    elif min(len(set(rows)), len(set(columns))) > 1 and _identified(parts):
        equal = spread <= 1e-9 * abs(mean)
        variance, freedom = (0.0, n - 1) if equal else _crossed((values - mean) / spread, parts)
    else:
        return Difference(mean)
    return _with_interval(mean, variance * spread**2, freedom)


def _identified(parts: Sequence[np.ndarray]) -> bool:
    """Whether the variances of these parts can be told apart, the mean being unknown."""
    centre = np.eye(len(parts[0])) - 1 / len(parts[0])
    seen = np.array([(centre @ part @ centre).ravel() for part in parts])
    return np.linalg.matrix_rank(seen) == len(parts) < len(centre)


def _crossed(values: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """Fit the variances of random effects by restricted likelihood; the mean is unknown.

    Args:
        values: (n,), of variance 1.
        parts: (n, n) each: the covariance is their sum, weighted with the variances; the last is
            that of the residual.

    Returns:
        Variance of the mean of the values, and its degrees of freedom.
    """

    def terms(variances):
        covariance = sum(v * part for v, part in zip(variances, parts, strict=True))
        precision = np.linalg.inv(covariance)
        total = precision.sum()
        projection = precision - np.outer(precision.sum(1), precision.sum(0)) / total
        seen = [projection @ part for part in parts]
        residual = projection @ values
        loss = np.linalg.slogdet(covariance)[1] + math.log(total) + values @ residual
        slope = [np.trace(a) - residual @ b @ residual for a, b in zip(seen, parts, strict=True)]
        return loss, np.array(slope), seen

    bounds = [(0, None)] * (len(parts) - 1) + [(1e-6, None)]  # effects may leave no residual
    found = minimize(
        lambda variances: terms(variances)[:2],
        np.ones(len(parts)),
        jac=True,
        bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    )
    kept = found.x > 1e-4
    weights = np.array([part.sum() for part in parts]) / len(values) ** 2
    seen = [one for one, keep in zip(terms(found.x)[2], kept, strict=True) if keep]
    information = np.array([[(a * b.T).sum() for b in seen] for a in seen])
    variance, weights = weights @ found.x, weights[kept]
    return variance, variance**2 / (weights @ np.linalg.solve(information, weights))


def _with_interval(mean: float, variance: float, freedom: float) -> Difference:
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, 0.975)) * error
    return Difference(mean, error, mean - half, mean + half)
