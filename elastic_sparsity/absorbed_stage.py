"""Reading A of arXiv 2602.21652: scales and shifts learned on features with masks on, then absorbed exactly.

The dense function stays, so every block is trained on the dense stream. What follows from the algebra, and tests check:
with Wanda's scores no exact scale changes a mask or the masked function, so that only shifts, where biases exist, can
help it. Magnitudes do change: there the masks move, by straight-through gradients.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.absorption import Pair, scale_pair_, scale_pairs, shift_pair_, shift_pairs
from elastic_sparsity.arch import architecture_of, decoder_blocks
from elastic_sparsity.blocks import BlockCall, BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.end_to_end import balanced_order
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.feature_stage import (
    BlockResult,
    ParametersAt,
    StageSettings,
    better,
    check_samples,
    choice_of,
    feature_errors,
    train_,
)
from elastic_sparsity.functional_fold import folded_parameters, outputs_inputs
from elastic_sparsity.head_basis import entropy
from elastic_sparsity.importance import InputStatistics
from elastic_sparsity.ladder import Ladder, Level
from elastic_sparsity.masks import WHOLE_MATRIX, matrix_count
from elastic_sparsity.metric_refresh import scaled_square_sum
from elastic_sparsity.soft_mask import Choice, straight_through
from elastic_sparsity.spectral_loss import initial_scales

METHODS = ("magnitude", "wanda")


def absorb_learned_(
    model: Any,
    token_ids_ST: Tensor,
    ladder: Ladder,
    method: str,
    settings: StageSettings,
    generator: torch.Generator,
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[BlockResult]:
    """Learns and folds, block by block; the model's function stays.

    Args:
        model: causal LM, frozen, whole in memory, in float32.
        token_ids_ST: the last `settings.held_out` samples judge, the others train.
        method: whose masks are on: "magnitude" or "wanda".
    Returns: one result a block; where nothing was gained the block is as it was.
    Raises: ConfigError: another method, or too few samples. NumericsError.
    """
    check_method(method)
    check_samples(len(token_ids_ST), settings.held_out)
    blocks, row = decoder_blocks(model), architecture_of(model.config.model_type)
    runner = BlockRunner(model.base_model, list(blocks), token_ids_ST, 1)
    trained = len(token_ids_ST) - settings.held_out
    training = BlockRunner(model.base_model, list(blocks), token_ids_ST[:trained], 1)
    hidden, results = runner.first_hidden(), []
    for index, block in enumerate(blocks):
        call, where = runner.call(index), f"{row.blocks}.{index}"
        linears = {path: block.get_submodule(path) for path in row.linears}
        with autocast():
            targets = runner.map(call, hidden)
        statistics = block_statistics(
            training, call, linears, [hidden[:trained]], gram=False, means=True, autocast=autocast, where=where
        )
        learner = _Learner(block, model.config, linears, statistics, method, settings.temperature)
        if settings.paper_start:
            learner.start_(call, hidden[:1])
        order = balanced_order(ladder.levels, settings.steps, generator)
        data, held = (hidden[:trained], targets[:trained]), (hidden[trained:], targets[trained:])
        before = feature_errors(block, call, *held, ladder.levels, learner.at({}, {}), autocast)
        penalty = learner.entropy if settings.penalty == "entropy" else None
        train_(learner.free, block, call, *data, order, learner.learned(), settings, autocast, where, penalty)
        after = feature_errors(block, call, *held, ladder.levels, learner.learned(), autocast)
        used = better(before, after)
        if used:
            learner.fold_()
        results.append(BlockResult(before=before, after=after, used=used))
        hidden = targets
        on_block(index + 1, len(blocks))
    return results


def check_method(method: str) -> None:
    """Raises: ConfigError: scores whose masks this stage cannot learn for."""
    if method not in METHODS:
        raise ConfigError(f"reading 'absorbed': found scores {method!r}; expected one of {', '.join(METHODS)}.")


class _Learner:
    """The free vectors of one block, and its parameters as they make them."""

    def __init__(
        self,
        block: nn.Module,
        config: Any,
        linears: Mapping[str, nn.Module],
        statistics: Mapping[str, InputStatistics],
        method: str,
        temperature: float,
    ) -> None:
        self.block, self.linears, self.method, self.temperature = block, linears, method, temperature
        self.statistics = statistics
        self.pairs, shifted = scale_pairs(block, config), shift_pairs(block, config)
        device = next(block.parameters()).device
        self.log_scales = {p.name: torch.zeros(p.num_values, device=device, requires_grad=True) for p in self.pairs}
        self.shifts = {p.name: torch.zeros(p.num_values, device=device, requires_grad=True) for p in shifted}

    @property
    def free(self) -> list[Tensor]:
        return [*self.log_scales.values(), *self.shifts.values()]

    @torch.no_grad()
    def start_(self, call: BlockCall, hidden_STD: Tensor) -> None:
        """Eq. 5 for pairs behind a linear; it needs that linear's outputs. Norms and q, k start at 1 (OmniQuant)."""
        behind = {p.divided[0].path: p for p in self.pairs if p.kind in ("value", "mlp")}
        seen: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[..., None]:
            return lambda _module, _args, output: seen.update({path: output.flatten(0, -2)})

        handles = [self.block.get_submodule(path).register_forward_hook(keep(path)) for path in behind]
        try:
            call(hidden_STD)
        finally:
            for handle in handles:
                handle.remove()
        for path, pair in behind.items():
            side = pair.divided[0]
            logs_N = initial_scales(seen[path][:, side.channels_N.to(seen[path].device)]).log()
            target = self.log_scales[pair.name]
            target.index_copy_(0, side.values_N.to(target.device), logs_N)

    def learned(self) -> ParametersAt:
        def parameters(level: Level, with_graph: bool) -> dict[str, Tensor]:
            scales = {name: logs.exp() for name, logs in self.log_scales.items()}
            return self.at(scales, self.shifts)(level, with_graph)

        return parameters

    def entropy(self) -> Tensor:
        """Of all linears' dense importances: mean over them, as a share of its largest value.

        DenoiseRotator's objective (arXiv 2505.23049) without its matrix at run time: importance gathers in few weights
        of a row. Unlike eq. 8 it does not depend on scale. Exact scales leave Wanda's importances as they are.
        """
        scales = {name: logs.exp() for name, logs in self.log_scales.items()}
        folded, found = folded_parameters(self.block, self.pairs, scales, self.shifts), []
        for path, linear in self.linears.items():
            weight_OI = outputs_inputs(self.block, path, folded.get(f"{path}.weight", linear.weight))  # type: ignore[arg-type]
            energy_OI = weight_OI.float().square()
            if self.method == "wanda":
                energy_OI = energy_OI * self._norms(path, scales, self.shifts)
            found.append(entropy(energy_OI) / math.log(max(2, energy_OI.shape[1])))
        return torch.stack(found).mean()

    def at(self, scales: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> ParametersAt:
        """Folded and masked parameters. Scores come from cached statistics, refreshed by eq. 10."""

        def parameters(level: Level, with_graph: bool) -> dict[str, Tensor]:
            found = folded_parameters(self.block, self.pairs, scales, shifts)
            for path, linear in self.linears.items():
                name = f"{path}.weight"
                folded_OI = outputs_inputs(self.block, path, found.get(name, linear.weight))  # type: ignore[arg-type]
                scores_OI = folded_OI.float().abs()
                if self.method == "wanda":
                    # A ReLU may leave a channel at zero, where a square root has no derivative.
                    squares_I = self._norms(path, scales, shifts).clamp_min(torch.finfo(torch.float32).tiny)
                    scores_OI = scores_OI * squares_I.sqrt()
                if self.method in WHOLE_MATRIX and level.pattern is None:  # as one-shot pruning does; runs go by row
                    size = scores_OI.numel()
                    choice = Choice(matrix_count(size, level.sparsity), size)
                    mask_OI = straight_through(scores_OI.reshape(1, size), choice, self.temperature).view_as(scores_OI)
                else:
                    choice = choice_of(level, folded_OI.shape[1])
                    mask_OI = straight_through(scores_OI, choice, self.temperature)
                if not with_graph:
                    mask_OI = mask_OI.detach()
                found[name] = outputs_inputs(self.block, path, folded_OI * mask_OI)
            return found

        return parameters

    def _norms(self, path: str, scales: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> Tensor:
        statistics = self.statistics[path]
        found = statistics.square_sum_I
        for pair, side in self._reading(path):
            width = len(found)
            shift_I = side.spread(shifts[pair.name], width, 0.0).double() if pair.name in shifts else None
            factors_I = (
                side.spread(1 / scales[pair.name], width, 1.0) if pair.name in scales else torch.ones_like(found)
            )
            found = scaled_square_sum(
                statistics.square_sum_I.double(),
                factors_I.double(),
                shift_I=shift_I,
                sum_I=statistics.mean_I * statistics.num_tokens,
                num_tokens=statistics.num_tokens,
            ).float()
        return found

    def _reading(self, path: str) -> list[tuple[Pair, Any]]:
        """At most one pair scales a linear's inputs."""
        found = [(pair, side) for pair in self.pairs for side in pair.multiplied if side.inputs and side.path == path]
        assert len(found) <= 1, path
        return found

    def fold_(self) -> None:
        for pair in self.pairs:
            if pair.name in self.shifts:
                shift_pair_(self.block, pair, self.shifts[pair.name].detach())
            scale_pair_(self.block, pair, self.log_scales[pair.name].detach().exp())
