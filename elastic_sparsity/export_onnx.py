"""A model's forward pass as ONNX and as OpenVINO: token ids and attention mask in, logits out, any batch and length.

Both files hold dense matrices with zeros in them. ONNX has sparse initialisers, but ONNX Runtime turns them into dense
ones at load (onnxruntime issue 5578), and other readers may not know them, so they would only make the file fragile. No
key-value cache is among the inputs: this form scores and embeds text; to generate fast, use the plain folder.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import ConfigError, UnsupportedModelError

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"


class _Logits(nn.Module):
    """(B, T) ids and mask -> (B, T, V) logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def check_onnx() -> None:
    """Raises: ConfigError: if a library that writing ONNX needs is missing."""
    try:
        import onnx  # noqa: F401  slow imports, only here
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"format onnx: {error}; pip install 'elastic-sparsity[onnx]'.") from None


def check_openvino() -> None:
    """Raises: ConfigError: if openvino is missing."""
    try:
        import openvino  # noqa: F401  slow import, only here
    except ImportError as error:
        raise ConfigError(f"format openvino: {error}; pip install 'elastic-sparsity[openvino]'.") from None


@torch.no_grad()
def write_onnx(model: nn.Module, folder: Path) -> None:
    """`model.onnx`, with its weights beside it in `model.onnx.data`, in the model's dtype.

    Raises: UnsupportedModelError: if torch cannot export the model.
    """
    arguments, shapes = _example()
    with _quiet():
        try:
            torch.onnx.export(
                _Logits(model).eval(),
                arguments,
                folder / "model.onnx",
                input_names=INPUTS,
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _unsupported(model, "onnx", error) from error


@torch.no_grad()
def write_openvino(model: nn.Module, folder: Path, *, half: bool) -> None:
    """`model.xml` and its weights in `model.bin`.

    Args:
        model: float32.
        half: store weights as float16 (OpenVINO widens them as it computes).
    Raises: UnsupportedModelError: if torch cannot export the model, or OpenVINO cannot convert it.
    """
    import openvino  # slow import, only here

    arguments, shapes = _example()
    try:
        with _quiet():
            program = torch.export.export(_Logits(model).eval(), arguments, dynamic_shapes=shapes, strict=False)
            converted = openvino.convert_model(program)
    except (RuntimeError, openvino.frontend.GeneralFailure) as error:
        raise _unsupported(model, "openvino", error) from error
    converted.outputs[0].set_names({OUTPUT})
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=half)


def _example() -> tuple[tuple[Tensor, Tensor], tuple[dict[int, Any], dict[int, Any]]]:
    """Inputs to trace with, and which of their sizes are free."""
    ids = torch.ones(2, 12, dtype=torch.long)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    return (ids, torch.ones_like(ids)), (sizes, sizes)


def _unsupported(model: Any, form: str, error: Exception) -> UnsupportedModelError:
    reason = " ".join(str(error).split())[:300]
    return UnsupportedModelError(
        f"format {form}: model type {model.config.model_type!r} cannot be converted by torch {torch.__version__}: "
        f"{type(error).__name__}: {reason}; "
        "write a plain folder with `slice` and try the tool's own converter on it."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's lines about torchvision not being there and its names of axes."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
