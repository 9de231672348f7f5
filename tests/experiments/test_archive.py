"""Archives: what is opened and in which order, the cache, every complaint, splits, transforms and samples."""

import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from ntdne_kernels.experiments import archive as module
from ntdne_kernels.experiments.archive import (
    IMAGENET,
    Archive,
    ArchiveError,
    ImageDataset,
    normalisation,
    open_archive,
    split,
    transform,
)
from ntdne_kernels.experiments.images import suffixes

IMAGENET_MEAN, IMAGENET_DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> None:
    """An image whose pixels are all (value, value + 1, value + 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value + 1, value + 2)).save(path)


def write_archive(folder: Path, sizes: dict[str, int]) -> Path:
    """Class folders with files 0.png, 1.png …; each image has a value of its own."""
    value = 0
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True)
        for i in range(size):
            write_image(folder / name / f"{i}.png", value)
            value += 1
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "scenes", {"Beach": 3, "Forest": 4})


@pytest.fixture
def archive(folder: Path, cache: Path) -> Archive:
    return open_archive(str(folder), 4, cache=cache)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded."""
    names: list[str] = []
    decode = module._decode

    def noting(path: str, **how: object) -> object:
        names.append(Path(path).name)
        return decode(path, **how)

    monkeypatch.setattr(module, "_decode", noting)
    return names


def complaint(*arguments: object, **options: object) -> str:
    with pytest.raises(ArchiveError) as caught:
        open_archive(*arguments, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# Folders


def test_a_folder_is_read_class_by_class_and_file_by_file_in_the_order_of_names(tmp_path, cache):
    files = ["Beach/b_1.png", "Beach/b_10.png", "Beach/b_2.jpeg", "bridge/1.BMP", "bridge/2.tif", "bridge/3.webp"]
    for name in reversed(files):
        write_image(tmp_path / "scenes" / name)
    (tmp_path / "scenes" / "SOURCE.md").touch()
    (tmp_path / "scenes" / "Beach" / "notes.txt").touch()
    archive = open_archive(str(tmp_path / "scenes"), 4, cache=cache)
    assert archive.name == "scenes"
    assert archive.classes == ["Beach", "bridge"]
    assert archive.files == files
    assert archive.labels.dtype == torch.int64
    assert archive.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert archive.skipped == []


def test_images_are_the_files_pixels_in_rgb(folder, cache):
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.images.shape == (7, 4, 4, 3)
    assert archive.images.dtype == np.uint8
    for i, image in enumerate(archive.images):
        assert (image == [i, i + 1, i + 2]).all()


def test_images_are_mapped_and_cannot_be_written(folder, cache):
    archive = open_archive(str(folder), 4, cache=cache)
    assert isinstance(archive.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        archive.images[0] = 0


def test_images_are_resized_whatever_their_aspect_by_averaging(tmp_path, cache):
    folder = write_archive(tmp_path / "scenes", {"a": 3, "b": 3})
    stripes = np.zeros((16, 32, 3), np.uint8)
    stripes[:, 1::2] = 200
    Image.fromarray(stripes).save(folder / "a" / "0.png")
    image = open_archive(str(folder), 2, cache=cache).images[0]
    assert image.shape == (2, 2, 3)
    assert (abs(image.astype(int) - 100) <= 2).all()  # one pixel picked of the stripes would be 0 or 200


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path, cache, mode):
    folder = write_archive(tmp_path / "scenes", {"a": 3, "b": 3})
    name = folder / "a" / ("0.tif" if mode == "CMYK" else "0.png")
    (folder / "a" / "0.png").unlink()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(name)
    assert (open_archive(str(folder), 4, cache=cache).images[0] == 255).all()


def test_classes_keeps_only_those_named(folder, cache):
    write_archive(folder, {"Airport": 1, "River": 5})  # Airport is too small to be kept
    archive = open_archive(str(folder), 4, cache=cache, classes=["River", "Beach"])
    assert archive.classes == ["Beach", "River"]
    assert archive.labels.tolist() == [0] * 3 + [1] * 5
    assert archive.files[3] == "River/0.png"


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "#recycle", "$RECYCLE.BIN"])
def test_hidden_and_technical_folders_are_skipped_at_any_depth(folder, cache, name):
    for place in (folder, folder / "Beach", folder / "Forest" / "2019"):
        write_image(place / name / "0.png")
        write_image(place / name / "below" / "0.png")
    write_image(folder / "Forest" / "2019" / "9.png")
    write_image(folder / "Forest" / "._0.png")  # beside each file that macOS wrote to a foreign disk
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.classes == ["Beach", "Forest"]
    assert len(archive.files) == 8
    assert "Forest/2019/9.png" in archive.files
    assert archive.left_out == {}


@pytest.mark.parametrize("target", ["Beach", ".", "Forest", "..", "Forest/2019"])
@pytest.mark.parametrize("place", ["Beach/again", "Beach/below/again"])
def test_a_link_back_multiplies_no_image(folder, cache, target, place):
    write_image(folder / "Forest" / "2019" / "9.png")
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(folder / target)
    archive = open_archive(str(folder), 4, cache=cache)
    assert len(archive.files) == 8
    assert archive.labels.tolist() == [0] * 3 + [1] * 5


def test_a_class_that_is_a_link_to_the_archive_is_none(folder, cache):
    (folder / "all").symlink_to(folder)
    (folder / "above").symlink_to(folder.parent)
    assert open_archive(str(folder), 4, cache=cache).classes == ["Beach", "Forest"]


def test_links_to_folders_elsewhere_are_followed_once(folder, cache, tmp_path):
    write_archive(tmp_path / "elsewhere", {"Desert": 3, "more": 2})
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more" / "the archive").symlink_to(folder)
    (tmp_path / "elsewhere" / "more" / "a class").symlink_to(folder / "Forest")
    write_image(folder / "loose.png")
    (folder / "Desert").symlink_to(tmp_path / "elsewhere" / "Desert")
    for name in ("more", "once more"):
        (folder / "Beach" / name).symlink_to(tmp_path / "elsewhere" / "more")
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert archive.files[3:5] == ["Beach/more/0.png", "Beach/more/1.png"]
    some = open_archive(str(folder), 4, cache=cache, classes=["Beach", "Desert"])
    assert some.labels.tolist() == [0] * 5 + [1] * 3


def test_classes_may_be_links_to_a_hidden_store(folder, cache):
    (folder / ".store").mkdir()
    for name in ("Beach", "Forest"):
        (folder / name).rename(folder / ".store" / name)
        (folder / name).symlink_to(folder / ".store" / name)
    (folder / ".store" / "Beach" / "back").symlink_to(folder / "Forest")
    message = complaint(str(folder), 4, cache=cache)
    assert "/.store/Forest is in two classes, Forest and Beach, by a link" in message
    (folder / ".store" / "Beach" / "back").unlink()
    assert open_archive(str(folder), 4, cache=cache).files[0] == "Beach/0.png"


def test_a_folder_in_two_classes_is_refused(folder, cache, tmp_path):
    (folder / "Shore").symlink_to(folder / "Beach")
    message = complaint(str(folder), 4, cache=cache)
    assert message == f"scenes: {folder / 'Beach'} is in two classes, Beach and Shore, by a link"
    (folder / "Shore").unlink()
    write_archive(tmp_path / "elsewhere", {"more": 3})
    for name in ("Beach", "Forest"):
        (folder / name / "more").symlink_to(tmp_path / "elsewhere" / "more")
    assert "is in two classes, Beach and Forest, by a link" in complaint(str(folder), 4, cache=cache)


def test_what_is_left_out_is_counted_by_suffix(folder, cache):
    for name in ("a.txt", "b.TXT", "c.xml", "d", "e.rar", "f.txt"):
        (folder / "Beach" / name).touch()
    (folder / "list.csv").touch()
    write_image(folder / "loose.png")
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.notes == (
        "scenes: files that are no images by their suffix or place: 3 .txt, 1 .csv, 1 .png outside the class folders, "
        "1 .rar, 1 .xml, 1 without a suffix"
    )
    assert len(archive.files) == 7


def test_what_a_plugin_would_read_is_said_where_it_is_missing(folder, cache, monkeypatch):
    (folder / "Beach" / "a.heic").touch()
    monkeypatch.setattr(module, "suffixes", lambda: frozenset({".png"}))
    assert open_archive(str(folder), 4, cache=cache).notes.endswith(": 1 .heic (needs pillow-heif)")


@pytest.mark.parametrize("suffix", ["jp2", "jfif", "jpe", "avif", "gif", "heic", "JPG", "bmp"])
def test_every_suffix_that_pillow_reads_is_read(folder, cache, suffix):
    suffixes()  # Pillow's plugin for .heic
    write_image(folder / "Beach" / f"9.{suffix}", 200, size=(16, 16))
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.files[3] == f"Beach/9.{suffix}"
    assert abs(archive.images[3].astype(int) - [200, 201, 202]).max() <= 4
    assert archive.left_out == {}


# Bands and depth


def write_bands(folder: Path, bands: int = 13, dtype: type = np.uint16, each: int = 5) -> Path:
    """Class folders of TIFFs, whose band b of image i is about 100·b + i, up to 3,000."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = (100 * np.arange(bands) + i + np.arange(64).reshape(8, 8, 1)).astype(dtype)
            tifffile.imwrite(folder / name / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig")
    return folder


def test_bands_and_depth_are_kept(tmp_path, cache):
    folder = write_bands(tmp_path / "sentinel")
    images = open_archive(str(folder), 8, cache=cache).images
    assert images.shape == (10, 8, 8, 13)
    assert images.dtype == np.uint16
    assert images[6, 0, 0].tolist() == list(range(1, 1300, 100))
    chosen = open_archive(str(folder), 8, cache=cache, bands=(4, 3, 2)).images
    assert np.array_equal(chosen, images[..., [3, 2, 1]])
    assert np.array_equal(open_archive(str(folder), 8, cache=cache).images, images)
    floats = open_archive(str(write_bands(tmp_path / "floats", 5, np.float32)), 8, cache=cache).images
    assert floats.dtype == np.float32
    assert floats[6, 0, 0].tolist() == [1, 101, 201, 301, 401]


@pytest.mark.parametrize("deep", ["a/9.png", "a/0.png"])
def test_files_of_8_and_16_bits_share_the_full_range(tmp_path, cache, deep):
    folder = write_archive(tmp_path / "scenes", {"a": 3, "b": 3})
    Image.fromarray(np.full((4, 4), 3001, np.uint16)).save(folder / deep)
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.images.dtype == np.uint16
    assert (archive.images[archive.files.index(deep)] == 3001).all()
    assert (archive.images[archive.files.index("b/1.png")] == 257 * np.array([4, 5, 6])).all()


def test_images_of_other_bands_are_refused(tmp_path, cache):
    folder = write_bands(tmp_path / "sentinel")
    write_image(folder / "b" / "quicklook.png", size=(8, 8))
    assert complaint(str(folder), 8, cache=cache, skip_unreadable=True).startswith(
        "b/quicklook.png has 3 bands of uint8, and a/0.tif 13 of uint16; expected the same bands in all images"
    )
    archive = open_archive(str(folder), 8, cache=cache, skip_unreadable=True, bands=(4, 8))
    assert archive.skipped == ["b/quicklook.png"]
    assert archive.images.shape == (10, 8, 8, 2)
    write_bands(folder, 13, np.float32, each=1)
    assert "a/1.tif has 13 bands of uint16, and a/0.tif 13 of float32" in complaint(str(folder), 8, cache=cache)


def test_bands_of_made_images_are_not_chosen(cache):
    assert "bands: made:60x2 is made of grey or RGB images" in complaint("made:60x2", 8, cache=cache, bands=(1,))


def test_large_scenes_are_admitted_by_an_option(folder, cache):
    write_image(folder / "Beach" / "1.png", 1, size=(30, 20))
    message = complaint(str(folder), 4, cache=cache, max_pixels=599)
    assert "Beach/1.png cannot be read: 3 bands of 8 bits, 30 × 20 pixels, more than the 599 pixels that" in message
    assert "--max-pixels admits" in message
    archive = open_archive(str(folder), 4, cache=cache, max_pixels=600)
    assert archive.images[1, 0, 0].tolist() == [1, 2, 3]


# Complaints


def test_what_is_no_archive_is_refused_with_what_would_be_one(tmp_path, cache):
    (tmp_path / "file.zip").touch()
    (tmp_path / "empty").mkdir()
    expected = "expected a folder of class folders, or one of eurosat, resisc45, digits, made:N, made:NxC"
    for name, reason in (
        ("eurosta", "No such file or directory"),
        ("file.zip", "Not a directory"),
        ("empty", "no class folders"),
    ):
        assert complaint(str(tmp_path / name), 4, cache=cache) == f"{tmp_path / name}: {reason}; {expected}"


def test_an_archive_of_one_class_is_refused(tmp_path, folder, cache):
    # Also what one sees on naming the folder above.
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above" / "scenes")
    assert "above: expected at least 2 classes, got only scenes" in complaint(str(tmp_path / "above"), 4, cache=cache)
    assert "made:9x0: expected at least 2 classes, got none" in complaint("made:9x0", 4, cache=cache)
    assert "expected at least 2 classes, got only 3" in complaint("digits", 4, cache=cache, classes=["3"])
    assert "expected at least 2 classes, got none" in complaint("digits", 4, cache=cache, classes=[])


@pytest.mark.parametrize("parts", [("train", "val"), ("Training", "TEST"), ("2019", "2020")])
def test_a_level_of_folders_above_the_classes_is_refused(tmp_path, cache, parts):
    for part in parts:
        write_archive(tmp_path / "scenes" / part, {"Beach": 3, "Forest": 4, "River": 3})
    first, second = sorted(parts)
    message = complaint(str(tmp_path / "scenes"), 4, cache=cache)
    assert f"has images in {first}/Beach, {first}/Forest, {first}/River, {second}/Beach and 2 more: expected" in message
    assert f"name one part of the set, as {tmp_path / 'scenes' / first}, or, if they are the classes" in message
    assert message.endswith(f"say so: --classes {first} {second}")
    assert open_archive(str(tmp_path / "scenes"), 4, cache=cache, classes=list(parts)).classes == [first, second]
    assert open_archive(str(tmp_path / "scenes"), 4, cache=cache, nested=True).classes == [first, second]


def test_one_part_of_a_set_is_enough_and_folders_below_a_class_are_none(tmp_path, cache, folder):
    write_archive(folder / "Forest" / "below", {"2019": 1, "2020": 2})
    write_archive(folder / "River", {"2019": 2, "2020": 2})
    assert open_archive(str(folder), 4, cache=cache).labels.tolist() == [0] * 3 + [1] * 7 + [2] * 4
    write_archive(folder / "test", {"Beach": 3, "Forest": 3})
    assert "has images in test/Beach, test/Forest: expected" in complaint(str(folder), 4, cache=cache)
    write_archive(tmp_path / "flat", {"train": 3, "val": 3})
    assert "has images in train, val: expected a folder for each class" in complaint(
        str(tmp_path / "flat"), 4, cache=cache
    )


def test_an_unknown_class_is_refused_with_the_known_ones(folder, cache):
    expected = "scenes has no class Harbour, Sea; its classes are Beach, Forest"
    assert complaint(str(folder), 4, cache=cache, classes=["Harbour", "Beach", "Sea"]) == expected
    assert "digits has no class ten; its classes are 0, 1, 2," in complaint("digits", 4, cache=cache, classes=["ten"])


def test_an_empty_class_is_named(folder, cache):
    (folder / "Desert").mkdir()
    (folder / "Desert" / "notes.txt").touch()
    expected = "class Desert of scenes has no images; a 70/10/20 split needs at least 3"
    assert complaint(str(folder), 4, cache=cache) == expected


@pytest.mark.parametrize(("size", "found"), [(1, "1 image"), (2, "2 images")])
def test_a_class_too_small_to_split_is_named(folder, cache, decoded, size, found):
    write_archive(folder, {"Desert": size})
    expected = f"class Desert of scenes has {found}; a 70/10/20 split needs at least 3"
    assert complaint(str(folder), 4, cache=cache) == expected
    assert decoded == []


def test_a_class_too_small_once_unreadable_files_are_left_out_is_named(folder, cache):
    (folder / "Beach" / "1.png").write_bytes(b"no image")
    expected = "class Beach of scenes has 2 readable images; a 70/10/20 split needs at least 3"
    assert complaint(str(folder), 4, cache=cache, skip_unreadable=True) == expected
    for i in range(3):
        (folder / "Beach" / f"{i}.png").write_bytes(b"no image")
    assert "has no readable images" in complaint(str(folder), 4, cache=cache, skip_unreadable=True)


def test_a_size_of_no_pixels_is_refused(folder, cache):
    assert complaint(str(folder), 0, cache=cache) == "image_size: expected 1 or more pixels, got 0"


# Unreadable files


def spoil(path: Path, how: str) -> str:
    """Make the file unreadable; returns why it now is."""
    if how == "text":
        path.write_bytes(b"no image")
        return "not an image"
    if how == "empty":
        path.write_bytes(b"")
        return "not an image"
    if how == "dangling":
        path.unlink()
        path.symlink_to("nowhere.png")
        return "No such file or directory"
    if how == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1000])
        return "image file is truncated"
    assert how == "deep"
    path.write_bytes(b"P6 4 2 65535\n" + bytes(48))
    return "Pillow would keep 8 of the 16 bits; PNG and TIFF are read whole (3 bands of 16 bits, 4 × 2 pixels)"


@pytest.mark.parametrize("how", ["text", "empty", "dangling", "truncated", "deep"])
def test_an_unreadable_file_is_named_or_left_out_and_counted(folder, cache, how):
    path = folder / "Forest" / "1.png"
    reason = spoil(path, how)
    message = complaint(str(folder), 4, cache=cache)
    assert message.startswith(f"{path} cannot be read: {reason}")
    assert message.endswith("; --skip-unreadable leaves such files out")
    archive = open_archive(str(folder), 4, cache=cache, skip_unreadable=True)
    assert archive.skipped == ["Forest/1.png"]
    assert archive.files == [
        "Beach/0.png",
        "Beach/1.png",
        "Beach/2.png",
        "Forest/0.png",
        "Forest/2.png",
        "Forest/3.png",
    ]
    assert archive.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert archive.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6]


def test_further_unreadable_files_are_counted(folder, cache):
    for i in (1, 2, 3):
        spoil(folder / "Forest" / f"{i}.png", "text")
    assert "Forest/1.png cannot be read: not an image, and 2 more files; " in complaint(str(folder), 4, cache=cache)


def test_the_cache_remembers_unreadable_files(folder, cache, decoded):
    spoil(folder / "Forest" / "1.png", "text")
    first = open_archive(str(folder), 4, cache=cache, skip_unreadable=True)
    assert len(decoded) == 7
    decoded.clear()
    second = open_archive(str(folder), 4, cache=cache, skip_unreadable=True)
    assert (second.files, second.skipped) == (first.files, first.skipped)
    assert (second.images == first.images).all()
    assert "Forest/1.png cannot be read" in complaint(str(folder), 4, cache=cache)
    assert set(decoded) == {"1.png"}  # looked at again, and no other


def test_a_file_that_has_become_readable_without_a_change_is_read(folder, cache, monkeypatch):
    decode = module._decode
    failing = lambda path, **how: "Input/output error" if "Forest/1" in path else decode(path, **how)  # noqa: E731
    with monkeypatch.context() as broken:
        broken.setattr(module, "_decode", failing)
        assert "Input/output error" in complaint(str(folder), 4, cache=cache)
    archive = open_archive(str(folder), 4, cache=cache)
    assert len(archive.images) == 7
    assert archive.skipped == []


# The cache


def test_a_second_opening_decodes_nothing(folder, cache, decoded):
    first = open_archive(str(folder), 4, cache=cache)
    assert len(decoded) == 7
    second = open_archive(str(folder), 4, cache=cache)
    assert len(decoded) == 7
    assert (first.images == second.images).all()
    assert first.files == second.files


def test_a_changed_file_is_decoded_anew(folder, cache, decoded):
    open_archive(str(folder), 4, cache=cache)
    write_image(folder / "Beach" / "0.png", 99)
    assert (open_archive(str(folder), 4, cache=cache).images[0] == [99, 100, 101]).all()


@pytest.mark.parametrize("change", ["touch", "rename", "add", "size", "classes"])
def test_whatever_may_change_the_images_misses_the_cache(folder, cache, decoded, change):
    write_archive(folder, {"River": 3})
    open_archive(str(folder), 4, cache=cache)
    decoded.clear()
    path = folder / "Beach" / "0.png"
    if change == "touch":
        os.utime(path, ns=(0, 1))
    if change == "rename":
        path.rename(folder / "Beach" / "00.png")
    if change == "add":
        write_image(folder / "Beach" / "9.png")
    archive = open_archive(
        str(folder),
        5 if change == "size" else 4,
        cache=cache,
        classes=["Beach", "River"] if change == "classes" else None,
    )
    assert len(decoded) == len(archive.files)


def test_the_cache_is_in_the_users_cache_folder_unless_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Path(open_archive(str(folder), 4).images.filename).parent == tmp_path / "xdg" / "ntdne_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Path(open_archive(str(folder), 4).images.filename).parent == tmp_path / "home" / ".cache" / "ntdne_kernels"


def test_an_interrupted_decoding_leaves_nothing_behind(folder, cache, monkeypatch):
    def interrupted(path: str, **how: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_archive(str(folder), 4, cache=cache)
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}
    assert len(open_archive(str(folder), 4, cache=cache).images) == 7


def test_a_process_killed_half_way_leaves_no_broken_cache(folder, cache):
    rows = module._decode_all

    def killed(paths: list[str], look: object) -> object:
        for i, row in enumerate(rows(paths, look)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    def open_and_die() -> None:
        module._decode_all = killed
        open_archive(str(folder), 4, cache=cache)

    process = multiprocessing.get_context("fork").Process(target=open_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".tmp"]
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.images[:, 0, 0, 0].tolist() == list(range(7))
    assert not list(cache.glob("*.tmp"))


def test_processes_that_open_an_archive_together_decode_it_once(folder, cache, tmp_path):
    log = tmp_path / "log"

    def open_and_log() -> None:
        decode = module._decode

        def noting(path: str, **how: object) -> object:
            with open(log, "a") as file:
                file.write(f"{path}\n")
            time.sleep(0.1)  # so that without a lock all would be decoding
            return decode(path, **how)

        module._decode = noting
        assert len(open_archive(str(folder), 4, cache=cache).images) == 7

    processes = [multiprocessing.get_context("fork").Process(target=open_and_log) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 7


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "taken").touch()
    message = complaint(str(folder), 4, cache=tmp_path / "taken")
    assert message == (
        f"decoded images cannot be kept in {tmp_path / 'taken'}: File exists; --cache names another folder"
    )


def test_a_full_disk_is_a_clear_error(folder, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        message = complaint(str(folder), 64, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"decoded images cannot be kept in {cache}: File too large; --cache names another folder"
    assert not list(cache.glob("*.tmp"))


# Archives of libraries


def test_eurosat_is_read_where_torchvision_unpacks_it(cache):
    write_archive(cache / "datasets" / "eurosat" / "2750", {"AnnualCrop": 3, "SeaLake": 3})
    archive = open_archive("eurosat", 4, cache=cache)
    assert archive.name == "EuroSAT"
    assert archive.classes == ["AnnualCrop", "SeaLake"]
    assert archive.files[0] == "AnnualCrop/0.png"


def test_an_absent_eurosat_is_not_fetched_unasked(cache):
    assert complaint("eurosat", 4, cache=cache).startswith(
        f"eurosat is not in {cache}/datasets/eurosat/2750; --download fetches it (Dataset not found."
    )


def test_a_failing_download_is_one_line(cache, monkeypatch):
    def fail(root: Path, download: bool) -> None:
        raise OSError("no route\nto host" if download else "not asked")

    monkeypatch.setattr(module, "EuroSAT", fail)
    message = complaint("eurosat", 4, cache=cache, download=True)
    assert message == f"eurosat is not in {cache}/datasets/eurosat/2750 (no route to host)"


def test_resisc45_asks_for_torchgeo_where_it_is_needed(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    assert "fetching it needs torchgeo (pip install torchgeo); or give the folder with its class folders" in complaint(
        "resisc45", 4, cache=cache, download=True
    )
    write_archive(cache / "datasets" / "NWPU-RESISC45", {"airplane": 3, "wetland": 3})
    assert open_archive("resisc45", 4, cache=cache).name == "NWPU-RESISC45"


def test_resisc45_is_fetched_by_torchgeo(cache, monkeypatch):
    class RESISC45:
        def __init__(self, root: Path, split: str = "train", download: bool = False, checksum: bool = False) -> None:
            if not download:
                raise LookupError("Dataset not found\nin `root`.")
            assert checksum
            write_archive(root / "NWPU-RESISC45", {"airplane": 3, "wetland": 4})

    torchgeo, datasets = ModuleType("torchgeo"), ModuleType("torchgeo.datasets")
    datasets.RESISC45 = RESISC45
    monkeypatch.setitem(sys.modules, "torchgeo", torchgeo)
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", datasets)
    assert "; --download fetches it (Dataset not found in `root`.)" in complaint("resisc45", 4, cache=cache)
    archive = open_archive("resisc45", 4, cache=cache, download=True)
    assert archive.classes == ["airplane", "wetland"]
    assert archive.labels.tolist() == [0] * 3 + [1] * 4


def test_digits_are_scikit_learns_class_by_class(cache):
    archive = open_archive("digits", 8, cache=cache)
    digits = load_digits()
    assert archive.name == "digits"
    assert archive.classes == list("0123456789")
    assert len(archive.files) == len(set(archive.files)) == 1797
    assert archive.labels.tolist() == sorted(digits.target.tolist())
    for i in range(0, 1797, 100):
        number = int(archive.files[i].removeprefix("digit "))
        assert digits.target[number] == archive.labels[i]
        expected = np.round(digits.images[number] * 255 / 16)[..., None].repeat(3, axis=2)
        assert (archive.images[i] == expected).all()


def test_digits_3_and_8(cache):
    archive = open_archive("digits", 16, cache=cache, classes=["8", "3"])
    assert archive.classes == ["3", "8"]
    assert archive.images.shape == (183 + 174, 16, 16, 3)
    assert archive.labels.tolist() == [0] * 183 + [1] * 174


# Made archives


def test_made_archives_have_the_size_and_classes_they_are_asked_for(cache):
    archive = open_archive("made:50x4", 16, cache=cache)
    assert archive.images.shape == (50, 16, 16, 3)
    assert archive.labels.tolist() == [0] * 13 + [1] * 13 + [2] * 12 + [3] * 12
    assert archive.classes == ["0", "1", "2", "3"]
    assert archive.files == [""] * 50
    assert open_archive("made:50", 16, cache=cache).classes == list("0123456789")
    assert open_archive("made:50x12", 16, cache=cache).classes == [f"{c:02}" for c in range(12)]


def test_made_images_are_the_same_every_time_and_in_every_larger_archive(tmp_path):
    first = open_archive("made:190x2", 16, cache=tmp_path / "1")
    again = open_archive("made:190x2", 16, cache=tmp_path / "2")
    larger = open_archive("made:300x2", 16, cache=tmp_path / "1")
    one = open_archive("made:190x3", 16, cache=tmp_path / "1", classes=["0", "2"])
    assert (first.images == again.images).all()
    for c in (0, 1):
        few, many = first.images[first.labels == c], larger.images[larger.labels == c]
        assert len(few) == 95  # more than are drawn at a time
        assert (few == many[:95]).all()
    whole = open_archive("made:190x3", 16, cache=tmp_path / "1")
    assert (one.images[one.labels == 1] == whole.images[whole.labels == 2]).all()


def test_no_two_made_images_are_equal(cache):
    images = open_archive("made:300x3", 8, cache=cache).images
    assert len(np.unique(images.reshape(300, -1), axis=0)) == 300


def test_made_classes_differ_in_orientation_and_frequency(cache):
    archive = open_archive("made:400x4", 32, cache=cache)
    waves = np.abs(np.fft.fft2(archive.images.mean(-1) - archive.images.mean((1, 2, 3))[:, None, None]))
    y, x = np.divmod(waves[:, :17].reshape(400, -1).argmax(1), 32)  # the strongest wave; the other half mirrors it
    steep, fine = np.arctan2(y, x) > np.pi / 4, np.hypot(x, y) > 4  # frequencies are 2 to 8
    assert (steep + 2 * fine == archive.labels.numpy()).mean() > 0.8  # cells touch, and whole waves are counted


# Splits


@pytest.mark.parametrize("sizes", [[3, 4, 5], [10, 700, 33], [220, 420, 290, 360]])
def test_the_authors_split_is_the_one_of_their_code(sizes):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    train, validation, test = [], [], []
    position = 0
    for size in sizes:
        files = list(range(position, position + size))
        position += size
        random.seed(42)
        random.shuffle(files)
        train += files[: int(0.7 * len(files))]
        validation += files[int(0.7 * len(files)) : int(0.8 * len(files))]
        test += files[int(0.8 * len(files)) :]
    found = split(labels, "authors", 0)
    assert found.train.tolist() == train
    assert found.validation.tolist() == validation
    assert found.test.tolist() == test
    assert all(torch.equal(a, b) for a, b in zip(found, split(labels, "authors", 1), strict=True))


def test_nwpu_resisc45_has_the_22005_training_images_of_the_authors():
    parts = split(torch.arange(45).repeat_interleave(700), "authors", 0)  # int(0.7 * 700) is 489
    assert [len(part) for part in parts] == [22_005, 45 * 71, 45 * 140]


@given(st.lists(st.integers(3, 60), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans(), st.randoms())
def test_a_seeded_split_shares_out_every_class(sizes, seed, mixed, order):
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    if mixed:
        order.shuffle(labels)
    labels = torch.tensor(labels)
    parts = split(labels, "seeded", seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == torch.int64
        assert labels[part].tolist() == sorted(labels[part].tolist())
    for c, size in enumerate(sizes):
        train, validation, test = (int((labels[part] == c).sum()) for part in parts)
        assert train >= 2
        assert test >= 1
        for found, share in ((train, 0.7), (validation, 0.1), (test, 0.2)):
            assert abs(found - share * size) < 1 + 1e-9
    assert all(torch.equal(a, b) for a, b in zip(parts, split(labels, "seeded", seed), strict=True))


def test_seeds_give_different_splits():
    labels = torch.arange(3).repeat_interleave(40)
    first, second = (split(labels, "seeded", seed).train for seed in (0, 1))
    assert set(first.tolist()) != set(second.tolist())
    within = [set((first[labels[first] == c] - 40 * c).tolist()) for c in range(3)]
    assert within[0] != within[1] != within[2]


def test_split_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="how: expected 'seeded' or 'authors', got 'random'"):
        split(torch.zeros(5, dtype=torch.int64), "random", 0)
    with pytest.raises(ValueError, match="labels: expected at least 3 images in each class, got 2 in class 1"):
        split(torch.tensor([0, 0, 0, 1, 1]), "seeded", 0)


# Transforms


def test_without_augmentation_images_are_only_normalised():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    expected = ((image / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION).transpose(2, 0, 1)
    found = transform(augment=False)(image)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_augmented_images_are_grey_mirrored_and_of_other_colours_as_often_as_in_the_paper():
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


def test_a_small_deviation_on_a_large_height_is_found_and_a_constant_band_stays_finite(tmp_path, cache):
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


# Samples


def value(image: torch.Tensor) -> int:
    """The value that write_image wrote, from a normalised image."""
    return round(255 * float(image[0, 0, 0] * IMAGENET_DEVIATION[0] + IMAGENET_MEAN[0]))


def test_samples_are_image_given_label_and_position_in_the_dataset(archive):
    dataset = ImageDataset(archive, torch.tensor([5, 0, 6]), torch.tensor([0, 1, 1]), transform(augment=False))
    assert len(dataset) == 3
    assert [(value(image), label, position) for image, label, position in dataset] == [(5, 0, 0), (0, 1, 1), (6, 1, 2)]
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
