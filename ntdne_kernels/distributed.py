"""The processes that share a bank: the ranks of a process group, or this process alone.

`Ranks` and `OneProcess` have the same methods, so what a bank, a loss and a checkpoint do is written once for both.
`OneProcess` answers from its arguments: it starts no collective and copies nothing.

Shapes: W processes, b queries of this one, B of all, N images, n of this one.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.ops import sharded

T = TypeVar("T")

CALLS = ("forward", "update_bank", "rows", "fill_bank", "MemoryBank")


class Report(NamedTuple):
    """What a process tells the others when a call begins."""

    size: int
    """How many queries it has, or whatever else it counts."""
    wants_gradient: bool = False
    settings: int = 0
    """The `checksum` of what must be the same on all of them."""


def check_same_settings(reports: list[Report], expected: str) -> None:
    """ValueError, on all processes, where what they told of their settings differs; `expected` begins the message."""
    differing = [rank for rank, report in enumerate(reports) if report.settings != reports[0].settings]
    if differing:
        raise ValueError(f"{expected} on all ranks; those of ranks {differing} differ from rank 0's")


class OneProcess:
    """This process alone, with the methods of `Ranks`."""

    size = 1
    rank = 0
    group = None

    def shard(self, N: int) -> range:
        """All of N things."""
        return range(N)

    def global_ranks(self) -> list[int]:
        """This process's rank, 0 where there are no others."""
        return [distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0]

    def lengths(self, N: int) -> list[int]:
        """How many of N things each process holds: all."""
        return [N]

    def own_path(self, path: Path) -> Path:
        """The path of this process's file."""
        return path

    def name_of(self, rank: int) -> str:
        """What the message of an error on a rank begins with."""
        return ""

    def checksum(self, settings: tuple[Any, ...]) -> int:
        """Nothing to compare with."""
        return 0

    def gather_objects(self, value: T) -> list[T]:
        """The value."""
        return [value]

    def together(self, call: Callable[[], T]) -> T:
        """What the call returns."""
        return call()

    def same_everywhere(self, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the check returns."""
        return check()

    def first_problem(self, problem: str | None) -> str | None:
        """The problem."""
        return problem

    def counts(self, call: str, check: Callable[[], int]) -> list[int]:
        """What the check returns."""
        return [check()]

    def exchange(self, call: str, check: Callable[[], tuple[T, Report]]) -> tuple[T, list[Report]]:
        """What the check returns."""
        result, report = check()
        return result, [report]

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The rows (b, ...)."""
        return rows

    def to_state(self, part: Tensor, N: int) -> Tensor:
        """The part, which is the whole."""
        return part

    def from_state(self, x: Tensor) -> Tensor:
        """The tensor (N, ...).

        Raises:
            ValueError: it is sharded over ranks.
        """
        if hasattr(x, "full_tensor"):
            raise ValueError(
                "the checkpoint's tensors are sharded; load_checkpoint loads what save_checkpoint wrote on any ranks"
            )
        return x


class Ranks:
    """The ranks of a process group, and what they say to each other. Every method is called by all of them.

    Args:
        process_group: the group, or a DeviceMesh of one dimension.

    Raises:
        TypeError, ValueError: it is neither, or this process is not in it.
    """

    def __init__(self, process_group: ProcessGroup | DeviceMesh) -> None:
        if isinstance(process_group, DeviceMesh):
            if process_group.ndim != 1:
                raise ValueError(
                    f"process_group: expected a DeviceMesh of one dimension, got {process_group.ndim}; take one of "
                    f"them: mesh[{(process_group.mesh_dim_names or ('dp',))[0]!r}]"
                )
            process_group = process_group.get_group()
        if not isinstance(process_group, ProcessGroup):
            raise TypeError(
                "process_group: expected a torch.distributed process group or DeviceMesh that this process is in, got "
                f"{type(process_group).__name__}"
            )
        self.name = process_group.group_name
        self.size = process_group.size()
        self.rank = process_group.rank()
        self.group = process_group

    def shard(self, N: int) -> range:
        """Which of N things this rank holds: cut as by DTensor's Shard(0) and torch.chunk."""
        largest = -(-N // self.size)
        first = min(self.rank * largest, N)
        return range(first, min(first + largest, N))

    def global_ranks(self) -> list[int]:
        """The ranks of the group, as the default process group counts them."""
        return sorted(distributed.get_process_group_ranks(self.group))

    def lengths(self, N: int) -> list[int]:
        """How many of N things each rank holds."""
        largest = -(-N // self.size)
        return [min(largest, max(N - rank * largest, 0)) for rank in range(self.size)]

    def own_path(self, path: Path) -> Path:
        """The path of this rank's file, <path>.<rank>-of-<W>."""
        return path.with_name(f"{path.name}.{self.rank}-of-{self.size}")

    def name_of(self, rank: int) -> str:
        """What the message of an error on a rank begins with."""
        return f"rank {rank}: "

    def checksum(self, settings: tuple[Any, ...]) -> int:
        """A number that is the same on all ranks where the settings are; 0 in compiled code, which cannot hash."""
        return 0 if torch.compiler.is_compiling() else zlib.crc32(repr(settings).encode())

    def gather_objects(self, value: T) -> list[T]:
        """The value of each rank, whatever can be pickled."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def together(self, call: Callable[[], T]) -> T:
        """What the call returns, where it succeeds on all ranks.

        Raises:
            Exception: what this rank's call raises.
            ValueError: another rank's call raised; the message names the rank.
        """
        try:
            result = call()
        except Exception as error:
            self.first_problem(str(error))
            raise
        problem = self.first_problem(None)
        if problem is not None:
            raise ValueError(problem)
        return result

    def same_everywhere(self, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The facts that the check finds, where they are the same on all ranks.

        Raises:
            Exception: as `together`.
            ValueError: some differ from rank 0's; the message names the ranks.
        """
        facts = self.together(check)
        of_ranks = self.gather_objects(facts)
        for name, expected in of_ranks[0].items():
            differing = [f"rank {r} has {found[name]}" for r, found in enumerate(of_ranks) if found[name] != expected]
            if differing:
                raise ValueError(
                    f"{name}: expected the same on all ranks, but rank 0 has {expected}, " + ", ".join(differing)
                )
        return facts

    def first_problem(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one; one of another rank names it."""
        found = next(((r, text) for r, text in enumerate(self.gather_objects(problem)) if text is not None), None)
        return problem or (found and f"{self.name_of(found[0])}{found[1]}")

    def counts(self, call: str, check: Callable[[], int]) -> list[int]:
        """What each rank's check returns, how many queries it has, say; as `exchange`."""
        _, reports = self.exchange(call, lambda: (None, Report(check())))
        return [report.size for report in reports]

    def exchange(self, call: str, check: Callable[[], tuple[T, Report]]) -> tuple[T, list[Report]]:
        """Begin a call: this rank's result of the check, and the reports of all ranks.

        Synchronises a GPU, unless the group has Gloo beside NCCL.

        Args:
            call: its name, one of `CALLS`.
            check: looks at what the rank was given.

        Raises:
            Exception: what this rank's check raises.
            RuntimeError: another rank's check raised, or another rank makes another call; the message names the rank.
        """
        if torch.compiler.is_compiling():
            result, report = check()
            return result, [report] * self.size  # sizes unknown to the compiler would break its graph
        try:
            result, report = check()
        except BaseException as error:
            self._gather_numbers([True, 0, 0, False, 0])  # the others wait for this rank
            self.first_problem(f"{type(error).__name__}: {error}")
            raise
        found = self._gather_numbers([False, CALLS.index(call), *report])
        if any(failed for failed, *_ in found):
            raise RuntimeError(f"nothing was computed or written on any rank, for {self.first_problem(None)}")
        calls = [CALLS[number] for _, number, *_ in found]
        if len(set(calls)) > 1:
            made = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(calls))
            raise RuntimeError(f"all ranks make the same calls in the same order, but now called {made}")
        return result, [Report(size, bool(gradient), settings) for _, _, size, gradient, settings in found]

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The rows (b, ...) of all ranks (B, ...), given how many each has."""
        gathered: Tensor = sharded.gather_rows(rows, sizes, self.name)
        return gathered

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all ranks at each place of x."""
        highest: Tensor = sharded.max_over_ranks(x, self.name)
        return highest

    def to_state(self, part: Tensor, N: int) -> Tensor:
        """The (N, ...) DTensor of which this rank holds `part` (n, ...), as state dicts have it."""
        from torch.distributed.tensor import DTensor, Shard  # 0.6 s, which users of one process need not wait

        mesh = DeviceMesh.from_group(self.group, part.device.type)
        shape = torch.Size((N, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def from_state(self, x: Tensor) -> Tensor:
        """What this rank holds (n, ...) of a DTensor or a tensor (N, ...)."""
        from torch.distributed.tensor import DTensor

        if isinstance(x, DTensor):
            return x.to_local()
        own = self.shard(len(x))
        return x[own.start : own.stop]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a copy of a bank is shared by the same processes

    def _gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of each rank."""
        on_cpu = torch.device("cpu") in self.group._device_types
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        gathered: list[list[int]] = self.gather(torch.tensor([numbers], device=device), [1] * self.size).tolist()
        return gathered


Processes = OneProcess | Ranks


def processes_of(process_group: ProcessGroup | DeviceMesh | None) -> Processes:
    """The ranks of the group; None: this process alone."""
    return OneProcess() if process_group is None else Ranks(process_group)
