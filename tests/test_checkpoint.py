"""The folder: round trip, shards, a level opens only its files, partial folders, damage gives a named error."""

import json
import os
import shutil
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from test_shells import record_of

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.checkpoint_writer import add_section, config_lock, write_checkpoint
from elastic_sparsity.errors import CheckpointError, NumericsError, OutputError, ShapeError
from elastic_sparsity.files import atomic_folder, check_output_folder
from elastic_sparsity.ladder import Ladder, StructuredLevel
from elastic_sparsity.manifest import CONFIG_NAME, digest


def test_patterns_only_ladder_round_trips(tmp_path):
    ladder = Ladder(sparsities=(), patterns=("2:4",))
    weight = torch.randn(4, 8)
    record = record_of(weight, weight.abs(), ladder)
    write_checkpoint(
        tmp_path / "c", {"w": record}, {"norm": torch.ones(3)}, ladder=ladder, ranks=[1], inheritance="shared",
        dtype="float32", record={}, save_extras=lambda folder: None,
    )  # fmt: skip
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    ((name, linear),) = checkpoint.level_linears(checkpoint.ladder.find("2:4"))
    assert name == "w" and torch.equal(linear.mask_OI, record.pattern_masks[0])


def test_shards_read_as_one(tmp_path):
    ladder = Ladder(sparsities=(0.5,), patterns=("2:4",))
    records = {f"w{i}": record_of(torch.randn(4, 8), torch.rand(4, 8), ladder) for i in range(5)}
    write_checkpoint(
        tmp_path / "c", records, {"norm": torch.ones(3)}, ladder=ladder, ranks=[1, 1], inheritance="shared",
        dtype="float32", record={}, save_extras=lambda folder: None, max_shard_bytes=150,
    )  # fmt: skip
    assert (tmp_path / "c" / "shell-core-00002-of-00003.safetensors").is_file()
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    for name, linear in checkpoint.level_linears(checkpoint.ladder.find(0.5)):
        kept = records[name].drop_level_OI > 0
        assert torch.equal(linear.weight_OI, torch.where(kept, records[name].weight_OI, 0))
    (tmp_path / "c" / "shell-core-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003.safetensors is missing"):
        ElasticCheckpoint(tmp_path / "c").open_level(ladder.levels[0])


class Lazy(Mapping):
    """Makes an item whenever it is asked for one, and counts how many of those it made are alive at once."""

    def __init__(self, makers):
        self.makers, self.alive, self.most, self.made = makers, set(), 0, 0

    def __getitem__(self, name):
        item, self.made = self.makers[name](), self.made + 1
        tensor = item if isinstance(item, torch.Tensor) else item.weight_OI
        number = self.made
        self.alive.add(number)
        weakref.finalize(tensor, self.alive.discard, number)
        self.most = max(self.most, len(self.alive))
        return item

    def __iter__(self):
        return iter(self.makers)

    def __len__(self):
        return len(self.makers)


def test_lazy_mappings_give_the_same_files_with_one_item_alive_at_a_time(tmp_path):
    ladder = Ladder(sparsities=(0.5, 0.75), patterns=("2:4",))

    def linear(seed):
        generator = torch.Generator().manual_seed(seed)
        return record_of(torch.randn(4, 8, generator=generator), torch.rand(4, 8, generator=generator), ladder)

    linears = {f"w{i}": partial(linear, i) for i in range(5)}
    shared = {f"n{i}": partial(torch.full, (3 + i,), float(i)) for i in range(5)} | {"steps": partial(torch.arange, 4)}
    lazy = Lazy(linears), Lazy(shared)
    eager = tuple({name: make() for name, make in makers.items()} for makers in (linears, shared))
    for folder, found in (("lazy", lazy), ("eager", eager)):
        write_checkpoint(
            tmp_path / folder, *found, ladder=ladder, ranks=[1, 0, 1], inheritance="shared", dtype="bfloat16",
            record={}, save_extras=lambda folder: None, optional={"mixer": {"weights": torch.ones(2)}},
            max_shard_bytes=100,
        )  # fmt: skip
    for mapping, made in zip(lazy, (10, 12), strict=True):
        assert (mapping.most, mapping.made, mapping.alive) == (1, made, set())
    contents = [{p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in ("lazy", "eager")]
    assert contents[0] == contents[1] and len(contents[0]) > 8
    ElasticCheckpoint(tmp_path / "lazy").check_present()


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    ladder = Ladder(sparsities=(0.5,))
    before = os.umask(0o022)
    try:
        write_checkpoint(
            tmp_path / "c", {"w": record_of(torch.randn(4, 8), torch.rand(4, 8), ladder)}, {}, ladder=ladder,
            ranks=[1], inheritance="shared", dtype="float32", record={}, save_extras=lambda folder: None,
        )  # fmt: skip
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()} == {0o644}


def test_pairs_of_another_rank_are_refused_and_leave_nothing(tmp_path):
    ladder = Ladder(sparsities=(0.5,))
    records = {"w": record_of(torch.randn(4, 8), torch.rand(4, 8), ladder)}
    with pytest.raises(ShapeError, match=r"w.lora_A: found torch.float32 \(1, 8\), expected torch.float32 \(2, 8\)"):
        write_checkpoint(
            tmp_path / "c", records, {}, ladder=ladder, ranks=[2], inheritance="shared", dtype="float32", record={},
            save_extras=lambda folder: None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def opened_files():
    """Names of the .safetensors files opened so far in the test."""
    found, active = [], [True]

    def audit(event, args):
        if active[0] and event == "open" and str(args[0]).endswith(".safetensors"):
            found.append(str(args[0]).rsplit("/", 1)[-1])

    sys.addaudithook(audit)
    yield found
    active[0] = False


def test_a_level_opens_only_its_files(tiny_checkpoint, opened_files):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    assert opened_files == []
    checkpoint.open_level(checkpoint.ladder.find(0.7))
    groups = {f"adapters-{group}.safetensors" for group in range(3)}
    assert set(opened_files) == {"shell-core.safetensors", "shared.safetensors", *groups}
    opened_files.clear()
    checkpoint.open_level(checkpoint.ladder.find(0.5))
    assert set(opened_files) == {"shell-level-0.6.safetensors", "shell-level-0.5.safetensors"}
    opened_files.clear()
    checkpoint.open_level(checkpoint.ladder.find(0.6))
    assert opened_files == []


def test_bytes_are_those_of_the_files(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    for level in checkpoint.ladder.levels:
        sizes = [(tiny_checkpoint / entry.file).stat().st_size for entry in checkpoint.files_of(level)]
        assert checkpoint.bytes_of(level) == sum(sizes) <= checkpoint.total_bytes()


def test_a_folder_may_hold_only_some_levels(tiny_checkpoint, tmp_path):
    folder = tmp_path / "device"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "shell-level-0.5.safetensors").unlink()
    checkpoint = ElasticCheckpoint(folder)
    assert [level.name for level in checkpoint.ladder.levels if checkpoint.is_complete(level)] == ["0.6", "0.7"]
    assert checkpoint.find("auto").name == "0.6"
    checkpoint.open_level(checkpoint.find("auto"))
    with pytest.raises(CheckpointError, match=r"0.5.safetensors is missing.*complete here: 0.6, 0.7.*upgrade"):
        checkpoint.open_level(checkpoint.find(0.5))


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**config, "digest": digest(config)}))


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing shell": (lambda f: (f / "shell-core.safetensors").unlink(), "shell-core.safetensors is missing"),
    "truncated shell": (lambda f: truncate(f / "shell-core.safetensors", 3), r"shell-core.safetensors: has \d+ bytes"),
    "flipped bit": (lambda f: flip(f / "shell-core.safetensors"), "sha256 differs"),
    "missing adapters": (lambda f: (f / "adapters-0.safetensors").unlink(), "adapters-0.safetensors is missing"),
    "missing config": (lambda f: (f / CONFIG_NAME).unlink(), "elastic_config.json is missing"),
    "no JSON": (lambda f: (f / CONFIG_NAME).write_text("{"), "cannot be read"),
    "another format": (lambda f: edit_config(f, format="x"), "not the config of an elastic checkpoint"),
    "unknown version": (lambda f: edit_config(f, format_version=99), "format version 99; this release reads 2"),
    "missing field": (lambda f: edit_config(f, ladder={}), "missing or malformed field"),
    "null field": (lambda f: edit_config(f, ranks=None), "missing or malformed field"),
    "another id": (lambda f: edit_config(f, checkpoint_id="0" * 32), "belongs to another elastic checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, tiny_checkpoint, tmp_path):
    change, message = DAMAGE[name]
    folder = damaged(tiny_checkpoint, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint = ElasticCheckpoint(folder)
        list(checkpoint.level_linears(checkpoint.ladder.levels[0]))


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_output_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="already holds something"):
        check_output_folder(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_values_that_do_not_fit_the_dtype_are_refused_and_leave_nothing(tmp_path):
    ladder = Ladder(sparsities=(0.5,))
    records = {"w": record_of(torch.full((4, 8), 1e5), torch.rand(4, 8), ladder)}
    with pytest.raises(NumericsError, match=r"w.values: NaN or infinite as torch.float16"):
        write_checkpoint(
            tmp_path / "c", records, {}, ladder=ladder, ranks=[0], inheritance="shared", dtype="float16", record={},
            save_extras=lambda folder: None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def small(folder, seed=0):
    weight, ladder = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), Ladder(sparsities=(0.5,))
    write_checkpoint(
        folder, {"w": record_of(weight, weight.abs(), ladder)}, {"norm": torch.ones(3)}, ladder=ladder, ranks=[1],
        inheritance="shared", dtype="float32", record={}, save_extras=lambda folder: None,
    )  # fmt: skip
    return ElasticCheckpoint(folder)


LESS = StructuredLevel(fraction=0.5, key_value_heads=1, channels=4, biases=False, weights=16)


def test_a_record_keeps_what_others_added_meanwhile(tmp_path):
    checkpoint, other = small(tmp_path / "c"), ElasticCheckpoint(tmp_path / "c")
    other.update_record({"note": 1})
    add_section(tmp_path / "c", LESS, {"w.weight": torch.ones(2, 8)}, {"scores": "obs"})
    checkpoint.update_record({"quality": {"rows": []}})
    found = ElasticCheckpoint(tmp_path / "c")
    assert [level.name for level in found.structured] == ["structured-0.5"]
    assert (found.config["note"], found.config["quality"]) == (1, {"rows": []}) and found.config == checkpoint.config
    assert {x.name for x in (tmp_path / "c").iterdir()} - {CONFIG_NAME} == {
        entry.file for entries in found.manifest.files.values() for entry in entries
    }, "no lock is left"


@pytest.mark.parametrize("change", ["record", "section"])
def test_the_config_is_changed_by_one_at_a_time(tmp_path, change):
    checkpoint = small(tmp_path / "c")
    changes = {
        "record": lambda: checkpoint.update_record({"note": 1}),
        "section": lambda: add_section(tmp_path / "c", LESS, {"w.weight": torch.ones(2, 8)}, {}),
    }
    before = (tmp_path / "c" / CONFIG_NAME).read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with config_lock(tmp_path / "c"):
            waiting = pool.submit(changes[change])
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            assert (tmp_path / "c" / CONFIG_NAME).read_bytes() == before
        waiting.result(timeout=30)
    assert (tmp_path / "c" / CONFIG_NAME).read_bytes() != before


def test_a_record_is_not_put_into_another_checkpoint(tmp_path):
    checkpoint = small(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no elastic checkpoint can be opened here"):
        checkpoint.update_record({"quality": {}})
    small(tmp_path / "c", seed=1)
    with pytest.raises(CheckpointError, match=r"another checkpoint \(.*\) is there now.*\(quality\)"):
        checkpoint.update_record({"quality": {}})
    assert "quality" not in ElasticCheckpoint(tmp_path / "c").config
