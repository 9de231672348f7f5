"""Folders of images, encoded by a run: their features, pictures and names."""

import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ntdne_kernels.experiments.auditing import inputs
from tests.experiments.auditing.helpers import LABELS, everything_in, pictures_on


def test_a_folder_is_encoded_by_a_run_and_stays_as_it_is(ntdne, photos, trained, capsys):
    (photos / "dark" / "broken.png").write_bytes(b"no image")
    (photos / "drak").mkdir()
    Image.open(photos / "dark" / "00.png").save(photos / "drak" / "slip.png")
    before = everything_in(photos)
    assert ntdne("audit", photos, "--checkpoint", trained / "last.ckpt", "--fix") == 0
    assert everything_in(photos) == before
    table = pd.read_csv("audit/photos/audit.csv")
    assert table.path.tolist() == [str(path.relative_to(photos)) for path in before if path.name != "broken.png"]
    assert table.given_label.tolist() == ["bright"] * 20 + ["dark"] * 20 + ["drak"]
    assert table.conflicting.tolist() == [row in (20, 40) for row in range(41)]
    assert list(pd.read_csv("audit/photos/corrected.csv").columns) == ["path", "label"]
    assert "1 unreadable files left out" in capsys.readouterr().out
    text = Path("audit/photos/audit.html").read_text()
    assert "σ = 0.2" in text  # that of the run
    assert "dark/broken.png" in text
    for title in ("Copies with different labels", "Classes with one image", "Unlike the others"):
        assert f">{title}</h2>" in text


def test_the_run_may_be_given_by_its_folder(ntdne, photos, trained):
    for run, output in ((trained, "by folder"), (trained / "last.ckpt", "by file")):
        assert ntdne("audit", photos, "--checkpoint", run, "--output", output) == 0
    assert Path("by folder/audit.csv").read_bytes() == Path("by file/audit.csv").read_bytes()


@pytest.mark.parametrize("by", ["folder", "features"])
def test_pictures_are_upright_whole_and_without_what_is_transparent(ntdne, photos, trained, by):
    """The page shows what training sees: one function decodes for both."""
    for file in photos.rglob("*.png"):
        file.unlink()
    exif = Image.Exif()
    exif[274] = 6
    hidden = np.zeros((20, 40, 4), np.uint8)
    hidden[..., 0], hidden[:, 20:, 3] = 200, 255
    Image.fromarray(hidden).save(photos / "dark" / "hidden.png", exif=exif)
    ramp = (np.arange(20 * 40).reshape(20, 40, 1) + np.zeros(3)).astype(np.uint16)  # 8 bits would keep 4 levels
    Path(photos / "bright" / "deep.png").write_bytes(imagecodecs.png_encode(ramp))
    names = ["bright/deep.png", "dark/hidden.png"]
    if by == "folder":
        given = [photos, "--checkpoint", trained]
    else:
        np.save("features.npy", np.random.default_rng(0).standard_normal((2, 4)))
        np.save("labels.npy", [0, 1])
        Path("files.txt").write_text("\n".join(names))
        given = ["features.npy", *LABELS, "--paths", "files.txt", "--images", photos]
    assert ntdne("audit", *given, "--output", "out") == 0
    shown = pictures_on(Path("out/audit.html"))
    upright = [each for each in shown if each.shape[0] > each.shape[1]]
    deep = [each for each in shown if each.shape[0] < each.shape[1]]
    assert upright
    assert deep
    for each in upright:
        top, bottom = each[:12].mean(axis=(0, 1)), each[-12:].mean(axis=(0, 1))
        assert np.allclose(top, 0, atol=6)
        assert np.allclose(bottom, [200, 0, 0], atol=6)
    for each in deep:
        assert len(np.unique(each)) > 100


def test_scenes_of_many_bands_are_audited_by_a_run_on_such(ntdne, scenes, photos, capsys):
    quick = ["--preset", "scratch", "--encoder", "small", "--image-size", 8, "--epochs", 2, "--precision", "32-true"]
    for name, options in (("all", []), ("some", ["--bands", "4,3,2"])):
        assert ntdne("train", scenes, *quick, "--noise", "none", *options, "--output", name) == 0
        assert ntdne("audit", scenes, "--checkpoint", name, "--output", f"{name}-audit") == 0
        assert len(pd.read_csv(f"{name}-audit/audit.csv")) == 40
        assert len(pictures_on(Path(f"{name}-audit/audit.html"))) > 20
    capsys.readouterr()
    assert ntdne("audit", photos, "--checkpoint", "all", "--output", "other") == 2
    assert "the run was trained on 5 bands of integers, but" in capsys.readouterr().err


def test_the_audit_has_the_training_images_features(ntdne, scenes):
    """The run's own normalisation, of its training images: not that of the images audited."""
    quick = ["--preset", "scratch", "--encoder", "small", "--image-size", 8, "--epochs", 1, "--precision", "32-true"]
    assert ntdne("train", scenes, *quick, "--noise", "none", "--output", "run") == 0
    shutil.copytree(scenes / "forest", scenes.parent / "part" / "forest")
    whole, part = (
        inputs.encode_folder(str(folder), Path("run"), cache=Path("cache"), download=False, device="cpu")
        for folder in (scenes, scenes.parent / "part")
        if (folder / "water").mkdir(exist_ok=True) is None
    )
    assert torch.allclose(whole.features[:20], part.features, atol=1e-5)


def test_max_pixels_is_the_runs_unless_given(ntdne, photos, trained, capsys):
    Image.new("RGB", (100, 30)).save(photos / "dark" / "large.png")
    given = ["audit", photos, "--checkpoint", trained]
    assert ntdne(*given, "--max-pixels", 2999) == 0
    assert "1 unreadable files left out" in capsys.readouterr().out
    assert ntdne(*given) == 0
    assert "unreadable" not in capsys.readouterr().out


def test_a_file_name_of_any_bytes_is_written_back(ntdne, photos, trained):
    name = b"\xe9t\xe9.png".decode(errors="surrogateescape")
    try:
        (photos / "dark" / "00.png").rename(photos / "dark" / name)
        (photos / "bright").rename(photos / name[:-4])
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    for format in ("csv", "parquet"):
        given = ["audit", photos, "--checkpoint", trained, "--fix", "--format", format, "--output", "out"]
        assert ntdne(*given) == 0
    for file in ("out/audit.csv", "out/corrected.csv"):
        assert b"dark/\xe9t\xe9.png" in Path(file).read_bytes()
    assert r"dark/\xe9t\xe9.png" in pd.read_parquet("out/audit.parquet").path.tolist()
