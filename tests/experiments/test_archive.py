"""Archives: what is opened and in which order, bands and depth, all errors, unreadable files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ntdne_kernels.experiments import sources
from ntdne_kernels.experiments.archive import Archive, open_archive, relabelled
from ntdne_kernels.experiments.images import suffixes
from ntdne_kernels.experiments.sources import ArchiveError
from tests.experiments.helpers import complaint, spoil, write_archive, write_bands, write_image

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
    assert (abs(image.astype(int) - 100) <= 2).all()  # picking one pixel instead of averaging would give 0 or 200


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
    write_image(folder / "Forest" / "._0.png")  # macOS writes these beside each file on other file systems
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


def test_two_folders_of_one_name_in_two_forms_of_unicode_are_refused(tmp_path, cache):
    write_archive(tmp_path / "photos", {"for\u00eat": 3, "fore\u0302t": 3, "lac": 3})
    message = complaint(str(tmp_path / "photos"), 4, cache=cache)
    assert "two folders are called 'for\u00eat', in two forms of Unicode" in message


def test_fiftyones_folder_of_unlabelled_images_is_no_class(folder, cache):
    write_image(folder / "_unlabeled" / "2019" / "0.png")
    archive = open_archive(str(folder), 4, cache=cache)
    assert archive.classes == ["Beach", "Forest"]
    assert "1 .png outside the class folders" in archive.notes
    found = sources.image_files(folder)
    assert found.files[0] == "_unlabeled/2019/0.png"
    assert found.labels == [-1, *archive.labels.tolist()]
    assert sources.image_files(folder, ["Beach"]).labels == [0] * 3


def test_what_a_plugin_would_read_is_said_where_it_is_missing(folder, cache, monkeypatch):
    (folder / "Beach" / "a.heic").touch()
    monkeypatch.setattr(sources, "suffixes", lambda: frozenset({".png"}))
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
    # This is also what naming the folder above the archive gives.
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


# Labels of a list


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.csv",
            "label,path\nwood,Forest/3.png\nBeach,Beach/2.png\nwood,Forest/0.png\nwood,Forest/1.png\n"
            "Beach,Beach/0.png\nBeach,Forest/2.png\n",
        ),
        ("a.csv", "image,label\n0,Beach\n2,Beach\n3,wood\n4,wood\n5,Beach\n6,wood\n"),
        ("a.txt", "Beach\n\nBeach\nwood\nwood\nBeach\nwood\n"),
    ],
)
def test_labels_of_a_list_go_to_the_images_that_it_names(archive: Archive, tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    found = relabelled(archive, tmp_path / name, None)
    assert found.files == [*(f"Beach/{i}.png" for i in range(3)), *(f"Forest/{i}.png" for i in range(4))]
    assert found.classes == ["Beach", "wood"]
    assert found.labels.tolist() == [0, -1, 0, 1, 1, 0, 1]
    assert found.images is archive.images
    assert relabelled(archive, tmp_path / name, None, ["wood"]).labels.tolist() == [-1, -1, -1, 0, 0, -1, 0]


def test_a_list_whose_columns_name_no_image_is_refused(archive: Archive, tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_text("scene,label\n" + "".join(f"{file},wood\n" for file in archive.files))
    with pytest.raises(ArchiveError, match="expected a column path or .* got columns scene, label$"):
        relabelled(archive, path, None)
    path.write_text(path.read_text().replace("scene", "filename"))
    assert relabelled(archive, path, None).classes == ["wood"]
