"""The cache of decoded images: one .npy file for each archive and way of decoding it, written once.

Beside it a .json file holds why files could not be read, and a .lock file lets one process at a time decode.

Shapes: N images of H × W pixels in B bands.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.sources import ArchiveError, Decoding, Source

CACHE_VERSION = 2  # to be raised whenever the same files would give other bytes
EIGHT_BITS = np.dtype(np.uint8)


def decoded_images(source: Source, decoding: Decoding, cache: Path) -> tuple[Path, dict[str, str]]:
    """The file (N, H, W, B) of an archive's readable images, decoded where the cache does not have it.

    Returns:
        The .npy file, and the reason why each unreadable file is not in it.

    Raises:
        ArchiveError: the cache cannot be written, or the images differ in their bands.
    """
    path = cache / f"{_key(source, decoding)}.npy"

    def unreadable() -> dict[str, str]:
        reasons: dict[str, str] = json.loads(path.with_suffix(".json").read_text())["unreadable"]
        return reasons

    def usable() -> bool:
        # A file on a network, say, may have become readable without a change of its size and time.
        return path.exists() and all(isinstance(decoding.read(str(source.folder / file)), str) for file in unreadable())

    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not usable():
            with FileLock(path.with_suffix(".lock")):
                if not usable():  # another process may have decoded it in the meantime
                    _write(source, path)
        return path, unreadable()
    except OSError as error:
        raise ArchiveError(
            f"decoded images cannot be kept in {cache}: {error.strerror or error}; --cache names another folder"
        ) from error


def _key(source: Source, decoding: Decoding) -> str:
    limit = [] if decoding.max_pixels == MAX_PIXELS else [f"{decoding.max_pixels} pixels"]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, decoding.image_size, *decoding.bands, *limit]).encode())
    for each in source.identity:
        key.update(b"\0" + os.fsencode(each))
    return key.hexdigest()[:32]


def _write(source: Source, path: Path, dtype: np.dtype[Any] = EIGHT_BITS) -> None:
    """Decode into `path` and its .json, so that `path` exists only when both are complete.

    All images get the type of the first one, or `dtype` where that has more bits. Where a later image has more still,
    writing starts over with its type: archives of mixed depth are rare.
    """
    temporary = path.with_suffix(".tmp")
    unreadable: dict[str, str] = {}
    first, shape = "", (0, 0, 3)
    deeper: np.dtype[Any] | None = None
    path.unlink(missing_ok=True)  # it has other unreadable files
    try:
        with open(temporary, "wb") as file:  # not a memory map: there a full disk would kill the process

            def write_header(N: int) -> None:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (N, *shape)}
                np.lib.format.write_array_header_1_0(file, header)

            progress = tqdm(source.images(), f"Decoding {source.name}", len(source.files), unit="image", disable=None)
            for name, image in zip(source.files, progress, strict=True):
                if isinstance(image, str):
                    unreadable[name] = image
                    continue
                if file.tell() == 0:
                    first, shape, dtype = name, image.shape, max(dtype, image.dtype, key=lambda each: each.itemsize)
                    write_header(len(source.files))
                _check_alike(first, shape[-1], dtype, name, image)
                if image.dtype.itemsize > dtype.itemsize:
                    deeper = image.dtype
                    break
                file.write(_as_dtype(image, dtype).tobytes())
            file.seek(0)
            write_header(len(source.files) - len(unreadable))  # as long as the first: NumPy leaves room for the count
        if deeper is not None:
            return _write(source, path, deeper)
        path.with_suffix(".json").write_text(json.dumps({"archive": source.name, "unreadable": unreadable}, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_alike(first: str, bands: int, dtype: np.dtype[Any], name: str, image: NDArray[Any]) -> None:
    if image.shape[-1] != bands or (image.dtype.kind != dtype.kind):
        raise ArchiveError(
            f"{name} has {image.shape[-1]} bands of {image.dtype}, and {first} {bands} of {dtype}; expected the same "
            "bands in all images of an archive, of integers or of floats; --bands chooses some that all have"
        )


def _as_dtype(image: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return image if image.dtype == dtype else image.astype(dtype) * 257  # 255 becomes 65535
