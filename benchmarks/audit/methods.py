"""What the label audit, cleanlab and a K-NN vote say of the given labels, as one kind of verdict.

Every method gets the same features and labels. Those that ask neighbours compare directions, so that the rows' lengths
are nothing to them; for a logistic regression they matter.

Shapes: N images, D features, C classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from cleanlab.count import compute_confident_joint
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor
from torch.nn.functional import normalize

from ntdne_kernels import audit

K = 0.3  # the paper's threshold


class Verdict(NamedTuple):
    """What a method says of the given labels (N,)."""

    quality: Tensor
    """(N,): the lowest are the most suspect, and equal ones in the order of the images."""
    suspects: dict[str, Tensor]
    """(N,) bool for each way to choose them."""
    noise_rate: float
    """The estimated share of wrong labels."""


def ours(features: Tensor, labels: Tensor, **options: Any) -> Verdict:
    """The audit of this package, with these options of `audit_labels`."""
    found = audit.audit_labels(features, labels, **options)
    suspects = {method: found.suspects(method) for method in audit.METHODS}
    return Verdict(found.quality, suspects | {f"k={K}": found.suspects(K)}, found.noise_rate)


def ridge(features: Tensor, labels: Tensor) -> Verdict:
    """The leave-one-out ridge regression alone, judged as cleanlab judges a classifier."""
    bank = audit.feature_bank(features, labels)
    log_shares = audit.fit_ridge(bank).log_shares(bank, bank.positions(torch.arange(len(labels)))).double()
    own = labels.unsqueeze(1)
    ratio = log_shares.gather(1, own) - log_shares.scatter(1, own, -torch.inf).amax(dim=1, keepdim=True)
    return cleanlab(labels, log_shares.exp().numpy())._replace(quality=ratio.squeeze(1))


def vote(features: Tensor, labels: Tensor) -> Verdict:
    """The share of the 20 nearest that has the image's label, ties by similarity; suspects are those outvoted."""
    votes, similarity = neighbour_votes(features, labels, 20)
    own = labels.unsqueeze(1)
    share = votes.gather(1, own).squeeze(1)
    suspects = votes.argmax(dim=1) != labels
    return Verdict(share + 1e-3 * similarity, {"majority": suspects}, float(suspects.float().mean()))


def cleanlab_knn(features: Tensor, labels: Tensor) -> Verdict:
    """As cleanlab.Datalab without pred_probs does: class frequencies of the 10 nearest other images."""
    return cleanlab(labels, neighbour_votes(features, labels, 10)[0].double().numpy())


def cleanlab_classifier(features: Tensor, labels: Tensor) -> Verdict:
    """As in cleanlab's tutorials on embeddings: a logistic regression, cross-validated in five parts."""
    parts = StratifiedKFold(5, shuffle=True, random_state=0)
    classifier = LogisticRegression(max_iter=1000)
    shares = cross_val_predict(classifier, features.numpy(), labels.numpy(), cv=parts, method="predict_proba")
    return cleanlab(labels, shares)


def neighbour_votes(features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, C) class frequencies among each image's k nearest others, and (N,) the similarity of those with its label."""
    bank = audit.feature_bank(features, labels)
    nearest, similarity = audit.nearest_neighbours(bank, torch.arange(len(labels)), k)
    votes = torch.zeros(len(labels), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], torch.full_like(similarity, 1 / k))
    return votes, (similarity * (labels[nearest] == labels.unsqueeze(1))).mean(dim=1)


def cleanlab(labels: Tensor, shares: "np.ndarray[Any, Any]") -> Verdict:
    """From class probabilities (N, C), with cleanlab's defaults."""
    given = labels.numpy()
    joint = compute_confident_joint(given, shares)
    issues = find_label_issues(given, shares)
    quality = torch.from_numpy(np.array(get_label_quality_scores(given, shares)))
    return Verdict(quality, {"find_label_issues": torch.from_numpy(issues)}, 1 - joint.trace() / joint.sum())


METHODS: dict[str, Callable[[Tensor, Tensor], Verdict]] = {
    "ours": ours,
    "cleanlab, classifier": cleanlab_classifier,
    "cleanlab, classifier on unit rows": lambda features, labels: cleanlab_classifier(normalize(features), labels),
    "ours, ridge alone": ridge,
    "ours, neighbours alone": partial(ours, ridge=False),
    "ours, neighbours, sigma 0.1": partial(ours, sigma=0.1, ridge=False),
    "cleanlab, K-NN": cleanlab_knn,
    "K-NN vote": vote,
}
