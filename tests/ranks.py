"""Runs a function on several ranks: processes of one machine, joined by Gloo through a file instead of a port."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Forked from a server that holds the imports: a rank starts in a tenth of a second, with no thread of the test's.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks", "ntdne_kernels", "torch.distributed.checkpoint", "torch._dynamo"])


class RankError(AssertionError):
    """What each rank that failed raised, or how it ended."""


def run(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """The results of function(*arguments) on ranks 0, 1, ..., world_size − 1 of the default process group.

    The function must be one that other processes can import. A rank that raises, is killed, or has not finished after
    `timeout` seconds makes this raise RankError, and no process is left behind.
    """
    outcomes = run_to_the_end(function, world_size, *arguments, timeout=timeout)
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failed)}
    if failed:
        raise RankError("\n".join(f"rank {rank}: {outcome.how}" for rank, outcome in failed.items()))
    return outcomes


class Failed:
    """The end of a rank that returned nothing: its traceback, "killed by signal 9" or "still running"."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __repr__(self) -> str:
        return f"Failed({self.how})"


def run_to_the_end(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """As `run`, with a `Failed` in the place of the result of each rank that failed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_rank, args=(folder, rank, world_size, timeout, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        outcomes: list[Any] = []
        for rank, process in enumerate(processes):
            process.join(max(end - time.monotonic(), 0))
            result = Path(folder, f"{rank}.result")
            if process.is_alive():
                process.kill()
                process.join()
                outcomes.append(Failed("still running"))
            elif result.exists():
                outcomes.append(torch.load(result, weights_only=False))
            else:
                outcomes.append(Failed(f"ended with {process.exitcode}"))
        return outcomes


def _rank(
    folder: str, rank: int, world_size: int, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    outcome: Any
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        outcome = function(*arguments)
    except BaseException:
        outcome = Failed(traceback.format_exc())
    written = Path(folder, f"{rank}.writing")
    torch.save(outcome, written)
    written.rename(Path(folder, f"{rank}.result"))
    # Without a barrier: a failed rank must not keep the others, and theirs find its connection closed.
