"""Samples: normalisation, augmentation, and datasets of an archive's images."""

import pickle

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader

from ntdne_kernels.experiments.archive import open_archive
from ntdne_kernels.experiments.samples import IMAGENET, ImageDataset, normalisation, transform
from tests.experiments.helpers import write_bands

IMAGENET_MEAN, IMAGENET_DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


# Transforms


def test_without_augmentation_images_are_only_normalised():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    expected = ((image / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION).transpose(2, 0, 1)
    found = transform(augment=False)(image)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_augmentation_makes_grey_mirrors_and_jitters_as_often_as_in_the_paper():
    torch.manual_seed(0)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = (200, 90, 40)
    augment = transform(augment=True)
    grey = mirrored = 0
    colours = set()
    for _ in range(1000):
        found = augment(image)
        assert found.shape == (3, 8, 8)
        assert found.dtype == torch.float32
        pixels = found.numpy().transpose(1, 2, 0) * IMAGENET_DEVIATION + IMAGENET_MEAN
        left, right = pixels[0, 0], pixels[0, -1]
        mirrored += right.sum() > left.sum()
        colour = max(left, right, key=np.sum)
        grey += np.ptp(colour) < 0.01
        colours.add(tuple(np.round(colour, 3)))
    assert 150 < grey < 250  # 200 expected, deviation 13
    assert 450 < mirrored < 550  # 500 expected, deviation 16
    assert len(colours) > 700


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_bands_are_standardised_over_the_training_images(tmp_path, cache, dtype, largest):
    folder = write_bands(tmp_path / "sentinel", 2, dtype)
    archive = open_archive(str(folder), 8, cache=cache)
    train = torch.tensor([7, 0, 1, 5])
    bands = normalisation(archive, train)
    values = archive.images[train.numpy()].reshape(-1, 2) / largest
    assert np.allclose(bands.mean, values.mean(axis=0), rtol=1e-6)
    assert np.allclose(bands.deviation, values.std(axis=0), rtol=1e-6)
    made = torch.stack([transform(False, bands)(np.array(archive.images[i])) for i in train.tolist()])
    assert made.shape == (4, 2, 8, 8)
    assert made.dtype == torch.float32
    assert made.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (made.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_colours_of_8_bits_are_normalised_as_imagenet_unless_they_are_chosen_bands(archive):
    assert normalisation(archive, torch.arange(7)) == IMAGENET
    chosen = normalisation(archive, torch.arange(7), bands=(3, 2, 1))
    assert chosen != IMAGENET
    assert np.allclose(chosen.mean, np.array([3, 4, 5]) / 255)


def test_small_deviations_of_large_values_are_found_and_constant_bands_finite(tmp_path, cache):
    source = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "heights" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.stack([8000 + source.normal(0, 0.1, (8, 8)), np.full((8, 8), 7)], axis=-1).astype(np.float32)
            tifffile.imwrite(tmp_path / "heights" / name / f"{i}.tif", pixels, photometric="minisblack")
    archive = open_archive(str(tmp_path / "heights"), 8, cache=cache)
    bands = normalisation(archive, torch.arange(6))
    assert bands.floats
    assert abs(bands.deviation[0] - archive.images[..., 0].std(dtype=np.float64)) < 1e-6
    assert torch.isfinite(transform(False, bands)(np.array(archive.images[0]))).all()


def test_bands_are_augmented_by_contrast_brightness_and_mirroring(tmp_path, cache):
    archive = open_archive(str(write_bands(tmp_path / "sentinel", 5)), 8, cache=cache)
    bands = normalisation(archive, torch.arange(10))
    image = np.array(archive.images[0])
    plain, augment = transform(False, bands)(image), transform(True, bands)
    torch.manual_seed(0)
    mirrored, factors, shifts = 0, [], []
    for _ in range(300):
        found = augment(image)
        forward = (found[0, 0, 1] - found[0, 0, 0]) * (plain[0, 0, 1] - plain[0, 0, 0]) > 0
        mirrored += not forward
        found = found if forward else found.flip(2)
        factors.append(float((found[0, 1, 0] - found[0, 0, 0]) / (plain[0, 1, 0] - plain[0, 0, 0])))
        shifts.append(float(found[0].mean() - plain[0].mean()))
        rest = found - found.mean(dim=(1, 2), keepdim=True)
        expected = factors[-1] * (plain - plain.mean(dim=(1, 2), keepdim=True))
        assert torch.allclose(rest, expected, atol=1e-4)
    assert 110 < mirrored < 190
    assert 0.59 < min(factors) < 0.65
    assert 1.35 < max(factors) < 1.41
    assert -0.41 < min(shifts) < -0.35
    assert 0.35 < max(shifts) < 0.41


# Datasets


def value(image: torch.Tensor) -> int:
    """The value that write_image wrote, from a normalised image."""
    return round(255 * float(image[0, 0, 0] * IMAGENET_DEVIATION[0] + IMAGENET_MEAN[0]))


def test_samples_are_image_given_label_and_position_in_the_dataset(archive):
    dataset = ImageDataset(archive, torch.tensor([5, 0, 6]), torch.tensor([0, 1, 1]), transform(augment=False))
    assert len(dataset) == 3
    assert [(value(image), label, position) for image, label, position in dataset] == [(5, 0, 0), (0, 1, 1), (6, 1, 2)]  # type: ignore[attr-defined]
    assert dataset[-1][2] == 2
    with pytest.raises(IndexError):
        dataset[3]


def test_an_index_that_does_not_fit_is_refused(archive):
    with pytest.raises(
        ValueError, match=r"labels: expected one for each image of the index, got shapes \(2,\) and \(3,\)"
    ):
        ImageDataset(archive, torch.arange(3), torch.arange(2), transform(augment=False))
    for wrong in (7, -1):
        with pytest.raises(ValueError, match=f"index: expected images of the archive, 0 to 6, got {wrong}"):
            ImageDataset(archive, torch.tensor([0, wrong]), torch.arange(2), transform(augment=False))


def test_workers_see_the_same_samples(archive):
    dataset = ImageDataset(archive, torch.arange(7).flip(0), torch.arange(7), transform(augment=True))
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    seen = [
        (label, position) for _, labels, positions in loader for label, position in zip(labels, positions, strict=True)
    ]
    assert seen == [(i, i) for i in range(7)]


def test_a_pickled_dataset_names_the_file_and_does_not_hold_it(cache):
    archive = open_archive("made:200x2", 32, cache=cache)
    dataset = ImageDataset(archive, torch.arange(150, 200), torch.arange(50), transform(augment=True))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000 < archive.images.nbytes
    copy = pickle.loads(pickled)
    assert isinstance(copy.images, np.memmap)
    for i in (0, 49):
        assert torch.equal(torch.manual_seed(0) and copy[i][0], torch.manual_seed(0) and dataset[i][0])
