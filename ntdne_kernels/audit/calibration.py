"""How probably each label is wrong, where people decided on some of them: the posterior of a small model of the noise.

    P(true class c | given label g, features) ∝ q_c^β · T_cg         q: the shares of an audit

T, the probability of label g in class c, is estimated by expectation-maximisation from all images; of checked ones the
true class is known. Shares know nothing of how often which class is mistaken for which, and come from two sources that
are neither one nor independent: β, their weight, is the one under which the checked labels are most likely right or
wrong as people found them. Both hold given the features, so that it does not matter which images were checked.

The wrong labels of a class spread over the other classes by a Dirichlet prior whose concentration α is the most likely
one: large where all confusions are as frequent (uniform noise), small where a few are. A class's noise rate is drawn to
the common one. (Dawid and Skene, Applied Statistics 1979, with one annotator, whose confusions have a prior.)

Shapes: N images, C classes, m classes with shares, K = m + 1 candidates, P pairs of a true class and a label.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.audit.confident_learning import Confusions, sum_by_class

WEIGHTS = tuple(2 ** (k / 4) for k in range(-4, 7))  # β
LIKELY_WEIGHT, WEIGHT_DEVIATION = math.sqrt(2), 0.5  # between 1, of one source, and 2, of two; of log β
CONCENTRATIONS = tuple(10 ** (k / 2) for k in range(9))  # α
FIRST_RATE = 0.1
RATE_IMAGES = 20  # images whose worth the common noise rate has in a class's own
MAX_LOG_ODDS = 30.0
STEPS = 8  # of expectation-maximisation for a β, begun where the last β ended


class Calibration(NamedTuple):
    """The posterior of the true classes. Made by `calibrate`."""

    log_odds: Tensor
    """(N,) float64: log odds that the label is wrong; ±inf of checked images, NaN where nothing is known."""
    confusions: Confusions
    """Expected number of images with each pair of label and true class."""
    weight: float
    """β."""
    concentration: float
    """α."""


def calibrate(
    given: Tensor, decided: Tensor, checked: Tensor, top_classes: Tensor, log_shares: Tensor, own_log_share: Tensor
) -> Calibration:
    """Fit the model to the labels of an audit and what people decided on some of them.

    Args:
        given: (N,) codes of the labels, −1 for unlabelled.
        decided: (N,) codes of the right ones where checked; −1 for images that were excluded, which take no part.
        checked: (N,) bool.
        top_classes: (N, m) the classes with the largest shares.
        log_shares: (N, m) log of their shares.
        own_log_share: (N,) log share of the given label; NaN where not judged.
    """
    C = int(max(given.max(), decided.max(), top_classes.max())) + 1
    judged, known = ~own_log_share.isnan(), checked & (given != UNLABELLED) & (decided != UNLABELLED)
    part = (judged & (known | ~checked)).nonzero().squeeze(1)
    label, of_part = given[part], known[part]
    # The label is the first candidate, and among the others without a share.
    values = torch.cat([own_log_share[part].unsqueeze(1), log_shares[part]], dim=1).double()
    values[:, 1:].masked_fill_(top_classes[part] == label.unsqueeze(1), -torch.inf)
    classes = torch.cat([label.unsqueeze(1), top_classes[part]], dim=1)
    keys = torch.cat([(label.unsqueeze(1) * C + classes).flatten(), given[known] * C + decided[known]])
    pairs, position = torch.unique(keys, return_inverse=True)
    found = _Pairs(pairs // C, pairs % C, position[: classes.numel()].view_as(classes), position[classes.numel() :], C)
    unknown, wrong = ~of_part, (given != decided)[part[of_part]]
    transition = torch.where(found.given == found.true, 1 - FIRST_RATE, FIRST_RATE / max(C - 1, 1)).double()
    best, highest = LIKELY_WEIGHT, -math.inf
    for weight in WEIGHTS:
        _, transition, _ = _maximise(found, values[unknown], found.pair[unknown], transition, weight)
        # Bounded: where only the label's own share was kept the odds are 0, and one such error would forbid every β.
        odds = _log_odds(values[of_part], found.pair[of_part], transition, weight).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
        likelihood = float(torch.nn.functional.logsigmoid(torch.where(wrong, odds, -odds)).sum())
        likelihood -= (math.log(weight / LIKELY_WEIGHT) / WEIGHT_DEVIATION) ** 2 / 2
        if likelihood > highest:
            best, highest = weight, likelihood
    counts, transition, concentration = _maximise(found, values[unknown], found.pair[unknown], transition, best)
    log_odds = torch.full(given.shape, torch.nan, dtype=torch.float64, device="cpu")
    log_odds[part] = _log_odds(values, found.pair, transition, best)
    log_odds[known] = torch.where((given != decided)[known], torch.inf, -torch.inf).double()
    return Calibration(log_odds, Confusions(found.given, found.true, counts), best, concentration)


class _Pairs(NamedTuple):
    """The P pairs of a label and a class that its image might be, or is known to be, of."""

    given: Tensor
    """(P,)"""
    true: Tensor
    """(P,)"""
    pair: Tensor
    """(n, K) the pair of each candidate of the n images."""
    known: Tensor
    """(k,) the pair of each image whose true class is known."""
    C: int


def _maximise(
    found: _Pairs, log_shares: Tensor, pair: Tensor, transition: Tensor, weight: float
) -> tuple[Tensor, Tensor, float]:
    """Expected counts (P,), the transition probabilities (P,) they give, and α, after a few steps.

    Args:
        found: all pairs.
        log_shares: (n, K) of the candidates of images whose true class is not known.
        pair: (n, K) their pairs.
        transition: (P,) to begin with.
        weight: β.
    """
    P = len(found.true)
    of_known = torch.bincount(found.known, minlength=P).double()
    counts, concentration = of_known, CONCENTRATIONS[0]
    for _ in range(STEPS):
        posterior = torch.softmax(weight * log_shares + transition.log()[pair], dim=1)
        counts = of_known + sum_by_class(posterior.flatten(), pair.flatten(), P)
        transition, concentration = _smooth(found, counts)
    return counts, transition, concentration


def _smooth(found: _Pairs, counts: Tensor) -> tuple[Tensor, float]:
    """Transition probabilities (P,) by expected counts (P,) and the priors, with the most likely α."""
    right, others = found.given == found.true, max(found.C - 1, 1)
    of_class, wrong = (sum_by_class(each, found.true, found.C) for each in (counts, counts.where(~right, 0)))
    common = wrong.sum() / of_class.sum()
    rate = ((wrong + RATE_IMAGES * common) / (of_class + RATE_IMAGES))[found.true]

    def likelihood(alpha: float) -> float:
        each, whole = torch.tensor(alpha / others).double(), torch.tensor(alpha).double()
        spread = (torch.lgamma(counts[~right] + each) - torch.lgamma(each)).sum()
        return float(spread + (torch.lgamma(whole) - torch.lgamma(wrong + whole)).sum())

    alpha = max(CONCENTRATIONS, key=likelihood)
    wrong_way = rate * (counts + alpha / others) / (wrong[found.true] + alpha)
    # Above 0, so that no class is ruled out where not a single label is thought to be wrong.
    return torch.where(right, 1 - rate, wrong_way).clamp(min=torch.finfo(torch.float32).tiny), alpha


def _log_odds(log_shares: Tensor, pair: Tensor, transition: Tensor, weight: float) -> Tensor:
    """(n,) log odds that labels are wrong."""
    posterior = weight * log_shares + transition.log()[pair]
    return posterior[:, 1:].logsumexp(dim=1) - posterior[:, 0]
