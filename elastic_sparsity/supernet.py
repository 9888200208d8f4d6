"""A model that can take any allocation at once: one drop order a linear instead of copies (arXiv 2503.09657, 1.3).

The order is that of the scores within each row, so all allocations' masks are nested. Blocks are scored one after the
other; the next block's input is the expectation over the levels (its eq. 5, taken at every linear, by its average
weight), without which the paper finds 538 instead of 66 perplexity.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.allocation import TOP, Size
from elastic_sparsity.arch import (
    architecture_of,
    decoder_blocks,
    head_function,
    is_transposed,
    linears_of,
    weight_OI,
)
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import NumericsError, ShapeError
from elastic_sparsity.importance import importance_scores
from elastic_sparsity.ladder import keep_count

ROWS = 128  # positions whose logits exist at once
OUTLIER = 5.0  # times the mean score of a block (OWL's M)


def linear_sizes(model: Any) -> list[Size]:
    """Of all linears that get sparsified, in the order in which data flows."""
    shapes = {name: weight_OI(linear).shape for name, linear in linears_of(model).items()}
    return [Size(name=name, rows=shape[0], width=shape[1]) for name, shape in shapes.items()]


def linear_depths(model: Any) -> list[int]:
    """Number of the block of every linear, in the same order."""
    paths = architecture_of(model.config.model_type).linears
    return [index for index in range(len(decoder_blocks(model))) for _ in paths]


class Supernet:
    """A causal LM whose decoder linears are masked in place; `apply_` sets an allocation, `restore_` the dense weights.

    Attributes:
        sizes: of all linears, in the model's order.
        depths: block of every linear.
        outliers: share of outlying scores by block.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        self.sizes = linear_sizes(model)
        self.depths = linear_depths(model)
        self.outliers = [0.0] * len(decoder_blocks(model))
        self._linears: list[Any] = list(linears_of(model).values())
        self._dense = [linear.weight.detach() for linear in self._linears]
        self._rank: list[Tensor] = [torch.empty(0)] * len(self._linears)  # (O, I) int16 or int32, 0 = kept longest
        self._applied: list[int | None] = [None] * len(self._linears)

    @torch.no_grad()
    def score_(
        self,
        token_ids_ST: Tensor,
        sparsities: Sequence[float],
        method: str,
        damping: float,
        batch_size: int,
        autocast: Callable[[], Any],
        on_block: Callable[[int, int], None] = lambda done, total: None,
        channel_scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Orders all weights, block after block, on the stream that the levels are expected to make.

        Args:
            sparsities: the levels; a level counts by the share of weights it keeps.
            channel_scales: learned scales of the scores, by linear, as in `importance_scores`.
        Raises: NumericsError: bad statistics.
        """
        scales = channel_scales or {}
        blocks = decoder_blocks(self.model)
        row = architecture_of(self.model.config.model_type)
        runner = BlockRunner(self.model.base_model, list(blocks), token_ids_ST.to(self.model.device), batch_size)
        hidden = runner.first_hidden()
        for index, block in enumerate(blocks):
            mine = [i for i, depth in enumerate(self.depths) if depth == index]
            linears, call = {path: block.get_submodule(path) for path in row.linears}, runner.call(index)
            where = f"{row.blocks}.{index}"
            found = block_statistics(
                runner, call, linears, [hidden], gram=method == "obs", autocast=autocast, where=where
            )
            scores = [
                importance_scores(
                    method, weight_OI(linear), found[path], damping, f"{where}.{path}", scales.get(f"{where}.{path}")
                )
                for path, linear in linears.items()
            ]
            together = torch.cat([score.flatten() for score in scores])
            self.outliers[index] = float((together > OUTLIER * together.mean()).float().mean())
            for i, score in zip(mine, scores, strict=True):
                self._rank[i] = _ranks(score)
                self._set_expected_(i, sparsities)
            with autocast():
                hidden = runner.map(call, hidden)
            for i in mine:
                self._linears[i].weight = torch.nn.Parameter(self._dense[i], requires_grad=False)
            on_block(index + 1, len(blocks))

    def _set_expected_(self, i: int, sparsities: Sequence[float]) -> None:
        """The levels' average weight, dense included, each by the share that it keeps."""
        shares = torch.tensor([1.0, *(1 - sparsity for sparsity in sparsities)])
        counts = [self.sizes[i].width, *(keep_count(self.sizes[i].width, sparsity) for sparsity in sparsities)]
        expected = torch.zeros(self._rank[i].shape, device=self._rank[i].device)
        for share, count in zip((shares / shares.sum()).tolist(), counts, strict=True):
            expected += share * (self._rank[i] < count)
        self._set_(i, expected)

    def _set_(self, i: int, factor_OI: Tensor) -> None:
        factor = factor_OI.T if is_transposed(self._linears[i]) else factor_OI
        weight = self._dense[i] * factor.to(self._dense[i].dtype)
        self._linears[i].weight = torch.nn.Parameter(weight, requires_grad=False)

    @torch.no_grad()
    def apply_(self, kept: Sequence[int]) -> None:
        """Masks all linears; those that keep as many as before are not touched.

        Raises: ShapeError: a number for a linear that is not within 1 and its width.
        """
        for i, (size, count) in enumerate(zip(self.sizes, kept, strict=True)):
            if not 1 <= count <= size.width:
                raise ShapeError(f"{size.name}: {count} kept of {size.width} a row.")
            if self._applied[i] != count:
                self._set_(i, self._rank[i] < count)
                self._applied[i] = count

    def prices(self, gradients: Callable[[], Any]) -> list[Tensor]:
        """What other numbers of kept weights would change, to first order, at the applied allocation.

        Dropping a weight w changes a loss by -g w, adding it by +g w, with g the loss's gradient where it stands.

        Args:
            gradients: leaves the gradients of the masked weights in their `grad`.
        Returns: by linear (I + 1,) float64, the predicted change of the loss if it kept 0, 1, ... I weights a row.
        Raises: NumericsError: a gradient is not finite.
        """
        for linear in self._linears:
            linear.weight.requires_grad_(True)
        try:
            gradients()
            return [self._price(i) for i in range(len(self._linears))]
        finally:
            for linear in self._linears:
                linear.weight.requires_grad_(False)
                linear.weight.grad = None

    def _price(self, i: int) -> Tensor:
        linear, count = self._linears[i], self._applied[i]
        if count is None or linear.weight.grad is None:
            raise ShapeError(f"{self.sizes[i].name}: no gradient; apply an allocation that this linear takes part in.")
        product = (linear.weight.grad.float() * self._dense[i].float()).double()
        product_OI = product.T if is_transposed(linear) else product
        by_rank = torch.zeros(self.sizes[i].width, dtype=torch.float64, device=product.device)
        by_rank.index_add_(0, self._rank[i].flatten().long(), product_OI.flatten())
        curve = torch.cat([by_rank.new_zeros(1), by_rank.cumsum(0)])
        if not curve.isfinite().all():
            raise NumericsError(f"{self.sizes[i].name}: the loss's gradient is not finite; check model and text.")
        return (curve - curve[count]).cpu()

    def restore_(self) -> None:
        """The dense weights again."""
        for linear, dense in zip(self._linears, self._dense, strict=True):
            linear.weight = torch.nn.Parameter(dense, requires_grad=False)
        self._applied = [None] * len(self._linears)


def _ranks(scores_OI: Tensor) -> Tensor:
    """(O, I) place of every weight in its row's order; 0 is the highest score, ties by index."""
    order = scores_OI.argsort(dim=1, descending=True, stable=True)
    dtype = torch.int16 if scores_OI.shape[1] < 2**15 else torch.int32
    places = torch.arange(scores_OI.shape[1], dtype=dtype, device=scores_OI.device)
    return torch.empty_like(scores_OI, dtype=dtype).scatter_(1, order, places.expand_as(order))


class TopKL:
    """KL to the dense model on some windows: its `TOP` likeliest tokens, and all others as one; a lower bound.

    What is kept of the dense model is made once, of dense weights: TOP tokens and their log-probabilities a position.
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows_ST: Tensor, autocast: Callable[[], Any]) -> None:
        self._model, self._autocast = model, autocast
        self._windows_ST = windows_ST.to(model.device)
        self._top = min(TOP, int(model.config.vocab_size) - 1)
        with autocast():
            self._head = head_function(model)
            self._dense = [self._teacher(window) for window in self._windows_ST]

    def _hidden(self, window_T: Tensor) -> Tensor:
        with self._autocast():
            return self._model.base_model(window_T[None], use_cache=False).last_hidden_state[0]

    def _log_probabilities(self, hidden_TD: Tensor) -> Tensor:
        with self._autocast():
            return self._head(hidden_TD).float().log_softmax(-1)

    def _teacher(self, window_T: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._hidden(window_T).split(ROWS)
        found = [self._log_probabilities(part).topk(self._top, dim=-1) for part in parts]
        return torch.cat([x.indices for x in found]).int(), torch.cat([x.values for x in found])

    def _part(self, number: int, start: int, hidden_TD: Tensor) -> Tensor:
        """Sum over some positions of window `number`, whose final hidden states these are; the first is `start`."""
        rows = slice(start, start + hidden_TD.shape[0])
        tokens_TK, teacher_TK = (x[rows] for x in self._dense[number])
        student_TK = self._log_probabilities(hidden_TD).gather(1, tokens_TK.long())
        return top_kl(teacher_TK, student_TK).double().sum()

    @torch.no_grad()
    def __call__(self, windows: Sequence[int]) -> float:
        """Mean over the positions of the windows with these numbers, nats a token."""
        loss = 0.0
        for number in windows:
            parts = self._hidden(self._windows_ST[number]).split(ROWS)
            loss += sum(float(self._part(number, i * ROWS, part)) for i, part in enumerate(parts))
        return loss / (len(windows) * self._windows_ST.shape[1])

    def backward(self, windows: Sequence[int]) -> None:
        """Adds the gradients of that mean to the parameters that take part and require one."""
        for number in windows:
            hidden_TD = self._hidden(self._windows_ST[number])
            gradients = []
            for i, part in enumerate(hidden_TD.detach().split(ROWS)):  # logits of so many positions exist at once
                leaf = part.requires_grad_(True)
                gradients += torch.autograd.grad(self._part(number, i * ROWS, leaf), leaf)
            hidden_TD.backward(torch.cat(gradients) / (len(windows) * self._windows_ST.shape[1]))


def top_kl(teacher_TK: Tensor, student_TK: Tensor) -> Tensor:
    """(T,) KL of two distributions of which K log-probabilities are known each, the rest taken as one outcome."""
    known = (teacher_TK.exp() * (teacher_TK - student_TK)).sum(-1)
    tiny = torch.finfo(torch.float32).eps
    p, q = ((1 - x.exp().sum(-1)).clamp_min(tiny) for x in (teacher_TK, student_TK))
    return known + p * (p.log() - q.log())
