"""IndexedDataset: samples with their index, and the labels of what it holds."""

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

import ntdne_kernels
from ntdne_kernels import IndexedDataset, NTDNELoss

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


def test_samples_end_with_their_index_whatever_the_sampler_does():
    images, labels = torch.arange(10.0).unsqueeze(1), torch.arange(10) % 3
    dataset = IndexedDataset(TensorDataset(images, labels))
    for batch, (image, label, index) in enumerate(DataLoader(dataset, batch_size=4, shuffle=True)):
        assert batch < 3
        assert torch.equal(image[:, 0], index.float())
        assert torch.equal(label, index % 3)


def test_index_is_the_position_in_the_wrapped_dataset():
    subset = IndexedDataset(Subset(TensorDataset(torch.arange(10)), [7, 8]))
    assert [(int(value), index) for value, index in subset] == [(7, 0), (8, 1)]  # type: ignore[attr-defined]
    assert subset[-1][1] == 1
    assert len(subset) == 2


def test_a_sample_that_is_no_tuple_is_paired_with_its_index():
    assert IndexedDataset(["a", "b"])[1] == ("b", 1)


def test_positions_outside_raise():
    with pytest.raises(IndexError, match="index: expected a position below 2, got 2"):
        IndexedDataset(["a", "b"])[2]


def test_a_dataset_without_positions_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    for dataset in (Stream(), iter(())):
        with pytest.raises(TypeError, match="dataset: expected a map-style dataset"):
            IndexedDataset(dataset)


def test_a_slice_is_a_list_of_samples_with_their_indices():
    dataset = IndexedDataset(TensorDataset(torch.arange(10), torch.arange(10) % 3))
    assert dataset[3:5] == [(torch.tensor(3), torch.tensor(0), 3), (torch.tensor(4), torch.tensor(1), 4)]
    assert [index for *_, index in dataset[-2:]] == [8, 9]
    assert [index for *_, index in dataset[8:20:-1]] == []
    assert [index for *_, index in dataset[::4]] == [0, 4, 8]


def test_any_kind_of_integer_is_a_position():
    dataset = IndexedDataset(["a", "b"])
    for index in (np.int64(1), torch.tensor(1), np.int8(-1)):
        sample, position = dataset[index]
        assert (sample, position, type(position)) == ("b", 1, int)


def test_a_sample_with_keys_gets_the_key_index():
    image = object()
    dataset = IndexedDataset([{"image": image, "label": 4}] * 3)
    assert dataset[2] == {"image": image, "label": 4, "index": 2}
    assert dataset.dataset[2] == {"image": image, "label": 4}
    with pytest.raises(ValueError, match="dataset: expected samples without a key 'index'"):
        IndexedDataset([{"image": image, "index": 4}])[0]


LABELS = [2, 0, 1, 1, 0, 2, 1]
UNREADABLE = "an image was read"


class Images(Dataset):
    """As torchvision's: each keeps its labels in an attribute; none of its images can be read."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> None:
        raise AssertionError(UNREADABLE)


PAIRS = [(f"{image}.png", label) for image, label in enumerate(LABELS)]


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": LABELS},
        {"targets": torch.tensor(LABELS)},
        {"targets": np.array(LABELS, np.uint8)},
        {"labels": LABELS},
        {"labels": ["a", "b", "c"], "samples": PAIRS},  # names of classes
        {"labels": lambda: None, "imgs": PAIRS},
        {"_labels": LABELS},
        {"_samples": PAIRS, "samples": [f"{image}.png" for image in range(7)]},
        {"targets": [str(label) for label in LABELS]},
        {"targets": LABELS, "labels": np.array(LABELS, np.int16)},
        {"targets": LABELS, "labels": [f"class {label}" for label in LABELS]},
        {"targets": LABELS, "labels": torch.zeros(len(LABELS), 3, dtype=torch.int64)},  # of several kinds
        {"targets": [label + 1 for label in LABELS], "target_transform": lambda label: label - 1},
        {"samples": [(file, label + 1) for file, label in PAIRS], "target_transform": lambda label: label - 1},
    ],
)
def test_labels_are_found_where_datasets_keep_them(attributes):
    labels = IndexedDataset(Images(**attributes)).labels
    assert (labels.tolist(), labels.dtype) == (LABELS, torch.int64)


def test_targets_and_labels_that_differ_are_refused():
    others = [*LABELS[:4], 1 + LABELS[4], *LABELS[5:]]
    for dataset in (Images(targets=LABELS, labels=others), Subset(Images(targets=LABELS, labels=others), [0, 1])):
        with pytest.raises(ValueError, match="expected the same labels in `targets` and `labels` of Images") as caught:
            _ = IndexedDataset(dataset).labels
        assert f"got {LABELS[4]} and {others[4]} for image 4" in str(caught.value)


def test_labels_of_parts_are_those_of_the_images_they_hold():
    whole = Images(targets=LABELS)
    half, rest = random_split(whole, [4, 3], generator=torch.Generator().manual_seed(3))
    nested = Subset(Subset(whole, [6, 4, 2, 0]), np.array([3, 1]))
    assert IndexedDataset(half).labels.tolist() == [LABELS[image] for image in half.indices]
    assert IndexedDataset(Subset(whole, range(4))).labels.tolist() == LABELS[:4]
    assert IndexedDataset(nested).labels.tolist() == [LABELS[0], LABELS[4]]
    several = IndexedDataset(ConcatDataset([rest, nested, IndexedDataset(whole)]))
    assert several.labels.tolist() == [*(LABELS[image] for image in rest.indices), LABELS[0], LABELS[4], *LABELS]
    assert len(several.labels) == len(several)


def test_labels_are_those_that_samples_carry():
    dataset = TensorDataset(torch.arange(20.0), torch.arange(20) % 4 - 1)
    part = IndexedDataset(ConcatDataset(random_split(dataset, [5, 9, 6])[::2]))
    assert part.labels.tolist() == [int(label) for _, label, _ in part[:]]


def test_labels_follow_a_change_of_the_dataset():
    whole = Images(targets=list(LABELS))
    dataset = IndexedDataset(whole)
    assert dataset.labels[0] == 2
    whole.targets[0] = 1  # type: ignore[attr-defined]
    assert dataset.labels[0] == 1


def test_labels_of_a_folder_of_class_folders(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("ash", "oak"):
        (tmp_path / name).mkdir()
        for image in range(3):
            (tmp_path / name / f"{image}.png").write_text("no image")
    folder = datasets.ImageFolder(tmp_path)
    assert IndexedDataset(folder).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert IndexedDataset(Subset(folder, [5, 1])).labels.tolist() == [1, 0]
    shifted = datasets.ImageFolder(tmp_path, target_transform=lambda label: 7 - label)
    assert IndexedDataset(shifted).labels.tolist() == [7, 7, 7, 6, 6, 6]


def test_a_folder_of_which_samples_alone_were_corrected_is_refused(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("ash", "oak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_text("no image")
    folder = datasets.ImageFolder(tmp_path)
    folder.samples[0] = (folder.samples[0][0], 1)
    with pytest.raises(ValueError, match="same labels in `targets` and `samples`, got 0 and 1 for image 0"):
        _ = IndexedDataset(folder).labels
    folder.targets = [label for _, label in folder.samples]
    assert IndexedDataset(folder).labels.tolist() == [1, 1]

    class Noisy(datasets.ImageFolder):  # type: ignore[name-defined]
        def __getitem__(self, index):
            return super().__getitem__(index)[0], self.targets[index]

    noisy = Noisy(tmp_path, loader=str)
    noisy.targets = [1, 0]
    assert IndexedDataset(noisy).labels.tolist() == [1, 0]

    class WithPaths(datasets.ImageFolder):  # type: ignore[name-defined]
        def __getitem__(self, index):
            return *super().__getitem__(index), self.samples[index][0]

    with_paths = WithPaths(tmp_path, loader=str, target_transform=lambda label: 7 - label)
    assert IndexedDataset(with_paths).labels.tolist() == [7, 6]
    with_paths.samples[1] = (with_paths.samples[1][0], 0)
    with pytest.raises(ValueError, match="same labels in `targets` and `samples`, got 1 and 0 for image 1"):
        _ = IndexedDataset(with_paths).labels
    folder.targets, folder.samples = None, [(*sample, 7) for sample in folder.samples]
    assert IndexedDataset(folder).labels.tolist() == [1, 1]


def test_a_part_trains_on_its_own_labels():
    """Under the labels of the whole set most images would have those of others."""
    archive = TensorDataset(torch.randn(200, 6), torch.randint(5, (200,)))
    part = IndexedDataset(random_split(archive, [80, 120])[0])
    criterion = NTDNELoss(part.labels, dim=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images, labels, index in DataLoader(part, batch_size=20, shuffle=True):
            assert torch.equal(criterion.memory.labels[index], labels)
            criterion(images, index, labels=labels)
            criterion.update_bank(images, index)
    wrong = NTDNELoss(archive.tensors[1][:80], dim=6)
    with pytest.warns(UserWarning, match="given beside an index differ from the archive's"):
        for images, labels, index in DataLoader(part, batch_size=20):
            wrong(images, index, labels=labels)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Images(), TypeError, "dataset: found no labels of Images .* `targets` with all 7 of them"),
        (Images(targets=[0, 1]), TypeError, "dataset: found no labels of Images"),
        (TensorDataset(torch.zeros(3)), TypeError, "dataset: found no labels of TensorDataset"),
        (Subset(Images(), [1]), TypeError, "dataset: found no labels of Images"),
        (Images(targets=torch.zeros(7)), TypeError, "dataset.targets: expected an integer tensor, got torch.float32"),
        (Images(targets=np.zeros((7, 2), int)), ValueError, "dataset.targets: expected one dimension"),
    ],
)
def test_labels_that_are_not_found_are_named(dataset, error, message):
    with pytest.raises(error, match=message):
        IndexedDataset(dataset).labels  # noqa: B018


def scans(**columns: list) -> "datasets.Dataset":  # type: ignore[name-defined]
    """A dataset of Hugging Face with images that can be read, but for the last."""
    rng = np.random.default_rng(0)
    files = []
    for _ in LABELS[1:]:
        file = io.BytesIO()
        Image.fromarray(rng.integers(255, size=(4, 4, 3), dtype=np.uint8)).save(file, "png")
        files.append({"bytes": file.getvalue(), "path": None})
    images = [*files, {"bytes": b"no image", "path": None}]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def test_labels_of_a_hugging_face_dataset():
    dataset = scans(label=LABELS)
    assert IndexedDataset(dataset).labels.tolist() == LABELS
    assert IndexedDataset(dataset.select([5, 0])).labels.tolist() == [LABELS[5], LABELS[0]]
    assert IndexedDataset(Subset(dataset, [5, 0])).labels.tolist() == [LABELS[5], LABELS[0]]
    transformed = dataset.with_transform(lambda rows: {"image": [None for _ in rows["image"]], "label": rows["label"]})
    assert IndexedDataset(transformed).labels.tolist() == LABELS
    assert IndexedDataset(scans(labels=[2, None, *LABELS[2:]])).labels.tolist() == [2, -1, *LABELS[2:]]
    assert IndexedDataset(scans(label=[2**53 + 1, None, *LABELS[2:]])).labels[0] == 2**53 + 1
    typed = scans(kind=LABELS, id=list(range(7))).cast_column("kind", datasets.ClassLabel(names=["a", "b", "c"]))
    assert IndexedDataset(typed).labels.tolist() == LABELS


NAMES = [["ash", "elm", "oak"][label] for label in LABELS]


def test_names_raise_an_error_with_the_line_that_numbers_them():
    """It numbers the whole dataset: a part may lack a class, and would get other numbers."""
    whole = Images(targets=NAMES)
    with pytest.raises(
        TypeError, match="^dataset.targets: expected integers, got names such as 'oak'; this line"
    ) as raised:
        IndexedDataset(Subset(whole, [0, 2])).labels  # noqa: B018
    exec(str(raised.value).split(": ")[-1], {"ntdne_kernels": ntdne_kernels, "dataset": whole})
    assert IndexedDataset(Subset(whole, [0, 2])).labels.tolist() == [2, 1]
    scope = {"dataset": scans(label=NAMES)}
    with pytest.raises(TypeError, match="^label: expected integers, got names; this line numbers them: ") as raised:
        IndexedDataset(scope["dataset"]).labels  # noqa: B018
    exec(str(raised.value).split(": ")[-1], scope)
    assert IndexedDataset(scope["dataset"].select([0, 2])).labels.tolist() == [2, 1]


def test_no_or_several_label_columns_of_hugging_face_datasets_are_refused():
    with pytest.raises(TypeError, match=r"expected one column of labels, found image, kind; .*rename_column"):
        IndexedDataset(scans(kind=LABELS)).labels  # noqa: B018
    with pytest.raises(TypeError, match=r"expected one column of labels, found label, labels; .*rename_column"):
        IndexedDataset(scans(label=LABELS, labels=LABELS)).labels  # noqa: B018


def test_a_hugging_face_dataset_trains_and_fills_the_bank():
    def to_tensor(rows: dict) -> dict:
        pixels = [torch.from_numpy(np.array(image)).float().flatten() / 255 for image in rows["image"]]
        return {"pixel_values": pixels, "label": rows["label"]}

    dataset = IndexedDataset(scans(label=LABELS).select(range(6)).with_transform(to_tensor))
    criterion = NTDNELoss(dataset.labels, dim=5)
    encoder = nn.Linear(48, 5)
    assert criterion.fill_bank(encoder, DataLoader(dataset, batch_size=4, shuffle=True), progress=False) == 6
    expected = nn.functional.normalize(encoder(torch.stack([sample["pixel_values"] for sample in dataset[:]])), dim=1)
    torch.testing.assert_close(criterion.memory.rows(range(6)), expected.detach())
    seen = []
    for batch in DataLoader(dataset, batch_size=4, shuffle=True):
        features = encoder(batch["pixel_values"])
        assert torch.equal(criterion.memory.labels[batch["index"]], batch["label"])
        criterion(features, batch["index"], labels=batch["label"]).backward()
        criterion.update_bank(features, batch["index"])
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(6))
