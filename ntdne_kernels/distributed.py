"""The ranks that share a bank, and the loss of a batch of which each of them holds a part.

The batch of all ranks is what one process would have seen: the queries of rank 0, then those of rank 1, and so on. Each
rank looks its images up where they are kept, and learns the scores of the whole batch, so the loss is made of the same
(B,) numbers by the same code as in one process.

Shapes: W ranks, b queries of this rank, B of all, N images, n of this rank, D features.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.leave_one_out import not_again, rows_times
from ntdne_kernels.ops.losses import LossSpec, loss_and_slope
from ntdne_kernels.ops.schema import Batch

T = TypeVar("T")

CALLS = ("forward", "update_bank", "rows", "fill_bank", "MemoryBank")
COUNT_BITS = 40  # of a number that says also which call it belongs to
FAILED = -1  # what a rank reports in its place


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

    def shard(self, N: int) -> tuple[int, int]:
        """The first of N things that this rank holds, and how many, as DTensor's Shard(0) and torch.chunk cut them."""
        most = self.most(N)
        first = min(self.rank * most, N)
        return first, min(most, N - first)

    def lengths(self, N: int) -> list[int]:
        """How many of N things each rank holds."""
        return [min(self.most(N), max(N - rank * self.most(N), 0)) for rank in range(self.size)]

    def most(self, N: int) -> int:
        """How many of N things the ranks with the most of them hold."""
        return -(-N // self.size)

    def tell(self, value: T) -> list[T]:
        """The value of each rank, whatever can be pickled."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def together(self, call: Callable[[], T]) -> T:
        """What the call returns, where it succeeds on all ranks.

        Raises:
            What this rank's call raises; ValueError that names the rank where another's raises.
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
            As `together`; ValueError that names the ranks where they differ from rank 0's.
        """
        facts = self.together(check)
        of_ranks = self.tell(facts)
        for name, expected in of_ranks[0].items():
            differing = [f"rank {r} has {found[name]}" for r, found in enumerate(of_ranks) if found[name] != expected]
            if differing:
                raise ValueError(
                    f"{name}: expected the same on all ranks, but rank 0 has {expected}, " + ", ".join(differing)
                )
        return facts

    def first_problem(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one, naming it where it is another's."""
        found = next(((rank, text) for rank, text in enumerate(self.tell(problem)) if text is not None), None)
        return problem or (found and f"rank {found[0]}: {found[1]}")

    def counts(self, call: str, check: Callable[[], int]) -> list[int]:
        """What each rank's check returns, how many queries it has, say. Synchronises a GPU unless there is Gloo too.

        Raises:
            What this rank's check raises; RuntimeError that names the rank where another's raises, or where another
            makes another call than this one, one of `CALLS`.
        """
        return [count for count, _ in self.exchange(call, lambda: (check(), 0))]

    def exchange(self, call: str, check: Callable[[], tuple[int, int]]) -> list[tuple[int, int]]:
        """As `counts`, with a second number beside the count."""
        if torch.compiler.is_compiling():
            return [check()] * self.size  # sizes unknown to the compiler would break its graph
        try:
            own = check()
        except BaseException as error:
            self._exchange(FAILED, 0)  # the others wait for this rank
            self.first_problem(f"{type(error).__name__}: {error}")
            raise
        found = self._exchange(own[0] | CALLS.index(call) << COUNT_BITS, own[1])
        if any(count == FAILED for count, _ in found):
            raise RuntimeError(f"nothing was computed or written on any rank, for {self.first_problem(None)}")
        calls = [CALLS[count >> COUNT_BITS] for count, _ in found]
        if len(set(calls)) > 1:
            made = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(calls))
            raise RuntimeError(f"all ranks make the same calls in the same order, but now called {made}")
        return [(count & ((1 << COUNT_BITS) - 1), more) for count, more in found]

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The rows (b, ...) of all ranks (B, ...), given how many each has."""
        gathered: Tensor = sharded.gather_rows(rows, sizes, self.name)
        return gathered

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all ranks at each place of x."""
        highest: Tensor = sharded.max_over_ranks(x, self.name)
        return highest

    def own(self, sizes: list[int]) -> slice:
        """Where this rank's queries stand in the batch of all."""
        begin = sum(sizes[: self.rank])
        return slice(begin, begin + sizes[self.rank])

    def as_dtensor(self, part: Tensor, N: int) -> Tensor:
        """The (N, ...) DTensor of which this rank holds `part` (n, ...)."""
        from torch.distributed.tensor import DTensor, Shard  # 0.6 s, which users of one process need not wait

        mesh = DeviceMesh.from_group(self.group, part.device.type)
        shape = torch.Size((N, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def part(self, x: Tensor) -> Tensor:
        """What this rank holds of a DTensor or a tensor (N, ...)."""
        from torch.distributed.tensor import DTensor

        first, n = self.shard(len(x))
        return x.to_local() if isinstance(x, DTensor) else x[first : first + n]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a copy of a bank is shared by the same processes

    def _exchange(self, count: int, more: int) -> list[tuple[int, int]]:
        on_cpu = torch.device("cpu") in self.group._device_types
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        numbers = self.gather(torch.tensor([[count, more]], device=device), [1] * self.size).tolist()
        return [(count, more) for count, more in numbers]


class ShardedLoss(torch.autograd.Function):
    """As `leave_one_out.LeaveOneOutLoss`, of the batch of all ranks: its loss, and its log p (B,).

    Under "mean" and "sum" the loss is that of the whole batch on every rank, and each rank's gradient is W times that
    of its own features, so that their average over the ranks, which DistributedDataParallel takes, is the gradient of
    the loss. Under "none" it is the loss (b,) of the rank's own queries, with its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        batch: Batch,
        spec: LossSpec,
        indicator: Tensor | None,
        backend: str,
        need_direction: bool,
        sizes: list[int],
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        log_p, direction = sharded.log_scores(
            batch._replace(features=features), need_direction, backend, sizes, ranks.name
        )
        value, slope = loss_and_slope(log_p, indicator, spec)
        own = ranks.own(sizes)
        if spec.reduction == "none":
            value, slope = value[own].clone(), slope[own]
        else:
            slope = ranks.size * slope[own]
        ctx.mark_non_differentiable(log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(direction, log_p[own].clone(), slope, features)
        return value, log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        direction, log_p, slope, features = ctx.saved_tensors
        gradient = rows_times(grad * slope, direction, log_p).to(features.dtype)
        return not_again(gradient, grad, features), *(None,) * 7
