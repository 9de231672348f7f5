"""The learning problem of some settings: parts, unseen classes, and the authors' splits with the authors' flips."""

import numpy as np
import pytest
import tifffile
import torch

from ntdne_kernels.experiments.noise import corrupt, uniform
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.settings import Settings


def problem_of(tmp_path, **settings):
    return make_problem(Settings(**{"data": "made:200x5", "image_size": 8} | settings), tmp_path / "cache")


def test_parts_are_70_10_20_of_each_class_and_share_no_image(tmp_path):
    problem = problem_of(tmp_path)
    parts = (problem.train, problem.validation, problem.test)
    for part, each in zip(parts, (28, 4, 8), strict=True):
        assert problem.labels[part].bincount().tolist() == [each] * 5
    assert torch.cat(parts).sort().values.tolist() == list(range(200))


def test_only_training_labels_are_wrong(tmp_path):
    problem = problem_of(tmp_path, rate=0.5)
    true = problem.labels[problem.train]
    assert torch.equal(problem.noisy.flipped, problem.noisy.labels != true)
    assert 40 < problem.noisy.flipped.sum() < 100
    for part in (problem.validation, problem.test):
        labels = [label for _, label, _ in problem.dataset(part)]
        assert labels == problem.archive.labels[part].tolist()


def test_no_noise_flips_nothing(tmp_path):
    assert not problem_of(tmp_path, noise="none", rate=0.5).noisy.flipped.any()


def test_the_seed_decides_split_and_flips(tmp_path):
    first, again, other = (problem_of(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.noisy.labels, again.noisy.labels)
    assert not torch.equal(first.train, other.train)


def test_the_authors_split_and_flips_are_the_same_for_every_seed(tmp_path):
    first, other = (problem_of(tmp_path, split="authors", seed=seed) for seed in (1, 2))
    assert torch.equal(first.train, other.train)
    assert torch.equal(first.noisy.labels, other.noisy.labels)
    expected = corrupt(first.archive.labels[first.train], uniform(5, 0.5), seed=42)
    assert torch.equal(first.noisy.labels, expected.labels)


def test_unseen_classes_are_in_no_part_and_the_others_are_counted_from_0(tmp_path):
    problem = problem_of(tmp_path, unseen_classes=2)
    assert len(problem.classes) == 3
    assert len(problem.unseen) == 80
    assert problem.labels[problem.unseen].unique().tolist() == [-1]
    for part in (problem.train, problem.validation, problem.test):
        assert problem.labels[part].unique().tolist() == [0, 1, 2]
        names = {problem.archive.classes[label] for label in problem.archive.labels[part]}
        assert names == set(problem.classes)


def test_bands_are_standardised_over_the_training_images_alone(tmp_path):
    source = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "bands" / name).mkdir(parents=True)
        for i in range(10):
            pixels = source.integers(0, 4000, (8, 8, 5), np.uint16)
            tifffile.imwrite(tmp_path / "bands" / name / f"{i}.tif", pixels, photometric="minisblack")
    problem = problem_of(tmp_path, data=str(tmp_path / "bands"), bands=(5, 1))
    values = problem.archive.images[problem.train.numpy()].reshape(-1, 2) / 65535
    assert np.allclose(problem.normalisation.mean, values.mean(axis=0))
    assert np.allclose(problem.normalisation.deviation, values.std(axis=0))
    images = torch.stack([image for image, _, _ in problem.dataset(problem.train)])
    assert images.shape == (14, 2, 8, 8)
    assert abs(float(images.std()) - 1) < 0.01


def test_too_many_unseen_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unseen_classes: expected at most 3, .* got 4"):
        problem_of(tmp_path, unseen_classes=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.5}, "rate: expected a number from 0 to 1, got 1.5"),
        ({"rate": "half"}, "rate: expected a number, got 'half'"),
        ({"rate": float("nan")}, "rate: expected a number from 0 to 1, got nan"),
        ({"epochs": 2.5}, "epochs: expected a whole number, got 2.5"),
        ({"augment": 1}, "augment: expected true or false, got 1"),
        ({"lr": 0}, "lr: expected a positive number, got 0"),
        ({"bands": (0, 1)}, r"bands: expected whole numbers from 1, as 4,3,2, got \(0, 1\)"),
        ({"bands": ("4",)}, "bands: expected whole numbers from 1, as 4,3,2"),
        ({"bands": "4"}, "bands: expected a list, got '4'"),
        ({"max_pixels": 0}, "max_pixels: expected at least 1, got 0"),
        ({"schedule": "cosine"}, "schedule: expected one of constant, step, one-cycle, got 'cosine'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings("digits", **settings)


def test_targets_that_are_no_lines_of_names_are_refused(tmp_path):
    (tmp_path / "targets.yaml").write_text("- one\n- two\n")
    with pytest.raises(ValueError, match="noise_file: expected lines 'true class: wrong class'"):
        problem_of(tmp_path, noise="label-dependent", noise_file=str(tmp_path / "targets.yaml"))
    (tmp_path / "targets.yaml").write_text("ash: oak\nash: birch\n")
    with pytest.raises(ValueError, match="noise_file: expected each true class once in .*, got ash more often"):
        problem_of(tmp_path, noise="label-dependent", noise_file=str(tmp_path / "targets.yaml"))
