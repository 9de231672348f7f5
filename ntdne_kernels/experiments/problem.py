"""The learning problem that settings describe: its images, and their labels, some of them made wrong.

Shapes: N training images, C classes that are trained on.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ntdne_kernels.experiments import noise
from ntdne_kernels.experiments.archive import Archive, open_archive, open_features, relabelled
from ntdne_kernels.experiments.encoders import HEADS
from ntdne_kernels.experiments.features import features_file
from ntdne_kernels.experiments.noise import NoisyLabels
from ntdne_kernels.experiments.samples import FeatureDataset, ImageDataset, Normalisation, normalisation, transform
from ntdne_kernels.experiments.settings import Settings
from ntdne_kernels.experiments.splits import SMALLEST_CLASS, at_most, split

AUTHORS_NOISE_SEED = 42
FINGERPRINT_ROWS = 64  # of features, whose values tell the features of one network from those of another
MAX_QUERIES, MAX_DATABASE = 10_000, 1_000_000  # that evaluation compares: more take time, and change little


@dataclass(frozen=True)
class Problem:
    """An archive's images, in the parts that a run uses, as positions in the archive.

    Attributes:
        archive: where the images are.
        classes: the C classes trained on.
        labels: true label of each image of the archive in 0..C − 1; −1 where its class is kept out of training.
        train: (N,) training images.
        validation: validation images; of more than MAX_QUERIES every n-th, and so of the next two.
        test: test images.
        unseen: images of the classes that are kept out.
        noisy: the labels (N,) given to the training images, and which of them are wrong.
        normalisation: of the bands, from the training images.
    """

    archive: Archive
    classes: list[str]
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    unseen: Tensor
    noisy: NoisyLabels
    normalisation: Normalisation

    def dataset(self, images: Tensor, augment_by: int | None = None) -> ImageDataset | FeatureDataset:
        """Samples (image, true label, position in `images`); the seed `augment_by` augments them, None does not."""
        if self.archive.of_features:
            return FeatureDataset(self.archive, images, self.labels[images], self.normalisation, augment_by)
        augmentation = transform(augment_by is not None, self.normalisation)
        return ImageDataset(self.archive, images, self.labels[images], augmentation, augment_by)

    @property
    def fingerprint(self) -> str:
        """A hash of the training images and their given labels: it tells problems apart."""
        if self.archive.of_features:  # which may be too many for a list
            some = self.train[:: max(len(self.train) // FINGERPRINT_ROWS, 1)].numpy()
            rows = self.train.numpy().tobytes() + self.noisy.labels.numpy().tobytes()
            rows += self.archive.images[some].tobytes()
            return hashlib.sha256(repr((self.archive.images.shape, self.classes)).encode() + rows).hexdigest()
        files = [self.archive.files[image] for image in self.train.tolist()]
        return hashlib.sha256(repr((files, self.classes, self.noisy.labels.tolist())).encode()).hexdigest()


def make_problem(settings: Settings, cache: Path | None = None, download: bool = False) -> Problem:
    """Open the archive, split it and make some labels wrong, as the settings say.

    Raises:
        ArchiveError, ValueError: the archive or a setting is bad.
    """
    archive = _open(settings, cache, download)
    C = len(archive.classes)
    if settings.unseen_classes > C - 2:
        raise ValueError(
            f"unseen_classes: expected at most {C - 2}, so that 2 of the {C} classes are left to train on, got "
            f"{settings.unseen_classes}"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    unseen_classes = torch.randperm(C, generator=generator)[: settings.unseen_classes]
    seen = torch.ones(C, dtype=torch.bool)
    seen[unseen_classes] = False
    labels = torch.where(seen, seen.cumsum(0) - 1, -1)[archive.labels]
    labels[archive.labels < 0] = -1
    classes = [name for name, kept in zip(archive.classes, seen.tolist(), strict=True) if kept]

    parts = split(archive.labels, settings.split, settings.seed)
    train, validation, test = (part[labels[part] >= 0] for part in parts)
    validation, test = at_most(validation, MAX_QUERIES), at_most(test, MAX_QUERIES)
    matrix = _matrix(settings, classes)
    noise_seed = AUTHORS_NOISE_SEED if settings.split == "authors" else settings.seed
    noisy = noise.corrupt(labels[train], matrix, noise_seed, settings.draw)
    unseen = at_most(((labels < 0) & (archive.labels >= 0)).nonzero()[:, 0], MAX_QUERIES)
    bands = normalisation(archive, train, settings.bands)
    return Problem(archive, classes, labels, train, validation, test, unseen, noisy, bands)


def _open(settings: Settings, cache: Path | None, download: bool) -> Archive:
    """The archive of the settings, images or features; ValueError where the encoder takes the other."""
    of_features = features_file(settings.data) is not None
    if (settings.encoder in HEADS) != of_features:
        expected, what = ("head or linear", "features") if of_features else ("resnet18, resnet50 or small", "images")
        raise ValueError(
            f"encoder: expected {expected} for {settings.data}, which holds {what}, got {settings.encoder}"
        )
    labels = Path(settings.labels) if settings.labels else None
    classes = list(settings.classes) or None
    if of_features:
        columns = {"features": settings.features_column or None, "label": settings.label_column or None, "path": None}
        return open_features(Path(settings.data), labels, columns, classes)
    archive = open_archive(
        settings.data,
        settings.image_size,
        cache=cache,
        skip_unreadable=settings.skip_unreadable,
        download=download,
        classes=classes if labels is None else None,
        bands=settings.bands,
        max_pixels=settings.max_pixels,
        smallest_class=SMALLEST_CLASS if labels is None else 0,
        nested=labels is not None,  # the folders need not be the classes
    )
    return archive if labels is None else relabelled(archive, labels, settings.label_column or None, classes)


def _matrix(settings: Settings, classes: list[str]) -> Tensor:
    """The transition matrix (C, C), row-stochastic: P(given label | true class)."""
    if settings.noise == "uniform":
        return noise.uniform(len(classes), settings.rate)
    if settings.noise == "none":
        return noise.uniform(len(classes), 0)
    if settings.noise == "matrix":
        if not settings.noise_file:
            raise ValueError("noise_file: expected a .npy or .csv with the matrix for noise 'matrix', got none")
        return noise.read_matrix(settings.noise_file, len(classes))
    if settings.noise_file:
        targets = noise.targets_by_name(classes, _read_targets(settings.noise_file))
        return noise.one_target(targets, settings.rate)
    return noise.authors_map(classes, settings.rate)


def _read_targets(path: str) -> dict[str, str]:
    try:
        text = Path(path).read_bytes()  # UTF-8, whatever the locale says
        targets = yaml.safe_load(text)
        node = yaml.compose(text)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"noise_file: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(targets, dict):
        raise ValueError(f"noise_file: expected lines 'true class: wrong class' in {path}")
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"noise_file: expected each true class once in {path}, got {twice[0]} more often")
    return {str(true): str(wrong) for true, wrong in targets.items()}
