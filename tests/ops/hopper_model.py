"""The walk of the Hopper kernel without a GPU: its own source, executed over NumPy with its warps in any order.

`load(source)` makes the functions of hopper.py from their text, with stand-ins for what they use of Gluon. Arrays are
float64; layouts mean nothing. What a GPU does by itself is done in an order that a `Random` chooses: the warp groups
and the loading warp take turns at each wait, arrival and product, copies by TMA land some time after they were asked
for, and products read their tiles until they are waited for. A `Fault` says that

- nobody can go on: a deadlock;
- a tile is read before it is there, or overwritten while it is read;
- a product's result is used before it is waited for;
- a barrier gets more arrivals than it counts, a number does not fit its 32 bits, or an address is no tensor's.
"""

import ast
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import Phase, find, settings
from hypothesis.strategies import SearchStrategy

SOURCE = (Path(__file__).parents[2] / "ntdne_kernels" / "ops" / "gpu" / "hopper.py").read_text()


class Fault(Exception):
    """What must never happen on a GPU."""


class Block(np.ndarray):
    """A tensor of a kernel, which `+=` does not change but gives a new value for."""

    def __iadd__(self, other: Any) -> "Block":
        return self + other

    def to(self, dtype: Any) -> "Block":
        if dtype is np.int32 and np.any((self < -(2**31)) | (self >= 2**31)):
            raise Fault(f"{self} in 32 bits")
        return self


def _block(x: Any) -> Block:
    return np.asarray(x).view(Block)


class Pointer:
    def __init__(self, memory: np.ndarray, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """Of a matrix, of which the rows from `first` on are given; TMA reads 0 behind them."""

    def __init__(self, rows: np.ndarray, shape: list[int], first: int = 0) -> None:
        self.rows, self.first, self.dtype, self.layout = rows, first, None, None
        self.block_type = SimpleNamespace(shape=shape, nbytes=2 * shape[0] * shape[1])

    def read(self, start: int) -> np.ndarray:
        found = np.zeros(self.block_type.shape)
        rows = self.rows[start - self.first :][: len(found)]
        found[: len(rows), : rows.shape[1]] = rows
        return found


class Shared:
    """A piece of shared memory: an array of pieces, a tile, or a barrier."""

    def __init__(self) -> None:
        self.dtype = None
        self.pieces: dict[int, Shared] = {}
        self.tile: np.ndarray | None = None
        self.readers = 0
        self.count = self.arrived = self.missing_bytes = self.phase = 0

    def index(self, k: int) -> "Shared":
        return self.pieces.setdefault(int(k), Shared())

    def permute(self, order: tuple[int, int]) -> "Transposed":
        return Transposed(self)

    def arrive(self, expected_bytes: int = 0) -> None:
        if self.arrived == self.count:
            raise Fault("more arrivals than the barrier counts")
        self.arrived += 1
        self.land(-expected_bytes)

    def land(self, landed_bytes: int) -> None:
        self.missing_bytes -= landed_bytes
        if self.arrived == self.count and self.missing_bytes == 0:
            self.phase, self.arrived = self.phase + 1, 0


class Transposed:
    def __init__(self, piece: Shared) -> None:
        self.piece = piece


class Product:
    """A product that is under way: a @ b, or that added to `sums`."""

    def __init__(self, a: Any, b: Any, sums: Any) -> None:
        self.a, self.b, self.sums = a, b, sums
        self.result: Block | None = None
        self.pieces = [x.piece if isinstance(x, Transposed) else x for x in (a, b) if not isinstance(x, Block)]
        for piece in self.pieces:
            if piece.tile is None:
                raise Fault("a tile is read that is not there")
            piece.readers += 1

    def unfinished(self, *_: Any, **__: Any) -> Any:
        raise Fault("a product's result is used before it is there")

    __array__ = __mul__ = unfinished

    def finish(self) -> None:
        def value(x: Any) -> Any:
            return x.piece.tile.T if isinstance(x, Transposed) else x.tile if isinstance(x, Shared) else x

        self.result = _block(value(self.sums) + np.asarray(value(self.a)) @ np.asarray(value(self.b)))
        for piece in self.pieces:
            piece.readers -= 1


class Machine:
    """One multiprocessor: runs the warps of a program, one at a time, and copies tiles between."""

    def __init__(self, order: Random) -> None:
        self.order = order
        self.here = threading.local()  # of each warp or warp group
        self.copies: list[Iterator[None]] = []
        self.turn = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self, warps: list[tuple[Callable[..., None], tuple]], *_: Any) -> None:
        """`gl.warp_specialize`."""
        states = [SimpleNamespace(go=threading.Semaphore(0), ready=lambda: True, done=False) for _ in warps]
        threads = [
            threading.Thread(target=self._live, args=(state, *warp), daemon=True)
            for state, warp in zip(states, warps, strict=True)
        ]
        for thread in threads:
            thread.start()
        # One is often far slower than another.
        patience = [self.order.choice((1, 1, 30)) for _ in (*states, "copies")]
        while self.error is None and not all(state.done for state in states):
            able = [k for k, state in enumerate(states) if not state.done and state.ready()]
            able += [len(states)] * (len(self.copies) > 0)
            if not able:
                self.error = Fault("deadlock")
                break
            (chosen,) = self.order.choices(able, [patience[k] for k in able])
            if chosen < len(states):
                states[chosen].go.release()
                self.turn.acquire()
            else:
                copy = self.order.choice(self.copies)
                try:
                    next(copy)
                except StopIteration:
                    self.copies.remove(copy)
                except Fault as fault:
                    self.error = fault
        for state in states:
            state.go.release()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _live(self, state: SimpleNamespace, function: Callable[..., None], arguments: tuple) -> None:
        self.here.state, self.here.products = state, deque()
        state.go.acquire()
        try:
            if self.error is None:
                function(*arguments)
        except SystemExit:
            pass  # another has failed
        except BaseException as error:
            self.error = self.error or error
        state.done = True
        self.turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, until it is this warp's turn again."""
        self.here.state.ready = ready
        self.turn.release()
        self.here.state.go.acquire()
        if self.error is not None:
            raise SystemExit

    def wait(self, barrier: Shared, parity: int) -> None:
        """`mbarrier.wait`: until the phase of this parity is over; of the two that have one, a GPU knows no more."""
        self.pause(lambda: barrier.phase % 2 != parity)

    def arrive(self, barrier: Shared) -> None:
        self.pause()
        barrier.arrive()

    def copy(self, source: Descriptor, at: list, barrier: Shared, target: Shared) -> None:
        """`tma.async_copy_global_to_shared`."""

        def landing() -> Iterator[None]:
            if target.readers:
                raise Fault("a tile is overwritten while it is read")
            target.tile = None
            yield
            target.tile = source.read(int(at[0]))
            barrier.land(source.block_type.nbytes)

        self.copies.append(landing())
        self.pause()

    def multiply(self, a: Any, b: Any, sums: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        """`warpgroup_mma`."""
        assert is_async
        product = Product(a, b, sums if use_acc else 0)
        self.here.products.append(product)
        self.pause()
        return product

    def wait_for_products(self, left: int, deps: list) -> Any:
        """`warpgroup_mma_wait`."""
        self.pause()
        while len(self.here.products) > left:
            self.here.products.popleft().finish()
        found = []
        for dep in deps:
            if isinstance(dep, Product) and dep.result is None:
                raise Fault("a product's result is used before it is there")
            found.append(dep.result if isinstance(dep, Product) else dep)
        return found[0] if len(found) == 1 else tuple(found)


def _jit(function: Any = None, **_: Any) -> Any:
    return function or _jit


def _at(pointer: Pointer, mask: Any) -> np.ndarray:
    offset = np.broadcast_arrays(pointer.offset, mask)[0][mask]
    if np.any((offset < 0) | (offset >= pointer.memory.size)):
        raise Fault("an address outside of a tensor")
    return offset


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    offset, mask = np.broadcast_arrays(pointer.offset, mask)
    found = np.full(offset.shape, other, pointer.memory.dtype)
    found[mask] = pointer.memory[_at(pointer, mask)]
    return _block(found)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    value, mask = np.broadcast_arrays(value, mask)
    pointer.memory[_at(pointer, mask)] = value[mask]


def _atomic_add(pointer: Pointer, value: Any, mask: Any, sem: str, scope: str) -> None:
    value, mask = np.broadcast_arrays(value, mask)
    np.add.at(pointer.memory, _at(pointer, mask), value[mask])


def _log(x: Any) -> Block:
    with np.errstate(divide="ignore"):
        return _block(np.log(x))


def _nothing(*_: Any, **__: Any) -> None:
    return None


def load(source: str, half: int) -> dict[str, Any]:
    """The functions of hopper.py, whose warp groups take `half` queries each."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    gl = SimpleNamespace(
        constexpr=lambda value: value, int32=np.int32, int64=np.int64, float32=np.float32, float64=np.float64,
        log=_log,
        bfloat16=None, float16=None, static_range=range,
        arange=lambda begin, end, layout: _block(np.arange(begin, end)),
        zeros=lambda shape, dtype, layout: _block(np.zeros(shape)),
        where=lambda *x: _block(np.where(*x)), minimum=lambda *x: _block(np.minimum(*x)),
        maximum=lambda *x: _block(np.maximum(*x)), min=lambda x, axis: _block(np.min(x, axis)),
        sum=lambda x, axis: _block(np.sum(x, axis)), exp2=lambda x: _block(np.exp2(x)),
        cdiv=lambda a, b: -(-a // b), convert_layout=lambda x, layout: x,
        reshape=np.reshape, permute=np.transpose, split=lambda x: (x[..., 0], x[..., 1]),
        load=_load, store=_store, atomic_add=_atomic_add,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(),
        BlockedLayout=_nothing, SliceLayout=_nothing, DotOperandLayout=_nothing, NVMMADistributedLayout=_nothing,
        NVMMASharedLayout=None,
    )  # fmt: skip
    mbarrier = SimpleNamespace(MBarrierLayout=_nothing, init=lambda barrier, count: setattr(barrier, "count", count))
    names: dict[str, Any] = {
        "gl": gl, "mbarrier": mbarrier, "tma": SimpleNamespace(), "gluon": SimpleNamespace(jit=_jit),
        "fence_async_shared": _nothing, "cache": _jit, "Tensor": None, "TensorDescriptor": None,
        "torch": SimpleNamespace(dtype=None),
    }  # fmt: skip
    exec(compile(tree, "hopper.py", "exec"), names)
    names["_HALF"] = half
    return names


def run(kernel: dict[str, Any], order: Random, program: int, name: str, *arguments: Any, **constants: Any) -> None:
    """One program of a kernel, `stream` or `class_log_sums`."""
    machine = Machine(order)
    gl, mbarrier = kernel["gl"], kernel["mbarrier"]
    gl.program_id = lambda axis: _block(np.int64(program))
    gl.warp_specialize = machine.run
    mbarrier.wait, mbarrier.arrive = machine.wait, machine.arrive
    mbarrier.expect = Shared.arrive
    kernel["tma"].async_copy_global_to_shared = machine.copy
    kernel["warpgroup_mma"], kernel["warpgroup_mma_wait"] = machine.multiply, machine.wait_for_products
    kernel[name](*arguments, **constants)


def fail_without(right: str, wrong: str, check: Callable[[Any, str], None], problems: SearchStrategy[Any]) -> None:
    """Assert that some problem fails its check where the source has the wrong text in place of the right one."""
    assert SOURCE.count(right) >= 1
    broken = SOURCE.replace(right, wrong)

    def fails(problem: Any) -> bool:
        try:
            check(problem, broken)
        except (Fault, AssertionError):
            return True
        return False

    found = settings(max_examples=1000, database=None, derandomize=True, phases=[Phase.generate])
    assert fails(find(problems, fails, settings=found))
