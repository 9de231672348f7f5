"""Sums of queries over a part of the bank, in every backend: parts of any sizes add up to the whole."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.ops import reference
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.class_sums import ClassSums, add_part, contribution, log_scores_of
from ntdne_kernels.ops.layout import ClassOrder, PlainLabels
from ntdne_kernels.ops.leave_one_out import GradientInForward
from ntdne_kernels.ops.schema import Batch
from ntdne_kernels.ops.streaming import STREAMING
from tests.archives import Archive, batch_of
from tests.ops import contract
from tests.ops.cutting import small_pieces, small_tiles


def parts_of(
    class_sums: Callable[[Batch, bool], tuple[Tensor, Tensor, Tensor, Tensor]],
    cuts: tuple[float, ...],
    batch: Batch,
    need_means: bool,
) -> Iterator[ClassSums]:
    """Of the bank cut at these shares of its rows, which stand in class order or have plain labels."""
    bank, own = batch.bank, batch.own
    for begin, end in pairwise([0, *(int(cut * len(bank)) for cut in cuts), len(bank)]):
        place = torch.where((own >= begin) & (own < end), own - begin, -1)
        if isinstance(batch.layout, PlainLabels):
            here = PlainLabels(batch.layout.row_labels[begin:end])
        else:
            here = ClassOrder(batch.layout.classes, (batch.layout.offsets - begin).clamp(0, end - begin))
        yield ClassSums(*class_sums(batch._replace(bank=bank[begin:end], own=place, layout=here), need_means))


def in_parts(
    class_sums: Callable[[Batch, bool], tuple[Tensor, Tensor, Tensor, Tensor]], cuts: tuple[float, ...]
) -> Callable[[Batch, bool], tuple[Tensor, Tensor, Tensor]]:
    """`GradientInForward.log_scores` that adds parts up."""

    def log_scores(batch: Batch, need_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
        sums = None
        for part in parts_of(class_sums, cuts, batch, need_direction):
            sums = add_part(sums, part)
        return log_scores_of(sums, batch.sigma, accumulator_dtype(batch.bank.dtype))

    return log_scores


@pytest.fixture(params=["labels", "sorted index"])
def by(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    params=[
        pytest.param((), id="1 part", marks=pytest.mark.slow),
        pytest.param((0.35,), id="2 parts"),
        pytest.param((0.0, 0.1, 0.35, 0.35, 0.4, 0.8, 1.0), id="5 parts and 3 without rows", marks=pytest.mark.slow),
    ]
)
def cuts(request: pytest.FixtureRequest) -> tuple[float, ...]:
    return request.param


@pytest.fixture
def backend(backend: str, cuts: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that never sees more than a part of the bank."""
    class_sums = BACKENDS[backend].class_sums
    bank_gradient = getattr(BACKENDS[backend], "bank_gradient", STREAMING.bank_gradient)
    parts = GradientInForward(in_parts(class_sums, cuts), class_sums, STREAMING.class_log_sums, bank_gradient)
    monkeypatch.setitem(BACKENDS, "in parts", parts)
    return "in parts"


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.03, 0.01])
def test_log_p_and_both_gradients_in_parts_are_those_of_the_formulas(backend, by, sigma, device, monkeypatch):
    small_tiles(monkeypatch)
    contract.check_scores_and_gradients(backend, by, sigma, device)


def test_far_positives_in_parts_have_a_finite_score(backend, by, device):
    contract.check_far_positives(backend, by, device)


def test_query_without_positives_in_parts_has_minus_infinity(backend, by, device):
    contract.check_queries_without_positives(backend, by, device)


def test_empty_batch_in_parts(backend, by, device):
    contract.check_empty_batch(backend, by, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.05, 0.02])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("by", "cuts"), [("sorted index", (0.35,))])
def test_error_is_at_most_twice_that_of_plain_pytorch_also_in_parts(backend, by, dtype, sigma, clustered, device):
    contract.check_error(backend, by, dtype, sigma, clustered, device)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_parts_add_up_to_the_scores_of_the_whole_bank(fused, by, cuts, sigma, device):
    """log p, its gradient and log Σ_all, in float64."""
    ops = BACKENDS[fused]
    given = batch_of(Archive(device=device), by, sigma), True
    found, expected = in_parts(ops.class_sums, cuts)(*given), ops.log_scores(*given)  # type: ignore[attr-defined]
    assert (expected[0] == -torch.inf).any()
    assert (expected[0] > -torch.inf).any()
    torch.testing.assert_close(found, expected, rtol=1e-13 / sigma, atol=1e-13 / sigma)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_contributions_of_the_parts_add_up_to_the_gradient(backend, by, cuts, sigma, device):
    ops = BACKENDS[backend]
    given = batch_of(Archive(device=device), by, sigma), True
    parts = list(parts_of(ops.class_sums, cuts, *given))
    log_same, log_other = (torch.stack(sums).logsumexp(dim=0) for sums in list(zip(*parts, strict=True))[:2])
    added = sum(contribution(part, log_same, log_other, sigma) for part in parts)
    _, direction, _ = STREAMING.log_scores(*given)
    assert direction.norm() > 0.1
    torch.testing.assert_close(added, direction, rtol=1e-12 / sigma, atol=1e-12 / sigma)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_sums_of_each_part_are_those_of_the_reference(fused, by, sigma, cuts, device, monkeypatch):
    """Over ragged tiles, blocks of queries, splits and segments."""
    small_tiles(monkeypatch)
    small_pieces(monkeypatch, splits=3)
    given = batch_of(Archive(B=19, N=90, D=18, C=7, device=device), by, sigma), True
    found, expected = (
        list(parts_of(function, cuts, *given)) for function in (BACKENDS[fused].class_sums, reference.class_sums)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12 / sigma, atol=1e-13 / sigma)


@pytest.mark.parametrize("by", ["labels", "sorted index", "index"])
def test_means_are_not_made_without_need(fused, by, device):
    ops = BACKENDS[fused]
    batch = batch_of(Archive(device=device), by)
    *sums, mean_same, mean_other = ops.class_sums(batch, False)
    assert mean_same.shape == mean_other.shape == (0, 5)
    torch.testing.assert_close(sums, list(ops.class_sums(batch, True)[:2]), rtol=1e-14, atol=1e-14)


def test_a_part_without_rows_has_sums_of_nothing(fused, by, device):
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        batch = batch_of(Archive(dtype=dtype, device=device), by)
        for need_means in (True, False):
            (part,) = parts_of(BACKENDS[fused].class_sums, (), batch._replace(bank=batch.bank[:0]), need_means)
            nothing = torch.full((9,), -torch.inf, dtype=torch.float64, device=device)
            no_mean = torch.zeros((9 if need_means else 0, 5), dtype=wide, device=device)
            torch.testing.assert_close(list(part), [nothing, nothing, no_mean, no_mean], rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_features_that_are_not_finite_spoil_their_own_row_alone(backend, by, sigma, device):
    batch = batch_of(Archive(device=device), by, sigma)
    clean = BACKENDS[backend].log_scores(batch, True)  # type: ignore[attr-defined]
    spoilt = int((clean[0] > -torch.inf).nonzero()[0])
    batch.features[spoilt] = torch.nan
    found = BACKENDS[backend].log_scores(batch, True)  # type: ignore[attr-defined]
    others = torch.arange(len(batch.features), device=device) != spoilt
    for values, clean_values in zip(found, clean, strict=True):
        assert values[spoilt].isnan().all()
        assert torch.equal(values[others], clean_values[others])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["labels", "sorted index", "index"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("need_means", [True, False])
def test_opcheck_of_the_class_sums(fused, by, dtype, need_means, device):
    batch = batch_of(Archive(dtype=dtype, device=device), by)
    op = getattr(torch.ops.ntdne_kernels, f"{fused}_class_sums").default
    torch.library.opcheck(op, (*batch.flat(), need_means))
