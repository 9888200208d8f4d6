"""The folds of `absorption` as a function of scales and shifts that gradients pass: parameters in, parameters out."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic_sparsity.absorption import Pair, Side
from elastic_sparsity.arch import is_transposed


def folded_parameters(
    block: nn.Module, pairs: Sequence[Pair], scales: Mapping[str, Tensor], shifts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The block's changed parameters by name, as `scale_pair_` behind `shift_pair_` would leave them.

    Args:
        pairs: of this block.
        scales: (num_values,) by pair name, none zero; pairs that are not named keep theirs.
        shifts: the same for pairs of `shift_pairs`.
    Returns: tensors for `torch.func.functional_call`, in the layout in which the block stores them.
    """
    found: dict[str, Tensor] = dict(block.named_parameters())
    before = dict(found)
    for pair in pairs:
        if pair.name in shifts:
            _shift(block, found, pair, shifts[pair.name])
        if pair.name in scales:
            for side in pair.multiplied:
                _multiply(block, found, side, scales[pair.name])
            for side in pair.divided:
                _multiply(block, found, side, 1 / scales[pair.name])
    return {name: value for name, value in found.items() if value is not before[name]}


def outputs_inputs(block: nn.Module, path: str, weight: Tensor) -> Tensor:
    """A stored weight of the linear at `path` as (outputs, inputs), and back again."""
    return weight.T if is_transposed(block.get_submodule(path)) else weight


def _multiply(block: nn.Module, found: dict[str, Tensor], side: Side, values: Tensor) -> None:
    name, bias = f"{side.path}.weight", f"{side.path}.bias"
    weight = found[name]
    if weight.ndim == 1:
        factors_O = side.spread(values, len(weight), 1.0)
        found[name] = (weight + side.gain_offset) * factors_O - side.gain_offset
    else:
        weight_OI = outputs_inputs(block, side.path, weight)
        factors_O = side.spread(values, weight_OI.shape[1 if side.inputs else 0], 1.0)
        weight_OI = weight_OI * (factors_O if side.inputs else factors_O[:, None])
        found[name] = outputs_inputs(block, side.path, weight_OI)
    if bias in found and not side.inputs:
        found[bias] = found[bias] * factors_O


def _shift(block: nn.Module, found: dict[str, Tensor], pair: Pair, shifts: Tensor) -> None:
    for side in pair.divided:
        name = f"{side.path}.bias"
        found[name] = found[name] - side.spread(shifts, len(found[name]), 0.0)
    for side in pair.multiplied:
        name, weight_OI = f"{side.path}.bias", outputs_inputs(block, side.path, found[f"{side.path}.weight"])
        found[name] = found[name] + weight_OI @ side.spread(shifts, weight_OI.shape[1], 0.0)


class Called(nn.Module):
    """A block behind the function that calls it as its model does, for `functional_call`."""

    def __init__(self, block: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(hidden)


def call_with(
    block: nn.Module, call: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], hidden: Tensor
) -> Tensor:
    """The block's output with some of its parameters replaced; differentiable in them."""
    replaced = {f"block.{name}": value for name, value in parameters.items()}
    output: Tensor = torch.func.functional_call(Called(block, call), replaced, (hidden,))
    return output
