"""A model that can keep any numbers of heads and MLP channels at once: one greedy order and one factor a branch.

The structured twin of `supernet.Supernet` (arXiv 2503.09657, section 3, where it is copies of the weights): the linear
that ends a branch is refitted to any prefix of the branch's order from one Cholesky factor, and the gradient of the
loss prices all prefixes at once. With Z and L of structured_order.py the weights of the first k inputs are
L_kk^-T Z[:k], and their product with a gradient G is sum_{j < k} (L^-1 G)_j . Z_j, because L is lower triangular: one
triangular solve and one running sum a branch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, is_transposed
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.structured import counts_by_block, ordered_fit, replace_linear_
from elastic_sparsity.structured_order import Prefixes
from elastic_sparsity.structured_parts import parts_of, unit_cost
from elastic_sparsity.structured_sizes import Sizes
from elastic_sparsity.wiring import linear_at


class UnitNet:
    """A causal LM in float32, frozen, whose branches' last linears are refitted in place; `restore_` undoes that.

    Holds a factor of I x I float64 for every branch with I inputs.

    Attributes:
        names: ("attention" or "mlp") by branch, in the order in which data flows.
        depths: block of every branch.
        totals: units of every branch.
        costs: parameters that go with one unit.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        blocks = decoder_blocks(model)
        found = [(i, block, part) for i, block in enumerate(blocks) for part in parts_of(block, model.config)]
        self._parts = [part for _, _, part in found]
        self.names = [part.name for part in self._parts]
        self.depths = [depth for depth, _, _ in found]
        self.totals = [len(part.units_UC) for part in self._parts]
        self.costs = [unit_cost(block, part) for _, block, part in found]
        self._linears: list[nn.Linear] = [linear_at(block, part.path) for _, block, part in found]
        self._dense = [(linear.weight.clone(), _copy_of(linear.bias)) for linear in self._linears]
        self._fits: list[Prefixes | None] = [None] * len(found)
        self._means: list[Tensor | None] = [None] * len(found)
        self._applied = list(self.totals)

    @torch.no_grad()
    def score_(
        self,
        token_ids_ST: Tensor,
        sizes: Sizes,
        *,
        damping: float,
        at_once: int,
        batch_size: int,
        autocast: Callable[[], Any],
        on_block: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Orders all units, block after block, on the stream of the model that keeps `sizes`; ends with dense weights.

        Args:
            at_once: MLP channels that go before the costs of the rest are computed again.
        Raises: NumericsError: bad statistics, or a covariance that does not factor.
        """
        blocks, prefix = decoder_blocks(self.model), architecture_of(self.model.config.model_type).blocks
        runner = BlockRunner(self.model.base_model, list(blocks), token_ids_ST.to(self.model.device), batch_size)
        hidden = runner.first_hidden()
        for index, counts in enumerate(counts_by_block(sizes)):
            call, where = runner.call(index), f"{prefix}.{index}"
            for i in (i for i, depth in enumerate(self.depths) if depth == index):
                part, linear = self._parts[i], self._linears[i]
                found = block_statistics(
                    runner, call, {part.path: linear}, [hidden], gram=True, means=True, autocast=autocast, where=where
                )[part.path]
                step, name = at_once if part.name == "mlp" else 1, f"{where}.{part.path}"
                _, self._fits[i] = ordered_fit(linear, part, found, damping, step, name)
                self._means[i] = found.mean_I
                self._set_(i, counts[part.name])
            with autocast():
                hidden = runner.map(call, hidden)
            on_block(index + 1, len(blocks))
        self.restore_()

    @torch.no_grad()
    def apply_(self, kept: Sequence[int]) -> None:
        """Keeps the first so many units of every branch's order; branches that keep as many as before are not touched.

        Raises: ShapeError: a number for a branch that is not within 1 and its units.
        """
        for i, (total, count) in enumerate(zip(self.totals, kept, strict=True)):
            if not 1 <= count <= total:
                raise ShapeError(f"block {self.depths[i]}, {self.names[i]}: {count} kept of {total} units.")
            if self._applied[i] != count:
                self._set_(i, count)

    def _set_(self, i: int, count: int) -> None:
        fit = self._fit(i)
        width = self._parts[i].units_UC.shape[1]
        new = self._dense_OI(i) if count == self.totals[i] else fit.weight_OI(count * width)
        replace_linear_(self._linears[i], new, self._means[i])
        self._applied[i] = count

    def _fit(self, i: int) -> Prefixes:
        fit = self._fits[i]
        if fit is None:
            raise ShapeError(f"block {self.depths[i]}, {self.names[i]}: has no order yet; score first.")
        return fit

    def _dense_OI(self, i: int) -> Tensor:
        weight = self._dense[i][0]
        return weight.T if is_transposed(self._linears[i]) else weight

    def prices(self, gradients: Callable[[], Any]) -> list[Tensor]:
        """What other numbers of units would change, to first order, at the numbers that are applied.

        Args:
            gradients: leaves the gradients of the branches' last linears in their `grad`.
        Returns: by branch (U + 1,) float64, the predicted change of the loss if it kept 0, 1, ... U units.
        Raises: NumericsError: a gradient is not finite.
        """
        ours = [x for linear in self._linears for x in (linear.weight, linear.bias) if x is not None]
        for parameter in ours:
            parameter.requires_grad_(True)
        try:
            gradients()
            return [self._price(i) for i in range(len(self._linears))]
        finally:
            for parameter in ours:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _price(self, i: int) -> Tensor:
        fit, linear, mean_I = self._fit(i), self._linears[i], self._means[i]
        if linear.weight.grad is None:
            raise ShapeError(f"block {self.depths[i]}, {self.names[i]}: no gradient of its last linear.")
        gradient = linear.weight.grad.double()
        gradient_OI = gradient.T if is_transposed(linear) else gradient
        if linear.bias is not None and linear.bias.grad is not None and mean_I is not None:
            gradient_OI = gradient_OI - torch.outer(linear.bias.grad.double(), mean_I.to(gradient))
        ordered_IO = gradient_OI.T[fit.order_I]
        solved_IO = torch.linalg.solve_triangular(fit.factor_II, ordered_IO, upper=False)
        sums = (solved_IO * fit.rotated_IO).sum(dim=1).cumsum(0)
        curve = torch.cat([sums.new_zeros(1), sums])[:: self._parts[i].units_UC.shape[1]]
        if not curve.isfinite().all():
            raise NumericsError(
                f"block {self.depths[i]}, {self.names[i]}: the loss's gradient is not finite; check model and text."
            )
        return (curve - curve[self._applied[i]]).cpu()

    @torch.no_grad()
    def restore_(self) -> None:
        """The dense weights again."""
        for linear, (weight, bias) in zip(self._linears, self._dense, strict=True):
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        self._applied = list(self.totals)


def _copy_of(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.clone()
