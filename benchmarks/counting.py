"""Token-passes of a run as they happen: counted at the decoder blocks, to check what is planned."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from elastic_sparsity.adapters import elastic_linears


class PassCounter:
    """Counts the tokens that go through blocks.

    Attributes:
        passes: tokens by direction, as `work_plan` names them.
        trained: tokens that were trained on, by level name.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.passes: Counter[str] = Counter()
        self.trained: Counter[str] = Counter()
        for block in blocks:
            block.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden.shape[0] * hidden.shape[1]
        if not torch.is_grad_enabled():
            self.passes["forward"] += tokens
            return
        self.passes["forward and backward"] += tokens
        _, linear = next(elastic_linears(block))
        self.trained["dense" if linear.level is None else linear.level.name] += tokens
