"""Reading C of arXiv 2602.21652: gains of rows and columns tuned after masking, folded into the weights that stay.

Its conclusion calls the scales "a mechanism for restoring expressivity after masking"; that is no equivalence any more:
the masked model's function is meant to change. Each linear gets diag(r) W diag(c), its bias (if it has one) r b + d;
zeros stay zero and nothing is added. One level at a time, so it is for one-shot pruning, not for a ladder.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.feature_stage import (
    BlockResult,
    StageSettings,
    better,
    check_samples,
    feature_errors,
    train_,
)
from elastic_sparsity.functional_fold import outputs_inputs
from elastic_sparsity.ladder import Level


def tune_gains_(
    pruned: Any,
    dense: Any,
    token_ids_ST: Tensor,
    level: Level,
    settings: StageSettings,
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[BlockResult]:
    """Tunes a pruned model's gains towards the dense one's features, block by block on its own stream.

    Args:
        pruned: causal LM; its linears change, their zeros stay.
        dense: the model that it was.
        level: what it was pruned to; a name for the errors.
    Returns: one result a block; a block that gained nothing is as it was.
    Raises: ConfigError: too few samples. NumericsError.
    """
    check_samples(len(token_ids_ST), settings.held_out)
    row, trained = architecture_of(pruned.config.model_type), len(token_ids_ST) - settings.held_out
    runners = [BlockRunner(m.base_model, list(decoder_blocks(m)), token_ids_ST, 1) for m in (dense, pruned)]
    target, hidden = (runner.first_hidden() for runner in runners)
    results = []
    for index, block in enumerate(decoder_blocks(pruned)):
        calls = [runner.call(index) for runner in runners]
        with autocast():
            target = runners[0].map(calls[0], target)
        gains = _Gains(block, row.linears)
        data, held = (hidden[:trained], target[:trained]), (hidden[trained:], target[trained:])
        before = feature_errors(block, calls[1], *held, [level], lambda *_: {}, autocast)
        train_(
            gains.free, block, calls[1], *data, [level] * settings.steps, gains.learned, settings, autocast,
            f"{row.blocks}.{index}",
        )  # fmt: skip
        after = feature_errors(block, calls[1], *held, [level], gains.learned, autocast)
        used = better(before, after)
        if used:
            gains.fold_(level)
        results.append(BlockResult(before=before, after=after, used=used))
        with autocast():
            hidden = runners[1].map(calls[1], hidden)
        on_block(index + 1, len(runners[1].blocks))
    return results


class _Gains:
    """Free vectors of a block: logarithms of its linears' row and column gains, and what is added to biases."""

    def __init__(self, block: nn.Module, paths: tuple[str, ...]) -> None:
        self.block, self.paths = block, paths
        self.rows, self.columns, self.added = {}, {}, {}
        for path in paths:
            linear = block.get_submodule(path)
            weight_OI = outputs_inputs(block, path, linear.weight)  # type: ignore[arg-type]
            self.rows[path], self.columns[path] = (
                torch.zeros(width, device=weight_OI.device, requires_grad=True) for width in weight_OI.shape
            )
            if linear.bias is not None:
                self.added[path] = torch.zeros_like(linear.bias, dtype=torch.float32, requires_grad=True)  # type: ignore[arg-type]

    @property
    def free(self) -> list[Tensor]:
        return [*self.rows.values(), *self.columns.values(), *self.added.values()]

    def learned(self, _level: Level, _with_graph: bool) -> dict[str, Tensor]:
        """The block's parameters; the mask is in the weights' zeros."""
        found = {}
        for path in self.paths:
            linear = self.block.get_submodule(path)
            weight_OI = outputs_inputs(self.block, path, linear.weight.detach())  # type: ignore[operator]
            row_O = self.rows[path].exp()
            tuned_OI = row_O[:, None] * weight_OI * self.columns[path].exp()
            found[f"{path}.weight"] = outputs_inputs(self.block, path, tuned_OI)
            if path in self.added:
                found[f"{path}.bias"] = row_O * linear.bias.detach() + self.added[path]  # type: ignore[operator]
        return found

    @torch.no_grad()
    def fold_(self, level: Level) -> None:
        parameters = dict(self.block.named_parameters())
        for name, value in self.learned(level, False).items():
            parameters[name].copy_(value)
