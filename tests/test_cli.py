"""The command line as a user meets it: results on stdout, one clear line and exit code 2 for a mistake."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_sparsity import ElasticCheckpoint, cli
from elastic_sparsity.measure import evaluate_path
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def run(capsys, *arguments):
    """Runs the CLI in this process; returns (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["elastic-sparsity", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def save_tiny(folder, **changes):
    model = tiny_model("llama", **changes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quick_recipe(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(
        '[model]\nid = "random:llama"\n[calibration]\nsource = "self"\nsamples = 4\nlength = 16\n'
        '[evaluation]\nmax_windows = 2\n[ladder]\nsparsities = [0.5, 0.7]\npatterns = ["2:4"]\n'
        "[adapters]\nranks = 2\n[block]\nsteps = 1\nsamples = 2\n[end_to_end]\nsteps = 2\n"
    )
    return path


def test_verbs_are_these():
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    makers = {"demo", "train", "slice", "upgrade", "overlay", "restore", "export-peft", "export"}
    measured = {"eval", "inspect", "doctor", "bench", "plan", "report"}
    assert names == makers | measured | {"induce", "search", "prune", "add-structured"}


def test_train_slice_eval(capsys, tmp_path, quick_recipe, text_file):
    out = tmp_path / "elastic"
    code, stdout, stderr = run(capsys, "train", quick_recipe, "--output", out, "-q")
    assert code == 0, stderr
    for word in ("dense", "wanda", "elastic", "50 %", "70 %", "2:4"):
        assert word in stdout
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {(r["level"], r["method"]) for r in rows} == {
        ("dense", "dense"),
        *((level, method) for level in ("0.5", "0.7", "2:4") for method in ("elastic", "wanda")),
    }
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.bin")) and not list(out.glob("*.pt")), "nothing is pickled"

    code, stdout, _ = run(capsys, "slice", out, "--level", "70%", "--output", tmp_path / "sliced", "--dtype", "float32")
    assert code == 0 and "AutoModelForCausalLM" in stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    assert AutoTokenizer.from_pretrained(tmp_path / "sliced")("a").input_ids
    assert model.dtype == torch.float32
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == pytest.approx(22 / 32)

    seen = []
    for target, options in ((out, ["--level", "0.7"]), (out, []), (tmp_path / "sliced", [])):
        result = tmp_path / f"{target.name}.json"
        code, stdout, stderr = run(
            capsys, "eval", target, "--text", text_file, "--window", "64", "--precision", "float32", "--output", result,
            "-q", *options,
        )  # fmt: skip
        assert code == 0, stderr
        found = {row["level"]: row["perplexity"] for row in json.loads(result.read_text())["rows"]}
        seen.append(found["0.7"] if "0.7" in found else found["dense"])
    assert seen == pytest.approx([seen[0]] * 3, rel=1e-2), "elastic, one level of it, and the slice disagree"


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ((), {"values", "mlp_order"}),
        (("--levels", "0.5,0.7"), {"values"}),
        (("--folds", ""), set()),
        (("--folds", "mlp_order"), {"mlp_order"}),
    ],
    ids=["as it is", "no N:M level", "none", "one"],
)
def test_induce_folds_what_any_architecture_can_unless_told_otherwise(capsys, tmp_path, text_file, options, folds):
    """OPT has no RoPE: one fold is not for it, and has to be asked for."""
    command = ("induce", "random:opt", "--output", tmp_path / "out", "--calibration", text_file, "--steps", 1)
    code, out, _ = run(capsys, *command, "--samples", 8, "--length", 16, "-q", *options)
    assert code == 0
    rows = [line.split("\u2502")[1].strip() for line in out.splitlines() if line.count("\u2502") == 5]
    assert {"values", "query_key", "value_order", "mlp_order"} & set(rows) == folds
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        wanted = tiny_model("opt")(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_float32_means_float32_of_a_model_in_bfloat16_too(tmp_path, text_file):
    model = tiny_model("llama").bfloat16()
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    options = {"window": 64, "max_windows": 2, "precision": "float32"}
    rows = [
        evaluate_path(str(tmp_path / name), str(text_file), reference=str(tmp_path / "half"), **options)[0]
        for name in ("half", "whole")
    ]
    assert rows[0][0]["perplexity"] == rows[1][0]["perplexity"]
    assert rows[1][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_eval_with_reference_gives_kl(capsys, tmp_path, text_file):
    save_tiny(tmp_path / "dense")
    result = tmp_path / "eval.json"
    code, _, stderr = run(
        capsys, "eval", tmp_path / "dense", "--text", text_file, "--reference", tmp_path / "dense", "--window", "64",
        "--output", result, "-q",
    )  # fmt: skip
    assert code == 0, stderr
    assert json.loads(result.read_text())["rows"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_model_and_calibration_overrides(capsys, tmp_path, quick_recipe, text_file):
    save_tiny(tmp_path / "dense")
    code, stdout, stderr = run(
        capsys, "train", quick_recipe, "--model", tmp_path / "dense", "--calibration", text_file, "--output",
        tmp_path / "elastic", "-q",
    )  # fmt: skip
    assert code == 0, stderr
    config = json.loads((tmp_path / "elastic" / "elastic_config.json").read_text())
    assert config["base_model"]["id"] == str(tmp_path / "dense")
    assert config["recipe"]["calibration"]["source"] == str(text_file)
    assert config["data"]["calibration_tokens"] == 64 and config["versions"]["torch"]


def test_inspect_shows_and_proves(capsys, tiny_checkpoint, tmp_path):
    code, stdout, stderr = run(capsys, "inspect", tiny_checkpoint, "--verify")
    assert code == 0, stderr
    for word in ("60 %", "2:4", "down_proj", "bit for bit"):
        assert word in stdout
    code, stdout, _ = run(capsys, "inspect", tiny_checkpoint, "--json")
    report = json.loads(stdout)
    assert [row["name"] for row in report["levels"]] == ["0.5", "0.6", "0.7", "2:4"] and report["checks"] == []
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (tmp_path / "c" / "shell-core.safetensors").write_bytes(b"")
    code, stdout, _ = run(capsys, "inspect", tmp_path / "c", "--verify", "--json")
    assert code == 1 and "shell-core.safetensors" in json.loads(stdout)["checks"][0]["detail"]


def test_inspect_shows_no_figure_that_is_none(capsys, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    found = {"0.5": ("12", []), "0.6": (12.5, 10**400), "0.7": (math.inf, True), "2:4": ([], {})}
    rows = [{"level": x, "method": "elastic", "perplexity": p, "kl": kl} for x, (p, kl) in found.items()]
    ElasticCheckpoint(tmp_path / "c").update_record({"quality": {"rows": rows}})
    code, stdout, stderr = run(capsys, "inspect", tmp_path / "c")
    assert code == 0 and "12.50" in stdout and "inf" in stdout, stderr
    report = json.loads(run(capsys, "inspect", tmp_path / "c", "--json")[1])
    shown = [(level["perplexity"], level["kl"]) for level in report["levels"]]
    assert shown == [(None, None), (12.5, None), (math.inf, None), (None, None)]


def test_a_device_downloads_upgrades_and_loads(capsys, tiny_checkpoint, tmp_path):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    sizes = {level.name: checkpoint.download_bytes(level) for level in checkpoint.ladder.levels}
    smallest = min(sizes, key=sizes.get)
    device = tmp_path / "device"
    code, stdout, stderr = run(capsys, "slice", tiny_checkpoint, "--max-bytes", sizes[smallest], "--output", device)
    assert code == 0 and f"level {smallest}" in stdout, stderr
    assert sum(path.stat().st_size for path in device.rglob("*") if path.is_file()) == sizes[smallest]
    expect_error(capsys, "upgrade` fetches", "slice", device, "--level", "2:4", "--output", tmp_path / "no")
    code, stdout, stderr = run(capsys, "upgrade", device, "--from", tiny_checkpoint, "--level", "2:4")
    assert code == 0 and "shell-pattern-2of4.safetensors" in stdout, stderr
    code, _, stderr = run(capsys, "slice", device, "--level", "2:4", "--output", tmp_path / "plain")
    assert code == 0, stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_overlay_and_restore(capsys, tmp_path, quick_recipe):
    text = quick_recipe.read_text().replace("steps = 2\n", 'steps = 2\ntrainable = "adapters"\n')
    assert run(capsys, "train", _file(tmp_path / "r.toml", text), "--output", tmp_path / "c", "-q")[0] == 0
    assert run(capsys, "overlay", tmp_path / "c", "--output", tmp_path / "o")[0] == 0
    code, stdout, stderr = run(capsys, "restore", tmp_path / "o", "--output", tmp_path / "again")
    assert code == 0 and "every file with its recorded sha256" in stdout, stderr


def test_export_peft(capsys, tiny_checkpoint, tmp_path):
    code, stdout, stderr = run(capsys, "export-peft", tiny_checkpoint, "--level", "60%", "--output", tmp_path / "a")
    assert code == 0 and "group-0, group-1" in stdout, stderr


def expect_error(capsys, message, *arguments):
    code, stdout, stderr = run(capsys, *arguments)
    flat = " ".join(stderr.split())
    assert code == 2 and "error: " in flat and message in flat, (code, stdout, stderr)
    assert "Traceback" not in stderr


def test_mistakes_get_one_clear_line(capsys, tmp_path, quick_recipe, tiny_checkpoint, text_file):
    out = tmp_path / "out"
    expect_error(capsys, "no such file; recipes of the package: demo", "train", "nothing", "--output", out)
    expect_error(capsys, "'0.65' is not in this ladder; it has: 0.5, 0.6, 0.7, 2:4", "slice", tiny_checkpoint,
                 "--level", "0.65", "--output", out)  # fmt: skip
    expect_error(capsys, "no elastic checkpoint here", "slice", tmp_path, "--level", "0.5", "--output", out)
    expect_error(capsys, "is not one of float32", "slice", tiny_checkpoint, "--level", "0.5", "--output", out,
                 "--dtype", "int8")  # fmt: skip
    expect_error(capsys, "either --level or --max-bytes", "slice", tiny_checkpoint, "--output", out)
    expect_error(capsys, "no level fits into 10 bytes", "slice", tiny_checkpoint, "--max-bytes", "10", "--output", out)
    expect_error(capsys, "a plain folder stores zeros too", "slice", tiny_checkpoint, "--max-bytes", "1GB", "--format",
                 "transformers", "--output", out)  # fmt: skip
    expect_error(capsys, "all levels take one time there", "slice", tiny_checkpoint, "--max-ms-per-token", "5",
                 "--device-profile", "phone", "--format", "transformers", "--output", out)  # fmt: skip
    expect_error(capsys, "needs a device profile", "slice", tiny_checkpoint, "--max-ms-per-token", "5", "--output", out)
    expect_error(capsys, "chooses a level under a budget", "slice", tiny_checkpoint, "--level", "0.5",
                 "--device-profile", "phone", "--output", out)  # fmt: skip
    expect_error(capsys, "is not transformers or elastic", "slice", tiny_checkpoint, "--level", "0.5", "--format",
                 "gguf", "--output", out)  # fmt: skip
    expect_error(capsys, "is no folder", "train", quick_recipe, "--model", tmp_path / "no" / "where", "--output", out)
    expect_error(capsys, "no such file", "train", quick_recipe, "--calibration", tmp_path / "no.txt", "--output", out)
    expect_error(capsys, "tokens give 0 samples of 16 tokens", "train", quick_recipe, "--calibration",
                 _file(tmp_path / "short.txt", "few words"), "--output", out)  # fmt: skip
    expect_error(capsys, "no such file", "train", quick_recipe, "--evaluation", tmp_path / "no.txt", "--output", out)
    long = _file(tmp_path / "long.toml", quick_recipe.read_text().replace("length = 16", "length = 300"))
    expect_error(capsys, "calibration.length: 300 tokens, but the model reads at most 256", "train", long, "--output",
                 out)  # fmt: skip
    (tmp_path / "file").write_text("")
    expect_error(capsys, "cannot be made", "train", quick_recipe, "--output", tmp_path / "file" / "out")
    expect_error(capsys, "--level needs an elastic checkpoint", "eval", "random:llama", "--text", text_file, "--level",
                 "0.5")  # fmt: skip
    expect_error(capsys, "no such file", "eval", "random:llama", "--text", tmp_path / "no.txt")
    recipe = _file(tmp_path / "typo.toml", quick_recipe.read_text().replace("steps = 1", "stepz = 1"))
    expect_error(capsys, "block.stepz: unknown key; did you mean 'steps'?", "train", recipe, "--output", out)
    assert not out.exists()


def _file(path, text):
    path.write_text(text)
    return path


def test_a_taken_output_folder_is_refused_before_any_work(capsys, tmp_path, quick_recipe):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    expect_error(capsys, "already holds something", "train", quick_recipe, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_model_that_is_not_supported_or_not_finite(capsys, tmp_path, quick_recipe):
    model = save_tiny(tmp_path / "nan")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    out = tmp_path / "out"
    expect_error(capsys, "model.layers.1.mlp.up_proj.weight", "train", quick_recipe, "--model", tmp_path / "nan",
                 "--output", out)  # fmt: skip
    config = json.loads((tmp_path / "nan" / "config.json").read_text())
    shutil.copytree(tmp_path / "nan", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    expect_error(capsys, "'bloom' has no row in the architecture table", "train", quick_recipe, "--model",
                 tmp_path / "other", "--output", out)  # fmt: skip


def test_a_truncated_checkpoint_is_named(capsys, tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    shell = tmp_path / "c" / "shell-core.safetensors"
    shell.write_bytes(shell.read_bytes()[:-1])
    expect_error(capsys, "shell-core.safetensors: has", "slice", tmp_path / "c", "--level", "0.7", "--output",
                 tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_named(capsys, tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    expect_error(capsys, "tokenizer.json: has 1 bytes", "slice", tmp_path / "c", "--level", "0.7", "--output",
                 tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_only_what_the_run_goes_on_from(capsys, tmp_path, quick_recipe, monkeypatch):
    import elastic_sparsity.checkpoint_writer as module

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "TensorFileWriter", full)
        expect_error(capsys, "No space left on device", "train", quick_recipe, "--output", tmp_path / "o" / "out", "-q")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["out.run"]
    assert run(capsys, "train", quick_recipe, "--output", tmp_path / "o" / "out", "-q")[0] == 0
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["out"]


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "elastic_sparsity", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "demo" in done.stdout


def test_names_are_shown_as_they_are(capsys):
    """rich would make a picture of the name between two colons."""
    code, stdout, _ = run(capsys, "plan", "smoke", "--no-probe")
    assert code == 0
    assert "random:llama: weights" in stdout
