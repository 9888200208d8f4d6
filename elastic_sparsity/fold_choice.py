"""Folds of a block chosen for pruning: each candidate masked and judged on held-out samples, no fold among them.

What scales cannot do for Wanda (`absorption`), these can: a matrix per value head, an angle per RoPE pair, an order of
channels for N:M. The function stays, so blocks are judged one by one on the dense stream, and norms behind a fold come
from the cache (`metric_refresh`) instead of another pass.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, weight_OI
from elastic_sparsity.blocks import BlockCall, BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.channel_order import improved_order
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.feature_stage import BlockResult, better, check_samples, choice_of, feature_errors
from elastic_sparsity.functional_fold import outputs_inputs
from elastic_sparsity.head_basis import balanced_basis, in_proportion, pair_angles, principal_basis, turned_values
from elastic_sparsity.importance import InputStatistics, wanda_scores
from elastic_sparsity.ladder import Ladder, Level, keep_count
from elastic_sparsity.metric_refresh import mixed_square_sum
from elastic_sparsity.rotation import MAX_CONDITION, mix_values_, permute_mlp_, permute_values_, turn_query_key_
from elastic_sparsity.soft_mask import hard_mask, thresholds
from elastic_sparsity.wiring import heads_of, mlp_rows, wiring_of

# In the order in which they are tried: a matrix between values and output undoes an order of their channels.
FOLDS = ("values", "query_key", "value_order", "mlp_order")
RESIDUAL_ORDER = "residual_order"  # of the whole model, before its blocks: module `residual_order`
ORDERS = (RESIDUAL_ORDER, "value_order", "mlp_order")
TURN_RATE = 0.01  # of Adam on the skew-symmetric matrix behind a rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldSettings:
    """Numbers of the choice.

    Attributes:
        held_out: samples, the last ones, that judge.
        turn_steps: of the learned rotation of every value head; 0 = closed forms alone.
    """

    held_out: int
    turn_steps: int = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldResult(BlockResult):
    """What became of one kind of fold in a block.

    Attributes:
        kind: one of `FOLDS`. chosen: the candidate's name; "none" = the block as it was.
    """

    kind: str
    chosen: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Candidate:
    """A fold and what it makes of the cached sums of squares."""

    name: str
    fold_: Callable[[nn.Module], None]
    square_sums: dict[str, Tensor]


def choose_folds_(
    model: Any,
    token_ids_ST: Tensor,
    ladder: Ladder,
    kinds: Sequence[str],
    settings: FoldSettings,
    autocast: Callable[[], Any],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[FoldResult]:
    """Folds what lowers the held-out error of Wanda's masks, block by block; the model's function stays.

    Args:
        model: causal LM, whole in memory, in float32.
        token_ids_ST: the last `held_out` samples judge, the others give the statistics.
        kinds: of `FOLDS`.
    Returns: one result for every block and kind.
    Raises: ConfigError: an unknown kind, an order without an N:M level, too few samples. AbsorptionError: a kind that
        the architecture has no exact fold for.
    """
    check_kinds(kinds, ladder)
    check_exact_folds(model, kinds)
    check_samples(len(token_ids_ST), settings.held_out)
    blocks, row = decoder_blocks(model), architecture_of(model.config.model_type)
    given = len(token_ids_ST) - settings.held_out
    runner = BlockRunner(model.base_model, list(blocks), token_ids_ST, 1)
    calibration = BlockRunner(model.base_model, list(blocks), token_ids_ST[:given], 1)
    hidden = runner.first_hidden()
    results: list[FoldResult] = []
    for index, block in enumerate(blocks):
        call = runner.call(index)
        linears = {path: block.get_submodule(path) for path in row.linears}
        statistics = block_statistics(
            calibration, call, linears, [hidden[:given]], gram="values" in kinds, autocast=autocast,
            where=f"{row.blocks}.{index}",
        )  # fmt: skip
        with autocast():
            targets = runner.map(call, hidden)
        chooser = _Chooser(block, model.config, call, statistics, (hidden[given:], targets[given:]), autocast)
        for kind in (x for x in FOLDS if x in kinds):
            results.append(chooser.choose_(kind, ladder, settings))
        hidden = targets
        on_block(index + 1, len(blocks))
    return results


def check_kinds(kinds: Sequence[str], ladder: Ladder, known: Sequence[str] = FOLDS) -> None:
    """Raises: ConfigError."""
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"induction.folds: {kind!r} is unknown; expected some of {', '.join(known)}.")
        if kind in ORDERS and not any(level.pattern for level in ladder.levels):
            raise ConfigError(
                f"induction.folds: {kind!r} changes N:M masks alone, and the ladder has no pattern; add one to "
                "ladder.patterns or leave it out."
            )


def check_exact_folds(model: Any, kinds: Sequence[str]) -> None:
    """Raises: AbsorptionError: if the architecture has no exact form of one of the kinds."""
    block, config = copy.deepcopy(decoder_blocks(model)[0]), model.config
    heads = heads_of(block, config)
    num_kv, size = heads.value_KC.shape
    if "values" in kinds:
        mix_values_(block, config, torch.eye(size, dtype=torch.float64).expand(num_kv, size, size))
    if "query_key" in kinds:
        turn_query_key_(block, config, torch.ones(num_kv, heads.pairs, dtype=torch.complex128))
    if "value_order" in kinds:
        permute_values_(block, config, torch.arange(size).expand(num_kv, size))
    if "mlp_order" in kinds:
        mlp_rows(block, config)


class _Chooser:
    """One block, its cached statistics as they are behind what was folded so far, and its held-out samples."""

    def __init__(
        self,
        block: nn.Module,
        config: Any,
        call: BlockCall,
        statistics: Mapping[str, InputStatistics],
        held: tuple[Tensor, Tensor],
        autocast: Callable[[], Any],
    ) -> None:
        self.block, self.config, self.call, self.held, self.autocast = block, config, call, held, autocast
        self.row, self.heads = wiring_of(config), heads_of(block, config)
        self.grams = {path: found.gram_II for path, found in statistics.items()}
        self.square_sums = {path: found.square_sum_I for path, found in statistics.items()}

    @torch.no_grad()
    def choose_(self, kind: str, ladder: Ladder, settings: FoldSettings) -> FoldResult:
        """Folds the best candidate if it is better than none."""
        levels = [level for level in ladder.levels if level.pattern or kind not in ORDERS]
        before = self._errors(self.block, self.square_sums, levels)
        best, chosen = before, None
        for candidate in self._candidates(kind, levels, settings):
            changed = copy.deepcopy(self.block)
            candidate.fold_(changed)
            errors = self._errors(changed, {**self.square_sums, **candidate.square_sums}, levels)
            if better(best, errors):
                best, chosen = errors, candidate
        if chosen is not None:
            chosen.fold_(self.block)
            self.square_sums.update(chosen.square_sums)
        return FoldResult(
            before=before, after=best, used=chosen is not None, kind=kind, chosen=chosen.name if chosen else "none"
        )

    def _errors(self, changed: nn.Module, square_sums: Mapping[str, Tensor], levels: list[Level]) -> dict[str, float]:
        def masked(level: Level, _with_graph: bool) -> dict[str, Tensor]:
            found: dict[str, Tensor] = dict(changed.named_parameters())
            for path, square_sum_I in square_sums.items():
                weight = weight_OI(changed.get_submodule(path))
                scores, choice = wanda_scores(weight, square_sum_I), choice_of(level, weight.shape[1])
                kept = weight * hard_mask(scores, thresholds(scores, choice), choice)
                found[f"{path}.weight"] = outputs_inputs(changed, path, kept)
            return found

        return feature_errors(self.block, self.call, *self.held, levels, masked, self.autocast)

    def _candidates(self, kind: str, levels: list[Level], settings: FoldSettings) -> Iterator[_Candidate]:
        patterns = _patterns(levels)
        # A group that reaches into the next head cannot be ordered within heads: such a pattern keeps its order.
        within_heads = [pattern for pattern in patterns if self.heads.value_KC.shape[1] % pattern[1] == 0]
        if kind == "values":
            yield from self._value_matrices(settings.turn_steps, within_heads)
        elif kind == "query_key":
            yield self._angles(levels)
        elif kind == "value_order":
            for pattern in within_heads:
                yield self._value_order(pattern)
        else:
            for pattern in patterns:
                yield self._mlp_order(pattern)

    def _value_matrices(self, turn_steps: int, patterns: list[tuple[int, int]]) -> Iterator[_Candidate]:
        value_OI, out_OI, heads = self._weight(self.row.value), self._weight(self.row.out), self.heads
        gram_II = self.grams[self.row.out]
        assert gram_II is not None
        gram_II = gram_II.cpu()
        grams = [torch.stack([gram_II[c][:, c] for c in columns_RC]) for columns_RC in heads.out_KRC]
        readers = [torch.stack([out_OI[:, c] for c in columns_RC]) for columns_RC in heads.out_KRC]
        closed = {
            "principal": [principal_basis(gram.sum(0)) for gram in grams],
            "balanced": [
                balanced_basis(gram.sum(0), read.flatten(0, 1)) for gram, read in zip(grams, readers, strict=True)
            ],
        }
        for name, of_heads in closed.items():
            matrices_KCC = torch.stack(of_heads)
            if float(torch.linalg.cond(matrices_KCC).max()) < MAX_CONDITION / 2:  # else no fold, and so no candidate
                yield self._mixed(name, matrices_KCC, patterns)
        if turn_steps:
            energy_D = self.square_sums[self.row.value].cpu()
            with torch.enable_grad():
                turned = [
                    turned_values(value_OI[rows_C], energy_D, read, gram, start, turn_steps, TURN_RATE)
                    for rows_C, read, gram, start in zip(
                        heads.value_KC, readers, grams, closed["principal"], strict=True
                    )
                ]
            yield self._mixed("turned", torch.stack(turned), patterns)

    def _mixed(self, name: str, matrices_KCC: Tensor, patterns: list[tuple[int, int]]) -> _Candidate:
        """For N:M each head's new channels are put in a good order at once: bases have the strong ones side by side."""
        gram_II, value_OI, out_OI = self.grams[self.row.out], self._weight(self.row.value), self._weight(self.row.out)
        assert gram_II is not None
        square_sum_I, ordered = self.square_sums[self.row.out].clone(), []
        sides = zip(matrices_KCC, self.heads.value_KC, self.heads.out_KRC, strict=True)
        for matrix_CC, rows_C, columns_RC in sides:
            read_RDC = torch.stack([out_OI[:, c] for c in columns_RC])
            matrix_CC = in_proportion(matrix_CC, value_OI[rows_C], read_RDC, MAX_CONDITION / 2)
            grams_RCC = torch.stack([gram_II[c][:, c] for c in columns_RC]).cpu().double()
            squares_RC = mixed_square_sum(grams_RCC, matrix_CC).float()
            if patterns:
                back_CC = torch.linalg.inv(matrix_CC)
                mixed_RDC = read_RDC.double() @ back_CC
                scores = [wanda_scores(w, x).square() for w, x in zip(mixed_RDC, squares_RC, strict=True)]
                order_C = improved_order(torch.cat(scores), *patterns[0])
                matrix_CC, squares_RC = matrix_CC[order_C], squares_RC[:, order_C]
            ordered.append(matrix_CC)
            square_sum_I[columns_RC] = squares_RC.to(square_sum_I.device)
        matrices_KCC = torch.stack(ordered)
        return _Candidate(
            name=name,
            fold_=lambda block: mix_values_(block, self.config, matrices_KCC),
            square_sums={self.row.out: square_sum_I},
        )

    def _angles(self, levels: list[Level]) -> _Candidate:
        """By the sparsest level: there most is lost."""
        query_OI, key_OI, heads = self._weight(self.row.query), self._weight(self.row.key), self.heads
        width, pairs = query_OI.shape[1], heads.pairs
        kept = min(keep_count(width, level.sparsity) for level in levels)
        energy_D = self.square_sums[self.row.query].cpu()
        angles_KP = torch.stack(
            [
                pair_angles(
                    torch.stack([query_OI[rows_C[: 2 * pairs]].view(2, pairs, width) for rows_C in rows_RC]),
                    key_OI[keys_C[: 2 * pairs]].view(2, pairs, width),
                    energy_D,
                    kept,
                )
                for rows_RC, keys_C in zip(heads.query_KRC, heads.key_KC, strict=True)
            ]
        )
        factors_KP = torch.polar(torch.ones_like(angles_KP), angles_KP)
        return _Candidate(
            name="turned", fold_=lambda block: turn_query_key_(block, self.config, factors_KP), square_sums={}
        )

    def _value_order(self, pattern: tuple[int, int]) -> _Candidate:
        out, columns_KRC = self.row.out, self.heads.out_KRC
        scores_OI = wanda_scores(self._weight(out), self.square_sums[out].cpu()).square()
        order_KC = torch.stack(
            [improved_order(torch.cat([scores_OI[:, c] for c in columns_RC]), *pattern) for columns_RC in columns_KRC]
        )
        square_sum_I = self.square_sums[out].clone()
        for order_C, columns_RC in zip(order_KC, columns_KRC, strict=True):
            for columns_C in columns_RC:
                square_sum_I[columns_C] = self.square_sums[out][columns_C[order_C]]
        return _Candidate(
            name="{}:{}".format(*pattern),
            fold_=lambda block: permute_values_(block, self.config, order_KC),
            square_sums={out: square_sum_I},
        )

    def _mlp_order(self, pattern: tuple[int, int]) -> _Candidate:
        down = self.row.down
        mlp_rows(self.block, self.config)
        scores_OI = wanda_scores(self._weight(down), self.square_sums[down].cpu()).square()
        order_F = improved_order(scores_OI, *pattern)
        return _Candidate(
            name="{}:{}".format(*pattern),
            fold_=lambda block: permute_mlp_(block, self.config, order_F),
            square_sums={down: self.square_sums[down][order_F.to(self.square_sums[down].device)]},
        )

    def _weight(self, path: str) -> Tensor:
        return weight_OI(self.block.get_submodule(path)).detach().cpu()


def _patterns(levels: Sequence[Level]) -> list[tuple[int, int]]:
    return [level.pattern for level in levels if level.pattern]
