"""Linears whose weight stays packed in memory (bitmask and kept values), in place of a model's own; for inference.

One to `DIRECT_TOKENS` tokens (decoding) are multiplied straight from the packed weight by compiled code. More (a
prompt) expand a tile of rows at a time into a small dense buffer, which torch multiplies. Without compiled code both
go through torch, slower than a dense model; `elastic-sparsity doctor` says which.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import replace_module_
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.native import Kernels
from elastic_sparsity.packed_weight import PackedWeight, product

DIRECT_TOKENS = 32  # beyond, expanding once and a dense product win (Zen 5, 2026-11-24, benchmarks/latency.py)
TILE_BYTES = 8 << 20  # of dense rows at a time: larger ones leave the last-level cache, smaller ones feed torch badly
DTYPES = (torch.float32, torch.bfloat16)
_PARTS = ("mask_OW", "values", "starts")


class Workspace:
    """Memory of one dense tile, used again by all linears of a model: fresh memory costs more than expanding."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._in_use = threading.Lock()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()  # a copied model gets one of its own

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[Tensor]:
        """(num_bytes,) uint8 for the time of the context; a second thread in between gets memory of its own."""
        if not self._in_use.acquire(blocking=False):
            yield torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            return
        try:
            if self._bytes.numel() < num_bytes:
                self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            yield self._bytes[:num_bytes]
        finally:
            self._in_use.release()


class PackedLinear(nn.Module):
    """y = x W^T + b with a packed W. Takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    Args:
        in_features, out_features: of the dense linear.
        bias: of the dense linear.
        kernels: None = torch code.
        workspace: shared by the linears of a model.
    """

    bias: nn.Parameter | None
    mask_OW: Tensor
    values: Tensor
    starts: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        kernels: Kernels | None,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self._kernels = in_features, out_features, kernels
        self._workspace = workspace
        self.register_parameter("bias", bias)
        self._weight: PackedWeight | None = None  # one reference: a thread sees the old weight or the new one, whole
        for name in _PARTS:  # the same tensors as buffers, so that what counts a model's memory finds them
            self.register_buffer(name, None, persistent=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight.

        Raises: ConfigError: none was set yet.
        """
        if self._weight is None:
            raise ConfigError("packed linear: it has no weight yet; make it with ElasticModel.from_pretrained.")
        return self._weight

    def set_packed(self, weight: PackedWeight) -> None:
        """Replaces the weight.

        Raises: ConfigError: of another shape.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ConfigError(
                f"packed linear: found a weight of {weight.shape}, expected {(self.out_features, self.in_features)}."
            )
        self._weight = weight
        for name in _PARTS:
            setattr(self, name, getattr(weight, name))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed
        if torch.is_autocast_enabled("cpu"):
            x = x.to(weight.values.dtype)
        if torch.jit.is_tracing():  # it sees torch's operations only, and would record a constant
            raise ConfigError('packed linear: cannot be traced; load with runtime="dense" to export.')
        self._check(x, weight)
        rows = x.reshape(-1, self.in_features).contiguous()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast("cpu", enabled=False):
            if self._kernels is None:
                y = product(weight, rows, bias)
            elif rows.shape[0] <= DIRECT_TOKENS:
                y = self._kernels.product(weight, rows, bias)
            else:
                y = self._by_tiles(self._kernels, weight, rows, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor, weight: PackedWeight) -> None:
        if x.dtype != weight.values.dtype or x.device.type != "cpu" or x.shape[-1] != self.in_features:
            raise ConfigError(
                f"packed linear: found an input {tuple(x.shape)} of {x.dtype} on {x.device}, expected "
                f"(..., {self.in_features}) of {weight.values.dtype} on the CPU; load the level with the dtype you "
                'want, or with runtime="dense" for another device.'
            )
        trains_bias = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (x.requires_grad or trains_bias):
            raise ConfigError(
                'packed linear: packed weights are for inference; use torch.no_grad(), or load with runtime="dense".'
            )

    def _by_tiles(self, kernels: Kernels, weight: PackedWeight, x_TI: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty(x_TI.shape[0], self.out_features, dtype=x_TI.dtype, device="cpu")
        row_bytes = self.in_features * x_TI.dtype.itemsize
        tiles = -(-self.out_features * row_bytes // TILE_BYTES)
        step = -(-self.out_features // tiles)
        with self._workspace.take(step * row_bytes) as room:
            for begin in range(0, self.out_features, step):
                end = min(begin + step, self.out_features)
                tile = room[: (end - begin) * row_bytes].view(x_TI.dtype).view(end - begin, self.in_features)
                kernels.unpack_rows_(weight, begin, tile)
                if bias is None:
                    torch.mm(x_TI, tile.T, out=y[:, begin:end])
                else:
                    torch.addmm(bias[begin:end], x_TI, tile.T, out=y[:, begin:end])
        return y

    def extra_repr(self) -> str:
        weight = self._weight
        kept = "empty" if weight is None else f"{weight.values.dtype}, {weight.num_bytes} bytes"
        path = "torch" if self._kernels is None else self._kernels.name
        return f"in_features={self.in_features}, out_features={self.out_features}, packed: {kept}, path={path}"

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """For `.to()`, `.half()` and the like: values may change between the two dtypes that kernels have, no more."""
        weight = self._weight
        if weight is not None:
            probe = fn(torch.empty(0, dtype=weight.values.dtype, device="cpu"))
            if probe.device.type != "cpu" or probe.dtype not in DTYPES:
                raise ConfigError(
                    f"packed linear: cannot become {probe.dtype} on {probe.device}; the model is partly converted now, "
                    'load it anew with dtype="bfloat16" or "float32", or with runtime="dense".'
                )
        super()._apply(fn, recurse)
        if weight is not None:
            self.set_packed(replace(weight, values=self.values))
        return self

    def _save_to_state_dict(self, _destination: Any, prefix: str, _keep_vars: bool) -> None:
        raise ConfigError(
            f"{prefix}weight: packed weights are not saved from a live model; "
            "write the level with save_sliced (plain Hugging Face) or copy_level (elastic)."
        )


def pack_linears_(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], kernels: Kernels | None
) -> dict[str, PackedLinear]:
    """Puts an empty packed linear in the place of every named one; biases stay the model's own parameters.

    Args:
        shapes: (O, I) of every linear, by fully qualified name.
    """
    made, workspace = {}, Workspace()
    for name, (outputs, inputs) in shapes.items():
        bias: nn.Parameter | None = model.get_submodule(name).bias  # type: ignore[assignment]
        made[name] = PackedLinear(inputs, outputs, bias, kernels, workspace)
        replace_module_(model, name, made[name])
    return made
