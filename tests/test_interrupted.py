"""A disk that fills up, or fails, at any moment: what was to be written is absent or whole, what was there unchanged.

Only a run keeps something: its finished blocks in `<output>.run`, from which it then goes on.

Two enemies: the N-th file, folder or renaming fails, for every N until all goes well; and a real file system of a few
kilobytes, or a few files, into which libraries write that no patch reaches.
"""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
from conftest import merging_tokenizer, tiny_recipe
from hostile import fingerprint
from safetensors import SafetensorError

from elastic_sparsity import (
    ElasticCheckpoint,
    copy_level,
    export_level,
    export_peft,
    optimize,
    restore_overlay,
    save_sliced,
    upgrade,
    verify,
    write_overlay,
)
from elastic_sparsity.device_profile import read_profile, write_profile
from elastic_sparsity.errors import ElasticSparsityError, OutputError
from elastic_sparsity.tiny import tiny_model

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Counts what is made below a folder, and lets the N-th of it fail. (An audit hook can never be removed.)"""

    def __init__(self):
        self.root, self.fails_at, self.count = None, 0, 0
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.root is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, str | bytes | Path) or not os.fsdecode(path).startswith(str(self.root)):
            return
        if event != "os.mkdir" or not Path(os.fsdecode(path)).exists():  # else it would make nothing
            self.step(OSError(28, "No space left on device", os.fsdecode(path)))

    def step(self, error):
        self.count += 1
        if self.count == self.fails_at:
            raise error

    @contextlib.contextmanager
    def failing(self, root, number):
        real = safetensors.torch.serialize_file

        def serialize_file(*args, **kwargs):  # written by Rust, which no audit hook sees
            self.step(SafetensorError("I/O error: No space left on device (os error 28)"))
            return real(*args, **kwargs)

        with mock.patch.object(safetensors.torch, "serialize_file", serialize_file):
            self.root, self.fails_at, self.count = root, number, 0
            try:
                yield
            finally:
                self.root = None


@pytest.fixture(scope="session")
def disk():
    return Disk()


@pytest.fixture(scope="session")
def sources(tmp_path_factory, tiny_checkpoint):
    """Everything that the jobs read: a checkpoint whose tokenizer llama.cpp takes, one with an overlay, and that."""
    room = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_SPARSITY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        tokenizer = merging_tokenizer()
        tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(room / "model")
        tokenizer.save_pretrained(room / "model")
        recipe = tiny_recipe(model={"id": str(room / "model")}, end_to_end={"trainable": "adapters"})
        optimize(recipe, room / "checkpoint")
        write_overlay(room / "checkpoint", room / "overlay")
    return room


JOBS = {
    "optimize": lambda sources, out: optimize(tiny_recipe(), out),
    "save_sliced": lambda sources, out: save_sliced(sources / "checkpoint", 0.7, out),
    "copy_level": lambda sources, out: copy_level(sources / "checkpoint", 0.7, out),
    "write_overlay": lambda sources, out: write_overlay(sources / "checkpoint", out),
    "restore_overlay": lambda sources, out: restore_overlay(sources / "overlay", out),
    "bitmask": lambda sources, out: export_level(sources / "checkpoint", 0.7, out, "bitmask"),
    "packed-2of4": lambda sources, out: export_level(
        sources / "checkpoint", "2:4", out, "packed-2of4", dtype="float16"
    ),
    "gguf": lambda sources, out: export_level(sources / "checkpoint", 0.7, out, "gguf"),
    "export_peft": lambda sources, out: export_peft(sources / "checkpoint", out),
}


def check_nothing_left(room):
    """Or only blocks that a run has finished, which are then removed."""
    kept = room / "out.run"
    if (kept / "block-0000.safetensors").is_file():
        assert not list(kept.glob("*.partial-*"))
        shutil.rmtree(kept)
    assert not list(room.iterdir()), f"left {list(room.rglob('*'))}"


def check_whole(name, out, sources):
    if name in ("optimize", "copy_level", "restore_overlay"):
        assert all(check.passed for check in verify(out))
    assert any(out.iterdir()) and not list(out.rglob("*.partial-*"))


@pytest.mark.parametrize("name", JOBS)
def test_every_write_that_fails_leaves_nothing(name, disk, sources, tmp_path):
    before, out, number = fingerprint(sources), tmp_path / "room" / "out", 0
    out.parent.mkdir()
    while True:
        number += 1
        with disk.failing(out.parent, number):
            with contextlib.suppress(ElasticSparsityError):
                JOBS[name](sources, out)
            failed = disk.count >= number
        if not failed:
            break
        if number % 7 == 0 and (out.parent / "out.run").exists():
            JOBS[name](sources, out)  # there is room again
        if name == "optimize" and out.exists():  # gone on, or only its record of time and memory is missing
            check_whole(name, out, sources)
            shutil.rmtree(out)
        check_nothing_left(out.parent)
    assert number > 3
    check_whole(name, out, sources)
    assert fingerprint(sources) == before


def test_an_upgrade_that_fails_leaves_only_whole_files(disk, sources, tmp_path):
    device, number, whole = tmp_path / "device", 0, fingerprint(sources / "checkpoint")
    copy_level(sources / "checkpoint", 0.7, tmp_path / "fresh")
    while True:
        number += 1
        shutil.rmtree(device, ignore_errors=True)
        shutil.copytree(tmp_path / "fresh", device)
        with disk.failing(device, number):
            with contextlib.suppress(OutputError):
                upgrade(device, sources / "checkpoint", 0.5)
        held = fingerprint(device)
        assert all(whole[file] == content for file, content in held.items())
        assert held.keys() >= fingerprint(tmp_path / "fresh").keys()
        if disk.count < number:
            break
    assert number > 3
    assert all(check.passed for check in verify(device))
    assert ElasticCheckpoint(device).is_complete(ElasticCheckpoint(device).find(0.5))


def test_a_record_that_cannot_be_replaced_stays_as_it_was(disk, sources, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(sources / "checkpoint", folder)
    write_profile(read_profile("phone"), tmp_path / "p.json")
    jobs = (
        lambda: ElasticCheckpoint(folder).update_record({"quality": {"rows": []}}),
        lambda: write_profile(read_profile("laptop-avx2"), tmp_path / "p.json"),
    )
    for job in jobs:
        before, number = fingerprint(tmp_path), 1
        with disk.failing(tmp_path, 10**9):
            job()
        count, after = disk.count, fingerprint(tmp_path)
        assert count >= 2 and after != before
        for number in range(1, count + 1):
            with disk.failing(tmp_path, number), pytest.raises(OutputError, match="what was there is unchanged"):
                job()
            assert fingerprint(tmp_path) == after


@contextlib.contextmanager
def small_disk(folder, **limits):
    """A file system in memory of so many bytes or files."""
    options = ",".join(f"{key}={value}" for key, value in limits.items())
    command = ["mount", "-t", "tmpfs", "-o", options, "elastic-sparsity-test", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
            gc.collect()  # a writer that failed may still hold its file
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


SIZES = [{"size": f"{kilobytes}k"} for kilobytes in (4, 8, 12, 20, 40, 72, 108, 160, 220, 300, 2000)]
COUNTS = [{"nr_inodes": count, "size": "2000k"} for count in (2, 3, 4, 5, 6, 8, 10, 13, 40)]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("limits", [SIZES, COUNTS], ids=["bytes", "files"])
def test_a_full_disk(name, limits, sources, tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    refused = 0
    for limit in limits:
        with small_disk(mounted, **limit):
            try:
                JOBS[name](sources, mounted / "out")
            except ElasticSparsityError as error:
                refused += 1
                check_nothing_left(mounted)
                assert any(words in str(error) for words in ("space left", "os error 28", " written;")), error
                assert limit != limits[-1], error
            else:
                check_whole(name, mounted / "out", sources)
    assert refused
