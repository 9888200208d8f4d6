"""Elastic checkpoint + level -> an ordinary transformers model, with exactly the promised zeros."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.adapters import merge
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.checkpoint import ElasticCheckpoint, atomic_folder, check_output_folder
from elastic_sparsity.errors import CheckpointError
from elastic_sparsity.ladder import Level


class ElasticModel:
    """Entry point in the manner of transformers: `ElasticModel.from_pretrained(folder, level="60%")`."""

    @staticmethod
    def from_pretrained(
        path: str | Path, level: str | float, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Any:
        """One level of an elastic checkpoint as its ordinary `transformers` causal LM, in eval mode.

        Args:
            path: folder of an elastic checkpoint.
            level: e.g. 0.6, "0.6", "60%" or "2:4".
            dtype: of the model; None = the checkpoint's.
        Raises: LevelError: for a level outside the ladder, listing the levels. CheckpointError: damaged files.
        """
        checkpoint = ElasticCheckpoint(path)
        return load_level(checkpoint, checkpoint.ladder.find(level), dtype or checkpoint.dtype).to(device)


def load_level(checkpoint: ElasticCheckpoint, level: Level, dtype: torch.dtype) -> Any:
    """The model of one level; merged in float32, masked, then cast, and its zeros checked in the finished model."""
    from transformers import AutoConfig, GenerationConfig  # slow import, only here

    state = checkpoint.dense_tensors()
    masks: dict[str, Tensor] = {}
    for name, linear in checkpoint.level_linears(level):
        weight = merge(linear.weight_OI, linear.pairs, linear.mask_OI).to(dtype)
        state[f"{name}.weight"] = weight.T.contiguous() if linear.transposed else weight
        masks[name] = linear.mask_OI
    folder = checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(folder)
        has_generation = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_generation else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: config.json or generation_config.json cannot be read: {error}.") from error
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    missing, extra = info["missing_keys"], info["unexpected_keys"]
    if missing or extra or info.get("mismatched_keys"):
        raise CheckpointError(
            f"{folder}: tensors do not fit config.json: missing {sorted(missing)}, unexpected {sorted(extra)}, "
            f"wrong shape {sorted(info.get('mismatched_keys') or [])}."
        )
    if generation is not None:
        model.generation_config = generation
    check_zeros(model, masks)
    return model.eval()


def _model_class(config: Any) -> Any:
    from accelerate import init_empty_weights  # slow import, only here
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return type(AutoModelForCausalLM.from_config(config))


def check_zeros(model: Any, masks: dict[str, Tensor]) -> None:
    """That every weight outside its mask is exactly zero and every other one is finite, in the finished model.

    Raises: CheckpointError: naming the linear.
    """
    for name, mask in masks.items():
        weight = weight_OI(model.get_submodule(name))
        outside = int(torch.count_nonzero(weight[~mask]))
        if outside:
            raise CheckpointError(f"{name}: {outside} weights outside the mask are not zero after the merge.")
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{name}: weights are NaN or infinite in {weight.dtype}; try another dtype.")


def slice_checkpoint(
    path: str | Path, level: str | float, output: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes one level as a plain Hugging Face folder that needs nothing of ours to open.

    Raises: LevelError, CheckpointError; OutputError: if `output` is taken or cannot be written.
    """
    check_output_folder(Path(output))
    model = ElasticModel.from_pretrained(path, level, dtype=dtype)
    tokenizer = load_tokenizer(path)
    with atomic_folder(Path(output)) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises: CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer  # slow import, only here

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers raise many types for one cause
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
