"""Which structured units a block has, what they cost, how many may stay, and cutting the others out for good.

A unit of attention is a key/value head with all the query heads that read it, so that grouped-query attention stays
valid; a unit of the MLP is an intermediate channel. Where the config cannot say "fewer heads of the same size" (OPT,
GPT-2, GPT-NeoX: head size = width / heads) attention stays whole and the MLP bears the whole budget.
Letters: U units, C inputs of the branch's last linear that a unit has, N rows of a linear that go with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, config_object, decoder_blocks, is_transposed, weight_OI
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.sized import causal_lm, with_sizes
from elastic_sparsity.structured_sizes import Sizes, choose_sizes
from elastic_sparsity.wiring import check_equal_blocks, heads_of, linear_at, mlp_rows, num_groups, wiring_of

USUAL_MULTIPLE = 32  # channels that kernels take at once; a smaller power of two where it does not divide

Kept = Mapping[str, Tensor]
"""By branch, the int64 units of a block that stay, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The units of one branch.

    Attributes:
    name: "attention" or "mlp".
    path: of the branch's last linear, which reads the units' outputs.
    units_UC: int64 columns of its weight.
    rows: (path, (U, N) int64 rows) of the linears that make them; a fused linear comes several times, in its own order.
    """

    name: str
    path: str
    units_UC: Tensor
    rows: tuple[tuple[str, Tensor], ...]


def parts_of(block: nn.Module, config: Any) -> list[Part]:
    """The branches that can lose units, in the order in which data flows.

    Raises: UnsupportedModelError: if the block is not what its architecture's row says, or blocks differ in size.
    """
    check_equal_blocks(config, "structured pruning")
    row, heads = wiring_of(config), heads_of(block, config)
    parts = []
    if row.free_heads:
        queries = (row.query, heads.query_KRC.flatten(1))
        rows = (queries, (row.key, heads.key_KC), (row.value, heads.value_KC))
        parts.append(Part(name="attention", path=row.out, units_UC=heads.out_KRC.flatten(1), rows=rows))
    makers = tuple((path, rows_F[:, None]) for path, rows_F in mlp_rows(block, config))
    channels_UC = torch.arange(len(makers[0][1]))[:, None]
    return [*parts, Part(name="mlp", path=row.down, units_UC=channels_UC, rows=makers)]


def unit_cost(block: nn.Module, part: Part) -> int:
    """Parameters that go with one unit."""
    cost = part.units_UC.shape[1] * weight_OI(linear_at(block, part.path)).shape[0]
    for path, rows_UN in part.rows:
        linear = linear_at(block, path)
        cost += rows_UN.shape[1] * (weight_OI(linear).shape[1] + (linear.bias is not None))
    return cost


@torch.no_grad()
def unit_norms(block: nn.Module, part: Part) -> Tensor:
    """(U,) float64: the norm of all weights that go with a unit, without biases."""
    squares_I = weight_OI(linear_at(block, part.path)).double().square().sum(dim=0)
    squares_U = squares_I[part.units_UC].sum(dim=1)
    for path, rows_UN in part.rows:
        squares_U += weight_OI(linear_at(block, path)).double().square().sum(dim=1)[rows_UN].sum(dim=1)
    return squares_U.sqrt()


def usual_multiple(model: Any) -> int:
    """32, or the largest power of two that divides the MLP's channels."""
    return gcd(USUAL_MULTIPLE, _mlp_of(model).units_UC.shape[0])


def _mlp_of(model: Any) -> Part:
    return parts_of(decoder_blocks(model)[0], model.config)[-1]


def sizes_for(model: Any, sparsity: float, multiple: int | None = None, groups: int | None = None) -> Sizes:
    """The counts of heads and channels that every block of a model keeps; see `choose_sizes`.

    Args:
        groups: key/value heads that must stay; None = as many as the budget asks for.
    Raises: ConfigError: if they cannot meet the budget. UnsupportedModelError.
    """
    row, config = architecture_of(model.config.model_type), model.config
    blocks = decoder_blocks(model)
    for block in blocks[1:]:
        parts_of(block, config)  # checks it
    parts = {part.name: part for part in parts_of(blocks[0], config)}
    mlp, attention = parts["mlp"], parts.get("attention")
    numbers = [tensor.numel() for path in row.linears for tensor in linear_at(blocks[0], path).parameters()]
    most = len(heads_of(blocks[0], config).key_KC)
    allowed = expressible_groups(model)
    return choose_sizes(
        sparsity,
        num_blocks=len(blocks),
        total=sum(numbers),
        group_cost=unit_cost(blocks[0], attention) if attention else 0,
        num_groups=most,
        channel_cost=unit_cost(blocks[0], mlp),
        num_channels=len(mlp.units_UC),
        multiple=usual_multiple(model) if multiple is None else multiple,
        allowed_groups=allowed if groups is None else [count for count in allowed if count == groups],
    )


def sliced_config(
    config: Any, *, groups: Sequence[int], channels: Sequence[int], width: int, biases: bool = False
) -> Any:
    """The config of a model that keeps so many key/value heads and MLP channels, by block.

    If no config of the largest number of heads is possible, it says the next larger one that is, and its blocks less.

    Args:
        width: inputs of the attention's last linear before anything goes.
        biases: give the branches' linears a bias wherever the config has a field for it.
    """
    most = num_groups(config)
    for held in range(max(groups), most):
        try:
            found = _equal_config(config, held, max(channels), width, biases)
            break
        except Exception:  # each config class has checks and error types of its own
            continue
    else:
        found = _equal_config(config, most, max(channels), width, biases)
    return with_sizes(found, groups, channels)


def _equal_config(config: Any, groups: int, channels: int, width: int, biases: bool = False) -> Any:
    """Of equal blocks. Raises: whatever transformers does, if there can be no such config."""
    row, fields = wiring_of(config), {}
    if row.free_heads:
        heads = int(config.num_attention_heads)
        fields = {
            "num_attention_heads": groups * (heads // num_groups(config)),
            "num_key_value_heads": groups,
            "head_dim": width // heads,
        }
    fields[row.width_field] = channels
    if biases:
        fields |= {field: True for field in (row.attention_bias, row.mlp_bias) if field}
    return config_object({**config.to_dict(), **fields})


def _width(model: Any) -> int:
    """Inputs of the attention's last linear."""
    return weight_OI(linear_at(decoder_blocks(model)[0], wiring_of(model.config).out)).shape[1]


def expressible_groups(model: Any) -> list[int]:
    """Counts of key/value heads with which transformers still takes the config: Llama wants width / heads whole."""
    most = len(heads_of(decoder_blocks(model)[0], model.config).key_KC)
    found, width, channels = [most], _width(model), len(_mlp_of(model).units_UC)
    for groups in range(1, most) if wiring_of(model.config).free_heads else ():
        try:
            _equal_config(model.config, groups, channels, width)
        except Exception:  # each config class has checks and error types of its own
            continue
        found.append(groups)
    return found


@torch.no_grad()
def sliced_model(model: Any, kept: Sequence[Kept]) -> Any:
    """The model without the units that do not stay, made from a config that says so. What is not cut is shared.

    It computes what `model` computes if the columns of what goes are zero in the linears that read it.

    Args:
        kept: a block each. If the counts differ between blocks, the config says so in a field of ours; see `sized`.
    Raises: ShapeError: not as many as there are blocks.
    """
    blocks = decoder_blocks(model)
    if len(kept) != len(blocks):
        raise ShapeError(f"units that stay: found {len(kept)} for {len(blocks)} blocks.")
    state, prefix = model.state_dict(), architecture_of(model.config.model_type).blocks
    for index, (block, units) in enumerate(zip(blocks, kept, strict=True)):
        for part in parts_of(block, model.config):
            cut = _cut(block, part, units[part.name])
            state.update({f"{prefix}.{index}.{name}": tensor for name, tensor in cut.items()})
    most = len(heads_of(blocks[0], model.config).key_KC)
    groups = [len(units["attention"]) if "attention" in units else most for units in kept]
    channels = [len(units["mlp"]) for units in kept]
    config = sliced_config(model.config, groups=groups, channels=channels, width=_width(model))
    return _assembled(config, state, model, model.dtype)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The same model, its state in another dtype; other buffers (rotary frequencies) keep theirs, unlike by `.to`."""
    return _assembled(model.config, {name: x.to(dtype) for name, x in model.state_dict().items()}, model, dtype)


def _assembled(config: Any, state: dict[str, Tensor], like: Any, dtype: torch.dtype) -> Any:
    """A model of these very tensors, where `like` is, with what it generates by."""
    from accelerate import init_empty_weights  # slow import, only here

    with init_empty_weights():  # computes the buffers, e.g. rotary frequencies
        made = causal_lm(config, dtype)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = like.generation_config
    return made.to(like.device).requires_grad_(False).eval()


def _cut(block: nn.Module, part: Part, units: Tensor) -> dict[str, Tensor]:
    """The branch's parameters, by name inside the block, of these units alone."""
    rows: dict[str, list[Tensor]] = {}
    for path, rows_UN in part.rows:
        rows.setdefault(path, []).append(rows_UN[units].flatten())
    found = {}
    for path, several in rows.items():
        linear, wanted = linear_at(block, path), torch.cat(several).to(linear_at(block, path).weight.device)
        found[f"{path}.weight"] = _stored(linear, weight_OI(linear)[wanted])
        if linear.bias is not None:
            found[f"{path}.bias"] = linear.bias[wanted]
    linear = linear_at(block, part.path)
    columns = part.units_UC[units].flatten().to(linear.weight.device)
    return {**found, f"{part.path}.weight": _stored(linear, weight_OI(linear)[:, columns])}


def _stored(linear: nn.Module, rows_OI: Tensor) -> Tensor:
    """Of this linear's layout: a `Conv1D` keeps its weight transposed."""
    return (rows_OI.T if is_transposed(linear) else rows_OI).contiguous()


@torch.no_grad()
def add_output_biases_(model: Any) -> None:
    """Gives the branches' last linears a bias of zero wherever the config has a field for it; the others there too."""
    row = wiring_of(model.config)
    wanted = [(row.attention_bias, (*row.attention_inputs, row.out)), (row.mlp_bias, (*row.mlp_inputs, row.down))]
    for field, paths in wanted:
        if not field:
            continue
        for linear in (linear_at(block, path) for block in decoder_blocks(model) for path in paths):
            if linear.bias is None:
                zeros = linear.weight.new_zeros(weight_OI(linear).shape[0])
                linear.bias = nn.Parameter(zeros, requires_grad=False)
        setattr(model.config, field, True)
