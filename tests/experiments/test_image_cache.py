"""The cache of decoded images: what it keeps, what makes it decode again, and that a file is complete or absent."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from ntdne_kernels.experiments import sources
from ntdne_kernels.experiments.archive import open_archive
from ntdne_kernels.experiments.sources import Decoding
from tests.experiments.helpers import complaint, spoil, write_archive, write_image


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
    def interrupted(decoding: Decoding, path: str) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_archive(str(folder), 4, cache=cache)
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}
    assert len(open_archive(str(folder), 4, cache=cache).images) == 7


def test_a_process_killed_half_way_leaves_no_broken_cache(folder, cache):
    decode_all = sources._decode_all

    def killed(paths: list[str], decoding: Decoding) -> object:
        for i, image in enumerate(decode_all(paths, decoding)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield image

    def open_and_die() -> None:
        sources._decode_all = killed
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
        read = Decoding.read

        def noting(decoding: Decoding, path: str) -> object:
            with open(log, "a") as file:
                file.write(f"{path}\n")
            time.sleep(0.1)  # long enough for all to decode, were there no lock
            return read(decoding, path)

        Decoding.read = noting
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


def test_the_cache_remembers_unreadable_files(folder, cache, decoded):
    spoil(folder / "Forest" / "1.png", "text")
    first = open_archive(str(folder), 4, cache=cache, skip_unreadable=True)
    assert len(decoded) == 7
    decoded.clear()
    second = open_archive(str(folder), 4, cache=cache, skip_unreadable=True)
    assert (second.files, second.skipped) == (first.files, first.skipped)
    assert (second.images == first.images).all()
    assert "Forest/1.png cannot be read" in complaint(str(folder), 4, cache=cache)
    assert set(decoded) == {"1.png"}  # only the unreadable file is tried again


def test_a_file_that_has_become_readable_without_a_change_is_read(folder, cache, monkeypatch):
    read = Decoding.read

    def failing(decoding: Decoding, path: str) -> object:
        return "Input/output error" if "Forest/1" in path else read(decoding, path)

    with monkeypatch.context() as broken:
        broken.setattr(Decoding, "read", failing)
        assert "Input/output error" in complaint(str(folder), 4, cache=cache)
    archive = open_archive(str(folder), 4, cache=cache)
    assert len(archive.images) == 7
    assert archive.skipped == []
