"""Features and the images that they were made of: changed ones are refused wherever both are used."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ntdne_kernels.experiments import embed, embedding, search
from ntdne_kernels.experiments.archive import open_features
from ntdne_kernels.experiments.auditing import origin_of
from ntdne_kernels.experiments.pretrained import Extractor, Transform
from tests.experiments.helpers import write_image

DECISIONS = "image,given,verdict,decided,when,archive\ndark/00.png,dark,relabel,bright,,\n"
COMMANDS: dict[str, list[object]] = {
    "audit": ["audit", "out", "--no-review"],
    "audit of the files": ["audit", "out/features.npy", "--images", "{photos}", "--no-review"],
    "audit of other features": ["audit", "mine.npy", "--labels", "out/labels.npy", "--paths", "out/files.txt"],
    "relabel": ["relabel", "out", "decisions.csv"],
    "copies": ["relabel", "out", "decisions.csv", "--links", "copies"],
    "train": ["train", "out", "--noise", "none", "--epochs", 1],
    "reproduce": ["reproduce", "out", "--losses", "NTDNE", "--rates", 0.5, "--epochs", 1],
    "search": ["search", "out", "{photos}/dark/03.png"],
}


@pytest.fixture
def _tiny(monkeypatch):
    """An encoder that takes no time, and no figures, which take most of an audit's."""
    transform = Transform(lambda image: torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1) / 255)
    extractor = Extractor(nn.Flatten(), transform, 48, 4)
    for module in ("embedding", "retrieval"):
        monkeypatch.setattr(f"ntdne_kernels.experiments.{module}.make_extractor", lambda *rest: extractor)
    for name in ("quality_histogram", "transition_map"):
        monkeypatch.setattr(f"ntdne_kernels.experiments.auditing.page.{name}", lambda *rest: "data:drawn")


@pytest.fixture
def embedded(ntdne, photos, _tiny):
    """The folder out of features of the photos, in the folder that the command runs in."""
    found = embed(photos, "resnet18", "out", device="cpu", workers=0)
    np.save("mine.npy", np.asarray(found.features))
    Path("decisions.csv").write_text(DECISIONS)
    return Path("out")


def swap(photos: Path) -> None:
    (photos / "dark" / "00.png").rename(photos / "kept.png")
    (photos / "bright" / "00.png").rename(photos / "dark" / "00.png")
    (photos / "kept.png").rename(photos / "bright" / "00.png")


def edit(photos: Path) -> None:
    """Other pixels in a file of the same size."""
    path = photos / "dark" / "00.png"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(0, 10**18 + 1))


def replace(photos: Path) -> None:
    write_image(photos / "dark" / "00.png", size=(9, 9))


def move(photos: Path) -> None:
    (photos / "dark" / "00.png").rename(photos / "bright" / "new.png")


CHANGES = {
    swap: "2 have changed (bright/00.png, dark/00.png)",
    edit: "1 has changed (dark/00.png)",
    replace: "1 has changed (dark/00.png)",
    move: "1 has moved (dark/00.png)",
}


def everything() -> set[Path]:
    return {path for path in Path().rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_features_whose_images_were_swapped(ntdne, photos, embedded, capsys, command):
    swap(photos)
    arguments = [str(each).format(photos=photos) for each in COMMANDS[command]]
    before = everything()
    assert ntdne(*arguments) == 2
    said = capsys.readouterr().err
    folder = embedded.resolve() if command in ("train", "reproduce") else embedded
    assert f"{photos}: of the 40 images that {folder} was made of {CHANGES[swap]}; put them back, or make" in said
    assert everything() == before


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(photos, embedded, change):
    change(photos)
    with pytest.raises(ValueError, match=re.escape(f"was made of {CHANGES[change]}; put them back, or make features")):
        search(embedded, np.ones((1, 48)), 1)


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_were_put_back_will_do(photos, embedded, change):
    shutil.copytree(photos, photos.parent / "backup", copy_function=shutil.copy2)
    change(photos)
    shutil.rmtree(photos)
    (photos.parent / "backup").rename(photos)
    assert len(search(embedded, np.ones((1, 48)), 1)[0]) == 1


def test_many_are_counted_and_the_first_named(photos, embedded):
    for i in range(5):
        (photos / "dark" / f"{i:02}.png").rename(photos / "bright" / f"dark {i}.png")
    with pytest.raises(ValueError, match=r"5 have moved \(dark/00.png, dark/01.png, dark/02.png \.\.\.\)"):
        search(embedded, np.ones((1, 48)), 1)


def test_rows_of_deleted_images_serve(ntdne, photos, embedded):
    (photos / "dark" / "00.png").unlink()
    write_image(photos / "dark" / "new.png")  # and new ones do not matter
    assert len(search(embedded, np.ones((1, 48)), 1)[0]) == 1
    assert ntdne(*COMMANDS["relabel"]) == 0


@pytest.mark.parametrize("place", ["moved", "empty"])
def test_where_no_image_is_to_be_found_the_features_serve_alone(ntdne, photos, embedded, place):
    photos.rename(photos.parent / "elsewhere")
    if place == "empty":  # a disk that is not mounted
        photos.mkdir()
    assert ntdne(*COMMANDS["relabel"]) == 0
    assert len(search(embedded, np.ones((1, 48)), 1)[0]) == 1


@pytest.mark.parametrize("copy", [shutil.copy, shutil.copy2])
def test_a_copy_of_the_archive_with_other_times_serves(ntdne, photos, embedded, copy, capsys):
    """As `cp -r` makes it, or a download; and one with a file of another size does not."""
    there = photos.parent / "copy"
    shutil.copytree(photos, there, copy_function=copy)
    shutil.rmtree(photos)
    relabel = ["relabel", "out", "decisions.csv", "--images", there]
    assert ntdne(*relabel, "--links", "copies") == 0
    (there / "dark" / "01.png").unlink()  # pictures that are not there are not shown, as before
    assert ntdne(*relabel) == 0
    replace(there)
    assert ntdne(*relabel) == 2
    assert f"{there}: of the 40 images that out was made of {CHANGES[replace]}" in capsys.readouterr().err


def test_a_copy_whose_times_are_whole_seconds_serves(photos, embedded):
    """As .tar keeps them, also where some of the first ones were whole."""
    embedded_stamps = np.load(embedded / "stamps.npy")
    embedded_stamps[:3, 1] = embedded_stamps[:3, 1] // 10**9 * 10**9
    np.save(embedded / "stamps.npy", embedded_stamps)
    for name, (_, time) in zip((embedded / "files.txt").read_text().splitlines(), embedded_stamps, strict=True):
        os.utime(photos / name, ns=(0, int(time) // 10**9 * 10**9))
    assert len(search(embedded, np.ones((1, 48)), 1)[0]) == 1


def test_each_image_is_looked_up_once_and_none_is_read(ntdne, photos, embedded, monkeypatch):
    looked_up = []
    monkeypatch.setattr("ntdne_kernels.experiments.embedded._stamp", lambda path: looked_up.append(path) or (0, 0))
    assert ntdne(*COMMANDS["relabel"]) == 0
    assert len(looked_up) == 40


def test_new_images_beside_the_others_do_not_matter_nor_do_labels_of_a_list(ntdne, photos, embedded):
    write_image(photos / "dark" / "new.png")
    assert ntdne(*COMMANDS["relabel"]) == 0
    move(photos)
    columns = dict.fromkeys(("features", "label", "path"))
    assert len(open_features(embedded, Path("relabelled/out/labels.csv"), columns).labels) == 40


@pytest.mark.usefixtures("_tiny", "ntdne")
def test_unreadable_images_are_not_compared(photos):
    (photos / "dark" / "00.png").write_text("no image")
    embed(photos, "resnet18", "out", device="cpu", workers=0, skip_unreadable=True)
    assert len(np.load("out/stamps.npy")) == 39
    (photos / "dark" / "00.png").unlink()
    assert len(search("out", np.ones((1, 48)), 1)[0]) == 1


def test_embeddings_and_their_images_are_one_archive_to_outputs(photos, embedded):
    for data in (photos, embedded, embedded / "features.npy"):
        assert origin_of(str(data)) == str(photos)
    assert origin_of("mine.npy") == str(Path("mine.npy").resolve())
    assert origin_of("made:40x2") == "made:40x2"


# An embedding that was not finished


@pytest.fixture
def unfinished(ntdne, photos, _tiny, monkeypatch):
    """Of an `ntdne embed` with some options that was stopped after 16 images."""
    append, counted = embedding._Rows.append, []

    def failing(rows, *rest):
        if len(counted) == 2:
            raise KeyboardInterrupt
        counted.append(append(rows, *rest))

    command = ["embed", photos, "--encoder", "resnet18", "--output", "out", "--batch-size", 8, "--workers", 0]
    command += ["--dtype", "float32", "--classes", "dark", "bright", "--device", "cpu"]
    with monkeypatch.context() as context:
        context.setattr(embedding._Rows, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            ntdne(*command)
    Path("decisions.csv").write_text(DECISIONS)
    return Path("out")


@pytest.mark.parametrize("command", ["audit", "relabel", "copies", "train", "reproduce", "search"])
def test_every_command_says_what_finishes_an_embedding(ntdne, photos, unfinished, capsys, command):
    assert ntdne(*[str(each).format(photos=photos) for each in COMMANDS[command]]) == 2
    [said] = capsys.readouterr().err.splitlines()[-1:]
    finishing = (
        f"ntdne embed {photos} --encoder resnet18 --image-size 4 --dtype float32 --classes dark bright --output out"
    )
    assert said == f"ntdne: out: 16 of 40 images are encoded; this goes on with them: {finishing}"
    if command == "search":
        assert ntdne(*finishing.split()[1:]) == 0
        assert ntdne("search", "out", photos / "dark" / "03.png") == 0


def test_the_command_that_finishes_an_embedding_has_all_its_options(unfinished):
    about = json.loads((unfinished / "embed.json").read_text())
    about |= {"bands": [4, 3, 2], "white": 1e4, "max_pixels": 100, "weights": "/a b.pth", "classes": None}
    about["progress"]["unreadable"] = {"x.png": "not an image"}
    (unfinished / "embed.json").write_text(json.dumps(about))
    expected = "--weights '/a b.pth' --white 10000.0 --dtype float32 --max-pixels 100 --bands 4,3,2 --skip-unreadable"
    with pytest.raises(ValueError, match=f"{expected} --output out$"):
        embedding.open_embeddings(unfinished)
