"""NTDNELoss in units of its slope at chance, and as the paper has it: against the formulas, however it is used."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ntdne_kernels import NTDNELoss
from ntdne_kernels.neighbourhood_loss import NeighbourhoodLoss
from ntdne_kernels.ops.losses import LossSpec, common_unit, loss_and_slope, value
from tests import formulas

D, SIGMA = 6, 0.2
LABELS = torch.tensor([0] * 12 + [1] * 6 + [2] * 3 + [5] + [-1] * 2)  # one class has one image, two images have none
N = len(LABELS)
FORMS = {"default": {}, "paper": {"k": 0.3, "warmup_epochs": 20, "unit_slope": False}}


def made(**options) -> NTDNELoss:
    """A criterion whose bank is half clustered by class, in double precision."""
    source = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "sigma": SIGMA, "generator": torch.Generator().manual_seed(1)} | options
    criterion = NTDNELoss(LABELS, D, **options)
    rows = 2 * nn.functional.one_hot(LABELS.clamp(min=0), D) + torch.randn(N, D, generator=source)
    criterion.memory.update_(rows.to(criterion.memory.storage.device), torch.arange(N), 0.0)
    return criterion


def batch(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Features of any length, and their images: of each class, of the image alone in its class, of one unlabelled."""
    source = torch.Generator().manual_seed(seed)
    index = torch.tensor([0, 3, 5, 12, 14, 18, 20, 21, 22])
    features = 2 * nn.functional.one_hot(LABELS[index].clamp(min=0).roll(1), D).double()
    return features + torch.randn(len(index), D, generator=source, dtype=torch.float64), index


def units_of(labels: list[int], q: float) -> Tensor:
    """(N,) what the loss of each image is divided by: c^q, of a mean of at least 30^−q."""
    others = [labels.count(label) - 1 if label >= 0 else 0 for label in labels]
    units = [max(count / (len(labels) - 1), 1e-3) ** q if count else None for count in others]
    known = [unit for unit in units if unit is not None]
    factor = max(1.0, 30**-q / (sum(known) / len(known))) if known else 1.0
    return torch.tensor([1.0 if unit is None else factor * unit for unit in units], dtype=torch.float64)


def expected(criterion: NTDNELoss, features: Tensor, index: Tensor, pruned: list[bool], k: float | None, units: Tensor):
    """Losses (B,) and their gradients (B, D) by the formulas, divided by the units (B,)."""
    length = features.norm(dim=1, keepdim=True)
    unit, rows = features / length, criterion.memory.rows(torch.arange(N))
    log_p, p, p_same = formulas.leave_one_out(unit, rows, LABELS[index], LABELS, index, criterion.sigma)
    q = criterion.q
    losses = [(1 - k**q) / q if cut else formulas.ntdne(x, q) for x, cut in zip(log_p, pruned, strict=True)]
    slopes = [0.0 if cut or x == -math.inf else -math.exp(q * x) for x, cut in zip(log_p, pruned, strict=True)]
    gradient = torch.tensor(formulas.log_p_gradients(unit, rows, p, p_same, slopes, criterion.sigma)[0]).double()
    gradient = (gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit) / length
    return torch.tensor(losses, dtype=torch.float64) / units, gradient / units.unsqueeze(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pruning", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_those_of_the_formulas(form, pruning, reduction, backend, monkeypatch):
    monkeypatch.setattr(NeighbourhoodLoss, "_backend", backend)
    criterion = made(reduction=reduction, **FORMS[form])
    features, index = batch()
    criterion.set_epoch(20 if pruning else 0)
    if form == "paper":
        with torch.no_grad():
            low = (criterion.eval()(features, index, return_scores=True)[1] <= 0.3).tolist()
        criterion.train()
        pruned, k = low if pruning else [False] * len(index), 0.3
    else:  # by scores of before, which it has once it was scored
        pruned, k = [False] * len(index), 1 / 4
        if pruning:
            criterion.memory.last_log_p[index] = torch.linspace(-4, -0.1, len(index))
            pruned = criterion.pruned[index].tolist()
    assert pruning == any(pruned)
    units = torch.ones(len(index)).double() if form == "paper" else units_of(LABELS.tolist(), 0.7)[index]
    losses, gradient = expected(criterion, features, index, pruned, k, units)
    features.requires_grad_()
    loss = criterion(features, index)
    loss.sum().backward()
    count = len(index) if reduction == "mean" else 1
    torch.testing.assert_close(loss.detach(), losses if reduction == "none" else losses.sum() / count)
    torch.testing.assert_close(features.grad, gradient / count)


@pytest.mark.parametrize(
    "labels",
    [
        *(LABELS.tolist(), [3, 3, 4], [0, 1, 2], [-1, -1], [4], [0, 0, 0, 1, 1]),
        list(range(50)) * 3,
        [0] * 60 + [label for label in range(1, 45) for _ in range(2)],
        [0] * 2998 + [1, 1],
    ],
    ids=["tail", "pair", "alone", "unlabelled", "single", "few", "many", "one large, many small", "tiny"],
)
@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_units_are_those_of_the_classes(labels, q):
    criterion = NTDNELoss(torch.tensor(labels), D, q=q, k=None, reduction="none")
    paper = NTDNELoss(torch.tensor(labels), D, q=q, k=None, reduction="none", unit_slope=False)
    paper.memory.storage.copy_(criterion.memory.storage)
    index = torch.arange(len(labels))[-20:]
    features = torch.randn(len(index), D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = paper(features, index).double() / criterion(features, index)
    torch.testing.assert_close(found, units_of(labels, q)[index], rtol=1e-5, atol=0)


def test_classes_at_chance_have_the_slope_of_snca_whatever_their_sizes():
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 2)
    criterion = NTDNELoss(labels, D, k=None)
    log_chance = torch.tensor([29 / 39, 7 / 39, 1 / 39], dtype=torch.float64).log()
    _, slope = loss_and_slope(log_chance, None, criterion._loss_spec(), log_chance=log_chance)
    torch.testing.assert_close(slope, torch.full_like(slope, -1 / 3))


@pytest.mark.parametrize("C", [2, 30, 31, 300, 5000])
def test_the_mean_unit_is_never_below_that_of_thirty_even_classes(C):
    q, N = 0.7, 10 * C
    unit = common_unit([(10, C)], N, q) * max(9 / (N - 1), 1e-3) ** q
    assert unit == pytest.approx(max(9 / (N - 1), 1 / 30) ** q)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("indicator", [None, torch.tensor([0.0, -9.0, 0.0, -9.0])])
def test_the_slope_in_units_is_the_derivative_of_the_loss(indicator, reduction):
    log_p = torch.tensor([-0.1, -3.0, -math.inf, -1.0], dtype=torch.float64, requires_grad=True)
    log_chance = torch.tensor([-0.5, -9.0, -math.inf, math.nan], dtype=torch.float64)
    spec = LossSpec(0.7, 0.2, reduction, unit=1.5)
    _, slope = loss_and_slope(log_p.detach(), indicator, spec, log_chance=log_chance)
    (exact,) = torch.autograd.grad(value(log_p, indicator, spec, log_chance=log_chance).sum(), log_p)
    torch.testing.assert_close(slope, exact)


def test_the_unit_follows_new_labels_and_a_schedule_of_q():
    criterion, paper = (made(k=None, reduction="none", unit_slope=unit_slope) for unit_slope in (True, False))
    features, index = batch()
    labels = LABELS.clone()
    for change in ("start", "q", "labels", "q"):
        if change == "q":
            criterion.q = paper.q = criterion.q - 0.2
        elif change == "labels":
            labels[:9] = 1
            for loss in (criterion, paper):
                loss.memory.relabel(labels)
        for _ in range(2):
            units = units_of(labels.tolist(), criterion.q)[index]
            torch.testing.assert_close(criterion(features, index), paper(features, index) / units)


def test_an_averaged_copy_takes_the_unit_of_new_labels():
    criterion = made(k=None)
    averaged = torch.optim.swa_utils.AveragedModel(criterion, use_buffers=True)
    labels = LABELS.roll(5)
    labels[:8] = 1
    criterion.memory.relabel(labels)
    averaged.update_parameters(criterion)
    averaged.update_parameters(criterion)
    features, index = batch()
    torch.testing.assert_close(averaged.module(features, index), criterion(features, index))
    assert averaged.module.memory.class_sizes == criterion.memory.class_sizes


def test_scores_pruned_images_and_state_dict_know_nothing_of_the_unit():
    scaled, plain = made(), made(unit_slope=False)
    features, index = batch()
    scores = [criterion(features, index, return_scores=True)[1] for criterion in (scaled, plain)]
    assert torch.equal(*scores)
    assert torch.equal(scaled.pruned, plain.pruned)
    assert scaled.state_dict().keys() == plain.state_dict().keys()
    assert scaled.get_extra_state() == plain.get_extra_state()
    other = made(generator=torch.Generator().manual_seed(5))
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(features, index), scaled(features, index))


def test_images_outside_the_archive_and_evaluation_have_the_same_unit():
    scaled, plain = (made(k=None, reduction="none", unit_slope=unit_slope).eval() for unit_slope in (True, False))
    features, index = batch()
    units = units_of(LABELS.tolist(), 0.7)[index]
    for given in ({"index": index}, {"labels": LABELS[index]}):
        torch.testing.assert_close(scaled(features, **given), plain(features, **given) / units)


def test_several_forwards_before_one_backward_keep_their_own_unit():
    criterion = made(k=None)
    gradients = []
    for together in (True, False):
        losses, given = [], []
        for seed, q in ((2, 0.7), (3, 0.4)):
            features, index = batch(seed)
            criterion.q = q
            given.append(features.requires_grad_())
            losses.append(criterion(features, index))
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        gradients.append([features.grad for features in given])
    torch.testing.assert_close(*gradients)


def test_compiled_it_is_the_eager_loss_and_one_graph_for_each_q_and_labels():
    from torch._dynamo.testing import CompileCounter

    criterion, counter = made(dtype=torch.float32), CompileCounter()
    eager = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    features, index = batch()
    for count, change in enumerate(("start", "q", "labels"), 1):
        for loss in (criterion, eager):
            loss.q = 0.5 if change != "start" else 0.7
            if change == "labels":
                loss.memory.relabel(LABELS.clamp(max=1))
        for _ in range(3):
            results = []
            for function in (compiled, eager):
                given = features.clone().requires_grad_()
                found = function(given, index)
                found.backward()
                results.append((found.detach(), given.grad))
            torch.testing.assert_close(*results)
        assert counter.frame_count == count


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_rows_in_host_memory_and_on_disk_have_the_same_unit(storage, tmp_path):
    path = tmp_path / "bank" if storage == "disk" else None
    results = []
    for options in ({}, {"storage": storage, "path": path}):
        criterion = made(**options)
        features, index = batch()
        loss = criterion(features.requires_grad_(), index)
        loss.backward()
        results.append((loss.detach(), features.grad))
    torch.testing.assert_close(*results)
