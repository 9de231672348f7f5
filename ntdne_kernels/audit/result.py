"""The result of an audit: what the other images of an archive say of each one's label.

Shapes: N images, C classes, m classes kept of each image's neighbours, n sampled images, K nearest neighbours of each.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ntdne_kernels.arguments import UNLABELLED, check_choice, check_number
from ntdne_kernels.audit.calibration import Calibration, calibrate
from ntdne_kernels.audit.confident_learning import Confusions, confident_joint, find_confident_classes
from ntdne_kernels.audit.doubt import Evidence, doubt_of, weigh_evidence
from ntdne_kernels.user_warning import warn_user

METHODS = ("rate", "otsu", "auto")
MIN_CHECKED = 100  # decisions before they order the others, see `python -m benchmarks.audit review`
MIN_EITHER = 10  # right ones and wrong ones among them before they say how many are wrong
MAX_DENSE_CLASSES = 10_000  # of (C, C) matrices: 800 MB


@dataclass(frozen=True, eq=False, repr=False)
class LabelAudit:
    """What the other images say of each image's label; tensors on the CPU, by image.

    Example:
        >>> from ntdne_kernels.audit import audit_labels
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> audit = audit_labels(features, ["ash", "ash", "ash", "oak", "oak", "oak", "oak"])
        >>> audit.quality.round(decimals=2)
        tensor([0.8100, 0.7300, 0.6100, 0.0100, 1.0000, 1.0000, 1.0000])
        >>> audit.suspects().nonzero().squeeze(1)
        tensor([3])
        >>> [audit.classes[code] for code in audit.corrected()]
        ['ash', 'ash', 'ash', 'ash', 'oak', 'oak', 'oak']
        >>> audit.doubt
        'most images have fewer than 4 others of their label, too few to judge the features by'

    Attributes:
        classes: the C classes, names or integers, in order of code.
        labels: (N,) code of each image's label as it was given, before any decision; −1 for unlabelled.
        decided: (N,) code of the label as it is now known: `labels` but where a person has checked and changed it; −1
            for unlabelled and excluded images.
        checked: (N,) bool, whether a person has checked the label.
        unsure: (N,) bool, whether a person could not tell.
        sigma: temperature of the neighbourhood.
        ridge: whether shares are those of the neighbours and the ridge regression combined, or of the neighbours alone.
        log_score: (N,) log p of the neighbours alone (eq. 4); −inf where no other image has the label, NaN for
            unlabelled.
        log_ratio: (N,) log of the share of the image's label over the largest share of another class; NaN where not
            `judged`.
        top_classes: (N, m) codes of the classes with the largest shares, the largest first.
        top_shares: (N, m) float64: their shares. Those of all classes add up to 1; of the neighbours alone, to 1 less
            the share of unlabelled ones.
        log_density: (N,) log of the mean of exp(f_i·f_j/σ) over the other images. Images with the lowest are like
            nothing else in the archive: broken, or of a class that is not there. The audit says little of their labels.
        duplicate_of: (N,) the first image whose features, normalised in the audit's dtype, are the same to the bit; −1
            for none, and for that first one.
        copy_group: (N,) the first image of the image's group of exact copies, and of near ones where they were asked
            for; −1 where it is alone.
        sample: (n,) labelled images whose nearest neighbours were looked up.
        neighbour_labels: (n, K) codes of the labels of their K nearest neighbours. K is 0 where classes are so small
            that the neighbours say nothing.
    """

    classes: tuple[Any, ...]
    labels: Tensor
    decided: Tensor
    checked: Tensor
    unsure: Tensor
    sigma: float
    ridge: bool
    log_score: Tensor
    log_ratio: Tensor
    top_classes: Tensor
    top_shares: Tensor
    log_density: Tensor
    duplicate_of: Tensor
    copy_group: Tensor
    sample: Tensor
    neighbour_labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        judged = int(self.judged.sum())
        return (
            f"LabelAudit({len(self)} images, {len(self.classes)} classes, {judged} labels judged, sigma={self.sigma})"
        )

    @property
    def score(self) -> Tensor:
        """(N,) p: the share of the neighbourhood that carries the image's label (eq. 4)."""
        return self.log_score.exp()

    @property
    def suggested(self) -> Tensor:
        """(N,) code of the class with the largest share; −1 where there is no class at all."""
        return self.top_classes[:, 0] if self.classes else torch.full_like(self.labels, UNLABELLED)

    @property
    def suggested_share(self) -> Tensor:
        """(N,) that share."""
        return self.top_shares[:, 0] if self.classes else torch.zeros(len(self), device="cpu")

    @cached_property
    def judged(self) -> Tensor:
        """(N,) bool: labelled, and with another image of the label. Nothing can be said of the others' labels."""
        return self.log_score > -torch.inf

    @cached_property
    def conflicting(self) -> Tensor:
        """(N,) bool: an exact copy of the image carries another label, as decided, so one of the two is wrong."""
        group = torch.where(self.duplicate_of < 0, torch.arange(len(self), device="cpu"), self.duplicate_of)
        labelled = self.decided != UNLABELLED
        lowest = torch.full_like(group, len(self.classes)).scatter_reduce_(
            0, group[labelled], self.decided[labelled], "amin"
        )
        highest = torch.full_like(group, UNLABELLED).scatter_reduce_(0, group, self.decided, "amax")
        return labelled & (lowest < highest)[group]

    @property
    def label_share(self) -> Tensor:
        """(N,) float64: the share of the image's own label, beside `top_shares`; NaN where not `judged`."""
        return self.suggested_share * self.log_ratio.double().clamp(max=0).exp()

    @cached_property
    def quality(self) -> Tensor:
        """(N,) the label's share against the largest of another class, a/(a + b), in [0, 1].

        0: nothing speaks for the label; below 1/2: more speaks for another class; 1: nothing speaks for another. NaN
        where not `judged`.
        """
        return self.log_ratio.sigmoid()

    @cached_property
    def ranking(self) -> Tensor:
        """(N,) images in the order to look at them: the most suspect label first.

        By quality; with 100 decisions by how probably the label is wrong, `wrong_probability`. Then come those not
        judged, those of which a person could not tell, in the same order, and at the end the checked ones.
        """
        if self._calibration is None:
            order = self.log_ratio.nan_to_num(nan=torch.inf).argsort(stable=True)
        else:
            order = self._calibration.log_odds.nan_to_num(nan=-torch.inf).argsort(stable=True, descending=True)
        last = self.unsure.to(torch.uint8).masked_fill(self.checked, 2)
        return order[last[order].argsort(stable=True)] if last.any() else order

    @cached_property
    def wrong_probability(self) -> Tensor:
        """(N,) float64: how probably the label is wrong, 0 or 1 where checked; NaN where nothing says so.

        See `audit.calibration`. NaN too while there are fewer than 100 decisions.
        """
        if self._calibration is None:
            return torch.full(self.labels.shape, torch.nan, dtype=torch.float64, device="cpu")
        return self._calibration.log_odds.sigmoid()

    @cached_property
    def uncalibrated(self) -> str:
        """Why decisions do not say how many labels are wrong; "" where they do, and `noise_rate` follows them."""
        checked = int(self._known.sum())
        if checked < MIN_CHECKED:
            return f"{checked} labels are checked, and {MIN_CHECKED} are needed"
        wrong = int(self.wrong[self._known].sum())
        for name, count in (("wrong", wrong), ("right", checked - wrong)):
            if count < MIN_EITHER:
                return f"{count} of the checked labels are {name}, and {MIN_EITHER} are needed"
        return ""

    @property
    def wrong(self) -> Tensor:
        """(N,) bool: a person has checked the label and given the image another one."""
        return self._known & (self.labels != self.decided)

    @property
    def _known(self) -> Tensor:
        """(N,) bool: images with a given label whose right one is known."""
        return self.checked & (self.labels != UNLABELLED) & (self.decided != UNLABELLED)

    @cached_property
    def _calibration(self) -> Calibration | None:
        if int(self._known.sum()) < MIN_CHECKED:
            return None
        log_shares = self.top_shares.log()
        # Where the label is not the suggested one its share is that much smaller, however small that is.
        own = log_shares[:, 0] + self.log_ratio.double().clamp(max=0)
        return calibrate(self.labels, self.decided, self.checked, self.top_classes, log_shares, own)

    @cached_property
    def confident_classes(self) -> Tensor:
        """(N,) the class that the image is confidently of; −1 for none and where not `judged`.

        Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): among the classes whose share is at least the mean
        share of the images with that label, the one with the largest share. An exception: where no class has a larger
        share than the image's own, it is the image's own. Without it the noise rate of archives with classes of unequal
        size comes out too high. Of a checked image it is the one that was decided.
        """
        if not self.judged.any():
            return torch.full_like(self.labels, UNLABELLED)
        found = find_confident_classes(self.labels, self.label_share, self.judged, self.top_classes, self.top_shares)
        return torch.where(self.checked & self.judged, self.decided, found)

    @cached_property
    def confusions(self) -> Confusions:
        """How many images of which class carry which label: the confident joint, calibrated to the judged labels.

        With enough decisions (`uncalibrated` is "") those expected by `wrong_probability`.
        """
        if self._calibration is not None and not self.uncalibrated:
            return self._calibration.confusions
        return confident_joint(self.labels, self.confident_classes, self._sizes)

    @cached_property
    def evidence(self) -> Evidence:
        """Whether nearest neighbours agree as they would if only wrong labels kept them from it.

        NaN where that cannot be told: a single class, or classes that are too small.
        """
        return weigh_evidence(self.labels, self.suggested[self.sample], self.neighbour_labels, self.confusions)

    @cached_property
    def doubt(self) -> str:
        """Why the features cannot say how many labels are wrong, by `evidence`; "" where they can.

        Where they cannot, the noise rate is nearly always too high and most of as many suspects have right labels; only
        the ranking may be of use. Decisions lift the doubt once people have found half of the labels that by these
        decisions are wrong: then what they saw says more than the features. Features that have learned wrong labels by
        heart cause no doubt, and their rate is too low.
        """
        if len(self.classes) < 2:
            return ""  # no label can be wrong
        if not self.uncalibrated and 2 * int(self.wrong.sum()) >= self.noise_rate * float(self.confusions.images.sum()):
            return ""
        return doubt_of(self.evidence, self.noise_rate, len(self.sample))

    @property
    def noise_rate(self) -> float:
        """Estimated share of wrong labels among the judged ones, as given; not to be believed where there is `doubt`.

        Far too high where the features hardly tell the classes apart.
        """
        given, true, images = self.confusions
        return float(images[given != true].sum() / images.sum()) if len(images) else 0.0

    @property
    def joint(self) -> Tensor:
        """(C, C) float64, estimated P(true class, given label): [true, given], with the sum 1.

        Raises:
            ValueError: too many classes; `confusions` has only the pairs that occur.
        """
        C = len(self.classes)
        if C > MAX_DENSE_CLASSES:
            raise ValueError(f"joint: expected at most {MAX_DENSE_CLASSES} classes, got {C}; use confusions")
        given, true, images = self.confusions
        joint = torch.zeros((C, C), dtype=torch.float64, device="cpu")
        joint[true, given] = images / images.sum()
        return joint

    @property
    def transition(self) -> Tensor:
        """(C, C) float64, estimated P(given label | true class): [true, given], each row with the sum 1.

        Row-stochastic, as in papers on label noise; cleanlab's noise_matrix is its transpose. A class that no image
        is thought to be of keeps its labels.

        Raises:
            ValueError: as `joint`.
        """
        joint = self.joint
        total = joint.sum(dim=1, keepdim=True)
        return torch.where(total > 0, joint / total, torch.eye(len(joint), dtype=joint.dtype, device="cpu"))

    def suspects(self, method: str | float = "rate") -> Tensor:
        """(N,) bool: labels that are probably wrong. No method needs right labels.

        Args:
            method: "rate": those of the lowest quality, as many as the estimated noise rate says, which where there is
                `doubt` is too many. With enough decisions those that are more probably wrong than right.
                "otsu": the lower of the two groups of qualities that differ most (Otsu, 1979): a mixture of two
                components of one width.
                "auto": p is below chance, the label's share of the other images, as in `NTDNELoss(k="auto")`.
                A number k in (0, 1): p ≤ k, the paper's pruning (eq. 13). Both look at the neighbours alone.
                "rate" and "otsu" pass over labels that are the suggested ones. No checked label is a suspect.

        Raises:
            TypeError: method is neither text nor a number.
            ValueError: method is none of these.
        """
        if not isinstance(method, str):
            check_number("method", method, 0, 1)
            return self.judged & ~self.checked & (self.score <= method)
        check_choice("method", method, METHODS)
        if method == "auto":
            others = nn.functional.pad(self._sizes - 1, (0, 1))[self.labels]  # the last is for −1
            chance = others / max(len(self) - 1, 1)
            return self.judged & ~self.checked & (self.score < chance)
        contested = self.judged & ~self.checked & (self.suggested != self.labels)
        if method == "otsu":
            return contested & (self.quality < otsu_threshold(self.quality[self.judged]))
        if not self.uncalibrated:
            return contested & (self.wrong_probability > 0.5)
        still_wrong = round(self.noise_rate * int(self.judged.sum())) - int(self.wrong.sum())
        worst = self.ranking[contested[self.ranking]][: max(still_wrong, 0)]
        return torch.zeros_like(contested).index_fill_(0, worst, True)

    def corrected(self, method: str | float = "rate") -> Tensor:
        """(N,) codes of labels, as decided and with the suggested class for suspects; `classes` tells what they are.

        Args:
            method: as in `suspects`.

        Raises:
            TypeError: as `suspects`.
            ValueError: as `suspects`.
        """
        return torch.where(self.suspects(method), self.suggested, self.decided)

    @property
    def witnesses(self) -> Tensor:
        """Deprecated name of `sample`."""
        warn_user("LabelAudit.witnesses: use sample", DeprecationWarning)
        return self.sample

    @property
    def votes(self) -> Tensor:
        """Deprecated name of `neighbour_labels`."""
        warn_user("LabelAudit.votes: use neighbour_labels", DeprecationWarning)
        return self.neighbour_labels

    @property
    def _sizes(self) -> Tensor:
        """(C,) judged images with each label, float64."""
        return torch.bincount(self.labels[self.judged], minlength=len(self.classes)).double()


def otsu_threshold(values: Tensor) -> float:
    """The cut of the values (n,) into two groups that explains most of their variance; the lower group is below it.

    Example:
        >>> otsu_threshold(torch.tensor([0.1, 0.2, 0.75, 0.875]))
        0.75
    """
    values = values.double().sort().values
    if len(values) < 2:
        return -math.inf
    lower = torch.arange(1, len(values), dtype=torch.float64, device="cpu")
    upper, sums = len(values) - lower, values.cumsum(0)
    between = lower * upper * (sums[:-1] / lower - (sums[-1] - sums[:-1]) / upper) ** 2
    return float(values[int(between.argmax()) + 1])
