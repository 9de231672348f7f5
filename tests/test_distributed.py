"""A bank shared by several ranks: the numbers of one process on the same batch, whatever the number of ranks.

Each test computes in this process what the ranks must find together. Shapes: W ranks, B images of all ranks' batches, N
of the archive, D values.
"""

import copy
import inspect
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ntdne_kernels import MemoryBank, NTDNELoss, SNCALoss, neighbourhood_loss
from ntdne_kernels.bank import memory_bank
from ntdne_kernels.bank.batch import LocalBatch, ShardedBatch
from ntdne_kernels.distributed import OneProcess, Ranks
from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.bank_update import skipped_counter
from tests import ranks

D = 6
LABELS = {
    "mixed": torch.randint(-1, 4, (41,), generator=torch.Generator().manual_seed(1)),
    "a class for each rank": torch.arange(4).repeat_interleave(10),
    "fewer images than ranks": torch.tensor([1, 0, 1]),
    "one class": torch.zeros(13, dtype=torch.int64),
    "each its own class": torch.arange(9),
}
PAPER: dict[str, Any] = {"k": 0.3, "warmup_epochs": 20, "unit_slope": False}
LOSSES: dict[str, Any] = {
    "default": (NTDNELoss, {}),
    "default, none": (NTDNELoss, {"reduction": "none"}),
    "NTDNE": (NTDNELoss, PAPER | {"k": None}),
    "pruning": (NTDNELoss, PAPER | {"k": 0.2, "warmup_epochs": 0}),
    "pruning by stored scores": (NTDNELoss, PAPER | {"k": 0.2, "warmup_epochs": 0, "indicator": "stored"}),
    "pruning at chance": (NTDNELoss, PAPER | {"k": "auto", "warmup_epochs": 0}),
    "SNCA": (SNCALoss, {}),
    "small sigma": (SNCALoss, {"sigma": 0.001}),
    "sum": (NTDNELoss, PAPER | {"reduction": "sum"}),
    "none": (NTDNELoss, PAPER | {"reduction": "none"}),
    "definition": (NTDNELoss, PAPER | {"fused": False}),
}
SIZES = {1: [7], 2: [5, 2], 3: [3, 0, 4], 4: [2, 3, 0, 2]}
"""Images of each rank in a batch of 7."""


def criterion_for(labels: Tensor, loss: str, **options: Any) -> NTDNELoss | SNCALoss:
    kind, settings = LOSSES[loss]
    return kind(
        labels, D, generator=torch.Generator().manual_seed(0), **{"dtype": torch.float64, **settings, **options}
    )


def batches(N: int, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features, images (some twice in a batch, some in no archive), and labels for those."""
    made = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(7, D, generator=made, dtype=torch.float64),
            torch.randint(-1, N, (7,), generator=made),
            torch.randint(0, 4, (7,), generator=made),
        )
        for _ in range(steps)
    ]


def train(criterion: NTDNELoss | SNCALoss, own: slice, steps: int = 3) -> dict[str, Tensor]:
    """What steps with the batch's rows `own` give: losses, gradients, scores; then rows and last scores."""
    found: dict[str, list[Tensor]] = {"losses": [], "gradients": [], "scores": []}
    for features, index, labels in batches(len(criterion.memory), steps):
        mine = features[own].clone().requires_grad_()
        loss, scores = criterion(mine, index[own], labels=labels[own], return_scores=True)
        loss.sum().backward()
        criterion.update_bank(mine, index[own])
        for name, value in (("losses", loss.detach()), ("gradients", mine.grad), ("scores", scores)):
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()} | {
        "rows": criterion.memory.rows(torch.arange(len(criterion.memory))),
        "last": criterion.memory.last_log_p.clone(),
        "pruned": criterion.pruned if isinstance(criterion, NTDNELoss) else torch.zeros(0),
    }


def own_slice(sizes: list[int]) -> slice:
    begin = sum(sizes[: distributed.get_rank()])
    return slice(begin, begin + sizes[distributed.get_rank()])


def train_over_ranks(cases: list[tuple[str, str]], sizes: list[int], piece: int) -> list[dict[str, Tensor]]:
    sharded.PIECE["cpu"] = piece
    return [
        train(criterion_for(LABELS[labels], loss, process_group=distributed.group.WORLD), own_slice(sizes))
        for labels, loss in cases
    ]


@pytest.mark.parametrize(("W", "piece"), [(1, 1024), (2, 4), (3, 3), (4, 1024)])
def test_the_numbers_are_those_of_one_process_on_the_same_batch(W, piece):
    cases = [(labels, loss) for labels in LABELS for loss in (LOSSES if labels == "mixed" else ("NTDNE", "SNCA"))]
    found = ranks.run(train_over_ranks, W, cases, SIZES[W], piece)
    for case, (labels, loss) in enumerate(cases):
        expected = train(criterion_for(LABELS[labels], loss), slice(0, 7))
        of_ranks = [rank[case] for rank in found]
        none = LOSSES[loss][1].get("reduction") == "none"
        joined = {
            "gradients": torch.cat([rank["gradients"] for rank in of_ranks], dim=1) / (1 if none else W),
            "scores": torch.cat([rank["scores"] for rank in of_ranks], dim=1),
            "last": torch.cat([rank["last"] for rank in of_ranks]),
            "pruned": torch.cat([rank["pruned"] for rank in of_ranks]),
        }
        if none:
            joined["losses"] = torch.cat([rank["losses"] for rank in of_ranks], dim=1)
        else:
            for rank in of_ranks:
                torch.testing.assert_close(rank["losses"], expected["losses"], rtol=1e-12, atol=1e-12)
        for name, value in joined.items():
            torch.testing.assert_close(
                value,
                expected[name],
                rtol=1e-10,
                atol=1e-10,
                equal_nan=True,
                msg=lambda m, case=(labels, loss, name): f"{case}: {m}",
            )
        for rank in of_ranks:
            torch.testing.assert_close(rank["rows"], expected["rows"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("alone", "of_many", "more"),
    [(OneProcess, Ranks, {"maximum"}), (LocalBatch, ShardedBatch, {"sizes"})],
)
def test_one_process_and_many_have_the_same_methods(alone, of_many, more):
    methods = [{name for name in vars(kind) if not name.startswith("_")} for kind in (alone, of_many)]
    assert methods[1] - methods[0] == more
    data = methods[0] - methods[1]
    assert not any(callable(getattr(alone, name)) for name in data), data
    for name in methods[0] & methods[1]:
        assert list(inspect.signature(getattr(alone, name)).parameters) == list(
            inspect.signature(getattr(of_many, name)).parameters
        )


def shared(N: int = 41, **options: Any) -> NTDNELoss:
    labels = torch.randint(0, 4, (N,), generator=torch.Generator().manual_seed(1))
    options = {"dtype": torch.float64, "process_group": distributed.group.WORLD, **PAPER, **options}
    return NTDNELoss(labels, D, generator=torch.Generator().manual_seed(0), **options)


def alone(N: int = 41, **options: Any) -> NTDNELoss:
    return shared(N, process_group=None, **options)


class Wrapped(nn.Module):
    """Encoder and criterion in one module, as some give it to DistributedDataParallel."""

    def __init__(self, criterion: NTDNELoss) -> None:
        super().__init__()
        self.encoder = encoder()
        self.criterion = criterion

    def forward(self, images: Tensor, index: Tensor) -> Tensor:
        return self.criterion(self.encoder(images), index)


def encoder() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D)).double()


def optimise(model: nn.Module, criterion: NTDNELoss, own: slice, accumulate: int = 2) -> dict[str, Tensor]:
    """Six batches, a step of momentum after each second one; the encoder's weights and the bank then."""
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    optimiser = torch.optim.SGD(plain.encoder.parameters(), lr=0.5, momentum=0.9)
    made = torch.Generator().manual_seed(3)
    for step in range(6):
        images = torch.randn(7, 5, generator=made, dtype=torch.float64)
        index = torch.randint(0, len(criterion.memory), (7,), generator=made)
        last = step % accumulate == accumulate - 1
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                (model(images[own], index[own]) / accumulate).backward()
        else:
            (model(images[own], index[own]) / accumulate).backward()
        if last:
            optimiser.step()
            optimiser.zero_grad()
        criterion.update_bank(plain.encoder(images[own]).detach(), index[own])
    return {name: value.clone() for name, value in plain.encoder.state_dict().items()} | {
        "rows": criterion.memory.rows(torch.arange(len(criterion.memory)))
    }


def optimise_over_ranks(sizes: list[int], broadcast_buffers: bool) -> dict[str, Tensor]:
    criterion = shared()
    model = DistributedDataParallel(Wrapped(criterion), broadcast_buffers=broadcast_buffers)
    return optimise(model, criterion, own_slice(sizes))


@pytest.mark.parametrize(("W", "broadcast_buffers"), [(2, False), (2, True), (3, True)])
def test_training_under_ddp_with_accumulated_gradients_is_that_of_one_process(W, broadcast_buffers):
    criterion = alone()
    expected = optimise(Wrapped(criterion), criterion, slice(0, 7))
    for found in ranks.run(optimise_over_ranks, W, SIZES[W], broadcast_buffers):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected["0.weight"] - encoder()[0].weight).abs().max() > 0.01


def compiled_step() -> tuple[Tensor, Tensor, Tensor]:
    """A step with a compiled criterion and one without, of the same start; B is the same on all ranks."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(distributed.get_rank())
        criterion = shared(warmup_epochs=0, k=0.2, unit_slope=True, indicator="stored", dtype=torch.float32)
        call = torch.compile(criterion, fullgraph=True, backend="aot_eager") if compiled else criterion
        for _ in range(2):
            features = torch.randn(4, D, requires_grad=True)
            index = torch.randint(0, 41, (4,))
            loss = call(features, index)
            loss.backward()
            criterion.update_bank(features, index)
        results.append((loss.detach(), features.grad, criterion.memory.rows(torch.arange(41))))
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=0, atol=0)
    return results[1]


def test_compiles_into_one_graph():
    found = ranks.run(compiled_step, 2)
    assert torch.equal(found[0][2], found[1][2])


def scores_and_labels_anew(meshed: bool) -> dict[str, Tensor]:
    group = init_device_mesh("cpu", (distributed.get_world_size(),)) if meshed else distributed.group.WORLD
    return relabelled(shared(process_group=group))


def relabelled(criterion: NTDNELoss) -> dict[str, Tensor]:
    memory = criterion.memory
    criterion.refresh_indicator()
    first = memory.last_log_p.clone()
    labels = torch.randint(-1, 3, (41,), generator=torch.Generator().manual_seed(7))
    memory.relabel(labels)
    forgotten = memory.last_log_p.isnan()
    criterion.refresh_indicator()
    return {
        "first": first,
        "forgotten": forgotten,
        "second": memory.last_log_p.clone(),
        "labels": memory.labels.clone(),
        "rows": memory.rows(torch.arange(41)),
        "class sizes": torch.tensor(memory.class_sizes),
    }


@pytest.mark.parametrize("meshed", [False, True])
def test_refreshed_scores_and_new_labels_are_those_of_one_process(meshed, monkeypatch):
    expected = relabelled(alone())
    found = ranks.run(scores_and_labels_anew, 3, meshed)
    for name in ("first", "forgotten", "second", "labels"):
        joined = torch.cat([rank[name] for rank in found])
        torch.testing.assert_close(joined, expected[name], rtol=1e-6, atol=1e-6, equal_nan=True)
    for rank in found:
        assert torch.equal(rank["rows"], expected["rows"])
        assert torch.equal(rank["class sizes"], expected["class sizes"])


def big_start(N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    group = distributed.group.WORLD if distributed.is_initialized() else None
    bank = MemoryBank(torch.arange(N) % 3, 2, generator=source, dtype=dtype, process_group=group)
    return bank.storage, torch.randn(3, generator=source)


def test_the_random_start_is_that_of_one_process_for_any_number_of_ranks():
    rows, after = big_start(140_000, torch.bfloat16)  # three chunks
    assert len(rows.unique(dim=0)) > 1000
    for W in (2, 3):
        found = ranks.run(big_start, W, 140_000, torch.bfloat16)
        assert torch.equal(torch.cat([rank[0] for rank in found]), rows)
        assert all(torch.equal(rank[1], after) for rank in found)


def refused(case: str) -> str:
    rank = distributed.get_rank()
    labels, dim, dtype = torch.arange(12) % 3, D, torch.float32
    if rank == 1:
        labels = {"labels": labels.flip(0), "N": labels[:9], "not labels": labels.float()}.get(case, labels)
        dim = 5 if case == "D" else dim
        dtype = torch.bfloat16 if case == "dtype" else dtype
    try:
        NTDNELoss(labels, dim, dtype=dtype, process_group=distributed.group.WORLD)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("labels", "labels: expected the same on all ranks, .* rank 1 has"),
        ("N", "images: expected the same .* rank 0 has 12, rank 1 has 9"),
        ("D", "dim: expected the same .* rank 0 has 6, rank 1 has 5"),
        ("dtype", "dtype: expected the same .* rank 1 has bfloat16"),
        ("not labels", "rank 1: labels: expected an integer tensor, got torch.float32"),
    ],
)
def test_ranks_with_another_bank_are_refused_by_name_on_all_ranks(case, message):
    found = ranks.run(refused, 3, case)
    for rank, text in enumerate(found):
        if case == "not labels" and rank == 1:
            assert text == "TypeError: labels: expected an integer tensor, got torch.float32"
        else:
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)


def some_want_no_gradient() -> tuple[Tensor, Tensor | None]:
    rank = distributed.get_rank()
    features = torch.arange(2.0 * D, dtype=torch.float64).view(2, D).sin()[: 2 - 2 * (rank == 2)]
    features = features.requires_grad_(rank == 0)  # rank 2's is empty, as torch.empty(0, D) is
    loss = shared()(features, torch.arange(len(features)))
    if rank == 0:
        loss.backward()
    return loss.detach(), features.grad


def test_ranks_whose_features_need_no_gradient_take_part():
    found = ranks.run(some_want_no_gradient, 3)
    features = torch.arange(2.0 * D, dtype=torch.float64).view(2, D).sin().repeat(2, 1).requires_grad_()
    expected = alone()(features, torch.tensor([0, 1, 0, 1]))
    expected.backward()
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found[0][1] / 3, features.grad[:2])


def of_other_settings(case: str) -> str:
    criterion, rank = shared(k=0.3, warmup_epochs=2), distributed.get_rank()
    if case == "epoch" and rank == 0:
        criterion.set_epoch(2)
    if case == "sigma" and rank == 1:
        criterion.sigma = 0.2
    if case == "mode" and rank == 1:
        criterion.eval()
    try:
        return f"{criterion(torch.ones(1, D, dtype=torch.float64), torch.tensor([rank]))}"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("case", ["epoch", "sigma", "mode"])
def test_ranks_of_other_settings_are_refused(case):
    for text in ranks.run(of_other_settings, 2, case):
        assert "expected the same sigma, q, k," in text
        assert "those of ranks [1] differ from rank 0's" in text


def out_of_step() -> str:
    criterion, features, index = shared(), torch.ones(2, D, dtype=torch.float64), torch.tensor([0, 1])
    try:
        if distributed.get_rank() == 1:
            criterion.update_bank(features, index)
        else:
            criterion(features, index)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_ranks_that_make_other_calls_are_told():
    for text in ranks.run(out_of_step, 3):
        assert text.endswith("but now called rank 0 forward, rank 1 update_bank, rank 2 forward")


def differentiated_twice() -> str:
    features = torch.ones(2, D, dtype=torch.float64, requires_grad=True)
    loss = shared()(features.sin(), torch.arange(2))
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss can be differentiated once"):
        gradient.sum().backward()
    return "raised"


def test_a_second_derivative_raises():
    assert ranks.run(differentiated_twice, 2) == ["raised", "raised"]


def copied() -> tuple[Tensor, Tensor]:
    criterion = shared()
    criterion.load_state_dict(criterion.state_dict())
    twin = copy.deepcopy(criterion)
    twin(torch.ones(1, D, dtype=torch.float64), torch.tensor([3]))
    criterion.update_bank(torch.ones(1, D, dtype=torch.float64), torch.tensor([3]))
    return twin.memory.rows(torch.arange(41)), criterion.memory.rows(torch.arange(41))


def test_a_copy_has_rows_of_its_own():
    for twin, updated in ranks.run(copied, 2):
        assert torch.equal(twin, alone().memory.rows(torch.arange(41)))
        assert not torch.equal(twin, updated)


def relabelled_but_for_one(folder: str) -> tuple[str, Tensor]:
    criterion = shared(storage="disk", path=f"{folder}/bank")
    before = criterion.memory.labels.clone()
    if distributed.get_rank() == 1:

        def fails(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        memory_bank.take_place = fails
    with pytest.raises((OSError, ValueError), match="No space left on device") as error:
        criterion.memory.relabel(torch.arange(41) % 2)
    return str(error.value), torch.equal(criterion.memory.labels, before)


def test_a_relabel_that_fails_on_one_rank_raises_on_all_and_keeps_the_labels(tmp_path):
    for rank, (text, kept) in enumerate(ranks.run(relabelled_but_for_one, 2, str(tmp_path))):
        assert text.startswith("rank 1: ") == (rank == 0)
        assert kept


def bad_call(case: str) -> tuple[str, bool]:
    """The error of a call that is wrong on rank 1, and whether the next one works on all ranks."""
    criterion = shared()
    before = criterion.memory.rows(torch.arange(41))
    features, index = torch.randn(2, D, dtype=torch.float64), torch.tensor([3, 4])
    if distributed.get_rank() == 1:
        features = {"wide": features[:, :3], "NaN": features * torch.nan}.get(case, features)
        index = torch.tensor([3, 41]) if case == "image" else index
    text = "accepted"
    try:
        if case == "sigma" and distributed.get_rank() == 1:
            criterion.sigma = -0.1
        if case == "label":
            labels = torch.tensor([0, -5 if distributed.get_rank() == 1 else 0])
            criterion(features, labels=labels)
        elif case == "NaN":
            criterion.update_bank(features, index)
        else:
            criterion(features, index)
    except (IndexError, RuntimeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
    criterion.sigma = 0.1
    criterion(torch.randn(2, D, dtype=torch.float64), torch.tensor([0, 1]))
    return text, torch.equal(criterion.memory.rows(torch.arange(41)), before)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wide", "ValueError: features: expected shape"),
        ("image", "IndexError: index: expected -1 or a bank row from 0 to 40, got 41 at row 1"),
        ("NaN", "ValueError: features: expected rows of finite norm"),
        ("sigma", "ValueError: sigma: expected a number in"),
        ("label", "ValueError: labels: expected -1 (unlabelled) or a class from 0, got -5 at row 1"),
    ],
)
def test_a_bad_batch_on_one_rank_raises_on_all_writes_nothing_and_does_not_hang(case, message):
    found = ranks.run(bad_call, 3, case)
    for rank, (text, unchanged) in enumerate(found):
        others = f"RuntimeError: nothing was computed or written on any rank, for rank 1: {message}"
        assert text.startswith(message if rank == 1 else others)
        assert unchanged


def without_a_direction(own: slice | None, case: str, all_of_them: bool) -> dict[str, Tensor]:
    """What a step gives in which nobody looks, as on a GPU, and features of two ranks have no direction, or all."""
    reduction, kind, options = case.split(", ")
    process_group = None if own is None else distributed.group.WORLD
    own = slice(0, 7) if own is None else own
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(neighbourhood_loss, "check_directions", lambda *_, **__: None)
        criterion = {"NTDNE": NTDNELoss, "SNCA": SNCALoss}[kind](
            LABELS["mixed"], D, generator=torch.Generator().manual_seed(0), dtype=torch.float64, reduction=reduction,
            process_group=process_group, **({"warmup_epochs": 0, "k": 0.2} if options == "pruning" else {}),
        )  # fmt: skip
        features = torch.randn(7, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        features[1], features[6, 2] = 0, torch.nan
        if all_of_them:
            features[:] = torch.inf
        mine = features[own].clone().requires_grad_()
        before = int(skipped_counter(torch.device("cpu")))
        loss, scores = criterion(mine, torch.arange(2, 9)[own], return_scores=True)
        loss.sum().backward()
    skipped = skipped_counter(torch.device("cpu")) - before
    found = {"losses": loss.detach(), "gradients": mine.grad, "scores": scores, "skipped": skipped}
    return found | {"last": criterion.memory.last_log_p.clone()}


def without_a_direction_over_ranks(*case: Any) -> dict[str, Tensor]:
    return without_a_direction(own_slice(SIZES[2]), *case)


@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("case", ["mean, NTDNE, pruning", "sum, NTDNE, none", "none, NTDNE, none", "mean, SNCA, none"])
def test_features_without_a_direction_are_left_out_as_in_one_process(case, all_of_them):
    expected = without_a_direction(None, case, all_of_them)
    assert int(expected["skipped"]) == (7 if all_of_them else 2)
    assert int(expected["scores"].isnan().sum()) == (7 if all_of_them else 2)
    found = ranks.run(without_a_direction_over_ranks, 2, case, all_of_them)
    none = case.startswith("none")
    joined = {name: torch.cat([rank[name] for rank in found]) for name in ("gradients", "scores", "last")}
    joined["gradients"] /= 1 if none else 2
    joined["skipped"] = found[0]["skipped"] + found[1]["skipped"]
    losses = [rank["losses"] for rank in found]
    joined["losses"] = torch.cat(losses) if none else losses[0]
    assert none or torch.equal(losses[0].nan_to_num(), losses[1].nan_to_num())
    torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def of_two_dtypes() -> tuple[Tensor, Tensor]:
    criterion = shared(dtype=torch.float32)
    rank = distributed.get_rank()
    features = torch.full((2, D), 1.0 + rank, dtype=(torch.bfloat16, torch.float64)[rank])
    features[0, 0] = 3
    index = torch.tensor([1, 7]) + rank
    loss = criterion(features, index)
    criterion.update_bank(features, index)
    return loss, criterion.memory.rows(torch.arange(41))


def test_features_may_have_a_dtype_of_their_own_on_each_rank():
    criterion = alone(dtype=torch.float32)
    features = torch.tensor([1.0, 1.0, 2.0, 2.0]).unsqueeze(1).repeat(1, D)
    features[[0, 2], 0] = 3
    index = torch.tensor([1, 7, 2, 8])
    expected = criterion(features, index)
    criterion.update_bank(features, index)
    for loss, rows in ranks.run(of_two_dtypes, 2):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(rows, criterion.memory.rows(torch.arange(41)))


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_an_update() -> str:
    criterion = shared()
    if distributed.get_rank() == 1:
        torch.ops.ntdne_kernels.update_bank_ = die  # type: ignore[attr-defined]
    try:
        for _ in range(3):
            criterion.update_bank(torch.randn(2, D, dtype=torch.float64), torch.tensor([3, 20]))
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "went on"


def test_when_a_rank_is_killed_in_an_update_the_others_raise_soon():
    outcomes = ranks.run_to_the_end(killed_in_an_update, 3, timeout=60)
    assert outcomes[1].how == "ended with -9"
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.startswith("RuntimeError")


def two_dimensions() -> str:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(
        ValueError, match=r"process_group: expected a DeviceMesh of one dimension, got 2; .*mesh\['replicate'\]"
    ):
        shared(process_group=mesh)
    with pytest.raises(
        TypeError, match="process_group: expected a torch.distributed process group or DeviceMesh .* got str"
    ):
        shared(process_group="gloo")
    return type(shared(process_group=mesh["replicate"]).memory.ranks).__name__


def test_a_mesh_of_two_dimensions_is_refused_and_one_of_its_dimensions_taken():
    assert ranks.run(two_dimensions, 2) == ["Ranks", "Ranks"]


def in_halves() -> tuple[list[int], Tensor]:
    """Two groups of two ranks, each with a bank of its own."""
    rank = distributed.get_rank()
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    criterion = shared(process_group=groups[rank // 2])
    loss = criterion(torch.ones(1 + rank % 2, D, dtype=torch.float64), torch.arange(1 + rank % 2) + rank)
    return list(criterion.memory.images), loss


def test_a_group_of_some_ranks_shares_a_bank_among_these():
    found = ranks.run(in_halves, 4)
    assert [images for images, _ in found] == [list(range(21)), list(range(21, 41))] * 2
    for pair, first in ((0, 0), (2, 2)):
        expected = alone()(torch.ones(3, D, dtype=torch.float64), torch.tensor([first, first + 1, first + 2]))
        assert found[pair][1] == found[pair + 1][1]
        torch.testing.assert_close(found[pair][1], expected)


def update_with_other_momentum():
    """The error of an update whose momentum differs on the ranks, and whether a row was changed."""
    bank = MemoryBank(LABELS["mixed"], D, process_group=distributed.group.WORLD)
    before, rank = bank.storage.clone(), distributed.get_rank()
    with pytest.raises(ValueError, match="momentum") as caught:
        bank.update_(torch.ones(1, D), torch.tensor([rank]), momentum=0.5 + 0.1 * rank)
    return str(caught.value), torch.equal(bank.storage, before)


def test_another_momentum_on_a_rank_is_refused_by_the_update_itself():
    for said, unchanged in ranks.run(update_with_other_momentum, 2):
        assert said == "momentum: expected the same on all ranks; those of ranks [1] differ from rank 0's"
        assert unchanged
