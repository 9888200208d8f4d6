"""The transformers model that a checkpoint's config.json names: without weights, checked before it is believed."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.arch import architecture_of, config_object, is_transposed
from elastic_sparsity.checkpoint import ElasticCheckpoint, OpenLevel
from elastic_sparsity.errors import CheckpointError, ElasticSparsityError, UnsupportedModelError
from elastic_sparsity.ladder import StructuredLevel
from elastic_sparsity.sized import causal_lm, generation_config
from elastic_sparsity.structured_section import check_section, level_config


def import_model_class(folder: Path) -> None:
    """Has transformers import what it will need, which takes a second once. Nothing is believed yet, nor refused."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig  # slow imports, only here

    path = folder / "config.json"
    if not path.is_file():  # a pipe would block
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # named when it is checked
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        architecture_of(model_type)
        _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(model_type))]


def skeleton(checkpoint: ElasticCheckpoint, files: OpenLevel, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model without memory for weights, checked to have the checkpoint's names and shapes; its generation config.

    Of a structured level it is the smaller model.

    Raises: CheckpointError.
    """
    from accelerate import init_empty_weights  # slow import, only here

    folder = checkpoint.folder
    try:
        whole = config = model_config(checkpoint)
        if isinstance(files.level, StructuredLevel):
            config = level_config(whole, checkpoint, files.level)
        generation = generation_config(folder)
        with torch.device("meta"):  # takes no memory, whatever sizes config.json claims
            _check_fit(causal_lm(config, dtype), whole, checkpoint, files)
        with torch.device("cpu"), init_empty_weights():  # computes the buffers, e.g. rotary frequencies
            model = causal_lm(config, dtype)
        model.tie_weights()
    except ElasticSparsityError:
        raise
    except Exception as error:  # transformers raises many types for one cause
        raise CheckpointError(
            f"{folder}: config.json does not make a model: {type(error).__name__}: {error}."
        ) from error
    return model, generation


def model_config(checkpoint: ElasticCheckpoint) -> Any:
    """config.json, of the checkpoint's family and depth, as transformers' object.

    Raises: CheckpointError: another family, or as many layers as would take transformers long to list.
    """
    path = checkpoint.folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    try:
        row = architecture_of(raw["model_type"])
    except UnsupportedModelError as error:
        raise CheckpointError(f"{path}: {error}") from None
    blocks = {name.removeprefix(row.blocks).split(".")[1] for name in checkpoint.linears}
    for key in ("num_hidden_layers", "n_layer"):
        if raw.get(key, len(blocks)) != len(blocks):
            raise CheckpointError(f"{path}: {key}: config.json has {raw[key]!r:.40} layers, the shells {len(blocks)}.")
    return config_object({**raw, "name_or_path": str(checkpoint.folder)})


def _check_fit(model: Any, config: Any, checkpoint: ElasticCheckpoint, files: OpenLevel) -> None:
    """That the model, on the meta device, has the checkpoint's names and shapes, and no buffers beyond reason.

    Args:
        config: of the whole model, whatever the level.
    Raises: CheckpointError.
    """
    model.tie_weights()
    folder = checkpoint.folder
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = files.shared_shapes()
    if isinstance(files.level, StructuredLevel):
        found |= check_section(model, config, checkpoint, files)
    else:
        found |= {f"{name}.weight": spec.stored_shape for name, spec in checkpoint.linears.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors do not fit config.json, first {wrong[0]}: "
            f"found {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    for name, spec in checkpoint.linears.items():
        if is_transposed(model.get_submodule(name)) != spec.transposed:
            raise CheckpointError(f"{folder}: {name}: transposed is {spec.transposed}, its module says otherwise.")
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > max(2**26, model.num_parameters()):
        raise CheckpointError(f"{folder}: config.json asks for {buffers} values besides the weights.")
