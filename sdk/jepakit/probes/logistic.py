"""Multinomial logistic regression by L-BFGS in plain numpy (the light client has no scikit-learn)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jepakit._vectors import AT_A_TIME, blocks

Floats = NDArray[np.float64]

_MEMORY, _MAX_STEPS, _TOLERANCE = 10, 500, 1e-6


def fit_logistic(
    vectors: Floats,
    targets: NDArray[np.intp],
    C: float,
    *,
    importance: Floats,
    start: Floats | None = None,
    n_classes: int | None = None,
) -> Floats:
    """Minimise C · Σ importance · cross-entropy + ½‖W‖², scikit-learn's objective; the bias is not penalised.

    vectors [N, D], targets [N] in 0 … K-1, importance [N]; returns weights [D + 1, K], the bias in the
    last row.
    """
    n, dim = vectors.shape
    classes = n_classes or int(targets.max()) + 1
    counted = importance / n
    # For two classes scikit-learn penalises one vector w; our two columns ±w/2 hold half of its square.
    penalty = (2 if classes == 2 else 1) / (C * n)

    def loss_and_gradient(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(dim + 1, classes)
        loss = float(penalty / 2 * np.square(weights[:-1]).sum())
        gradient = penalty * weights
        gradient[-1] = 0
        for rows in blocks(n, AT_A_TIME):
            loss += _add_rows(weights, gradient, vectors[rows], targets[rows], counted[rows])
        return loss, gradient.ravel()

    first = np.zeros((dim + 1) * classes) if start is None else start.ravel().copy()
    return _lbfgs(loss_and_gradient, first).reshape(dim + 1, classes)


def _add_rows(weights: Floats, gradient: Floats, vectors: Floats, targets: NDArray[np.intp], counted: Floats) -> float:
    """The cross-entropy of some vectors, each weighed by `counted`; its gradient is added to `gradient`."""
    own = (np.arange(len(targets)), targets)
    logits = vectors @ weights[:-1]  # the only array of rows × K numbers
    logits += weights[-1]
    logits -= logits.max(axis=1, keepdims=True)
    of_own = logits[own]
    exps = np.exp(logits, out=logits)
    sums = exps.sum(axis=1)
    residual = np.multiply(exps, (counted / sums)[:, None], out=exps)
    residual[own] -= counted
    gradient[:-1] += vectors.T @ residual
    gradient[-1] += residual.sum(axis=0)
    return float((counted * (np.log(sums) - of_own)).sum())


def cross_entropy(logits: Floats, targets: NDArray[np.intp]) -> Floats:
    """−log of the probability that logits [N, K] give each vector's own class, [N]."""
    below = logits - logits.max(axis=1, keepdims=True)
    result: Floats = np.log(np.exp(below).sum(axis=1)) - below[np.arange(len(targets)), targets]
    return result


def softmax(logits: Floats) -> Floats:
    """Row-wise softmax, [N, K]."""
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = exps / exps.sum(axis=1, keepdims=True)
    return result


def _lbfgs(function: Callable[[Floats], tuple[float, Floats]], x: Floats) -> Floats:
    """Minimise a smooth convex function (Nocedal & Wright, algorithm 7.5, with a backtracking line search)."""
    history: deque[tuple[Floats, Floats, float]] = deque(maxlen=_MEMORY)
    loss, gradient = function(x)
    for _ in range(_MAX_STEPS):
        if np.abs(gradient).max() < _TOLERANCE:
            break
        direction = -_inverse_hessian_times(gradient, history)
        slope = float(gradient @ direction)
        step = 1.0 if history else min(1.0, 1 / float(np.abs(gradient).sum()))
        for _ in range(30):
            new_x = x + step * direction
            new_loss, new_gradient = function(new_x)
            if new_loss <= loss + 1e-4 * step * slope:
                break
            step /= 2
        else:
            break  # no descent left at this precision: converged
        s, y = new_x - x, new_gradient - gradient
        if (curvature := float(s @ y)) > 1e-12 * float(y @ y):
            history.append((s, y, 1 / curvature))
        x, loss, gradient = new_x, new_loss, new_gradient
    return x


def _inverse_hessian_times(gradient: Floats, history: deque[tuple[Floats, Floats, float]]) -> Floats:
    """The two-loop recursion."""
    q = gradient.copy()
    alphas = []
    for s, y, rho in reversed(history):
        alpha = rho * float(s @ q)
        alphas.append(alpha)
        q -= alpha * y
    if history:
        s, y, rho = history[-1]
        q *= 1 / (rho * float(y @ y))
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q += (alpha - rho * float(y @ q)) * s
    return q
