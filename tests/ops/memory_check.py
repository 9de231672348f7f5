"""What compute-sanitizer looks for on a GPU, for the kernels in Triton's interpreter: memory and races.

All that a program reads or writes at once has to lie in one of the tensors that its kernel was given. And no program
may read or change what another program of the launch wrote, or change what another one read: they run one after the
other here, and at the same time on a GPU. Two are in order where both did an atomic operation on the same number.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

NOBODY, SEVERAL = 0, -1  # programs are counted from 1, so that untouched memory of the largest banks takes none
Places = NDArray[np.int64]


class _Storage:
    """Who did what last with each number in a tensor's memory."""

    def __init__(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        self.start, self.size = memory.data_ptr(), tensor.element_size()
        numbers = memory.nbytes() // self.size
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes()).from_address(self.start))
        self.writer, self.written, self.reader, self.atomic = (np.zeros(numbers, dtype=np.int32) for _ in range(4))

    def lacks(self, places: Places, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of the values are not there yet: whoever writes the others, the result is the same."""
        there = self.bytes[self.size * places[:, None] + np.arange(self.size)]
        return (there != np.ascontiguousarray(values).view(np.uint8).reshape(-1, self.size)).any(axis=1)


class Launch:
    """What the programs of one launch did so far."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel, self.tensors = kernel, {name: t for name, t in tensors.items() if t.numel() > 0}
        memories = {t.untyped_storage().data_ptr(): t for t in self.tensors.values()}
        self.storages = {start: _Storage(tensor) for start, tensor in memories.items()}
        self.time = 0
        self.seen: dict[int, dict[int, int]] = {}
        """By program, up to when it sees what each other one wrote."""
        self.released: dict[int, dict[int, int]] = {}
        """By address of an atomic operation, what those who did one saw, themselves included."""

    def read(self, program: int, pointers: NDArray[np.uint64], size: int) -> None:
        """A program reads numbers of so many bytes."""
        storage, places = self._inside(program, pointers, size, "reads")
        self._in_order(program, storage, places, "reads")
        before = storage.reader[places]
        storage.reader[places] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    def write(self, program: int, pointers: NDArray[np.uint64], values: NDArray[Any]) -> None:
        """A program writes these values."""
        storage, places = self._inside(program, pointers, values.itemsize, "writes")
        new = places[storage.lacks(places, values)]
        self._in_order(program, storage, new, "writes")
        self._unread(program, storage, new, "writes")
        self.time += 1
        storage.writer[places], storage.written[places] = program, self.time

    def change_atomically(self, program: int, pointers: NDArray[np.uint64], size: int, ordered: bool) -> None:
        """A program adds to numbers; `ordered`: it sees what programs wrote that did so before, and shows its own."""
        storage, places = self._inside(program, pointers, size, "changes")
        self._in_order(program, storage, places, "changes")
        self._unread(program, storage, places, "changes")
        before = storage.atomic[places]
        storage.atomic[places] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        for address in pointers.tolist() if ordered else ():
            seen = self.seen.setdefault(program, {})
            released = self.released.setdefault(address, {})
            for other, time in released.items():
                seen[other] = max(seen.get(other, 0), time)
            released.update(seen)
            released[program] = self.time

    def _inside(self, program: int, pointers: NDArray[np.uint64], size: int, does: str) -> tuple[_Storage, Places]:
        """Where in a tensor's memory the pointers stand."""
        first, last = int(pointers.min()), int(pointers.max()) + size
        for tensor in self.tensors.values():
            start = tensor.data_ptr()
            reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if start <= first and last <= start + (reach + 1) * tensor.element_size():
                storage = self.storages[tensor.untyped_storage().data_ptr()]
                return storage, (pointers - np.uint64(storage.start)).astype(np.int64) // storage.size
        near = {name: (first - t.data_ptr()) // t.element_size() for name, t in self.tensors.items()}
        name = min(near, key=lambda name: abs(near[name]))
        raise AssertionError(
            f"{self.kernel}: program {program - 1} {does} outside the tensors, from element {near[name]} of {name} "
            f"{tuple(self.tensors[name].shape)} on, {(last - first) // size} elements"
        )

    def _unread(self, program: int, storage: _Storage, places: Places, does: str) -> None:
        readers = storage.reader[places]
        if ((readers != NOBODY) & (readers != program)).any():
            raise AssertionError(f"{self.kernel}: program {program - 1} {does} what another one reads")

    def _in_order(self, program: int, storage: _Storage, places: Places, does: str) -> None:
        atomic = storage.atomic[places]
        if does != "changes" and ((atomic != NOBODY) & (atomic != program)).any():
            raise AssertionError(f"{self.kernel}: program {program - 1} {does} what others change atomically")
        writers = storage.writer[places]
        for other in np.unique(writers[(writers != NOBODY) & (writers != program)]).tolist():
            if storage.written[places][writers == other].max() > self.seen.get(program, {}).get(other, 0):
                raise AssertionError(f"{self.kernel}: program {program - 1} {does} what program {other - 1} wrote")


@contextmanager
def checked() -> Iterator[None]:
    """Interpreted kernels raise an `InterpreterError` at the first access that is not allowed."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[Launch] = []

    def program_of(self: Any) -> int:
        return 1 + int(np.ravel_multi_index(self.grid_idx, self.grid_dim))

    def begin(self: Any, arguments: Any, options: Any) -> Any:
        on_host = convert(self, arguments, options)
        tensors = dict(zip(self.arg_names, on_host[0], strict=False)) | on_host[1]
        launches[:] = [Launch(self.fn.__name__, {name: t for name, t in tensors.items() if isinstance(t, Tensor)})]
        return on_host

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if mask.data.any():
            loaded = pointers.data[mask.data]
            launches[0].read(program_of(self), loaded, pointers.get_element_ty().primitive_bitwidth // 8 or 1)
        return read(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if mask.data.any():
            launches[0].write(program_of(self), pointers.data[mask.data], value.data[mask.data])
        return write(self, pointers, value, mask, *rest)

    def change(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
        if mask.data.any():
            ordered = self.ir_sem_to_interpreter_sem[order] != self.ir_sem_to_interpreter_sem[relaxed]
            launches[0].change_atomically(program_of(self), pointers.data[mask.data], value.data.itemsize, ordered)
        return rmw(self, kind, pointers, value, mask, order, scope)

    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED
    convert, read, write, rmw = (
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", begin)
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "create_atomic_rmw", change)
        yield
