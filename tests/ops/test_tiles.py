"""The walks over the tiles of a bank: the definitions in PyTorch, and the kernels for CPUs with their threads.

That both give the right sums is for test_leave_one_out.py, test_class_sums.py and test_class_log_sums.py, which run the
kernels wherever they were built; here they run on the definitions.

Shapes: B queries, N bank rows, D features.
"""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ntdne_kernels.functional import leave_one_out_log_scores
from ntdne_kernels.ops import streaming
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.schema import Batch
from tests.archives import Archive, batch_of
from tests.ops import contract
from tests.ops.cutting import small_tiles

CPU = torch.device("cpu")


@pytest.fixture(params=["labels", "index", "sorted index"])
def by(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streaming backend without the kernels, as where nothing could be built."""
    for name in ("class_sums", "class_log_sums", "bank_gradient"):
        monkeypatch.setattr(streaming, f"_tiled_{name}", getattr(streaming, f"{name}_in_tiles"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever the test sets, the others find the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiled_class_sums", "tiled_class_log_sums", "tiled_bank_gradient"])
def test_kernel_was_built(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ntdne_kernels::{name}", "CPU")


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_definitions_give_log_p_and_gradients_of_the_formulas(by, sigma, monkeypatch):
    small_tiles(monkeypatch)
    contract.check_scores_and_gradients("streaming", by, sigma, CPU)


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_definition_gives_the_sums_of_many_classes(sigma, monkeypatch):
    small_tiles(monkeypatch)
    archive = Archive(B=9, N=60, D=6)
    offsets = torch.tensor([0, 0, 3, 4, 31, 31, 60])
    given = (archive.features, archive.bank, archive.index, offsets, sigma)
    expected = BACKENDS["reference"].class_log_sums(*given)
    torch.testing.assert_close(BACKENDS["streaming"].class_log_sums(*given), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("B", [1, 3, 200])
@pytest.mark.parametrize("D", [1, 96, 2000])
def test_no_tile_is_larger_than_its_limit(B, D, monkeypatch):
    """Also where few queries would allow for many rows; a tile of rows may have to be copied."""
    seen = []
    original = streaming.scaled_scores_
    monkeypatch.setattr(
        streaming,
        "scaled_scores_",
        lambda out, *rest: seen.append((out.numel(), rest[1].numel())) or original(out, *rest),
    )
    monkeypatch.setattr(streaming, "TILE_ELEMENTS", {"cpu": 4096})
    archive = Archive(B, 3000, D, dtype=torch.float32)
    leave_one_out_log_scores(*archive.arguments(), backend="streaming")
    assert len(seen) > 1
    assert max(max(pair) for pair in seen) <= 4096


@pytest.mark.parametrize("D", [1, 512, 4096, 100_000])
def test_sums_of_a_block_of_queries_have_a_limit(D):
    block, length = streaming._tile_sizes(torch.empty(10, D), 10_000)
    assert block * D <= max(streaming.SUMS_ELEMENTS, 64 * D)
    assert 64 <= block <= streaming.QUERIES_PER_TILE
    assert length >= 1


def test_gradient_direction_is_not_made_without_need(monkeypatch):
    archive = Archive()
    wanted = []
    original = streaming._tiled_class_sums
    monkeypatch.setattr(streaming, "_tiled_class_sums", lambda *given: wanted.append(given[8]) or original(*given))
    with torch.no_grad():
        leave_one_out_log_scores(archive.features.requires_grad_(), *archive.arguments()[1:], backend="streaming")
    leave_one_out_log_scores(archive.features.detach(), *archive.arguments()[1:], backend="streaming")
    leave_one_out_log_scores(archive.features.requires_grad_(), *archive.arguments()[1:], backend="streaming")
    assert wanted == [False, False, True]


def results_of(batch: Batch) -> tuple[Tensor, ...]:
    """All that the three walks give of a batch."""
    log_p, direction, log_sum_all = streaming.log_scores(batch, True)
    gradient = streaming.bank_gradient(batch, log_p, log_sum_all, torch.linspace(-1, 2, len(log_p)))
    offsets = torch.tensor([0, 5, 5, 30, len(batch.bank)])
    rows = batch.features.to(batch.bank.dtype)
    return (
        log_p,
        direction,
        log_sum_all,
        gradient,
        BACKENDS["streaming"].class_log_sums(rows, batch.bank, batch.own, offsets, batch.sigma),
    )


def problem(by: str = "sorted index", seed: int = 0, sigma: float = 0.1) -> Batch:
    """23 queries and 300 rows in float32."""
    return batch_of(Archive(B=23, N=300, D=20, C=4, seed=seed, dtype=torch.float32), by, sigma)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_same_number_of_threads_gives_the_same_bits(by, count, sigma, monkeypatch):
    """Of other numbers the shares are added up in another order: the same but for rounding."""
    small_tiles(monkeypatch)
    batch = problem(by, sigma=sigma)
    torch.set_num_threads(count)
    first, again = results_of(batch), results_of(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_num_threads(1)
    rounding = 1e-6 / sigma  # of logits that are as large as 1/sigma
    torch.testing.assert_close(first, results_of(batch), rtol=rounding, atol=rounding)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 3])
def test_number_of_threads_stays_as_it_was_also_after_an_error(count):
    torch.set_num_threads(count)
    batch = problem()
    results_of(batch)
    assert torch.get_num_threads() == count
    with pytest.raises(RuntimeError, match="streaming: expected"):
        streaming._tiled_class_log_sums(
            batch.features, batch.bank.double(), batch.own, torch.tensor([0, 300]), 0.1, False, 8, 8
        )
    assert torch.get_num_threads() == count


@pytest.mark.usefixtures("threads")
def test_calls_of_several_python_threads_do_not_mix(monkeypatch):
    small_tiles(monkeypatch)
    torch.set_num_threads(2)
    batches = [problem(seed=seed) for seed in range(4)]
    expected = [results_of(batch) for batch in batches]
    found: dict[int, list[tuple[Tensor, ...]]] = {i: [] for i in range(len(batches))}

    def work(i: int) -> None:
        torch.set_num_threads(2)
        found[i] += [results_of(batches[i]) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, results in found.items():
        assert len(results) == 10
        for result in results:
            torch.testing.assert_close(result, expected[i], rtol=0, atol=0)


class _Scores(Dataset[Tensor]):
    """Scores that a loader's worker computes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return torch.cat([x.flatten() for x in results_of(problem(seed=i))])


@pytest.mark.usefixtures("threads")
def test_worker_of_a_loader_forked_after_threads_were_used():
    torch.set_num_threads(2)
    here = [_Scores()[i] for i in range(2)]
    loader = DataLoader(_Scores(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for found, expected in zip(loader, here, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["columns", "every other row", "part of the columns"])
def test_banks_of_any_strides(dtype, layout, by):
    batch = problem(by)
    bank = batch.bank.to(dtype)
    strided = {
        "columns": bank.t().contiguous().t(),
        "every other row": torch.stack([bank, bank.neg()], dim=1).flatten(0, 1)[::2],
        "part of the columns": torch.cat([bank, bank], dim=1)[:, : bank.size(1)],
    }[layout]
    assert not strided.is_contiguous()
    found = streaming.log_scores(batch._replace(bank=strided), True)
    expected = streaming.log_scores(batch._replace(bank=bank), True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_integers_of_any_strides(by):
    batch = problem(by)
    offsets = torch.tensor([0, 5, 5, 30, len(batch.bank)])

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], dim=1)[:, 0]

    of_rows = {name: spread(x) for name, x in batch.layout._asdict().items() if name != "classes"}
    strided = batch._replace(own=spread(batch.own), layout=batch.layout._replace(**of_rows))
    torch.testing.assert_close(results_of(strided), results_of(batch), rtol=0, atol=0)
    class_log_sums = BACKENDS["streaming"].class_log_sums
    rows = batch.features, batch.bank
    found = class_log_sums(*rows, spread(batch.own), spread(offsets), 0.1)
    torch.testing.assert_close(found, class_log_sums(*rows, batch.own, offsets, 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_sum_of_a_class_with_a_row_of_nan_is_nan(sigma, monkeypatch):
    """Also where it is the only row of its class in a tile; the other classes keep their sums."""
    small_tiles(monkeypatch)
    archive = Archive(B=9, N=60, D=6, dtype=torch.float32)
    offsets = torch.tensor([0, 4, 24, 25, 60])
    given = (archive.index, offsets, sigma)
    clean = BACKENDS["streaming"].class_log_sums(archive.features, archive.bank, *given)
    archive.bank[[10, 24]] = torch.nan
    found = BACKENDS["streaming"].class_log_sums(archive.features, archive.bank, *given)
    torch.testing.assert_close(found[:, [0, 3]], clean[:, [0, 3]], rtol=0, atol=0)
    excluded = archive.index.unsqueeze(1) == torch.tensor([10, 24])
    assert torch.equal(found[:, [1, 2]].isnan(), ~excluded)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda call: call | {"queries": call["queries"].double()},
        lambda call: call | {"queries": call["queries"][:, :-1]},
        lambda call: call | {"same": call["same"][:-1]},
        lambda call: call | {"excluded": call["excluded"].int()},
        lambda call: call | {"order": torch.arange(7)},
        lambda call: call | {"block": 0},
        lambda call: call | {"length": 0},
        lambda call: call | {"row_labels": torch.zeros(300, dtype=torch.int32)},
    ],
)
def test_kernel_refuses_what_it_cannot_read(spoil):
    call = {
        "queries": torch.zeros(3, 5),
        "bank": torch.zeros(300, 5),
        "same": torch.zeros(3, 2, dtype=torch.int64),
        "row_labels": None,
        "order": None,
        "excluded": torch.zeros(3, dtype=torch.int64),
        "sigma": 0.1,
        "tracked": False,
        "need_means": True,
        "block": 8,
        "length": 8,
    }
    streaming._tiled_class_sums(**call)
    with pytest.raises(RuntimeError, match="streaming: expected"):
        streaming._tiled_class_sums(**spoil(call))


@pytest.mark.parametrize("offsets", [[1, 300], [0, 299], [0, 301], []])
def test_kernel_refuses_classes_that_are_not_the_rows(offsets):
    batch = problem()
    with pytest.raises(RuntimeError, match="streaming: expected offsets"):
        BACKENDS["streaming"].class_log_sums(
            batch.features, batch.bank, batch.own, torch.tensor(offsets, dtype=torch.int64), 0.1
        )


def test_kernel_reads_no_row_outside_of_the_bank():
    """torch 2.10 keeps no message of an error that is found within a parallel region."""
    bank, none = torch.zeros(300, 5), torch.zeros(3, dtype=torch.int64)
    order = torch.arange(300) + 1
    with pytest.raises(RuntimeError, match="rows of the bank in its order, got 300|parallel_for"):
        streaming._tiled_class_sums(
            bank[:3], bank, torch.zeros(3, 2, dtype=torch.int64), None, order, none, 0.1, False, True, 8, 8
        )
