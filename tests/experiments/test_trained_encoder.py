"""encoder.pt: a run's encoder is used as it was trained, on raw features or on images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ntdne_kernels.experiments import load_encoder
from ntdne_kernels.experiments.images import decode
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.results import embed
from ntdne_kernels.experiments.run import trained
from tests.experiments.helpers import QUICK, write_features


def test_a_run_on_images_leaves_an_encoder_that_takes_its_files(ntdne, photos):
    assert ntdne("train", photos, *QUICK, "--epochs", 1, "--output", "run") == 0
    encoder = load_encoder("run/encoder.pt")
    assert (encoder.name, encoder.dim, encoder.image_size, encoder.classes) == ("small", 128, 8, ["bright", "dark"])
    settings, _, network, _, _ = trained(Path("run"))
    problem = make_problem(settings)
    paths = [photos / problem.archive.files[image] for image in problem.test.tolist()]
    features = encoder(torch.stack([encoder.transform(decode(path, encoder.bands)) for path in paths]))
    expected = embed(network, problem.dataset(problem.test), 16, "cpu")
    torch.testing.assert_close(features, expected)


def test_a_run_on_features_leaves_an_encoder_that_takes_raw_features(ntdne):
    features = write_features()
    assert ntdne("train", "features.npy", "--epochs", 1, "--dim", 16, "--output", "run") == 0
    encoder = load_encoder("run")
    assert (encoder.name, encoder.dim, encoder.image_size, encoder.classes) == ("head", 16, None, ["lake", "pond"])
    assert not encoder.training
    settings, _, network, _, _ = trained(Path("run"))
    problem = make_problem(settings)
    given = torch.from_numpy(features[problem.test.numpy()])
    torch.testing.assert_close(encoder(given), embed(network, problem.dataset(problem.test), 16, "cpu"))
    assert not encoder(given).requires_grad


def test_evaluate_writes_the_encoder_of_a_run_that_has_none(ntdne):
    write_features()
    assert ntdne("train", "features.npy", "--epochs", 1, "--output", "run") == 0
    before = load_encoder("run").state_dict()
    Path("run/encoder.pt").unlink()
    assert ntdne("evaluate", "run") == 0
    assert all(torch.equal(value, before[key]) for key, value in load_encoder("run").state_dict().items())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is no file; a finished run of ntdne train has an encoder.pt"),
        (lambda path: path.write_text("print('hello')"), "is no encoder.pt that can be read"),
        (lambda path: torch.save({"format": 99}, path), "it is of another version"),
        (lambda path: path.write_text(json.dumps({})), "is no encoder.pt that can be read"),
    ],
)
def test_a_file_that_is_no_encoder_is_refused(tmp_path, prepare, message):
    prepare(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path / "encoder.pt")


def test_what_the_encoder_cannot_take_is_refused(ntdne):
    write_features()
    assert ntdne("train", "features.npy", "--epochs", 1, "--output", "run") == 0
    encoder = load_encoder("run")
    with pytest.raises(ValueError, match=r"batch: expected features of shape \(b, 10\), got shape \(2, 3\)"):
        encoder(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="takes features"):
        encoder.transform(np.zeros((4, 4, 3), np.uint8))
