"""`ntdne embed`: features of a folder of images in files, resumed after a kill."""

import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ntdne_kernels.experiments import embed, embedding, search
from ntdne_kernels.experiments.embedding import open_embeddings
from ntdne_kernels.experiments.images import decode
from ntdne_kernels.experiments.pretrained import make_extractor
from tests.experiments.helpers import spoil, write_image

NAMES = ["features.npy", "labels.npy", "files.txt", "stamps.npy", "embed.json"]


@pytest.fixture
def options(resnet18_file):
    return {"encoder": "resnet18", "weights": resnet18_file, "image_size": 32, "batch_size": 8, "device": "cpu"}


def test_rows_are_the_features_of_the_files_in_their_order(photos, options, tmp_path):
    found = embed(photos, output=tmp_path / "out", **options, dtype="float32")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    assert found.files == [f"{name}/{i:02}.png" for name in ("bright", "dark") for i in range(20)]
    assert found.labels.tolist() == ["bright"] * 20 + ["dark"] * 20
    assert isinstance(found.features, np.memmap)
    assert found.features.shape == (40, 512)
    extractor = make_extractor("resnet18", options["weights"], 32)
    for image in (0, 25, 39):
        alone = extractor.module(extractor.transform(decode(photos / found.files[image]))[None])
        assert np.allclose(found.features[image], alone[0], rtol=1e-4, atol=1e-4)


def test_a_flat_folder_gives_unlabelled_images_before_those_of_class_folders(tmp_path, options):
    for i, name in enumerate(["new.png", "b.png", "oak/1.png", "oak/deep/2.png"]):
        write_image(tmp_path / "photos" / name, 40 * i)
    found = embed(tmp_path / "photos", output=tmp_path / "out", **options)
    assert found.files == ["b.png", "new.png", "oak/1.png", "oak/deep/2.png"]
    assert found.labels.tolist() == ["", "", "oak", "oak"]
    assert found.features.dtype == np.float16


@pytest.mark.parametrize(
    ("names", "meaning"), [(("-1", "1"), "unlabelled"), (("1", "1.0"), "'1'"), (("oak", "oak "), "'oak'")]
)
def test_class_folders_whose_names_are_read_as_others_are_refused(tmp_path, options, names, meaning):
    for name in names:
        write_image(tmp_path / "photos" / name / "1.png")
    with pytest.raises(ValueError, match=f"of photos would be read as {meaning} where labels are written as text"):
        embed(tmp_path / "photos", output=tmp_path / "out", **options)


def test_features_with_another_limit_of_pixels_are_others(photos, options, tmp_path):
    embed(photos, output=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="holds features of max_pixels"):
        embed(photos, output=tmp_path / "out", **options, max_pixels=1000)


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bits(photos, options, tmp_path):
    whole = embed(photos, output=tmp_path / "whole", **options)
    script = f"""
import os, signal
from ntdne_kernels.experiments import embedding
embedding.SAVE_SECONDS = 0
append, batches = embedding._Rows.append, []
def killed(rows, *rest):
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    batches.append(append(rows, *rest))
    if len(batches) == 2:
        embedding.SAVE_SECONDS = 1000  # the third batch is written and not counted
embedding._Rows.append = killed
embedding.embed({str(photos)!r}, output={str(tmp_path / "out")!r}, **{options!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert ended.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "out" / "embed.json").read_text())["progress"]["rows"] == 16
    assert not (tmp_path / "out" / "features.npy").exists()
    embed(photos, output=tmp_path / "out", **options)
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(whole.features) == 40


def test_images_that_are_done_are_not_encoded_again(photos, options, tmp_path, monkeypatch):
    append, counted = embedding._Rows.append, []

    def failing(rows, features, *rest):
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted.append(len(features))
        append(rows, features, *rest)

    monkeypatch.setattr(embedding._Rows, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, output=tmp_path / "out", **options)
    counted.clear()
    embed(photos, output=tmp_path / "out", **options)
    assert counted == [8, 8]
    monkeypatch.setattr(embedding, "Batches", lambda *rest: pytest.fail("encoded once more"))
    assert len(embed(photos, output=tmp_path / "out", **options).features) == 40


@pytest.mark.parametrize("change", ["added", "written", "encoder", "dtype"])
def test_features_of_other_images_or_another_encoder_are_refused(photos, options, tmp_path, change):
    embed(photos, output=tmp_path / "out", **options)
    before = (tmp_path / "out" / "features.npy").read_bytes()
    expected = {"encoder": "image_size 32, not 64", "dtype": "dtype float16, not float32"}
    if change == "added":
        write_image(photos / "dark" / "new.png")
    elif change == "written":
        write_image(photos / "dark" / "00.png", size=(9, 9))
    elif change == "encoder":
        options["image_size"] = 64
    else:
        options["dtype"] = "float32"
    with pytest.raises(ValueError, match=expected.get(change, "files were added, removed or written")) as error:
        embed(photos, output=tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert (tmp_path / "out" / "features.npy").read_bytes() == before


def test_the_features_of_another_archive_of_the_same_name_are_not_continued(photos, options, tmp_path):
    embed(photos, output=tmp_path / "out", **options)
    write_image(tmp_path / "b" / "photos" / "dark" / "1.png")
    said = f"--output: {tmp_path}/out holds features of {photos}, not of {tmp_path}/b/photos; give another folder"
    with pytest.raises(ValueError, match=said):
        embed(tmp_path / "b" / "photos", output=tmp_path / "out", **options)


def test_unreadable_files_are_named_or_left_out(photos, options, tmp_path):
    reason = spoil(photos / "bright" / "03.png", "text")
    with pytest.raises(ValueError, match=rf"03.png cannot be read: {reason}; --skip-unreadable"):
        embed(photos, output=tmp_path / "out", **options)
    found = embed(photos, output=tmp_path / "out", **options, skip_unreadable=True)
    assert found.features.shape == (39, 512)
    assert "bright/03.png" not in found.files
    assert found.about["progress"]["unreadable"] == {"bright/03.png": "not an image"}
    whole = embed(photos / "dark", output=tmp_path / "dark", **options)
    assert np.allclose(found.features[19:], whole.features, atol=2e-2)


def test_bands_that_the_encoder_does_not_take_are_said_and_three_can_be_chosen(scenes, options, tmp_path):
    with pytest.raises(ValueError, match="expected 3 bands of 8 or 16 bits, got 5 of uint16; --bands names three"):
        embed(scenes, output=tmp_path / "out", **options)
    with pytest.warns(UserWarning, match="nearly black"):
        assert len(embed(scenes, output=tmp_path / "out2", **options, bands=(4, 2, 1)).features) == 40


def write_reflectance(folder, dtype=np.uint16, scale=1, count=6):
    """Scenes of reflectance from 0 to 9,000, and what they are with 10,000 as white, in 8 bits, beside them."""
    source = np.random.default_rng(0)
    for i in range(count):
        pixels = source.integers(0, 9000, (32, 32, 3)) * (i + 1) // count
        for name, values in (("deep", (pixels * scale).astype(dtype)), ("shallow", pixels * (255 / 10000))):
            (folder / name / str(i % 2)).mkdir(parents=True, exist_ok=True)
            values = values if name == "deep" else values.round().astype(np.uint8)
            tifffile.imwrite(folder / name / str(i % 2) / f"{i:02}.tif", values, photometric="rgb")
    return folder / "deep", folder / "shallow"


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint16, 1), (np.int16, 1), (np.float32, 1e-4)])
def test_reflectance_is_embedded_as_bright_as_it_is_meant(tmp_path, options, dtype, scale):
    deep, shallow = write_reflectance(tmp_path, dtype, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = embed(deep, output=tmp_path / "out", **options, white=10000 * scale)
        expected = embed(shallow, output=tmp_path / "expected", **options).features.astype(np.float32)
    differences = np.linalg.norm(found.features.astype(np.float32) - expected, axis=1)
    assert (differences < 0.1 * np.linalg.norm(expected, axis=1)).all()
    neighbours, similarity = search(tmp_path / "out", [deep / file for file in found.files[:3]], k=1)
    assert neighbours[:, 0].tolist() == [0, 1, 2]
    assert similarity.min() > 0.9999
    with pytest.raises(ValueError, match="holds features of white"):
        embed(deep, output=tmp_path / "out", **options, white=9000 * scale)


def test_images_that_would_be_nearly_black_are_warned_of(tmp_path, options):
    deep, _ = write_reflectance(tmp_path, count=20)
    with pytest.warns(UserWarning, match="nearly black") as caught:
        embed(deep, output=tmp_path / "out", **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    largest = max(int(decode(file).max()) for file in sorted(deep.rglob("*.tif"))[::2])
    assert f"in 10 of them, spread over the folder, the largest value is {largest}, and 99 of 100 are below 6%" in text
    assert "--white 10000, or embed(..., white=10000)" in text


def test_images_of_other_numbers_need_the_value_that_is_white(tmp_path, options):
    deep, _ = write_reflectance(tmp_path, np.float32)
    with pytest.raises(ValueError, match="expected 3 bands of 8 or 16 bits, got 3 of float32; --white names the value"):
        embed(deep, output=tmp_path / "out", **options)


@pytest.mark.parametrize("white", [0, -1, float("inf"), float("nan")])
def test_white_is_a_positive_number(photos, options, tmp_path, white):
    with pytest.raises(ValueError, match="white: expected a positive number"):
        embed(photos, output=tmp_path / "out", **options, white=white)


def test_workers_give_the_same_rows_and_leave_the_random_state(photos, options, tmp_path):
    here = embed(photos, output=tmp_path / "here", **options, workers=0)
    torch.manual_seed(0)
    there = embed(photos, output=tmp_path / "there", **options, workers=2)
    assert np.array_equal(here.features, there.features)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)


def test_two_runs_do_not_write_the_same_folder(photos, options, tmp_path, monkeypatch):
    def meanwhile(*rest):
        with pytest.raises(ValueError, match="another process writes to"):
            embed(photos, output=tmp_path / "out", **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "Batches", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        embed(photos, output=tmp_path / "out", **options)


def test_files_that_are_no_images_are_said(photos, options, tmp_path, capsys):
    for name in ("a.mp4", "b.mp4", "c.NEF"):
        (photos / name).write_text("")
    embed(photos, output=tmp_path / "out", progress=True, **options)
    assert "files that are no images by their suffix or place: 2 .mp4, 1 .nef" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: No such file or directory"),
        (["empty"], "expected images, in class folders or beside them, got none"),
        (["nested"], "nested has images in"),
        (["nested", "--classes", "oak"], "nested has no class oak"),
        (["flat", "--output", "flat/out"], "lies in the archive"),
        (["flat", "--output", "others"], "holds a features.npy of something else"),
        (["broken"], "expected names without line breaks"),
        (["text", "--skip-unreadable"], "none of 1 images can be read"),
    ],
)
def test_wrong_folders_are_said_in_one_line(ntdne, resnet18_file, capsys, tmp_path, arguments, message):
    here = tmp_path / "here"
    for name in ("empty", "others", "text"):
        (here / name).mkdir()
    np.save(here / "others" / "features.npy", np.ones(3))
    (here / "text" / "a.png").write_text("no image")
    write_image(here / "flat" / "a.png")
    write_image(here / "broken" / "a\nb.png")
    write_image(here / "nested" / "train" / "oak" / "a.png")
    quick = ["--encoder", "resnet18", "--weights", resnet18_file, "--image-size", 32]
    assert ntdne("embed", *arguments, *quick) == 2
    said = capsys.readouterr().err
    assert message in said
    assert [line for line in said.splitlines() if not line.startswith("Encoding")][1:] == []


def test_features_that_float16_cannot_hold_are_refused(photos, options, tmp_path):
    state = torch.load(options["weights"])
    state["layer4.1.bn2.bias"] += 1e6
    torch.save(state, tmp_path / "large.pth")
    options["weights"] = tmp_path / "large.pth"
    with pytest.raises(ValueError, match="no finite float16; --dtype float32 has room"):
        embed(photos, output=tmp_path / "out", **options)
    assert np.isfinite(embed(photos, output=tmp_path / "wide", **options, dtype="float32").features).all()


def test_the_command_says_what_it_wrote(ntdne, photos, resnet18_file, capsys):
    quick = ["--encoder", "resnet18", "--weights", resnet18_file, "--image-size", 32]
    assert ntdne("embed", photos, *quick) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "40 images in 2 class folders, 512 values each",
        *(f"embeddings/photos/{name}" for name in ("features.npy", "labels.npy", "files.txt")),
    ]
    assert "Encoding images: 1 of 1 batches" in printed.err
    with pytest.raises(ValueError, match="expected a folder of ntdne embed"):
        open_embeddings(photos)


def test_large_photos_are_upright_and_transparency_is_black(tmp_path, options):
    """Decoding is `images.decode`'s: the same picture in two ways gives the same features."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    exif = Image.Exif()
    exif[274] = 8
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "photos" / "b.png", exif=exif)
    opaque = np.dstack([pixels, np.full((40, 30), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "photos" / "c.png")
    found = embed(tmp_path / "photos", output=tmp_path / "out", **options, dtype="float32").features
    assert np.allclose(found[0], found[1], atol=1e-5)
    assert np.allclose(found[0], found[2], atol=1e-5)
