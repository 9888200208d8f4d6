"""The same recipe makes the same bytes, in whatever process and with whatever order of sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

from test_transfer import contents

from elastic_sparsity import ElasticCheckpoint, copy_level, upgrade, verify

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
        assert json.loads(found.pop("run.json")).keys() == {"seconds", "peak_bytes"}
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


def test_the_id_comes_from_the_content(tiny_checkpoint):
    from elastic_sparsity.manifest import digest, read_manifest

    manifest, raw = read_manifest(tiny_checkpoint)
    assert len(manifest.checkpoint_id) == 32
    assert manifest.digest == digest(raw)
