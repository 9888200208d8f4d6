"""The whole pipeline on tiny models: repeatable, honest about what it trained, and better than masking alone."""

import json
import math

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import ElasticCheckpoint, ElasticModel, optimize
from elastic_sparsity.adapters import elastic_linears
from elastic_sparsity.errors import CheckpointError, NumericsError
from elastic_sparsity.measure import measure
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

IDS = torch.arange(4, 40)[None]


def tensors(folder):
    return {path.name: path.read_bytes()[200:] for path in sorted(folder.glob("*.safetensors"))}


def level_logits(folder, level):
    with torch.no_grad():
        return ElasticModel.from_pretrained(folder, level, dtype=torch.float32)(IDS).logits


def test_same_seed_same_values(tmp_path, tiny_checkpoint):
    optimize(tiny_recipe(), tmp_path / "again")
    optimize(tiny_recipe(seed=1), tmp_path / "other")
    for level in ("0.5", "0.7", "2:4"):
        assert torch.equal(level_logits(tmp_path / "again", level), level_logits(tiny_checkpoint, level))
        assert not torch.equal(level_logits(tmp_path / "other", level), level_logits(tiny_checkpoint, level))


@pytest.mark.parametrize("mode", ["own", "fixed", "learned", "dense"])
def test_every_mixer_mode_runs_and_is_recorded(mode, tmp_path):
    checkpoint = optimize(tiny_recipe(mixer={"mode": mode}), tmp_path / "c")
    assert checkpoint.config["recipe"]["mixer"]["mode"] == mode
    for losses in checkpoint.config["training"]["block_losses"]:
        assert set(losses) == {"0.5", "0.6", "0.7", "2:4"} and all(map(math.isfinite, losses.values()))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": {"inheritance": "detached"}},
        {"adapters": {"inheritance": "none"}},
        {"adapters": {"ranks": 0}},
        {"adapters": {"ranks": [3, 0, 1, 2]}},
        {"ladder": {"sparsities": [], "patterns": ["2:4"]}},
        {"ladder": {"sparsities": [0.0, 0.5], "patterns": []}},
        {"ladder": {"pattern_parent": "all"}},
        {"scores": {"patterns": "within", "method": "obs"}},
        {"scores": {"method": "magnitude"}},
        {"end_to_end": {"trainable": "adapters"}},
        {"end_to_end": {"trainable": "off"}},
        {"block": {"steps": 0}},
        {"block": {"loss": "mse", "densest_weight": 0.5}},
        {"precision": "bfloat16"},
    ],
)
def test_every_setting_gives_a_checkpoint_that_loads(changes, tmp_path):
    checkpoint = optimize(tiny_recipe(**changes), tmp_path / "c")
    for level in checkpoint.ladder.levels:
        assert torch.isfinite(level_logits(tmp_path / "c", level.name)).all()


def test_a_fine_ladder_with_epts_groups_loads_at_every_rate(tmp_path):
    rates = [round(0.30 + 0.02 * i, 2) for i in range(21)]
    recipe = tiny_recipe(
        ladder={"sparsities": rates, "patterns": [], "group_ends": [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]},
        adapters={"ranks": 1},
        mixer={"mode": "fixed", "weights": [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]},
    )
    optimize(recipe, tmp_path / "c")
    zeros = []
    for rate in rates:
        model = ElasticModel.from_pretrained(tmp_path / "c", rate)
        zeros.append(float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean()))
    assert zeros == pytest.approx(rates, abs=1 / 64) and zeros == sorted(zeros)


def test_training_beats_masking_alone(tmp_path):
    """On a model whose text is its own, more steps bring every level closer to dense."""
    common = {"calibration": {"samples": 64, "length": 32}, "evaluation": {"max_windows": 16, "baselines": []}}
    rough = tiny_recipe(**common, block={"steps": 0}, end_to_end={"trainable": "off"})
    fine = tiny_recipe(
        **common, block={"steps": 16, "samples": 32}, end_to_end={"steps": 120, "batch_size": 4, "base_lr": 1e-3}
    )
    before = {r["level"]: r["kl"] for r in measure(rough, optimize(rough, tmp_path / "rough"))}
    after = {r["level"]: r["kl"] for r in measure(fine, optimize(fine, tmp_path / "fine"))}
    for level in ("0.5", "0.6", "0.7", "2:4"):
        assert after[level] < 0.8 * before[level], (level, before, after)


def test_quality_is_stored_in_the_checkpoint(tmp_path):
    recipe = tiny_recipe(evaluation={"baselines": ["wanda", "sparsegpt"]})
    checkpoint = optimize(recipe, tmp_path / "c")
    rows = measure(recipe, checkpoint)
    stored = json.loads((tmp_path / "c" / "elastic_config.json").read_text())["quality"]
    assert stored["rows"] == rows and len(rows) == 1 + 4 * 3
    assert rows[0]["method"] == "dense" and rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert ElasticCheckpoint(tmp_path / "c").config["quality"]["protocol"]["windows"] == [2, 16]


def test_what_training_broke_is_never_written(tmp_path, monkeypatch):
    def break_weights(model, *_args, **_options):
        next(iter(elastic_linears(model)))[1].weight.data[0, 0] = float("nan")
        return {}

    monkeypatch.setattr("elastic_sparsity.pipeline.train_end_to_end_", break_weights)
    with pytest.raises(NumericsError, match="q_proj.weight"):
        optimize(tiny_recipe(), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_level_that_overflows_its_dtype_is_refused(tmp_path):
    def huge(model):
        model.model.layers[0].mlp.up_proj.weight.data *= 1e6

    model = tiny_model("llama")
    huge(model)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    recipe = tiny_recipe(model={"id": str(tmp_path / "m")}, end_to_end={"steps": 0}, block={"steps": 0})
    optimize(recipe, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"up_proj: weights are NaN or infinite in torch.float16"):
        ElasticModel.from_pretrained(tmp_path / "c", 0.5, dtype=torch.float16)
