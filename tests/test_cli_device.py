"""`doctor`, `bench`, and a profile's way into `slice`, as a user meets them."""

import json
import shutil

import pytest
from test_choosing import PERPLEXITY, record
from test_cli import expect_error, run

from elastic_sparsity.cli_device import parse_batches
from elastic_sparsity.device_profile import read_profile
from elastic_sparsity.errors import ConfigError

QUICK = ("--batch", "1,2", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--way", "dense-float32", "-q")


def test_doctor(capsys):
    code, stdout, stderr = run(capsys, "doctor")
    assert code == 0, stderr
    assert "this machine" in stdout and "dense-float32" in stdout and "every CPU" in stdout
    code, stdout, _ = run(capsys, "doctor", "--json")
    report = json.loads(stdout)
    assert code == 0 and report.keys() == {"facts", "ways"}
    assert report["ways"][0]["works"] is True


def test_bench_makes_a_profile_that_slice_takes(capsys, tiny_checkpoint, tmp_path):
    path = tmp_path / "here.json"
    code, stdout, stderr = run(capsys, "bench", tiny_checkpoint, "--level", "0.7", *QUICK, "--output", path)
    assert code == 0, stderr
    assert "tokens a second" in stdout and "microseconds a linear" in stdout and str(path) in " ".join(stdout.split())
    assert [row.level for row in read_profile(path).measurements] == ["0.7"]
    budget = ("--max-ms-per-token", "60000", "--device-profile", path)
    code, stdout, stderr = run(capsys, "slice", tiny_checkpoint, *budget, "--output", tmp_path / "device")
    assert code == 0, stderr
    assert "50 % dense: " in stdout and "ms a token (predicted)" in stdout and "level 0.5" in stdout
    expect_error(capsys, "no level decodes within 1e-09 ms a token; the fastest, ", "slice", tiny_checkpoint,
                 "--max-ms-per-token", "1e-9", "--device-profile", path, "--output", tmp_path / "no")  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_slice_with_an_estimate_and_a_quality(capsys, tiny_checkpoint, tmp_path):
    folder = record(shutil.copytree(tiny_checkpoint, tmp_path / "c"), PERPLEXITY)
    code, stdout, stderr = run(capsys, "slice", folder, "--max-bytes", "1GB", "--device-profile", "phone", "--output",
                               tmp_path / "device")  # fmt: skip
    assert code == 0, stderr
    assert "(estimate, not measured)" in stdout and "Profile 'phone' is an estimate" in stdout
    code, stdout, stderr = run(capsys, "slice", folder, "--min-quality", "0.6", "--output", tmp_path / "plain",
                               "--format", "transformers")  # fmt: skip
    assert code == 0 and "quality" in stdout and (tmp_path / "plain" / "config.json").is_file(), stderr
    expect_error(capsys, "no level reaches quality 0.9; the best, 50 %, has 0.8", "slice", folder, "--min-quality",
                 "0.9", "--output", tmp_path / "no")  # fmt: skip


def test_mistakes(capsys, tiny_checkpoint, tmp_path):
    expect_error(capsys, "'tablet': no such file; profiles of the package: gpu-datacenter", "slice", tiny_checkpoint,
                 "--max-bytes", "1GB", "--device-profile", "tablet", "--output", tmp_path / "no")  # fmt: skip
    expect_error(
        capsys, "--batch: 'x' is no list of numbers; write e.g. 1,8,32", "bench", tiny_checkpoint, "--batch", "x"
    )
    expect_error(capsys, "no elastic checkpoint here", "bench", tmp_path, *QUICK)
    expect_error(capsys, "but the model reads at most 256", "bench", tiny_checkpoint, "--way", "dense-float32")


def test_batches_as_people_write_them():
    assert parse_batches("1, 8,32") == [1, 8, 32]
    for text in ("", "1,,2", "-1", "1.5", "²", "9999999"):
        with pytest.raises(ConfigError, match="is no list of numbers"):
            parse_batches(text)
