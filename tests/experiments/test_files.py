"""Files that are complete or absent."""

import re

import pytest

from ntdne_kernels.experiments.files import write_whole


def test_full_disk_is_told_by_the_file_and_leaves_no_part_of_it(tmp_path):
    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{tmp_path / 'table'}'")):
        write_whole(tmp_path / "table", fill)
    assert not list(tmp_path.iterdir())
