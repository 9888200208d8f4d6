"""Loading and switching levels: bit-exact weights, only the files needed, nothing else of the model touched."""

import copy
import pickle
import shutil

import pytest
import torch
from conftest import tiny_recipe
from test_checkpoint import opened_files  # noqa: F401  a fixture

from elastic_sparsity import ElasticModel, levels, optimize, reapply_masks_, set_level, verify
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint, OpenLevel
from elastic_sparsity.errors import CheckpointError, ConfigError, LevelError, OutputError
from elastic_sparsity.slicing import _return_freed_memory
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

WITHOUT_TRAINING = {"block": {"steps": 0}, "end_to_end": {"trainable": "off"}}
IDS = torch.arange(4, 36).reshape(2, 16)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def definition(checkpoint, name, level):
    """(W + sum B A) * M from the checkpoint's tensors, in float64 but for the last step."""
    linear = dict(checkpoint.level_linears(level))[name]
    total = linear.weight_OI.double()
    for lora_A, lora_B in linear.pairs:
        total = total + lora_B.double() @ lora_A.double()
    return torch.where(linear.mask_OI, total, 0.0)


@pytest.mark.parametrize("level", ["0.5", "0.6", "0.7", "2:4"])
def test_a_level_is_its_definition(tiny_checkpoint, level):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    model = ElasticModel.from_pretrained(tiny_checkpoint, level)
    for name in checkpoint.linears:
        weight = weight_OI(model.get_submodule(name))
        expected = definition(checkpoint, name, checkpoint.find(level))
        assert torch.allclose(weight.double(), expected, atol=1e-6)
        assert torch.equal(weight == 0, expected == 0), "exact zeros, and only where the mask says"


@pytest.mark.parametrize("first", ["0.5", "0.7", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_equals_loading_bit_for_bit(tiny_checkpoint, first, dtype):
    fresh = {
        x: weights_of(ElasticModel.from_pretrained(tiny_checkpoint, x, dtype=dtype)) for x in ("0.5", "0.7", "2:4")
    }
    model = ElasticModel.from_pretrained(tiny_checkpoint, first, dtype=dtype)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for level in ("0.7", "0.5", "2:4", "0.7", "2:4", "0.5"):
        set_level(model, level)
        assert same(weights_of(model), fresh[level])
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}, "in place"


def test_switching_opens_only_missing_files(tiny_checkpoint, opened_files):  # noqa: F811
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
    assert not {name for name in opened_files if name.startswith(("shell-level", "shell-pattern"))}
    opened_files.clear()
    set_level(model, 0.6)
    assert set(opened_files) == {"shell-level-0.6.safetensors"}
    opened_files.clear()
    set_level(model, 0.7)
    set_level(model, 0.6)
    assert opened_files == []


def test_the_same_level_again_leaves_tuned_weights_alone(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 1
    before = weights_of(model)
    set_level(model, "60%")
    assert same(weights_of(model), before)


def test_what_is_not_sparsified_is_left_alone(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    set_level(model, 0.7)
    assert (model.model.norm.weight == 7).all()


def test_copies_and_pickles_of_a_live_model_can_switch_too(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_level(other, 0.5)
        assert same(weights_of(other), weights_of(ElasticModel.from_pretrained(tiny_checkpoint, 0.5)))
    assert same(weights_of(model), weights_of(ElasticModel.from_pretrained(tiny_checkpoint, 0.7)))


def test_switching_refuses_what_it_cannot_do(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
    before = weights_of(model)
    with pytest.raises(LevelError, match=r"it has: 0.5, 0.6, 0.7, 2:4"):
        set_level(model, 0.55)
    assert same(weights_of(model), before)
    with pytest.raises(ConfigError, match="offloaded or changed"):
        set_level(ElasticModel.from_pretrained(tiny_checkpoint, 0.7).double(), 0.5)
    with pytest.raises(ConfigError, match="not made by ElasticModel"):
        set_level(torch.nn.Linear(2, 2), 0.5)
    model.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    with pytest.raises(ConfigError, match="q_proj.weight"):
        set_level(model, 0.5)


def test_device_maps(tiny_checkpoint, tmp_path):
    plain = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    auto = ElasticModel.from_pretrained(tiny_checkpoint, 0.6, device_map="auto")
    assert same(weights_of(auto), weights_of(plain))
    set_level(auto, 0.7)
    assert same(weights_of(auto), weights_of(ElasticModel.from_pretrained(tiny_checkpoint, 0.7)))
    on_disk = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    on_disk |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    sparser = ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
    offloaded, other = (
        ElasticModel.from_pretrained(tiny_checkpoint, level, device_map=on_disk, offload_folder=tmp_path / "disk")
        for level in (0.6, 0.7)  # in the same folder, and both alive
    )
    with torch.no_grad():
        assert torch.allclose(other(IDS).logits, sparser(IDS).logits, atol=1e-6)
        assert torch.allclose(offloaded(IDS).logits, plain(IDS).logits, atol=1e-6)
    with pytest.raises(ConfigError, match="offloaded"):
        set_level(offloaded, 0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="offload_folder: '.*file' cannot be written"):
        ElasticModel.from_pretrained(tiny_checkpoint, 0.6, device_map=on_disk, offload_folder=tmp_path / "file")


def test_one_device_for_all_as_transformers_takes_it(tiny_checkpoint):
    plain = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    for place in ("cpu", torch.device("cpu"), {"": torch.device("cpu")}):
        model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6, device_map=place)
        assert same(weights_of(model), weights_of(plain))


def test_an_automatic_map_that_needs_the_disk_is_refused_before_weights_are_read(tiny_checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *_, **__: {"model": "cpu", "lm_head": "disk"})
    monkeypatch.setattr(OpenLevel, "shells", lambda *_: read.append(1))
    with pytest.raises(ConfigError, match="'auto' puts 1 modules on disk, first lm_head, .*give an `offload_folder`"):
        ElasticModel.from_pretrained(tiny_checkpoint, 0.6, device_map="auto")
    assert not read


def test_a_map_that_leaves_out_a_tied_weight_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    optimize(tiny_recipe(model={"id": "random:opt"}, **WITHOUT_TRAINING), tmp_path / "tied")
    checkpoint = ElasticCheckpoint(tmp_path / "tied")
    whole = ElasticModel.from_pretrained(tmp_path / "tied", 0.6, device_map={"model": "cpu", "lm_head": "cpu"})
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    read = []
    monkeypatch.setattr(OpenLevel, "shells", lambda *_: read.append(1))
    with pytest.raises(ConfigError, match="device_map: names no place for lm_head.weight; add its module"):
        ElasticModel.from_pretrained(checkpoint.folder, 0.6, device_map={"model": "cpu"})
    assert not read


def test_what_must_stay_whole_goes_to_accelerate_as_a_list(tiny_checkpoint, monkeypatch):
    """accelerate before 1.14 takes transformers' set for the name of one class, and splits the blocks."""
    seen = []
    places = {"infer_auto_device_map": {"": "cpu"}, "utils.get_balanced_memory": None}
    for name, answer in places.items():
        monkeypatch.setattr(f"accelerate.{name}", lambda *_, answer=answer, no_split_module_classes, **__: (
            seen.append(no_split_module_classes), answer)[1])  # fmt: skip
    ElasticModel.from_pretrained(tiny_checkpoint, 0.6, device_map="auto")
    assert seen == [["LlamaDecoderLayer"]] * 2


def test_torchs_default_device_changes_nothing(tiny_checkpoint):
    """Notebooks set it to "cuda"; "meta" here, where nothing could be computed."""
    expected = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    for runtime in ("dense", "packed"):
        with torch.device("meta"):
            verify(tiny_checkpoint)
            model = ElasticModel.from_pretrained(tiny_checkpoint, 0.7, runtime=runtime)
            set_level(model, 0.6)
            if runtime == "dense":
                reapply_masks_(model, tiny_checkpoint, 0.6)
        assert all(buffer.device.type == "cpu" for buffer in model.buffers())
        with torch.no_grad():
            assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-5)


def test_a_pickled_model_does_not_take_another_checkpoint_for_its_own(tmp_path):
    folder = tmp_path / "checkpoint"
    optimize(tiny_recipe(**WITHOUT_TRAINING), folder)
    pickled = pickle.dumps(ElasticModel.from_pretrained(folder, 0.6))
    half = weights_of(ElasticModel.from_pretrained(folder, 0.5))
    again = pickle.loads(pickled)
    set_level(again, 0.5)
    assert same(weights_of(again), half)
    shutil.move(folder, tmp_path / "kept")
    weights = weights_of(pickle.loads(pickled))
    assert same(weights, weights_of(ElasticModel.from_pretrained(tmp_path / "kept", 0.6))), "it needs no folder"
    optimize(tiny_recipe(seed=1, **WITHOUT_TRAINING), folder)
    other = pickle.loads(pickled)
    with pytest.raises(CheckpointError, match="sha256|bytes"):
        set_level(other, 0.5)
    assert same(weights_of(other), weights)


def test_a_system_whose_c_library_cannot_be_asked(monkeypatch):
    def windows(name):
        raise TypeError(f"argument of type {type(name).__name__} is not iterable")

    monkeypatch.setattr("ctypes.CDLL", windows)
    _return_freed_memory()


def test_unmerged_is_the_masked_base(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6, merge_adapters=False)
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    for name, linear in checkpoint.level_linears(checkpoint.find(0.6)):
        masked = torch.where(linear.mask_OI, linear.weight_OI, 0)
        assert torch.equal(weight_OI(model.get_submodule(name)), masked)


def test_weights_can_be_trained_and_are_in_eval_mode(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()


def test_levels_reads_the_config_alone(tiny_checkpoint, opened_files):  # noqa: F811
    rows = levels(tiny_checkpoint)
    assert [row.name for row in rows] == ["0.5", "0.6", "0.7", "2:4"] and opened_files == []
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    assert [row.bytes for row in rows] == [checkpoint.bytes_of(level) for level in checkpoint.ladder.levels]


def test_an_infinite_weight_is_named(tmp_path):
    model, folder = tiny_model("llama"), tmp_path / "large"
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e8)  # fits float32, not float16
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    optimize(tiny_recipe(model={"id": str(tmp_path / "model")}, **WITHOUT_TRAINING), folder)
    ElasticModel.from_pretrained(folder, 0.6)
    with pytest.raises(CheckpointError, match=r"up_proj: weights are NaN or infinite in torch.float16; try another"):
        ElasticModel.from_pretrained(folder, 0.6, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give either"),
        ({"device": "cuda:7"}, "is not on this machine"),
        ({"device": "meta"}, "is not on this machine"),
        ({"device": "mps"}, "is not on this machine"),
        ({"device": "xpu"}, "is not on this machine"),
        ({"device": "auto"}, "device: 'auto' is no device"),
        ({"device": "balanced", "runtime": "packed"}, "device: 'balanced' is no device"),
        ({"device_map": 77}, "device: 77 is not on this machine"),
        ({"device_map": "autoo"}, "is no device; maps are auto"),
        ({"device_map": "disk"}, "needs a mapping"),
        ({"device_map": {"": "disk"}}, "needs a mapping of modules and an `offload_folder`"),
        ({"device_map": {"model": "cpu"}}, "names no place for lm_head.weight"),
        ({"dtype": "int8"}, "'int8' is not one of float32"),
        ({"dtype": torch.int8}, "is not one of float32"),
        ({"torch_dtype": torch.float16}, "unknown argument 'torch_dtype'"),
    ],
)
def test_wrong_arguments_are_named(tiny_checkpoint, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ElasticModel.from_pretrained(tiny_checkpoint, 0.6, **arguments)


def test_dtypes_by_name(tiny_checkpoint):
    assert ElasticModel.from_pretrained(tiny_checkpoint, 0.6, dtype="float16").dtype == torch.float16
    assert ElasticModel.from_pretrained(tiny_checkpoint, 0.6, dtype="auto").dtype == torch.float32


def test_loading_and_switching_inside_inference_mode(tiny_checkpoint):
    threads = torch.get_num_threads()
    with torch.inference_mode():
        model = ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
        set_level(model, 0.5)
        model(IDS)
    assert same(weights_of(model), weights_of(ElasticModel.from_pretrained(tiny_checkpoint, 0.5)))
    assert torch.get_num_threads() == threads


def test_a_failed_switch_keeps_weights_tuned_since(tiny_checkpoint, monkeypatch):
    model = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    before, real, calls = weights_of(model), OpenLevel.shells, []

    def failing(self, name, room):
        calls.append(name)
        if len(calls) == 9:
            raise MemoryError
        return real(self, name, room)

    monkeypatch.setattr(OpenLevel, "shells", failing)
    with pytest.raises(MemoryError):
        set_level(model, 0.5)
    assert same(weights_of(model), before) and model.elastic_state.level.name == "0.6"


def test_a_relative_path_outlives_the_working_folder(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent)
    model = ElasticModel.from_pretrained(tiny_checkpoint.name, 0.7)
    monkeypatch.chdir(tmp_path)
    set_level(model, 0.5)


@pytest.mark.parametrize(
    "ladder",
    [
        {"sparsities": [], "patterns": ["2:4", "1:4"]},
        {"sparsities": [0.5, 0.55, 0.6, 0.7], "group_ends": [0.55, 0.7]},
        {"pattern_parent": "all"},
        {"pattern_parent": "none"},
    ],
)
@pytest.mark.parametrize("adapters", [{"ranks": 2}, {"inheritance": "none"}, {"ranks": 0}])
def test_every_kind_of_ladder_verifies(ladder, adapters, tmp_path):
    optimize(tiny_recipe(ladder=ladder, adapters=adapters, block={"steps": 1}, end_to_end={"steps": 1}), tmp_path / "c")
    checks = verify(tmp_path / "c")
    assert all(check.passed for check in checks), checks
