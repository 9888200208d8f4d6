"""Interrupted runs go on and end with the bytes of an uninterrupted one; two runs do not share an output."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

import elastic_sparsity.run_folder as run_folder_module
from elastic_sparsity import optimize, pipeline, preparing
from elastic_sparsity.allocation_file import AllocationPlan, save_plan
from elastic_sparsity.errors import ConfigError, NumericsError, OutputError
from elastic_sparsity.run_folder import run_folder
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

NUM_KILLS = int(os.environ.get("ELASTIC_SPARSITY_KILLS", "6"))
SMOKE = ["-m", "elastic_sparsity", "train", "smoke", "--quiet"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint; run.json says how long the run took, and is no part of it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "run.json"}


def start(output: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *SMOKE, "--output", str(output)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_killed_at_random_moments(tmp_path):
    """SIGKILL at random moments of the smoke recipe, each run resumed, each checkpoint byte-identical."""
    generator = torch.Generator().manual_seed(0)
    first = start(tmp_path / "warm")  # fills the cache with the self-sampled text
    assert first.wait() == 0, first.stdout.read().decode()
    began = time.monotonic()
    both = [start(tmp_path / name) for name in ("whole", "beside")]  # two at a time, as below
    claimed = seconds_until(tmp_path / "whole.run" / "run.json", began)
    in_place = seconds_until(tmp_path / "whole", began)
    assert [process.wait() for process in both] == [0, 0]
    expected = contents(tmp_path / "whole")
    assert contents(tmp_path / "warm") == expected
    assert contents(tmp_path / "beside") == expected
    moments = torch.rand(NUM_KILLS, generator=generator) * 1.1 * (in_place - claimed)
    with ThreadPoolExecutor(2) as pool:
        jobs = [(tmp_path / f"killed-{i}", float(moment), expected) for i, moment in enumerate(moments)]
        killed = Counter(pool.map(lambda job: kill_and_go_on(*job), jobs))
    print(f"killed {NUM_KILLS} runs within {in_place - claimed:.1f} s of work: {dict(killed)}")
    assert killed["with blocks"] or NUM_KILLS < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "warm", "whole"]


def seconds_until(path, began):
    while not path.exists():
        time.sleep(0.01)
    return time.monotonic() - began


def kill_and_go_on(output, seconds, expected):
    """Kills a run `seconds` after it began to work. Returns: how far it was."""
    process, run = start(output), output.with_name(f"{output.name}.run")
    while not (run / "run.json").exists() and process.poll() is None:  # before it nothing is written
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    has_blocks = any(run.glob("block-*.safetensors"))
    far = "at the end" if output.exists() else "with blocks" if has_blocks else "early"
    # An output without run folder is whole: only its table and plot may be missing.
    if not output.exists() or run.exists():
        again = start(output)
        said = again.communicate()[0].decode()
        assert again.returncode == 0, said
        assert contents(output) == expected
    shutil.rmtree(output)
    return far


class Crash(Exception):
    pass


def crash_at(monkeypatch, name, number):
    """Makes the `number`-th call of a function of the block phase or pipeline fail."""
    import elastic_sparsity.block_phase as block_phase
    import elastic_sparsity.pipeline as pipeline

    module = pipeline if hasattr(pipeline, name) and not hasattr(block_phase, name) else block_phase
    real, count = getattr(module, name), [0]

    def fails(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize("mode", ["own", "learned", "fixed", "dense"])
@pytest.mark.parametrize("activations", ["device", "disk"])
@pytest.mark.parametrize("trainable", ["base", "off"])
@pytest.mark.parametrize(("name", "number"), [("train_block_", 2), ("save_run", 1)])
def test_a_crash_changes_nothing(name, number, trainable, activations, mode, tmp_path, monkeypatch):
    recipe = tiny_recipe(
        mixer={"mode": mode},
        memory={"activations": activations},
        end_to_end={"trainable": trainable},
        block={"base_lr": 1e-3},
    )
    optimize(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(patch, name, number)
        with pytest.raises(Crash):
            optimize(recipe, tmp_path / "crashed")
    assert (tmp_path / "crashed.run").exists()
    assert not (tmp_path / "crashed").exists()
    optimize(recipe, tmp_path / "crashed")
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")
    assert not (tmp_path / "crashed.run").exists()


def test_a_snapshot_of_the_end_to_end_phase(tmp_path, monkeypatch):
    """Going on in the middle of the phase: parameters, moments, order of levels and losses as if nothing had been."""
    recipe = tiny_recipe(end_to_end={"trainable": "base", "steps": 9})
    optimize(recipe, tmp_path / "whole")
    import elastic_sparsity.end_to_end as end_to_end
    import elastic_sparsity.pipeline as pipeline

    real_loss, real_snapshots, seen = end_to_end._step_loss, pipeline.Snapshots, []
    monkeypatch.setattr(pipeline, "Snapshots", lambda **fields: real_snapshots(**fields, seconds=0, share=math.inf))

    def fails(*args, **kwargs):
        seen.append(1)
        if len(seen) == 6:
            raise Crash
        return real_loss(*args, **kwargs)

    monkeypatch.setattr(end_to_end, "_step_loss", fails)
    with pytest.raises(Crash):
        optimize(recipe, tmp_path / "crashed")
    optimize(recipe, tmp_path / "crashed")
    assert len(seen) == 6 + 4  # five were done
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def unfinished(output, monkeypatch, **sections):
    with monkeypatch.context() as patch:
        crash_at(patch, "save_run", 1)
        with pytest.raises(Crash):
            optimize(tiny_recipe(**sections), output)


def test_another_recipe_does_not_go_on(tmp_path, monkeypatch):
    unfinished(tmp_path / "c", monkeypatch)
    with pytest.raises(ConfigError, match=r"recipe\.block\.steps \(2 then, 3 now\).*--restart"):
        optimize(tiny_recipe(block={"steps": 3}), tmp_path / "c")
    with pytest.raises(ConfigError, match=r"recipe\.seed"):
        optimize(tiny_recipe(seed=5), tmp_path / "c")
    assert (tmp_path / "c.run").exists()
    optimize(tiny_recipe(memory={"activations": "disk"}), tmp_path / "c")  # where data lives may change


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"dtype": "bfloat16"}},
        {"evaluation": {"max_windows": 1, "baselines": ["magnitude"]}},
        {"end_to_end": {"steps": 3, "adapter_lr": 1e-4, "base_lr": 1e-5, "clip_norm": 0.5, "batch_size": 1}},
    ],
    ids=str,
)
def test_what_no_block_depends_on_may_change(changes, tmp_path, monkeypatch):
    """As errors behind hours of blocks advise: what is finished is kept, and the rest is the new recipe's."""
    real = pipeline.Snapshots
    monkeypatch.setattr(pipeline, "Snapshots", lambda **fields: real(**fields, seconds=0, share=math.inf))
    unfinished(tmp_path / "c", monkeypatch)
    assert (tmp_path / "c.run" / "end-to-end.safetensors").exists()
    other = tiny_recipe(**changes)
    optimize(other, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("elastic_sparsity.block_phase.train_block_", lambda *_, **__: pytest.fail("done already"))
        optimize(other, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_whether_the_end_to_end_phase_is_on_may_not_change(tmp_path, monkeypatch):
    """A plan's strength follows it, and with it the masks of finished blocks."""
    unfinished(tmp_path / "c", monkeypatch)
    for field, value in (("is_on", {"steps": 0}), ("trainable", {"trainable": "adapters"})):
        with pytest.raises(ConfigError, match=rf"recipe\.end_to_end\.{field}"):
            optimize(tiny_recipe(end_to_end=value), tmp_path / "c")


def test_weights_beyond_the_checkpoints_dtype_are_refused_first(tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = 7e4
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    sections = {"model": {"id": str(tmp_path / "base")}, "checkpoint": {"dtype": "float16"}}
    with pytest.raises(ConfigError, match=r"checkpoint.dtype: float16 holds at most 65504.* first model.norm.weight"):
        optimize(tiny_recipe(**sections), tmp_path / "c")
    assert not (tmp_path / "c.run").exists()


def test_other_text_does_not_go_on(tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("The fox jumps over zeros. " * 30)
    source = {"calibration": {"source": str(text)}}
    unfinished(tmp_path / "c", monkeypatch, **source)
    text.write_text("The dog jumps over zeros. " * 30)
    with pytest.raises(ConfigError, match="data.calibration_sha256"):
        optimize(tiny_recipe(**source), tmp_path / "c")


def test_another_config_of_the_same_weights_does_not_go_on(tmp_path, monkeypatch):
    """A mended rope_theta is another function: half of the blocks would be tuned towards the old one."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    sections = {"model": {"id": str(base)}}
    unfinished(tmp_path / "c", monkeypatch, **sections)
    config = json.loads((base / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10000
    config["rope_parameters"]["rope_theta"] = 20000
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.rope_parameters\.rope_theta \(10000\.?0? then, 20000 now\)"):
        optimize(tiny_recipe(**sections), tmp_path / "c")
    config |= {"rope_parameters": {**config["rope_parameters"], "rope_theta": 10000}, "transformers_version": "9"}
    (base / "config.json").write_text(json.dumps(config))
    optimize(tiny_recipe(**sections), tmp_path / "c")


def test_a_checkpoint_that_is_not_the_runs_own_is_left_alone(tmp_path, monkeypatch, tiny_checkpoint):
    unfinished(tmp_path / "c", monkeypatch, seed=3)
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(OutputError, match=r"c: holds a checkpoint of another recipe.* than the unfinished run "):
        optimize(tiny_recipe(seed=3), tmp_path / "c")
    assert contents(tmp_path / "c") == before and (tmp_path / "c.run" / "block-0001.safetensors").exists()
    shutil.rmtree(tmp_path / "c")
    optimize(tiny_recipe(seed=3), tmp_path / "c")


def test_a_run_that_goes_on_keeps_what_it_had_decided(tmp_path, monkeypatch):
    """With less memory free than at its beginning the plan alone would leave the end-to-end phase out, or refuse."""
    auto = {"end_to_end": {"trainable": "auto"}}
    unfinished(tmp_path / "c", monkeypatch, **auto)
    seen, real = [], preparing.choose

    def spy(recipe, *args):
        seen.append(recipe.end_to_end.trainable)
        return real(recipe, *args)

    monkeypatch.setattr(preparing, "choose", spy)
    optimize(tiny_recipe(**auto), tmp_path / "c")
    optimize(tiny_recipe(**auto), tmp_path / "new")
    assert seen == ["base", "auto"]


def test_killed_while_its_folder_is_removed_it_is_still_a_run(tmp_path, monkeypatch):
    real = run_folder_module.shutil.rmtree
    monkeypatch.setattr(run_folder_module.shutil, "rmtree", lambda *_, **__: None)
    optimize(tiny_recipe(), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c.run").iterdir()) == ["lock", "run.json"]
    monkeypatch.setattr(run_folder_module.shutil, "rmtree", real)
    before = contents(tmp_path / "c")
    optimize(tiny_recipe(), tmp_path / "c")
    assert contents(tmp_path / "c") == before and not (tmp_path / "c.run").exists()


def test_training_that_ends_in_nan_is_named_as_such(tmp_path, monkeypatch):
    def broken(job):
        next(iter(job.base.model.parameters())).data.view(-1)[0] = float("nan")
        return {}

    monkeypatch.setattr(pipeline, "run_end_to_end_", broken)
    with pytest.raises(NumericsError, match=r"training: left NaN or infinity in 1 parameters, .*lower end_to_end"):
        optimize(tiny_recipe(), tmp_path / "c")


def test_weights_that_no_stage_takes_are_refused_first(tmp_path):
    model = tiny_model("llama").double()
    model.config.dtype = torch.float64
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"model\.dtype: the weights are torch\.float64.*set 'float32'"):
        optimize(tiny_recipe(model={"id": str(tmp_path / "base")}), tmp_path / "c")
    optimize(tiny_recipe(model={"id": str(tmp_path / "base"), "dtype": "float32"}), tmp_path / "c")


def test_restart_begins_anew(tmp_path, monkeypatch):
    unfinished(tmp_path / "c", monkeypatch)
    optimize(tiny_recipe(seed=5), tmp_path / "c", restart=True)
    optimize(tiny_recipe(seed=5), tmp_path / "whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_the_record_is_on_disk_before_any_block_that_refers_to_it(tmp_path, monkeypatch):
    """After a power cut a block without its record could not be used."""
    synced = []
    monkeypatch.setattr("elastic_sparsity.files.sync_path", lambda path: synced.append(path.name))
    with run_folder(tmp_path / "c") as folder:
        folder.claim({"what": 1}, {"trainable": "off"})
        assert synced and synced[0].startswith(".run.json.partial-")
        plan = AllocationPlan(sparsities=[], linears={}, losses={}, held_out_kl={}, finished=True, made={})
        save_plan(folder.allocation, plan)
    assert any(name.startswith(".allocation.json.partial-") for name in synced)


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "c.run").mkdir()
    scratch = tmp_path / "c.run" / ".block-0001.safetensors.partial-0123abcd"
    scratch.write_bytes(b"half")
    with run_folder(tmp_path / "c"):
        assert not scratch.exists()


def test_damaged_state_is_named(tmp_path, monkeypatch):
    unfinished(tmp_path / "c", monkeypatch)
    state = tmp_path / "c.run" / "block-0001.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-20])
    with pytest.raises(OutputError, match=r"block-0001\.safetensors.*--restart"):
        optimize(tiny_recipe(), tmp_path / "c")
    state.write_bytes(content)
    (tmp_path / "c.run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="--restart"):
        optimize(tiny_recipe(), tmp_path / "c")
    optimize(tiny_recipe(), tmp_path / "c", restart=True)


def test_two_runs_in_one_output(tmp_path):
    with run_folder(tmp_path / "c"):
        code = (
            "import sys; sys.path.insert(0, 'tests'); from conftest import tiny_recipe; "
            "from elastic_sparsity import optimize; optimize(tiny_recipe(), sys.argv[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True,
            cwd=Path(__file__).parents[1], check=False,
        )  # fmt: skip
    assert done.returncode
    assert "another process makes" in done.stderr
    optimize(tiny_recipe(), tmp_path / "c")


def test_a_failure_before_any_block_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError):
        optimize(tiny_recipe(model={"id": str(tmp_path / "none")}), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_finished_just_before_the_kill(tmp_path, monkeypatch):
    """The checkpoint is in place, its run folder still there: the same run says so, another one is refused."""
    import elastic_sparsity.pipeline as pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_json", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            optimize(tiny_recipe(), tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(ConfigError):
        optimize(tiny_recipe(seed=9), tmp_path / "c")
    optimize(tiny_recipe(), tmp_path / "c")
    assert contents(tmp_path / "c") == before
    assert not (tmp_path / "c.run").exists()
