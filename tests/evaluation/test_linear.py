"""The linear classifier against a slow restatement with SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.linear import PENALTIES, fit_logistic, linear_classify, predict


def clouds(n, seed, classes=4, dim=6, spread=1.6):
    """Overlapping clouds; one feature is constant, another has a large scale."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centers = np.random.default_rng(0).normal(size=(classes, dim))
    features = centers[labels] + spread * rng.normal(size=(n, dim))
    features[:, 1] = 100 * features[:, 1] + 7
    return np.hstack([features, np.full((n, 1), 3.0)]), labels


def slow_objective(flat, features, labels, classes, penalty):
    """One vector after the other."""
    weights = flat.reshape(classes, -1)
    total = 0.0
    for x, label in zip(features, labels, strict=True):
        logits = [float(w[:-1] @ x + w[-1]) for w in weights]
        total += float(logsumexp(logits)) - logits[label]
    return total / len(features) + penalty / 2 * float((weights[:, :-1] ** 2).sum())


def slow_fit(features, labels, classes, penalty):
    def objective(flat):
        weights = flat.reshape(classes, -1)
        logits = features @ weights[:, :-1].T + weights[:, -1]
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        value = -log_p[np.arange(len(labels)), labels].mean()
        error = (np.exp(log_p) - np.eye(classes)[labels]) / len(labels)
        gradient = np.hstack(
            [error.T @ features + penalty * weights[:, :-1], error.sum(0)[:, None]]
        )
        return value + penalty / 2 * (weights[:, :-1] ** 2).sum(), gradient.ravel()

    start = np.zeros(classes * (features.shape[1] + 1))
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    assert result.fun == pytest.approx(
        slow_objective(result.x, features, labels, classes, penalty), rel=1e-12
    )
    return result.x.reshape(classes, -1)


def slow_classify(features, labels, test, seed):
    """The penalty of the smallest loss on a fifth, then all vectors."""
    mean, std = features.mean(0), features.std(0)
    std[std == 0] = 1
    features, test = (features - mean) / std, (test - mean) / std
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).numpy()
    held_out, rest = np.split(order, [len(order) // 5])
    classes = sorted(set(labels))
    targets = np.array([classes.index(label) for label in labels])
    known = [i for i in held_out if targets[i] in targets[rest]]
    losses = {}
    for penalty in PENALTIES:
        w = slow_fit(features[rest], targets[rest], len(classes), penalty)
        losses[penalty] = slow_objective(
            w.ravel(), features[known], targets[known], len(classes), 0
        )
    best = min(PENALTIES, key=losses.get)
    w = slow_fit(features, targets, len(classes), best)
    return [classes[i] for i in (test @ w[:, :-1].T + w[:, -1]).argmax(1)], best


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_are_the_minimum(penalty, dtype):
    features, labels = clouds(80, 1)
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1)
    expected = slow_fit(features, labels, 4, penalty)
    x, y = torch.as_tensor(features, dtype=dtype), torch.as_tensor(labels)
    found = fit_logistic(x, y, 4, penalty, max_iter=1000)
    assert found.dtype == dtype and found.shape == (4, 8)
    found = found.numpy().astype(np.float64)
    # Adding the same number to all biases changes nothing.
    found[:, -1] -= found[:, -1].mean() - expected[:, -1].mean()
    close = 1e-5 if dtype == torch.float64 else 2e-2
    np.testing.assert_allclose(found, expected, rtol=close, atol=close)
    values = [slow_objective(w.ravel(), features, labels, 4, penalty) for w in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-9 if dtype == torch.float64 else 1e-5)
    # A start at the minimum stays there.
    again = fit_logistic(x, y, 4, penalty, start=torch.as_tensor(found, dtype=dtype))
    np.testing.assert_allclose(again.numpy(), found, rtol=close, atol=close)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_procedure(seed):
    (features, labels), (test, test_labels) = clouds(120, 1), clouds(90, 2)
    labels = 3 * labels + 1  # classes 1, 4, 7, 10: others occur in no training vector
    order = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    labels[order[0]] = 2  # a class of which the held-out fifth has the only vector
    tensors = [torch.as_tensor(a) for a in (features, labels, test)]
    expected, penalty = slow_classify(features, labels, test, seed)
    found, chosen = linear_classify(*tensors, seed=seed)
    assert chosen == penalty
    assert found.tolist() == expected
    accuracy = np.mean(np.array(expected) == 3 * test_labels + 1)
    assert 0.4 < accuracy < 0.9  # neither chance nor trivial


def test_is_deterministic_and_leaves_random_numbers_and_gradients_alone():
    (features, labels), (test, _) = clouds(100, 3), clouds(40, 4)
    tensors = [torch.as_tensor(a, dtype=torch.float32) for a in (features, test)]
    y = torch.as_tensor(labels)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, _ = linear_classify(tensors[0], y, tensors[1], seed=7)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    second, _ = linear_classify(tensors[0], y, tensors[1], seed=7)
    assert torch.equal(first, second)


def test_the_scale_of_a_feature_does_not_matter():
    (features, labels), (test, _) = clouds(100, 3), clouds(40, 4)
    y = torch.as_tensor(labels)
    factor = torch.tensor([1.0, 1e-3, 50.0, 1.0, 2.0, 0.1, 9.0], dtype=torch.float64)
    x, z = torch.as_tensor(features), torch.as_tensor(test)
    plain, penalty = linear_classify(x, y, z)
    scaled, same = linear_classify(5 + factor * x, y, 5 + factor * z)
    assert torch.equal(plain, scaled) and penalty == same


def test_few_vectors():
    one = torch.ones(1, 3), torch.tensor([5])
    predicted, _ = linear_classify(*one, torch.randn(4, 3))
    assert predicted.tolist() == [5] * 4
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])  # the held-out fifth is empty
    predicted, penalty = linear_classify(x, torch.tensor([0, 2, 0]), 9 * x)
    assert (predicted.tolist(), penalty) == ([0, 2, 0], 1.0)
    # A constant whose deviation is rounding noise must not be blown up to unit variance.
    noisy = torch.cat([x, torch.tensor([[0.3], [0.3], [0.30000004]])], dim=1)
    moved = torch.cat([9 * x, torch.full((3, 1), 0.3001)], dim=1)
    assert linear_classify(noisy, torch.tensor([0, 2, 0]), moved)[0].tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match="undefined"):
        linear_classify(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), x)


def test_predict_takes_the_largest_logit():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    assert predict(weights, torch.tensor([[1.0, 0.4], [1.0, 0.6]])).tolist() == [0, 1]


def test_accuracy_over_vectors_and_over_classes():
    labels = torch.tensor([0, 0, 0, 0, 3, 3, 5])
    predicted = torch.tensor([0, 0, 0, 5, 3, 0, 1])
    top1, per_class = accuracy_of(predicted, labels)
    assert top1 == 4 / 7
    assert per_class == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
