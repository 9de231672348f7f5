"""NTDNELoss and SNCALoss in training: values, pruning, state, and the ways people use a loss in PyTorch."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import null_gpu
from ntdne_kernels import NTDNELoss, SNCALoss
from tests import formulas

N, D, B = 40, 6, 12
PAPER = {"k": 0.3, "warmup_epochs": 20, "unit_slope": False}


def labels_of(seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(seed))


def made(loss: type = NTDNELoss, **options):
    """A loss whose bank is double precision and half clustered by class, so that scores spread over (0, 1).

    NTDNE as in the paper where the options say nothing else.
    """
    options = (PAPER if loss is NTDNELoss else {}) | options
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0), "sigma": 0.2} | options
    criterion = loss(labels_of(), D, **options)
    features = 2.5 * nn.functional.one_hot(labels_of(), D) + torch.randn(N, D, generator=options["generator"])
    return criterion, features.to(torch.float64)


def filled(loss: type = NTDNELoss, **options):
    criterion, features = made(loss, **options)
    criterion.memory.update_(features, torch.arange(N), 0.0)
    return criterion


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=source)[:B]
    features = 2 * nn.functional.one_hot(labels_of()[index], D) + torch.randn(B, D, generator=source)
    return features.to(torch.float64), index


def expected_log_p(criterion, features: Tensor, index: Tensor, labels: Tensor) -> list[float]:
    unit = nn.functional.normalize(features.double(), dim=1)
    rows = criterion.memory.rows(torch.arange(N))
    return formulas.leave_one_out(unit, rows, labels, criterion.memory.labels, index, criterion.sigma)[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pruning", [True, False])
def test_ntdne_is_the_formula_over_the_whole_bank(fused, pruning):
    criterion = filled(warmup_epochs=5, fused=fused, k=0.6)
    criterion.set_epoch(5 if pruning else 4)
    features, index = batch()
    log_p = expected_log_p(criterion, features, index, labels_of()[index])
    expected = [formulas.ntdne(x, 0.7, 0.6 if pruning else None) for x in log_p]
    loss, scores = criterion(features, index, return_scores=True)
    assert loss.item() == pytest.approx(sum(expected) / B)
    torch.testing.assert_close(scores, torch.tensor(log_p, dtype=torch.float64).exp())
    assert 0 < sum(x <= math.log(0.6) for x in log_p) < B


def test_snca_is_the_formula_over_the_whole_bank():
    criterion = filled(SNCALoss)
    features, index = batch()
    log_p = expected_log_p(criterion, features, index, labels_of()[index])
    assert criterion(features, index).item() == pytest.approx(-sum(log_p) / B)


@pytest.mark.parametrize("loss", [NTDNELoss, SNCALoss])
def test_fused_and_reference_give_the_same_loss_and_gradient(loss):
    results = []
    for fused in (True, False):
        criterion = filled(loss, fused=fused)
        features, index = batch()
        features.requires_grad_()
        value = criterion(features, index)
        value.backward()
        results.append((value.detach(), features.grad))
    torch.testing.assert_close(results[0], results[1])


def test_features_need_not_be_normalised_and_keep_their_dtype():
    criterion = filled(dtype=torch.float32)
    features, index = batch()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        given = (100 * features).to(dtype).requires_grad_()
        loss = criterion(given, index)
        loss.backward()
        assert loss.dtype == torch.float32
        assert given.grad.dtype == dtype
        assert loss.item() == pytest.approx(criterion(features, index).item(), rel=0.02)


def test_features_outside_the_archive_use_the_given_labels():
    criterion = filled()
    features, index = batch()
    index[:3] = -1
    given = torch.tensor([0, 1, -1] + [7] * (B - 3))  # the labels of archive images are the archive's
    labels = torch.where(index >= 0, labels_of()[index], given)
    _, scores = criterion(features, index, labels=given, return_scores=True)
    log_p = expected_log_p(criterion, features, index, labels)
    torch.testing.assert_close(scores, torch.tensor(log_p, dtype=torch.float64).exp())
    assert scores[2] == 0
    _, none_in_archive = criterion(features, labels=given, return_scores=True)
    assert none_in_archive[3:].max() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32])
def test_labels_of_other_images_have_any_integer_dtype(dtype):
    criterion = filled().eval()
    features, given = batch()[0], torch.arange(B) % 4
    assert torch.equal(criterion(features, labels=given.to(dtype)), criterion(features, labels=given))


def test_pruned_images_have_exactly_no_gradient_whatever_the_others_do():
    """Eq. 13 per sample: the published code scales all by the kept share instead."""
    features, index = batch()
    gradients = []
    for k in (None, 0.6):
        criterion = filled(k=k, warmup_epochs=0)
        given = features.clone().requires_grad_()
        loss, scores = criterion(given, index, return_scores=True)
        loss.backward()
        gradients.append(given.grad)
    pruned = scores <= 0.6
    assert 2 < pruned.sum() < B - 2
    assert torch.equal(gradients[1][pruned], torch.zeros_like(gradients[1][pruned]))
    assert torch.equal(gradients[1][~pruned], gradients[0][~pruned])


def test_pruning_starts_with_the_epoch_after_the_warm_up():
    criterion = filled(warmup_epochs=3)
    assert not criterion.pruning
    for epoch, pruning in ((0, False), (2, False), (3, True), (10, True), (1, False)):
        criterion.set_epoch(epoch)
        assert criterion.pruning is pruning
    assert filled(warmup_epochs=0).pruning


def test_stored_indicator_is_the_score_before_this_forward():
    criterion = filled(indicator="stored", k=0.5, warmup_epochs=0)
    features, index = batch()
    features.requires_grad_()

    def pruned() -> Tensor:
        (gradient,) = torch.autograd.grad(criterion(features, index), features)
        return (gradient == 0).all(dim=1)

    assert not pruned().any()  # never scored: kept
    low = criterion.memory.last_log_p[index] <= math.log(0.5)
    assert 0 < low.sum() < B
    assert torch.equal(pruned(), low)
    criterion.memory.last_log_p.zero_()
    assert not pruned().any()


def test_auto_prunes_what_scored_no_better_than_chance_for_its_label():
    criterion = filled(k="auto", warmup_epochs=0)
    features, index = batch()
    features = features.roll(1, 0).requires_grad_()  # many of them another class's

    def pruned() -> Tensor:
        (gradient,) = torch.autograd.grad(criterion(features, index), features)
        return (gradient == 0).all(dim=1)

    assert not pruned().any()  # never scored: kept
    labels = labels_of().tolist()
    scores = criterion.memory.last_log_p.exp().tolist()
    expected = [
        scores[i] <= (labels.count(labels[i]) - 1) / (N - 1)  # False for NaN, not scored
        for i in range(N)
    ]
    assert 0 < sum(expected) < B
    assert criterion.pruned.tolist() == expected
    assert pruned().tolist() == [expected[i] for i in index]
    criterion.memory.last_log_p.zero_()
    assert not pruned().any()


def test_auto_keeps_the_gradient_of_what_it_does_not_prune():
    features, index = batch()
    features = features.roll(1, 0)
    gradients = []
    for k in ("auto", None):
        criterion = filled(k=k, warmup_epochs=0)
        criterion(features, index)
        given = features.clone().requires_grad_()
        criterion(given, index).backward()
        gradients.append(given.grad)
    criterion.k = "auto"
    kept = ~criterion.pruned[index]
    assert 0 < kept.sum() < B
    assert torch.equal(gradients[0][kept], gradients[1][kept])
    assert not gradients[0][~kept].any()


def test_auto_follows_the_size_of_a_class_and_new_labels():
    criterion = NTDNELoss(torch.tensor([0] * 8 + [1] * 2), D, k="auto", warmup_epochs=0)
    criterion.memory.last_log_p.fill_(math.log(0.5))
    assert criterion.pruned.tolist() == [True] * 8 + [False] * 2
    criterion.memory.relabel(torch.tensor([0] * 2 + [1] * 8))
    criterion.memory.last_log_p.fill_(math.log(0.5))
    assert criterion.pruned.tolist() == [False] * 2 + [True] * 8


def test_auto_without_any_label_prunes_nothing():
    criterion = NTDNELoss(torch.full((5,), -1), D, k="auto", warmup_epochs=0)
    criterion(torch.randn(3, D), torch.arange(3))
    criterion.set_epoch(np.int64(1))  # of any kind of integer
    assert not criterion.pruned.any()


def test_auto_of_a_large_class_survives_half_precision():
    criterion = NTDNELoss(torch.arange(140_000) % 2, 1, k="auto", warmup_epochs=0).half()
    criterion.memory.last_log_p.fill_(math.log(0.9))
    assert not criterion.pruned.any()
    criterion.memory.last_log_p.fill_(math.log(0.1))
    assert criterion.pruned.all()


def test_pruned_are_the_images_whose_last_score_is_at_most_k():
    criterion = filled(k=0.5, warmup_epochs=2)
    criterion.set_epoch(2)
    assert not criterion.pruned.any()
    criterion.refresh_indicator()
    scores = criterion.memory.last_log_p.exp()
    criterion.set_epoch(1)  # trains on all
    assert criterion.pruned.tolist() == [False] * N
    criterion.set_epoch(2)
    assert torch.equal(criterion.pruned, scores <= 0.5)
    assert 0 < criterion.pruned.sum() < N
    criterion.k = None
    assert not criterion.pruned.any()


@pytest.mark.parametrize(("k", "said"), [(0.3, 'k = 0.3 .*try k="auto"'), ("auto", "chance .*does the encoder learn")])
def test_pruning_nearly_everything_warns_once(k, said):
    criterion = filled(k=k, warmup_epochs=1)
    criterion.memory.last_log_p[:] = math.log(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.set_epoch(0)
    with pytest.warns(UserWarning, match=f"40 of the 40 images scored so far have a score of at most {said}"):
        criterion.set_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.set_epoch(2)


@pytest.mark.parametrize(("k", "said"), [(0.3, 'k = 0.3 .*try k="auto"'), ("auto", "chance .*does the encoder learn")])
def test_pruning_more_than_half_and_more_than_an_epoch_before_warns_once(k, said):
    criterion = filled(k=k, warmup_epochs=1)

    def begin(epoch: int, low: int) -> None:
        criterion.memory.last_log_p[:] = math.log(0.9)
        criterion.memory.last_log_p[:low] = math.log(0.05)
        criterion.set_epoch(epoch)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.set_epoch(0)
        criterion.set_epoch(1)  # nothing is scored yet
        for epoch, low in enumerate((30, 22, 22, 10, 20), 2):  # many but fewer, as many, more but not many
            begin(epoch, low)
        begin(6, 24)  # more in one epoch
    message = rf"26 of the 40 images .* at most {said[:7]}.*median score is 0.05\), 65% now and 60% in epoch 6;.*"
    with pytest.warns(UserWarning, match=message + said[7:]):
        begin(7, 26)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(8, 30)
    with pytest.warns(UserWarning, match="39 of the 40 images"):  # nearly all: another warning
        begin(9, 39)


def test_pruning_much_is_no_matter_for_a_warning():
    criterion = filled(k=0.3, warmup_epochs=1)
    criterion.memory.last_log_p[:] = math.log(0.9)
    criterion.memory.last_log_p[:30] = math.log(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.set_epoch(1)


def test_stored_indicator_of_a_feature_outside_the_archive_is_its_current_score():
    criterion = filled(indicator="stored", k=0.5, warmup_epochs=0)
    features = nn.functional.one_hot(torch.tensor([0, 0]), D).double().requires_grad_()
    loss = criterion(features, labels=torch.tensor([0, 1]))
    loss.backward()
    assert features.grad[0].norm() > 0
    assert features.grad[1].norm() == 0


def test_forward_records_scores_in_training_alone():
    criterion = filled()
    features, index = batch()
    criterion.eval()
    criterion(features, index)
    assert criterion.memory.last_log_p.isnan().all()
    criterion.train()
    index[0] = -1
    _, scores = criterion(features, index, labels=torch.zeros(B, dtype=torch.int64), return_scores=True)
    recorded = criterion.memory.last_log_p
    torch.testing.assert_close(recorded[index[1:]].exp().double(), scores[1:], rtol=1e-5, atol=1e-7)
    assert (~recorded.isnan()).sum() == B - 1


@pytest.mark.parametrize("loss", [NTDNELoss, SNCALoss])
def test_refresh_indicator_scores_every_image_by_its_row(loss):
    criterion = filled(loss)
    criterion.refresh_indicator()
    images = torch.arange(N)
    expected = expected_log_p(criterion, criterion.memory.rows(images), images, labels_of())
    torch.testing.assert_close(criterion.memory.last_log_p.double(), torch.tensor(expected).double())


def test_update_bank_uses_the_momentum_and_detaches():
    criterion = filled(momentum=0.25)
    features, index = batch()
    features.requires_grad_()
    before = criterion.memory.rows(torch.arange(N))
    criterion.update_bank(features, index)
    expected = formulas.update_bank(before, features, index, 0.25)
    torch.testing.assert_close(criterion.memory.rows(torch.arange(N)), torch.tensor(expected).double())
    assert not criterion.memory.storage.requires_grad


def test_sigma_q_k_and_momentum_may_be_scheduled():
    criterion = filled(warmup_epochs=0)
    criterion.sigma, criterion.q, criterion.k = 0.3, 0.5, 0.45
    features, index = batch()
    log_p = expected_log_p(criterion, features, index, labels_of()[index])
    expected = [formulas.ntdne(x, 0.5, 0.45) for x in log_p]
    assert criterion(features, index).item() == pytest.approx(sum(expected) / B)


def test_several_forwards_before_one_backward():
    """Gradient accumulation, with updates of the bank in between."""
    criterion = filled()
    (first, first_index), (second, second_index) = batch(1), batch(2)
    reference = filled(fused=False)
    expected = []
    for features, index in ((first, first_index), (second, second_index)):
        given = features.clone().requires_grad_()
        reference(given, index).backward()
        reference.update_bank(features, index)
        expected.append(given.grad)
    first, second = first.requires_grad_(), second.requires_grad_()
    total = criterion(first, first_index)
    criterion.update_bank(first, first_index)
    total = total + criterion(second, second_index)
    criterion.update_bank(second, second_index)
    total.backward()
    torch.testing.assert_close([first.grad, second.grad], expected)


def test_reference_backend_says_that_it_needs_the_rows_it_saw():
    criterion = filled(fused=False)
    features, index = batch()
    loss = criterion(features.requires_grad_(), index)
    criterion.update_bank(features, index)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_encoder():
    criterion = filled(dtype=torch.float32)
    features, index = batch()
    encoder = nn.Linear(D, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encoder(features.float())
        inside = criterion(encoded, index)
    outside = criterion(encoded, index)
    assert encoded.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    inside.backward()
    assert encoder.weight.grad.norm() > 0


@pytest.mark.parametrize("k", [0.3, "auto"])
def test_compiles_into_one_graph_and_not_anew_every_epoch(k):
    criterion, eager = (filled(dtype=torch.float32, warmup_epochs=4, k=k) for _ in range(2))
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    features, index = batch()
    for epoch in range(7):
        for loss in (criterion, eager):
            loss.set_epoch(epoch)
        results = []
        for function in (compiled, eager):
            given = features.clone().requires_grad_()
            value = function(given, index)
            value.backward()
            results.append((value.detach(), given.grad))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count == 2  # warm-up, and pruning
    torch.testing.assert_close(criterion.memory.last_log_p, eager.memory.last_log_p, equal_nan=True)


def test_compiled_with_inductor_gives_the_eager_loss():
    criterion = filled(dtype=torch.float32)
    features, index = batch()
    expected = criterion(features, index)
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True)(features, index), expected)


STEPS = """
import json, os, sys
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from benchmarks import null_gpu
from ntdne_kernels import LabelIndex, NTDNELoss
from ntdne_kernels.functional import ntdne_loss

torch.ops.load_library(null_gpu.update_kernel(Path()))
labels, index = torch.arange(1000) % 7, torch.arange(32).cuda()
criterion = NTDNELoss(labels, 16, dtype=torch.bfloat16, device="cuda")
criterion.set_epoch(20)
features = torch.nn.functional.normalize(torch.randn(32, 16), dim=1).cuda().requires_grad_()
bank, classes = criterion.memory.storage, LabelIndex.from_labels(labels.sort().values).to("cuda")
labels = labels[:32].cuda()

def operators(call):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    return [event.name for event in events if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]

def functional():
    torch.autograd.grad(ntdne_loss(features, bank, labels, classes, index, k=0.3), features)

def module():
    features.grad = None
    criterion(features, index).backward()
    criterion.update_bank(features, index)

for call in (functional, module):
    for _ in range(60):  # a criterion looks at some of the first 50 batches
        call()
    print(json.dumps([null_gpu.kernels_of(call), operators(call)]))
sys.stdout.flush()
os._exit(0)  # autograd's thread may still hold Python objects
"""


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.version.cuda is None or None in (shutil.which("cc"), shutil.which("nvcc")),
    reason="of machines with PyTorch for CUDA, compilers, and no GPU",
)
def test_a_training_step_takes_at_most_ten_launches():
    """On a GPU that computes nothing, with all that happens above the driver."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        cwd=Path(__file__).parent.parent,
        env=os.environ | null_gpu.environment() | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    functional, module = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("[["))
    assert functional[0][:3] == module[0][:3] == ["prepare", "stream", "merge_to_log_scores"]
    assert len(functional[0]) == 5, functional  # and 1, where autograd begins, and its product with the gradient
    assert module[0][3] == "record"
    assert "update_bank_kernel" in module[0][-1]
    assert len(module[0]) == 7 <= 10, module
    for _, operators in (functional, module):  # most of them allocate
        assert len(operators) <= 30, operators


@pytest.mark.parametrize(("name", "wrong"), [("reduction", "avg"), ("indicator", "store")])
def test_a_choice_that_there_is_not_is_named_when_it_is_used(name, wrong):
    criterion = filled()
    setattr(criterion, name, wrong)
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got '{wrong}'"):
        criterion(*batch())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_a_training_criterion_is_refused(reentrant):
    criterion = filled()
    features, index = batch()
    features.requires_grad_()
    loss = checkpoint(criterion, features, index, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="called inside backward, as by activation checkpointing"):
        loss.backward()
    criterion.eval()
    again = checkpoint(criterion, features, index, use_reentrant=reentrant)
    expected = torch.autograd.grad(criterion(features, index), features)[0]
    again.backward()
    torch.testing.assert_close(features.grad, expected)


def test_values_are_not_looked_at_in_compiled_code_though_they_may_be():
    criterion = filled(validate=True)
    features, index = batch()
    expected = criterion(features, index)
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True, backend="eager")(features, index), expected)


def test_compiled_code_counts_on_a_cpu_what_it_leaves_out():
    criterion = filled()
    features, index = batch()
    features[3] = torch.nan
    before = criterion.memory.skipped_rows()
    torch.compile(criterion, backend="eager")(features, index)
    assert criterion.memory.skipped_rows() == before + 1


def test_no_grad_gives_the_same_loss():
    criterion = filled()
    features, index = batch()
    with torch.no_grad():
        loss = criterion(features, index)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, criterion(features.requires_grad_(), index).detach())


@pytest.mark.parametrize("loss", [NTDNELoss, SNCALoss])
@pytest.mark.parametrize("fused", [True, False])
def test_empty_batch_is_no_error(loss, fused):
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        criterion = filled(loss, reduction=reduction, fused=fused)
        features = torch.empty(0, D, requires_grad=True)
        index = torch.empty(0, dtype=torch.int64)
        value = criterion(features, index)
        assert value.shape == shape
        assert value.sum() == 0
        value.sum().backward()
        criterion.update_bank(features, index)


def test_any_integer_dtype_of_index():
    criterion = filled()
    features, index = batch()
    expected = criterion(features, index)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        assert torch.equal(criterion(features, index.to(dtype)), expected)
    criterion.update_bank(features, index.to(torch.uint8))


def train(criterion: nn.Module, encoder: nn.Module, optimizer, data: Tensor, epochs: range) -> None:
    for epoch in epochs:
        criterion.set_epoch(epoch)
        shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        for index in shuffle.split(B):
            features = encoder(data[index])
            loss = criterion(features, index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            criterion.update_bank(features, index)


def started(indicator: str, seed: int):
    torch.manual_seed(seed)
    criterion = NTDNELoss(labels_of(), D, indicator=indicator, warmup_epochs=2, k=0.4, unit_slope=False, sigma=0.2)
    encoder = nn.Linear(4, D)
    return criterion, encoder, torch.optim.SGD(encoder.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize("indicator", ["current", "stored"])
def test_a_killed_and_resumed_run_continues_bit_for_bit(indicator, tmp_path):
    data = torch.randn(N, 4, generator=torch.Generator().manual_seed(9))
    criterion, encoder, optimizer = started(indicator, seed=0)
    train(criterion, encoder, optimizer, data, range(3))
    parts = {"criterion": criterion, "encoder": encoder, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
    train(criterion, encoder, optimizer, data, range(3, 6))

    resumed = dict(zip(parts, started(indicator, seed=1), strict=True))
    for name, state in torch.load(tmp_path / "checkpoint.pt").items():
        resumed[name].load_state_dict(state)
    assert resumed["criterion"].epoch == 2
    assert resumed["criterion"].pruning
    train(*resumed.values(), data, range(3, 6))
    assert torch.equal(resumed["encoder"].weight, encoder.weight)
    for name, tensor in criterion.memory.state_dict().items():
        torch.testing.assert_close(
            resumed["criterion"].memory.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True
        )


def test_a_refused_checkpoint_leaves_the_epoch_too():
    other = NTDNELoss(labels_of(seed=3), D, dtype=torch.float64)
    other.set_epoch(30)
    criterion = filled()
    with pytest.raises(RuntimeError, match="memory: labels differ at"):
        criterion.load_state_dict(other.state_dict())
    assert criterion.epoch == 0
    assert not criterion.pruning


@pytest.mark.parametrize("loss", [NTDNELoss, SNCALoss])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [0, 1e-13, 1e-41, torch.nan, torch.inf, -torch.inf])
def test_features_without_a_direction_are_named_and_nothing_is_recorded(loss, fused, dtype, bad):
    """A diverged encoder must not train on in silence."""
    criterion = filled(loss, fused=fused)
    features, index = batch()
    given = features.to(dtype)
    given[3], given[3, 2] = 0, bad
    given.requires_grad_()
    with pytest.raises(
        ValueError, match=r"features: expected rows of finite norm, at least 1e-12, got norm \S+ in row 3"
    ):
        criterion(given, index)
    assert criterion.memory.last_log_p.isnan().all()


def test_a_short_feature_that_has_a_direction_trains():
    criterion = filled(dtype=torch.float32)
    features, index = batch()
    given = features.float().requires_grad_()
    criterion(given, index).backward()
    short = (features * 1e-11).float().requires_grad_()
    criterion(short, index).backward()
    torch.testing.assert_close(short.grad * 1e-11, given.grad)


@pytest.mark.parametrize("values", [{"q": 0}, {"q": 2.0}, {"k": 0.0}, {"k": 1.5}, {"sigma": 0}, {"momentum": 2}])
def test_a_schedule_that_leaves_the_range_is_named(values):
    criterion = filled(warmup_epochs=0)
    ((name, value),) = values.items()
    setattr(criterion, name, value)
    features, index = batch()
    with pytest.raises(ValueError, match=f"{name}: expected a number in"):  # noqa: PT012
        criterion(features, index)
        criterion.update_bank(features, index)


def ddp_worker(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    criterion = filled(dtype=torch.float32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.criterion = nn.Linear(D, D), criterion

        def forward(self, images: Tensor, index: Tensor) -> Tensor:
            features = self.encoder(images)
            loss = self.criterion(features, index)
            self.criterion.update_bank(features, index)
            return loss

    model = nn.parallel.DistributedDataParallel(Model())
    features, index = batch(seed=1 + rank)
    for _ in range(2):
        model(features.float(), index).backward()
    torch.save((model.module.encoder.weight.grad, criterion.memory.storage), f"{results}{rank}")
    torch.distributed.barrier()  # see examples/train_distributed.py
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_gradients_and_leaves_each_bank_alone(tmp_path):
    store, results = str(tmp_path / "store"), str(tmp_path / "rank")
    torch.multiprocessing.spawn(ddp_worker, (store, results), nprocs=2)
    (first, first_bank), (second, second_bank) = (torch.load(f"{results}{rank}") for rank in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first_bank, second_bank)


def test_a_copy_is_independent():
    criterion = filled()
    other = copy.deepcopy(criterion)
    features, index = batch()
    other.update_bank(features, index)
    assert not torch.equal(other.memory.storage, criterion.memory.storage)


def test_never_calling_set_epoch_warns_once_after_a_pass_over_the_archive():
    criterion = filled()
    features, index = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(N // B):
            criterion(features, index)
    with pytest.warns(UserWarning, match="set_epoch was never called"):
        criterion(features, index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            criterion(features, index)


@pytest.mark.parametrize("options", [{"k": None}, {"warmup_epochs": 0}])
def test_set_epoch_is_not_missed_where_it_changes_nothing(options):
    criterion = filled(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            criterion(*batch(seed))
            criterion.update_bank(*batch(seed))


def test_never_updating_the_bank_warns_after_a_pass_over_the_archive():
    criterion, _ = made(SNCALoss)
    for seed in range(N // B):
        criterion(*batch(seed))
    with pytest.warns(UserWarning, match="the bank still holds its random start"):
        criterion(*batch(9))


def test_unlabelled_images_have_no_score_to_rank_by():
    labels = labels_of()
    labels[:5] = -1
    criterion = NTDNELoss(labels, D)
    criterion.refresh_indicator()
    assert criterion.memory.last_log_p.isnan().nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert criterion.memory.last_log_p.argsort()[-5:].sort().values.tolist() == [0, 1, 2, 3, 4]


def test_several_ranks_with_a_bank_each_warn_once(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    criterion = filled()
    with pytest.warns(UserWarning, match="each of the 4 ranks keeps a bank of its own") as warned:
        criterion(*batch())
        criterion(*batch())
    assert len(warned) == 1


FEATURES, INDEX = batch()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c(FEATURES, INDEX.float()), TypeError, "index: expected an integer tensor, got torch.float32"),
        (lambda c: c(FEATURES, INDEX[:3]), ValueError, "index: expected one value for each of the 12 features, got 3"),
        (lambda c: c(FEATURES, INDEX + N), IndexError, "index: expected -1 or a bank row from 0 to 39"),
        (lambda c: c(FEATURES, INDEX * 0 - 2), IndexError, "index: expected -1 or a bank row from 0 to 39, got -2"),
        (lambda c: c(FEATURES), ValueError, "index: expected the images of the batch, or labels"),
        (lambda c: c(FEATURES, INDEX * 0 - 1), ValueError, "labels: expected labels, because index is -1 in row 0"),
        (lambda c: c(FEATURES, labels=INDEX.float()), TypeError, "labels: expected an integer tensor"),
        (
            lambda c: c(FEATURES[:, :4], INDEX),
            ValueError,
            r"features: expected shape \(B, 6\) as in the bank, got \(12, 4",
        ),
        (lambda c: c(FEATURES.long(), INDEX), TypeError, "features: expected a float tensor, got torch.int64"),
        (lambda c: c(FEATURES.to("meta"), INDEX), ValueError, "features: expected the bank's device, cpu, got meta"),
        (lambda c: c(FEATURES, ["a"] * 12), TypeError, "index: expected integers, got 'a'"),
        (lambda c: c(FEATURES, [0.5] * 12), TypeError, "index: expected integers, got 0.5"),
        (lambda c: c(FEATURES, [None] * 12), TypeError, "index: expected integers, got None"),
        (
            lambda c: c(FEATURES, labels=["a"] * 12),
            TypeError,
            "labels: expected integers, got names such as 'a'; this line",
        ),
        (lambda c: c(None, INDEX), TypeError, "features: expected a float tensor, got NoneType"),
        (lambda c: c.update_bank(FEATURES, INDEX + N), IndexError, "index: expected -1 or a bank row from 0 to 39"),
        (lambda c: c.update_bank(FEATURES * torch.nan, INDEX), ValueError, "features: .* got norm nan in row 0"),
        (lambda c: c.set_epoch(-1), ValueError, "epoch: expected 0 or more, got -1"),
        (lambda c: c.set_epoch(0.5), TypeError, "epoch: expected an integer, got float"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(call, error, message):
    criterion = filled()
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=message):
        call(criterion)
    for name, value in criterion.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0}, ValueError, r"sigma: expected a number in \(0, inf\), got 0"),
        ({"q": 0}, ValueError, r"q: expected a number in \(0, 1\], got 0"),
        ({"k": 1.0}, ValueError, r"k: expected a number in \(0, 1\), got 1.0"),
        ({"k": "0.3"}, ValueError, r"k: expected a number in \(0, 1\), 'auto' or None, got '0.3'"),
        ({"momentum": 2}, ValueError, r"momentum: expected a number in \[0, 1\], got 2"),
        ({"warmup_epochs": -1}, ValueError, r"warmup_epochs: expected a number in \[0, inf\), got -1"),
        ({"indicator": "old"}, ValueError, "indicator: expected one of 'current', 'stored', got 'old'"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'max'"),
        ({"dim": -4}, ValueError, "dim: expected at least 1, got -4"),
        ({"unit_slope": "no"}, TypeError, "unit_slope: expected True or False, got 'no'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        NTDNELoss(labels_of(), **{"dim": D} | options)
