"""The paper's formulas as plain Python loops over floats: slower and more obvious than anything under test.

Shapes: B queries, N bank rows, D features.
"""

import math

from torch import Tensor


def leave_one_out(
    features: Tensor, bank: Tensor, labels: Tensor, bank_labels: Tensor, index: Tensor | None, sigma: float
) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """log p_i, p_ij and p̃_ij (eq. 2-4, 6); −inf and zeros for a query without positives."""
    f, g = features.double().tolist(), bank.double().tolist()
    own = [-1] * len(f) if index is None else index.tolist()
    log_p, p, p_same = [], [], []
    for i, query in enumerate(f):
        logits = [
            -math.inf if j == own[i] else math.fsum(a * b for a, b in zip(query, row, strict=True)) / sigma
            for j, row in enumerate(g)
        ]
        same = [int(labels[i]) >= 0 and int(labels[i]) == int(bank_labels[j]) and j != own[i] for j in range(len(g))]
        highest = max([x for x in logits if x > -math.inf], default=0.0)
        highest_same = max([x for x, s in zip(logits, same, strict=True) if s], default=0.0)
        total = math.fsum(math.exp(x - highest) for x in logits)
        total_same = math.fsum(math.exp(x - highest_same) for x, s in zip(logits, same, strict=True) if s)
        log_p.append(math.log(total_same) + highest_same - math.log(total) - highest if total_same else -math.inf)
        p.append([math.exp(x - highest) / total if total else 0.0 for x in logits])
        p_same.append(
            [math.exp(x - highest_same) / total_same if s else 0.0 for x, s in zip(logits, same, strict=True)]
        )
    return log_p, p, p_same


def ntdne(log_p: float, q: float, k: float | None = None) -> float:
    """Eq. 9, and eq. 13 with k."""
    p = math.exp(log_p)
    return (1 - (k if k is not None and p <= k else p) ** q) / q


def log_p_gradients(
    features: Tensor, bank: Tensor, p: list[list[float]], p_same: list[list[float]], upstream: list[float], sigma: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Gradients of Σ_i upstream_i·log p_i to the features (eq. 6) and to the bank (eq. 7), 0 without positives."""
    f, g = features.double().tolist(), bank.double().tolist()
    D = len(f[0])
    to_features = [[0.0] * D for _ in f]
    to_bank = [[0.0] * D for _ in g]
    for i, query in enumerate(f):
        if not any(p_same[i]):
            continue
        for j, row in enumerate(g):
            weight = upstream[i] * (p_same[i][j] - p[i][j]) / sigma
            for d in range(D):
                to_features[i][d] += weight * row[d]
                to_bank[j][d] += weight * query[d]
    return to_features, to_bank


def update_bank(bank: Tensor, features: Tensor, index: Tensor, momentum: float) -> list[list[float]]:
    """Eq. 15, one feature after the other, each result rounded to the bank's dtype."""
    rows = bank.clone()
    for feature, row in zip(features.double().tolist(), index.tolist(), strict=True):
        if row == -1:
            continue
        length = math.sqrt(math.fsum(x * x for x in feature))
        unit = [x / length for x in feature]
        blend = [momentum * a + (1 - momentum) * b for a, b in zip(rows[row].double().tolist(), unit, strict=True)]
        norm = math.sqrt(math.fsum(x * x for x in blend))
        rows[row] = rows.new_tensor(unit if norm < 1e-12 else [x / norm for x in blend])
    return rows.double().tolist()
