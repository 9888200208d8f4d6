"""A base model read block by block gives the bits of one that is whole in memory, in every family and placement."""

import fnmatch
import json

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import optimize
from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.errors import ConfigError, NumericsError, UnsupportedModelError
from elastic_sparsity.models import load_base, stream_base, weights_folder
from elastic_sparsity.preparing import settle
from elastic_sparsity.tensor_file import TensorFile
from elastic_sparsity.tiny import TINY_FAMILIES, byte_tokenizer, tiny_model

TEXT = "The fox that jumps over a lazy dog keeps its zeros. " * 40
NO_END = {"trainable": "off"}


def saved(folder, family, **options):
    tiny_model(family).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe_for(model, text, **sections):
    text.write_text(TEXT)
    calibration = {"source": str(text), "samples": 5, "length": 16}
    return tiny_recipe(model={"id": model}, calibration=calibration, **{"end_to_end": NO_END, **sections})


def tensors_of(folder):
    files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
    return {f"{file.path.name}:{name}": file.read(name) for file in files for name in file.specs}


def assert_same_tensors(one, other):
    found, expected = tensors_of(one), tensors_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_streamed_equals_resident(family, tmp_path):
    model = saved(tmp_path / "m", family, max_shard_size="40kB")  # several shards
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    for weights, activations in (("resident", "device"), ("stream", "disk")):
        memory = {"weights": weights, "activations": activations}
        block = {"base_lr": 1e-3 if family == "gpt2" else 0.0}
        optimize(recipe_for(model, tmp_path / "t.txt", memory=memory, block=block), tmp_path / weights)
    assert_same_tensors(tmp_path / "stream", tmp_path / "resident")
    assert not list(tmp_path.glob("*.run"))


@pytest.mark.parametrize("mode", ["own", "learned", "fixed", "dense"])
def test_hidden_states_on_disk_change_nothing(mode, tmp_path):
    for activations in ("device", "host", "disk"):
        recipe = recipe_for(
            "random:llama", tmp_path / "t.txt", mixer={"mode": mode}, memory={"activations": activations}
        )
        optimize(recipe, tmp_path / activations)
    assert_same_tensors(tmp_path / "disk", tmp_path / "device")
    assert_same_tensors(tmp_path / "host", tmp_path / "device")


def test_fewer_samples_than_a_batch(tmp_path):
    """Training draws a sample twice: the blocks' arguments for so many are there before the first is elastic."""
    model = saved(tmp_path / "m", "llama")
    for weights in ("resident", "stream"):
        block = {"samples": 1, "batch_size": 2}
        optimize(recipe_for(model, tmp_path / "t.txt", memory={"weights": weights}, block=block), tmp_path / weights)
    assert_same_tensors(tmp_path / "stream", tmp_path / "resident")


def test_a_covariance_that_does_not_factor_is_named_with_its_block(tmp_path):
    recipe = recipe_for(
        "random:llama", tmp_path / "t.txt", scores={"method": "obs", "damping": 1e-30}, block={"samples": 2}
    )
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: the input covariance"):
        optimize(recipe, tmp_path / "c")


def test_only_one_block_is_in_memory(tmp_path):
    base = stream_base(saved(tmp_path / "m", "llama"), "auto", torch.device("cpu"))
    blocks = base.model.model.layers

    def loaded():
        return [not next(block.parameters()).is_meta for block in blocks]

    assert loaded() == [False, False]
    with base.stream.block(1) as block:
        assert loaded() == [False, True]
        assert block is blocks[1]
    assert loaded() == [False, False]
    seen = []
    handles = [block.register_forward_hook(lambda *_: seen.append(loaded())) for block in blocks]
    with base.stream.running(), torch.no_grad():
        streamed = base.model(torch.arange(8)[None]).logits
    for handle in handles:
        handle.remove()
    assert seen == [[True, False], [False, True]] or seen == [[False, False], [False, False]]
    assert torch.equal(streamed, load_base(str(tmp_path / "m")).model(torch.arange(8)[None]).logits)
    for index, block in enumerate(blocks):
        base.stream.load_block_(index, block)
    assert loaded() == [True, True]


def test_same_identity_as_a_whole_model(tmp_path):
    model = saved(tmp_path / "m", "llama")
    assert stream_base(model, "auto", torch.device("cpu")).identity == load_base(model).identity
    cast = stream_base(model, "bfloat16", torch.device("cpu"))
    assert cast.identity == load_base(model, "bfloat16").identity


def test_models_that_cannot_be_streamed(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read in blocks"):
        stream_base("random:llama", "auto", torch.device("cpu"))
    model = saved(tmp_path / "m", "llama", max_shard_size="40kB")
    victim = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="cannot be read"):
        stream_base(model, "auto", torch.device("cpu"))
    victim.unlink()
    with pytest.raises(ConfigError, match="which is no file of its folder"):
        stream_base(model, "auto", torch.device("cpu"))
    broken = tiny_model("llama")
    decoder_blocks(broken)[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    byte_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        stream_base(str(tmp_path / "nan"), "auto", torch.device("cpu"))


@pytest.mark.parametrize("load", [load_base, lambda model: stream_base(model, "auto", torch.device("cpu"))])
def test_a_streamed_model_passes_the_checks_of_a_whole_one(load, tmp_path):
    model = saved(tmp_path / "m", "llama")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for changes, error in (
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError),
        ({"model_type": "mamba"}, UnsupportedModelError),
        ({"num_hidden_layers": 10**7}, ConfigError),
        ({"max_position_embeddings": "many"}, ConfigError),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(error):
            load(model)
    ran = tmp_path / "ran"
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "m" / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    path.write_text(json.dumps({**config, **code}))
    load(model)  # of a known family: its own class is taken
    assert not ran.exists()


def test_a_recipe_that_contradicts_itself(tmp_path):
    with pytest.raises(ConfigError, match="one block in memory"):
        recipe_for("x", tmp_path / "t.txt", memory={"weights": "stream"}, end_to_end={"trainable": "base"})


def test_sharing_a_model_needs_several_workers(tmp_path):
    shared = {"trainable": "base", "shard": True}
    model = saved(tmp_path / "m", "llama")
    recipe = recipe_for(model, tmp_path / "t.txt", memory={"weights": "stream"}, end_to_end=shared)
    with pytest.raises(ConfigError, match="needs several processes"):
        optimize(recipe, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "t.txt"]


def test_auto_streams_only_what_can_be_streamed(tmp_path, monkeypatch):
    """A large model is read block by block unless something needs all of it."""
    monkeypatch.setattr("elastic_sparsity.preparing.free_here", lambda: {"host": 1})
    model = saved(tmp_path / "m", "llama")
    text = recipe_for(model, tmp_path / "t.txt")
    from_itself = tiny_recipe(model={"id": model}, end_to_end=NO_END)
    both = {"source": str(tmp_path / "t.txt"), "samples": 5, "length": 16, "self_share": 0.4}
    mixed = tiny_recipe(model={"id": model}, calibration=both, end_to_end=NO_END)
    trained_whole = recipe_for(model, tmp_path / "t.txt", end_to_end={"trainable": "base"})
    assert [settle(recipe, 1, {}).weights for recipe in (text, from_itself, mixed, trained_whole)] == [
        "stream", "resident", "resident", "resident",
    ]  # fmt: skip


def test_what_is_downloaded_of_a_hub_model(monkeypatch):
    """With its chat template; not its makers' own copy of the weights."""
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **patterns: asked.update(patterns) or "here")
    weights_folder("someone/model")

    def is_wanted(name):
        fits = (any(fnmatch.fnmatch(name, x) for x in asked[key]) for key in ("allow_patterns", "ignore_patterns"))
        return list(fits) == [True, False]

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja",
              "additional_chat_templates/rag.jinja"]  # fmt: skip
    assert all(map(is_wanted, wanted))
    assert not any(map(is_wanted, ["consolidated.safetensors", "original/params.json", "pytorch_model.bin", "x.py"]))


def test_self_sampled_text_needs_the_whole_model(tmp_path):
    model = saved(tmp_path / "m", "llama")
    with pytest.raises(ConfigError, match='source "self": needs the whole model'):
        optimize(tiny_recipe(model={"id": model}, memory={"weights": "stream"}, end_to_end=NO_END), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob("c.run"))
