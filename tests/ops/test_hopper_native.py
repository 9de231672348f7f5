"""The kernel for Hopper GPUs where there is one, against float64 and the portable kernel; and what it falls back to."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError

from ntdne_kernels.ops import gpu, reference, schema
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.gpu import configs
from ntdne_kernels.ops.gpu.configs import Device, hopper_tiles, hopper_width
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Batch
from tests.archives import Archive, batch_of

H200 = Device(capability=90, multiprocessors=132, shared=232_448)
needs_interpreter = pytest.mark.skipif(not gpu.launches.INTERPRETED, reason="the other way round needs no pretence")


@pytest.fixture
def fresh_plans():
    """Plans made before or in this test are not those of others."""
    gpu.launches.plan_of.cache_clear()
    yield
    gpu.launches.plan_of.cache_clear()


def in_class_order(B: int, N: int, D: int, C: int, device: str = "cuda", seed: int = 0) -> Batch:
    """A bfloat16 bank in class order, queries of its rows and others."""
    batch = batch_of(Archive(B, N, D, C, seed=seed, dtype=torch.bfloat16, device=device), "sorted index")
    assert isinstance(batch.layout, ClassOrder)
    return batch


def portable(batch: Batch, weighted: bool) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.launches, "hopper_serves", lambda _: False)
        return gpu.log_scores(batch, weighted)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("D", [64, 112, 128, 256])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("B", [17, 64, 65, 300])
def test_sums_are_those_of_the_portable_kernel_and_of_float64(B, D, weighted):
    """Ragged ends, single rows, more classes than rows in a tile, one class, queries of no class and of no row."""
    for N, C in ((1, 1), (5, 9), (127, 3), (129, 1), (3333, 300), (20_001, 45), (70_001, 2)):
        batch = in_class_order(B, N, D, C, seed=N)
        assert gpu.launches.hopper_serves(batch.bank)
        assert hopper_tiles(gpu.launches.describe(batch.bank.device), D, B) is not None
        log_p, direction, log_all = gpu.log_scores(batch, weighted)
        expected = portable(batch, weighted)
        torch.testing.assert_close(log_p, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(log_all, expected[2], rtol=1e-5, atol=1e-6)
        if weighted:
            assert (direction - expected[1]).norm() <= 1e-4 * expected[1].norm() + 1e-6
        exact = reference.log_scores(
            batch._replace(features=batch.features.bfloat16().double(), bank=batch.bank.double())
        )
        torch.testing.assert_close(log_p.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_results_repeat_bit_for_bit_also_where_sums_are_added_to_memory(monkeypatch, fresh_plans):
    monkeypatch.setattr(gpu.launches, "FOLD_ROWS", 1000)
    batch = in_class_order(200, 300_001, 128, 7)
    first = gpu.log_scores(batch, True)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, gpu.log_scores(batch, True), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("D", [64, 112, 128, 256])
@pytest.mark.parametrize("B", [17, 64, 65, 300])
def test_class_sums_are_those_of_the_portable_kernel_and_of_float64(B, D):
    """Empty classes, single rows, ragged ends, more classes than programs, queries of no row."""
    for N, C in ((1, 1), (129, 1), (3333, 300), (20_001, 45), (70_001, 2), (70_001, 2000)):
        batch = in_class_order(B, N, D, C, seed=N)
        offsets = torch.cat([batch.layout.offsets.new_zeros(2), batch.layout.offsets])  # the first class is empty
        given = batch.features.bfloat16(), batch.bank, batch.own, offsets
        found = gpu.class_log_sums(*given, 0.1, kernel="hopper")
        torch.testing.assert_close(found, gpu.class_log_sums(*given, 0.1), rtol=1e-6, atol=1e-6)
        exact = reference.class_log_sums(*(x.double() for x in given[:2]), *given[2:], 0.1)
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=2e-6)


@needs_interpreter
def test_class_sums_say_what_the_hopper_kernel_needs(monkeypatch):
    batch = in_class_order(20, 60, 128, 3, device="cpu")
    given = batch.features.bfloat16(), batch.bank, batch.own, batch.layout.offsets
    with pytest.raises(ValueError, match=r"kernel: 'hopper' needs a Hopper GPU, more than 16 queries"):
        gpu.class_log_sums(*given, 0.1, kernel="hopper")
    monkeypatch.setattr(gpu.launches, "hopper_serves", lambda _: True)
    with pytest.raises(ValueError, match=r"kernel: 'hopper' needs a sigma of at least 0\.03, got 0\.01"):
        gpu.class_log_sums(*given, 0.01, kernel="hopper")


@pytest.mark.parametrize(
    ("D", "B", "expected"),
    [(128, 256, (128, 128)), (128, 64, (64, 128)), (64, 65, (128, 128)), (256, 4096, (128, 64)), (96, 128, (128, 128)),
     (128, 16, None), (65, 256, None), (72, 256, None), (100, 256, None), (160, 256, None), (512, 256, None)],
)  # fmt: skip
def test_which_problems_take_the_kernel_and_with_which_tiles(D, B, expected):
    tiles = hopper_tiles(H200, D, B)
    assert (None if tiles is None else (tiles.block_b, tiles.block_n)) == expected
    if tiles is not None:
        width = hopper_width(D)
        assert 2 * width * (tiles.block_b + tiles.num_stages * tiles.block_n) <= H200.shared - 1024
        assert tiles.num_stages >= 4
    assert hopper_tiles(Device(100, 132, 232_448), D, B) is None


@needs_interpreter
def test_portable_kernel_takes_over_where_hopper_does_not_compile_said_once(monkeypatch, fresh_plans):
    """As after a change of Gluon: the first launch ends in an error of the compiler."""

    class Broken:
        arg_names = ()

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                raise CompilationError("", SimpleNamespace(lineno=1, col_offset=0), "no such layout")

            return launch

    batch = in_class_order(20, 60, 128, 3, device="cpu")
    batch.features[4], batch.features[9, 1] = 0, torch.nan
    images = schema.Archive(batch.labels, batch.own, torch.full((21,), torch.nan))
    batch = batch._replace(own=torch.arange(20))
    spec = LossSpec(0.7, None, "mean")
    expected = gpu.fused_loss(batch, images, spec, True)
    gpu.launches.plan_of.cache_clear()
    monkeypatch.setattr(
        gpu.launches,
        "hopper",
        SimpleNamespace(stream=Broken(), descriptors=lambda queries, bank, rows: (queries, bank)),
    )
    monkeypatch.setattr(gpu.launches, "hopper_serves", lambda bank: gpu.launches.hopper is not None)
    before = int(skipped_counter(torch.device("cpu")))
    with pytest.warns(RuntimeWarning, match="kernel for Hopper GPUs does not compile with triton") as said:
        found = gpu.fused_loss(batch, images, spec, True)
        assert int(skipped_counter(torch.device("cpu"))) == before + 2  # also where the step begins anew
        again = gpu.fused_loss(batch, images, spec, True)
    assert sum("Hopper" in str(warning.message) for warning in said) == 1
    for results in (found, again):
        torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)


def test_stages_are_as_many_as_fit():
    assert [hopper_tiles(H200, D, 256).num_stages for D in (64, 128, 256)] == [13, 6, 5]
    assert configs.HOPPER == 90
