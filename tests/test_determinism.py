"""The same recipe makes the same bytes, in whatever process and with whatever order of sets."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from test_shells import record_of
from test_transfer import contents

from elastic_sparsity import ElasticCheckpoint, copy_level, upgrade, verify
from elastic_sparsity.checkpoint_writer import write_checkpoint
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.manifest import digest, read_manifest

RUN = "from conftest import tiny_recipe; from elastic_sparsity import optimize; optimize(tiny_recipe(), 'made')"


def run(folder, hash_seed):
    folder.mkdir()
    search = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {
        **os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": search, "OMP_NUM_THREADS": "1",
        "ELASTIC_SPARSITY_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "made"


def test_two_processes_make_equal_files(tmp_path):
    made = [run(tmp_path / seed, seed) for seed in ("1", "2")]
    first, second = map(contents, made)
    for found in (first, second):
        assert json.loads(found.pop("run.json")).keys() == {"seconds", "peak_bytes", "workers", "traffic_bytes"}
    assert first.keys() == second.keys() and len(first) > 8
    assert [name for name in first if first[name] != second[name]] == []


def test_run_json_is_no_part_of_the_checkpoint(tiny_checkpoint, tmp_path):
    assert (tiny_checkpoint / "run.json").is_file()
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    listed = [e.file for entries in checkpoint.manifest.files.values() for e in entries]
    assert "run.json" not in [*listed, *(entry.file for entry in checkpoint.manifest.extras)]
    assert all(check.passed for check in verify(tiny_checkpoint))
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    upgrade(tmp_path / "device", tiny_checkpoint, 0.5)
    assert not (tmp_path / "device" / "run.json").exists()


def test_the_id_is_the_digest_with_zeros_for_the_id(tiny_checkpoint, tmp_path):
    _, config = read_manifest(tiny_checkpoint)
    found, blank = config["checkpoint_id"], "0" * 32
    for entry in (entry for entries in config["files"].values() for entry in entries):
        data = (tiny_checkpoint / entry["file"]).read_bytes()
        assert data.count(found.encode()) == 1
        entry["sha256"] = hashlib.sha256(data.replace(found.encode(), blank.encode())).hexdigest()
    assert digest({**config, "checkpoint_id": blank})[:32] == found


def test_another_value_gives_another_id(tmp_path):
    ladder, ids = Ladder(sparsities=(0.5,)), set()
    for value in (1.0, 2.0):
        records = {"w": record_of(torch.full((4, 8), value), torch.arange(32.0).view(4, 8), ladder)}
        write_checkpoint(
            tmp_path / str(value), records, {}, ladder=ladder, ranks=[1], inheritance="shared", dtype="float32",
            record={}, save_extras=lambda folder: None,
        )  # fmt: skip
        ids.add(ElasticCheckpoint(tmp_path / str(value)).manifest.checkpoint_id)
    assert len(ids) == 2
