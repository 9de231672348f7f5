"""Decodes image files into pixels: for training, for embedding and for the pages.

Shapes: H × W pixels of B bands.
"""

import importlib
import io
import json
import math
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

MAX_PIXELS = 178_956_970  # Pillow's own limit, against files made to fill the memory
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
PLUGIN_MODULES = ("pillow_heif.HeifImagePlugin", "pillow_jxl")
NEED_PLUGINS = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "WMF",
}  # formats that Pillow identifies but cannot read by itself
DISPLAY_RANGE = (2, 98)  # percentiles that become black and white on a page
ORIENTATION, NO_DATA = 274, 42113  # tags of EXIF and TIFF, and of GDAL
Pixels = NDArray[Any]


class Unreadable(ValueError):
    """Why a file gives no pixels, and what it is."""


class _Header(NamedTuple):
    """What a file's header says."""

    bands: int
    bits: int
    width: int
    height: int

    def __str__(self) -> str:
        bands = "1 band" if self.bands == 1 else f"{self.bands} bands"
        return f"{bands} of {self.bits} bits, {self.width} × {self.height} pixels"


class _Samples(NamedTuple):
    """The samples of a file, as they are stored."""

    pixels: Pixels
    """(H, W, B)."""
    alpha: int = 0
    """Whether the last band is opacity, as TIFF counts: 0 no, 1 multiplied into the others, 2 not multiplied."""
    orientation: int = 1
    """As in EXIF."""


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of files that can be read, in lower case: all that Pillow and its plugins read."""
    for module in PLUGIN_MODULES:
        with suppress(ImportError):
            importlib.import_module(module)
    Image.init()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN and name not in NEED_PLUGINS)


def decode(
    path: str | Path,
    bands: Sequence[int] = (),
    max_pixels: int = MAX_PIXELS,
    smallest: int = 0,
    white: float | None = None,
) -> Pixels:
    """The pixels of an image file, (H, W, B), upright.

    Files of 8 bits give uint8, those of up to 16 bits uint16 in full range, all others float32 as stored (integers
    beyond 2^24 rounded). Grey becomes three equal bands. Pixels that are transparent, hold GDAL's value for no data, or
    are not finite become black, which is 0. Of several pictures the first is read; pages of a TIFF that are alike and
    of one band each are bands. AVIF and HEIF of more than 8 bits give 8, as Pillow decodes them.

    Args:
        path: the file.
        bands: those to take, counted from 1, as the file stores them: grey is not repeated, and transparency is a band
            like any other. All by default.
        max_pixels: files of more pixels H·W are not read.
        smallest: a JPEG may be decoded at a fraction of its size, but with at least this many pixels a side. 0: at full
            size.
        white: of files of more than 8 bits, integers or floats, the stored value that becomes 65535 of uint16, as 0
            becomes 0; values outside are clipped. Reflectance is often stored as 0 to 10,000. None: as said above.

    Raises:
        Unreadable: the file is no image, is broken, larger than max_pixels, has no such band, or has more depth than
            can be kept.
        OSError: the file cannot be opened.
    """
    suffixes()  # registers the plugins
    data = Path(path).read_bytes()
    try:
        header, read = _identify(data, smallest)
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # Pillow raises SyntaxError, struct.error, KeyError, and more for broken headers
        raise Unreadable(f"not an image that can be read: {_reason(error)}") from None
    if header.width * header.height > max_pixels:
        raise Unreadable(f"{header}, more than the {max_pixels} pixels that --max-pixels admits")
    try:
        samples = read()
        pixels = _upright(_plain_type(samples.pixels), samples.orientation)
    except UnidentifiedImageError:
        raise Unreadable(f"not an image that Pillow can read ({header})") from None
    except ImportError as error:
        raise Unreadable(f"{header}, to read which needs {error.name}: pip install 'ntdne_kernels[geo]'") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, and more
        raise Unreadable(f"{_reason(error)} ({header})") from None
    if bands:
        if max(bands) > pixels.shape[-1]:
            raise Unreadable(f"there is no band {max(bands)} ({header})")
        pixels = pixels[..., [band - 1 for band in bands]]
    else:
        pixels = _colours(pixels, samples.alpha)
    return np.ascontiguousarray(pixels if white is None else _up_to(white, pixels, header.bits))


def resized(pixels: Pixels, image_size: int) -> Pixels:
    """Pixels (H, W, B) as (image_size, image_size, B) of their type, whatever their aspect: bilinear, antialiased."""
    size = (image_size, image_size)
    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    bands = [Image.fromarray(band.astype(np.float32)) for band in np.moveaxis(pixels, -1, 0)]
    small = np.stack([np.asarray(band.resize(size, Image.Resampling.BILINEAR)) for band in bands], axis=-1)
    return (small if pixels.dtype == np.float32 else small.round()).astype(pixels.dtype)


def as_picture(pixels: Pixels) -> Pixels:
    """Pixels (..., H, W, B) as people can look at them: (..., H, W, 3) uint8.

    Colours of 8 bits stay as they are. Of others the first three bands are shown, or the first one as grey, each
    picture stretched over the range of its own values.
    """
    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return pixels
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    low, high = np.percentile(shown, DISPLAY_RANGE, axis=(-3, -2, -1), keepdims=True).astype(np.float32)
    stretched = (shown - low) / np.where(high > low, high - low, 1)
    return np.asarray(255 * stretched.clip(0, 1)).round().astype(np.uint8)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# What a file is, and which library reads it


def _identify(data: bytes, smallest: int) -> tuple[_Header, Callable[[], _Samples]]:
    """The header of a file, and the function that reads its samples: with Pillow where that keeps bits and bands."""
    if pages := _tiff_pages(data):
        header, by_pillow = _tiff_header(pages)
        if not by_pillow:
            return header, partial(_by_tifffile, data, header, pages[0])
        return header, lambda: _by_pillow(_open(data), smallest, pages[0].get(NO_DATA))
    if (at := _jpeg2000(data)) >= 0:
        header = _jpeg2000_header(data, at)
        if header.bands > 4 or (header.bands > 1 and header.bits > 8):
            return header, partial(_jpeg2000_by_imagecodecs, data, header)
        return header, lambda: _by_pillow(_open(data), smallest)
    image = _open(data)
    header = _Header(len(image.getbands()), _bits(image), *image.size)
    if image.format == "PNG" and header.bits == 16 and (image.mode != "I;16" or image.has_transparency_data):
        return header, partial(_png_by_imagecodecs, data, image)
    if header.bits > 8 and image.mode[0] not in "IF":
        return header, partial(_by_nobody, header)
    return header, partial(_by_pillow, image, smallest)


_opening = threading.Lock()


def _open(data: bytes) -> Image.Image:
    with _opening:  # Pillow's limit is global and raises; `decode` checks its own instead
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _bits(image: Image.Image) -> int:
    """Bits of a sample in the file; Pillow's mode may have fewer."""
    if image.mode[0] in "IF":
        return 16 if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I") else 32
    tiles = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles else ()
    rawmode, *others = arguments if isinstance(arguments, tuple) and arguments else (arguments,)
    deep = str(rawmode).endswith((";16B", ";16L", ";16N")) or (tiles and tiles[0].codec_name == "SGI16")
    largest = others[0] if image.format == "PPM" and others else 0
    return 16 if deep or largest > 255 else 1 if image.mode == "1" else 8


def _tiff_pages(data: bytes) -> list[ImageFileDirectory_v2]:
    """The tags of a TIFF's pages that are as large as its first one, without overviews and masks; [] of other files."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return []
    header = data[: 16 if b"+" in data[2:4] else 8]
    pages: list[ImageFileDirectory_v2] = []
    file, seen = io.BytesIO(data), {0}
    tags = ImageFileDirectory_v2(header)
    while tags.next not in seen:
        seen.add(tags.next)
        file.seek(tags.next)
        tags = ImageFileDirectory_v2(header)
        tags.load(file)
        overview_or_mask = tags.get(254, 0) & 0b101
        if not pages or (not overview_or_mask and all(tags.get(size) == pages[0][size] for size in (256, 257))):
            pages.append(tags)
    return pages


def _tiff_header(pages: list[ImageFileDirectory_v2]) -> tuple[_Header, bool]:
    """The header of a TIFF, and whether Pillow reads all of its samples."""
    tags = pages[0]
    samples, bits = tags.get(277, 1), max(tags.get(258, (1,)))
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}.get(tags.get(262, 1))  # of each photometric interpretation
    complete = samples == colours or (samples - 1 == colours and tags.get(338, (0,))[0] in (1, 2))
    formats = set(tags.get(339, (1,)))  # 1: unsigned, 2: signed, 3: floats
    deep_grey = samples == 1 and tags.get(262, 1) == 1 and (bits, *formats) in {(16, 1), (16, 2), (32, 2), (32, 3)}
    shallow = (bits <= 8 and formats == {1}) or deep_grey
    if bands_last := _rows_as_pages(pages):
        height, width, bands = bands_last
        return _Header(bands, bits, width, height), False
    return _Header(samples * len(pages), bits, tags[256], tags[257]), len(pages) == 1 and complete and shallow


def _rows_as_pages(pages: list[ImageFileDirectory_v2]) -> list[int]:
    """(H, W, B) of an array that tifffile wrote as H pages; [] for other files.

    Unless told of the bands, tifffile writes each row as a page, and notes the array's shape. The last axis holds the
    bands where it is the shortest.
    """
    try:
        shape: list[int] = json.loads(pages[0].get(270, ""))["shape"]
    except (ValueError, TypeError, LookupError):
        return []
    return shape if len(pages) > 1 and len(shape) == 3 and shape[2] < min(shape[:2]) else []


def _jpeg2000(data: bytes) -> int:
    """Where a JPEG 2000 codestream begins, or −1."""
    at = data.find(b"\xff\x4f\xff\x51")
    return at if at >= 0 and (at == 0 or data[4:8] == b"jP  ") else -1


def _jpeg2000_header(data: bytes, at: int) -> _Header:
    """The sizes in the marker segment SIZ (ISO/IEC 15444-1, A.5.1)."""
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    (components,) = struct.unpack_from(">H", data, at + 40)
    bits = max(data[at + 42 + 3 * component] % 128 + 1 for component in range(components))
    return _Header(components, bits, right - left, bottom - top)


# The readers


def _by_pillow(image: Image.Image, smallest: int, no_data: str | None = None) -> _Samples:
    if smallest:
        image.draft(None, (smallest, smallest))
    image.load()
    if image.mode[0] in "IF":
        pixels = np.asarray(image)[..., None]
        deep = pixels.astype(np.uint16) if image.format == "PPM" and image.mode == "I" else pixels
        return _Samples(_without_no_data(deep, no_data), 0, _orientation(image))
    if image.has_transparency_data:
        mode = "LA" if image.mode in ("L", "LA", "La") and "transparency" not in image.info else "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    pixels = np.asarray(image.convert(mode))
    pixels = _without_no_data(pixels[..., None] if pixels.ndim == 2 else pixels, no_data)
    return _Samples(pixels, 2 if mode.endswith("A") else 0, _orientation(image))


def _by_tifffile(data: bytes, header: _Header, tags: ImageFileDirectory_v2) -> _Samples:
    from tifffile import TiffFile

    if tags.get(262, 1) not in (0, 1, 2):
        raise ValueError(f"a TIFF of photometric interpretation {tags[262]}")
    with TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        pixels, axes = series.asarray(squeeze=False), series.get_axes(squeeze=False)
    if (header.height, header.width) == (tags[257], tags[256]):
        pixels = np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (0, 1))
    else:
        pixels = pixels.reshape(header.height, header.width, header.bands)
    others = [n for n in pixels.shape[2:] if n > 1]
    if len(others) > 1:
        raise ValueError(f"a stack of {math.prod(others) // tags.get(277, 1)} pages of {tags.get(277, 1)} bands")
    pixels = _without_no_data(pixels.reshape(*pixels.shape[:2], -1), tags.get(NO_DATA))
    if pixels.dtype.kind == "u":
        pixels = _in_full_range(pixels, header.bits)
        pixels = np.iinfo(pixels.dtype).max - pixels if tags.get(262, 1) == 0 else pixels  # 0 is white
    alpha = tags.get(338, (0,))[-1] if header.bands == tags.get(277, 1) else 0
    return _Samples(pixels, alpha if alpha in (1, 2) else 0, tags.get(ORIENTATION, 1))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF raises many exceptions, and the picture is fine without it
        return 1


def _png_by_imagecodecs(data: bytes, image: Image.Image) -> _Samples:
    """A PNG of 16 bits; Pillow keeps 8 of them unless it is grey and opaque."""
    from imagecodecs import png_decode

    pixels = png_decode(data)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return _Samples(pixels, 2 if pixels.shape[-1] in (2, 4) else 0, _orientation(image))


def _jpeg2000_by_imagecodecs(data: bytes, header: _Header) -> _Samples:
    """A JPEG 2000 of several bands of more than 8 bits, of which Pillow keeps 8, or of more than 4 bands."""
    from imagecodecs import jpeg2k_decode

    pixels = jpeg2k_decode(data)
    pixels = _in_full_range(pixels, header.bits) if pixels.dtype.kind == "u" else pixels
    return _Samples(pixels, 2 if header.bands in (2, 4) else 0)


def _by_nobody(header: _Header) -> _Samples:
    raise ValueError(f"Pillow would keep 8 of the {header.bits} bits; PNG and TIFF are read whole")


# Values


def _in_full_range(pixels: Pixels, bits: int) -> Pixels:
    """Unsigned integers of fewer bits than their type, as 12 of 16, scaled to its full range."""
    if bits >= 8 * pixels.dtype.itemsize:
        return pixels
    largest = np.iinfo(pixels.dtype).max
    return np.asarray(pixels * (largest / (2**bits - 1))).round().astype(pixels.dtype)


def _without_no_data(pixels: Pixels, no_data: str | None) -> Pixels:
    """Pixels with 0 in place of the value of GDAL's tag for no data."""
    try:
        value = float(str(no_data).strip("\0 "))
    except ValueError:
        return pixels
    if pixels.dtype.kind == "f":
        value = pixels.dtype.type(value)
    return np.asarray(np.where(pixels == value, 0, pixels), pixels.dtype)


def _plain_type(pixels: Pixels) -> Pixels:
    """uint8, uint16, or finite float32."""
    if pixels.dtype.kind == "c":
        raise ValueError("complex numbers, which are no picture; give their magnitude")
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(pixels.dtype.newbyteorder("="))
    return np.nan_to_num(pixels.astype(np.float32), nan=0, posinf=0, neginf=0)


def _up_to(white: float, pixels: Pixels, bits: int) -> Pixels:
    """uint16 in which 65535 is the stored value `white`, of uint16 of so many bits in full range, or of float32.

    uint8 stays as it is.
    """
    if pixels.dtype == np.uint8:
        return pixels
    largest = np.float32(white * 65535 / (2**bits - 1) if pixels.dtype == np.uint16 else white)
    return np.asarray((pixels.clip(0, largest) * (65535 / largest)).round(), np.uint16)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def _colours(pixels: Pixels, alpha: int) -> Pixels:
    """Pixels without opacity, grey as three equal bands."""
    colours = _over_black(pixels, alpha) if alpha else pixels
    return colours.repeat(3, axis=-1) if colours.shape[-1] == 1 else colours


def _over_black(pixels: Pixels, alpha: int) -> Pixels:
    """Colours (H, W, B − 1) over black; the last band of the pixels is their opacity."""
    colours, opacity = pixels[..., :-1], pixels[..., -1:]
    if alpha == 1:
        return colours
    if pixels.dtype == np.float32:
        return colours * opacity
    largest = np.iinfo(pixels.dtype).max
    return ((colours.astype(np.uint32) * opacity + largest // 2) // largest).astype(pixels.dtype)
