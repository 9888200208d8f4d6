"""A plan's terms add up to its peaks, every knob it names lowers them, and a run that cannot fit is refused first."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import plan
from elastic_sparsity.config import make_recipe, read_recipe
from elastic_sparsity.doctor import read_facts
from elastic_sparsity.errors import ConfigError, MemoryPlanError, UnsupportedModelError
from elastic_sparsity.free_memory import cgroup_free, free_here
from elastic_sparsity.masks import drop_levels, pattern_mask
from elastic_sparsity.memory_plan import memory_terms, peaks
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.plan_sizes import STAGES, Choices, Sizes, checkpoint_bytes
from elastic_sparsity.planning import choose
from elastic_sparsity.preparing import settle
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

GB = 10**9
CONFIG = Path(__file__).parent / "configs" / "llama-3.1-70b.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "llama-3.1-70b.toml"
LIMITS = {"device": 24 * GB, "host": 64 * GB, "disk": 500 * GB}


@pytest.fixture(scope="module")
def shapes():
    return read_shapes("meta-llama/Llama-3.1-70B", config_file=CONFIG)


def large(**sections):
    data = read_recipe(RECIPE).model_dump(mode="json")
    return make_recipe({**data, **{name: {**data[name], **fields} for name, fields in sections.items()}})


def peak(shapes, recipe, place="device", **choices):
    wanted = {"weights": "stream", "activations": "disk", "trainable": "off", "precision": "bfloat16", "gpu": True}
    found = peaks(memory_terms(shapes, recipe, Choices(**{**wanted, **choices})))
    return next(x.bytes for x in found if x.place == place)


def test_shapes_come_from_the_config_alone(shapes):
    assert (shapes.depth, shapes.width, shapes.vocabulary) == (80, 8192, 128256)
    assert shapes.total == 70_553_706_496  # as published
    assert shapes.stored == 2 and not shapes.has_weights
    assert shapes.input_widths() == [8192, 8192, 8192, 28672]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_shapes_of_every_family(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    found = read_shapes(str(tmp_path), "float32")
    assert found.total == sum(p.numel() for p in model.parameters()) and not found.has_weights


def test_terms_add_up_to_the_peaks(shapes):
    found = plan(large(), config_file=CONFIG, limits=LIMITS)
    for each in found.peaks:
        assert each.bytes == sum(term.bytes for term in each.terms)
        for stage in STAGES:
            inside = [term for term in found.terms if term.place == each.place and stage in term.stages]
            assert sum(term.bytes for term in inside) <= each.bytes
    assert all(term.why and term.bytes > 0 for term in found.terms)
    assert {each.place for each in found.peaks} == {"device", "host", "disk"}


def test_text_that_the_model_writes_takes_memory(shapes):
    """By hand: 80 blocks x 8 heads x 128 x 2,048 tokens x 2 (keys, values) x 2 bytes a sequence; logits V x 16."""
    choices = Choices(weights="resident", activations="host", trainable="off", precision="bfloat16", gpu=True)
    found = {}
    for own in (0, 5, 1000):
        text = {"samples": 2000, "length": 2048, "self_share": own / 2000}
        recipe = large(calibration=text, memory={"weights": "auto"}, end_to_end={"trainable": "off"})
        terms = memory_terms(shapes, recipe, choices)
        found[own] = sum(term.bytes for term in terms if term.name == "sampling calibration text")
    row = 2 * 80 * 8 * 128 * 2048 * 2 + 128_256 * 16
    assert found == {0: 0, 5: 5 * row, 1000: 128 * row}


def test_llama_70b_fits_24_gb(shapes):
    found = plan(large(), config_file=CONFIG, limits=LIMITS)
    assert not found.misfits and found.timing is None
    found.check()
    assert 10 * GB < found.peaks[0].bytes < 20 * GB


@pytest.mark.parametrize(
    ("place", "less", "more"),
    [
        ("device", {"weights": "stream"}, {"weights": "resident"}),
        ("device", {"activations": "disk"}, {"activations": "device"}),
        ("host", {"activations": "disk"}, {"activations": "host"}),
        ("device", {"weights": "resident"}, {"weights": "resident", "trainable": "adapters"}),
        ("device", {"weights": "resident", "trainable": "adapters"}, {"weights": "resident", "trainable": "base"}),
        ("device", {"precision": "bfloat16"}, {"precision": "float32"}),
    ],
)
def test_choices_lower_the_peak(shapes, place, less, more):
    assert peak(shapes, large(), place, **less) < peak(shapes, large(), place, **more)


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        ("block", "batch_size", (1, 2, 8)),
        ("block", "base_lr", (0.0, 1e-4)),
        ("calibration", "length", (512, 2048, 4096)),
        ("adapters", "ranks", (4, 16, 64)),
        ("ladder", "patterns", ([], ["2:4"])),
        ("scores", "method", ("wanda", "obs")),
    ],
)
def test_monotone_in_every_knob(shapes, section, field, values):
    recipes = [large(**{"adapters": {"ranks": 16}, section: {field: value}}) for value in values]
    figures = [peak(shapes, recipe) for recipe in recipes]
    assert figures == sorted(set(figures))


def test_samples_and_streams_take_disk(shapes):
    figures = [peak(shapes, large(block={"samples": n}), "host", activations="host") for n in (16, 64, 128)]
    assert figures == sorted(set(figures))
    fewer = peak(shapes, large(mixer={"mode": "fixed"}), "host", activations="host")
    assert fewer < figures[-1]


def test_checkpointing_keeps_one_block(shapes):
    def need(**end_to_end):
        return peak(shapes, large(memory={"weights": "resident"}, end_to_end=end_to_end), weights="resident",
                    trainable="adapters")  # fmt: skip

    assert need(gradient_checkpointing=True) < need(gradient_checkpointing=False)


def test_refusal_names_place_stage_and_knobs():
    found = plan(
        large(block={"batch_size": 8, "samples": 64}), config_file=CONFIG, limits={**LIMITS, "device": 10 * GB}
    )
    assert [each.place for each in found.misfits] == ["device"]
    with pytest.raises(MemoryPlanError, match=r"device: needs .* GB \(stage 'training'\), has 10.0 GB") as caught:
        found.check()
    assert "block.batch_size = 1" in str(caught.value) and "calibration.length = 1024" in str(caught.value)
    hosts = plan(large(memory={"activations": "host"}), config_file=CONFIG, limits={"host": 16 * GB}, gpu=True)
    assert hosts.knobs[0].setting == 'memory.activations = "disk"' and hosts.knobs[0].fits


def test_auto_takes_what_fits(shapes):
    recipe = large(memory={"weights": "auto", "activations": "auto"}, end_to_end={"trainable": "auto"})
    one = replace(shapes, depth=8)

    def chosen(device, host):
        found = choose(recipe, one, {"device": int(device * GB), "host": int(host * GB)}, gpu=True)
        return found.trainable, found.weights, found.activations

    assert chosen(1000, 1000) == ("base", "resident", "device")
    assert chosen(75, 1000)[0] == "adapters"
    assert chosen(45, 1000) == ("off", "resident", "host")
    assert chosen(16, 1000) == ("off", "stream", "host")
    assert chosen(16, 20) == ("off", "stream", "disk")


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    """A memory in which one process can train base values is not promised to each of two."""
    recipe = tiny_recipe(end_to_end={"trainable": "auto"})
    shapes = read_shapes("random:llama")
    base = Choices(weights="resident", activations="host", trainable="base", precision="float32", gpu=False)
    (host,) = (peak.bytes for peak in peaks(memory_terms(shapes, recipe, base)) if peak.place == "host")

    def trained(free, *processes):
        monkeypatch.setattr("elastic_sparsity.preparing.free_here", lambda: {"host": free})
        return settle(recipe, *processes[:1], {}, num_local=processes[1]).trainable

    assert trained(host, 1, 1) == "base"
    assert trained(host, 2, 2) == "off"
    assert trained(host, 2, 1) == "base"  # on two machines
    assert trained(2 * host, 2, 2) == "base"


def test_a_run_says_what_may_not_fit_and_what_it_leaves_out(monkeypatch, caplog):
    """A recipe's own wish is done as it says, whatever is free: hours before the memory ends, the log says so."""
    shapes = read_shapes("random:llama")

    def warnings(trainable, free):
        monkeypatch.setattr("elastic_sparsity.preparing.free_here", lambda: {"host": free})
        caplog.clear()
        settle(tiny_recipe(end_to_end={"trainable": trainable}), 1, {})
        return [record.message for record in caplog.records]

    def host(trainable):
        choices = Choices(weights="resident", activations="disk", trainable=trainable, precision="float32", gpu=False)
        recipe = tiny_recipe(end_to_end={"trainable": trainable}, memory={"activations": "disk"})
        return next(peak.bytes for peak in peaks(memory_terms(shapes, recipe, choices)) if peak.place == "host")

    assert warnings("base", 10**12) == warnings("auto", 10**12) == []
    (found,) = warnings("base", host("base") // 2)
    assert "the run may not fit: host memory, stage " in found and "`elastic-sparsity plan` says what helps" in found
    assert host("adapters") < host("base")
    assert warnings("auto", host("adapters")) == [
        "end-to-end phase trains the adapters alone: base weights too do not fit into memory"
    ]


def test_memory_that_a_container_may_use(tmp_path, monkeypatch):
    """The smallest of all groups counts, with what the kernel gives back; what is missing or "max" is no limit."""

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert cgroup_free(tmp_path) == float("inf")
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "70\n")
    assert cgroup_free(tmp_path) == float("inf")
    write("sys/fs/cgroup/a/memory.max", "100\n")
    write("sys/fs/cgroup/a/memory.current", "70\n")
    write("sys/fs/cgroup/a/memory.stat", "active_file 9\ninactive_file 5\n")
    assert cgroup_free(tmp_path) == 35
    write("proc/self/cgroup", "3:cpu,cpuacct:/d\n2:memory:/docker/x\n")  # version 1; the container sees its own as root
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "600\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50\n")
    assert cgroup_free(tmp_path) == 450
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1100\n")
    assert cgroup_free(tmp_path) == 0
    before = free_here()["host"]
    monkeypatch.setattr("elastic_sparsity.free_memory.cgroup_free", lambda: 0)
    assert free_here()["host"] < before
    assert read_facts().free_bytes == 0, "bench would be ended by its container"


def test_what_a_run_would_refuse_late_is_refused_first(tmp_path):
    odd = tiny_recipe(ladder={"patterns": ["2:4", "2:5"]})
    for refuse in (lambda: plan(odd, gpu=False, probe=False), lambda: settle(odd, 1, {})):
        with pytest.raises(ConfigError, match=r"ladder.patterns: '2:5': self_attn.q_proj .* 32 inputs.* of 5"):
            refuse()
    tiny_model("llama").double().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model.dtype: .* 8 bytes a number.* set 'float32'"):
        plan(tiny_recipe(model={"id": str(tmp_path)}), gpu=False)


def test_disk_holds_blocks_and_checkpoint(shapes):
    sizes = Sizes(shapes, large(), Choices(weights="stream", activations="disk", trainable="off",
                                           precision="bfloat16", gpu=True))  # fmt: skip
    dense = shapes.total * 2
    assert 0.5 * dense < checkpoint_bytes(sizes) < 1.05 * dense


def test_checkpoint_size_is_near(tiny_checkpoint):
    from elastic_sparsity import ElasticCheckpoint

    recipe = tiny_recipe()
    choices = Choices(weights="resident", activations="host", trainable="base", precision="float32", gpu=False)
    planned = checkpoint_bytes(Sizes(read_shapes("random:llama"), recipe, choices))
    found = ElasticCheckpoint(tiny_checkpoint).total_bytes()
    headers = 20_000  # of safetensors, which a model of this size notices
    assert planned < found + headers and planned > 0.8 * (found - headers)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_activations_kept_for_the_backward_pass(family, product):
    """What autograd keeps of one block, against the plan's figure."""
    tokens = 64
    size = {"hidden_size": 128, "intermediate_size": 384, "ffn_dim": 384, "head_dim": 32, "num_key_value_heads": 4,
            "word_embed_proj_dim": 128}  # fmt: skip
    known = tiny_model(family).config.to_dict()
    model = tiny_model(family, **{name: value for name, value in size.items() if name in known})
    shapes = shapes_of(model)
    recipe = tiny_recipe(calibration={"length": tokens})
    sizes = Sizes(shapes, recipe, Choices(weights="stream", activations="disk", trainable="off", precision=product,
                                          gpu=True))  # fmt: skip
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.numel() >= tokens * 16:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    from elastic_sparsity.blocks import BlockRunner
    from elastic_sparsity.distill import relative_loss

    path = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    blocks = model.get_submodule(path)
    runner = BlockRunner(model.base_model, blocks, torch.zeros(1, tokens, dtype=torch.int64), 1)
    call = runner.call(0)
    for linear in blocks[0].modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.requires_grad_(True)
    hidden = torch.randn(1, tokens, shapes.width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=product == "bfloat16"):
            output = call(hidden)
        relative_loss(output, torch.randn_like(output)).backward()
    casts = 2 * shapes.block_linears if product == "bfloat16" else 0  # autocast's copies of weights: not ours
    found = sum(size for size, _ in kept.values()) - casts
    print("ratio", family, product, sizes.kept_for_backward(tokens) / found)
    assert 0.9 < sizes.kept_for_backward(tokens) / found < 1.5


def shapes_of(model):
    from elastic_sparsity.model_shapes import _shapes_of

    return _shapes_of(model, "tiny", True)


def test_a_slice_of_rows_is_sorted_like_all(monkeypatch):
    scores = torch.randn(37, 64).mul(4).round()
    whole = drop_levels(scores, [32, 20]), pattern_mask(scores, 2, 4), pattern_mask(scores, 2, 4, scores > 0)
    monkeypatch.setattr("elastic_sparsity.masks.SORTED_AT_ONCE", 300)
    parts = drop_levels(scores, [32, 20]), pattern_mask(scores, 2, 4), pattern_mask(scores, 2, 4, scores > 0)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_probe_gives_the_time():
    found = plan(tiny_recipe(), gpu=False)
    assert found.timing is not None and found.seconds > 0
    assert found.timing.scale == 1 and found.timing.tokens == 32
    assert plan(tiny_recipe(), gpu=False, probe=False).seconds is None
    kinds = {(work.phase, work.direction) for work in found.work}
    assert kinds == {(a, b) for a in ("block phase", "end to end") for b in ("forward", "forward and backward")}


def test_token_passes_are_counted():
    found = plan(tiny_recipe(), gpu=False, probe=False)
    passes = {(work.phase, work.name): work.passes for work in found.work}
    assert passes["block phase", "training"] == 2 * 2 * 4 * 2 * 16  # blocks, steps, groups, batch, tokens
    assert passes["block phase", "dense targets"] == 2 * 4 * 16
    assert passes["end to end", "training"] == 2 * 4 * 2 * 16


def command(*arguments, columns=200):
    return subprocess.run(
        [sys.executable, "-m", "elastic_sparsity", "plan", *map(str, arguments)], capture_output=True, text=True,
        env={"COLUMNS": str(columns), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)},
        timeout=120,
    )  # fmt: skip


def test_command_prints_every_term_then_refuses():
    done = command(RECIPE, "--config", CONFIG, "--device-memory", "24GB", "--host-memory", "64GB", "--disk", "500GB")
    assert done.returncode == 0, done.stderr
    for name in ("embeddings", "effective weights and masks", "finished blocks", "checkpoint", "token-passes"):
        assert name in done.stdout
    done = command(RECIPE, "--config", CONFIG, "--device-memory", "8GB")
    assert done.returncode == 2 and "peaks" in done.stdout
    assert "error: plan: meta-llama/Llama-3.1-70B does not fit. device: needs" in done.stderr
    assert "calibration.length = 1024" in done.stderr


def test_command_as_json():
    done = command(RECIPE, "--config", CONFIG, "--device-memory", "24GB", "--json", "--no-probe")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["seconds"] is None and found["limits"] == {"device": 24 * GB}
    at_peak = next(each for each in found["peaks"] if each["place"] == "device")
    inside = [t for t in found["terms"] if t["place"] == "device" and at_peak["stage"] in t["stages"]]
    assert at_peak["bytes"] == sum(term["bytes"] for term in inside)
    assert all(term["why"] for term in found["terms"])


def test_the_limits_of_this_machine(monkeypatch):
    from typer.testing import CliRunner

    from elastic_sparsity.cli import app
    from elastic_sparsity.cli_plan import limits_here

    monkeypatch.setattr("elastic_sparsity.cli_plan.free_here", lambda: {"host": 1})
    assert limits_here(None) == limits_here(False) and limits_here(False)["host"] == 1
    assert limits_here(True) == {}  # a GPU of another machine
    monkeypatch.setattr("elastic_sparsity.cli_plan.free_here", lambda: {"host": 1, "device": 2})
    assert limits_here(True)["device"] == 2 and "device" not in limits_here(False)

    def said(*arguments):
        return CliRunner().invoke(app, ["plan", "smoke", "--no-probe", *map(str, arguments)]).stdout

    monkeypatch.undo()
    assert "host" in json.loads(said("--no-gpu", "--json"))["limits"]
    assert "No limits: give" in said("--gpu", "--config", CONFIG)


def test_bad_arguments_are_named(tmp_path):
    from typer.testing import CliRunner

    from elastic_sparsity.cli import app

    def error(*arguments):
        return str(CliRunner().invoke(app, ["plan", *map(str, arguments)]).exception)

    config = ("--config", CONFIG)
    assert error(RECIPE, *config, "--device-memory", "lots").startswith("--device-memory: 'lots' is no size")
    assert "--host-memory: '0GB' is nothing" in error(RECIPE, *config, "--host-memory", "0GB")
    assert "--device-memory: without a GPU" in error(RECIPE, *config, "--device-memory", "1GB", "--no-gpu")
    assert "no such file" in error("nowhere", *config)
    (tmp_path / "config.json").write_text("[]")
    assert "names no model_type" in error(RECIPE, "--config", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "no config.json of a causal LM: JSONDecodeError" in error(RECIPE, "--config", tmp_path)
    assert "no config.json of a causal LM" in error(RECIPE, "--config", tmp_path / "missing.json")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        read_shapes("x", config_file=tmp_path)
    with pytest.raises(ConfigError, match="limits"):
        plan(large(), config_file=CONFIG, limits={"moon": 1})
    with pytest.raises(ConfigError, match="no folder"):
        read_shapes(str(tmp_path / "nothing"))
