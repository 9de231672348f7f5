"""NTDNEMetricLoss in the hands of pytorch-metric-learning itself."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests import formulas

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, samplers, trainers
from pytorch_metric_learning.losses import CrossBatchMemory

from ntdne_kernels import IndexedDataset, functional
from ntdne_kernels.metric_learning import NTDNEMetricLoss

D, C = 6, 3


def clusters(N: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, D) of any length around C corners, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=draw)
    return 2 * nn.functional.one_hot(labels, D) + torch.randn(N, D, generator=draw), labels


def ntdne(features: Tensor, bank: Tensor, labels: Tensor, bank_labels: Tensor, index: list[int], k=None) -> list[float]:
    """The loss of each query, by the formulas, of features and rows that are no unit vectors."""
    unit, rows = (nn.functional.normalize(x.double(), dim=1) for x in (features, bank))
    log_p = formulas.leave_one_out(unit, rows, labels, bank_labels, torch.tensor(index), 0.1)[0]
    return [formulas.ntdne(x, 0.7, k) for x in log_p]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("k", [None, 0.3])
def test_a_batch_alone_is_its_own_bank(k):
    features, labels = clusters(20)
    features.requires_grad_()
    loss = NTDNEMetricLoss(k=k)(features, labels)
    assert loss.item() == pytest.approx(mean(ntdne(features, features, labels, labels, list(range(20)), k)), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, features)
    unit = nn.functional.normalize(features, dim=1)
    expected = functional.ntdne_loss(unit, unit, labels, labels, torch.arange(20), k=k, backend="reference")
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


def test_references_are_the_bank():
    (features, labels), (references, reference_labels) = clusters(8), clusters(30, seed=1)
    references.requires_grad_()
    loss = NTDNEMetricLoss()(features, labels, ref_emb=references, ref_labels=reference_labels)
    expected = mean(ntdne(features, references, labels, reference_labels, [-1] * 8))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(loss, references)[0].norm() > 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_copies_are_found_whatever_integers_the_labels_are(dtype):
    (features, labels), (others, other_labels) = clusters(8), clusters(30, seed=1)
    references = {"ref_emb": torch.cat([features, others]), "ref_labels": torch.cat([labels, other_labels])}
    assert NTDNEMetricLoss()(features, labels.to(dtype), **references) == NTDNEMetricLoss()(
        features, labels, **references
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_copies_among_the_references_are_no_neighbours(dtype):
    features, labels = (x.to(dtype) if x.is_floating_point() else x for x in clusters(8))
    others, other_labels = (x.to(dtype) if x.is_floating_point() else x for x in clusters(30, seed=1))
    expected = mean(ntdne(features, others, labels, other_labels, [-1] * 8))
    twice = torch.cat([features[2:3].clone(), others, features[2:3].clone()])  # two copies of one embedding
    with_copies = NTDNEMetricLoss(reducer=reducers.DoNothingReducer())(
        features, labels, ref_emb=twice, ref_labels=torch.cat([labels[2:3], other_labels, labels[2:3]])
    )["loss"]["losses"]
    assert with_copies[2].item() == pytest.approx(
        ntdne(features, others, labels, other_labels, [-1] * 8)[2], rel=1e-5 if dtype != torch.float64 else 1e-12
    )
    loss = NTDNEMetricLoss()(features, labels, ref_emb=others, ref_labels=other_labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_same_features_under_another_label_are_another_image():
    features, labels = clusters(8)
    other = (labels + 1) % C
    every = torch.cat([features, features])
    loss = NTDNEMetricLoss()(features, labels, ref_emb=every, ref_labels=torch.cat([labels, other]))
    expected = mean(ntdne(features, every, labels, torch.cat([labels, other]), list(range(8))))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(epsilon=2.0)])
def test_cross_batch_memory_counts_no_copy_of_the_query(miner):
    """The memory holds the batch too: each query's nearest neighbour would be the query itself."""
    memory = CrossBatchMemory(NTDNEMetricLoss(), D, memory_size=20, miner=miner)
    rows, row_labels = torch.zeros(0, D), torch.zeros(0, dtype=torch.int64)
    for step in range(6):  # the memory is full after two, and begins anew in the middle of a batch
        features, labels = clusters(8, seed=step)
        features.requires_grad_()
        loss = memory(features, labels)
        rows, row_labels = torch.cat([rows, features.detach()])[-20:], torch.cat([row_labels, labels])[-20:]
        own = list(range(len(rows) - 8, len(rows)))
        assert loss.item() == pytest.approx(mean(ntdne(features, rows, labels, row_labels, own)), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, features)
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
    copies = mean(ntdne(features, rows, labels, row_labels, [-1] * 8))
    assert loss.item() - copies > 0.01  # the loss if copies counted


def test_a_miner_weighs_the_anchors_as_in_the_librarys_nca():
    features, labels = clusters(8)
    chosen = (torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]), torch.tensor([0, 3]), torch.tensor([5, 6]))
    each = torch.tensor(ntdne(features, features, labels, labels, list(range(8))))
    counts = torch.bincount(torch.cat(chosen), minlength=8)
    loss = NTDNEMetricLoss()(features, labels, chosen)
    assert loss.item() == pytest.approx((each * counts / counts.max()).mean().item(), rel=1e-5)


def test_unlabelled_references_count_as_neighbours_of_no_class():
    (features, labels), (references, reference_labels) = clusters(8), clusters(30, seed=1)
    reference_labels[::3] = -1
    loss = NTDNEMetricLoss()(features, labels, ref_emb=references, ref_labels=reference_labels)
    expected = mean(ntdne(features, references, labels, reference_labels, [-1] * 8))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("with_miner", [False, True])
def test_the_librarys_trainer_trains_with_it(with_memory, with_miner):
    logging.getLogger("PML").setLevel(logging.WARNING)
    torch.manual_seed(0)
    features, labels = clusters(90)
    data = IndexedDataset(TensorDataset(features.float(), labels))
    trunk, embedder = nn.Linear(D, 8), nn.Linear(8, D)
    loss = NTDNEMetricLoss()
    before = loss(embedder(trunk(features)), labels).item()
    trainers.MetricLossOnly(
        models={"trunk": trunk, "embedder": embedder},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *embedder.parameters()], lr=0.02)},
        batch_size=30,
        loss_funcs={"metric_loss": CrossBatchMemory(loss, D, memory_size=60) if with_memory else loss},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner(epsilon=0.5)} if with_miner else {},
        dataset=data,
        sampler=samplers.MPerClassSampler(data.labels, m=10, batch_size=30, length_before_new_iter=90),
        dataloader_num_workers=0,
        data_and_label_getter=lambda batch: batch[:2],
    ).train(num_epochs=10)
    assert loss(embedder(trunk(features)), labels).item() < 0.6 * before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0}, ValueError, r"sigma: expected a number in \(0, inf\), got 0"),
        ({"q": 2}, ValueError, r"q: expected a number in \(0, 1\], got 2"),
        ({"k": "auto"}, TypeError, "k: expected a number, got str"),
        ({"distance": distances.LpDistance()}, ValueError, "distance: expected CosineSimilarity, got LpDistance"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        NTDNEMetricLoss(**options)


def test_missing_labels_are_named():
    with pytest.raises(TypeError, match="labels: expected integers or names, got NoneType"):
        NTDNEMetricLoss()(torch.randn(4, D))


def test_cross_batch_memory_still_refuses_other_losses():
    with pytest.raises(Exception, match="CrossBatchMemory not supported for ArcFaceLoss"):
        CrossBatchMemory(losses.ArcFaceLoss(3, D), D)


def test_only_this_module_imports_the_library():
    script = (
        "import sys, ntdne_kernels; assert 'pytorch_metric_learning' not in sys.modules\n"
        "sys.modules['pytorch_metric_learning'] = None\n"
        "from ntdne_kernels.metric_learning import NTDNEMetricLoss"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        "ImportError: NTDNEMetricLoss needs pytorch-metric-learning: pip install pytorch-metric-learning"
        in ended.stderr
    )
