"""Tuning of smaller models: a slow loop as the oracle, what may move and what may not, and the levels it makes."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from exact import cut_sizes
from test_adding import logits, same_parameters, save_base
from test_cli import run
from transformers import AutoModelForCausalLM

from elastic_sparsity import (
    ElasticCheckpoint,
    ElasticModel,
    add_structured,
    levels,
    optimize,
    plan,
    pruning,
    structured_tuning,
    verify,
)
from elastic_sparsity.arch import decoder_blocks, linears_of
from elastic_sparsity.end_to_end import EndToEndSettings
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.manifest import CONFIG_NAME
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.pruning import prune
from elastic_sparsity.structured import prune_structured_
from elastic_sparsity.structured_parts import in_dtype, sliced_model
from elastic_sparsity.structured_tuning import tune_
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

IDS = torch.randint(4, 260, (5, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = EndToEndSettings(steps=6, batch_size=2, adapter_lr=0.0, base_lr=1e-2, warmup=0.34, clip_norm=0.5)
AUTOCAST = autocast_factory("float32", "cpu")
LEVEL = "structured-0.5"


def cut(family):
    """Half of a tiny model, by magnitude, and the dense one."""
    teacher, model = (tiny_model(family).requires_grad_(False).eval() for _ in range(2))
    kept = prune_structured_(model, IDS, cut_sizes(model), scores="magnitude", autocast=AUTOCAST)
    return sliced_model(model, kept), teacher


def kl_of(small, teacher, ids):
    """nats a token."""
    log_p, log_q = (model(ids).logits.flatten(0, 1).log_softmax(-1) for model in (teacher, small))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def slowly_tuned(small, teacher):
    """The same by a plain loop. Returns: the steps' losses."""
    trained = [p for linear in linears_of(small).values() for p in linear.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(trained, lr=SETTINGS.base_lr), []
    for step in range(SETTINGS.steps):
        ramp = min(1.0, (step + 1) / (SETTINGS.warmup * SETTINGS.steps))
        rate = SETTINGS.base_lr * ramp * (1 + math.cos(math.pi * step / SETTINGS.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        loss = kl_of(small, teacher, IDS[[(2 * step) % 5, (2 * step + 1) % 5]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_slow_loop_gives_the_same_and_only_linears_move(family):
    (ours, teacher), (theirs, _), (before, _) = cut(family), cut(family), cut(family)
    losses, seen = slowly_tuned(theirs, teacher), []
    kl = tune_(ours, teacher, IDS, SETTINGS, autocast=AUTOCAST, on_step=lambda *step: seen.append(step))
    assert kl == pytest.approx(losses[-1], rel=1e-3, abs=1e-7), "the last quarter of six steps is one"
    assert seen == [(step, 6) for step in range(1, 7)]
    expected, moved = dict(theirs.named_parameters()), set()
    for (name, parameter), old in zip(ours.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=2e-4)
        assert not parameter.requires_grad and parameter.grad is None
        if not torch.equal(parameter, old):
            moved.add(name.rpartition(".")[0])
    assert moved == set(linears_of(ours)) and not ours.training
    assert ours.config._attn_implementation == before.config._attn_implementation


def test_it_comes_closer_to_the_dense_model():
    small, teacher = cut("llama")
    before = kl_of(small, teacher, IDS).item()
    settings = EndToEndSettings(steps=40, batch_size=2, adapter_lr=0.0, base_lr=3e-3, warmup=0.05, clip_norm=1.0)
    tune_(small, teacher, IDS, settings, autocast=AUTOCAST)
    assert kl_of(small, teacher, IDS).item() < 0.5 * before


def test_checkpointed_blocks_give_the_same_and_run_twice():
    found, calls = [], []
    for wanted in (False, True):
        small, teacher = cut("llama")
        first, count = decoder_blocks(small)[0], []
        first.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        calls.append(count)
        settings = EndToEndSettings(
            steps=3, batch_size=2, adapter_lr=0.0, base_lr=1e-2, warmup=0.0, clip_norm=1.0,
            gradient_checkpointing=wanted,
        )  # fmt: skip
        tune_(small, teacher, IDS, settings, autocast=AUTOCAST)
        found.append(small)
    assert [len(count) for count in calls] == [3, 6]
    for a, b in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bfloat16_products_come_near(family):
    found = []
    for precision in ("float32", "bfloat16"):
        small, teacher = cut(family)
        settings = EndToEndSettings(steps=4, batch_size=2, adapter_lr=0.0, base_lr=1e-3, warmup=0.0, clip_norm=1.0)
        found.append(tune_(small, teacher, IDS, settings, autocast=autocast_factory(precision, "cpu")))
        assert small.dtype == torch.float32
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_another_dtype_leaves_the_rotary_frequencies():
    small, _ = cut("llama")
    buffers = {name: buffer.clone() for name, buffer in small.named_buffers()}
    found = in_dtype(small, torch.bfloat16)
    assert found.dtype == found.config.dtype == torch.bfloat16 and buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in found.named_buffers())
    for a, b in zip(found.parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("scores", ["obs", "magnitude"])
def test_a_tuned_level_is_what_a_tuned_prune_makes(scores, tiny_checkpoint, settings, tmp_path, capsys):
    base = ElasticCheckpoint(tiny_checkpoint).config["base_model"]["id"]
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    for name, steps in (("plain", 0), ("tuned", 4)):
        prune(base, tmp_path / name, sparsity=0.5, scores=scores, steps=steps, lr=1e-3, **settings)
    add_structured(tmp_path / "c", [0.5], scores=scores, steps=4, lr=1e-3, **settings)
    plain, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "tuned"))
    found = ElasticModel.from_pretrained(tmp_path / "c", LEVEL)
    assert same_parameters(found, tuned) and torch.equal(logits(found), logits(tuned))
    assert not same_parameters(tuned, plain)
    assert all(check.passed for check in verify(tmp_path / "c"))
    record = ElasticCheckpoint(tmp_path / "c").config["structured"][LEVEL]
    assert record["calibration_tokens"] == (96 if scores == "obs" else 0), "what pruned it"
    tuning = record["tuning"]
    assert (tuning["steps"], tuning["lr"], tuning["batch_size"]) == (4, 1e-3, 2) and tuning["kl_to_dense"] > 0
    assert {x.name: x.tuning_steps for x in levels(tmp_path / "c")}[LEVEL] == 4
    _, stdout, _ = run(capsys, "inspect", tmp_path / "c")
    assert "MLP channels a block, tuned by 4 steps" in stdout
    _, stdout, _ = run(
        capsys, "prune", base, "--structured", 0.5, "--output", tmp_path / "cli", "--scores", scores, "--steps", 4,
        "--lr", 1e-3, *(word for name, value in settings.items() for word in (f"--{name}", value)),
    )  # fmt: skip
    assert same_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / "cli"), tuned)
    add_structured(tmp_path / "c", [0.25], scores=scores, **settings)
    assert ElasticCheckpoint(tmp_path / "c").config["structured"]["structured-0.25"]["tuning"] is None


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_as_it_was(tiny_checkpoint, settings, tmp_path, monkeypatch):
    """It is made so here: whether weights of 1e6 give one depends on how the CPU multiplies (AMX: none in 64 steps)."""
    calls, real = [], structured_tuning.head_kl

    def bursts(*args):
        calls.append(args)
        return real(*args) * (math.inf if len(calls) == 4 else 1.0)

    monkeypatch.setattr(structured_tuning, "head_kl", bursts)
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    before = (tmp_path / "c" / CONFIG_NAME).read_bytes()
    with pytest.raises(NumericsError, match=r"tuning: loss of level structured 50 % is inf at step 3; lower"):
        add_structured(tmp_path / "c", [0.5], steps=9, **settings)
    assert (tmp_path / "c" / CONFIG_NAME).read_bytes() == before
    assert sorted(x.name for x in (tmp_path / "c").iterdir()) == sorted(x.name for x in tiny_checkpoint.iterdir())


def test_the_pruned_model_makes_room_for_the_teacher(settings, tmp_path, monkeypatch):
    """The masked blocks of full size are gone before the dense model is loaded once more."""
    seen, real = [], pruning.load_base

    def sliced(model, kept):
        seen.append(decoder_blocks(model))
        return sliced_model(model, kept)

    def loaded(*names):
        if seen:
            assert {p.device.type for p in seen[0].parameters()} == {"meta"}
            seen.append("teacher")
        return real(*names)

    monkeypatch.setattr(pruning, "sliced_model", sliced)
    monkeypatch.setattr(pruning, "load_base", loaded)
    prune("random:llama", tmp_path / "x", sparsity=0.5, steps=1, **settings)
    assert seen[1:] == ["teacher"]


def test_tuned_biases_of_flap_are_kept(tiny_checkpoint, settings, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    add_structured(tmp_path / "c", [0.5, 0.25], scores="flap", steps=3, **settings)
    base = ElasticCheckpoint(tiny_checkpoint).config["base_model"]["id"]
    for fraction in (0.5, 0.25):
        prune(base, tmp_path / str(fraction), sparsity=fraction, scores="flap", steps=3, **settings)
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / str(fraction))
        found = ElasticModel.from_pretrained(tmp_path / "c", f"structured-{fraction}")
        assert same_parameters(found, wanted) and torch.equal(logits(found), logits(wanted))
    assert found.model.layers[0].self_attn.o_proj.bias.abs().max() > 0


def test_a_run_killed_while_it_tunes_goes_on(text_file, tmp_path, monkeypatch):
    recipe = tiny_recipe(
        calibration={"source": str(text_file), "samples": 6}, ladder={"sparsities": [0.5], "patterns": []},
        block={"steps": 0, "samples": 2}, end_to_end={"steps": 2, "batch_size": 2},
        structured={"fractions": [0.25, 0.5], "multiple": 8},
    )  # fmt: skip

    def killed(what, done, total):
        if (what, done) == ("tuning, structured 50 %", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(recipe, tmp_path / "c", progress=killed)
    assert [level.name for level in ElasticCheckpoint(tmp_path / "c").structured] == ["structured-0.25"]
    assert all(check.passed for check in verify(tmp_path / "c"))
    optimize(recipe, tmp_path / "c")
    optimize(recipe, tmp_path / "whole")
    for name in (LEVEL, "structured-0.25"):
        file = f"{name}.safetensors"
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("value", [1e6, math.nan])
def test_what_a_dtype_cannot_hold_is_no_model(value, settings, tmp_path, monkeypatch):
    def spoiled(small, *_, **__):
        with torch.no_grad():
            linears_of(small)["model.layers.0.mlp.up_proj"].weight[0, 0] = value
        return 1.0

    save_base(tmp_path / "base", "llama", torch.float32)
    monkeypatch.setattr(pruning, "tune_", spoiled)
    with pytest.raises(
        NumericsError, match="structured 50 %: 1 parameters are not finite in torch.float16, e.g. model"
    ):
        prune(str(tmp_path / "base"), tmp_path / "x", sparsity=0.5, steps=1, dtype="float16", **settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": -1}, "structured.steps"), ({"lr": 0.0}, "structured.lr"), ({"lr": math.nan}, "structured.lr")],
)
def test_bad_options_are_refused_by_name(options, message, settings, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prune("random:llama", tmp_path / "x", sparsity=0.5, **settings, **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("sections", "steps"),
    [
        ({"end_to_end": {"steps": 10}}, 3),  # of four levels
        ({"end_to_end": {"steps": 10}, "structured": {"steps": 7}}, 7),
        ({"end_to_end": {"steps": 10}, "structured": {"steps": 0}}, 0),
        ({"end_to_end": {"steps": 10, "trainable": "off"}}, 0),
        ({"end_to_end": {"steps": 10, "trainable": "off"}, "structured": {"steps": 2}}, 2),
    ],
)
def test_a_level_gets_the_steps_of_any_other(sections, steps):
    ladder = {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]}
    assert tiny_recipe(ladder=ladder, **sections).structured_steps == steps


def test_a_run_tunes_its_levels_on_all_samples(text_file, tmp_path):
    recipe = tiny_recipe(
        calibration={"source": str(text_file), "samples": 6}, ladder={"sparsities": [0.5], "patterns": []},
        block={"steps": 0, "samples": 2}, end_to_end={"steps": 3, "batch_size": 2},
        structured={"fractions": [0.5], "multiple": 8},
    )  # fmt: skip
    seen = []
    config = optimize(recipe, tmp_path / "c", progress=lambda *step: seen.append(step)).config
    assert ("tuning, structured 50 %", 3, 3) in seen
    record = config["structured"][LEVEL]
    assert record["calibration_tokens"] == 2 * 16 and record["tuning"]["steps"] == 3
    assert record["tuning"]["calibration_sha256"] == config["data"]["calibration_sha256"]


def test_the_plan_counts_it():
    few = {"calibration": {"samples": 4, "source": "x"}, "block": {"samples": 4}}
    steps = {"end_to_end": {"steps": 0, "batch_size": 2}, "structured": {"fractions": [0.25, 0.5], "multiple": 8}}
    found = {}
    for wanted in (0, 5):
        structured = {**steps["structured"], "steps": wanted}
        found[wanted] = plan(
            tiny_recipe(**few, **{**steps, "structured": structured}), gpu=False, probe=False
        )  # fmt: skip
    terms = {term.name: term.bytes for term in found[5].terms if term.stages == ("tuning",)}
    rest = 2 * 260 * 32 + 32
    total = 2 * (9216 + 2 * 32) + rest  # as tiny models go: blocks (linears, norms), embeddings, head, last norm
    assert terms["dense teacher"] == 4 * total
    assert terms["smaller model, gradients and Adam's moments"] == 16 * 2 * 9216 * 3 // 4
    assert terms["activations kept for the backward pass"] > 0 < terms["head and logits"]
    assert "tuning" not in {stage for term in found[0].terms for stage in term.stages if term.place == "device"}
    works = {wanted: {x.name: x for x in each.work if x.phase == "structured"} for wanted, each in found.items()}
    new = {name: work for name, work in works[5].items() if name not in works[0]}
    tokens = 5 * 2 * 16
    assert {name: work.passes for name, work in new.items()} == {
        "dense logits": 2 * 2 * tokens, "tuning": 2 * tokens * 5 // 4, "head of tuning": 2 * 2 * tokens
    }  # fmt: skip


def test_a_plan_that_lacks_memory_for_tuning_alone_leaves_the_training_on():
    """A limit between the peaks of training and of tuning: the phase stays on, and the plan says what helps."""
    config_file = Path(__file__).parent / "configs" / "llama-3.1-70b.json"

    def planned(**structured):
        recipe = tiny_recipe(
            model={"id": "meta-llama/Llama-3.1-70B", "dtype": "bfloat16"}, structured=structured,
            end_to_end={"trainable": "auto", "steps": 8}, precision="bfloat16",
        )  # fmt: skip
        return plan(recipe, config_file=config_file, limits={"device": 600 * 10**9}, probe=False)

    plain, tuned = planned(), planned(fractions=[0.25])
    assert plain.choices == tuned.choices and plain.choices.trainable == "adapters" and not plain.misfits
    assert [peak.stage for peak in tuned.misfits] == ["tuning"]
    best = tuned.knobs[0]
    assert best.setting == "structured.steps = 0" and best.fits
    assert not planned(fractions=[0.25], steps=0).misfits
    terms = {term.name: term.bytes for term in tuned.terms if term.stages == ("tuning",)}
    weights = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    other = 2 * 128256 * 8192 + 8192 + 80 * 2 * 8192
    rest = 2 * 128256 * 8192 + 8192
    assert terms["dense teacher"] == 2 * weights + 4 * other + 2 * rest
    assert terms["smaller model, gradients and Adam's moments"] == 18 * weights * 3 // 4
    assert terms["head and logits"] > 2 * 128256 * 8192, "always cast: what is tuned is in float32"


def test_blocks_that_differ_are_tuned():
    teacher, model = (tiny_model("llama").requires_grad_(False).eval() for _ in range(2))
    kept = [{"attention": torch.tensor([1]), "mlp": torch.arange(8)},
            {"attention": torch.arange(2), "mlp": torch.arange(40)}]  # fmt: skip
    small = sliced_model(model, kept)
    before = kl_of(small, teacher, IDS).item()
    settings = EndToEndSettings(steps=20, batch_size=2, adapter_lr=0.0, base_lr=3e-3, warmup=0.05, clip_norm=1.0)
    tune_(small, teacher, IDS, settings, autocast=AUTOCAST)
    assert kl_of(small, teacher, IDS).item() < before
    assert [block.mlp.down_proj.weight.shape[1] for block in decoder_blocks(small)] == [8, 40]
