"""Features as an archive: read from every kind of file, and trained on from their memory map."""

import base64
import io
import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ntdne_kernels.experiments import problem as problems
from ntdne_kernels.experiments import samples
from ntdne_kernels.experiments.columns import read_values
from ntdne_kernels.experiments.features import read_features
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.settings import Settings
from ntdne_kernels.experiments.training import Training, train
from tests.experiments.helpers import results_of, write_features

NAMES = ["lake"] * 30 + ["pond"] * 30
PATHS = [f"{name}/{i}.png" for i, name in enumerate(NAMES)]


@pytest.fixture
def features(tmp_path, monkeypatch) -> np.ndarray:
    """features.npy with labels.npy, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return write_features()


def settings_of(data: str = "features.npy", **changes: object) -> Settings:
    values = {"data": data, "encoder": "head", "dim": 8, "epochs": 2, "batch_size": 16, "loss_options": {"k": "auto"}}
    return Settings(**values | changes)


# Reading


SHUFFLED = list(reversed(range(60)))
ROTATED = [59, *range(59)]  # of which pandas writes the index to Parquet, as it does not that of SHUFFLED


@pytest.mark.parametrize("column", ["path", "filename", "image"])
def test_labels_of_images_in_another_order_are_refused(features, column):
    Path("files.txt").write_text("\n".join(PATHS))
    names = [str(image) for image in range(60)] if column == "image" else PATHS
    table = pd.DataFrame({column: names, "label": NAMES})
    table.to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == NAMES
    table.iloc[SHUFFLED].to_csv("labels.csv", index=False)
    message = f"in the order of the features, got {names[59]} in row 0, .* of {names[0]}(;|$)"
    with pytest.raises(ValueError, match=message):
        read_features(Path("features.npy"), Path("labels.csv"))


@pytest.mark.parametrize("name", ["/data/photos/{}", "{}", "C:\\photos\\{}"])
def test_names_of_images_from_another_folder_are_the_same(features, name):
    Path("files.txt").write_text("\n".join(PATHS))
    names = [name.format(path.replace("/", "\\") if "\\" in name else path) for path in PATHS]
    pd.DataFrame({"path": names, "label": NAMES}).to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == NAMES


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("path", [f"/mnt/c/{path}" for path in PATHS]),  # beside /home/me: the same files from another root
        ("filename", [path.removesuffix(".png") for path in PATHS]),
        ("file", ["shard-0"] * 60),
        ("path", ["", *PATHS[1:]]),
        ("image", [str(image + 1) for image in range(60)]),
        ("image", [f"{image:04}" for image in range(60)]),
        ("image", [str(7 * image % 1000) for image in range(60)]),  # ids of their own
        ("image", sorted(str(image + 1) for image in range(60))),  # of files in the order of their names
        ("image", [f"{image + 1}.0" for image in range(60)]),
        ("", [str(image + 1) for image in range(60)]),
        ("Unnamed: 0", [str(7 * image) for image in range(60)]),  # of rows that were kept
        ("image_id", [str(59 - image) for image in range(60)]),  # ids
    ],
)
def test_what_does_not_speak_of_another_order_is_taken(features, column, values):
    Path("files.txt").write_text("\n".join(f"/home/me/{path}" for path in PATHS))
    pd.DataFrame({column: values, "label": NAMES}).to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == NAMES


@pytest.mark.parametrize("column", ["File", "Filename", "fileName", "FilePath", "image_path", "img", "image_id"])
def test_columns_of_names_are_known_however_they_are_written(features, column):
    Path("files.txt").write_text("\n".join(PATHS))
    table = pd.DataFrame({column: PATHS, "label": NAMES})
    table.to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == NAMES
    table.iloc[SHUFFLED].to_csv("labels.csv", index=False)
    with pytest.raises(ValueError, match=f"column {column}: .* in the order of the features, got pond/59.png in row 0"):
        read_features(Path("features.npy"), Path("labels.csv"))


@pytest.mark.parametrize("number", ["{}", "{:05}", "{}.0"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("column", ["image", "", "Unnamed: 0", "index"])
def test_numbers_of_images_in_another_order_are_refused(features, column, first, number):
    numbers = [number.format(row + first) for row in SHUFFLED]
    pd.DataFrame({column: numbers, "label": NAMES}).to_csv("labels.csv", index=False)
    message = f"in the order of the features, got {59 + first} in row 0, .* of {first}; leave the column out"
    with pytest.raises(ValueError, match=message):
        read_features(Path("features.npy"), Path("labels.csv"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_sorted_table_with_the_index_of_pandas_is_refused_unless_names_are_in_order(features, suffix):
    table = pd.DataFrame({"label": NAMES, "path": PATHS, "image": np.arange(60.0)}).iloc[ROTATED]
    for columns in (["label"], ["label", "path"], ["label", "image"]):
        getattr(table[columns], f"to_{suffix}")(f"labels.{suffix}")
        with pytest.raises(ValueError, match=r"in the order of the features, got 59(\.0)? in row 0"):
            read_features(Path("features.npy"), Path(f"labels.{suffix}"))
    Path("files.txt").write_text("\n".join(table.path))  # it was shuffled, and then the features were made
    table.to_csv("labels.csv")
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == table.label.tolist()


def test_the_index_of_pandas_may_be_that_of_the_features(features):
    table = pd.DataFrame({"features": list(features), "label": NAMES}).iloc[ROTATED]
    table.to_parquet("features.parquet")
    table[["label"]].to_csv("labels.csv")
    assert read_features(Path("features.parquet"), Path("labels.csv")).labels == table.label.tolist()


def test_names_that_stand_more_than_once_are_compared_row_by_row(features):
    paths = [f"camera{i % 10}/IMG_{i // 10:04}.JPG" for i in range(60)]
    Path("files.txt").write_text("\n".join(paths))
    table = pd.DataFrame({"file": [Path(path).name.lower() for path in paths], "label": NAMES})
    table.to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).labels == NAMES
    table.iloc[SHUFFLED].to_csv("labels.csv", index=False)
    with pytest.raises(ValueError, match="got img_0005.jpg in row 0, where the features are those of camera0/IMG_0000"):
        read_features(Path("features.npy"), Path("labels.csv"))


def test_names_beside_the_features_count_whatever_names_are_given(features):
    Path("files.txt").write_text("\n".join(PATHS))
    table = pd.DataFrame({"path": PATHS, "label": NAMES})
    table.to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv"), Path("labels.csv")).paths == PATHS
    table.iloc[SHUFFLED].to_csv("labels.csv", index=False)
    with pytest.raises(ValueError, match="in the order of the features, got pond/59.png in row 0"):
        read_features(Path("features.npy"), Path("labels.csv"), Path("labels.csv"))
    Path("files.txt").write_text("\n".join(PATHS[:9]))  # of other images
    assert read_features(Path("features.npy"), Path("labels.csv"), Path("labels.csv")).paths == PATHS[::-1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,label\na,1.jpg,oak\nb.jpg,ash\n", 2),
        ("path,label\na.jpg,oak\nb,2.jpg,ash\n", 3),
        ("path,label\na,1.jpg,oak\nb,2.jpg,ash\n", 2),
        ("path,label,note\na,1.jpg,oak,\nb.jpg,ash,\n", 2),  # an empty cell more, but not in all rows
        ("path,label,note\na.jpg,oak,\nb,2.jpg,ash,\n", 3),
    ],
)
def test_a_comma_without_quotes_in_a_table_is_refused(tmp_path, text, line):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=f"cells in a row, as in the header, got more in line {line}; .* needs quotes"):
        read_values(tmp_path / "labels.csv", "label", ["label"])


@pytest.mark.parametrize(
    "text",
    [
        'path,label\n"a,1.jpg",oak\n\nc.jpg,"NA"\n',
        "path,label\na.jpg,oak,\n\nc.jpg,NA,\n",  # as spreadsheets write it
        "path,label,\r\na.jpg,oak,\r\nb.jpg\r\nc.jpg,NA,",
        "\ufeffpath,label,note\na.jpg,oak\nb.jpg,\nc.jpg,NA,1\n",
    ],
)
def test_rows_of_a_table_may_be_short_or_end_with_a_comma(tmp_path, text):
    (tmp_path / "labels.csv").write_bytes(text.encode())
    assert read_values(tmp_path / "labels.csv", "label", ["label"]) == ["oak", "", "NA"]


@pytest.mark.parametrize("name", ["labels.txt", "labels.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])  # with and without a byte-order mark
def test_text_in_utf_16_is_refused(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("label\noak\nash".encode(encoding))
    with pytest.raises(ValueError, match="got UTF-16 or no text; save it as UTF-8"):
        read_values(tmp_path / name, "label", ["label"])


def test_quotes_that_are_wrong_are_refused_with_their_line(tmp_path):
    (tmp_path / "labels.csv").write_text('path,label\n"a.jpg,oak\n"b.jpg",ash\n')
    with pytest.raises(ValueError, match="labels.csv cannot be read: line 3"):
        read_values(tmp_path / "labels.csv", "label", ["label"])


@pytest.mark.parametrize("shown", ["/mnt/c/{}", "{}", "./{}"])
def test_another_order_is_seen_from_another_root_too(features, shown):
    Path("files.txt").write_text("\n".join(f"/home/me/{path}" for path in PATHS))
    names = [shown.format(path) for path in PATHS]
    names[3], names[7] = names[7], names[3]
    pd.DataFrame({"path": names, "label": NAMES}).to_csv("labels.csv", index=False)
    with pytest.raises(ValueError, match="in row 3, where the features are those of /home/me/lake/3.png"):
        read_features(Path("features.npy"), Path("labels.csv"))


def test_images_that_both_files_name_are_compared(features):
    np.savez("named.npz", features=features, image=np.array(PATHS))
    table = pd.DataFrame({"image": PATHS, "label": NAMES})
    table.to_csv("labels.csv", index=False)
    assert read_features(Path("named.npz"), Path("labels.csv")).labels == NAMES
    table.iloc[SHUFFLED].to_csv("labels.csv", index=False)
    with pytest.raises(ValueError, match="in the order of the features, got pond/59.png in row 0"):
        read_features(Path("named.npz"), Path("labels.csv"))


def test_a_column_that_is_the_same_for_all_images_names_none(features):
    pd.DataFrame({"file": "batch1.zip", "label": NAMES}).to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).paths is None


def test_pictures_in_a_column_are_not_names(features):
    pictures = [{"bytes": b"P" * 9, "path": path} for path in reversed(PATHS)]
    pd.DataFrame({"image": pictures, "label": NAMES}).to_parquet("labels.parquet")
    assert read_features(Path("features.npy"), Path("labels.parquet")).labels == NAMES
    lines = [json.dumps({"image": {"path": path}, "label": name}) for path, name in zip(PATHS, NAMES, strict=True)]
    Path("labels.jsonl").write_text("\n".join(lines))
    assert read_features(Path("features.npy"), Path("labels.jsonl")).labels == NAMES


def test_names_of_images_beside_labels_are_taken_where_there_are_no_others(features):
    pd.DataFrame({"path": PATHS, "label": NAMES}).to_csv("labels.csv", index=False)
    assert read_features(Path("features.npy"), Path("labels.csv")).paths == PATHS


def write_fiftyone(folder: Path, features: np.ndarray, labels: list[str]) -> None:
    """samples.json byte for byte as FiftyOne 1.22 exports a FiftyOneDataset, with made up ids, times and _rand.

    Vectors are compressed .npy in bson's JSON. A field that is None is left out.
    """
    found = []
    for path, row, label in zip(PATHS, features, labels, strict=True):
        file = io.BytesIO()
        np.save(file, row)
        an_id, time = {"$oid": "6b097dfac7a7067813963fcb"}, {"$date": "2026-11-27T12:56:26.825Z"}
        binary = {"base64": base64.b64encode(zlib.compress(file.getvalue())).decode(), "subType": "00"}
        sample = {"_id": an_id, "filepath": path, "tags": [], "_media_type": "image", "_rand": 0.9990826910143263}
        sample["embeddings"] = {"$binary": binary}
        if label:
            sample["ground_truth"] = {"_id": an_id, "_cls": "Classification", "tags": [], "label": label}
        found.append(json.dumps(sample | {"_dataset_id": an_id, "created_at": time, "last_modified_at": time}))
    (folder / "samples.json").write_text(f'{{"samples": [{",".join(found)}]}}')


@pytest.mark.parametrize("kind", ["pt", "pt with columns", "fiftyone", "embed", "cleanlab", "fiftyone csv"])
def test_every_source_gives_the_same(features, kind):
    names = [*NAMES[:-1], ""]
    np.save("labels.npy", names)
    Path("files.txt").write_text("\n".join(PATHS) + "\n")
    path, labels, paths = Path("features.npy"), None, None
    if kind == "pt":
        path = Path("tensor.pt")
        torch.save(torch.from_numpy(features), path)
    elif kind == "pt with columns":
        path = Path("columns.pt")
        torch.save({"features": torch.from_numpy(features), "labels": names, "paths": PATHS}, path)
    elif kind == "fiftyone":
        write_fiftyone(Path(), features, names)
        path = Path("samples.json")
    elif kind in ("cleanlab", "fiftyone csv"):
        columns = ("given_label", "path") if kind == "cleanlab" else ("ground_truth.label", "filepath")
        labels = paths = Path("list.csv")
        pd.DataFrame(dict(zip(columns, (names, PATHS), strict=True))).to_csv(labels)
        Path("labels.npy").unlink()
    read = read_features(path, labels, paths)
    assert np.array_equal(read.features, features)
    assert read.labels == [*NAMES[:-1], None]
    assert read.paths == PATHS


def test_a_classification_of_fiftyone_without_a_label_is_unlabelled(tmp_path):
    labels = [{"_cls": "Classification", "tags": []}, {"_cls": "Classification", "label": "lake", "confidence": 0.5}]
    samples = [{"embeddings": [1.0], "ground_truth": label} for label in labels]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    assert read_features(tmp_path, None).labels == [None, "lake"]


def test_bfloat16_is_read_as_float32(features):
    torch.save(torch.from_numpy(features).bfloat16(), "features.pt")
    read = read_features(Path("features.pt"), Path("labels.npy"))
    assert read.features.dtype == np.float32
    assert np.array_equal(read.features, torch.from_numpy(features).bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("prepare", "file", "message"),
    [
        (lambda: torch.save([1, 2], "bad.pt"), "bad.pt", "expected a tensor or a dictionary of columns, got list"),
        (lambda: Path("bad.pt").write_bytes(b"PK\3\4..."), "bad.pt", "bad.pt cannot be read"),
        (lambda: torch.save({"x": torch.ones(2, 2)}, "bad.pt"), "bad.pt", "has no column features or embeddings; it"),
        (lambda: Path("bad.json").write_text("[1]"), "bad.json", "expected samples.json of an export"),
        (lambda: Path("bad.json").write_text('{"samples": [{"filepath": "a"}]}'), "bad.json", "it has filepath"),
        (lambda: Path("bad.json").write_text('{"samples": [{"embeddings": [1.0]}, {"embeddings": null}]}'),
         "bad.json", "got 0 values in row 1 and 1 in row 0"),
        (lambda: Path("bad.json").write_text('{"samples": [{"embeddings": {"$binary": "x"}}]}'),
         "bad.json", "bad.json cannot be read"),
        (lambda: Path("bad.json").write_text(
            '[{"embeddings": [1.0], "labels": {"_cls": "Detections", "detections": [{"label": "lake"}]}}]'),
         "bad.json", "column labels: expected .* a Classification, got Detections"),
        (lambda: Path("bad.json").write_text('[{"embeddings": [1.0], "label": {"$oid": "6b09"}}]'),
         "bad.json", r"column label: .* got \['\$oid'\]"),
        (lambda: np.save("labels.npy", NAMES[1:]), "features.npy", "labels.npy: expected a label for each of the 60"),
    ],
)  # fmt: skip
def test_bad_files_are_named(features, prepare, file, message):
    prepare()
    with pytest.raises(ValueError, match=message):
        read_features(Path(file), None)


# Training


def test_a_folder_of_features_is_trained_on_with_the_preset_for_them(ntdne, tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path / "embedded")
    write_features()
    monkeypatch.chdir(tmp_path / "here")
    assert ntdne("train", tmp_path / "embedded", "--epochs", 1, "--noise", "none") == 0
    results = results_of(Path("runs/embedded/none/NTDNE/seed-0"))
    assert (results["dataset"], results["classes"]) == ("embedded", ["lake", "pond"])
    assert results["counts"] == {"train": 42, "validation": 6, "test": 12, "flipped": 0, "skipped": 0}
    assert results["settings"]["encoder"] == "head"
    assert results["metrics"]["knn"] == results["metrics"]["knn_given"] == 1
    assert ntdne("report", "runs") == 0


def test_reproduce_takes_features(ntdne, capsys):
    write_features()
    grid = ["reproduce", "features.npy", "--labels", "labels.npy", "--losses", "NTDNE", "NSL", "--rates", 0.2]
    assert ntdne(*grid, "--epochs", 1, "--output", "grid") == 0
    assert {path.name for path in Path("grid/uniform-0.2").iterdir()} == {"NTDNE", "NSL"}
    assert "2 trainings to do" in capsys.readouterr().out


def test_labels_taken_as_they_are_are_said_to_be(ntdne, capsys):
    write_features()
    assert ntdne("train", "features.npy", "--epochs", 1, "--noise", "none") == 0
    assert "labels are used as they are, and metrics are by them" in capsys.readouterr().out


def test_rows_without_a_label_or_of_other_classes_are_left_out(features):
    np.save(
        "labels.npy",
        [
            *[""] * 10,
            *NAMES[10:],
        ],
    )
    found = make_problem(settings_of())
    parts = torch.cat([found.train, found.validation, found.test])
    assert parts.sort().values.tolist() == list(range(10, 60))
    assert found.archive.notes == "features: 10 of 60 images have no label of these and are left out"
    labels = np.repeat([3, 5, 9], 20)
    np.save("labels.npy", labels)
    found = make_problem(settings_of(classes=("3", "9")))
    assert found.classes == ["3", "9"]
    assert found.labels.tolist() == [0] * 20 + [-1] * 20 + [1] * 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named_when_it_is_read(features, value):
    found = make_problem(settings_of())
    trained_on, tested = int(found.train[5]), int(found.test[1])
    features[tested, 3] = value
    np.save("features.npy", features)
    found = make_problem(settings_of())
    with pytest.raises(ValueError, match=f"expected finite numbers of float32, got others in row {tested}$"):
        found.dataset(found.test).__getitems__([0, 1])
    features[trained_on, 3] = value
    np.save("features.npy", features)
    with pytest.raises(ValueError, match=f"expected finite numbers of float32, got others in row {trained_on}$"):
        make_problem(settings_of())


def test_features_are_refused_where_float32_has_no_room_and_right_where_it_has(features):
    expected = make_problem(settings_of()).dataset(torch.arange(9)).__getitems__(list(range(9)))[0]
    wide = features.astype(np.float64)
    for scale in (1e-30, 1e30):
        np.save("features.npy", wide * scale)
        found = make_problem(settings_of()).dataset(torch.arange(9)).__getitems__(list(range(9)))[0]
        assert torch.allclose(found, expected, atol=1e-4)
    np.save("features.npy", wide * 1e-50)
    with pytest.raises(ValueError, match="features: expected rows that differ in float32, got 42 alike"):
        make_problem(settings_of())
    wide[7] = 1e300
    np.save("features.npy", wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="expected finite numbers of float32, got others in row 7"):
            make_problem(settings_of()).dataset(torch.arange(60)).__getitems__([7])


def test_features_are_centred_and_divided_by_one_number(features):
    found = make_problem(settings_of())
    chosen = features[found.train.numpy()].astype(np.float64)
    given, _, position = found.dataset(found.train).__getitems__(list(range(42)))
    scale = np.sqrt(chosen.var(axis=0).mean())
    np.testing.assert_allclose(given, (chosen - chosen.mean(axis=0)) / scale, rtol=1e-4, atol=1e-4)
    assert position.tolist() == list(range(42))


def test_noise_on_features_depends_on_seed_and_batch_alone(features):
    found = make_problem(settings_of())
    first, again, other = (found.dataset(found.train, augment_by=seed) for seed in (5, 5, 6))
    plain = found.dataset(found.train).__getitems__([3, 1])[0]
    noisy = first.__getitems__([3, 1])[0]
    assert torch.equal(noisy, again.__getitems__([3, 1])[0])
    assert not torch.equal(noisy, other.__getitems__([3, 1])[0])
    assert 0.2 < float((noisy - plain).std()) < 0.6


def test_no_part_of_a_run_reads_more_than_a_part_of_the_rows(features, monkeypatch):
    read = []
    original = samples.read_rows
    monkeypatch.setattr(samples, "STATISTICS_CHUNK", 16)
    monkeypatch.setattr(samples, "read_rows", lambda rows, index: read.append(len(index)) or original(rows, index))
    found = make_problem(settings_of())
    assert isinstance(found.archive.images, np.memmap)
    train(settings_of(), found, Path("run"), accelerator="cpu")
    assert max(read) <= 17  # a batch of 16, and a last image that joins it


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stopped_between_epochs_goes_on_as_if_it_never_was(features, workers):
    options = {"accelerator": "cpu", "workers": workers}
    whole = train(settings_of(epochs=3), make_problem(settings_of()), Path("whole"), **options)

    original = Training._print_last_row

    def stop(training: Training) -> None:
        original(training)
        if len(training.history) == 2:
            raise KeyError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_print_last_row", stop)
        with pytest.raises(KeyError, match="stopped"):
            train(settings_of(epochs=3), make_problem(settings_of()), Path("run"), **options)
    going_on = train(settings_of(epochs=3), make_problem(settings_of()), Path("run"), **options)
    rows = [[{**row, "seconds": 0} for row in each.history] for each in (whole, going_on)]
    assert rows[0] == rows[1]
    state = going_on.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("features.npy", {"encoder": "resnet18"}, "encoder: expected head or linear for features.npy"),
        ("made:120x3", {}, "encoder: expected resnet18, resnet50 or small for made:120x3"),
        ("made:120x3", {"encoder": "small", "labels": "labels.npy"}, "a label for each of the 120 images, got 60"),
        ("features.npy", {"classes": ("sea", "lake")}, "has no class sea; its classes are lake, pond"),
        ("features.npy", {"features_column": "x", "labels": "labels.npy", "label_column": "y"}, None),
    ],
)
def test_settings_that_do_not_fit_the_archive_are_named(features, data, changes, message):
    if message is None:  # a file of one column has no names to differ
        make_problem(settings_of(data, **changes))
        return
    with pytest.raises(ValueError, match=message):
        make_problem(settings_of(data, **changes))


def test_a_class_of_two_rows_is_named_with_the_cure(features):
    np.save("labels.npy", ["sea", "sea", *NAMES[2:]])
    with pytest.raises(ValueError, match="class sea of features has 2 images; .* --classes names those to keep"):
        make_problem(settings_of())


@pytest.mark.parametrize(("storage", "dtype"), [("disk", "bfloat16"), ("host", "float32")])
def test_the_bank_has_the_dtype_and_lives_where_it_is_told(features, storage, dtype):
    settings = settings_of(bank_dtype=dtype)
    trained = train(settings, make_problem(settings), Path("run"), accelerator="cpu", storage=storage)
    memory = trained.criterion.memory
    assert (memory.storage_kind, memory.storage.dtype) == (storage, getattr(torch, dtype))
    assert Path("run/bank.rows").exists() == (storage == "disk")
    del trained, memory


def test_of_very_many_images_every_nth_is_compared(features, monkeypatch):
    monkeypatch.setattr(problems, "MAX_QUERIES", 5)
    monkeypatch.setattr("ntdne_kernels.experiments.training.MAX_DATABASE", 15)
    found = make_problem(settings_of())
    assert (len(found.train), len(found.validation), len(found.test)) == (42, 3, 4)
    trained = train(settings_of(), found, Path("run"), accelerator="cpu")
    assert len(trained.train_features) == 14
    torch.testing.assert_close(trained.train_features.norm(dim=1), torch.ones(14))
    assert trained.history[-1]["val_knn"] == 1


def test_linear_is_one_layer(features):
    settings = settings_of(encoder="linear")
    trained = train(settings, make_problem(settings), Path("run"), accelerator="cpu")
    assert [tuple(each.shape) for each in trained.encoder.parameters()] == [(8, 10), (8,)]


# The audit


def test_an_audit_reads_features_through_the_head_of_a_run(ntdne, capsys):
    write_features()
    assert ntdne("train", "features.npy", "--noise", "none", "--epochs", 1, "--dim", 8, "--output", "run") == 0
    assert ntdne("audit", "features.npy", "--checkpoint", "run", "--output", "out") == 0
    assert ntdne("audit", "features.npy", "--output", "plain") == 0
    density = [pd.read_csv(f"{folder}/audit.csv").log_density for folder in ("out", "plain")]
    assert not np.allclose(*density)
    np.save("features.npy", np.ones((60, 3), np.float32))
    assert ntdne("audit", "features.npy", "--checkpoint", "run", "--output", "other") == 2
    assert "trained on features of 10 values, but features has features of 3" in capsys.readouterr().err


def test_an_audit_takes_a_folder_of_features_with_its_names(ntdne, tmp_path):
    write_features()
    Path("files.txt").write_text("\n".join(PATHS) + "\n")
    assert ntdne("audit", ".", "--output", "out") == 0
    assert pd.read_csv("out/audit.csv").path.tolist() == PATHS


def test_features_of_another_network_are_another_problem(features):
    before = make_problem(settings_of()).fingerprint
    assert make_problem(settings_of()).fingerprint == before
    np.save("features.npy", features[::-1])
    assert make_problem(settings_of()).fingerprint != before
