"""Writing single files: whole or not at all, and never over what is no file."""

import errno
import os
import stat
from pathlib import Path

import pytest

from elastic_sparsity.errors import OutputError
from elastic_sparsity.files import atomic_folder, check_output_file, check_output_folder, sync_path, write_json


@pytest.mark.parametrize("write", [check_output_file, lambda path: write_json(path, {})])
def test_what_is_no_file_is_never_replaced(write, tmp_path):
    """A pipe stands for a device such as /dev/null, which needs root to make."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(OutputError, match="is no file"):
            write(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert folder.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_file_is_replaced(tmp_path):
    (tmp_path / "a").write_text("before")
    write_json(tmp_path / "a", {"b": 1})
    assert (tmp_path / "a").read_text() == '{\n  "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_working_directory_is_no_output(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="is the working directory, which cannot be replaced"):
        check_output_folder(Path(name))
    with atomic_folder(Path("new")) as scratch:
        (scratch / "a").write_text("b")
    assert (tmp_path / "here" / "new" / "a").read_text() == "b"


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_written_all_the_same(call, tmp_path, monkeypatch):
    """Windows opens no folder, and some file systems sync none."""
    real = getattr(os, call)

    def refusing(what, *args):
        if os.path.isdir(what):  # noqa: PTH112  a descriptor too
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(what, *args)

    monkeypatch.setattr(os, call, refusing)
    sync_path(tmp_path)
    with atomic_folder(tmp_path / "new") as scratch:
        (scratch / "a").write_text("b")
    assert (tmp_path / "new" / "a").read_text() == "b"


def test_a_disk_that_is_full_only_when_a_file_is_synced(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"), atomic_folder(tmp_path / "new") as scratch:
        (scratch / "a").write_text("b")
    with pytest.raises(OutputError, match="No space left on device"):
        write_json(tmp_path / "c", {}, sync=True)
    assert list(tmp_path.iterdir()) == []
