"""What a training loop does wrong is said once, at its line, and nothing is said of one that does it right."""

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensorMode

from ntdne_kernels import NTDNELoss, SNCALoss, watch
from tests import ranks

D = 4


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(N: int, C: int) -> Tensor:
    return torch.randint(C, (N,), generator=draw())


def criterion_of(N: int = 400, C: int = 10, **options) -> SNCALoss:
    return SNCALoss(labels_of(N, C), D, generator=draw(), **options)


def shuffled(N: int, B: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    while True:
        for index in torch.randperm(N, generator=draw(seed)).split(B):
            if steps == 0:
                return
            steps -= 1
            yield index
        seed += 1


def train(criterion: nn.Module, batches: Iterable[Tensor], as_index: Callable[[Tensor], Tensor], **given) -> list[str]:
    """The warnings of training on batches, with an index made from the right one."""
    device = criterion.memory.device
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step, right in enumerate(batches):
            features, index = torch.randn(len(right), D, generator=draw(step)).to(device), as_index(right).to(device)
            line = inspect.currentframe().f_lineno + 1
            criterion(features, index, **given)
            criterion.update_bank(features, index)
    assert {(warning.filename, warning.lineno) for warning in said} <= {(__file__, line)}
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize(
    ("N", "C", "B"), [(400, 10, 16), (400, 2, 32), (1437, 10, 128), (20_000, 1000, 64), (1000, 10, 3)]
)
def test_labels_given_as_the_index_are_found_within_50_steps(N, C, B):
    criterion = criterion_of(N, C)
    (said,) = train(criterion, shuffled(N, B, 50), lambda index: labels_of(N, C)[index])
    assert re.match(
        r"all of the \d+ indices looked at are numbers of classes, and \d+ stand in their batch before; is `index` the "
        r"position of each image in the archive \(IndexedDataset\), and not its label\?",
        said,
    )


@pytest.mark.gpu
def test_labels_given_as_the_index_are_found_on_a_gpu_without_synchronising():
    criterion = criterion_of().to("cuda")
    labels, features = labels_of(400, 10).cuda(), torch.randn(50, 32, D, device="cuda")
    criterion(features[0], labels[:32])  # allocates what is made once
    criterion.train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(50):
                criterion(features[step], labels[32 * (step % 12) :][:32], labels=labels[:32])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        criterion(features[0], labels[:32])
    assert sum("are numbers of classes" in str(warning.message) for warning in said) == 1
    assert sum("given beside an index differ" in str(warning.message) for warning in said) == 1


def test_labels_as_the_index_are_found_where_some_images_have_none():
    labels = labels_of(400, 10)
    labels[::3] = -1
    batches = shuffled(400, 16, 20)
    (said,) = train(SNCALoss(labels, D), batches, lambda index: labels[index], labels=-torch.ones(16).long())
    assert "are numbers of classes" in said


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("N", [20, 40, 400, 5000])
@pytest.mark.parametrize("C", [2, 10])
def test_shuffled_positions_are_no_labels(N, C, seed):
    steps = watch.STEPS + 10  # past the search for labels, and past two passes where the archive is small
    assert train(criterion_of(N, C), shuffled(N, 16, steps, seed), lambda index: index) == []


def overfit_one_batch(N: int, C: int) -> Iterator[Tensor]:
    yield from [torch.arange(8)] * 100


def in_order(N: int, C: int) -> Iterator[Tensor]:
    yield from torch.arange(N).split(8)


def with_replacement(N: int, C: int) -> Iterator[Tensor]:
    for seed in range(100):
        yield torch.randint(N, (32,), generator=draw(seed))


def a_rare_class_as_often_as_the_others(N: int, C: int) -> Iterator[Tensor]:
    for seed in range(100):
        rare = torch.randint(N - 5, N, (16,), generator=draw(seed))
        yield torch.cat([rare, torch.randint(N, (16,), generator=draw(seed + 1))])


@pytest.mark.parametrize(
    "sampler", [overfit_one_batch, in_order, with_replacement, a_rare_class_as_often_as_the_others]
)
def test_positions_of_other_samplers_are_no_labels(sampler):
    criterion = criterion_of(2000, 50)
    assert train(criterion, sampler(2000, 50), lambda index: index) == []


def test_a_whole_pass_over_few_images_is_warned_of():
    criterion = criterion_of(40, 3)
    said = train(criterion, shuffled(40, 8, 12), lambda index: 10 + index % 4)
    assert said == [
        "40 images were seen, but they were the same 4; is `index` the position of each image in the archive "
        "(IndexedDataset), and not its label?"
    ]


def test_sparse_labels_as_the_index_are_found_after_a_whole_pass():
    labels = torch.tensor([3, 17, 30])[labels_of(40, 3)]
    criterion = SNCALoss(labels, D, generator=draw())
    said = train(criterion, shuffled(40, 1, 45), lambda index: labels[index])  # one alone repeats in no batch
    assert ["they were the same 3" in text for text in said] == [True]


def test_a_curriculum_and_relabel_in_the_first_pass_are_no_mistakes():
    criterion = criterion_of(400, 10)
    easy = torch.randperm(400, generator=draw(7))[:80]
    assert train(criterion, shuffled(80, 16, 30), lambda index: easy[index]) == []
    criterion = criterion_of(400, 10)
    assert train(criterion, shuffled(400, 16, 24), lambda index: index) == []
    criterion.memory.relabel((criterion.memory.labels + 1) % 10)  # all scores are forgotten
    assert train(criterion, shuffled(400, 16, 3, seed=1), lambda index: index) == []


def test_labels_that_differ_from_the_archives_are_warned_of_once():
    criterion = criterion_of()
    whole, index = labels_of(400, 10), torch.arange(0, 400, 10)
    given = whole[index].clone()
    given[:7] = (given[:7] + 1) % 10
    given[7:9] = -1  # no label given
    features = torch.randn(40, D)
    with pytest.warns(UserWarning, match="labels: 7 of the 38 given beside an index differ .* IndexedDataset") as said:
        criterion(features, index, labels=given)
        criterion.eval()
        criterion(features, index, labels=given)
    assert len(said) == 1


def test_right_labels_beside_an_index_and_any_without_one_cause_no_warning():
    criterion = criterion_of()
    index, features = torch.arange(0, 400, 10), torch.randn(40, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(features, index, labels=labels_of(400, 10)[index])
        criterion(features, index, labels=torch.full_like(index, -1))
        criterion(features, torch.full_like(index, -1), labels=index % 10)
        criterion(features, labels=index % 10)


def differ_over_ranks() -> list[str]:
    criterion = SNCALoss(labels_of(400, 10), D, process_group=distributed.group.WORLD)
    index = torch.arange(20) + 20 * distributed.get_rank()
    given = labels_of(400, 10)[index].clone()
    if distributed.get_rank() == 1:
        given[3] = (given[3] + 1) % 10
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            criterion(torch.randn(20, D), index, labels=given)
    return [str(warning.message)[:29] for warning in said]


def test_each_rank_warns_of_its_own_labels():
    assert ranks.run(differ_over_ranks, 2, timeout=60) == [[], ["labels: 1 of the 20 given bes"]]


def test_training_by_labels_alone_with_updates_is_warned_of_after_an_epoch():
    criterion, labels = criterion_of(), labels_of(400, 10)
    with pytest.warns(
        UserWarning, match="400 images were trained on with labels alone while the bank was updated"
    ) as said:
        for index in shuffled(400, 40, 30):
            features = torch.randn(40, D)
            criterion(features, labels=labels[index])
            criterion.update_bank(features, index)
    assert len(said) == 1


def test_other_images_may_be_trained_on_by_labels_alone():
    """Without updates, or beside images with an index, or outside of training."""
    labels = labels_of(400, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion = criterion_of()
        criterion.memory.update_(torch.randn(400, D), torch.arange(400))
        for index in shuffled(400, 40, 30):
            criterion(torch.randn(40, D), labels=labels[index])
        criterion = criterion_of()
        for index in shuffled(400, 40, 30):
            features = torch.randn(40, D)
            criterion(features, labels=labels[index])
            criterion(features, index)
            criterion.update_bank(features, index)
        for criterion, training in ((criterion_of().eval(), True), (criterion_of(), False)):
            for index in shuffled(400, 40, 30):
                with torch.set_grad_enabled(training):
                    criterion(torch.randn(40, D), labels=labels[index])
                criterion.update_bank(torch.randn(40, D), index)


def test_a_copy_is_watched_from_the_start():
    criterion = criterion_of()
    features, index = torch.randn(16, D), torch.arange(16) % 10
    for other in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        with pytest.warns(UserWarning, match="numbers of classes"):
            other(features, index)
    assert pickle.loads(pickle.dumps(criterion))._watch._warned == set()


def test_a_compiled_criterion_is_not_watched():
    criterion = NTDNELoss(labels_of(400, 10), D)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(16, D), torch.arange(16) % 10, labels=torch.arange(16) % 7)


def test_batches_of_a_cuda_graph_are_not_looked_at(monkeypatch):
    """Looking copies to pinned memory and records an event, which each replay would repeat."""
    watched, looked, step = watch.Watch(), [], 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: step in (2, 3))
    monkeypatch.setattr(watched, "_report_arrived", lambda: looked.append(("arrived", step)))
    monkeypatch.setattr(watched, "_look_for_labels", lambda index, memory: looked.append(("index", step)))
    monkeypatch.setattr(watched, "_report", lambda report, counts: looked.append(("labels", step)))
    with FakeTensorMode():
        index = torch.zeros(4, dtype=torch.int64, device="cuda")
        for step in range(1, 5):  # noqa: B007
            watched.compare(index, index, lambda: index)
            watched.trained(4, index, None)
    in_a_step = ["arrived", "labels", "arrived", "index"]
    assert looked == [(what, step) for step in (1, 4) for what in in_a_step]


def test_counts_are_reported_when_they_have_arrived(monkeypatch):
    """As on a GPU: counted in one step, reported in a later one, and without waiting."""
    reported: list[tuple[int, ...]] = []
    arrived = [False]

    class Event:
        def record(self) -> None: ...
        def query(self) -> bool:
            return arrived[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: torch.zeros(*shape, **options))
    watched = watch.Watch()
    counts = torch.tensor([3, 4]).to("meta")
    monkeypatch.setattr(Tensor, "copy_", lambda own, other, non_blocking: own.fill_(5))
    watched._report(lambda *counts: reported.append(counts), counts, 9)
    watched._report_arrived()
    assert reported == []
    arrived[0] = True
    watched._report_arrived()
    watched._report_arrived()
    assert reported == [(5, 5, 9)]
