"""The check of what kernels read and write, on kernels that do wrong."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from ntdne_kernels.ops.gpu.launches import INTERPRETED
from tests.ops.memory_check import checked

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def copy(x, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < N, other=0), mask=i < N)


@triton.jit
def shift(x, by):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + (i + by) % 3) + 1)


@triton.jit
def put(x, out):
    i = tl.program_id(0)
    tl.store(out, tl.load(x + i))


@triton.jit
def total(x, parts, count, out, N, ORDERED: tl.constexpr):
    i = tl.program_id(0)
    tl.store(parts + i, tl.load(x + i))
    if tl.atomic_add(count, 1, sem="acq_rel" if ORDERED else "relaxed") == N - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, 4)), 0))


@triton.jit
def count_or_look(count, out, LOOKS: tl.constexpr):
    if tl.program_id(0) == LOOKS:
        tl.store(out, tl.load(count))
    else:
        tl.atomic_add(count, 1)


def test_a_kernel_that_keeps_to_its_tensors_passes():
    x, out = torch.arange(6.0), torch.zeros(6)
    with checked():
        copy[(2,)](x, out, 6, BLOCK=4)
    assert torch.equal(x, out)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (5, 6, "copy: program 1 reads outside the tensors, from element 4 of x"),
        (6, 5, "copy: program 1 writes outside the tensors, from element 4 of out"),
    ],
)
def test_an_access_outside_the_tensors_is_found(x, out, message):
    memory = torch.zeros(2, 64)  # what lies behind a tensor is memory too
    with checked(), pytest.raises(InterpreterError, match=message):
        copy[(2,)](memory[0, :x], memory[1, :out], 6, BLOCK=4)


def test_one_access_may_not_reach_from_a_tensor_into_the_next():
    memory = torch.zeros(12)
    with checked(), pytest.raises(InterpreterError, match="program 1 reads outside"):
        copy[(2,)](memory[:5], memory[5:12], 6, BLOCK=4)


def test_a_program_may_not_read_what_another_wrote_or_write_what_another_read():
    with checked(), pytest.raises(InterpreterError, match="shift: program 1 reads what program 0 wrote"):
        shift[(3,)](torch.zeros(3), 2)
    with checked(), pytest.raises(InterpreterError, match="shift: program 1 writes what another one reads"):
        shift[(3,)](torch.zeros(3), 1)
    with checked():
        shift[(3,)](torch.zeros(3), 0)


def test_programs_may_write_the_same_and_not_different_values():
    with checked():
        put[(3,)](torch.ones(3), torch.zeros(1))
    with checked(), pytest.raises(InterpreterError, match="put: program 1 writes what program 0 wrote"):
        put[(3,)](torch.arange(3.0), torch.zeros(1))


def test_an_atomic_operation_puts_programs_in_order():
    x, count = torch.arange(4.0), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(1)
    with checked():
        total[(4,)](x, torch.zeros(4), count, out, 4, ORDERED=True)
    assert out.item() == 6
    with checked(), pytest.raises(InterpreterError, match="total: program 3 reads what program 0 wrote"):
        total[(4,)](x, torch.zeros(4), count.zero_(), out, 4, ORDERED=False)


@pytest.mark.parametrize(
    ("looks", "message"),
    [(0, "program 1 changes what another one reads"), (1, "program 1 reads what others change atomically")],
)
def test_a_number_that_others_change_atomically_is_not_read(looks, message):
    with checked(), pytest.raises(InterpreterError, match=f"count_or_look: {message}"):
        count_or_look[(2,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), LOOKS=looks)
