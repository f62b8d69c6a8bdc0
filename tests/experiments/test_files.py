"""Files that are there as a whole, and folders of one command alone."""

import errno
import os
from pathlib import Path

import pytest

from experiments.files import alone, replace_text


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_text(path, "one")
    replace_text(path, "two")
    assert path.read_text() == "two"

    def full(path, *args):
        with path.open("w") as file:
            file.write("th")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "three")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_one_commands(tmp_path):
    folder = tmp_path / "new" / "folder"
    with (
        alone(folder, "be patient"),
        pytest.raises(OSError, match=r"another command is at work in .* or be patient"),
        alone(folder, "be patient"),
    ):
        pass
    with alone(folder, "be patient"):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with alone(tmp_path, "be patient"):
        pass
