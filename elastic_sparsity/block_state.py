"""A trained block's elastic linears as tensors and back: for going on after a crash, and for writing the checkpoint.

Base weights are part of it only if training moved them. Masks are bytes: drop levels as they are, patterns 0 or 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import ElasticLinear, replace_module_
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.ladder import Ladder, rank_slices
from elastic_sparsity.shells import LinearRecord


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


class SavedRecords(Mapping[str, LinearRecord]):
    """What the checkpoint stores of linears whose state lies in files; each is read when it is asked for.

    Args:
        names: of all linears, in order.
        state: a linear's name to its state.
        weight: a linear's name to its base weight as the model stores it.
        transposed: a linear's name to whether its module stores it as (inputs, outputs).
    """

    def __init__(
        self,
        names: Sequence[str],
        state: Callable[[str], Mapping[str, Tensor]],
        weight: Callable[[str], Tensor],
        transposed: Callable[[str], bool],
        ladder: Ladder,
        ranks: Sequence[int],
    ) -> None:
        self.names, self.state, self.weight, self.transposed = list(names), state, weight, transposed
        self.ladder, self.slices = ladder, rank_slices(ranks)

    def __getitem__(self, name: str) -> LinearRecord:
        state, transposed = self.state(name), self.transposed(name)
        base = state.get("weight")  # (O, I), as the elastic linear holds it
        if base is None:
            base = self.weight(name).T if transposed else self.weight(name)
        return LinearRecord(
            weight_OI=base,
            drop_level_OI=state.get("drop_level"),
            pattern_masks=[mask.bool() for mask in _patterns(state)],
            pairs=[(state["lora_A"][part], state["lora_B"][:, part]) for part in self.slices],
            transposed=transposed,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
