"""Writing single files: whole or not at all, and never over what is no file."""

import os
import stat
from pathlib import Path

import pytest

from elastic_sparsity.errors import OutputError
from elastic_sparsity.files import atomic_folder, check_output_file, check_output_folder, write_json


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
