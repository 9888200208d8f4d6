"""A trained block's elastic linears as tensors and back: for going on after a crash, and for writing the checkpoint.

Base weights are part of it only if training moved them. Masks are bytes: drop levels as they are, patterns 0 or 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import ElasticLinear, replace_module_
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.ladder import rank_slices
from elastic_sparsity.shells import LinearRecord

T = TypeVar("T")


def linear_state(elastic: ElasticLinear, base_moved: bool) -> dict[str, Tensor]:
    """Everything of one linear that training or scoring made."""
    tensors: dict[str, Tensor] = {"lora_A": elastic.lora_A, "lora_B": elastic.lora_B}
    if base_moved:
        tensors["weight"] = elastic.weight
    if elastic.drop_level is not None:
        tensors["drop_level"] = elastic.drop_level
    tensors |= {f"pattern_{i:03d}": mask.to(torch.uint8) for i, mask in enumerate(elastic.pattern_masks)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def restore_linear_(
    block: nn.Module, path: str, state: Mapping[str, Tensor], make: Callable[..., ElasticLinear]
) -> None:
    """Puts an elastic linear with this state where the block's dense one is.

    Args:
        make: the linear, drop levels and pattern masks to an elastic linear.
    """
    linear = block.get_submodule(path)
    device = weight_OI(linear).device
    drop_level = state["drop_level"].to(device) if "drop_level" in state else None
    elastic = make(linear, drop_level, [mask.bool().to(device) for mask in _patterns(state)])
    for part in ("lora_A", "lora_B", "weight"):
        if part in state:
            getattr(elastic, part).copy_(state[part])
    replace_module_(block, path, elastic)


def _patterns(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [state[name] for name in sorted(n for n in state if n.startswith("pattern_"))]


def record_of(elastic: ElasticLinear) -> LinearRecord:
    """What the checkpoint stores of a linear in memory."""
    return LinearRecord(
        weight_OI=elastic.weight.detach(),
        drop_level_OI=elastic.drop_level,
        pattern_masks=elastic.pattern_masks,
        pairs=[elastic.group_pair(group) for group in range(elastic.ladder.num_groups)],
        transposed=elastic.transposed,
    )


def saved_record(
    state: Mapping[str, Tensor], stored_weight: Callable[[], Tensor], transposed: bool, ranks: Sequence[int]
) -> LinearRecord:
    """What the checkpoint stores of a linear whose state lies in a file.

    Args:
        stored_weight: reads its base weight as the model stores it; asked only if the state holds none.
    """
    base = state.get("weight")  # (O, I), as the elastic linear holds it
    if base is None:
        base = stored_weight().T if transposed else stored_weight()
    return LinearRecord(
        weight_OI=base,
        drop_level_OI=state.get("drop_level"),
        pattern_masks=[mask.bool() for mask in _patterns(state)],
        pairs=[(state["lora_A"][part], state["lora_B"][:, part]) for part in rank_slices(ranks)],
        transposed=transposed,
    )


class Lazy(Mapping[str, T]):
    """Items by name, each made when it is asked for, and not kept."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self.names, self.make = list(names), make

    def __getitem__(self, name: str) -> T:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
