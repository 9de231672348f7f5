"""Files that are complete or absent, and folders that are of one source and one process."""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from ntdne_kernels.experiments import files
from ntdne_kernels.experiments.files import check_source, locked, write_whole


def test_full_disk_is_told_by_the_file_and_leaves_no_part_of_it(tmp_path):
    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{tmp_path / 'table'}'")):
        write_whole(tmp_path / "table", fill)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_of_one_source(tmp_path):
    record = tmp_path / "record.json"
    check_source(record, "/a/photos")  # new, or of a version that recorded none
    record.write_text(json.dumps({"source": "/a/ph\udcf6tos"}))
    check_source(record, "/a/ph\udcf6tos")
    with pytest.raises(ValueError, match="holds what was made of /a/ph.tos, and would be replaced by .* of /b/photos;"):
        check_source(record, "/b/photos")
    for text in ("[]", "{}", '{"source": ""}'):
        record.write_text(text)
        check_source(record, "/b/photos")


def test_a_locked_folder_is_refused_and_nothing_is_in_it(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked(folder):
        assert not folder.exists()
        with pytest.raises(ValueError, match="another process writes to .*out; give another folder, or wait"):
            locked(tmp_path / "new" / "." / "out").__enter__()
        with locked(tmp_path / "new" / "other"):
            pass
    with locked(folder):
        pass
    assert not (tmp_path / "new").exists()


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    """In a process without torch, whose import takes seconds."""
    script = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.locked(files.Path({str(tmp_path / "out")!r})):
    print("locked", flush=True)
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match="another process writes"):
        locked(tmp_path / "out").__enter__()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOLCK])
def test_where_no_lock_can_be_had_that_is_said_and_work_goes_on(tmp_path, monkeypatch, capsys, code):
    def none(_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.FileLock, "acquire", none)
    (tmp_path / ".out.lock").touch()  # of another user
    with locked(tmp_path / "out"):
        write_whole(tmp_path / "table", lambda file: file.write(b"1"))
    assert (tmp_path / ".out.lock").exists()
    said = f"out is not locked ({os.strerror(code)}): start nothing else that writes there"
    assert said in capsys.readouterr().err
