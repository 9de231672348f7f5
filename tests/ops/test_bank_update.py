"""The bank update op, compiled and in PyTorch: values, order, what it refuses, and what PyTorch asks of it."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from ntdne_kernels.functional import update_bank_
from ntdne_kernels.ops import bank_update
from tests import formulas

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def compiled(bank: Tensor, features: Tensor, index: Tensor, momentum: float, position: Tensor | None = None) -> None:
    if bank.device.type in bank_update.LOAD_ERRORS:
        pytest.skip("the package was built without a compiler")
    torch.ops.ntdne_kernels.update_bank_(bank, features, index, momentum, position)


@pytest.fixture(params=[compiled, bank_update.update_bank_in_pytorch], ids=["compiled", "pytorch"])
def update(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(autouse=True)
def _no_fallback_warning(monkeypatch):
    monkeypatch.setattr(bank_update, "_warned", {"cpu", "cuda"})


def made(B: int, N: int, D: int, bank_dtype: torch.dtype, feature_dtype: torch.dtype, device: torch.device):
    source = torch.Generator().manual_seed(B * N + D)
    bank = nn.functional.normalize(torch.randn(N, D, generator=source, dtype=torch.float64), dim=1)
    features = 3 * torch.randn(B, D, generator=source, dtype=torch.float64)
    index = torch.randint(0, N, (B,), generator=source)
    return bank.to(device, bank_dtype), features.to(device, feature_dtype), index.to(device)


@pytest.mark.parametrize("bank_dtype", FLOATS)
@pytest.mark.parametrize("feature_dtype", FLOATS)
def test_rows_are_those_of_the_formula_in_every_dtype(update, bank_dtype, feature_dtype, device):
    for B, N, D in [(1, 1, 1), (5, 9, 3), (40, 30, 16), (33, 200, 131)]:
        bank, features, index = made(B, N, D, bank_dtype, feature_dtype, device)
        expected = torch.tensor(formulas.update_bank(bank.cpu(), features.cpu(), index.cpu(), 0.7)).double()
        update(bank, features, index, 0.7)
        # One rounding to the bank's dtype per update of a row, on top of the rounding of the accumulator.
        accuracy = max(torch.finfo(bank_dtype).eps, torch.finfo(torch.float32).eps if bank_dtype != FLOATS[0] else 0)
        repeats = int(index.bincount().max())
        tolerance = (2 * repeats + 2) * accuracy if bank_dtype != torch.float64 else 1e-7
        torch.testing.assert_close(bank.double().cpu(), expected, rtol=0, atol=tolerance)


def test_a_float64_bank_is_computed_in_float64(update, device):
    bank, features, index = made(20, 50, 12, torch.float64, torch.float64, device)
    expected = formulas.update_bank(bank.cpu(), features.cpu(), index.cpu(), 0.3)
    update(bank, features, index, 0.3)
    torch.testing.assert_close(bank.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_index_given_several_times_is_applied_in_batch_order(update, dtype, device):
    """Bit for bit the same as updates of one feature each."""
    bank, features, _ = made(100, 6, 33, dtype, torch.float32, device)
    index = torch.randint(0, 6, (100,), generator=torch.Generator().manual_seed(0)).to(device)
    one_by_one = bank.clone()
    for i in range(100):
        update(one_by_one, features[i : i + 1], index[i : i + 1], 0.9)
    update(bank, features, index, 0.9)
    assert torch.equal(bank, one_by_one)


def test_the_number_of_threads_changes_nothing(update):
    bank, features, index = made(3000, 500, 64, torch.float32, torch.float32, torch.device("cpu"))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bank.clone())
            update(results[-1], features, index, 0.5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_other_rows_are_not_touched(update, device):
    bank, features, index = made(4, 50, 8, torch.float32, torch.float32, device)
    before = bank.clone()
    update(bank, features, index, 0.5)
    others = torch.ones(50, dtype=torch.bool, device=device).index_fill_(0, index, False)
    assert torch.equal(bank[others], before[others])
    assert not torch.equal(bank[~others], before[~others])


def test_a_vanishing_blend_becomes_the_new_feature(update, device):
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    update(bank, torch.tensor([[-2.0, 0.0]], device=device), torch.tensor([0], device=device), 0.5)
    assert bank.tolist() == [[-1, 0], [0, 1]]


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_becomes_the_new_feature(update, spoilt, device):
    bank = torch.tensor([[spoilt, 0.0], [0.0, 1.0]], device=device)
    for momentum in (0.0, 0.5):
        rows = bank.clone()
        update(rows, torch.tensor([[3.0, 4.0]], device=device), torch.tensor([0], device=device), momentum)
        torch.testing.assert_close(rows.cpu(), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


# Features (b, 8) that lie in the memory of a bank (40, 8).
OVERLAPS = {
    "all": lambda bank: bank,
    "later rows": lambda bank: bank[3:],
    "every other row": lambda bank: bank[::2],
    "one row": lambda bank: bank[5].expand(40, 8),
    "shifted by half a row": lambda bank: bank.view(-1)[4:-4].view(39, 8),
    "transposed": lambda bank: bank.view(-1)[:64].view(8, 8).t(),
    "as the bits of another dtype": lambda bank: bank.view(torch.bfloat16).view(-1)[:320].view(40, 8),
    "reaching in from before": lambda bank: bank.as_strided((40, 8), (8, 1), bank.storage_offset() - 100),
}


@pytest.mark.parametrize("overlap", OVERLAPS.values(), ids=OVERLAPS)
def test_features_in_the_banks_memory_are_read_as_they_were_before_the_call(update, overlap, device):
    """Also where rows are written before another update reads them."""
    whole, _, _ = made(1, 80, 8, torch.float32, torch.float32, device)
    bank = whole.bfloat16().float()[20:60]  # halves of its numbers are numbers
    features = overlap(bank)
    index = torch.randint(0, 40, (len(features),), generator=torch.Generator().manual_seed(0)).to(device)
    expected = bank.clone()
    update(expected, features.clone(), index, 0.5)
    update(bank, features, index, 0.5)
    assert torch.equal(bank, expected)


def test_an_index_in_the_banks_memory_is_read_as_it_was_before_the_call(update, device):
    rows = nn.functional.normalize(torch.randn(8, 4, dtype=torch.float64), dim=1).to(device)
    index = rows.view(torch.int64)[0]
    index.copy_(torch.tensor([0, 3, -1, 5]))  # numbers near 0, as float64
    expected, features = rows.clone(), torch.eye(4, dtype=torch.float64, device=device)
    update(expected, features, index.clone(), 0.5)
    update(rows, features, index, 0.5)
    assert torch.equal(rows, expected)


@pytest.mark.slow
def test_a_compiler_may_drop_the_copy_of_the_rows_that_are_the_features(device):
    """As inductor does; the op then gets the bank itself as its features."""
    bank, _, _ = made(1, 64, 8, torch.float32, torch.float32, device)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)

    def step(bank: Tensor, index: Tensor) -> Tensor:
        old = bank.clone()
        update_bank_(bank, old, index, 0.5)
        return bank

    expected = step(bank.clone(), index)
    assert torch.equal(torch.compile(step, fullgraph=True)(bank.clone(), index), expected)
    update_bank_(bank, bank, index, 0.5)
    assert torch.equal(bank, expected)


def test_position_says_which_row_an_index_means(update, device):
    """Two images of one row are applied in batch order too."""
    bank, features, _ = made(8, 10, 8, torch.float32, torch.float32, device)
    position = torch.tensor([7, 3, 0, 3, 9, -1], device=device)
    index = torch.tensor([1, 0, 3, -1, 4, 2, 5, 1], device=device)
    rows = torch.tensor([3, 7, 3, -1, 9, 0, -1, 3], device=device)
    expected = bank.clone()
    update(expected, features, rows, 0.5)
    for place in (position, torch.stack([position, position], 1)[:, 0]):
        given = bank.clone()
        update(given, features, index, 0.5, place)
        assert torch.equal(given, expected)


@pytest.mark.parametrize("bad", [3, 9, -2, 2**62])
def test_an_index_outside_of_position_is_refused_though_it_is_a_row(update, bad):
    bank, features, _ = made(2, 10, 8, torch.float32, torch.float32, torch.device("cpu"))
    before = bank.clone()
    for index, position in (([0, bad], [4, 5, 6]), ([0, 1], [4, 10, 6]), ([0, 1], [4, -2, 6])):
        with pytest.raises(RuntimeError, match="out of range"):
            update(bank, features, torch.tensor(index), 0.5, torch.tensor(position))
    assert torch.equal(bank, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offsets_beyond_two_to_the_31_reach_the_right_row(update, name):
    """N·D = 2.1·10^9 elements; pages that nothing touches take no memory on a CPU."""
    N, D = 65_544, 32_768
    bank = torch.zeros(N, D, dtype=torch.bfloat16, device=name)
    features = torch.ones(2, D, device=name)
    update(bank, features, torch.tensor([N - 1, 3], device=name), 0.0)
    expected = torch.full((D,), D**-0.5, dtype=torch.bfloat16, device=name)
    for row in (3, N - 1):
        assert torch.equal(bank[row], expected)
    for row in (0, 2, 4, N - 2, (N - 1) * D % 2**31 // D, (N - 1) * D % 2**31 // D + 1):
        assert not bank[row].any()


def test_momentum_zero_and_one(update, device):
    bank, features, index = made(5, 40, 16, torch.float64, torch.float64, device)
    before = bank.clone()
    update(bank, features, index, 1.0)
    torch.testing.assert_close(bank, before)
    update(bank, features, index, 0.0)
    last = {int(row): i for i, row in enumerate(index)}
    for row, i in last.items():
        torch.testing.assert_close(bank[row], nn.functional.normalize(features[i], dim=0))


def test_index_minus_one_is_left_out_whatever_its_feature_is(update, device):
    bank, features, index = made(4, 10, 8, torch.float32, torch.float32, device)
    without = bank.clone()
    update(without, features[1:], index[1:], 0.5)
    features[0], index[0] = torch.nan, -1
    update(bank, features, index, 0.5)
    assert torch.equal(bank, without)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [8, 1000])
def test_strided_features_and_indices(update, D, dtype, device):
    bank, features, index = made(6, 10, D, dtype, dtype, device)
    other = bank.clone()
    update(bank, features, index, 0.5)
    update(other, features.t().contiguous().t(), torch.stack([index, index], 1)[:, 1], 0.5)
    assert torch.equal(bank, other)


def test_empty_batch_changes_nothing(update, device):
    bank, features, index = made(3, 10, 8, torch.float32, torch.float32, device)
    before = bank.clone()
    update(bank, features[:0], index[:0], 0.5)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_cpu_refuses_a_feature_without_direction_and_writes_nothing(update, bad):
    bank, features, index = made(6, 10, 8, torch.float32, torch.float32, torch.device("cpu"))
    before = bank.clone()
    features[4] = bad
    with pytest.raises(RuntimeError, match="norm 0 or is not finite"):
        update(bank, features, index, 0.5)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("bad", [10, -2, 2**62])
def test_a_cpu_refuses_an_index_outside_the_bank_and_writes_nothing(update, bad):
    bank, features, index = made(6, 10, 8, torch.float32, torch.float32, torch.device("cpu"))
    before = bank.clone()
    index[5] = bad
    with pytest.raises(RuntimeError, match="out of range"):
        update(bank, features, index, 0.5)
    assert torch.equal(bank, before)


@pytest.mark.gpu
def test_a_gpu_leaves_bad_features_out_and_counts_them(update):
    device = torch.device("cuda")
    bank, features, index = made(6, 10, 8, torch.float32, torch.float32, device)
    expected = bank.clone()
    update(expected, features[3:], index[3:], 0.5)
    features[0], features[1], index[2] = 0, torch.nan, 10

    def count() -> int:
        if update is compiled:
            return torch.ops.ntdne_kernels.skipped_rows(bank)
        return bank_update.skipped_rows_in_pytorch(bank)

    before = count()
    update(bank, features, index, 0.5)
    assert torch.equal(bank, expected)
    assert count() == before + 3
    update(bank, features, torch.tensor([3, -2, 2, -1, -1, -1], device=device), 0.5, torch.tensor([9, 4, 10]).cuda())
    assert torch.equal(bank, expected)
    assert count() == before + 6


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    bank, features, index = made(300, 100, 48, torch.float32, torch.float32, torch.device("cpu"))
    on_gpu = bank.cuda()
    compiled(bank, features, index, 0.5)
    compiled(on_gpu, features.cuda(), index.cuda(), 0.5)
    torch.testing.assert_close(on_gpu.cpu(), bank, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_update_runs_on_the_current_stream():
    bank, features, index = made(8, 10, 8, torch.float32, torch.float32, torch.device("cuda"))
    expected = bank.clone()
    compiled(expected, -features, index, 0.5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        features.neg_()
        compiled(bank, features, index, 0.5)
    stream.synchronize()
    assert torch.equal(bank, expected)


@pytest.mark.usefixtures("capturing")
def test_what_a_cuda_graph_cannot_hold_says_so():
    bank: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="CUDA graph: the first step on a device makes a counter; run a step before"):
        bank_update.skipped_counter(torch.device("cuda:7"))
    with pytest.raises(RuntimeError, match="CUDA graph: bank updates through PyTorch .* their compiled kernel"):
        bank_update.update_bank_in_pytorch(bank, None, None, 0.5)


@pytest.mark.gpu
def test_a_gpu_update_is_one_launch():
    bank, features, index = made(256, 1000, 128, torch.float32, torch.float32, torch.device("cuda"))
    compiled(bank, features, index, 0.5)
    position = torch.randperm(1000, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(bank, features, index, 0.5, position)
    cuda = torch.autograd.DeviceType.CUDA
    launches = [event for event in profile.events() if event.device_type == cuda]
    assert [event.name for event in launches if "update_bank_kernel" not in event.name] == []
    assert len(launches) == 1


@pytest.mark.parametrize("bump", [compiled, bank_update.update_bank_in_pytorch])
def test_the_bank_version_counter_rises_so_that_a_stale_backward_raises(bump, device):
    bank, features, index = made(4, 10, 8, torch.float32, torch.float32, device)
    weight = torch.ones(8, device=device, requires_grad=True)
    product = (bank * weight).sum()
    version = bank._version
    bump(bank, features, index, 0.5)
    assert bank._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_schema_returns_nothing_and_mutates_the_bank_alone():
    schema = torch.ops.ntdne_kernels.update_bank_.default._schema
    assert str(schema) == (
        "ntdne_kernels::update_bank_(Tensor(a!) bank, Tensor features, Tensor index, float momentum, "
        "Tensor? position=None) -> ()"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("position", [None, torch.arange(9, -1, -1)])
def test_opcheck(dtype, position, device):
    given = made(4, 10, 8, dtype, torch.float32, device)
    position = None if position is None else position.to(device)
    torch.library.opcheck(torch.ops.ntdne_kernels.update_bank_.default, (*given, 0.5, position))


@pytest.mark.slow
def test_compiles_into_one_graph_that_does_not_copy_the_bank(device):
    bank, features, index = made(4, 1000, 8, torch.float32, torch.float32, device)
    expected = bank.clone()
    update_bank_(expected, features * 2, index, 0.5)

    def step(bank: Tensor, features: Tensor, index: Tensor) -> None:
        update_bank_(bank, features * 2, index, 0.5)

    _, code = run_and_get_code(torch.compile(step, fullgraph=True), bank, features, index)
    assert torch.equal(bank, expected)
    # The op is given the graph's input itself, and the graph allocates nothing of its size.
    assert re.search(r"update_bank_\.default\(arg\d+_1,", code[0])
    assert not re.search(r"empty_strided\w*\(\(1000, 8\)", code[0])


def test_autocast_changes_nothing(device):
    bank, features, index = made(4, 10, 8, torch.float32, torch.float32, device)
    other = bank.clone()
    update_bank_(bank, features, index, 0.5)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        update_bank_(other, features, index, 0.5)
    assert torch.equal(bank, other)


def test_a_missing_compiled_kernel_is_said_once(monkeypatch):
    monkeypatch.setattr(bank_update, "_warned", set())
    monkeypatch.setattr(bank_update, "LOAD_ERRORS", {"cpu": "built without a C++ compiler"})
    bank, features, index = made(4, 10, 8, torch.float32, torch.float32, torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="right but slower: built without a C\\+\\+ compiler") as warned:
        bank_update.update_bank_in_pytorch(bank, features, index, 0.5)
        bank_update.update_bank_in_pytorch(bank, features, index, 0.5)
    assert len(warned) == 1


def test_large_features_do_not_lose_their_direction(update, device):
    bank = torch.eye(2, device=device)
    update(bank, torch.tensor([[3e18, 4e18]], device=device), torch.tensor([0], device=device), 0.0)
    torch.testing.assert_close(bank[0].cpu(), torch.tensor([0.6, 0.8]))
    assert math.isclose(float(bank[1, 1]), 1)
