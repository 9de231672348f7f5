"""Decoding: depth, orientation, transparency and bands of every kind of file, and what is said of those without."""

import importlib
import io
import struct
import sys
import threading
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from ntdne_kernels.experiments.images import Unreadable, as_picture, decode, resized, suffixes

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 3000, (16, 19, 13), np.uint16)  # values of a 12-bit camera in 16 bits
SHALLOW = RNG.integers(0, 256, (16, 19, 13), np.uint8)
NO_DATA = 42113


def tiff(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """A TIFF of bands (H, W, B), which are not colours unless the options say so."""
    options = {"photometric": "minisblack", "planarconfig": "contig"} | options
    tifffile.imwrite(path, pixels, **options)
    return path


def png16(path: Path, pixels: np.ndarray) -> Path:
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
    return path


def said(path: Path, *options: object, **named: object) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(path, *options, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Depth


@pytest.mark.parametrize("kind", ["png", "tif", "lzw", "big-endian", "planar", "big", "jp2"])
def test_colours_of_16_bits_keep_every_level(tmp_path, kind):
    colours = np.arange(1852, dtype=np.uint16)[:1848].reshape(28, 22, 3)
    path = tmp_path / f"a.{kind if kind in ('png', 'jp2') else 'tif'}"
    if kind == "png":
        png16(path, colours)
    elif kind == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(colours, level=0, reversible=True))
    elif kind == "planar":
        tiff(path, colours.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    else:
        options = {"lzw": {"compression": "lzw"}, "big-endian": {"byteorder": ">"}, "big": {"bigtiff": True}}
        tiff(path, colours, photometric="rgb", **options.get(kind, {}))
    found = decode(path)
    assert found.dtype == np.uint16
    assert np.array_equal(found, colours)
    if kind != "planar":  # Pillow reads noise from such files
        assert len(np.unique(np.asarray(Image.open(path)))) <= 8  # Pillow keeps 8 of 1,848 levels


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_grey_of_16_bits_is_three_equal_bands_of_every_level(tmp_path, suffix):
    grey = DEEP[..., 0]
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, grey)
    elif suffix == "pgm":
        path.write_bytes(b"P5 19 16 65535\n" + grey.astype(">u2").tobytes())
    elif suffix == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(np.ascontiguousarray(grey), level=0, reversible=True))
    else:
        png16(path, grey)
    found = decode(path)
    assert found.dtype == np.uint16
    assert np.array_equal(found, grey[..., None].repeat(3, axis=-1))


def test_12_bits_are_scaled_to_16(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DEEP[:, :8, :3], photometric="rgb", bitspersample=12)
    found = decode(tmp_path / "a.tif")
    assert np.array_equal(found, (DEEP[:, :8, :3] * (65535 / 4095)).round())


@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.uint16, 16), (np.uint16, 12), (np.int16, 16), (np.uint32, 32), (np.float32, 32)]
)
def test_the_stored_value_that_is_white_can_be_named(tmp_path, dtype, bits):
    path, pixels = tmp_path / "a.tif", DEEP[..., :3].astype(dtype)
    pixels[0, 0, 1] = 0 if dtype in (np.uint16, np.uint32) else -5
    tifffile.imwrite(path, pixels, photometric="rgb", bitspersample=bits)
    found = decode(path, white=2000)
    assert found.dtype == np.uint16
    assert np.abs(found - pixels.clip(0, 2000) * (65535 / 2000)).max() < 2  # 12 bits are rounded twice
    assert np.array_equal(decode(path, (3, 1), white=2000), found[..., [2, 0]])


def test_jpeg_2000_of_15_bits_counts_what_is_stored(tmp_path):
    for bands in (1, 3):
        jp2 = imagecodecs.jpeg2k_encode(DEEP[..., :bands].squeeze(), level=0, reversible=True, bitspersample=15)
        (tmp_path / "a.jp2").write_bytes(jp2)
        found = decode(tmp_path / "a.jp2", white=2000)
        expected = (DEEP[..., :bands].clip(0, 2000) * (65535 / 2000)).round().repeat(3 // bands, axis=-1)
        assert np.abs(found.astype(int) - expected).max() <= 16  # of 65535, a half of a stored step; 15 bits in 16


def test_white_leaves_opacity_no_data_and_8_bits_as_they_are(tmp_path):
    colours = np.array([[[1000, 500, 7], [2000, 9, 7]]], np.uint16)
    opacity = np.array([[[65535], [0]]], np.uint16)
    png16(tmp_path / "a.png", np.concatenate([colours, opacity], axis=-1))
    assert decode(tmp_path / "a.png", white=1000).tolist() == [[[65535, 32768, 459], [0, 0, 0]]]
    tiff(tmp_path / "a.tif", colours, photometric="rgb", extratags=[(NO_DATA, "s", 0, "7", True)])
    assert decode(tmp_path / "a.tif", white=1000).tolist() == [[[65535, 32768, 0], [65535, 590, 0]]]
    Image.fromarray(SHALLOW[..., :3]).save(tmp_path / "b.png")
    assert np.array_equal(decode(tmp_path / "b.png", white=1000), SHALLOW[..., :3])


def test_white_may_be_0(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DEEP[..., 0], photometric="miniswhite")
    assert np.array_equal(decode(tmp_path / "a.tif")[..., 0], 65535 - DEEP[..., 0])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float16, np.float32, np.float64])
def test_other_numbers_are_floats_as_stored(tmp_path, dtype):
    bands = (DEEP[..., :5].astype(np.int32) - (1500 if dtype != np.uint32 else 0)).astype(dtype)
    for several in (bands, bands[..., 0]):
        found = decode(tiff(tmp_path / "a.tif", several, planarconfig="contig" if several.ndim == 3 else None))
        assert found.dtype == np.float32
        assert np.array_equal(found, several if several.ndim == 3 else several[..., None].repeat(3, axis=-1))


def test_what_pillow_would_cut_is_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    assert said(tmp_path / "a.ppm").endswith(
        "Pillow would keep 8 of the 16 bits; PNG and TIFF are read whole (3 bands of 16 bits, 2 × 1 pixels)"
    )
    sgi = struct.pack(">HBBHHHH", 474, 0, 2, 3, 2, 1, 3)
    (tmp_path / "a.sgi").write_bytes(sgi.ljust(512, b"\0") + bytes(12))
    assert "Pillow would keep 8 of the 16 bits" in said(tmp_path / "a.sgi")


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, axis=-1) * 40
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(decode(tmp_path / "a.png"), upright)
    for suffix, options in (("webp", {"lossless": True}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})):
        Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif, **options)
        assert np.array_equal(decode(tmp_path / f"a.{suffix}"), upright)
    blocks = Image.fromarray(stored.repeat(16, axis=0).repeat(16, axis=1))
    blocks.save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert np.allclose(decode(tmp_path / "a.jpg")[8::16, 8::16], upright, atol=2)
    tags = [(274, 3, 1, orientation, True)]
    tiff(tmp_path / "deep.tif", 257 * stored.astype(np.uint16), photometric="rgb", extratags=tags)
    assert np.array_equal(decode(tmp_path / "deep.tif"), 257 * upright.astype(np.uint16))


def test_a_broken_exif_spoils_no_picture(tmp_path):
    Image.new("RGB", (8, 4), (200, 100, 50)).save(tmp_path / "a.jpg", exif=b"Exif\0\0no such thing")
    assert decode(tmp_path / "a.jpg").shape == (4, 8, 3)


# Transparency


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "deep RGBA", "deep LA", "deep tif", "multiplied tif"])
def test_transparency_is_laid_over_black(tmp_path, kind):
    """The colours of transparent pixels do not show."""
    deep = kind not in ("RGBA", "LA", "P")
    opacity = np.array([[0, 0, 128, 255]]) * (257 if deep else 1)
    colour = np.full((1, 4), 200) * (257 if deep else 1)
    bands = [colour, opacity] if "LA" in kind else [colour, colour, colour, opacity]
    pixels = np.stack(bands, axis=-1).astype(np.uint16 if deep else np.uint8)
    path = tmp_path / ("a.tif" if "tif" in kind else "a.png")
    expected = np.array([0, 0, round(200 * 128 / 255), 200])
    if kind == "P":
        picture = Image.fromarray(np.array([[0, 0, 1, 1]], np.uint8), "P")
        picture.putpalette([200] * 6)
        picture.save(path, transparency=0)
        expected[2] = 200
    elif kind == "deep tif":
        tiff(path, pixels, photometric="rgb", extrasamples=["unassalpha"])
    elif kind == "multiplied tif":
        pixels[..., :3] = (pixels[..., :3] * (opacity[..., None] / 65535)).round()
        tiff(path, pixels, photometric="rgb", extrasamples=["assocalpha"])
    elif deep:
        png16(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    found = decode(path)
    assert found.shape == (1, 4, 3)
    assert np.allclose(found[0], expected[:, None] * (257 if deep else 1), atol=130 if deep else 0)


@pytest.mark.parametrize("colours", [1, 3])
def test_a_transparent_value_of_16_bits_is_black(tmp_path, colours):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.array([[300] * colours, [40000] * colours], ">u2")
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0 if colours == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", pixels[0].tobytes()), (b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in [*chunks, (b"IEND", b"")])
    (tmp_path / "a.png").write_bytes(png)
    assert decode(tmp_path / "a.png").tolist() == [[[0, 0, 0], [40000] * 3]]


def test_no_data_is_black(tmp_path):
    values = np.array([[[-9999, 1.5], [2, np.nan], [np.inf, 0.5]]], np.float32)
    tiff(tmp_path / "a.tif", values, extratags=[(NO_DATA, "s", 0, "-9999", True)])
    assert decode(tmp_path / "a.tif").tolist() == [[[0, 1.5], [2, 0], [0, 0.5]]]
    tifffile.imwrite(tmp_path / "b.tif", DEEP[..., 0] // 1500, extratags=[(NO_DATA, "s", 0, "1", True)])
    assert decode(tmp_path / "b.tif").max() == 0
    counts = np.array([[[55537, 7]]], np.uint16)  # 55537 has the bits of −9999, but is another number
    tiff(tmp_path / "c.tif", counts, extratags=[(NO_DATA, "s", 0, "-9999", True)])
    assert np.array_equal(decode(tmp_path / "c.tif"), counts)


# Bands


@pytest.mark.parametrize("bands", [2, 4, 5, 13])
@pytest.mark.parametrize("pixels", [DEEP, SHALLOW], ids=["16", "8"])
def test_any_number_of_bands_is_read_however_they_are_stored(tmp_path, bands, pixels):
    pixels = pixels[..., :bands]
    planes = pixels.transpose(2, 0, 1)
    ways = [tiff(tmp_path / "contig.tif", pixels), tiff(tmp_path / "planes.tif", planes, planarconfig="separate")]
    for name, array in (("pages.tif", planes), ("rows.tif", pixels)):
        ways.append(tmp_path / name)
        tifffile.imwrite(ways[-1], array, photometric="minisblack")  # a page for each plane, or row
    if bands > 3:
        extra = ["unspecified"] * (bands - 3)
        ways.append(tiff(tmp_path / "rgb.tif", pixels, photometric="rgb", extrasamples=extra))
    for path in ways:
        found = decode(path)
        assert found.dtype == pixels.dtype
        assert np.array_equal(found, pixels)


def test_jpeg_2000_of_many_bands(tmp_path):
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(DEEP, level=0, reversible=True))
    assert np.array_equal(decode(tmp_path / "a.jp2"), DEEP)


def test_overviews_are_no_bands(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(DEEP[..., :3], photometric="rgb", subifds=0)
        file.write(DEEP[::2, ::2, :3], photometric="rgb", subfiletype=1)
    assert np.array_equal(decode(tmp_path / "a.tif"), DEEP[..., :3])


def test_bands_are_chosen_as_they_are_stored(tmp_path):
    path = tiff(tmp_path / "a.tif", DEEP)
    assert np.array_equal(decode(path, (4, 3, 2)), DEEP[..., [3, 2, 1]])
    assert np.array_equal(decode(path, (13,)), DEEP[..., 12:])
    assert said(path, (4, 14)) == "there is no band 14 (13 bands of 16 bits, 19 × 16 pixels)"
    Image.fromarray(SHALLOW[..., :4]).save(tmp_path / "a.png")  # near infrared stored as transparency
    assert np.array_equal(decode(tmp_path / "a.png", (4, 1)), SHALLOW[..., [3, 0]])
    Image.fromarray(SHALLOW[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(decode(tmp_path / "grey.png", (1,)), SHALLOW[..., :1])
    assert "no band 2 (1 band of 8 bits" in said(tmp_path / "grey.png", (2,))


# What is read, and what is not


def test_every_suffix_that_pillow_reads_is_known():
    expected = {".jp2", ".jfif", ".jpe", ".avif", ".gif", ".jpg", ".png", ".tif", ".webp", ".bmp", ".heic", ".pgm"}
    assert expected <= suffixes()
    assert not suffixes() & {".pdf", ".txt", ".h5", ".mpg", ".eps", ""}


@pytest.mark.parametrize("suffix", ["jp2", "jfif", "jpe", "avif", "gif", "heic", "bmp", "webp", "qoi", "tga", "ico"])
def test_files_of_every_suffix_are_read(tmp_path, suffix):
    importlib.import_module("pillow_heif.HeifImagePlugin")
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    assert np.allclose(decode(tmp_path / f"a.{suffix}"), [200, 100, 50], atol=3)


def test_what_cannot_be_read_says_what_it_is(tmp_path):
    path = tiff(tmp_path / "cut.tif", DEEP)
    path.write_bytes(path.read_bytes()[:2500])
    assert said(path).endswith("(13 bands of 16 bits, 19 × 16 pixels)")
    assert "complex numbers" in said(tiff(tmp_path / "complex.tif", DEEP[..., :5].astype(np.complex64)))
    tifffile.imwrite(tmp_path / "stack.tif", DEEP[None, ..., :3].repeat(2, axis=0), photometric="rgb")
    assert said(tmp_path / "stack.tif").startswith("a stack of 2 pages of 3 bands (6 bands of 16 bits, ")
    tiff(tmp_path / "inks.tif", SHALLOW[..., :5], photometric="separated", extrasamples=["unassalpha"])
    assert said(tmp_path / "inks.tif") == "not an image that Pillow can read (5 bands of 8 bits, 19 × 16 pixels)"
    for text in (
        b"",
        b"text",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"\x89PNG\r\n\x1a\n",
        b"\0\0\0\x0cjP  \xff\x4f\xff\x51",
    ):
        (tmp_path / "a.tif").write_bytes(text)
        assert said(tmp_path / "a.tif").startswith("not an image")
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("module", "name"), [("tifffile", "a.tif"), ("imagecodecs", "a.png"), ("imagecodecs", "a.jp2")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name):
    tiff(tmp_path / "a.tif", DEEP[..., :3], photometric="rgb")
    png16(tmp_path / "a.png", DEEP[..., :3])
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(DEEP[..., :3].copy(), level=0))
    monkeypatch.setitem(sys.modules, module, None)
    assert said(tmp_path / name) == (
        f"3 bands of 16 bits, 19 × 16 pixels, to read which needs {module}: pip install 'ntdne_kernels[geo]'"
    )
    png16(tmp_path / "grey.png", DEEP[..., 0])
    assert np.array_equal(decode(tmp_path / "grey.png", (1,)), DEEP[..., :1])
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.tif", compression="tiff_lzw")
    assert decode(tmp_path / "plain.tif").shape == (4, 4, 3)


def test_the_limit_of_pixels_is_ours_and_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit, which 304 pixels would exceed
    Image.fromarray(SHALLOW[..., :3]).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tiff(tmp_path / "a.tif", DEEP)):
        assert "19 × 16 pixels, more than the 303 pixels that --max-pixels admits" in said(path, max_pixels=303)
        assert decode(path, max_pixels=304).shape[:2] == (16, 19)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_threads_leave_pillows_limit_as_it_was(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.fromarray(SHALLOW[..., :3]).save(tmp_path / "a.png")
    threads = [threading.Thread(target=lambda: [decode(tmp_path / "a.png") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_jpeg_may_be_read_at_a_fraction_of_its_size(tmp_path):
    Image.new("RGB", (640, 320), (200, 100, 50)).save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg").shape == (320, 640, 3)
    small = decode(tmp_path / "a.jpg", smallest=70)
    assert small.shape == (80, 160, 3)
    assert np.allclose(small, [200, 100, 50], atol=3)


# Sizes and pictures


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_depth_is_resized_alike(dtype):
    whole = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    expected = np.asarray(Image.fromarray(whole).resize((7, 7), Image.Resampling.BILINEAR)).astype(float)
    bands = whole.repeat(2, axis=-1).astype(dtype)
    found = resized(bands, 7)
    assert found.dtype == dtype
    assert np.allclose(found, expected.repeat(2, axis=-1), atol=1)
    assert np.array_equal(resized(whole, 7), expected)


def test_pictures_of_any_bands_are_colours_of_8_bits():
    assert as_picture(SHALLOW[..., :3]) is not None
    assert np.array_equal(as_picture(SHALLOW[..., :3]), SHALLOW[..., :3])
    for bands in (DEEP, DEEP[..., :2], DEEP.astype(np.float32) / 1e4, np.stack([DEEP, DEEP])):
        shown = as_picture(bands)
        assert shown.dtype == np.uint8
        assert shown.shape == (*bands.shape[:-1], 3)
        assert shown.min() == 0
        assert shown.max() == 255
    assert as_picture(np.zeros((2, 2, 5), np.uint16)).max() == 0


def test_an_unknown_stream_is_no_image(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, DEEP)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert said(tmp_path / "a.png") == "not an image"
