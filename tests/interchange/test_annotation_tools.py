"""interchange.annotation_tools: what the tools' own readers make of the files, where these libraries are installed.

pip install fiftyone label-studio-sdk datumaro cvat-sdk takes minutes, so what installs the tests leaves them out. None
of them needs a server or a database for what they do here.
"""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ntdne_kernels.interchange import to_cvat, to_fiftyone, to_label_studio

pd = pytest.importorskip("pandas")

PATHS = ["ash/1 b.png", "oak/2.png", "oak/3&.png", "4%.png"]
ODD = 'o"<ak & co'


@pytest.fixture
def frame():
    """Four images: relabelled, kept, excluded, and an unlabelled one that nobody decided on."""
    return pd.DataFrame(
        {
            "path": PATHS,
            "given_label": pd.Categorical(["ash", "oak", ODD, None]),
            "predicted_label": pd.Categorical(["oak", "oak", "ash", "ash"]),
            "is_label_issue": [True, False, True, False],
            "label_score": [0.1, 0.9, 0.2, None],
            "rank": [1, 2, 3, 4],
            "suggested_share": [0.9, 0.8, 0.7, 0.6],
            "verdict": pd.Categorical(["relabel", "keep", "exclude", None]),
            "corrected_label": pd.Categorical(["oak", "oak", None, None]),
        }
    )


def write(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_fiftyone_reads_tags_labels_and_scores(frame, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_DISABLE_SERVICES", "1")
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "1")
    importers = pytest.importorskip("fiftyone.utils.data.importers", exc_type=ImportError)
    importer = importers.LegacyFiftyOneDatasetImporter(str(write(to_fiftyone(frame), tmp_path)), rel_dir="/photos")
    importer.setup()
    samples = list(importer)
    assert [sample.filepath for sample in samples] == [f"/photos/{path}" for path in PATHS]
    assert [sample.tags for sample in samples] == [["relabel", "label_issue"], ["keep"], ["exclude", "label_issue"], []]
    labels = {
        name: [sample[name].label if sample.has_field(name) else None for sample in samples]
        for name in ("given_label", "predicted_label", "corrected_label")
    }
    assert labels == {
        "given_label": ["ash", "oak", ODD, None],
        "predicted_label": ["oak", "oak", "ash", "ash"],
        "corrected_label": ["oak", "oak", None, None],
    }
    assert samples[0]["predicted_label"].confidence == 0.9
    assert [sample["rank"] for sample in samples] == [1, 2, 3, 4]
    assert samples[2]["label_score"] == 0.2


def test_label_studio_takes_the_configuration_tasks_and_choices(frame):
    interface = pytest.importorskip("label_studio_sdk.label_interface", exc_type=ImportError)
    files = to_label_studio(frame)
    config = interface.LabelInterface(files["label_config.xml"])
    config.validate()
    tasks = json.loads(files["tasks.json"])
    assert all(config.validate_task({"data": task["data"]}) for task in tasks)
    choices = [each for task in tasks for each in (*task.get("annotations", []), *task["predictions"])]
    assert len(choices) == 3 + 3 + 4
    assert all(config.validate_annotation(each) for each in choices)
    choices[0]["result"][0]["value"]["choices"] = ["none of these"]
    assert not config.validate_annotation(choices[0])


def test_label_studio_tasks_say_what_people_decided(frame):
    tasks = json.loads(to_label_studio(frame, prefix="s3://bucket/")["tasks.json"])
    assert [task["data"]["image"] for task in tasks] == [
        *("s3://bucket/ash/1%20b.png", "s3://bucket/oak/2.png", "s3://bucket/oak/3%26.png", "s3://bucket/4%25.png")
    ]
    decided = [
        {each["from_name"]: each["value"]["choices"] for each in task["annotations"][0]["result"]}
        for task in tasks
        if "annotations" in task
    ]
    assert decided == [
        {"verdict": ["relabel"], "label": ["oak"]},
        {"verdict": ["keep"], "label": ["oak"]},
        {"verdict": ["exclude"]},
    ]
    guesses = [[(each["model_version"], each.get("score")) for each in task["predictions"]] for task in tasks]
    assert guesses[0] == [("given", None), ("ntdne_kernels", 0.9)]
    assert guesses[3] == [("ntdne_kernels", 0.6)]


def test_of_an_image_that_people_cannot_tell_no_label_is_an_annotation():
    frame = pd.DataFrame({"path": ["1.png"], "given_label": ["ash"], "verdict": ["unsure"], "corrected_label": ["ash"]})
    [task] = json.loads(to_label_studio(frame)["tasks.json"])
    assert [each["from_name"] for each in task["annotations"][0]["result"]] == ["verdict"]


def test_cvat_tags_have_the_corrected_labels_and_their_attributes(frame):
    root = ElementTree.fromstring(to_cvat(frame)["annotations.xml"])
    tags = {image.attrib["name"]: [tag.attrib["label"] for tag in image.iter("tag")] for image in root.iter("image")}
    assert tags == {"ash/1 b.png": ["oak"], "oak/2.png": ["oak"], "oak/3&.png": [], "4%.png": []}
    attributes = {each.attrib["name"]: each.text for each in next(root.iter("tag"))}
    assert attributes == {"given_label": "ash", "verdict": "relabel", "label_score": "0.1"}
    without = ElementTree.fromstring(to_cvat(frame.drop(columns=["corrected_label"]))["annotations.xml"])
    assert [tag.attrib["label"] for tag in without.iter("tag")] == ["ash", "oak", ODD]


def test_datumaro_reads_the_annotations_as_cvat_writes_them(frame, tmp_path):
    datumaro = pytest.importorskip("datumaro.components.dataset", exc_type=ImportError)
    from PIL import Image

    for path in PATHS:
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / path)
    (tmp_path / "annotations.xml").write_text(to_cvat(frame)["annotations.xml"])
    found = datumaro.Dataset.import_from(str(tmp_path), "cvat")
    names = next(iter(found.categories().values())).items
    assert {item.id: [names[each.label].name for each in item.annotations] for item in found} == {
        **{"ash/1 b": ["oak"], "oak/2": ["oak"]},
        **{"oak/3&": [], "4%": []},
    }


def test_cvat_takes_the_labels_of_a_task(frame):
    labels = json.loads(to_cvat(frame)["labels.json"])
    assert [label["name"] for label in labels] == ["ash", ODD, "oak"]
    models = pytest.importorskip("cvat_sdk.models", exc_type=ImportError)
    for label in labels:
        attributes = [models.AttributeRequest(**each) for each in label["attributes"]]
        models.PatchedLabelRequest(name=label["name"], type=label["type"], attributes=attributes)


@pytest.mark.parametrize("export", [to_cvat, to_fiftyone, to_label_studio])
def test_a_table_without_names_of_files_is_refused(frame, export):
    with pytest.raises(ValueError, match="expected a column path, got given_label"):
        export(frame[["given_label"]])
