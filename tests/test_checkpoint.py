"""The format: golden bits, bitwise round trip, a level opens only its shells, damage gives a named error."""

import json
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_sparsity.checkpoint import (
    CONFIG_NAME,
    ElasticCheckpoint,
    LinearRecord,
    atomic_folder,
    check_output_folder,
    decode_shells,
    encode_shells,
    num_shells,
    shell_names,
    write_checkpoint,
)
from elastic_sparsity.errors import CheckpointError, OutputError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask

LADDER = Ladder(sparsities=(0.25, 0.5), patterns=("2:4",))


def record_of(weight, scores, ladder, within=False):
    counts = [keep_count(weight.shape[1], s) for s in ladder.sparsities]
    drop = drop_levels(scores, counts) if counts else None
    inside = mask_at(drop, 0) if within else None
    patterns = [pattern_mask(scores, *level.pattern, inside) for level in ladder.levels if level.pattern]
    pairs = [(torch.ones(1, weight.shape[1]), torch.zeros(weight.shape[0], 1))] * ladder.num_groups
    return LinearRecord(weight_OI=weight, drop_level_OI=drop, pattern_masks=patterns, pairs=pairs, transposed=False)


def test_golden_bits_and_values():
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 4, 3]])
    shells = encode_shells(record_of(weight, scores, LADDER), LADDER, torch.float32)
    assert shell_names(LADDER) == ["core", "level-0.25", "pattern-2of4"]
    # core: 2 of 4 kept: row 0 columns 0 1, row 1 columns 2 3 -> bits 0 1 6 7
    assert shells[0][0].tolist() == [0b11000011]
    assert shells[0][1].tolist() == [1, 2, 7, 8]
    # +25 %: of the four open positions (row 0: 2 3; row 1: 0 1) the best of each row -> bits 0 and 3
    assert shells[1][0].tolist() == [0b1001]
    assert shells[1][1].tolist() == [3, 6]
    # 2:4 keeps what the core keeps: all positions as bits, no new value
    assert shells[2][0].tolist() == [0b11000011]
    assert shells[2][1].tolist() == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_level_decodes_bitwise_from_its_prefix(seed, within, dtype):
    ladder = Ladder(sparsities=(0.3, 0.5, 0.7), patterns=("2:4", "1:4"))
    generator = torch.Generator().manual_seed(seed)
    weight, scores = torch.randn(5, 12, generator=generator), torch.rand(5, 12, generator=generator)
    record = record_of(weight, scores, ladder, within)
    shells = encode_shells(record, ladder, dtype)
    for level in ladder.levels:
        base, mask = decode_shells(shells[: num_shells(ladder, level)], (5, 12), ladder, level, "w")
        unstructured = mask_at(record.drop_level_OI, level.index)
        expected = record.pattern_masks[level.index - 3] if level.pattern else unstructured
        assert torch.equal(mask, expected)
        assert torch.equal(torch.where(mask, base, 0), torch.where(mask, weight.to(dtype), 0))


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


def test_a_level_opens_only_its_shells(tiny_checkpoint):
    opened = []
    active = True

    def audit(event, args):
        if active and event == "open" and str(args[0]).endswith(".safetensors"):
            opened.append(str(args[0]).rsplit("/", 1)[-1])

    sys.addaudithook(audit)
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    list(checkpoint.level_linears(checkpoint.ladder.find(0.7)))
    active = False
    assert set(opened) == {"shell-core.safetensors", "adapters.safetensors"}


def test_bytes_grow_with_density(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    shells = {level.name: num_shells(checkpoint.ladder, level) for level in checkpoint.ladder.levels}
    assert shells == {"0.5": 3, "0.6": 2, "0.7": 1, "2:4": 4}
    assert checkpoint.bytes_of(checkpoint.ladder.find("2:4")) <= checkpoint.total_bytes()


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing shell": (lambda f: (f / "shell-core.safetensors").unlink(), "shell-core.safetensors is missing"),
    "truncated shell": (lambda f: truncate(f / "shell-core.safetensors", 3), r"shell-core.safetensors has \d+ bytes"),
    "flipped bit": (lambda f: flip(f / "shell-core.safetensors"), "sha256 differs"),
    "missing adapters": (lambda f: (f / "adapters.safetensors").unlink(), "adapters.safetensors is missing"),
    "missing config": (lambda f: (f / CONFIG_NAME).unlink(), "elastic_config.json is missing"),
    "no JSON": (lambda f: (f / CONFIG_NAME).write_text("{"), "cannot be read"),
    "another format": (lambda f: edit_config(f, format="x"), "not the config of an elastic checkpoint"),
    "unknown version": (lambda f: edit_config(f, format_version=99), "format version 99; this release reads 1"),
    "missing field": (lambda f: edit_config(f, ladder={}), "missing or malformed field"),
    "null field": (lambda f: edit_config(f, ranks=None), "missing or malformed field"),
    "another id": (lambda f: edit_config(f, checkpoint_id="0"), "belongs to another elastic checkpoint"),
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
