"""Mistakes of a training loop that show in its batches, said once each.

Values on a GPU are looked at in a few of the first batches, and said when they have come, without waiting for them.

Shapes: B images of a batch, N images of the archive, C classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.user_warning import warn_user

STEPS = 50  # that are searched for labels in place of the index
CHANCE = 1e-6  # that positions drawn from the archive are all numbers of classes: less is taken for no accident


class Watch:
    """What was seen of one criterion's training so far; not for a compiled one."""

    def __init__(self) -> None:
        self._steps = 0
        self._numbers_of_classes = 0  # indices so far, as long as there is nothing else among them
        self._repeated = 0  # of these, those that stand in their batch before
        self._compared = 0
        self._with_labels_alone = 0
        self._updated = False
        self._said: set[str] = set()
        self._coming: list[tuple[torch.cuda.Event, Callable[[], None]]] = []

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        return Watch, ()  # a copy of the criterion is watched anew

    def updated(self) -> None:
        """The bank was updated."""
        self._updated = True

    def trained(self, B: int, index: Tensor | None, memory: MemoryBank) -> None:
        """A batch of B images was trained on: those of the index (B,), int64, or without one."""
        if index is None:
            self._with_labels_alone += B
            if self._updated and self._with_labels_alone >= len(memory):
                self._say(
                    "labels alone",
                    f"{self._with_labels_alone} images were trained on with labels alone while the bank was updated: "
                    "each counts its own row as a neighbour; call criterion(features, index)",
                )
            return
        self._with_labels_alone, self._updated = 0, False
        self._steps += 1
        if self._steps <= STEPS and self._due(self._steps, index.device):
            self._look_for_labels(index, memory)

    def compare(self, given: Tensor, index: Tensor, stored: Callable[[], Tensor]) -> None:
        """Labels (B,) that were given beside the index (B,), −1 for none, with those of the archive (B,)."""
        self._compared += 1
        if "labels differ" in self._said or not self._due(self._compared, index.device):
            return
        beside = (index >= 0) & (given != UNLABELLED)
        self._ask(self._say_differing, torch.stack([(beside & (given != stored())).sum(), beside.sum()]))

    def labels_as_index(self, found: str) -> None:
        """Say that indices are labels, by what was found."""
        self._say(
            "labels as index",
            f"{found}; is `index` the position of each image in the archive (IndexedDataset), and not its label?",
        )

    def _look_for_labels(self, index: Tensor, memory: MemoryBank) -> None:
        """Labels given as the index are all numbers of classes, and stand more than once in a batch."""
        N, C = len(memory), len(memory.classes)
        if C in (0, N):
            return
        ordered = index.sort().values
        place = torch.searchsorted(memory.classes, ordered).clamp(max=C - 1)
        inside, are_classes = ordered >= 0, memory.classes[place] == ordered
        repeats = (ordered[1:] == ordered[:-1]) & inside[1:]
        counts = torch.stack([inside.sum(), (inside & are_classes).sum(), repeats.sum()])
        self._ask(self._note_classes, counts, math.log(N / C))

    def _note_classes(self, indices: int, numbers_of_classes: int, repeated: int, surprise: float) -> None:
        """Counts of a batch; the surprise at one index that is the number of a class is −log of its chance."""
        if numbers_of_classes < indices:
            self._steps = STEPS  # positions, after all
            return
        self._numbers_of_classes += indices
        self._repeated += repeated
        if self._repeated and self._numbers_of_classes * surprise > -math.log(CHANCE):
            self.labels_as_index(
                f"all of the {self._numbers_of_classes} indices looked at are numbers of classes, and {self._repeated} "
                "stand in their batch before"
            )

    def _say_differing(self, differing: int, beside: int) -> None:
        if differing:
            self._say(
                "labels differ",
                f"labels: {differing} of the {beside} given beside an index differ from the archive's, which are used. "
                "Mostly the criterion was given labels in another order, or those of a whole set of which this is a "
                "part; IndexedDataset(dataset).labels are those of what it holds. Ignore this where they differ on "
                "purpose",
            )

    def _due(self, batch: int, device: torch.device) -> bool:
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return False
            self._hear()
            return batch <= STEPS and batch & (batch - 1) == 0
        return device.type == "cpu"

    def _ask(self, say: Callable[..., None], numbers: Tensor, *known: float) -> None:
        """Call `say` with the numbers and what is known, on a GPU in a later step."""
        if numbers.device.type == "cpu":
            say(*numbers.tolist(), *known)
            return
        arriving = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        arriving.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._coming.append((event, lambda: say(*arriving.tolist(), *known)))

    def _hear(self) -> None:
        while self._coming and self._coming[0][0].query():
            self._coming.pop(0)[1]()

    def _say(self, mistake: str, message: str) -> None:
        if mistake not in self._said:
            self._said.add(mistake)
            warn_user(message)
