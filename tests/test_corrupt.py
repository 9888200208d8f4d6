"""Corrupt files: each damage gives an error that names it, early and in little memory, and never another exception.

Two enemies: bit rot, which size and hash must catch, and an attacker who can rewrite every file and fixes sizes and
hashes up afterwards, so that the deeper checks must.
"""

import functools
import hashlib
import itertools
import json
import os
import resource
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastic_sparsity import ElasticModel, set_level
from elastic_sparsity.adapters import merge
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, ElasticSparsityError
from elastic_sparsity.manifest import CONFIG_NAME, digest
from elastic_sparsity.packing import pack_bits, pack_positions, unpack_bits, unpack_positions
from elastic_sparsity.slicing import STATE, load_tokenizer

ALL = ("0.5", "0.6", "0.7", "2:4")
CORE, SHELL_6, SHELL = "shell-core.safetensors", "shell-level-0.6.safetensors", "shell-level-0.5.safetensors"
PATTERN, SHARED = "shell-pattern-2of4.safetensors", "shared.safetensors"
ADAPTERS = "adapters-2.safetensors"  # what only 70 % reads
DENSE = ("0.5", "2:4")  # the levels that read SHELL
Q = "model.layers.0.self_attn.q_proj"  # 32 x 32; keeps 16, 13 and 10 a row, so SHELL has 96 values of it
DOWN = "model.layers.1.mlp.down_proj"  # the last linear
GONE = object()
MAX_GROWTH = 200 * 2**20


def forge(name, change, fixed=True):
    """Damage: a file's bytes become `change(bytes)`; size and hash in elastic_config.json are fixed up, or not."""

    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if fixed:
            fix_record(folder, name)

    return damage


def fix_record(folder, name):
    """Size, hash and digest in elastic_config.json are made right again, as far as it still is one."""
    try:
        data, root = (folder / name).read_bytes(), json.loads((folder / CONFIG_NAME).read_text())
        for entry in [*root["extras"], *itertools.chain(*root["files"].values())]:
            if entry["file"] == name:
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        root["digest"] = digest(root)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    (folder / CONFIG_NAME).write_text(json.dumps(root))


def fields(name, *path, **changes):
    """Damage: in a JSON file, what lies at `path` gets other fields, or loses those that are GONE."""

    def edit(data):
        root = json.loads(data)
        found = functools.reduce(lambda node, key: node[key], path, root)
        for key, value in changes.items():
            found[key] = value
            if value is GONE:
                del found[key]
        return json.dumps(root).encode()

    return forge(name, edit)


rot = functools.partial(forge, fixed=False)
config = functools.partial(fields, CONFIG_NAME)
model = functools.partial(fields, "config.json")


def tensors(name, change, **metadata):
    """Damage: a safetensors file after `change(tensors)`, well-formed, with size and hash fixed up."""

    def damage(folder):
        with safe_open(folder / name, "pt") as file:
            kept = file.metadata()
        parts = load_file(folder / name)
        change(parts)
        save_file(parts, folder / name, metadata={**kept, **metadata})
        fix_record(folder, name)

    return damage


def values(change):
    return tensors(SHELL, lambda t: t.update({f"{Q}.values": change(t[f"{Q}.values"])}))


def header(name, tensor, **changes):
    """Damage: one tensor's entry in the JSON at the start of a safetensors file."""

    def edit(data):
        end = 8 + int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8:end])
        parsed[tensor].update(changes)
        text = json.dumps(parsed).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return forge(name, edit)


def swap(fixed):
    """Damage: the two increments under each other's name."""

    def damage(folder):
        first, second = (folder / SHELL).read_bytes(), (folder / SHELL_6).read_bytes()
        forge(SHELL, lambda b: second, fixed)(folder)
        forge(SHELL_6, lambda b: first, fixed)(folder)

    return damage


def repeat_the_core(folder):  # in the 60 % increment
    held = unpack_bits(load_file(folder / CORE)[f"{Q}.mask"], 32 * 32).nonzero().flatten()[: 3 * 32]
    tensors(SHELL_6, lambda t: t.update({f"{Q}.positions": pack_positions(held, 32 * 32)}))(folder)


def move_to_another_row(parts):
    found = unpack_positions(parts[f"{Q}.positions"], 3 * 32, 32 * 32).tolist()
    free = next(p for p in range(32) if p not in found)
    parts[f"{Q}.positions"] = pack_positions(torch.tensor(sorted([free, *found[:-1]])), 32 * 32)


def keep_three_of_four(folder):
    """One more bit in a 2:4 group that is full, where an earlier shell holds a value, so that all counts fit."""
    checkpoint = ElasticCheckpoint(folder)
    half, pattern = (dict(checkpoint.level_linears(checkpoint.find(x)))[Q].mask_OI for x in DENSE)
    more = pattern.flatten()
    more[(half & ~pattern).flatten().nonzero()[0]] = True
    tensors(PATTERN, lambda t: t.update({f"{Q}.mask": pack_bits(more)}))(folder)


OUTSIDE = ("../shared.safetensors", "/etc/passwd", "..\\shared.safetensors", "a/../../shared.safetensors", "C:x", "")
LARGER = [i / 1e6 for i in range(10**6)]
ROTARY = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "partial_rotary_factor": 1e8}

# name: damage, levels that it affects, what the error must say
DAMAGE = {
    # bit rot
    "truncated": (rot(SHELL, lambda b: b[:-3]), DENSE, rf"{SHELL}: has \d+ bytes, expected \d+"),
    "appended": (rot(SHELL, lambda b: b + b"x"), DENSE, rf"{SHELL}: has \d+ bytes, expected"),
    "flipped bit": (rot(SHELL, lambda b: b[:-1] + bytes([b[-1] ^ 4])), DENSE, f"{SHELL}: sha256"),
    "missing": (lambda f: (f / SHELL).unlink(), DENSE, f"{SHELL} is missing.*complete here: 0.6, 0.7"),
    "renamed": (lambda f: (f / SHELL).rename(f / "x.safetensors"), DENSE, f"{SHELL} is missing"),
    "swapped": (swap(False), ("0.5", "0.6", "2:4"), rf"{SHELL_6}: has \d+ bytes"),
    "adapters truncated": (rot(ADAPTERS, lambda b: b[:-1]), ("0.7",), rf"{ADAPTERS}: has \d+ bytes"),
    "config.json changed": (rot("config.json", lambda b: b.replace(b"silu", b"gelu")), ALL, "config.json: sha256"),
    "config.json missing": (lambda f: (f / "config.json").unlink(), ALL, "config.json: is missing"),
    "parts of another count": (
        config("files", "shell-core", 0, file="shell-core-00001-of-00009.safetensors"), ALL, "names of its 1 parts"
    ),
    "adapters of another dtype": (config(adapter_dtype="float16"), ALL, "adapter_dtype: float16"),
    "record rotted": (rot(CONFIG_NAME, lambda b: b.replace(b'"shared",\n', b'"none",\n')), ALL, "digest differs"),
    "record truncated": (rot(CONFIG_NAME, lambda b: b[:-9]), ALL, f"{CONFIG_NAME}: cannot be read"),
    "wrong hash": (config("files", "shared", 0, sha256="0" * 64), ALL, f"{SHARED}: sha256"),
    **{f"no {x}": (config(**{x: GONE}), ALL, f"field {x}") for x in ("requires", "extras", "files", "checkpoint_id")},
    **{f"no {x}": (config("ladder", **{x: GONE}), ALL, f"field ladder.{x}") for x in ("pattern_parent", "group_ends")},
    **{f"no {x}": (config("linears", Q, **{x: GONE}), ALL, f"{Q}.{x}") for x in ("transposed", "kept")},
    # safetensors files that are wrong though their size and hash are recorded
    "forged truncated": (forge(SHELL, lambda b: b[:-3]), DENSE, f"{SHELL}: cannot be read"),
    "forged appended": (forge(SHELL, lambda b: b + b"x"), DENSE, f"{SHELL}: cannot be read"),
    "header length": (forge(SHELL, lambda b: (2**60).to_bytes(8, "little") + b[8:]), DENSE, f"{SHELL}: cannot be read"),
    "header nested": (forge(SHELL, lambda b: b"\0\0\1" + bytes(5) + b"[" * 2**16), DENSE, f"{SHELL}: cannot be read"),
    "header overlap": (header(SHELL, f"{Q}.values", data_offsets=[0, 384]), DENSE, f"{SHELL}: cannot be read"),
    "header beyond": (header(SHELL, f"{Q}.values", data_offsets=[2**40, 2**40 + 384]), DENSE, f"{SHELL}: cannot"),
    "header shape": (header(SHELL, f"{Q}.values", shape=[2**62, 2**62]), DENSE, f"{SHELL}: cannot be read"),
    "wrong dtype": (values(lambda v: v.half()), DENSE, rf"{SHELL}: {Q}.values: found F16 \(96,\), expected F32"),
    "wrong shape": (values(lambda v: v[None]), DENSE, rf"{SHELL}: {Q}.values: found F32 \(1, 96\), expected"),
    "tensor missing": (tensors(SHELL, lambda t: t.pop(f"{Q}.values")), DENSE, f"{SHELL}: 1 tensors missing .{Q}"),
    "tensor too many": (tensors(SHELL, lambda t: t.update(m=torch.ones(1))), DENSE, f"{SHELL}: 1 .* not expected .m"),
    "shared dtype": (header(SHARED, "lm_head.weight", dtype="I32"), ALL, "shared: lm_head.weight: found I32"),
    "shared odd dtype": (header(SHARED, "lm_head.weight", dtype="F4", shape=[520, 128]), ALL, "lm_head.*found F4"),
    "shared missing": (tensors(SHARED, lambda t: t.pop("lm_head.weight")), ALL, "do not fit .*first lm_head.weight"),
    "shared too many": (tensors(SHARED, lambda t: t.update(m=torch.ones(1))), ALL, "do not fit .*first m:"),
    "another's shell": (tensors(SHELL, len, elastic_checkpoint="0" * 32), DENSE, f"{SHELL}: belongs to another"),
    "another's shared": (tensors(SHARED, len, elastic_checkpoint="0" * 32), ALL, f"{SHARED}: belongs to another"),
    "forged swapped": (swap(True), ("0.5", "0.6", "2:4"), f"{SHELL_6}: model.*found .*expected"),
    "not nested": (repeat_the_core, ("0.5", "0.6", "2:4"), f"{Q}: .* rows keep another number than"),
    "rows differ": (tensors(SHELL, move_to_another_row), DENSE, f"{Q}: 2 rows keep another number"),
    "3 of 4": (keep_three_of_four, ("2:4",), f"{Q}: (1 groups keep more|shell 3)"),
    "NaN": (values(lambda v: v * torch.nan), DENSE, f"{Q}: .*NaN or infinite"),
    "infinity": (values(lambda v: v.fill_(-torch.inf)), DENSE, f"{Q}: .*NaN or infinite"),
    "NaN adapter": (tensors(ADAPTERS, lambda t: t[f"{Q}.lora_B"].fill_(torch.nan)), ("0.7",), f"{Q}: .*NaN"),
    "NaN shared": (tensors(SHARED, lambda t: t["model.norm.weight"].fill_(torch.nan)), ALL, "model.norm.weight: .*NaN"),
    # elastic_config.json
    "a list": (rot(CONFIG_NAME, lambda b: b"[" + b + b"]"), ALL, f"{CONFIG_NAME}: not the config"),
    "nested": (rot(CONFIG_NAME, lambda b: b"[" * 10**5 + b"]" * 10**5), ALL, f"{CONFIG_NAME}: cannot be read"),
    "version": (config(format_version=3), ALL, "format version 3; this release reads"),
    "feature": (config(requires=["warp"]), ALL, "needs warp, unknown to this release"),
    "no file of a shell": (config("files", **{"shell-core": []}), ALL, "field files.shell-core"),
    "listed twice": (config("extras", 0, file="tokenizer.json"), ALL, "listed twice"),
    **{f"extra {x!r}": (config("extras", 0, file=x), ALL, "field extras.0.*not a plain file name") for x in OUTSIDE},
    **{f"file {x!r}": (config("files", "shared", 0, file=x), ALL, "files.shared.0.*not a plain") for x in OUTSIDE},
    "absurd linear": (config("linears", Q, shape=[2**40, 2**40]), ALL, f"{Q}: shape .*beyond any model"),
    "large linear": (config("linears", Q, shape=[2**24, 2**23]), ALL, f"{CORE}: {Q}.*expected"),
    "digits in a shape": (config("linears", Q, shape=[10**4000, 32]), ALL, "beyond any model"),
    "negative count": (config("linears", Q, kept=[16, 13, -1]), ALL, r"\[16, 13, -1\] kept a row"),
    "fractional count": (config("linears", Q, kept=[16, 13.5, 10]), ALL, f"{Q}.kept.1"),
    "fractional shape": (config("linears", Q, shape=[32.5, 32]), ALL, f"{Q}.shape.0"),
    "negative values": (config("linears", Q, pattern_values=[-1]), ALL, r"\[-1\] values for patterns"),
    "transposed": (config("linears", Q, transposed=True), ALL, f"{Q}: transposed is True"),
    "negative rank": (config(ranks=[2, 2, 2, -2]), ALL, "field: ranks: "),
    "absurd rank": (config(ranks=[2**62] * 4), ALL, "adapters-0.*expected"),
    "negative size": (config("files", "shared", 0, bytes=-1), ALL, "files.shared.0.bytes"),
    "NaN sparsity": (config("ladder", sparsities=[0.5, 0.6, torch.nan]), ALL, "ladder.sparsities"),
    "digits in a pattern": (config("ladder", patterns=["9" * 5000 + ":4"]), ALL, "ladder.patterns"),
    "too many patterns": (config("ladder", patterns=[f"{'0' * i}2:4" for i in range(3000)]), ALL, "ladder.patterns"),
    "too many groups": (config("ladder", group_ends=LARGER), ALL, "ladder.group_ends"),
    # config.json
    "model nested": (forge("config.json", lambda b: b"[" * 10**5 + b"]" * 10**5), ALL, "config.json"),
    "model a list": (forge("config.json", lambda b: b"[]"), ALL, "config.json"),
    "model type": (model(model_type="bert"), ALL, "config.json: model type 'bert'"),
    "layers": (model(num_hidden_layers=10**9), ALL, "config.json has 1000000000 layers, the shells 2"),
    "layers, other key": (model(n_layer=10**9), ALL, "config.json has 1000000000 layers"),
    "layers of Qwen2": (model(model_type="qwen2", num_hidden_layers=10**9), ALL, "config.json has 1000000000 layers"),
    "width": (model(hidden_size=10**9), ALL, "config.json"),
    "vocabulary": (model(vocab_size=10**8), ALL, "config.json, first lm_head.weight: found"),
    "absurd vocabulary": (model(vocab_size=10**15), ALL, "config.json, first lm_head.weight: found"),
    "head width": (model(head_dim=10**8), ALL, "config.json, first model.layers.0"),
    "no heads": (model(num_attention_heads=0), ALL, "config.json"),
    "rotary": (model(rope_parameters=ROTARY), ALL, "config.json asks for .* values besides the weights"),
}  # fmt: skip


def damaged(tiny_checkpoint, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    damage(folder)
    return folder


def peak_memory():
    """The most bytes this process ever held (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_leaves_other_levels_alone(name, tiny_checkpoint, tmp_path):
    damage, affected, message = DAMAGE[name]
    folder = damaged(tiny_checkpoint, tmp_path, damage)
    before = peak_memory()
    for level in ALL:
        if level in affected:
            with pytest.raises(ElasticSparsityError, match=message) as caught:
                ElasticModel.from_pretrained(folder, level)
            assert len(str(caught.value)) < 9000, "a message to read, not a dump"
        else:
            ElasticModel.from_pretrained(folder, level)
    assert peak_memory() - before < MAX_GROWTH, "memory for what a file only claims"


@pytest.mark.parametrize("kernel", ["attn_implementation", "_attn_implementation"])
def test_config_json_cannot_make_transformers_do_more_than_build(kernel, tiny_checkpoint, tmp_path):
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changes = {kernel: "someone/kernel", "auto_map": code, "num_labels": 10**9}  # every label would get a name
    folder = damaged(tiny_checkpoint, tmp_path, model(**changes))
    before = peak_memory()
    loaded = ElasticModel.from_pretrained(folder, 0.5)
    assert loaded.config._attn_implementation == "sdpa" and len(loaded.config.id2label) < 10
    assert peak_memory() - before < MAX_GROWTH


def test_nobody_is_asked_to_run_code_from_the_folder(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    folder = damaged(tiny_checkpoint, tmp_path, model(model_type="evil", auto_map={"AutoConfig": "evil.Config"}))
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    fields("tokenizer_config.json", **evil)(folder)
    with pytest.raises(CheckpointError, match="config.json: model type 'evil'"):
        ElasticModel.from_pretrained(folder, 0.5)
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)
    assert not asked


@pytest.mark.parametrize("name", ["config.json", SHARED, CONFIG_NAME])
def test_a_pipe_in_place_of_a_file_does_not_hang(name, tiny_checkpoint, tmp_path):
    folder = damaged(tiny_checkpoint, tmp_path, forge(name, lambda b: b"" if name != CONFIG_NAME else b))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name):
        ElasticModel.from_pretrained(folder, 0.5)


LATE = tensors(SHELL, lambda t: t[f"{DOWN}.values"].fill_(torch.nan))  # found when all others are overwritten


@pytest.mark.parametrize("merge_adapters", [True, False])
@pytest.mark.parametrize("damage", [rot(SHELL, lambda b: b[:-1] + b"\xff"), LATE], ids=["hash", "content"])
def test_set_level_that_fails_leaves_the_model_as_it_was(damage, merge_adapters, tiny_checkpoint, tmp_path):
    folder = damaged(tiny_checkpoint, tmp_path, damage)
    live = ElasticModel.from_pretrained(folder, 0.7, merge_adapters=merge_adapters)
    before = {name: parameter.detach().clone() for name, parameter in live.named_parameters()}
    with pytest.raises(CheckpointError, match=f"{SHELL}|{DOWN}"):
        set_level(live, 0.5)
    assert getattr(live, STATE).level.name == "0.7"
    for name, parameter in live.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
    set_level(live, 0.6)
    expected = ElasticModel.from_pretrained(tiny_checkpoint, 0.6, merge_adapters=merge_adapters)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, live.get_parameter(name)), name


# Fuzzing: one working copy; one file of it is changed, the folder loaded, and the file put back.

MODEL_FILES = ("config.json", "generation_config.json")
FILES = (CORE, SHELL_6, SHELL, PATTERN, SHARED, "adapters-0.safetensors", CONFIG_NAME, *MODEL_FILES)
KINDS = st.sampled_from(["flip", "flip", "cut", "insert", "splice"])
PLACES = st.integers(-4000, 2**17)  # negative: from the end, where safetensors puts the masks
EDITS = st.lists(st.tuples(KINDS, PLACES, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
VALUES = st.sampled_from(
    [GONE, GONE, GONE, None, True, False, 0, 1, -1, 2, 16, 33, 10**9, 2**63, 10**400, 0.5, 1e308, torch.nan, torch.inf,
     "", "x", "0.5", "2:4", "../x", "\0", "é" * 300, [], [0], [[]], {}, {"x": 1}, [0.5] * 300]
)  # fmt: skip


def edited(data, edits):
    data = bytearray(data)
    for kind, where, chunk in edits:
        where %= len(data) + 1
        source = int.from_bytes(chunk, "little") % (len(data) + 1)
        start, end, new = {
            "flip": (where, where + len(chunk), bytes(a ^ b for a, b in zip(data[where:], chunk, strict=False))),
            "cut": (where, len(data), b""),
            "insert": (where, where, chunk),
            "splice": (where, where + 64, data[source : source + 64]),
        }[kind]
        data[start:end] = new
    return bytes(data)


def replaced(data, number, value):
    """JSON with its `number`-th value, breadth first, replaced or GONE."""
    root = json.loads(data)
    places, queue = [], [root]
    for node in queue:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                queue.append(node[key])
    node, key = places[number % len(places)]
    node[key] = value
    if value is GONE:
        del node[key]
    return json.dumps(root).encode()


def load_and_check(folder, level, as_model):
    """Loads what may be damaged; if that goes well, the promised zeros must be there."""
    checkpoint = ElasticCheckpoint(folder)
    wanted = checkpoint.ladder.levels[level % len(checkpoint.ladder.levels)]
    loaded = ElasticModel.from_pretrained(folder, wanted.name) if as_model else dict(checkpoint.level_linears(wanted))
    for name, spec in checkpoint.linears.items():
        if as_model:
            weight = weight_OI(loaded.get_submodule(name))
            mask = weight != 0
        else:
            mask = loaded[name].mask_OI
            weight = merge(loaded[name].weight_OI, loaded[name].pairs, mask)
        assert mask.shape == spec.shape and not weight[~mask].any() and (not as_model or weight.isfinite().all())
        limit, size = wanted.pattern or (spec.kept[wanted.index], spec.shape[1])
        counts = mask.reshape(-1, size).sum(dim=1)
        assert (counts <= limit).all() and (as_model or wanted.pattern or (counts == limit).all())


@pytest.fixture(scope="module")
def work(tiny_checkpoint, tmp_path_factory):
    return shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("fuzz") / "c")


def survive(folder, name, damage, level, as_model):
    """Either an error of ours or a sound load; then the folder is as before."""
    originals = {path: path.read_bytes() for path in (folder / name, folder / CONFIG_NAME)}
    damage(folder)
    try:
        load_and_check(folder, level, as_model or name in MODEL_FILES)
    except ElasticSparsityError:
        pass
    finally:
        for path, original in originals.items():
            path.write_bytes(original)


@settings(max_examples=1300, derandomize=True, deadline=None)
@given(st.sampled_from(FILES), EDITS, st.integers(0, 7), st.integers(0, 3))
def test_fuzzed_bytes(work, name, edits, kind, level):
    damage = forge(name, lambda b: edited(b, edits), fixed=kind > 1)  # else size and hash catch nearly all
    survive(work, name, damage, level, as_model=kind == 7)


@settings(max_examples=900, derandomize=True, deadline=None)
@given(st.sampled_from((CONFIG_NAME, CONFIG_NAME, *MODEL_FILES)), st.integers(0, 300), VALUES, st.integers(0, 3))
def test_fuzzed_fields(work, name, number, value, level):
    survive(work, name, forge(name, lambda b: replaced(b, number, value)), level, as_model=number % 8 == 0)
