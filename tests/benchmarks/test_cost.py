"""The cost model counts the bytes that a step hands to the collectives on ranks, and steps are measured beside it."""

import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import distributed

from benchmarks import cost
from benchmarks.scale import measure as scale
from benchmarks.scale import tables
from benchmarks.scale.__main__ import main
from ntdne_kernels import NTDNELoss
from ntdne_kernels.ops import sharded
from tests import ranks

D, N = 6, 23
GPU = cost.Machine(flops=1e12, bandwidth=1e12, exponentials=1e10, network=1e9, latency=1e-5, at_once=True)
OTHERS = ("all_gather", "all_gather_object", "all_to_all", "broadcast", "reduce", "reduce_scatter_tensor", "send")
CASES = [
    # The bank's dtype, the features', and sharded.PIECE on a CPU.
    (torch.float32, torch.float32, 1024),
    (torch.float32, torch.float32, 4),
    (torch.bfloat16, torch.float32, 1024),
    (torch.bfloat16, torch.bfloat16, 3),
    (torch.float64, torch.float64, 1024),
]

Counts = dict[str, Counter[tuple[str, str]]]
"""By phase, and in it by collective: calls, bytes handed over, and bytes for others where the call says which."""


def count_collectives() -> Counter[tuple[str, str]]:
    """What this process hands to torch.distributed's collectives from here on."""
    found: Counter[tuple[str, str]] = Counter()

    def counting(collective: str, function: Any) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            handed = tensors[0] if collective == "all-reduce" else tensors[1]
            found[collective, "calls"] += 1
            found[collective, "payload"] += handed.nbytes
            if collective == "all-to-all":
                rows_for = tensors[3]
                rows = sum(rows_for) - rows_for[distributed.get_rank()]
                found[collective, "sent"] += rows * handed.size(1) * handed.itemsize
            return function(*tensors, **options)

        return call

    for collective, (module, name) in scale.COLLECTIVES.items():
        setattr(module, name, counting(collective, getattr(module, name)))
    return found


def steps_of_this_rank(sizes: list[int]) -> list[Counts]:
    """What a training step of each case hands over."""
    b = sizes[distributed.get_rank()]
    banks = {bank for bank, _, _ in CASES}
    criteria = {
        bank: NTDNELoss(torch.arange(N) % 4, D, dtype=bank, process_group=distributed.group.WORLD)
        for bank in sorted(banks, key=str)
    }
    for name in OTHERS:
        setattr(distributed, name, None)  # a step that takes one of these fails
    found, counts = count_collectives(), []
    for bank, features, sharded.PIECE["cpu"] in CASES:
        queries = torch.randn(b, D, dtype=features, requires_grad=True)
        index = torch.randint(0, N, (b,))
        found.clear()
        criteria[bank](queries, index).backward()
        forward = found.copy()
        criteria[bank].update_bank(queries, index)
        counts.append({"forward": +forward, "update_bank": found - forward})
    return counts


def expected_of_rank(rank: int, sizes: list[int], bank: torch.dtype, piece: int) -> Counts:
    found: Counts = {"forward": Counter(), "update_bank": Counter()}
    for message in cost.messages(sizes, rank, D, bank.itemsize, piece):
        of_phase = found[message.phase]
        of_phase[message.collective, "calls"] += message.calls
        of_phase[message.collective, "payload"] += message.payload
        if message.collective == "all-to-all":
            of_phase[message.collective, "sent"] += int(message.sent)
    return {phase: +counts for phase, counts in found.items()}


@pytest.mark.parametrize("sizes", [[5], [4, 4], [5, 2], [3, 3, 3], [3, 0, 4]])
def test_a_step_hands_over_the_bytes_of_the_formula(sizes):
    for rank, of_rank in enumerate(ranks.run(steps_of_this_rank, len(sizes), sizes)):
        for (bank, _, piece), found in zip(CASES, of_rank, strict=True):
            assert found == expected_of_rank(rank, sizes, bank, piece)


def test_the_bytes_sent_by_hand():
    """Two ranks with 1 and 3 queries of 10 values, a bfloat16 bank: the ring of two sends each payload once."""
    sent = {(message.phase, message.name): message.sent for message in cost.messages([1, 3], 0, 10, 2)}
    assert sent == {
        ("forward", "counts"): 40,
        ("forward", "images"): 48,
        ("forward", "look-up"): 64,
        ("forward", "features"): 60,
        ("forward", "log sums"): 128,
        ("forward", "directions"): 120,
        ("update_bank", "counts"): 40,
        ("update_bank", "images"): 48,
        ("update_bank", "look-up"): 64,
        ("update_bank", "features"): 120,
    }
    of_three = {
        message.name: message.sent for message in cost.messages([1, 1, 1], 0, 10, 2) if message.phase == "forward"
    }
    assert of_three["features"] == 40  # its own row, then the one that came from the left
    assert of_three["look-up"] == 64  # four times a third of 48


@pytest.mark.parametrize("W", [1, 2, 8, 64])
def test_even_batches_send_what_the_closed_form_says(W):
    b, e, w = 256, 2, 4
    sent = sum(message.sent for message in cost.messages([b] * W, W - 1, 128, e))
    assert sent == pytest.approx((W - 1) * (80 + b * (160 + (e + 2 * w) * 128)), rel=1e-12)


def test_one_process_takes_as_long_as_its_slowest_unit():
    found = cost.step(GPU, b=100, N=10_000, D=32, W=1, bank_bytes=4)
    assert found == (4 * 100 * 10_000 * 32 / 1e12, 0, 0)
    by_exponentials = GPU._replace(exponentials=1e8)
    assert cost.step(by_exponentials, 100, 10_000, 32, 1, 4).total == 100 * 10_000 / 1e8
    by_reading = GPU._replace(bandwidth=1e7)
    assert cost.step(by_reading, 100, 10_000, 32, 1, 4).total == 10_000 * 32 * 4 / 1e7
    core = by_exponentials._replace(at_once=False)
    assert cost.step(core, 100, 10_000, 32, 1, 4).total == pytest.approx(1.28e-4 + 1e-2)


def test_ranks_share_the_rows_of_the_largest_shard_and_all_queries():
    free = GPU._replace(network=1e30, latency=0)
    assert cost.step(free, 10, 10_001, 32, 4, 4).total == pytest.approx(4 * 40 * 2501 * 32 / 1e12)


def test_what_the_last_pieces_wait_for_is_hidden_behind_sums_and_no_more():
    one = cost.step(GPU, 64, 100_000, 32, 2, 4, piece=128)
    four = cost.step(GPU, 64, 100_000, 32, 2, 4, piece=32)
    gather = 4 * 1e-5 + 4 * 32 * 64 / 1e9
    assert one.hidden == 0
    assert four.communication == pytest.approx(one.communication + 3 * 1e-5)
    assert four.hidden == pytest.approx(3 / 4 * gather)
    quick = cost.step(GPU, 64, 10, 32, 2, 4, piece=32)
    assert quick.hidden == pytest.approx(3 / 4 * quick.compute)


def test_the_memory_of_a_rank_is_that_of_its_bank():
    labels = torch.arange(1001) % 7
    memory = NTDNELoss(labels, 16, dtype=torch.bfloat16).memory
    expected = cost.memory(b=8, N=1001, D=16, W=1, C=7, bank_bytes=2)
    del expected["batch"]
    held = [x for x in vars(memory).values() if isinstance(x, torch.Tensor)]
    assert sum(expected.values()) == sum(x.nbytes for x in held) - 4  # one place more for scores


def test_steps_are_measured_on_ranks_and_results_of_other_parts_stay(tmp_path, monkeypatch):
    file = tmp_path / "scale.json"
    file.write_text('{"rates": "of another run"}')
    command = ["benchmarks.scale", "measure", "--part", "ranks", "--file", str(file), "--shrink", "5000"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    run = json.loads(file.read_text())
    assert run["rates"] == "of another run"
    assert [(row["ranks"], row["N"]) for row in run["ranks"]["rows"]] == [(1, 200), (2, 200), (4, 200)]
    for row in run["ranks"]["rows"]:
        assert len(row["seconds"]) == row["ranks"]
        for seconds, communication in zip(row["seconds"], row["communication"], strict=True):
            assert len(seconds) == scale.REPEATS
            assert all((0 < c < s) == (row["ranks"] > 1) for c, s in zip(communication, seconds, strict=True))


def test_predictions_say_that_they_are_and_what_does_not_fit(capsys):
    tables.print_predictions()
    printed = capsys.readouterr().out
    assert "**Predicted, never run" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 1,000")]
    assert rows[0][1].startswith("0.166 ms, 0%")
    assert rows[-1][1] == "does not fit: 284 GB"
    assert "does not fit" not in rows[-1][2]
