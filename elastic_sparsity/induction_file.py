"""What `induce` writes beside a plain Hugging Face model: the scales of its input channels' importance.

`induction.safetensors` holds one float32 vector a linear, by the linear's name. transformers ignores it;
`load_base` reads it, and an elastic run with Wanda or OBS scores multiplies them by it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import weight_OI
from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.files import is_file
from elastic_sparsity.tensor_file import TensorFile
from elastic_sparsity.tensor_file_writer import write_tensors

FILE_NAME = "induction.safetensors"
FORMAT = {"format": "elastic-sparsity-induction", "format_version": "1"}


def save_scales(folder: Path, scales: Mapping[str, Tensor]) -> None:
    """Writes the file into a folder that nobody reads yet."""
    write_tensors(folder / FILE_NAME, {name: scale.float().cpu() for name, scale in scales.items()}, FORMAT)


def load_scales(folder: Path, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The folder's scales, (I,) float32 by linear name; empty if it has none.

    Args:
        linears: all that are pruned, by name.
    Raises: ConfigError: damaged, of another format version or another model, or scales that are not positive.
    """
    path = folder / FILE_NAME
    if not is_file(path):
        return {}
    try:
        file = TensorFile(path)
        scales = {name: file.read(name) for name in file.specs}
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error} Induce the model again, or delete the file.") from error
    found = {key: file.metadata.get(key) for key in FORMAT}
    if found != FORMAT:
        raise ConfigError(f"{path}: found {found}, expected {FORMAT}; induce the model again, or delete the file.")
    if scales.keys() != linears.keys():
        odd = min(scales.keys() ^ linears.keys())
        raise ConfigError(f"{path}: is of another model: {odd!r} is in one of them only; induce the model again.")
    for name, linear in linears.items():
        scale, width = scales[name], weight_OI(linear).shape[1]
        if scale.shape != (width,) or scale.dtype != torch.float32:
            raise ConfigError(f"{path}: {name}: {scale.dtype} {tuple(scale.shape)}, expected float32 ({width},).")
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ConfigError(f"{path}: {name}: holds scales that are not positive numbers; induce the model again.")
    return scales
