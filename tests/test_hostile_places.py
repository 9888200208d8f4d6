"""A thousand places where no input or output can be, and odd names that work. As in test_hostile.py."""

# ruff: noqa: B023  every function made in a loop is called before the next turn

import shutil

import pytest
from conftest import tiny_recipe
from hostile_inputs import link, make, make_overlay, places
from hostile_texts import text_paths
from hostile_values import WORDS

from elastic_sparsity import (
    ElasticModel,
    choose_level,
    copy_level,
    export_level,
    export_peft,
    load_packed,
    optimize,
    read_recipe,
    restore_overlay,
    save_sliced,
    upgrade,
    verify,
    write_overlay,
)
from elastic_sparsity import levels as list_levels
from elastic_sparsity.bench import bench
from elastic_sparsity.device_profile import read_profile
from elastic_sparsity.models import load_base

pytest_plugins = ("hostile_fixtures",)
pytestmark = pytest.mark.usefixtures("judged")

ONE_WINDOW = ("--window", "64", "--max-windows", "1", "-q")
ONE_TOKEN = ("--prompt", "2", "--new-tokens", "1", "--repeats", "1", "--batch", "1")
ODD_NAMES = (
    "[/red]", "[bold", "\\\\[x", "a[0]", "\udcff", "é", "a\nb", "\x1b[2J", "\a", " ", "-x", "--level", "%s", "{0}", "~",
    "*", "a" * 200, "\u202eb",
)  # fmt: skip


def test_recipe_paths(ledger, tmp_path):
    for words, path in {
        **places(tmp_path),
        **{x: x for x in WORDS},
        "endless": link(tmp_path / "endless", "/dev/zero"),
        "random": link(tmp_path / "random", "/dev/urandom"),
    }.items():
        ledger.api("read_recipe", lambda: read_recipe(path), case=words)
        ledger.cli("train", path, "--output", ledger.out, "-q", case=f"recipe {words}")


def test_paths_of_checkpoints(ledger, tiny_checkpoint, tmp_path, text_file):
    """What should be a checkpoint's folder is something else."""
    everything = {
        **places(tmp_path),
        **{x: x for x in WORDS},
        **{f"text {k}": v for k, v in text_paths(make(tmp_path / "texts")).items()},
        "text file": text_file,
    }
    for words, path in everything.items():
        for name, call in {
            "from_pretrained": lambda: ElasticModel.from_pretrained(path, 0.7),
            "levels": lambda: list_levels(path),
            "verify": lambda: verify(path),
            "choose_level": lambda: choose_level(path, max_bytes=10**9),
            "copy_level": lambda: copy_level(path, 0.7, ledger.out),
            "upgrade": lambda: upgrade(path, tiny_checkpoint, 0.7),
            "write_overlay": lambda: write_overlay(path, ledger.out),
            "restore_overlay": lambda: restore_overlay(path, ledger.out),
            "load_packed": lambda: load_packed(path),
            "export_peft": lambda: export_peft(path, ledger.out),
            "bench": lambda: bench(path, prompt=2, new_tokens=1, repeats=1, batches=(1,)),
            "read_profile": lambda: read_profile(path),
            "load_base": lambda: load_base(str(path)),
        }.items():
            ledger.api(name, call, case=f"path {words}")
        for arguments in (
            ["inspect", path],
            ["slice", path, "--level", "0.7", "--output", ledger.out],
            ["eval", path, "--text", text_file, "-q"],
            ["overlay", path, "--output", ledger.out],
            ["restore", path, "--output", ledger.out],
            ["export-peft", path, "--output", ledger.out],
            ["slice", tiny_checkpoint, "--max-ms-per-token", "1", "--device-profile", path, "--output", ledger.out],
            ["bench", path, "-q"],
            ["plan", "smoke", "--no-probe", "--model", path],
            ["plan", "smoke", "--no-probe", "--config", path],
            ["upgrade", path, "--from", tiny_checkpoint, "--level", "0.7"],
            ["export", path, "--level", "0.7", "--format", "bitmask", "--output", ledger.out],
        ):
            ledger.cli(*arguments, case=f"{arguments[0]} path {words}")


def test_places_for_outputs(ledger, tiny_checkpoint, tmp_path, quick):
    room = make(tmp_path / "places")
    overlay = make_overlay(ledger.room / "overlays")
    for words, place in places(room).items():
        for name, call in {
            "optimize": lambda: optimize(tiny_recipe(), place),
            "save_sliced": lambda: save_sliced(tiny_checkpoint, 0.7, place),
            "copy_level": lambda: copy_level(tiny_checkpoint, 0.7, place),
            "export_level": lambda: export_level(tiny_checkpoint, 0.7, place, "bitmask"),
            "export_peft": lambda: export_peft(tiny_checkpoint, place),
            "write_overlay": lambda: write_overlay(overlay / "checkpoint", place),
            "restore_overlay": lambda: restore_overlay(overlay / "overlay", place),
        }.items():
            ledger.api(name, call, case=f"output {words}", inputs=[room])
        for arguments in (
            ["train", quick, "-q", "--output", place],
            ["train", quick, "-q", "--restart", "--output", place],
            ["demo", "-q", "--output", place],
            ["slice", tiny_checkpoint, "--level", "0.7", "--output", place],
            ["slice", tiny_checkpoint, "--max-bytes", "9MB", "--output", place],
            ["export", tiny_checkpoint, "--level", "0.7", "--format", "bitmask", "--output", place],
            ["export-peft", tiny_checkpoint, "--output", place],
            ["overlay", overlay / "checkpoint", "--output", place],
            ["restore", overlay / "overlay", "--output", place],
        ):
            ledger.cli(*arguments, inputs=[room], case=f"{arguments[0]} output {words}")


def test_odd_names(ledger, tiny_checkpoint, tmp_path, quick, streamed, text_file):
    """Names that are nothing to the disk but something to a terminal, to markup, or to UTF-8."""
    for name in ODD_NAMES:
        room = tmp_path / name
        whole, plain, part = room / "c", room / "s", room / "e"
        shutil.copytree(tiny_checkpoint, whole)
        for arguments in (
            ["inspect", whole],
            ["inspect", whole, "--verify"],
            ["slice", whole, "--level", "0.7", f"--output={plain}"],
            ["slice", whole, "--max-bytes", "1GB", f"--output={part}"],
            ["upgrade", part, "--from", whole, "--level", "0.7"],
            ["export", whole, "--level", "0.7", "--format", "bitmask", f"--output={room / 'b'}"],
            ["export-peft", whole, f"--output={room / 'p'}"],
            ["eval", plain, "--text", text_file, *ONE_WINDOW, f"--output={room / 'e.json'}"],
            ["eval", whole, "--text", room / "none.txt", *ONE_WINDOW],
            ["train", quick, "-q", f"--output={room / name}"],
            ["train", quick, "-q", f"--model={plain}", f"--output={room / 'm'}"],
            ["train", streamed, "-q", f"--model={plain}", f"--output={room / 'n'}"],
            ["slice", whole, f"--level={name}", f"--output={room / 'x'}"],
            ["bench", whole, *ONE_TOKEN, "--level", "0.7", f"--name={name}", f"--output={room / 'd.json'}"],
            ["slice", whole, "--max-ms-per-token=1e5", f"--device-profile={room / 'd.json'}", f"--output={room / 'f'}"],
        ):
            ledger.cli(*arguments, case=f"{arguments[0]} beside {name!r}", damage_code=1)
