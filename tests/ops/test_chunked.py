"""Sums over a bank in chunks: equal to those over the whole bank; and, with a GPU, a bank that stays outside of it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ntdne_kernels import storage
from ntdne_kernels.ops import chunked
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.class_sums import ClassSums
from ntdne_kernels.ops.layout import PermutedRows, PlainLabels, part_of
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Batch
from tests import formulas
from tests.archives import Archive, batch_of

SIGMA = 0.1


@pytest.fixture(params=["labels", "class order"])
def by(request: pytest.FixtureRequest) -> str:
    return request.param


def chunkable(archive: Archive, by: str, sigma: float = SIGMA) -> Batch:
    """The archive with its bank in class order where the layout says so."""
    if by == "labels":
        return batch_of(archive, by, sigma)
    return batch_of(archive, "sorted index", sigma)


def in_chunks(backend: str, length: int, batch: Batch, need_means: bool = True) -> ClassSums:
    chunks = chunked.chunks_of(batch.bank.cpu(), batch.features.device, length)
    return chunked.sum_chunks(batch, chunks, need_means, backend)


def test_chunks_of_a_bank_on_the_device_are_views_of_it(device):
    bank = torch.rand(5, 3, device=device)
    starts, chunks = zip(*chunked.chunks_of(bank, bank.device, 2), strict=True)
    assert starts == (0, 2, 4)
    assert torch.equal(torch.cat(chunks), bank)
    assert [chunk.data_ptr() for chunk in chunks] == [bank[start].data_ptr() for start in starts]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 7, 39, 40, 1000])
def test_sums_of_chunks_add_up_to_those_of_the_whole_bank(backend, by, length, device):
    if backend == "triton" and length == 1 and device.type == "cpu":
        pytest.skip("forty launches in the interpreter")
    batch = chunkable(Archive(C=6, device=device), by)
    whole = BACKENDS[backend].class_sums(batch, True)
    assert (whole[0] == -torch.inf).any()
    assert (whole[0] > -torch.inf).any()
    parts = in_chunks(backend, length, batch)
    torch.testing.assert_close(tuple(parts), whole, rtol=1e-12, atol=1e-12)
    no_means = in_chunks(backend, length, batch, need_means=False)
    torch.testing.assert_close(tuple(no_means[:2]), whole[:2], rtol=1e-12, atol=1e-12)
    assert [mean.shape for mean in no_means[2:]] == [(0, 5)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.1, 0.02])
def test_error_does_not_grow_with_the_number_of_chunks(by, dtype, sigma):
    batch = chunkable(Archive(B=16, N=6000, D=16, C=5, dtype=dtype, unlabelled=False), by, sigma)
    batch = batch._replace(features=batch.features.to(dtype))
    exactly = batch._replace(features=batch.features.double(), bank=batch.bank.double())
    truth = BACKENDS["reference"].class_sums(exactly, True)
    whole = BACKENDS["streaming"].class_sums(batch, True)
    parts = in_chunks("streaming", 11, batch)
    epsilon = torch.finfo(torch.float32).eps / sigma
    for exact, in_one, of_many in zip(truth, whole, parts, strict=True):
        finite = exact > -torch.inf
        assert torch.equal(finite, of_many > -torch.inf)
        assert (of_many - exact)[finite].abs().max() <= 1.5 * (in_one - exact)[finite].abs().max() + epsilon


def test_an_empty_bank_has_sums_of_nothing(backend, by, device):
    batch = chunkable(Archive(device=device), by)
    nothing = batch._replace(
        bank=batch.bank[:0], own=torch.full_like(batch.own, -1), layout=part_of(batch.layout, 0, 0)
    )
    sums = in_chunks(backend, 7, nothing)
    assert (sums.log_same == -torch.inf).all()
    assert (sums.log_other == -torch.inf).all()
    assert not sums.mean_same.any()
    assert not sums.mean_other.any()


def test_rows_in_another_order_are_refused():
    batch = batch_of(Archive(), "index", SIGMA)
    assert isinstance(batch.layout, PermutedRows)
    with pytest.raises(ValueError, match="bank_labels: expected an index of rows in class order, or plain labels"):
        in_chunks("streaming", 7, batch)


def loss_of(backend: str, batch: Batch, spec: LossSpec | None) -> tuple[Tensor, Tensor]:
    """The loss (or log p) of chunked `Backend`s, and its gradient to the features."""
    features = batch.features.clone().requires_grad_()
    value, _ = chunked.CHUNKED[backend].loss(batch._replace(features=features), None, spec)
    value[value > -torch.inf].sum().backward()
    return value.detach(), features.grad


def test_log_p_and_its_gradient_are_those_of_the_formulas(backend, by, device):
    archive = Archive(device=device)
    log_p, gradient = loss_of(backend, chunkable(archive, by), None)
    expected, p, p_same = formulas.leave_one_out(*archive.arguments(), SIGMA)
    to_features, _ = formulas.log_p_gradients(*archive.arguments()[:2], p, p_same, [1.0] * 9, SIGMA)
    torch.testing.assert_close(log_p.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient.cpu(), torch.tensor(to_features, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_loss_compiles_into_one_graph_and_gives_the_same(by, device):
    batch = chunkable(Archive(device=device, dtype=torch.float32), by)
    eager = loss_of("streaming", batch, None)

    @torch.compile(fullgraph=True)
    def log_scores(features: Tensor) -> Tensor:
        return chunked.CHUNKED["streaming"].loss(batch._replace(features=features), None, None)[0]

    features = batch.features.clone().requires_grad_()
    log_p = log_scores(features)
    log_p[log_p > -torch.inf].sum().backward()
    assert torch.equal(log_p, eager[0])
    torch.testing.assert_close(features.grad, eager[1])


@pytest.mark.slow
def test_op_is_what_pytorch_asks_of_one(by, device):
    batch = chunkable(Archive(device=device, dtype=torch.bfloat16), by)
    for need_direction in (True, False):
        op = torch.ops.ntdne_kernels.chunked_log_scores.default
        torch.library.opcheck(op, (*batch.flat(), need_direction, "streaming"))


def test_results_are_where_the_features_are():
    with FakeTensorMode():
        bank = torch.empty(100, 8, dtype=torch.bfloat16)
        features = torch.empty(4, 8, device="cuda")
        labels, index, bank_labels = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (4, 4, 100))
        batch = Batch(features, bank, labels, index, PlainLabels(bank_labels), SIGMA)
        results = chunked.log_scores(batch, True, "streaming")
    assert [(x.device.type, x.dtype) for x in results] == [("cuda", torch.float32)] * 3
    assert [x.shape for x in results] == [(4,), (4, 8), (4,)]


@pytest.mark.parametrize("backend", list(chunked.CHUNKED))
def test_losses_are_where_the_features_are(backend):
    """A kernel of the GPU that makes the loss in one go would read the bank where it is."""
    with FakeTensorMode():
        bank = torch.empty(100, 8, dtype=torch.bfloat16)
        features = torch.empty(4, 8, device="cuda")
        labels, index, bank_labels = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (4, 4, 100))
        batch = Batch(features, bank, labels, index, PlainLabels(bank_labels), SIGMA)
        results = chunked.CHUNKED[backend].loss_and_gradient(batch, None, LossSpec(0.7, None, "mean"), True)  # type: ignore[attr-defined]
    assert [x.device.type for x in results] == ["cuda"] * 5


@pytest.mark.usefixtures("capturing")
def test_a_bank_elsewhere_is_not_read_in_a_cuda_graph():
    with pytest.raises(RuntimeError, match="CUDA graph: a bank in host memory is read by copies that the host waits"):
        next(chunked.chunks_of(torch.zeros(3, 2), torch.device("cuda"), 1))


class Streams:
    """Stands for `torch` in `chunks_of`: CUDA streams whose work is done at some later time, drawn at random.

    The order is any that the streams and their events allow: a wait that is missing shows as rows that are wrong.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.main: list[Callable[[], bool]] = []  # a stream is its work to come; work says whether it is done
        self.side: list[Callable[[], bool]] = []
        self.current = self.main
        self.cuda = SimpleNamespace(
            current_stream=lambda device: Stream(self, self.main),
            Stream=lambda device: Stream(self, self.side),
            stream=self.on,
            Event=lambda: Event(self),
        )

    @contextmanager
    def on(self, stream: "Stream") -> Iterator[None]:
        self.current = stream.work
        yield
        self.current = self.main

    def empty(
        self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device | str, pin_memory: bool = False
    ) -> "Memory":
        assert (torch.device(device).type == "cpu") == pin_memory
        return Memory(self, torch.full(shape, torch.nan, dtype=dtype))

    def enqueue(self, work: Callable[[], bool]) -> None:
        self.current.append(work)
        for _ in range(self.random.choice((0, 0, 1, 4))):
            self.run_some()

    def run_some(self) -> bool:
        """Do the next work of a stream; False where neither has work that may be done."""
        for work in self.random.sample((self.main, self.side), 2):
            if work and work[0]():
                del work[0]
                return True
        return False


class Stream:
    def __init__(self, streams: Streams, work: list[Callable[[], bool]]) -> None:
        self.streams, self.work = streams, work

    def wait_event(self, event: "Event") -> None:
        recorded = event.recorded
        self.work.append(lambda: not recorded or recorded["done"])

    def wait_stream(self, stream: "Stream") -> None:
        event = Event(self.streams)
        event.record(stream)
        self.wait_event(event)


class Event:
    def __init__(self, streams: Streams) -> None:
        self.streams, self.recorded = streams, {}

    def record(self, stream: Stream) -> None:
        recorded = self.recorded = {"done": False}
        stream.work.append(lambda: recorded.update(done=True) is None)

    def synchronize(self) -> None:
        while self.recorded and not self.recorded["done"]:
            assert self.streams.run_some(), "waits for ever"


class Memory:
    def __init__(self, streams: Streams, values: Tensor) -> None:
        self.streams, self.values = streams, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "Memory":
        return Memory(self.streams, self.values[rows])

    def copy_(self, source: "Memory | Tensor", non_blocking: bool = False) -> "Memory":
        source = source.values if isinstance(source, Memory) else source
        if non_blocking:
            self.streams.enqueue(lambda: self.values.copy_(source) is not None)
        else:
            self.values.copy_(source)
        return self


@pytest.mark.parametrize("pinned", [True, False])
def test_whatever_order_a_gpu_works_in_each_chunk_has_its_rows(pinned, monkeypatch):
    monkeypatch.setattr(Tensor, "is_pinned", lambda bank: pinned)
    for seed in range(300):
        streams = Streams(seed)
        monkeypatch.setattr(chunked, "torch", streams)
        chunked._side_stream.cache_clear()
        bank = torch.arange(2.0 * (seed % 17)).view(-1, 2)
        expected, seen = bank.clone(), torch.zeros_like(bank)
        for start, chunk in chunked.chunks_of(bank, torch.device("cuda", 0), 1 + seed % 5):
            Memory(streams, seen[start : start + len(chunk)]).copy_(chunk, non_blocking=True)
        bank.fill_(torch.nan)  # it was read
        while streams.run_some():
            pass
        assert torch.equal(seen, expected)
    chunked._side_stream.cache_clear()


# With a GPU. The chunks are of 3000 rows; the whole bank would be 34 of them.
N, D, CHUNK = 100_000, 64, 3000


@pytest.fixture
def archive(monkeypatch) -> Archive:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", CHUNK * D * 4)
    return Archive(B=50, N=N, D=D, C=6, dtype=torch.float32, device="cuda")


@pytest.fixture(params=["pinned", "unpinned", "mapped"])
def outside(request: pytest.FixtureRequest, tmp_path):
    """Puts a bank where the GPU is not."""

    def put(bank: Tensor) -> Tensor:
        if request.param == "mapped":
            rows, _ = storage.allocate("disk", tuple(bank.shape), bank.dtype, bank.device, tmp_path / "bank.bin")
        else:
            rows = torch.empty(bank.shape, dtype=bank.dtype, pin_memory=request.param == "pinned")
        assert rows.is_pinned() == (request.param == "pinned")
        return rows.copy_(bank)

    return put


@pytest.mark.gpu
def test_bank_outside_the_gpu_gives_what_one_inside_gives(fused, by, archive, outside):
    batch = chunkable(archive, by)
    inside = in_chunks(fused, CHUNK, batch)
    batch = batch._replace(bank=outside(batch.bank))
    for _ in range(5):  # buffers are used again
        assert all(torch.equal(a, b) for a, b in zip(chunked.class_sums(batch, True, fused), inside, strict=True))


@pytest.mark.gpu
def test_bank_outside_may_be_written_as_soon_as_the_sums_were_asked_for(fused, archive, outside):
    batch = chunkable(archive, "class order")
    batch = batch._replace(bank=outside(batch.bank))
    expected = chunked.class_sums(batch, True, fused)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)  # the GPU is far behind
    sums = chunked.class_sums(batch, True, fused)
    batch.bank.zero_()
    assert all(torch.equal(a, b) for a, b in zip(sums, expected, strict=True))


@pytest.mark.gpu
def test_memory_on_the_gpu_does_not_grow_with_a_bank_outside(fused, archive, outside):
    whole = chunkable(archive, "class order")
    added = []
    for n in (N // 10, N):
        batch = whole._replace(bank=outside(whole.bank[:n]), layout=part_of(whole.layout, 0, n))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        chunked.class_sums(batch, True, fused)
        torch.cuda.synchronize()
        added.append(torch.cuda.max_memory_allocated() - before)
        del batch
    assert added[1] <= added[0] + (1 << 20)


@pytest.mark.gpu
def test_nothing_but_the_copies_is_waited_for(fused, archive, outside):
    batch = chunkable(archive, "class order")
    batch = batch._replace(bank=outside(batch.bank))
    chunked.class_sums(batch, True, fused)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunked.class_sums(batch, True, fused)
    finally:
        torch.cuda.set_sync_debug_mode("default")
