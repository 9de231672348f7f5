"""Every provider computes its part of the loss, and wrong numbers are seen."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import attention, checks, problems, providers, steps
from benchmarks.contract import DTYPES, NotSupported
from benchmarks.providers import PROVIDERS

# What the arithmetic of the bank leaves; "naive in 16 bits" has a softmax and sums of 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


def made(dtype: str, B: int = 48, N: int = 1000, D: int = 24, C: int = 7) -> problems.Problem:
    return problems.make(B, N, D, C, DTYPES[dtype])


def cross_entropy(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(features @ weight.t(), target)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize("name", [name for name in PROVIDERS if "compiled" not in name])
def test_every_provider_computes_its_part(name, gradient, dtype):
    problem = made(dtype)
    try:
        call = PROVIDERS[name].prepare(problem, gradient)
    except NotSupported as reason:
        pytest.skip(str(reason))
    error = checks.error(PROVIDERS[name].result, call(), problem)
    assert error is not None
    assert error < TOLERANCE[dtype]


def test_the_compiled_loss_is_the_loss():
    problem = made("float32")
    call = PROVIDERS["naive, compiled"].prepare(problem, True)
    assert checks.error("loss", call(), problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize(("B", "N", "C"), [(48, 1000, 7), (300, 3000, 2), (5, 1300, 650), (30, 60, 30)])
def test_flex_attention_gives_the_loss(B, N, C, gradient, dtype):
    """Not compiled, which for a CPU it cannot be."""
    problem = made(dtype, B, N, 16, C)
    call = attention.flex(problem, gradient, flex_attention)
    assert checks.error("loss", call(), problem) < TOLERANCE[dtype]


@pytest.mark.parametrize(("B", "N", "C"), [(300, 20_000, 9), (200, 20_000, 2), (20, 12_000, 500)])
def test_flex_attention_leaves_out_blocks_that_hold_nothing(B, N, C):
    """What is not compiled looks at all of them."""
    problem = made("float32", B, N, 64, C)
    looked_at = []

    def counting_attention(queries, keys, values, *, block_mask, **rest):
        _, heads, length, _ = keys.shape
        rows = 128 * math.ceil(length / 128)
        allowed = torch.zeros(heads, 128 * math.ceil(B / 128), rows, dtype=torch.bool)
        places = torch.meshgrid(torch.arange(heads), torch.arange(B), torch.arange(length), indexing="ij")
        allowed[:, :B, :length] = block_mask.mask_mod(0, *places)
        allowed = allowed.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))  # (H, blocks, 128, blocks, 128)
        listed = block_mask.to_dense()[0].bool()
        assert not (allowed.any(dim=4).any(dim=2) & ~listed).any()
        if block_mask.full_kv_num_blocks is not None:
            padded = torch.zeros_like(allowed.flatten(3).flatten(1, 2))
            padded[:, :B, :length] = True
            whole = (allowed | ~padded.view_as(allowed)).all(dim=4).all(dim=2)
            places = torch.arange(listed.size(2)).expand_as(listed)
            taken = places < block_mask.full_kv_num_blocks[0].unsqueeze(2)
            full = torch.zeros_like(listed).scatter(2, block_mask.full_kv_indices[0].long(), taken)
            assert not (full & ~whole).any()
        looked_at.append(float(listed.float().mean()))
        return flex_attention(queries, keys, values, block_mask=block_mask, **rest)

    error = checks.error("loss", attention.flex(problem, True, counting_attention)(), problem)
    assert error < 2 * checks.error("loss", PROVIDERS["naive"].prepare(problem, True)(), problem) + 1e-6
    assert looked_at[0] == 1
    assert looked_at[1] < 1


@pytest.mark.parametrize("name", ["naive", "chunked", "streaming", "flex attention"])
def test_a_query_without_others_of_its_class_has_no_gradient(name):
    problem = made("float32", B=30, N=60, C=30)
    alone = (problem.labels.unsqueeze(1) == problem.bank_labels).sum(dim=1) == 1
    assert 0 < alone[: checks.QUERIES].sum() < checks.QUERIES
    prepare = PROVIDERS[name].prepare if name != "flex attention" else partial(attention.flex, attention=flex_attention)
    outputs = prepare(problem, True)()
    assert (outputs[1][alone] == 0).all()
    assert checks.error("loss", outputs, problem) < TOLERANCE["float32"]
    assert checks.error("loss", outputs[:1], problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("heads", range(1, 5))
def test_heads_divide_the_rows_and_come_near_what_is_wanted(heads):
    device = torch.device("cpu")
    found = attention.choose_heads(1, 10**6, device, rounds=heads)
    assert 10**6 % found == 0
    assert found <= 2 * heads * torch.get_num_threads()
    assert attention.choose_heads(1, 10**6, device, heads, lowest=1000) >= 1000
    assert attention.choose_heads(1, 997, device, heads, highest=1) == 1


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
def test_a_cross_entropy_whose_last_layer_is_the_bank_gives_the_log_sum(gradient):
    """As those of language models do, which need a GPU."""
    problem = made("float32")
    call = providers.log_sum(cross_entropy, problem, gradient)
    assert checks.error("log sum", call(), problem) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", steps.UPDATES)
def test_updates_are_equation_15(name, dtype):
    problem = made(dtype)
    before = problem.bank[problem.index]
    steps.UPDATES[name].prepare(problem, False)()
    assert checks.error_of_update(before, problem.bank[problem.index], problem.features.detach()) < TOLERANCE[dtype]


@pytest.fixture(scope="module")
def training_losses() -> dict[str, list[float]]:
    """The losses of six training steps on images of 32×32, on which ResNet18 takes a quarter of the time."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(steps.PIXELS, "cpu", 32)
        for name in steps.TRAINING:
            made("bfloat16")  # so that the next bank is a new one: training changes it
            call = steps.TRAINING[name].prepare(made("float32", 8, 40, 8, 3), False)
            found[name] = [float(call()[0]) for _ in range(6)]
    return found


@pytest.mark.parametrize("name", steps.TRAINING)
def test_training_steps_train(name, training_losses):
    losses = training_losses[name]
    assert losses[-1] < 0.9 * losses[0]


def test_training_with_ours_is_training_with_naive(training_losses):
    """The same encoder, and from the second step on the same updated rows."""
    assert training_losses["ours"][:3] == pytest.approx(training_losses["naive"][:3], rel=1e-3)


@pytest.mark.parametrize("result", ["loss", "mean", "log sum", "product"])
def test_wrong_numbers_are_seen(result):
    problem = made("float32")
    right = {
        "loss": PROVIDERS["naive"].prepare,
        "mean": PROVIDERS["SDPA flash"].prepare,
        "log sum": partial(providers.log_sum, cross_entropy),
        "product": PROVIDERS["product alone"].prepare,
    }
    for gradient in (True, False) if result in ("loss", "log sum") else (True,):
        outputs = list(right[result](problem, gradient)())
        compared = 0 if result == "product" else -1
        outputs[compared] = 1.01 * outputs[compared]
        assert checks.error(result, tuple(outputs), problem) == pytest.approx(0.01, rel=1e-2)
        outputs[compared] = outputs[compared] * torch.nan
        assert checks.error(result, tuple(outputs), problem) == math.inf


def test_of_folded_means_the_last_are_looked_at():
    problem = made("float32", N=999)
    bank = problem.bank.view(3, 333, -1)
    means = torch.softmax(problem.features.detach() @ bank.transpose(1, 2) / problems.SIGMA, dim=2) @ bank
    assert checks.error("mean", (means,), problem) < TOLERANCE["float32"]
    means[-1, 0, 0] += 0.1
    assert checks.error("mean", (means,), problem) > 1e-2


def test_queries_differ_and_the_archive_is_made_once():
    problem = made("float32")
    assert len(problem.index.unique()) == 48
    assert torch.equal(problem.labels, problem.bank_labels[problem.index])
    assert made("float32", B=5).bank is problem.bank
    assert made("bfloat16").bank is not problem.bank
