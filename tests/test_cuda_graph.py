"""The recipe for CUDA graphs trains as its steps do one by one, and captures anew where what a graph has fixed changes.

Where no GPU is, a graph is captured on one that computes nothing, and forbids what a capture forbids.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import null_gpu
from ntdne_kernels import IndexedDataset, NTDNELoss

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_graph", ROOT / "examples" / "cuda_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(device: torch.device) -> tuple[nn.Module, NTDNELoss, DataLoader]:
    """A small encoder, and images some of whose labels are wrong; pruning begins with the second epoch."""
    torch.manual_seed(0)
    labels = torch.arange(70) % 3
    images = torch.randn(3, 8)[labels] + torch.randn(70, 8)
    labels[:20] = labels[:20].flip(0)
    encoder = nn.Sequential(nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)).to(device)
    criterion = NTDNELoss(labels, 16, k=0.4, warmup_epochs=1, unit_slope=False).to(device)
    return encoder, criterion, DataLoader(IndexedDataset(TensorDataset(images, labels)), batch_size=16, shuffle=True)


def trained(recipe: ModuleType, device: torch.device) -> dict[str, Tensor]:
    """What two epochs make of it; with the second, sigma and the learning rate change too."""
    encoder, criterion, loader = made(device)
    losses: list[Tensor] = []
    call = recipe.GraphedStep.__call__

    def noted(step, images: Tensor, index: Tensor) -> Tensor:
        losses.append(call(step, images, index).clone())
        return losses[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe.GraphedStep, "__call__", noted)
        recipe.train(encoder, criterion, loader, 2)
    assert criterion.pruned.any()
    return {"losses": torch.stack(losses), **state_of(encoder, criterion)}


def state_of(encoder: nn.Module, criterion: NTDNELoss) -> dict[str, Tensor]:
    memory = criterion.memory
    return encoder.state_dict() | {"rows": memory.storage.clone(), "scores": memory.last_log_p.clone()}


def test_steps_without_a_gpu_are_those_of_a_plain_loop(recipe):
    found = trained(recipe, torch.device("cpu"))
    encoder, criterion, loader = made(torch.device("cpu"))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    losses = []
    for epoch, (sigma, rate) in enumerate([(0.2, 1e-3), (0.1, 0.5e-3)]):
        criterion.set_epoch(epoch)
        criterion.sigma = sigma
        optimizer.param_groups[0]["lr"] = rate
        for images, _, index in loader:
            features = encoder(images)
            loss = criterion(features, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            criterion.update_bank(features, index)
            losses.append(loss.detach())
    for name, value in {"losses": torch.stack(losses), **state_of(encoder, criterion)}.items():
        # The learning rate is a tensor there: of float32.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.gpu
def test_graphed_training_is_that_of_steps_one_by_one_bit_for_bit(recipe, monkeypatch):
    device, captured, replayed = torch.device("cuda"), [], []
    capture, replay = recipe.GraphedStep.capture, torch.cuda.CUDAGraph.replay

    def noted(step, settings, images, index):
        captured.append(len(images))
        return capture(step, settings, images, index)

    def counted(graph):
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(recipe.GraphedStep, "capture", noted)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    found = trained(recipe, device)
    assert captured == [16, 16]  # in each epoch: one batch as it is written, three as a graph, 6 images as written
    assert len(replayed) == 6
    monkeypatch.setattr(recipe.GraphedStep, "__call__", recipe.GraphedStep.run)
    expected = trained(recipe, device)
    assert len(replayed) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


ON_NO_GPU = """
import importlib.util, os, sys, traceback
from pathlib import Path
import torch
from torch import nn
from benchmarks import null_gpu
from ntdne_kernels import NTDNELoss
assert null_gpu.is_here()
torch.ops.load_library(null_gpu.update_kernel(Path.cwd()))
spec = importlib.util.spec_from_file_location("cuda_graph", "examples/cuda_graph.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

def made():
    encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)).cuda()
    criterion = NTDNELoss(torch.arange(70) % 3, 16, k=0.3, warmup_epochs=1, unit_slope=False, device="cuda")
    optimizer = torch.optim.Adam(encoder.parameters(), capturable=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3).cuda()
    return recipe.GraphedStep(encoder, criterion, optimizer)

def batch(B):
    return torch.zeros(B, 8).cuda(), torch.arange(B).cuda()

try:
    exec(sys.argv[1])
except BaseException:
    traceback.print_exc()
    os._exit(1)
sys.stdout.flush()
os._exit(0)  # autograd's thread may still hold Python objects, and ends the process where the interpreter is gone
"""


def on_no_gpu(code: str) -> str:
    try:
        environment = os.environ | null_gpu.environment() | {"TRITON_INTERPRET": "0"}
        null_gpu.update_kernel(ROOT)
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", ON_NO_GPU, code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.version.cuda is None or shutil.which("cc") is None,
    reason="of machines with PyTorch for CUDA and a C compiler, and no GPU",
)


@without_a_gpu
def test_a_graph_launches_what_a_step_does_and_follows_changed_settings():
    said = on_no_gpu("""
step, captured = made(), []
capture = step.capture
def noted(settings, images, index):
    captured.append(len(images))
    return capture(settings, images, index)
step.capture = noted
c = step.criterion
changes = {
    "nothing yet": lambda: None,
    "sigma": lambda: setattr(c, "sigma", 0.2),
    "q": lambda: setattr(c, "q", 0.5),
    "momentum": lambda: setattr(c, "momentum", 0.9),
    "pruning": lambda: c.set_epoch(1),
    "k": lambda: setattr(c, "k", 0.2),
    "auto": lambda: setattr(c, "k", "auto"),
    "indicator": lambda: (setattr(c, "k", 0.2), setattr(c, "indicator", "stored")),
    "reduction": lambda: setattr(c, "reduction", "sum"),
    "relabel": lambda: c.memory.relabel(torch.arange(70) % 4),
}
for name, change in changes.items():
    change()
    before = len(captured)
    step(*batch(16))
    assert len(captured) == before, name
    step(*batch(6))  # at the end of an epoch
    step(*batch(16))
    assert len(captured) == before, name
    step(*batch(16))
    assert captured[before:] == [16], name
    step(*batch(6))
    given = batch(16)
    again = null_gpu.kernels_of(lambda: step(*given))
    assert captured[before:] == [16], name
    assert again == ["copy", "copy", *null_gpu.kernels_of(lambda: step.run(*given))], name
    assert sum("update_bank" in kernel for kernel in again) == again.count("prepare") == again.count("record") == 1
step(*batch(24))
step(*batch(24))
print(captured)
""")
    assert said == f"{[16] * 10 + [24]}\n"


@without_a_gpu
def test_what_cannot_be_captured_says_why():
    """In one process: each state follows from the one before."""
    said = on_no_gpu("""
def refused(step):
    try:
        step.capture((), *batch(16))
    except RuntimeError as error:
        while error.__context__ is not None:  # the last error is that the capture is broken
            error = error.__context__
        return str(error)

step = made()
print(refused(step))
step.criterion(torch.zeros(7, 16).cuda(), torch.arange(7).cuda())
print(refused(step))
step(*batch(16))
step.criterion.memory._storage = torch.zeros(70, 16)
step.criterion.memory._seal()
print(refused(step))
""")
    expected = (
        "CUDA graph: the first step on a device makes a counter; run a step before the capture",
        "CUDA graph: the kernel prepare has not run for such arguments yet; run the step before the capture",
        "CUDA graph: a bank in host memory is read by copies that the host waits for",
    )
    for line, message in zip(said.splitlines(), expected, strict=True):
        assert line.startswith(message)
