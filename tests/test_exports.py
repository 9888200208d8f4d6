"""Every export is opened by its real consumer on the CPU and computes what the level computes; mistakes are named."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import merging_tokenizer, tiny_recipe
from safetensors.torch import load_file, save_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_sparsity import ElasticModel, cli, export_level, exports, load_packed, optimize, save_sliced
from elastic_sparsity.arch import architecture_of, weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import (
    CheckpointError,
    ConfigError,
    LevelError,
    OutputError,
    ShapeError,
    UnsupportedModelError,
)
from elastic_sparsity.exports import FORMATS, write_format
from elastic_sparsity.packed_files import BITMASK_FILE, PACKED_FILE
from elastic_sparsity.precision import as_integers
from elastic_sparsity.semi_structured import pack_2of4
from elastic_sparsity.tiny import TINY_FAMILIES, byte_tokenizer, tiny_model

SHAPES = ((1, 7), (3, 33))  # neither is the size the model is traced with


def some_ids(shape):
    """Token ids, and a mask whose last row is padded."""
    ids = torch.arange(4, 4 + shape[0] * shape[1]).reshape(shape) % 250 + 4
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return ids, mask


def make_checkpoint(folder, family, tokenizer=None, dtype="float32", **changes):
    """An untrained elastic checkpoint of a tiny model of any family and size."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder / "base")
    (tokenizer or byte_tokenizer()).save_pretrained(folder / "base")
    recipe = tiny_recipe(
        model={"id": str(folder / "base")},
        ladder={"sparsities": [0.7]},
        block={"steps": 0},
        end_to_end={"trainable": "off"},
        checkpoint={"dtype": dtype},
    )
    optimize(recipe, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """A bfloat16 Llama some of whose linears the 2:4 kernels take; k_proj with its 16 rows they do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_SPARSITY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return make_checkpoint(
            tmp_path_factory.mktemp("wide"), "llama", merging_tokenizer(), "bfloat16", hidden_size=64, vocab_size=300
        )


@pytest.mark.parametrize("level", ["0.7", "2:4"])
def test_bitmask_gives_every_bit_back(tiny_checkpoint, tmp_path, level):
    made = export_level(tiny_checkpoint, level, tmp_path / "b", "bitmask")
    expected = ElasticModel.from_pretrained(tiny_checkpoint, level)
    found = load_packed(tmp_path / "b")
    assert type(found) is type(expected) and not found.training
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(as_integers(found.state_dict()[name]), as_integers(tensor)), name
    ids, mask = some_ids((2, 9))
    assert torch.equal(found(ids, attention_mask=mask).logits, expected(ids, attention_mask=mask).logits)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    stored = load_file(tmp_path / "b" / BITMASK_FILE)
    name = "model.layers.0.mlp.up_proj"
    assert {key for key in stored if key.startswith(name)} == {
        f"{name}.{part}" for part in ("compressed", "bitmask", "shape", "row_offsets")
    }
    assert made.bytes == (tmp_path / "b" / BITMASK_FILE).stat().st_size
    assert made.dense_bytes == 4 * sum(p.numel() for p in expected.parameters())
    assert f"{made.bytes:,} bytes" in made.gain and "no faster" in made.gain
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("zero")["input_ids"]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_packed_formats_give_every_familys_bits_back(family, tmp_path):
    wide = {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128, "ffn_dim": 128}
    if family == "gpt2":
        wide = {"n_embd": 64, "n_inner": 128}
    model = tiny_model(family, **wide).to(torch.bfloat16)
    row = architecture_of(model.config.model_type)
    names = [f"{row.blocks}.{index}.{path}" for index in range(2) for path in row.linears]
    with torch.no_grad():
        for name in names:
            weight = weight_OI(model.get_submodule(name))
            weight.masked_fill_(torch.tensor([False, True, True, False]).repeat(weight.shape[1] // 4), 0)
    for format in ("bitmask", "packed-2of4"):
        folder = tmp_path / format
        folder.mkdir()
        write_format(model, byte_tokenizer(), names, format, torch.bfloat16, folder)
        found = load_packed(folder).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(as_integers(found[name]), as_integers(tensor)), (format, name)


def test_packed_2of4_is_what_torchs_gpu_tensor_holds(wide_checkpoint, tmp_path):
    made = export_level(wide_checkpoint, "2:4", tmp_path / "p", "packed-2of4")
    expected = ElasticModel.from_pretrained(wide_checkpoint, "2:4")
    stored = load_file(tmp_path / "p" / PACKED_FILE)
    linears = ElasticCheckpoint(wide_checkpoint).linears
    dense = {name for name in linears if name.split(".")[-1] in ("k_proj", "v_proj", "o_proj")}  # too few rows, columns
    assert set(made.stays_dense) == dense and f"{len(dense)} linears stay dense" in made.gain
    for name in linears:
        weight = expected.get_submodule(name).weight
        if name in dense:
            assert torch.equal(stored[f"{name}.weight"], weight)
            continue
        tensor = SparseSemiStructuredTensorCUTLASS(
            weight.shape, stored[f"{name}.packed"], stored[f"{name}.meta"], None, None, None
        )
        assert torch.equal(tensor.to_dense(), weight)
        packed_bytes = sum(stored[f"{name}.{part}"].nbytes for part in ("packed", "meta"))
        assert packed_bytes == 0.5625 * weight.nbytes
    found = load_packed(tmp_path / "p").state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(as_integers(found[name]), as_integers(tensor)), name


def run_onnx(folder, ids, mask):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


def run_openvino(folder, ids, mask):
    import openvino

    compiled = openvino.Core().compile_model(
        folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    return torch.from_numpy(np.copy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]))


RUNNERS = {"onnx": run_onnx, "openvino": run_openvino}


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("format", RUNNERS)
@torch.no_grad()
def test_every_family_runs_in_onnx_runtime_and_openvino(format, family, tmp_path):
    model = tiny_model(family)
    write_format(model, byte_tokenizer(), [], format, torch.float32, tmp_path)
    for shape in SHAPES:
        ids, mask = some_ids(shape)
        found = RUNNERS[format](tmp_path, ids, mask)
        expected = model(ids, attention_mask=mask).logits
        assert found.shape == expected.shape and expected.std() > 0.02
        assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("format", RUNNERS)
@torch.no_grad()
def test_a_level_runs_in_onnx_runtime_and_openvino(format, dtype, wide_checkpoint, tmp_path):
    made = export_level(wide_checkpoint, "70%", tmp_path / "o", format, dtype=dtype)
    ids, mask = some_ids(SHAPES[1])
    model = ElasticModel.from_pretrained(wide_checkpoint, "70%", dtype=torch.float32)
    expected = model(ids, attention_mask=mask).logits
    found = RUNNERS[format](tmp_path / "o", ids, mask).float()
    assert made.dtype == (dtype or "float32") and expected.std() > 0.05
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=5e-3 if dtype else 1e-5)
    assert made.bytes > made.dense_bytes and "no smaller and no faster" in made.gain, "zeros are stored"


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@torch.no_grad()
def test_a_level_as_gguf(dtype, wide_checkpoint, tmp_path):
    made = export_level(wide_checkpoint, "70%", tmp_path / "g", "gguf", dtype=dtype)
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["model.gguf"]
    expected = ElasticModel.from_pretrained(wide_checkpoint, "70%", dtype=dtype)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "g", gguf_file="model.gguf", dtype=expected.dtype)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    assert "no smaller and no faster" in made.gain and made.bytes > made.dense_bytes


def test_no_config_says_anything_of_sparsity(wide_checkpoint, tmp_path, monkeypatch):
    """vLLM refuses a config.json with a sparsity_config, and would look for a quantisation that is not there."""
    for writer in ("write_onnx", "write_openvino"):  # slow, and not what writes config.json
        monkeypatch.setattr(exports, writer, lambda *_, **__: None)
    for format in [name for name, row in FORMATS.items() if row.has_config]:
        export_level(wide_checkpoint, "2:4", tmp_path / format, format)
    save_sliced(wide_checkpoint, "2:4", tmp_path / "transformers")
    written = sorted(path.parent.name for path in tmp_path.glob("*/config.json"))
    assert written == ["bitmask", "onnx", "openvino", "packed-2of4", "transformers"]
    for path in tmp_path.glob("*/*.json"):
        text = path.read_text()
        for word in ("sparsity_config", "quantization_config", "compression_config"):
            assert word not in text, path


def test_transformers_does_not_take_a_packed_folder_for_a_model(wide_checkpoint, tmp_path):
    export_level(wide_checkpoint, "2:4", tmp_path / "b", "bitmask")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_mistakes_are_named(tiny_checkpoint, wide_checkpoint, tmp_path):
    out = tmp_path / "out"

    def refuse(error, message, path, level, format, **more):
        with pytest.raises(error, match=message):
            export_level(path, level, out, format, **more)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    for format in FORMATS:
        refuse(LevelError, "0.65' is not in this ladder; it has: 0.5, 0.6, 0.7, 2:4", tiny_checkpoint, "0.65", format)
    refuse(LevelError, "level 0.7: packed-2of4 holds 2:4 levels only; this ladder has: 2:4", wide_checkpoint, "0.7",
           "packed-2of4")  # fmt: skip
    refuse(ConfigError, r"dtype float32 \(the checkpoint's\) is not one of bfloat16, float16; name one",
           tiny_checkpoint, "2:4", "packed-2of4")  # fmt: skip
    refuse(ConfigError, r"dtype bfloat16 \(asked for\) is not one of float32, float16", tiny_checkpoint, "0.7", "onnx",
           dtype=torch.bfloat16)  # fmt: skip
    refuse(ConfigError, "'int8' is not one of float32", tiny_checkpoint, "0.7", "gguf", dtype="int8")
    refuse(ConfigError, "format 'safetensors': not one of bitmask, packed-2of4, onnx, openvino, gguf; a plain",
           tiny_checkpoint, "0.7", "safetensors")  # fmt: skip
    refuse(CheckpointError, "no elastic checkpoint here", tmp_path, "0.7", "bitmask")
    refuse(UnsupportedModelError, "no merges", tiny_checkpoint, "0.7", "gguf")
    with pytest.raises(ShapeError, match=r"none of the 1 linears fits .*k_proj with \(16, 64\) torch.bfloat16"):
        model = ElasticModel.from_pretrained(wide_checkpoint, "2:4")
        write_format(model, None, ["model.layers.0.self_attn.k_proj"], "packed-2of4", torch.bfloat16, tmp_path)
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="already holds something"):
        export_level(tiny_checkpoint, "0.7", out, "bitmask")
    assert (out / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("format", "module", "advice"),
    [
        ("onnx", "onnxscript", r"pip install 'elastic-sparsity\[onnx\]'"),
        ("openvino", "openvino", r"pip install 'elastic-sparsity\[openvino\]'"),
        ("gguf", "gguf", "pip install 'gguf>=0.17'"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    format, module, advice, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"format {format}: .*{advice}"):
        export_level(tiny_checkpoint, "0.7", tmp_path / "o", format)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("format", RUNNERS)
def test_a_model_that_cannot_be_traced_is_named(format, tmp_path):
    class Stubborn(torch.nn.Module):
        config = tiny_model("llama").config

        def forward(self, input_ids, **_):
            return bool(input_ids.sum() > 3) and input_ids

    with pytest.raises(
        UnsupportedModelError, match=f"format {format}: model type 'llama' cannot be converted by torch"
    ):
        write_format(Stubborn(), byte_tokenizer(), [], format, torch.float32, tmp_path)


def test_damaged_packed_folders_are_named(wide_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="holds neither bitmask.safetensors nor packed-2of4.safetensors"):
        load_packed(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    export_level(wide_checkpoint, "2:4", tmp_path / "b", "bitmask")
    export_level(wide_checkpoint, "2:4", tmp_path / "p", "packed-2of4")

    def damaged(source, change, message):
        shutil.copytree(tmp_path / source, tmp_path / "damaged")
        change(tmp_path / "damaged")
        with pytest.raises(CheckpointError, match=message):
            load_packed(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")

    def without(file, *keys):
        def change(folder):
            tensors = load_file(folder / file)
            save_file({key: tensor for key, tensor in tensors.items() if key not in keys}, folder / file)

        return change

    damaged("b", without(BITMASK_FILE, f"{name}.bitmask"), f"{name}: no bitmask; a bitmask weight has")
    damaged("p", without(PACKED_FILE, f"{name}.meta"), f"{name}: no meta; a packed 2:4 weight has packed and meta")
    damaged(
        "b", without(BITMASK_FILE, "model.norm.weight"), "1 tensors do not fit config.json, first model.norm.weight"
    )
    damaged("b", lambda folder: (folder / BITMASK_FILE).write_bytes(b"no"), "cannot be read: .*export the level again")
    damaged("b", lambda folder: (folder / "config.json").unlink(), "config.json does not make a model: FileNotFound")

    def bloom(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))

    def retyped(file, key, dtype):
        def change(folder):
            tensors = load_file(folder / file)
            save_file({**tensors, key: tensors[key].to(dtype)}, folder / file)

        return change

    for dtype in (torch.uint8, torch.float64, torch.float32):
        found = rf"first model.norm.weight: found \(64,\) {str(dtype)[6:]}, expected \(64,\) bfloat16"
        damaged("b", retyped(BITMASK_FILE, "model.norm.weight", dtype), found)

    def as_int8(folder):  # the third dtype of the layout, which no model is of
        tensors = load_file(folder / PACKED_FILE)
        packed, meta = pack_2of4(torch.zeros(64, 64, dtype=torch.int8))
        save_file({**tensors, f"{name}.packed": packed, f"{name}.meta": meta}, folder / PACKED_FILE)

    damaged("p", as_int8, rf"first {name}.weight: found \(64, 64\) int8, expected \(64, 64\) bfloat16")
    damaged("b", bloom, "config.json: model type 'bloom' has no row in the architecture table")


def test_a_full_disk_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    import elastic_sparsity.packed_files as module

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
        export_level(tiny_checkpoint, "0.7", tmp_path / "o", "bitmask")
    assert not list(tmp_path.iterdir())


def test_the_command(capsys, tiny_checkpoint, tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["elastic-sparsity", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, " ".join(captured.err.split())

    code, stdout, stderr = run(tiny_checkpoint, "--level", "70%", "--format", "bitmask", "--output", tmp_path / "b")
    assert code == 0 and "level 0.7 as bitmask" in stdout and "no faster by itself" in stdout, stderr
    load_packed(tmp_path / "b")
    more = ("--level", "2:4", "--format", "packed-2of4", "--output", tmp_path / "p")
    code, stdout, stderr = run(tiny_checkpoint, *more)
    assert code == 2 and "error: format packed-2of4: dtype float32 (the checkpoint's)" in stderr
    code, stdout, stderr = run(tiny_checkpoint, *more, "--dtype", "bfloat16")
    assert code == 0 and "linears stay dense" in stdout, stderr
