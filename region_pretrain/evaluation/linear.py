"""Linear classification of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Strengths of the L2 penalty to choose from.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_HELD_OUT = 0.2
_MAX_ITER = 200


def linear_classify(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    *,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Classify vectors by multinomial logistic regression, full batch.

    Features are standardised with the mean and standard deviation of the training vectors. The
    penalty is the one with the smallest cross-entropy on a random fifth of the training vectors,
    which depends less on the choice of the fifth than its accuracy does; the classifier is then
    trained on all of them.

    Args:
        features: (N, D) float training vectors; computed in their precision and on their device.
        labels: (N,) int64 classes.
        test_features: (M, D).
        seed: chooses the fifth; nothing else is random.

    Returns:
        The predicted classes (M,), each of which occurs in ``labels``, and the chosen penalty.

    Raises:
        ValueError: there are no training vectors.
    """
    if len(features) == 0:
        raise ValueError("a linear classifier of no vectors is undefined")
    std, mean = torch.std_mean(features, dim=0, correction=0)
    varies = std > 1e-6 * mean.abs()  # else the deviation is rounding noise
    std = torch.where(varies, std, torch.ones_like(std))
    train, test = (features - mean) / std, (test_features - mean) / std
    classes, targets = labels.unique(return_inverse=True)

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    count = int(_HELD_OUT * len(train))
    held_out, rest = order.to(train.device).split([count, len(train) - count])
    held_out = held_out[torch.isin(targets[held_out], targets[rest])]  # the others are unknown
    best, chosen, start = torch.inf, None, None
    for penalty in sorted(PENALTIES, reverse=True):
        start = fit_logistic(train[rest], targets[rest], len(classes), penalty, start)
        logits = _logits(start, train[held_out])
        loss = float(F.cross_entropy(logits, targets[held_out], reduction="sum"))
        if loss < best:
            best, chosen, weights = loss, penalty, start
    weights = fit_logistic(train, targets, len(classes), chosen, weights)
    return classes[predict(weights, test)], chosen


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: Tensor | None = None,
    max_iter: int = _MAX_ITER,
) -> Tensor:
    """Minimise the mean cross-entropy + ``penalty / 2`` x squared norm of the weights by L-BFGS.

    Args:
        features: (N, D).
        labels: (N,) int64 in [0, ``classes``).
        classes: number of classes C.
        penalty: strength of the L2 penalty; biases are not penalised.
        start: initial weights; None: zeros.
        max_iter: maximum number of L-BFGS iterations.

    Returns:
        Weights and, in the last column, biases (C, D + 1).
    """
    if start is None:
        start = features.new_zeros(classes, features.shape[1] + 1)
    weights = start.clone().requires_grad_()
    tolerance, smallest_change = (1e-5, 1e-9) if weights.dtype == torch.float32 else (1e-9, 1e-16)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=smallest_change,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_logits(weights, features), labels)
        value = value + penalty / 2 * weights[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def predict(weights: Tensor, features: Tensor) -> Tensor:
    """The classes (N,) of vectors (N, D) by the weights of :func:`fit_logistic`."""
    return _logits(weights, features).argmax(1)


def _logits(weights: Tensor, features: Tensor) -> Tensor:
    return F.linear(features, weights[:, :-1], weights[:, -1])
