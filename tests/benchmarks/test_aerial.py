"""The benchmark on wrong labels: its augmentation is torchvision's, its losses and metrics are what they are called,
and what was found survives a kill.
"""

import csv
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from benchmarks.aerial import images, losses, training
from benchmarks.aerial.__main__ import main
from benchmarks.aerial.results import RATES, key, read
from ntdne_kernels.experiments import results
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.samples import transform
from ntdne_kernels.experiments.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = ["--encoder", "small", "--image-size", "16", "--batch-size", "32", "--device", "cpu"]


def plan(tmp_path: Path, **differing: object) -> training.Plan:
    small = {"image_size": 16, "encoder": "small", "dim": 16, "epochs": 2, "batch_size": 32, "rate": 0.3}
    settings = Settings(**{"data": "made:160x4", **small, **differing})
    return training.Plan(settings, tmp_path / "found.csv", 1, "cpu", False, tmp_path / "cache")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.aerial", *map(str, arguments), *SMALL]


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, which saves imports: its exit status, output and errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", command(*arguments)[2:])
        capfd.readouterr()
        try:
            status = main()
        except SystemExit as stop:  # argparse's
            status = stop.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A .zip of 3 classes of 16 images, told apart by their colour."""
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "scenes.zip", "w") as file:
        for c, name in enumerate(("field", "sea", "town")):
            for i in range(16):
                pixels = random.integers(0, 80, (16, 16, 3))
                pixels[..., c] += 120
                image = folder / "image.png"
                Image.fromarray(pixels.astype(np.uint8)).save(image)
                file.write(image, f"scenes/{name}/{i}.png")
    return folder / "scenes.zip"


# Images


@pytest.mark.parametrize(
    ("jitter", "factors", "of_one"),
    [
        (images.brightness, (0.6, 1.4), vision.adjust_brightness),
        (images.contrast, (0.6, 1.4), vision.adjust_contrast),
        (images.saturation, (0.6, 1.4), vision.adjust_saturation),
        (images.hue, (-0.4, 0.4), vision.adjust_hue),
    ],
)
def test_each_image_is_jittered_by_its_own_factor_as_torchvision_does(jitter, factors, of_one):
    torch.manual_seed(0)
    pixels = torch.rand(20, 3, 8, 8)
    pixels[0, 1:] = pixels[0, :1]  # grey
    pixels[1] = (pixels[1] > 0.5).float()  # of full saturation, black and white
    factor = torch.empty(20, 1, 1, 1).uniform_(*factors)
    expected = torch.stack([of_one(image, float(f)) for image, f in zip(pixels, factor, strict=True)])
    assert (jitter(pixels, factor) - expected).abs().max() < 2e-6


def test_a_fifth_of_the_images_turns_grey_and_half_is_mirrored():
    torch.manual_seed(0)
    pixels = torch.empty(2000, 3, 2, 4)
    pixels[:] = torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1)
    pixels[..., :2] *= 0.2  # the left half is darker
    found = images.augmented(pixels)
    grey = found.amax(dim=1) - found.amin(dim=1) < 1e-5
    assert float(grey.all(dim=(1, 2)).float().mean()) == pytest.approx(0.2, abs=0.03)
    mirrored = found[..., 0].sum(dim=(1, 2)) > found[..., 3].sum(dim=(1, 2))
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert len(found.flatten(1).unique(dim=0)) > 1900  # images draw on their own


def test_images_that_are_not_augmented_are_those_of_the_experiments():
    archive = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    found = images.Images(archive, "cpu").batch(torch.tensor([3, 0]), augment=False)
    expected = torch.stack([transform(augment=False)(archive[i]) for i in (3, 0)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


# Losses


def test_classifiers_losses_are_their_formulas():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1])
    features = torch.randn(4, 5)
    for method, of_share in (("cross-entropy", lambda s: -s.log()), ("GCE", lambda s: (1 - s**0.7) / 0.7)):
        criterion = losses.make_criterion(method, labels, 5)
        share = criterion.classifier(features).softmax(dim=1)[torch.arange(4), labels]
        torch.testing.assert_close(criterion(features, torch.arange(4)), of_share(share).mean())


def test_without_kernels_the_losses_are_the_same():
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    for method in ("SNCA", "NTDNE-paper", "NTDNE-unit-slope"):
        fused, plain = losses.make_criterion(method, labels, 8), losses.make_criterion(method, labels, 8, True)
        assert fused.fused
        assert not plain.fused
        plain.load_state_dict(fused.state_dict())
        features = torch.randn(10, 8)
        torch.testing.assert_close(fused(features, torch.arange(10)), plain(features, torch.arange(10)))


# Training


def test_metrics_are_those_of_the_experiments(tmp_path):
    here = plan(tmp_path)
    problem = make_problem(here.settings, here.cache)
    torch.manual_seed(0)
    encoder = make_encoder("small", 16)
    made = images.Images(problem.archive.images, "cpu")
    found = training.metrics(encoder, made, problem, here.settings.seed, here, last=True)
    assert encoder.training
    evaluated = results.evaluate(encoder, here.settings, problem, [], tmp_path, variant="", device="cpu")["metrics"]
    assert found == {name: pytest.approx(evaluated[name], abs=1e-4) for name in RATES}


@pytest.mark.parametrize("method", losses.METHODS)
def test_every_method_learns_and_leaves_a_row_for_each_evaluation(method, tmp_path):
    here = plan(tmp_path, data="digits", image_size=8, batch_size=16, epochs=3)._replace(every=2)
    assert read(here.output) == []
    assert training.train(training.Run(method, 0.1), here) == ""
    first, last = read(here.output)
    assert (first["epoch"], last["epoch"], last["method"], last["lr"]) == ("2", "3", method, "0.1")
    assert (first["nmi"], last["dataset"]) == ("", "digits")
    assert float(last["loss"]) < float(first["loss"])
    assert float(last["map20_hits"]) > 0.8  # untrained: 0.73
    assert float(last["nmi"]) > 0.4


def test_a_loss_that_diverges_is_named(tmp_path):
    here = plan(tmp_path)
    failure = training.train(training.Run("cross-entropy", 1e12), here)
    assert failure.startswith("cross-entropy, lr 1e+12: ValueError: the loss of epoch 1 is ")


# The command


def test_a_packed_archive_is_trained_on_and_what_is_finished_is_left(packed, tmp_path, run):
    file = tmp_path / "found.csv"
    arguments = (packed, "--output", file, "--epochs", "2", "--every", "1", "--methods", "GCE", "SNCA@0.2")
    status, printed, errors = run(*arguments, "--jobs", "2")
    assert status == 0, errors
    assert "33 training images" in printed
    assert "2 of 2 runs to do" in printed
    assert "| SNCA | 0.2 | 2 |" in printed
    found = read(file)
    assert sorted((row["method"], row["lr"], row["epoch"]) for row in found) == [
        *(("GCE", "0.1", str(epoch)) for epoch in (1, 2)),
        *(("SNCA", "0.2", str(epoch)) for epoch in (1, 2)),
    ]
    assert {row["dataset"] for row in found} == {"scenes"}

    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "SNCA,0.2,2," not in line]
    file.write_text("".join(kept))  # as if it had been killed
    status, printed, errors = run(*arguments, "cross-entropy@1e12")
    assert status == 1
    assert "2 of 3 runs to do" in printed
    assert "aerial: cross-entropy, lr 1e+12: ValueError" in errors
    assert file.read_text().startswith("".join(kept))
    assert sorted(map(key, read(file))) == sorted(map(key, found))


def test_a_killed_command_keeps_its_rows_and_leaves_no_process(packed, tmp_path):
    file = tmp_path / "found.csv"
    arguments = (packed, "--output", file, "--epochs", "5000", "--every", "1", "--methods", "GCE")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (file.exists() and len(file.read_text().splitlines()) > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    rows = list(csv.DictReader(file.open()))
    time.sleep(1)
    assert list(csv.DictReader(file.open())) == rows
    assert [row["epoch"] for row in rows] == [str(epoch + 1) for epoch in range(len(rows))]
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_is_said(packed, tmp_path, run):
    other, two = tmp_path / "other.csv", tmp_path / "two.zip"
    other.write_text("a,b\n")
    status, _, errors = run(packed, "--output", other)
    assert (status, errors.strip()) == (
        2,
        f"aerial: output: expected a file that this command has written, but {other} has other columns",
    )
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a/1.png", "")
        archive.writestr("b/1.png", "")
    status, _, errors = run(two, "--output", tmp_path / "new.csv")
    assert status == 2
    assert "archive: expected one folder of class folders in" in errors
    status, _, errors = run(packed, "--output", tmp_path / "new.csv", "--methods", "NTDNA")
    assert status == 2
    assert "expected one of cross-entropy, GCE" in errors
    status, _, errors = run(packed, "--output", tmp_path / "new.csv", "--methods", "GCE@-1")
    assert status == 2
    assert "--methods" in errors
