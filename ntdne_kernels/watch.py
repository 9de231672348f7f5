"""Mistakes of a training that show in its batches and its scores, each warned of once.

Values on a GPU are looked at in a few of the first batches. They are copied to the host without waiting for them, and
reported in the first later step that finds them there.

Shapes: B images of a batch, N images of the archive, n of them kept here, C classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.user_warning import warn_user

STEPS = 50  # that are searched for labels in place of the index
NEARLY_ALL = 0.9  # share of the images: that more of them are pruned is warned of
MANY = 0.5  # the same, where they also become more
CHANCE = 1e-6  # at which images drawn from the archive may all have the number of a class as their index, unsuspected


class Watch:
    """What was seen of one criterion's training so far; not for a compiled one."""

    def __init__(self) -> None:
        self._steps = 0
        self._class_numbers = 0  # indices so far, as long as each is the number of a class
        self._repeated = 0  # those of them that were in their batch before
        self._compared = 0
        self._with_labels_alone = 0
        self._updated = False
        self._pruned: tuple[int, float] | None = None  # the last epoch looked at, and its share of pruned images
        self._warned: set[str] = set()
        self._pending: list[tuple[torch.cuda.Event, Callable[[], None]]] = []

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        return Watch, ()  # a copy of the criterion is watched from the start

    def updated(self) -> None:
        """Note that the bank was updated."""
        self._updated = True

    def trained(self, B: int, index: Tensor | None, memory: MemoryBank) -> None:
        """Note that a batch of B images was trained on: those of the index (B,), int64, or without an index."""
        if index is None:
            self._with_labels_alone += B
            if self._updated and self._with_labels_alone >= len(memory):
                self._warn_once(
                    "labels alone",
                    f"{self._with_labels_alone} images were trained on with labels alone while the bank was updated: "
                    "each counts its own row as a neighbour; call criterion(features, index)",
                )
            return
        self._with_labels_alone, self._updated = 0, False
        self._steps += 1
        if self._steps <= STEPS and self._may_look(self._steps, index.device):
            self._look_for_labels(index, memory)

    def compare(self, given: Tensor, index: Tensor, stored: Callable[[], Tensor]) -> None:
        """Compare labels (B,) that were given beside the index (B,) with those of the archive (B,); −1 means none."""
        self._compared += 1
        if "labels differ" in self._warned or not self._may_look(self._compared, index.device):
            return
        both = (index >= 0) & (given != UNLABELLED)
        self._report(self._warn_of_differing, torch.stack([(both & (given != stored())).sum(), both.sum()]))

    def pruned(self, epoch: int, pruned: Tensor, log_p: Tensor, k: float | str | None) -> None:
        """Note which images (n,) are pruned in an epoch by their last scores log p (n,), NaN for none. Synchronises."""
        if "nearly all pruned" in self._warned:
            return
        scored, count = int((~log_p.isnan()).sum()), int(pruned.sum())
        if scored == 0:
            return
        share, before = count / scored, self._pruned
        self._pruned = epoch, share
        nearly_all = share > NEARLY_ALL
        grows = before is not None and epoch > before[0] and share > max(MANY, before[1])
        if not nearly_all and not grows:
            return
        if isinstance(k, str):
            threshold, advice = "chance", "are the labels those of these images, and does the encoder learn?"
        else:
            threshold, advice = f"k = {k}", 'try k="auto", a lower k or more warmup_epochs'
        found = (
            f"{count} of the {scored} images scored so far have a score of at most {threshold} and stop training the "
            f"encoder (the median score is {float(log_p.nanmedian().exp()):.2g})"
        )
        if nearly_all:
            self._warn_once("nearly all pruned", f"{found}; {advice}")
        elif before is not None:
            growth = f"{share:.0%} now and {before[1]:.0%} in epoch {before[0]}"
            self._warn_once("more pruned", f"{found}, {growth}; unless so many labels are wrong: {advice}")

    def labels_as_index(self, found: str) -> None:
        """Warn that labels are given in place of the index, by what was found."""
        self._warn_once(
            "labels as index",
            f"{found}; is `index` the position of each image in the archive (IndexedDataset), and not its label?",
        )

    def _look_for_labels(self, index: Tensor, memory: MemoryBank) -> None:
        """Labels in place of the index are all numbers of classes, and repeat in a batch."""
        N, C = len(memory), len(memory.classes)
        if C in (0, N):
            return
        ordered = index.sort().values
        place = torch.searchsorted(memory.classes, ordered).clamp(max=C - 1)
        inside, are_classes = ordered >= 0, memory.classes[place] == ordered
        repeats = (ordered[1:] == ordered[:-1]) & inside[1:]
        counts = torch.stack([inside.sum(), (inside & are_classes).sum(), repeats.sum()])
        self._report(self._note_class_numbers, counts, math.log(N / C))

    def _note_class_numbers(self, indices: int, class_numbers: int, repeated: int, surprise: float) -> None:
        """Add the counts of a batch to those before.

        The surprise is −log of the chance that the index of an image drawn from the archive is the number of a class.
        """
        if class_numbers < indices:
            self._steps = STEPS  # at least one is no label: look no further
            return
        self._class_numbers += indices
        self._repeated += repeated
        if self._repeated and self._class_numbers * surprise > -math.log(CHANCE):
            self.labels_as_index(
                f"all of the {self._class_numbers} indices looked at are numbers of classes, and {self._repeated} "
                "stand in their batch before"
            )

    def _warn_of_differing(self, differing: int, both: int) -> None:
        if differing:
            self._warn_once(
                "labels differ",
                f"labels: {differing} of the {both} given beside an index differ from the archive's, which are used. "
                "Mostly the criterion was given labels in another order, or those of a whole set of which this is a "
                "part; IndexedDataset(dataset).labels are those of what it holds. Ignore this where they differ on "
                "purpose",
            )

    def _may_look(self, batch: int, device: torch.device) -> bool:
        """Whether to look at the values of this batch: on a GPU at the 1st, 2nd, 4th, ..., never during capture."""
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return False
            self._report_arrived()
            return batch <= STEPS and batch & (batch - 1) == 0
        return device.type == "cpu"

    def _report(self, report: Callable[..., None], counts: Tensor, *known: float) -> None:
        """Call `report` with the counts and what is known already; for counts on a GPU in a later step."""
        if counts.device.type == "cpu":
            report(*counts.tolist(), *known)
            return
        arriving = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
        arriving.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, lambda: report(*arriving.tolist(), *known)))

    def _report_arrived(self) -> None:
        """Report the counts that have reached the host since."""
        while self._pending and self._pending[0][0].query():
            self._pending.pop(0)[1]()

    def _warn_once(self, mistake: str, message: str) -> None:
        if mistake not in self._warned:
            self._warned.add(mistake)
            warn_user(message)
