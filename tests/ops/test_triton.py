"""What is particular to the Triton backend: how it cuts problems up, where it runs, and what it launches and allocates.

Its numbers are tested with those of the other backends in test_leave_one_out.py, here over ragged tiles, splits and
segments. Without a GPU all of it runs in Triton's interpreter.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ntdne_kernels import LabelIndex, functional
from ntdne_kernels.functional import leave_one_out_log_scores, ntdne_loss, snca_loss
from ntdne_kernels.ops import gpu, losses, reference, schema
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.gpu import configs, kernels
from ntdne_kernels.ops.gpu.configs import Config, Device, choose, class_tile, columns, split_count
from ntdne_kernels.ops.layout import ClassOrder, part_of
from ntdne_kernels.ops.look_up import look_up
from ntdne_kernels.ops.losses import LossSpec
from tests.archives import Archive, arguments, batch_of
from tests.ops.contract import check_error_of_archive
from tests.ops.cutting import small_chunks, small_pieces

H200 = Device(capability=90, multiprocessors=132, shared=232_448)
needs_interpreter = pytest.mark.skipif(not gpu.launches.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def loss_and_gradients(archive: Archive, by: str, backend: str, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    features, bank, labels, bank_labels, index = arguments(archive, by)
    features, bank = features.clone().requires_grad_(), bank.clone().requires_grad_()
    loss = ntdne_loss(features, bank, labels, bank_labels, index, backend=backend, **options)
    loss.backward()
    return loss.detach(), features.grad, bank.grad


@pytest.mark.slow
@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes in the interpreter
@given(
    B=st.integers(1, 35),
    N=st.integers(1, 90),
    D=st.sampled_from([1, 3, 16, 24, 40]),
    C=st.sampled_from([1, 2, 5, 90]),
    seed=st.integers(0, 99),
    sigma=st.sampled_from([0.1, 0.03, 0.02]),
    by=st.sampled_from(["labels", "index", "sorted index"]),
    splits=st.integers(1, 6),
    fold_rows=st.sampled_from([5, 33, 1 << 14]),
)
@needs_interpreter
def test_ragged_blocks_splits_tiles_and_segments_agree_with_the_reference(  # noqa: PLR0913  each is drawn
    B, N, D, C, seed, sigma, by, splits, fold_rows
):
    """Float64 sums, so that nothing but a wrong row or a wrong mask can differ."""
    archive = Archive(B, N, D, C, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, splits, fold_rows=fold_rows)
        found = loss_and_gradients(archive, by, "triton", sigma=sigma)
    torch.testing.assert_close(found, loss_and_gradients(archive, by, "reference", sigma=sigma), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("D", [96, 384, 768, 1000, 1024])
def test_wide_features_are_cut_into_two_parts(D, kernel_device, monkeypatch):
    small_pieces(monkeypatch, splits=2, block_n=32)
    archive = Archive(5, 70, D, 3, device=kernel_device, dtype=torch.float32)
    found = loss_and_gradients(archive, "sorted index", "triton")
    torch.testing.assert_close(found, loss_and_gradients(archive, "sorted index", "reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["labels", "index", "sorted index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_multiply_in_the_dtype_of_the_bank(by, dtype, feature_dtype, kernel_device):
    archive = Archive(9, 60, 20, 3, dtype=dtype, device=kernel_device)
    archive.features = archive.features.to(feature_dtype)
    exact = Archive(9, 60, 20, 3, device=kernel_device)
    exact.features, exact.bank = archive.features.to(dtype).double(), archive.bank.double()
    found, expected = loss_and_gradients(archive, by, "triton"), loss_and_gradients(exact, by, "reference")
    assert found[1].dtype == feature_dtype
    assert found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-6, atol=2e-6)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for x, y, kind in ((found[1], expected[1], feature_dtype), (found[2], expected[2], dtype)):
        error = (x.double() - y).norm() / y.norm()
        assert error <= max(tolerance[dtype], tolerance[kind])


def class_ranges(archive: Archive, C: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, bank and index of the archive, and (C + 1,) ends of C classes of any sizes, also of no row."""
    bank, N = archive.bank, len(archive.bank)
    ends = torch.randint(0, N + 1, (C - 1,), generator=torch.Generator().manual_seed(seed)).sort().values
    offsets = torch.tensor([0, *ends.tolist(), N], device=bank.device)
    return archive.features.to(bank.dtype), bank, archive.index, offsets


@pytest.mark.slow
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    B=st.integers(0, 35),
    N=st.integers(1, 90),
    D=st.sampled_from([1, 3, 16, 24, 40]),
    C=st.sampled_from([1, 2, 7, 30]),
    seed=st.integers(0, 99),
    sigma=st.sampled_from([0.1, 0.03, 0.001]),
    programs=st.sampled_from([1, 8]),
)
@needs_interpreter
def test_class_log_sums_over_ragged_blocks_tiles_and_classes_agree_with_the_reference(
    B, N, D, C, seed, sigma, programs
):
    """Float64 sums, so that nothing but a wrong row or a wrong mask can differ."""
    given = class_ranges(Archive(B, N, D, seed=seed), C, seed)
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, splits=1)
        patch.setattr(gpu, "PROGRAMS_PER_MULTIPROCESSOR", 1)
        patch.setattr(gpu.launches, "describe", lambda _: Device(90, programs, 1 << 14))
        found = gpu.class_log_sums(*given, sigma)
    assert found.shape == (B, C)
    torch.testing.assert_close(found, reference.class_log_sums(*given, sigma), rtol=1e-12 / sigma, atol=1e-13 / sigma)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.03, 0.001])
@pytest.mark.parametrize("clustered", [False, True])
def test_error_of_class_log_sums_is_at_most_twice_that_of_plain_pytorch(dtype, sigma, clustered, kernel_device):
    archive = Archive(B=64, N=1000, D=48, dtype=dtype, device=kernel_device)
    if clustered:  # cosines near 1
        archive.bank = torch.nn.functional.normalize(archive.bank[:1].float() + 0.05 * archive.bank.float()).to(dtype)
        archive.features = archive.bank[archive.index.clamp(min=0)]
    features, bank, index, offsets = class_ranges(archive, C=6)
    found = gpu.class_log_sums(features, bank, index, offsets, sigma)
    truth = reference.class_log_sums(features.double(), bank.double(), index, offsets, sigma)
    logits = (features @ bank.t()).float() / sigma
    logits[torch.arange(1000, device=logits.device) == index.unsqueeze(1)] = -torch.inf
    sizes = offsets.diff().tolist()
    plain = torch.stack([torch.logsumexp(rows, dim=1) for rows in logits.split(sizes, dim=1)], dim=1)
    assert found.dtype == torch.float64
    epsilon = torch.finfo(torch.float32).eps / sigma  # one rounding of s/σ
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max() + epsilon


@pytest.mark.parametrize("own", [4, 5, 20, 21, 44])
def test_class_log_sums_leave_out_a_query_also_where_the_tile_before_had_passed_it(own, kernel_device, monkeypatch):
    """A class ends inside a tile of 16, whose last rows are the first of the next class."""
    small_pieces(monkeypatch, splits=1)
    monkeypatch.setattr(gpu, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(gpu.launches, "describe", lambda _: Device(90, 1, 1 << 14))
    bank = torch.zeros((48, 4), dtype=torch.float64, device=kernel_device)
    index, offsets = torch.tensor([own], device=kernel_device), torch.tensor([0, 5, 45, 48], device=kernel_device)
    counts = gpu.class_log_sums(bank[:1], bank, index, offsets, 0.1).exp()
    expected = [5 - (own < 5), 40 - (own >= 5), 3]
    torch.testing.assert_close(counts.cpu(), torch.tensor([expected], dtype=torch.float64))


def test_class_log_sums_lose_no_terms_smaller_than_a_rounding_of_their_sum(kernel_device, monkeypatch):
    """20 tiles of 0.4 roundings each: added one after the other to a float32 all would be lost, 10^−6 together."""
    small_pieces(monkeypatch, splits=1)
    towards, far = torch.tensor([1.0, 0.0]), torch.tensor([-0.685, 0.0])
    bank = torch.stack([towards] * 16 + [far] * 320).to(kernel_device)
    index, offsets = torch.tensor([-1], device=kernel_device), torch.tensor([0, 336], device=kernel_device)
    lost = math.log1p(20 * math.exp(-1.685 / 0.1))
    assert lost > 9e-7
    found = gpu.class_log_sums(bank[:1], bank, index, offsets, 0.1)
    assert abs(found.item() - (10 + math.log(16) + lost)) < 1e-7


def test_class_log_sums_of_strided_tensors_are_those_of_their_copies(kernel_device, monkeypatch):
    small_pieces(monkeypatch, splits=1)
    given = class_ranges(Archive(20, 100, 12, dtype=torch.bfloat16, device=kernel_device), C=7)
    expected = gpu.class_log_sums(*given, 0.1)
    rows_apart = [x.repeat_interleave(2, dim=0)[::2] for x in given]
    columns_apart = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in given]
    for apart in (rows_apart, columns_apart):
        assert torch.equal(gpu.class_log_sums(*apart, 0.1), expected)


@pytest.mark.parametrize(("B", "N", "C"), [(0, 9, 2), (3, 0, 2), (3, 9, 0), (1, 1, 1)])
def test_class_log_sums_of_no_query_no_row_and_no_class(B, N, C, kernel_device):
    features, bank = torch.ones(B, 4, device=kernel_device) / 2, torch.ones(N, 4, device=kernel_device) / 2
    index, offsets = torch.zeros(B, device=kernel_device).long(), torch.tensor([0, N, N][: C + 1]).to(kernel_device)
    found = gpu.class_log_sums(features, bank, index, offsets, 0.1)
    assert found.shape == (B, C)
    assert (found == -torch.inf).all()  # the one row there is is the query itself


@pytest.mark.slow
def test_class_log_sums_are_one_launch_and_nothing_of_the_size_of_batch_times_bank(launches, kernel_device):
    given = class_ranges(Archive(64, 400, 1, dtype=torch.float32, device=kernel_device), C=5)
    with _Allocations() as seen:
        gpu.class_log_sums(*given, 0.1)
    assert [name for name, _ in launches] == ["class_log_sums"]
    assert seen.largest < 64 * 400 / 4


INSIDE = {
    torch.ops.ntdne_kernels.triton_log_scores.default: gpu._log_scores,
    torch.ops.ntdne_kernels.triton_class_sums.default: gpu._class_sums,
    torch.ops.ntdne_kernels.triton_bank_gradient.default: gpu._bank_gradient,
    torch.ops.ntdne_kernels.triton_loss.default: gpu._loss,
}


class _Allocations(TorchDispatchMode):
    """Operators that ran, those inside the package's own too, and the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INSIDE:
            with self:
                flat, rest = args[: schema.BATCH_LENGTH], args[schema.BATCH_LENGTH :]
                return INSIDE[func](schema.Batch.of(*flat), *rest, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class _Recorded:
    """A kernel that notes each launch and what is compiled into it."""

    def __init__(self, name: str, notes: list[tuple[str, dict]]) -> None:
        self.name, self.kernel, self.notes = name, getattr(kernels, name), notes

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.notes.append((self.name, kwargs))
            with _disable_current_modes():  # the interpreter copies tensors
                return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """The kernels that are launched, in order, with what is compiled into them."""
    notes: list[tuple[str, dict]] = []
    original = gpu.launches.Launch.__call__

    def noted(self, stream, *arguments):
        notes.append((self.kernel.fn.__name__, self.constants))
        with _disable_current_modes():
            original(self, stream, *arguments)

    monkeypatch.setattr(gpu.launches.Launch, "__call__", noted)
    for name in ("gradient_to_bank", "class_log_sums"):
        monkeypatch.setattr(kernels, name, _Recorded(name, notes))
    return notes


# On a GPU these only describe or allocate memory.
NO_LAUNCH = ("empty", "detach", "view", "unbind", "as_strided", "alias")
SORTING = ["aten.sort.stable", "aten.arange.default", "aten.scatter_.src"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("by", ["labels", "index", "sorted index"])
def test_three_launches_and_a_product_from_features_to_their_gradient(
    by, reduction, launches, kernel_device, monkeypatch
):
    for module in ("functional", "arguments"):
        monkeypatch.setattr(f"ntdne_kernels.{module}.can_look_inside", lambda _, look=False: look)  # as on a GPU
    skipped_counter(kernel_device)  # made once for the whole program
    features, *rest = arguments(Archive(9, 60, 8, dtype=torch.bfloat16, device=kernel_device), by)
    features.requires_grad_()
    with _Allocations() as seen:
        ntdne_loss(features, *rest, k=0.3, reduction=reduction, backend="triton").backward()
    others = [name for name in seen.operators if not any(word in name for word in NO_LAUNCH)]
    # ones_like is where autograd begins
    assert others == [*(SORTING if by == "labels" else []), "aten.ones_like.default", "aten.mul.Tensor"]
    assert [name for name, _ in launches] == ["prepare", "stream", "merge_to_log_scores"]


def test_without_gradients_half_the_work_is_left_out(launches, kernel_device):
    features, *rest = arguments(Archive(device=kernel_device), "index")
    for requires_grad in (True, False):
        with torch.no_grad():
            leave_one_out_log_scores(features.requires_grad_(requires_grad), *rest, backend="triton")
    leave_one_out_log_scores(features, *rest, backend="triton")
    assert [given["WEIGHTED"] for name, given in launches if "WEIGHTED" in given] == [False] * 6
    leave_one_out_log_scores(features.requires_grad_(), *rest, backend="triton")
    assert [given["WEIGHTED"] for name, given in launches[-2:]] == [True, True]


@pytest.mark.parametrize("need_means", [True, False])
def test_three_launches_for_a_part_of_a_bank_and_none_for_a_part_without_rows(need_means, launches, kernel_device):
    batch = batch_of(Archive(device=kernel_device), "sorted index")
    gpu.class_sums(batch._replace(bank=batch.bank[:0], layout=part_of(batch.layout, 0, 0)), need_means)
    no_queries = {"features": batch.features[:0], "labels": batch.labels[:0], "own": batch.own[:0]}
    gpu.class_sums(batch._replace(**no_queries), need_means)
    assert launches == []
    gpu.class_sums(batch, need_means)
    assert [name for name, _ in launches] == ["prepare", "stream", "merge_to_class_sums"]
    assert [given["WEIGHTED"] for _, given in launches[1:]] == [need_means] * 2


@pytest.mark.slow
@pytest.mark.parametrize("by", ["labels", "sorted index"])
@pytest.mark.usefixtures("launches")  # which hide what the interpreter copies
def test_nothing_of_the_size_of_batch_times_bank_is_allocated(by, kernel_device):
    B, N, D = 33, 2000, 4
    features, *rest = arguments(Archive(B, N, D, dtype=torch.float32, device=kernel_device), by)
    features.requires_grad_()
    with _Allocations() as seen:
        ntdne_loss(features, *rest, backend="triton").backward()
    assert seen.largest < B * N / 4


def far_apart(rows: Tensor, file: Path) -> Tensor:
    """The bfloat16 rows in a sparse file, as far from each other as the kernels take them."""
    (N, D), stride = rows.shape, gpu.launches.LARGEST_STRIDE
    with open(file, "wb") as opened:
        opened.truncate(2 * N * stride)
    memory = torch.from_file(str(file), shared=True, size=N * stride, dtype=torch.bfloat16)
    return memory.as_strided((N, D), (stride, 1)).copy_(rows)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("by", ["index", "sorted index", "labels"])
def test_rows_behind_two_to_the_31_elements(by, splits, tmp_path, monkeypatch):
    """The last rows lie 5·10^9 elements behind the first: 64-bit offsets find them."""
    small_pieces(monkeypatch, splits=splits)
    N = 600
    assert (
        1 << 31
    ) // gpu.launches.LARGEST_STRIDE < 300  # in the first of one or two splits, and before the second begins
    archive = Archive(9, N, 16, 4, dtype=torch.bfloat16)
    features, rows, labels, bank_labels, index = arguments(archive, by)
    bank = far_apart(rows, tmp_path / "bank")
    results = []
    for stored in (bank, rows):
        queries, stored = features.clone().requires_grad_(), stored.detach().requires_grad_()
        log_p = leave_one_out_log_scores(queries, stored, labels, bank_labels, index, backend="triton")
        log_p[log_p > -torch.inf].sum().backward()
        results.append((log_p.detach(), queries.grad, stored.grad))
    assert all(torch.equal(far, near) for far, near in zip(*results, strict=True))


@pytest.mark.slow
@needs_interpreter
def test_class_log_sums_of_rows_behind_two_to_the_31_elements(tmp_path, monkeypatch):
    small_pieces(monkeypatch, splits=1, block_n=64)
    N = 300
    assert (N - 40) * gpu.launches.LARGEST_STRIDE > 1 << 31
    features, rows, index, _ = class_ranges(Archive(9, N, 16, dtype=torch.bfloat16), C=1)
    offsets = torch.tensor([0, 10, 270, 300])
    found = gpu.class_log_sums(features, far_apart(rows, tmp_path / "bank"), index, offsets, 0.1)
    assert torch.equal(found, gpu.class_log_sums(features, rows, index, offsets, 0.1))


def test_a_changing_batch_is_no_new_kernel():
    """Sizes are not specialised on, and batches share blocks of queries."""
    for kernel in (
        kernels.prepare,
        kernels.stream,
        kernels.merge_to_log_scores,
        kernels.merge_to_class_sums,
        kernels.record,
        kernels.gradient_to_bank,
        kernels.class_log_sums,
    ):
        names = {kernel.arg_names.index(name) for name in ("B", "N", "C", "splits") if name in kernel.arg_names}
        skipped = kernel.do_not_specialize if gpu.launches.INTERPRETED is False else kernel.kwargs["do_not_specialize"]
        assert {kernel.arg_names.index(n) if isinstance(n, str) else n for n in skipped} >= names
    assert len({choose(H200, "stream", "16-bit", 128, B) for B in range(65, 5000)}) == 1
    assert len({choose(H200, "stream", "16-bit", 128, B) for B in range(17, 65)}) == 1


@pytest.mark.parametrize(
    ("D", "parts"),
    [(1, (16, 0)), (16, (16, 0)), (17, (32, 0)), (100, (128, 0)), (128, (128, 0)), (384, (256, 128)), (768, (512, 256)),
     (640, (512, 128)), (1000, (1024, 0)), (1024, (1024, 0))],
)  # fmt: skip
def test_columns_are_powers_of_two_and_no_more_than_needed(D, parts):
    assert columns(D) == parts


def test_every_width_has_two_powers_of_two():
    for D in range(1, 1025):
        D1, D2 = columns(D)
        assert D1 + D2 >= D
        assert D1 & (D1 - 1) == D2 & (D2 - 1) == 0
        assert max(16, 2 * D - 1) >= D1 + D2
        assert D2 == 0 or D > D1


@pytest.mark.parametrize(
    ("rows_per_class", "width"), [(0, 16), (1, 16), (31, 16), (32, 32), (63, 32), (64, 64), (100_000, 64)]
)
def test_tiles_are_no_wider_than_most_classes(rows_per_class, width):
    assert class_tile(Config(128, 128, 8, 3, 131_088), 45 * rows_per_class, 45) == width
    assert class_tile(Config(128, 16, 8, 3, 50_208), 45 * rows_per_class, 45) == 16


def test_splits_fill_the_device_and_no_more():
    config = Config(128, 128, 8, 3, 131_088)
    assert split_count(H200, config, B=256, N=1_000_000, D=128) == 66
    assert split_count(H200, config, B=4096, N=1_000_000, D=128) == 4
    assert split_count(H200, config, B=256, N=100, D=128) == 1


@settings(max_examples=100)
@given(
    B=st.sampled_from([1, 16, 64, 100, 1024, 70_000]),
    N=st.sampled_from([1, 127, 10_000, 1_000_000, 100_000_000, 3 << 31]),
    D=st.sampled_from([16, 128, 1024]),
    multiprocessors=st.sampled_from([4, 58, 108, 132]),
)
def test_splits_cover_the_bank_within_bounds(B, N, D, multiprocessors):
    device = Device(90, multiprocessors, 232_448)
    config = choose(device, "stream", "16-bit", D, B)
    splits = split_count(device, config, B, N, D)
    partial_sums = splits * triton.cdiv(B, config.block_b) * config.block_b * 2 * (D + 2) * 4
    assert splits == 1 or partial_sums <= 32 << 20 or N > 1 << 30
    assert -(-N // splits) < 1 << 31
    assert splits <= max(-(-N // config.block_n), 1)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_device_has_tiles_that_fit_it_up_to_its_largest_width(capability, dtype):
    """Unknown devices take those of the one with the smallest shared memory."""
    device = Device(capability, 100, {80: 166_912, 90: 232_448, 100: 232_448}.get(capability, 101_376))
    arithmetics = {torch.float32: ("tf32", "ieee"), torch.float64: ("fp64",)}.get(dtype, ("16-bit",))
    largest = configs.largest_D(capability, dtype)
    assert largest >= {2: 1024, 4: 512, 8: 128}[dtype.itemsize]
    for kernel, arithmetic, D, rows in itertools.product(
        ("stream", "gradient"), arithmetics, (1, 100, 128, largest * 3 // 4, largest), (1, 64, 1000)
    ):
        assert 0 < choose(device, kernel, arithmetic, D, rows).shared <= device.shared


def chosen(name: str | None, device: str, D: int = 128) -> str:
    """The backend for a float32 bank on a device that need not be here: as much of one as the choice looks at."""
    bank = SimpleNamespace(device=torch.device(device), dtype=torch.float32, size=lambda _: D)
    return functional.choose_backend(name, bank, bank.device)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend to have a GPU of some compute capability."""

    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(gpu.launches, "INTERPRETED", False)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(functional, "_said", set())
        device = Device(10 * major + minor, 132, 227 << 10)
        monkeypatch.setattr(gpu.launches, "describe", lambda _: device)

    return of


@pytest.mark.parametrize("name", [None, "triton"])
def test_a_bank_in_host_memory_is_served_by_the_device_of_the_features(name, pretend_gpu):
    pretend_gpu(9, 0)
    with FakeTensorMode():
        assert functional.choose_backend(name, torch.empty(9, 8), torch.device("cuda")) == "triton"


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_with_tensor_core_code_take_triton(major, minor, pretend_gpu):
    pretend_gpu(major, minor)
    assert chosen(None, "cuda") == chosen("triton", "cuda") == "triton"


def test_older_gpus_take_streaming_which_is_said_once(pretend_gpu):
    pretend_gpu(7, 5)
    with pytest.warns(UserWarning, match=r"streams through PyTorch.*8\.0 or newer, got 7\.5"):
        assert chosen(None, "cuda") == "streaming"
    assert chosen(None, "cuda") == "streaming"  # a warning would be an error here
    with pytest.raises(
        ValueError, match=r"backend: 'triton' needs a GPU of compute capability 8\.0 or newer, got 7\.5"
    ):
        chosen("triton", "cuda")


def test_more_columns_than_the_kernels_have_take_streaming(pretend_gpu):
    pretend_gpu(9, 0)
    with pytest.warns(UserWarning, match=r"at most \d+ columns of torch.float32 on this device, got 2000"):
        assert chosen(None, "cuda", D=2000) == "streaming"


def test_cpu_tensors_take_streaming_and_triton_only_in_the_interpreter(monkeypatch):
    assert chosen(None, "cpu") == "streaming"
    monkeypatch.setattr(gpu.launches, "INTERPRETED", True)
    assert chosen("triton", "cpu") == "triton"
    monkeypatch.setattr(gpu.launches, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend: 'triton' needs an NVIDIA GPU .*, got cpu"):
        chosen("triton", "cpu")


def test_float32_products_follow_pytorchs_own_setting():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert gpu.launches.arithmetic_of(torch.float32) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert gpu.launches.arithmetic_of(torch.bfloat16) == gpu.launches.arithmetic_of(torch.float16) == "16-bit"


LOSSES = [(None, None), (0.7, None), (0.7, 0.3), (1e-6, None), (1.0, 0.05)]


def images(
    B: int, device: torch.device, dtype: torch.dtype = torch.float32, sigma: float = 0.1
) -> tuple[schema.Batch, schema.Archive]:
    """A batch and its archive: images with scores of every size, some of them known before.

    The 43 images stand on a circle, class by class, one class of a single image; queries stand anywhere, have any
    length and any class, in the archive or not.
    """
    made = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.arange(42) % 3, torch.tensor([3])])[torch.randperm(43, generator=made)]
    classes, offsets, order, position = LabelIndex.from_labels(labels).layout
    angle = 2 * labels[order] + 0.2 * torch.randn(43, generator=made)
    bank = torch.stack([angle.cos(), angle.sin()], dim=1).to(dtype)
    index = torch.randint(0, 43, (B,), generator=made)
    index[3::10], index[4::5] = labels.argmax(), -1
    given = torch.randint(-1, 6, (B,), generator=made)
    near = 2 * torch.where(index >= 0, labels[index.clamp(min=0)], given)
    angle = torch.where(torch.arange(B) % 2 == 0, near, 7 * torch.rand(B, generator=made))
    length = torch.exp(3 * torch.randn(B, 1, generator=made))
    features = (torch.stack([angle.cos(), angle.sin()], dim=1) * length).to(dtype)
    scores = -torch.rand(44, generator=made).mul(3).to(dtype)
    scores[::5], scores[1::5] = torch.nan, -torch.inf
    tensors = features, bank, given, index, classes, offsets, labels, position, scores
    features, bank, given, index, classes, offsets, *archive = (x.to(device) for x in tensors)
    batch = schema.Batch(features, bank, given, index, ClassOrder(classes, offsets), sigma)
    return batch, schema.Archive(*archive)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("q", "k"), LOSSES)
@pytest.mark.parametrize(("indicator", "unit"), [("current", None), ("stored", 1.7), ("auto", None), ("auto", 1.0)])
@pytest.mark.parametrize("B", [0, 1, 40, pytest.param(1500, marks=pytest.mark.gpu)])
def test_the_fused_op_is_the_loss_and_its_derivative(reduction, q, k, indicator, unit, B, kernel_device, monkeypatch):
    """Values to a rounding, derivatives to those of autograd through the definition, of the scores that it returns."""
    if k is None and indicator != "current":
        pytest.skip("nothing is pruned")
    if B == 40:
        small_chunks(monkeypatch)
    batch, archive = images(B, kernel_device, sigma=0.07)
    spec = LossSpec(q, k, reduction, indicator, unit)
    value, log_p, slope, _, _ = gpu.fused_loss(batch, archive, spec, False)
    queries = look_up(batch, archive, spec)
    exact = log_p.double().requires_grad_()
    expected = losses.value(exact, queries.indicator, spec, queries.counted, queries.log_chance)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-7, atol=0)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=3e-7, atol=0)
    if B >= 40:
        assert (log_p == -torch.inf).any()
        assert log_p[log_p > -torch.inf].min() < -8
        assert log_p.max() > -1e-6
        assert k is None or 0 < int((slope == 0).sum()) < B


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "spec",
    [LossSpec(None, None, ""), LossSpec(0.7, 0.3, "", "stored"), LossSpec(0.7, 0.3, "", "auto", 1.7)],
    ids=lambda spec: f"{spec.q}-{spec.indicator}",
)
@pytest.mark.parametrize("with_labels", [True, False])
def test_the_fused_op_is_one_step_after_the_other(spec, reduction, with_labels, kernel_device, monkeypatch):
    """All that it returns, the gradient of features of any length too, is what the definition makes in float64."""
    small_chunks(monkeypatch)
    small_pieces(monkeypatch, splits=2)
    batch, archive = images(40, kernel_device, torch.float64)
    batch.features[5], batch.features[6, 0], batch.features[7, 1] = 0, torch.nan, torch.inf
    if not with_labels:
        batch = batch._replace(labels=None)
    given = batch, archive, dataclasses.replace(spec, reduction=reduction), True
    plain = dataclasses.replace(BACKENDS["streaming"], fused_loss=None)
    names = ("loss", "log p", "slope", "gradient", "log of all")
    for name, found, expected in zip(names, gpu.fused_loss(*given), plain.loss_and_gradient(*given), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=1e-12, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("q", "reduction"), [(0.7, "mean"), (None, "sum")])
def test_losses_of_more_queries_than_are_added_at_a_time(q, reduction, kernel_device):
    """300 need two rounds of the last program."""
    spec = LossSpec(q, None, reduction)
    value, log_p, *_ = gpu.fused_loss(*images(300, kernel_device), spec, False)
    expected = losses.value(log_p.double(), None, spec)
    torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["labels", "index", "sorted index"])
@pytest.mark.parametrize("C", [1, 2, 30])
def test_labels_need_not_be_running_numbers(C, by, kernel_device):
    """Queries have labels below, between and above those of the bank, which are searched for."""
    made = torch.Generator().manual_seed(C)
    names = torch.cat([torch.randint(1, 1 << 40, (C - 1,), generator=made), torch.tensor([(1 << 62) + 1])])
    archive = Archive(24, 80, 8, C, device=kernel_device, unlabelled=False)
    named = names.to(kernel_device)[archive.bank_labels]
    labels = torch.where(archive.index >= 0, named[archive.index], -1)
    labels[::6] = torch.tensor([0, 5, (1 << 62), (1 << 62) + 2], device=kernel_device)
    archive.bank_labels, archive.labels = torch.where(named == named[0], -1, named), labels
    found = leave_one_out_log_scores(*arguments(archive, by), backend="triton")
    expected = leave_one_out_log_scores(*arguments(archive, by), backend="reference")
    assert C == 1 or (expected > -torch.inf).any()
    torch.testing.assert_close(found, expected)


def test_an_upstream_gradient_that_is_not_finite_spares_queries_without_positives(kernel_device):
    archive = Archive(3, 12, 4, 2, device=kernel_device)
    archive.labels[:] = torch.tensor([0, -1, 77])
    features = archive.features.requires_grad_()
    losses_of = snca_loss(features, *archive.arguments()[1:], reduction="none", backend="triton")
    losses_of.backward(torch.tensor([1.0, torch.nan, torch.inf], dtype=losses_of.dtype, device=features.device))
    assert features.grad[0].norm() > 0
    assert torch.equal(features.grad[1:], torch.zeros_like(features.grad[1:]))


@pytest.mark.slow
def test_queries_of_many_classes_in_any_order(kernel_device):
    """Sorting queries by class is inside the kernels; results come back in the order of the batch."""
    archive = Archive(150, 400, 8, 60, device=kernel_device, dtype=torch.float32)
    index = LabelIndex.from_labels(archive.bank_labels)
    given = (archive.features, archive.bank, archive.labels, index, archive.index)
    expected = leave_one_out_log_scores(*given, backend="streaming")
    torch.testing.assert_close(leave_one_out_log_scores(*given, backend="triton"), expected, rtol=1e-5, atol=1e-5)
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    shuffled = (archive.features[shuffle], archive.bank, archive.labels[shuffle], index, archive.index[shuffle])
    torch.testing.assert_close(
        leave_one_out_log_scores(*shuffled, backend="triton"), expected[shuffle], rtol=1e-5, atol=1e-5
    )


def test_triton_is_one_of_the_backends():
    assert BACKENDS["triton"] is gpu.TRITON


@pytest.mark.gpu
def test_a_bank_of_more_than_two_to_the_31_elements():
    """17 million rows: the positives stand at the end, where 32-bit offsets would not reach."""
    N, D = (1 << 31) // 128 + 100_000, 128
    made = torch.Generator("cuda").manual_seed(0)
    bank = torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
    for chunk in bank.split(1 << 20):
        chunk.copy_(torch.nn.functional.normalize(torch.randn(chunk.shape, generator=made, device="cuda"), dim=1))
    bank_labels = torch.zeros(N, dtype=torch.int64, device="cuda")
    bank_labels[-64:] = 1
    index = torch.arange(N - 64, N, device="cuda")
    labels = bank_labels[index]
    results = []
    for backend in ("triton", "streaming"):
        features = bank[index].float().requires_grad_()
        log_p = leave_one_out_log_scores(
            features, bank, labels, LabelIndex.from_labels(bank_labels), index, backend=backend
        )
        log_p.sum().backward()
        results.append((log_p.detach(), features.grad))
    (log_p, gradient), (expected_log_p, expected_gradient) = results
    torch.testing.assert_close(log_p, expected_log_p, rtol=1e-3, atol=1e-3)
    # The backends round other weights to bfloat16, exp(x) and exp(x − 1/σ): single numbers differ by up to 2e-3.
    assert (gradient - expected_gradient).norm() <= 1e-2 * expected_gradient.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["labels", "index", "sorted index"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize(("B", "C"), [(300, 45), (300, 2), (48, 45), (5, 45)])
def test_error_over_a_large_bank_is_at_most_twice_that_of_plain_pytorch(B, C, dtype, by):
    """Each block of the table of tile shapes, in many splits whose last tile is ragged."""
    from benchmarks import contract

    with contract.arithmetic(dtype):
        archive = Archive(B, 300_001, 128, C, dtype=contract.DTYPES[dtype], device="cuda", unlabelled=False)
        archive.index.clamp_(min=0)
        archive.labels = archive.bank_labels[archive.index]
        check_error_of_archive(archive, by, "triton", sigma=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["labels", "index", "sorted index"])
def test_a_captured_graph_replays_with_other_features(by):
    features, *rest = arguments(Archive(64, 5000, 32, 8, dtype=torch.bfloat16, device="cuda"), by)
    static = features.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ntdne_loss(static, *rest, k=0.3).backward()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ntdne_loss(static, *rest, k=0.3)
        loss.backward()
    for other in (features, features.flip(0)):
        with torch.no_grad():
            static.copy_(other)
        graph.replay()
        expected = other.clone().requires_grad_()
        value = ntdne_loss(expected, *rest, k=0.3)
        value.backward()
        assert torch.equal(loss, value)
        assert torch.equal(static.grad, expected.grad)


@pytest.mark.usefixtures("capturing")
def test_a_kernel_is_not_compiled_in_a_cuda_graph():
    launch = gpu.launches.Launch(kernels.record, (1,), BLOCK=64)
    with pytest.raises(RuntimeError, match="CUDA graph: the kernel record has not run for such arguments yet; run the"):
        launch(0)
    assert launch.compiled is None


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other():
    problems = [Archive(100, 20_000, 64, 9, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (0, 1)]
    given = [arguments(problem, "sorted index") for problem in problems]
    alone = [leave_one_out_log_scores(*one) for one in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    together: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for stream, one, found in zip(streams, given, together, strict=True):
            with torch.cuda.stream(stream):
                found.append(leave_one_out_log_scores(*one))
    torch.cuda.synchronize()
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(one, expected) for one in found)


@pytest.mark.gpu
def test_a_step_does_not_synchronise():
    features, *rest = arguments(Archive(64, 5000, 32, 8, dtype=torch.bfloat16, device="cuda"), "sorted index")
    features.requires_grad_()
    ntdne_loss(features, *rest).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ntdne_loss(features, *rest, k=0.3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
