"""The primitive, in every backend: values, both gradients, edge cases, and what PyTorch asks of an operation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ntdne_kernels import LabelIndex, MemoryBank
from ntdne_kernels.functional import leave_one_out_log_scores, loss_of_batch, ntdne_loss, snca_loss
from ntdne_kernels.ops import schema, streaming
from ntdne_kernels.ops.backends import BACKENDS, gpu
from ntdne_kernels.ops.bank_update import skipped_counter
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Batch
from tests import formulas
from tests.archives import Archive, arguments, batch_of, labels_of
from tests.ops import contract
from tests.ops.cutting import small_tiles


@pytest.fixture(params=["labels", "index", "sorted index"])
def by(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.03, 0.01])
def test_log_p_and_both_gradients_are_those_of_the_formulas(backend, by, sigma, device, monkeypatch):
    small_tiles(monkeypatch)
    contract.check_scores_and_gradients(backend, by, sigma, device)


def test_far_positives_at_a_low_temperature_have_a_finite_score(backend, by, device):
    contract.check_far_positives(backend, by, device)


def test_query_without_positives_has_minus_infinity_and_zero_gradient(backend, by, device):
    contract.check_queries_without_positives(backend, by, device)


def test_empty_batch(backend, by, device):
    contract.check_empty_batch(backend, by, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.1, 0.05, 0.03, 0.02])
@pytest.mark.parametrize("clustered", [False, True])
def test_error_is_at_most_twice_that_of_plain_pytorch_in_the_same_dtype(backend, by, dtype, sigma, clustered, device):
    contract.check_error(backend, by, dtype, sigma, clustered, device)


@given(
    B=st.integers(0, 9),
    N=st.integers(1, 30),
    D=st.sampled_from([1, 2, 7, 16]),
    C=st.sampled_from([1, 2, 30]),
    seed=st.integers(0, 99),
    sigma=st.sampled_from([0.1, 0.02]),
    unlabelled=st.booleans(),
    tile=st.sampled_from([1, 13 * 64, 1 << 16]),
)
def test_every_shape_agrees_with_the_reference(B, N, D, C, seed, sigma, unlabelled, tile):
    archive = Archive(B, N, D, C, seed=seed, unlabelled=unlabelled)
    for by in ("labels", "index", "sorted index"):
        results = {}
        for backend in ("reference", "streaming"):  # Triton over ragged shapes: test_triton.py
            features, bank, labels, bank_labels, index = arguments(archive, by)
            features, bank = features.clone().requires_grad_(), bank.clone().requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(streaming, "TILE_ELEMENTS", {"cpu": tile})
                loss = ntdne_loss(features, bank, labels, bank_labels, index, sigma=sigma, backend=backend)
                loss.backward()
            results[backend] = (loss.detach(), features.grad, bank.grad)
        for result in results.values():
            torch.testing.assert_close(result, results["reference"], rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_does_not_grow_with_the_number_of_tiles(dtype, monkeypatch):
    """Thousands of tiles, as an archive of millions has, are as exact as four."""
    archive = Archive(B=16, N=60_000, D=16, C=5, dtype=dtype, unlabelled=False)
    archive.labels.clamp_(min=0)
    exact, *rest = archive.features.to(dtype).double().requires_grad_(), *archive.arguments()[2:]
    leave_one_out_log_scores(exact, archive.bank.double(), *rest, backend="reference").sum().backward()
    errors = []
    for length in (16, 15_000):
        monkeypatch.setattr(streaming, "TILE_ELEMENTS", {"cpu": length * 64})
        given = archive.features.clone().requires_grad_()
        leave_one_out_log_scores(given, archive.bank, *rest, backend="streaming").sum().backward()
        errors.append((given.grad - exact.grad).abs().max() / exact.grad.abs().max())
    assert errors[0] < 1.5 * errors[1] + 1e-6


@pytest.mark.slow
def test_score_is_never_above_one(backend, by, device):
    """With one class p = 1; the difference of two rounded logarithms may come out above 0."""
    for sigma in (0.1, 0.01):
        archive = Archive(B=50, N=400, D=8, C=1, dtype=torch.float32, device=device, unlabelled=False)
        archive.labels.zero_()
        log_p = leave_one_out_log_scores(*arguments(archive, by), sigma=sigma, backend=backend)
        assert log_p.max() <= 0
        assert log_p.min() > -1e-5


def test_bank_of_only_the_query_itself_is_defined(backend, device):
    row = torch.ones(1, 1, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for sigma in (0.1, 0.01):
        features = row.clone().requires_grad_()
        log_p = leave_one_out_log_scores(features, row, zero, zero, zero, sigma=sigma, backend=backend)
        log_p.sum().backward()
        assert log_p.item() == -math.inf
        assert features.grad.item() == 0


def test_unlabelled_rows_count_as_neighbours_but_never_as_the_same_class(backend, by, device):
    archive = Archive(B=4, N=30, C=2, device=device)
    archive.labels.clamp_(min=0)
    before = leave_one_out_log_scores(*arguments(archive, by), backend=backend)
    victims = archive.bank_labels == 1
    archive.bank_labels = torch.where(victims, -1, archive.bank_labels)
    after = leave_one_out_log_scores(*arguments(archive, by), backend=backend)
    zeros = archive.labels == 0
    torch.testing.assert_close(after[zeros], before[zeros])
    assert (after[~zeros] == -torch.inf).all()


def test_index_minus_one_or_none_excludes_nothing(backend, by, device):
    archive = Archive(device=device)
    archive.index.fill_(-1)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    given_minus_one = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    given_none = leave_one_out_log_scores(features, bank, labels, bank_labels, None, backend=backend)
    assert torch.equal(given_minus_one, given_none)
    expected, _, _ = formulas.leave_one_out(features, bank, labels, labels_of(archive, by), None, 0.1)
    torch.testing.assert_close(given_none.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_bank_may_be_the_batch_itself_and_both_gradients_add(backend, device):
    archive = Archive(B=12, N=12, C=3, device=device, unlabelled=False)
    own = torch.arange(12, device=device)
    rows = archive.bank.clone().requires_grad_()
    labels = archive.bank_labels
    leave_one_out_log_scores(rows, rows, labels, labels, own, backend=backend).clamp(min=-50).sum().backward()
    queries, bank = archive.bank.clone().requires_grad_(), archive.bank.clone().requires_grad_()
    leave_one_out_log_scores(queries, bank, labels, labels, own, backend=backend).clamp(min=-50).sum().backward()
    torch.testing.assert_close(rows.grad, queries.grad + bank.grad)
    assert queries.grad.norm() > 0.1
    assert bank.grad.norm() > 0.1


def test_rows_in_another_order_give_the_same_scores(backend, by, device):
    archive = Archive(B=6, N=50, device=device)
    before = leave_one_out_log_scores(*arguments(archive, by), backend=backend)
    shuffle = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(device)
    archive.bank, archive.bank_labels = archive.bank[shuffle], archive.bank_labels[shuffle]
    place = torch.argsort(shuffle)
    archive.index = torch.where(archive.index >= 0, place[archive.index.clamp(min=0)], -1)
    after = leave_one_out_log_scores(*arguments(archive, by), backend=backend)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integer_dtypes_and_strides_of_every_kind_are_accepted(backend, dtype, device):
    archive = Archive(B=6, N=20, D=4, dtype=dtype, device=device)
    features, bank, labels, bank_labels, index = archive.arguments()
    expected = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    for integer in (torch.int8, torch.int16, torch.int32):
        given = [x.to(integer) for x in (labels, bank_labels, index)]
        assert torch.equal(leave_one_out_log_scores(features, bank, *given, backend=backend), expected)
    transposed = features.t().contiguous().t()
    spread = torch.empty(20, 8, dtype=bank.dtype, device=device)[:, ::2].copy_(bank)
    every_second = torch.stack([labels, labels], dim=1)[:, 0]
    result = leave_one_out_log_scores(transposed, spread, every_second, bank_labels, index, backend=backend)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_scores_and_gradients(backend, dtype, device):
    for feature_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        archive = Archive(dtype=dtype, device=device)
        features = archive.features.to(feature_dtype).requires_grad_()
        bank = archive.bank.clone().requires_grad_()
        log_p = leave_one_out_log_scores(features, bank, *archive.arguments()[2:], backend=backend)
        log_p[log_p > -torch.inf].sum().backward()
        assert log_p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert features.grad.dtype == feature_dtype
        assert bank.grad.dtype == dtype
        assert features.grad.isfinite().all()


def test_autocast_changes_nothing(backend, device):
    archive = Archive(B=8, N=100, dtype=torch.float32, device=device)
    results = []
    for enabled in (False, True):
        features = archive.features.clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            log_p = leave_one_out_log_scores(features, *archive.arguments()[1:], backend=backend)
        log_p[log_p > -torch.inf].sum().backward()
        results.append((log_p.detach(), features.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_q_near_zero_is_snca_in_value_and_gradient(backend, device):
    """Lemma 1, in float32."""
    archive = Archive(B=20, N=60, dtype=torch.float32, device=device, unlabelled=False)
    archive.labels.clamp_(min=0)
    results = []
    for loss, options in ((ntdne_loss, {"q": 1e-6}), (snca_loss, {})):
        features = archive.features.clone().requires_grad_()
        value = loss(features, *archive.arguments()[1:], backend=backend, **options)
        value.backward()
        results.append((value.detach(), features.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_give_nan(backend, by, device):
    archive = Archive(device=device)
    features, bank, labels, bank_labels, index = arguments(archive, by)
    clean = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    spoilt = int((clean > -torch.inf).nonzero()[0])
    features[spoilt] = torch.nan
    log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, backend=backend)
    assert log_p[spoilt].isnan()
    others = torch.arange(len(clean), device=device) != spoilt
    assert torch.equal(log_p[others], clean[others])


@pytest.mark.slow
def test_gradcheck(backend, by, device):
    archive = Archive(B=3, N=7, D=2, C=2, device=device, unlabelled=False)
    archive.labels.clamp_(min=0)
    features, bank, labels, bank_labels, index = arguments(archive, by)

    def log_scores(features: Tensor, bank: Tensor) -> Tensor:
        log_p = leave_one_out_log_scores(features, bank, labels, bank_labels, index, sigma=0.5, backend=backend)
        return log_p[log_p > -torch.inf]

    assert torch.autograd.gradcheck(log_scores, (features.requires_grad_(), bank.clone().requires_grad_()))


def test_double_backward_raises(fused, device):
    archive = Archive(device=device)
    features = archive.features.clone().requires_grad_()
    log_p = leave_one_out_log_scores(features, *archive.arguments()[1:], backend=fused)
    (gradient,) = torch.autograd.grad(log_p[log_p > -torch.inf].exp().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("of", ["features", "bank"])
def test_double_backward_through_an_encoder_raises(fused, of, device):
    """The gradient that comes in is then a constant; what the loss adds to the second derivative must not be lost."""
    archive = Archive(device=device)
    made = {"features": archive.features, "bank": archive.bank}
    source = made[of].clone().requires_grad_()
    made[of] = nn.functional.normalize(source.sin(), dim=1)
    loss = ntdne_loss(made["features"], made["bank"], *archive.arguments()[2:], backend=fused)
    (gradient,) = torch.autograd.grad(loss, source, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss can be differentiated once"):
        torch.autograd.grad(gradient.sum(), source)


def test_retain_graph_gives_the_same_gradient_twice(backend, device):
    archive = Archive(device=device)
    features, bank = archive.features.clone().requires_grad_(), archive.bank.clone().requires_grad_()
    loss = ntdne_loss(features, bank, *archive.arguments()[2:], backend=backend)
    loss.backward(retain_graph=True)
    first = features.grad.clone(), bank.grad.clone()
    features.grad = bank.grad = None
    loss.backward()
    assert torch.equal(features.grad, first[0])
    assert torch.equal(bank.grad, first[1])


def test_upstream_gradients_of_any_stride(backend, device):
    """`.sum()` sends a stride-0 gradient, a slice of a larger one a strided one."""
    archive = Archive(device=device)
    gradients = []
    for upstream in (torch.ones(1, device=device).expand(9), torch.ones(18, device=device)[::2], None):
        features = archive.features.clone().requires_grad_()
        loss = ntdne_loss(features, *archive.arguments()[1:], reduction="none", backend=backend)
        loss.sum().backward() if upstream is None else loss.backward(upstream.to(loss.dtype))
        gradients.append(features.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_fused_backends_keep_nothing_of_the_bank(fused, device):
    """forward, update, forward, update, backward: the gradient is that of the rows each forward saw."""
    archive = Archive(device=device)
    expected = torch.zeros_like(archive.features)
    for bank in (archive.bank, -archive.bank):
        features = archive.features.clone().requires_grad_()
        ntdne_loss(features, bank, *archive.arguments()[2:], backend="reference").backward()
        expected += features.grad
    features, bank = archive.features.clone().requires_grad_(), archive.bank.clone()
    first = ntdne_loss(features, bank, *archive.arguments()[2:], backend=fused)
    bank.neg_()
    second = ntdne_loss(features, bank, *archive.arguments()[2:], backend=fused)
    bank.zero_()
    (first + second).backward()
    torch.testing.assert_close(features.grad, expected)


def test_changing_a_bank_that_backward_needs_raises(backend, device):
    archive = Archive(device=device)
    features = archive.features.clone().requires_grad_()
    bank = archive.bank.clone().requires_grad_()
    rows = bank * 1
    loss = ntdne_loss(features, rows, *archive.arguments()[2:], backend=backend)
    with torch.no_grad():
        rows.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_direction", [True, False])
def test_opcheck_of_the_forward(fused, by, dtype, need_direction, device):
    op = getattr(torch.ops.ntdne_kernels, f"{fused}_log_scores").default
    batch = batch_of(Archive(dtype=dtype, device=device), by)
    torch.library.opcheck(op, (*batch.flat(), need_direction))


@pytest.mark.slow
def test_opcheck_of_the_bank_gradient(fused, by, device):
    op = getattr(torch.ops.ntdne_kernels, f"{fused}_bank_gradient").default
    batch = batch_of(Archive(device=device), by)
    log_p, _, log_sum_all = BACKENDS[fused].log_scores(batch, False)  # type: ignore[attr-defined]
    torch.library.opcheck(op, (*batch.flat(), log_p, log_sum_all, torch.ones_like(log_p)))


def loss_arguments(device: torch.device, dtype: torch.dtype, with_labels: bool = True) -> tuple:
    """Arguments of the op `triton_loss` up to q, of images of an archive and of others."""
    archive = Archive(B=7, N=50, D=20, dtype=dtype, device=device)
    index = LabelIndex.from_labels(archive.bank_labels)
    scores = torch.linspace(-3, 0, 51, device=device, dtype=archive.features.dtype)
    images = schema.Archive(archive.bank_labels, index.position, torch.where(scores > -0.5, torch.nan, scores))
    labels = archive.labels if with_labels else None
    layout = ClassOrder(index.classes, index.offsets)
    return *Batch(3 * archive.features, archive.bank, labels, archive.index, layout, 0.1).flat(), *images


@pytest.mark.slow
@pytest.mark.skipif(gpu is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("need_gradient", "reduction"), [(True, "mean"), (False, "none")])
def test_opcheck_of_the_loss(dtype, need_gradient, reduction, kernel_device):
    given = loss_arguments(kernel_device, dtype, with_labels=need_gradient)
    torch.library.opcheck(
        torch.ops.ntdne_kernels.triton_loss.default, (*given, 0.7, 0.3, reduction, "stored", 2.5, need_gradient)
    )
    torch.library.opcheck(
        torch.ops.ntdne_kernels.triton_loss.default, (*given, None, None, reduction, "current", None, need_gradient)
    )


@pytest.mark.slow
@pytest.mark.skipif(gpu is None, reason="needs Triton")
def test_eager_and_compiled_outputs_of_the_loss_are_bitwise_equal(kernel_device):
    given = (*loss_arguments(kernel_device, torch.float32), 0.7, 0.3, "mean", "auto", 2.5, True)
    op = torch.ops.ntdne_kernels.triton_loss.default
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True)
    for eager, traced in zip(op(*given), compiled(*given), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.slow
def test_eager_and_compiled_outputs_of_the_op_are_bitwise_equal(fused, by, device):
    given = batch_of(Archive(B=33, N=700, D=20, dtype=torch.float32, device=device), by), True
    op = BACKENDS[fused].log_scores  # type: ignore[attr-defined]
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True)
    for eager, traced in zip(op(*given), compiled(*given), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.slow
def test_compiled_loss_and_gradients_agree_with_eager(backend, by, device):
    torch._dynamo.reset()  # the limit on compiling one function anew counts over all tests
    given = arguments(Archive(B=16, N=90, dtype=torch.float32, device=device), by)
    labels, bank_labels, index = given[2:]

    def loss_of(features: Tensor, bank: Tensor) -> Tensor:
        return ntdne_loss(features, bank, labels, bank_labels, index, k=0.3, backend=backend)

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        features, bank = (x.clone().requires_grad_() for x in given[:2])
        loss = function(features, bank)
        loss.backward()
        results.append((loss.detach(), features.grad, bank.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.slow
def test_repeated_runs_are_bitwise_equal(backend, by, device):
    on_cpu = device.type == "cpu"
    archive = Archive(40 if on_cpu else 1500, 700 if on_cpu else 30_000, 32, dtype=torch.float32, device=device)
    runs = []
    for _ in range(3 if on_cpu else 20):
        features = archive.features.clone().requires_grad_()
        given = arguments(archive, by)
        loss = ntdne_loss(features, *given[1:], backend=backend)
        loss.backward()
        runs.append((loss.detach(), features.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


WITHOUT_DIRECTION = {
    "zero": 0.0,
    "too short": 1e-13,
    "subnormal": 1e-40,
    "NaN": torch.nan,
    "infinite": torch.inf,
    "minus infinite": -torch.inf,
}


def archive_of(device: torch.device, dtype: torch.dtype) -> tuple[MemoryBank, Tensor, Tensor]:
    """A bank of 50 images, half clustered by class; features (B, D) of any length and their images (B,)."""
    made = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 3
    labels[:4] = torch.tensor([-1, 7, 7, 9])  # unlabelled, a pair, and one alone
    memory = MemoryBank(labels, 6, dtype=dtype).to(device)
    rows = nn.functional.one_hot(labels % 5, 6) + 0.4 * torch.randn(50, 6, generator=made)
    memory.update_(rows.to(device, dtype), torch.arange(50, device=device), 0.0)
    index = torch.cat([torch.arange(15), torch.tensor([2, -1, 4])])
    features = 3 * rows[index] + torch.randn(len(index), 6, generator=made)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return memory, features.to(device, wide), index.to(device)


def loss_of_images(
    memory: MemoryBank, features: Tensor, index: Tensor, spec: LossSpec, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, log p, and the gradient of features of any length, as on a GPU: nothing looks at values."""
    features = features.clone().requires_grad_()
    batch = Batch(features, memory.storage, torch.where(index >= 0, -1, 1), index, memory.label_index.layout, 0.2)
    value, log_p = loss_of_batch(batch, memory.archive, spec, backend)
    value.sum().backward()
    return value.detach(), log_p, features.grad


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [(0.7, None, "current"), (0.7, 0.4, "auto"), (None, None, "current")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_features_without_a_direction_are_left_out(backend, loss, reduction, dtype, device):
    memory, features, index = archive_of(device, dtype)
    loss = LossSpec(*loss[:2], reduction, loss[2])
    memory.record_(torch.linspace(-3, -0.1, 50, device=device), torch.arange(50, device=device))
    before = memory.last_log_p.clone()
    spoilt = torch.tensor([1, 5, 8, 10, 12, 16], device=device)
    features[spoilt] = 0
    features[spoilt, 2] = torch.tensor(list(WITHOUT_DIRECTION.values()), device=device, dtype=features.dtype)
    counted = torch.ones(len(index), dtype=torch.bool, device=device)
    counted[spoilt] = False

    value, log_p, gradient = loss_of_images(memory, features, index, loss, backend)
    expected, expected_log_p, expected_gradient = loss_of_images(
        memory, features[counted], index[counted], loss, backend
    )
    assert log_p[~counted].isnan().all()
    assert torch.equal(gradient[~counted], torch.zeros_like(gradient[~counted]))
    assert gradient[counted].any()
    assert gradient.isfinite().all()
    torch.testing.assert_close(log_p[counted], expected_log_p)
    torch.testing.assert_close(gradient[counted], expected_gradient)
    if reduction == "none":
        assert torch.equal(value[~counted], torch.zeros_like(value[~counted]))
        value = value[counted]
    torch.testing.assert_close(value, expected)

    memory.record_(log_p, index)
    unchanged = torch.ones(50, dtype=torch.bool, device=device)
    unchanged[index[counted & (index >= 0)]] = False
    unchanged[0] = True  # unlabelled
    changed = ~torch.isclose(memory.last_log_p, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(changed, ~unchanged)


@pytest.mark.parametrize("kind", WITHOUT_DIRECTION)
@pytest.mark.parametrize("loss", [(0.7, 0.3), (None, None)])
def test_loss_of_a_batch_without_any_direction_is_nan_without_gradient(backend, kind, loss, device):
    """An encoder that diverged must not train on in silence."""
    memory, features, index = archive_of(device, torch.float32)
    features[:, 1] = WITHOUT_DIRECTION[kind]
    features[:, [0, 2, 3, 4, 5]] = 0
    value, log_p, gradient = loss_of_images(memory, features, index, LossSpec(*loss, "mean"), backend)
    assert value.isnan()
    assert log_p.isnan().all()
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("compiled", [False, True])
def test_features_without_a_direction_are_counted(backend, compiled, device):
    memory, features, index = archive_of(device, torch.float32)
    before = int(skipped_counter(device))

    def loss(features: Tensor) -> Tensor:
        batch = Batch(features, memory.storage, None, index, memory.label_index.layout, 0.2)
        return loss_of_batch(batch, memory.archive, LossSpec(0.7, None, "mean"), backend)[0]

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    call(features.requires_grad_()).backward()
    assert int(skipped_counter(device)) == before
    features = features.detach()
    features[3], features[17, 4] = 0, torch.nan
    call(features.requires_grad_()).backward()
    assert int(skipped_counter(device)) == before + 2
    assert device.type == "cpu" or memory.skipped_rows() >= 2
