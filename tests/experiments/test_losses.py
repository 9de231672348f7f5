"""The losses of the experiments: each against its formula as naive loops, and the interface they share."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.experiments.loss_registry import LOSSES, loss_name, loss_options, make_loss
from ntdne_kernels.experiments.settings import read_preset

N, D, B, C = 40, 6, 12, 4
BANKS = ["SNCA", "NTDNE", "NTDNE-broadcast"]
BATCH = [name for name in LOSSES if name not in BANKS]
WITH_PARAMETERS = ["D-CNN", "NSL", "ArcFace", "MAE", "SCE", "t-RNSL"]
UNPRUNED = {"NTDNE": {"k": 0.3, "warmup_epochs": 20, "unit_slope": False}}  # so that a second forward is as the first


def labels_of(seed: int = 0) -> Tensor:
    labels = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(seed))
    labels[0] = C - 1
    return labels


def batch(seed: int = 1, size: int = B) -> tuple[Tensor, Tensor]:
    """Features half clustered by class, of lengths other than 1, in double precision."""
    source = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=source)[:size]
    noise = torch.randn(size, D, generator=source)
    return (1.5 * F.one_hot(labels_of()[index], D) + noise).double(), index


def made(name: str, seed: int = 0, **options):
    """The loss in double precision, its parameters drawn from the seed."""
    torch.manual_seed(seed)
    return make_loss(name, labels_of(), D, **options).double()


# The formulas: sums over lists of scalars and rows, autograd for their gradients.


def unit(row: Tensor) -> Tensor:
    return row / row.pow(2).sum().sqrt()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(2).sum()


def mean(values: list) -> Tensor:
    return sum(values) / len(values)


def softmax(logits: list[Tensor]) -> list[Tensor]:
    total = sum(z.exp() for z in logits)
    return [z.exp() / total for z in logits]


def classified(criterion: nn.Module, feature: Tensor) -> list[Tensor]:
    weight, bias = criterion.classifier.weight, criterion.classifier.bias
    return softmax([(weight[c] * feature).sum() + bias[c] for c in range(C)])


def cosines(criterion: nn.Module, feature: Tensor) -> list[Tensor]:
    return [(unit(criterion.softmax.W[:, c]) * unit(feature)).sum() for c in range(C)]


def dcnn(criterion, features, labels, tau1=0.05, tau2=0.44, weight=0.05):
    hinges = {1: [], -1: []}
    for i, j in itertools.combinations(range(len(labels)), 2):
        y = 1 if labels[i] == labels[j] else -1
        d2 = squared_distance(unit(features[i]), unit(features[j]))
        hinges[y].append((tau1 - y * (tau2 - d2)).clamp(min=0))
    cross_entropy = mean([-classified(criterion, f)[y].log() for f, y in zip(features, labels, strict=True)])
    return cross_entropy + weight * (mean(hinges[1]) + mean(hinges[-1])) / 2


def triplet(criterion, features, labels, margin=0.2):
    losses = []
    for a, p, n in itertools.permutations(range(len(labels)), 3):
        if labels[a] == labels[p] != labels[n]:
            near = squared_distance(unit(features[a]), unit(features[p]))
            far = squared_distance(unit(features[a]), unit(features[n]))
            if near < far <= near + margin:
                losses.append(near - far + margin)
    return mean(losses)


def nsl(criterion, features, labels, sigma=0.05):
    p = [softmax([cos / sigma for cos in cosines(criterion, f)])[y] for f, y in zip(features, labels, strict=True)]
    return mean([-x.log() for x in p])


def arcface(criterion, features, labels, margin=28.6, scale=64.0):
    m, losses = math.radians(margin), []
    for f, y in zip(features, labels, strict=True):
        logits = cosines(criterion, f)
        theta = logits[y].acos()
        logits[y] = (theta + m).cos() if theta <= math.pi - m else logits[y] - m * math.sin(m)
        losses.append(-softmax([scale * z for z in logits])[y].log())
    return mean(losses)


def mae(criterion, features, labels):
    losses = []
    for f, y in zip(features, labels, strict=True):
        losses.append(sum((s - (1 if c == y else 0)).abs() for c, s in enumerate(classified(criterion, f))))
    return mean(losses)


def sce(criterion, features, labels, alpha=0.1, beta=1.0, log_zero=-4.0):
    losses = []
    for f, y in zip(features, labels, strict=True):
        s = classified(criterion, f)
        reverse = -sum(s[c] * (0 if c == y else log_zero) for c in range(C))
        losses.append(alpha * -s[y].log() + beta * reverse)
    return mean(losses)


def trnsl(criterion, features, labels, sigma=0.05, q=0.7, k=None):
    losses = []
    for f, y in zip(features, labels, strict=True):
        p = softmax([cos / sigma for cos in cosines(criterion, f)])[y]
        losses.append((1 - k**q) / q if k is not None and p <= k else (1 - p**q) / q)
    return mean(losses)


def contrastive(criterion, features, labels, margin=1.0):
    losses = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        d = squared_distance(features[i], features[j]).sqrt()
        losses.append(d**2 if labels[i] == labels[j] else (margin - d).clamp(min=0) ** 2)
    return mean(losses)


def check_formula(criterion: nn.Module, formula: Callable[..., Tensor], features: Tensor, index: Tensor, **options):
    """Value, and gradients to the features and every parameter."""
    results = []
    for function in (
        lambda given: criterion(given, index),
        lambda given: formula(criterion, list(given), labels_of()[index].tolist(), **options),
    ):
        given = features.clone().requires_grad_()
        criterion.zero_grad()
        value = function(given)
        value.backward()
        results.append([value.detach(), given.grad, *(p.grad for p in criterion.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)
    assert results[0][0] > 0
    assert results[0][1].norm() > 0


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("D-CNN", dcnn, {}),
        ("D-CNN", dcnn, {"tau1": 0.2, "tau2": 1.5, "weight": 2.0}),
        ("Triplet", triplet, {}),
        ("Triplet", triplet, {"margin": 0.7}),
        ("NSL", nsl, {}),
        ("NSL", nsl, {"sigma": 0.3}),
        ("ArcFace", arcface, {"scale": 4.0}),
        ("ArcFace", arcface, {"margin": 100.0, "scale": 2.0}),
        ("MAE", mae, {}),
        ("SCE", sce, {}),
        ("SCE", sce, {"alpha": 2.0, "beta": 0.3, "log_zero": -7.0}),
        ("t-RNSL", trnsl, {}),
        ("t-RNSL", trnsl, {"sigma": 0.2, "q": 0.3}),
        ("Contrastive", contrastive, {}),
        ("Contrastive", contrastive, {"margin": 3.0}),
    ],
)
def test_loss_is_its_formula_as_loops(name, formula, options):
    check_formula(made(name, **options), formula, *batch(), **options)


def test_arcface_has_the_margin_and_scale_of_its_paper():
    criterion = made("ArcFace")
    features, index = batch()
    expected = arcface(criterion, list(features), labels_of()[index].tolist(), margin=math.degrees(0.5))
    assert criterion(features, index).item() == pytest.approx(expected.item(), rel=1e-2)
    check_formula(criterion, arcface, features, index)


def test_arcface_formula_is_tested_on_both_sides_of_pi_less_the_margin():
    criterion = made("ArcFace", margin=100.0)
    features, index = batch()
    cos = torch.stack([cosines(criterion, f)[y] for f, y in zip(features, labels_of()[index], strict=True)])
    far = cos.acos() > math.pi - math.radians(100)
    assert 0 < far.sum() < B


def test_arcface_gradient_is_finite_for_a_feature_along_its_prototype():
    """The derivative of the angle is infinite there."""
    criterion = make_loss("ArcFace", torch.tensor([0, 1]), 2, scale=1.0)
    with torch.no_grad():
        criterion.softmax.W.copy_(torch.eye(2))
    for start in ([1.0, 0.0], [-1.0, 0.0]):
        features = torch.tensor([start], requires_grad=True)
        criterion(features, torch.tensor([0])).backward()
        assert features.grad.isfinite().all()
        assert criterion.softmax.W.grad.isfinite().all()


def test_trnsl_truncates_from_the_epoch_after_the_warm_up():
    criterion = made("t-RNSL", k=0.6, sigma=0.3, warmup_epochs=3)
    features, index = batch()
    for epoch, k in ((0, None), (2, None), (3, 0.6), (10, 0.6)):
        criterion.set_epoch(epoch)
        check_formula(criterion, trnsl, features, index, k=k, sigma=0.3)


def test_trnsl_truncates_each_image_for_itself():
    """A truncated image's gradient is exactly 0; the others' do not depend on how many were truncated."""
    features, index = batch()
    gradients = []
    for k in (0.01, 0.4, 0.8):
        criterion = made("t-RNSL", k=k, sigma=0.3, warmup_epochs=0)
        given = features.clone().requires_grad_()
        criterion(given, index).backward()
        gradients.append(given.grad)
    labels = labels_of()[index].tolist()
    p = torch.stack(
        [softmax([cos / 0.3 for cos in cosines(criterion, f)])[y] for f, y in zip(features, labels, strict=True)]
    )
    assert 0 < (p <= 0.4).sum() < (p <= 0.8).sum() < B
    assert (p > 0.01).all()
    for k, gradient in zip((0.4, 0.8), gradients[1:], strict=True):
        assert torch.equal(gradient[p <= k], torch.zeros_like(gradient[p <= k]))
        assert torch.equal(gradient[p > k], gradients[0][p > k])


def trained_on(name: str, epochs: range, criterion: nn.Module | None = None, **options) -> nn.Module:
    """A loss that has seen every image of the archive once in each of the epochs."""
    criterion = criterion or make_loss(name, labels_of(), D, **options)
    for epoch in epochs:
        criterion.set_epoch(epoch)
        for index in torch.arange(N).split(B):
            source = torch.Generator().manual_seed(1000 * epoch + int(index[0]))
            features = 2.0 * F.one_hot(labels_of()[index], D) + torch.randn(len(index), D, generator=source)
            criterion(features, index)
            criterion.update_bank(features, index)
    return criterion


def unpruned(criterion: nn.Module) -> NTDNELoss:
    """NTDNE without pruning, on the same bank."""
    plain = NTDNELoss(labels_of(), D, k=None, unit_slope=False, sigma=criterion.sigma, q=criterion.q)
    plain.memory.load_state_dict(criterion.memory.state_dict())
    return plain


def test_broadcast_is_the_mean_of_the_product_with_an_indicator_of_the_wrong_shape():
    options = {"k": 0.5, "sigma": 0.3, "warmup_epochs": 5}
    criterion = trained_on("NTDNE-broadcast", range(9), **options)
    w = (criterion.memory.last_log_p.exp() > 0.5).float()
    criterion.set_epoch(9)
    features, index = batch(size=15)
    plain = unpruned(criterion)
    plain.reduction = "none"
    gradients = []
    for function in (criterion, lambda f, i: (plain(f, i) * w[i][:, None]).mean()):
        given = features.float().requires_grad_()
        value = function(given, index)
        value.backward()
        gradients.append((value.detach(), given.grad))
    torch.testing.assert_close(*gradients)
    assert 0 < w[index].sum() < len(index)


def test_broadcast_keeps_the_gradient_of_every_image_scaled_by_the_kept_share():
    criterion = trained_on("NTDNE-broadcast", range(10), k=0.5, sigma=0.3, warmup_epochs=5)
    features, index = batch(size=15)
    share = criterion.w[index].mean().item()
    gradients = []
    for loss in (criterion, unpruned(criterion)):
        given = features.float().requires_grad_()
        loss(given, index).backward()
        gradients.append(given.grad)
    assert 0.2 < share < 0.9
    assert (gradients[0].norm(dim=1) > 0).all()
    torch.testing.assert_close(gradients[0], share * gradients[1])


def test_broadcast_refreshes_its_indicator_every_ten_epochs_from_the_warm_up_on():
    criterion = make_loss("NTDNE-broadcast", labels_of(), D, k=0.5, warmup_epochs=20)
    refreshed = []
    for epoch in range(45):
        criterion.memory.last_log_p.fill_(math.log(0.4 if epoch % 20 < 10 else 0.6))
        before = criterion.w.clone()
        criterion.set_epoch(epoch)
        if not torch.equal(criterion.w, before):
            refreshed.append(epoch)
    assert refreshed == [29, 39]  # also at 19, where it becomes 1 everywhere, as it was
    criterion.memory.last_log_p.fill_(-math.inf)
    criterion.set_epoch(39)
    assert criterion.w.all()
    criterion.set_epoch(49)
    assert not criterion.w[:-1].any()


def test_broadcast_keeps_what_was_never_scored_and_what_is_outside_the_archive():
    criterion = make_loss("NTDNE-broadcast", labels_of(), D, k=0.5, warmup_epochs=0)
    criterion.memory.last_log_p[:10] = math.log(0.5)  # p = k is pruned
    criterion.set_epoch(9)
    assert torch.equal(criterion.w, torch.cat([torch.zeros(10), torch.ones(N - 9)]))
    features, index = batch()
    outside = criterion(features.float(), labels=labels_of()[index])
    torch.testing.assert_close(outside, unpruned(criterion)(features.float(), labels=labels_of()[index]))
    _, scores = criterion(features.float(), index, return_scores=True)
    assert scores.shape == (B,)


@pytest.mark.parametrize("killed_after", [8, 9, 14])
def test_broadcast_resumes_with_the_indicator_it_had(killed_after):
    options = {"k": 0.5, "sigma": 0.3, "warmup_epochs": 5}
    whole = trained_on("NTDNE-broadcast", range(21), **options)
    first = trained_on("NTDNE-broadcast", range(killed_after + 1), **options)
    resumed = make_loss("NTDNE-broadcast", labels_of(), D, **options)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed.w, first.w)
    resumed.set_epoch(killed_after)  # a loop that begins its epoch again
    assert torch.equal(resumed.w, first.w)
    trained_on("NTDNE-broadcast", range(killed_after + 1, 21), resumed)
    assert torch.equal(resumed.w, whole.w)
    assert 0 < whole.w.sum() < N


@pytest.mark.parametrize("name", LOSSES)
def test_one_interface(name):
    """A training step: finite, every feature row and every parameter with a gradient."""
    criterion = make_loss(name, labels_of(), D)
    features, index = batch(size=24)
    given = features.float().requires_grad_()
    criterion.set_epoch(0)
    loss = criterion(given, index)
    loss.backward()
    criterion.update_bank(given, index)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert given.grad.isfinite().all()
    assert (given.grad.norm(dim=1) > 0).sum() > 12
    parameters = dict(criterion.named_parameters())
    assert bool(parameters) == (name in WITH_PARAMETERS)
    for parameter in parameters.values():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_state_dict_gives_another_instance_the_same_loss(name):
    torch.manual_seed(0)
    first = make_loss(name, labels_of(), D)
    features, index = batch()
    features = features.float()
    first.update_bank(features, index)
    first.set_epoch(50)
    torch.manual_seed(1)
    second = make_loss(name, labels_of(), D)
    before = second(features, index)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(features, index), first(features, index))
    if name in WITH_PARAMETERS + BANKS:
        assert not torch.equal(before, first(features, index))
    assert torch.equal(copy.deepcopy(first)(features, index), pickle.loads(pickle.dumps(first))(features, index))


def test_trnsl_checkpoint_remembers_that_it_truncates():
    first, second = (make_loss("t-RNSL", labels_of(), D, warmup_epochs=4) for _ in range(2))
    first.set_epoch(7)
    second.load_state_dict(first.state_dict())
    features, index = batch()
    assert torch.equal(second(features.float(), index), first(features.float(), index))
    assert second.epoch == 7


@pytest.mark.parametrize("name", BATCH)
def test_checkpoint_does_not_replace_the_labels(name):
    first = make_loss(name, labels_of(seed=0), D)
    second = make_loss(name, labels_of(seed=1), D)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.labels, labels_of(seed=1))


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_features_under_autocast_are_computed_in_float32(name):
    criterion = make_loss(name, labels_of(), D, **UNPRUNED.get(name, {}))
    features, index = batch()
    given = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = criterion(given, index)
    inside.backward()
    assert inside.dtype == torch.float32
    assert given.grad.dtype == torch.bfloat16
    assert torch.equal(inside, criterion(given.detach().float(), index))


@pytest.mark.parametrize("name", LOSSES)
def test_any_integer_dtype_of_index(name):
    criterion = make_loss(name, labels_of(), D, **UNPRUNED.get(name, {}))
    features, index = batch()
    expected = criterion(features.float(), index)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(criterion(features.float(), index.to(dtype)), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_tiny_batches(name, size):
    """With no or few images to compare, the loss is finite and can be backpropagated."""
    criterion = make_loss(name, labels_of(), D)
    features, index = batch(size=size)
    given = features.float().requires_grad_()
    loss = criterion(given, index)
    loss.backward()
    criterion.update_bank(given, index)
    assert loss.isfinite()
    assert given.grad.isfinite().all()
    if size == 0:
        assert loss == 0
    if size == 1 and name in ("Triplet", "Contrastive"):
        assert loss == 0
        assert not given.grad.any()


@pytest.mark.parametrize("size", [2, 5])
def test_batches_of_one_class_have_no_pairs_across(size):
    labels = torch.zeros(N, dtype=torch.int64)
    labels[-1] = 1
    features = batch(size=size)[0].float().requires_grad_()
    for name in ("D-CNN", "Triplet", "Contrastive"):
        loss = make_loss(name, labels, D)(features, torch.arange(size))
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["D-CNN", "Triplet", "Contrastive"])
def test_equal_features_have_a_finite_gradient(name):
    """Their distance is 0, where it has no derivative."""
    features = torch.ones(30, D, requires_grad=True)
    make_loss(name, labels_of(), D)(features, torch.arange(30)).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_features_that_are_not_finite_show_in_the_loss(name):
    """A diverged encoder must not keep training in silence; losses with a bank raise and name the row."""
    features, index = batch()
    features[2, 1] = torch.nan
    criterion = make_loss(name, labels_of(), D)
    if isinstance(criterion, NTDNELoss | SNCALoss):
        with pytest.raises(ValueError, match="features: expected rows of finite norm, .* got norm nan in row 2"):
            criterion(features.float(), index)
    else:
        assert criterion(features.float(), index).isnan()


@pytest.mark.parametrize("name", ["NSL", "ArcFace", "t-RNSL"])
def test_prototypes_start_uniform_as_in_the_authors_code(name):
    torch.manual_seed(0)
    W = make_loss(name, torch.arange(200), 64).softmax.W
    assert W.abs().max() <= 1 / 8
    assert W.norm(dim=0).mean().item() == pytest.approx(3**-0.5, rel=0.02)


@pytest.mark.parametrize("name", BATCH)
def test_bad_features_and_indices_are_named(name):
    criterion = make_loss(name, labels_of(), D)
    with pytest.raises(ValueError, match=r"features: expected shape \(3, 6\), a row for each index, got \(2, 6\)"):
        criterion(torch.ones(2, D), torch.arange(3))
    with pytest.raises(ValueError, match=r"features: expected shape \(3, 6\), a row for each index, got \(3, 5\)"):
        criterion(torch.ones(3, 5), torch.arange(3))
    with pytest.raises(TypeError, match="index: expected an integer tensor"):
        criterion(torch.ones(3, D), torch.ones(3))
    for wrong in (-1, N):
        with pytest.raises(IndexError, match=f"index: expected images from 0 to {N - 1}, got {wrong}"):
            criterion(torch.ones(2, D), torch.tensor([0, wrong]))


def test_names_in_any_case():
    assert loss_name("ntdne") == "NTDNE"
    assert loss_name("T-rnsl") == "t-RNSL"
    assert type(make_loss("snca", labels_of(), D)) is SNCALoss
    assert type(make_loss("NTDNE", labels_of(), D)) is NTDNELoss


@pytest.mark.parametrize(("wrong", "meant"), [("trnsl", "t-RNSL"), ("arc-face", "ArcFace"), ("NTNDE", "NTDNE")])
def test_unknown_names_are_answered_with_the_closest_and_all(wrong, meant):
    with pytest.raises(ValueError, match=f"no loss '{wrong}' .did you mean '{meant}'.*D-CNN, Triplet, NSL, SNCA"):
        make_loss(wrong, labels_of(), D)
    with pytest.raises(ValueError, match="no loss 7; the losses are"):
        loss_name(7)


def test_options_and_their_defaults():
    assert loss_options("sce") == {"alpha": 0.1, "beta": 1.0, "log_zero": -4.0}
    assert loss_options("MAE") == {}
    assert loss_options("SNCA") == {"sigma": 0.1, "momentum": 0.5}
    assert loss_options("NTDNE").keys() >= {"sigma", "q", "k", "warmup_epochs", "momentum", "indicator"}
    assert loss_options("NTDNE")["unit_slope"] is True
    paper = read_preset("paper")["losses"]["NTDNE"]
    for option in loss_options("NTDNE-broadcast"):
        assert loss_options("NTDNE-broadcast")[option] == paper[option]


def test_unknown_options_are_answered_with_those_there_are():
    message = r"NSL: no option 'sigm' \(did you mean 'sigma'\?\); its options are sigma = 0.05"
    with pytest.raises(ValueError, match=message):
        make_loss("NSL", labels_of(), D, sigm=0.1)
    with pytest.raises(ValueError, match="MAE: no option 'alpha'; its options are none"):
        make_loss("MAE", labels_of(), D, alpha=0.1)
    with pytest.raises(ValueError, match="SNCA: no option 'fused'"):
        make_loss("SNCA", labels_of(), D, fused=False)


OUT_OF_RANGE = {
    "D-CNN": {"tau1": -0.1, "tau2": 4.1, "weight": -1},
    "Triplet": {"margin": 0},
    "NSL": {"sigma": 0},
    "SNCA": {"sigma": -1, "momentum": 1.5},
    "ArcFace": {"margin": 180, "scale": 0},
    "SCE": {"alpha": -1, "beta": -1, "log_zero": 0},
    "t-RNSL": {"sigma": 0, "q": 1.1, "k": 1, "warmup_epochs": -1},
    "NTDNE": {"sigma": 0, "q": 0, "k": 1.5, "warmup_epochs": -1, "momentum": -0.1, "indicator": "newest"},
    "Contrastive": {"margin": -1},
    "NTDNE-broadcast": {"sigma": 0, "q": 0, "k": 0, "warmup_epochs": -1, "momentum": 2},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OUT_OF_RANGE for option in OUT_OF_RANGE[name]])  # type: ignore[attr-defined]
def test_options_of_wrong_range_or_type_are_named(name, option):
    for value in (OUT_OF_RANGE[name][option], "1e-3"):
        with pytest.raises(ValueError, match=f"{name}: {option}: expected"):
            make_loss(name, labels_of(), D, **{option: value})


@pytest.mark.parametrize("name", BATCH)
def test_bad_labels_and_dim_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: labels: expected a class from 0 for each image, got -1 at image 1"):
        make_loss(name, torch.tensor([0, -1]), D)
    with pytest.raises(ValueError, match=f"{name}: labels: expected a class from 0 for each image, got an empty"):
        make_loss(name, torch.empty(0, dtype=torch.int64), D)
    with pytest.raises(ValueError, match=f"{name}: labels: expected an integer tensor"):
        make_loss(name, torch.ones(4), D)
    for dim in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"{name}: dim: expected an integer of at least 1"):
            make_loss(name, labels_of(), dim)
