"""Models whose blocks differ in heads and MLP channels, which no config.json of transformers can say.

The config gets one more field, `elastic_sizes`: what every block keeps. Its other fields hold counts that no block
exceeds and that transformers takes, for which it makes the model; then the blocks' linears are cut to their own. Opened
without this module such a folder is refused by transformers, because the shapes differ. Attention takes its number of
heads from the shapes of its linears, so nothing but these changes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_sparsity.arch import decoder_blocks, is_transposed
from elastic_sparsity.errors import ConfigError, brief
from elastic_sparsity.wiring import SIZES_FIELD, Wiring, num_groups, wiring_of

GROUPS, CHANNELS = "key_value_heads", "channels"


def generation_config(folder: Path) -> Any:
    """What a model's folder says of generating (stop tokens, sampling); None if it says nothing."""
    from transformers import GenerationConfig  # slow import, only here

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def with_sizes(config: Any, groups: Sequence[int], channels: Sequence[int]) -> Any:
    """Notes in a config what every block keeps; nothing, if that is what the config says of all of them.

    Args:
        config: of at least as many heads and channels as any block keeps.
    """
    held = _held(config)
    if any(count != held[GROUPS] for count in groups) or any(count != held[CHANNELS] for count in channels):
        setattr(config, SIZES_FIELD, {GROUPS: list(groups), CHANNELS: list(channels)})
    elif hasattr(config, SIZES_FIELD):
        delattr(config, SIZES_FIELD)
    return config


def sizes_field(config: Any) -> tuple[list[int], list[int]] | None:
    """Key/value heads and MLP channels by block; None = all blocks are as the config says.

    Raises: ConfigError: the field holds something else.
    """
    found = getattr(config, SIZES_FIELD, None)
    if found is None:
        return None
    row, depth, most = wiring_of(config), int(config.num_hidden_layers), _held(config)
    where = f"{getattr(config, 'name_or_path', '') or 'config.json'}: {SIZES_FIELD}"
    if not isinstance(found, dict) or set(found) != set(most):
        raise ConfigError(f"{where}: found {brief(found)}; expected lists {GROUPS} and {CHANNELS}.")
    for name, counts in found.items():
        plain = isinstance(counts, list) and all(type(count) is int for count in counts)
        if not plain or not counts or len(counts) != depth or not 1 <= min(counts) <= max(counts) <= most[name]:
            raise ConfigError(
                f"{where}.{name}: found {brief(counts)}; expected {depth} numbers from 1 to {most[name]}, one a block."
            )
    if set(found[GROUPS]) != {most[GROUPS]} and not heads_may_differ(row):
        raise ConfigError(f"{where}.{GROUPS}: {config.model_type} needs {most[GROUPS]} in every block.")
    return found[GROUPS], found[CHANNELS]


def _held(config: Any) -> dict[str, int]:
    """What a config says of all blocks."""
    return {GROUPS: num_groups(config), CHANNELS: int(getattr(config, wiring_of(config).width_field, None) or 0)}


def heads_may_differ(row: Wiring) -> bool:
    """Whether blocks may keep different numbers of heads: a fused linear is split where the config says."""
    return row.free_heads and not row.fused


def opened_by(folder: Path) -> str:
    """What to tell a user of a model that was just written."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if raw.get(SIZES_FIELD) is None:
        return "open it with AutoModelForCausalLM.from_pretrained"
    return "its blocks differ in size, which transformers alone cannot read; open it with elastic_sparsity.load_pruned"


def causal_lm(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A new model of a config, as `AutoModelForCausalLM.from_config` makes it, with every block's own sizes."""
    from transformers import AutoModelForCausalLM  # slow import, only here

    wanted = {} if dtype is None else {"dtype": dtype}  # a dtype of None would overwrite the config's own
    if sizes_field(config) is None:
        return AutoModelForCausalLM.from_config(config, **wanted)
    return model_class(config)._from_config(config, **wanted)


def model_class(config: Any) -> Any:
    """What to call `from_pretrained` of: transformers' Auto class, or for unequal blocks one that cuts its linears.

    The latter goes by its parent's name, which a saved config.json then holds.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM  # slow imports, only here

    if sizes_field(config) is None:
        return AutoModelForCausalLM
    parent: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        parent.__init__(self, config, *args, **kwargs)
        cut_(self)

    return type(parent.__name__, (parent,), {"__init__": __init__, "__module__": parent.__module__})


@torch.no_grad()
def cut_(model: Any) -> None:
    """Cuts the linears of a model made by its config to what every block keeps."""
    found = sizes_field(model.config)
    assert found is not None
    row, held = wiring_of(model.config), _held(model.config)
    branches = [(row.down, row.mlp_inputs, found[1], held[CHANNELS])]
    if heads_may_differ(row):
        branches.append((row.out, row.attention_inputs, found[0], held[GROUPS]))
    for end, inputs, counts, of in branches:
        for block, count in zip(decoder_blocks(model), counts, strict=True):
            for path in inputs:
                _cut_linear_(block.get_submodule(path), 0, count, of)
            _cut_linear_(block.get_submodule(end), 1, count, of)


def _cut_linear_(linear: nn.Module, dim: int, count: int, of: int) -> None:
    """Leaves `count` of every `of` outputs (dim 0) or inputs (dim 1)."""
    weight = linear.get_parameter("weight")
    axis = 1 - dim if is_transposed(linear) else dim
    size = weight.shape[axis] * count // of
    linear.weight = nn.Parameter(weight.narrow(axis, 0, size).clone(), requires_grad=weight.requires_grad)
    if dim == 0 and linear.bias is not None:
        assert isinstance(linear.bias, nn.Parameter)
        linear.bias = nn.Parameter(linear.bias[:size].clone(), requires_grad=linear.bias.requires_grad)
    if hasattr(linear, "nf"):  # transformers' Conv1D
        setattr(linear, "nx" if dim else "nf", size)
    else:
        setattr(linear, "in_features" if dim else "out_features", size)
