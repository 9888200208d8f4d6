"""The rows of induction_parts.py: what each does to a model before it is pruned."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from induction_made import COSTS, Source
from induction_table import EVERY_PAIR
from spent import spent, together
from torch import Tensor

from elastic_sparsity.config import AUTO_FOLDS, Recipe
from elastic_sparsity.errors import AbsorptionError
from elastic_sparsity.fold_choice import FOLDS, ORDERS, RESIDUAL_ORDER
from elastic_sparsity.folding import relative_error
from elastic_sparsity.head_basis import principal_basis
from elastic_sparsity.inducing import absorb_importance_, input_norms, only_patterns
from elastic_sparsity.ladder import Level
from elastic_sparsity.models import BaseModel
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.residual import rotate_residual_
from elastic_sparsity.residual_order import choose_residual_order_

TRIED_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is done, in this order.

    Attributes:
        rotated: the residual stream, to its principal axes, and then into an order for N:M.
        folds: of `fold_choice`, and `residual_order`.
        absorbed: settings of reading A; None = not done.
        scores: "learned" = reading B; "norms" = |X| in closed form, which is Wanda's score and so for magnitude alone.
        gains: reading C, of the pruned model.
    """

    rotated: bool = False
    folds: tuple[str, ...] = ()
    absorbed: dict[str, Any] | None = None
    scores: str | None = None
    gains: bool = False

    @property
    def needs_pattern(self) -> bool:
        """Whether nothing of it means anything without an N:M level."""
        return bool(self.folds and set(self.folds) <= set(ORDERS))

    @property
    def is_default(self) -> bool:
        """Whether `elastic-sparsity induce` does all of it without being asked."""
        asked = self.rotated or self.absorbed is not None or self.gains or self.scores == "norms"
        return self != Row() and not asked and set(self.folds) <= set(AUTO_FOLDS)


ROWS: dict[str, Row] = {
    "none": Row(),
    "absorbed": Row(absorbed={}),
    "absorbed, from ones": Row(absorbed={"start": "ones"}),
    "absorbed, no penalty": Row(absorbed={"spectral": 0.0}),
    "absorbed, entropy": Row(absorbed={"penalty": "entropy"}),
    "scores": Row(scores="learned"),
    "gains": Row(gains=True),
    "scales": Row(scores="norms"),
    **{kind: Row(folds=(kind,)) for kind in FOLDS},
    "folds": Row(folds=FOLDS),
    **{f"folds but {kind}": Row(folds=tuple(x for x in FOLDS if x != kind)) for kind in FOLDS},
    RESIDUAL_ORDER: Row(folds=(RESIDUAL_ORDER,)),
    "residual rotation": Row(rotated=True),
    "residual_order, folds": Row(folds=(RESIDUAL_ORDER, *FOLDS)),
    "auto folds": Row(folds=AUTO_FOLDS),
    "default": Row(folds=AUTO_FOLDS, scores="learned"),
    "all": Row(folds=FOLDS, scores="learned"),
    "all, gains": Row(folds=FOLDS, scores="learned", gains=True),
}


def variant_of(row: Row, method: str, level: Level) -> str:
    """Which variant of a row a method prunes: scales are another for magnitude than for scores that know the inputs.

    Importance that magnitudes take goes into every pair for N:M, elsewhere behind norms alone (`absorb_importance_`).
    """
    if row.absorbed is None and row.scores is None:
        return "any"
    if method != "magnitude":
        return "wanda"
    return EVERY_PAIR if row.scores and only_patterns([level]) else "magnitude"


@dataclass(frozen=True, slots=True)
class Induced:
    """A model with a row's induction.

    Attributes:
        scales: for scores that know the inputs; None if there are none, or the weights hold them.
        note: what became of the row's parts, and what they took together.
    """

    base: BaseModel
    scales: dict[str, Tensor] | None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inducer:
    """Makes rows.

    Attributes:
        recipe: settings of an induction section, to a recipe.
        samples: of the tokens, the first ones, that give input norms.
    """

    base: BaseModel
    source: Source
    levels: Sequence[Level]
    recipe: Callable[..., Recipe]
    steps: dict[str, int]
    samples: int

    def make(self, row: Row, variant: str) -> Induced:
        """The base model with a row's induction, for the methods of a variant; a copy if anything changes its weights.

        How far the logits moved is noted, not judged: in float32 a deep model's rounding is no fault of a fold.

        Raises: AbsorptionError: if the architecture has no exact form of it.
        """
        patterns = [level.pattern for level in self.levels if level.pattern]
        if row.needs_pattern and not patterns:
            raise AbsorptionError("an order of channels changes N:M masks alone, and --levels has none.")
        base, scales, note, method = self.base, None, {}, variant.split()[0]
        if row.rotated or row.scores == "norms":
            base = copied(base)
        if row.rotated:
            note["residual"] = self._rotate_residual_(base.model)
        if row.folds:
            kinds = [kind for kind in row.folds if patterns or kind not in ORDERS]
            base, note["folds"] = self.source.folded(self.recipe(folds=kinds), base)
        if row.absorbed is not None:
            wanted = self.recipe(reading="absorbed", steps=self.steps["block"], method=method, **row.absorbed)
            base, note["absorbed"] = self.source.absorbed(wanted, base)
        if row.scores == "learned":
            found, note["scores"] = self.source.learned(self.recipe(steps=self.steps["scores"]), base)
            scales = found.scales
            if method == "magnitude":
                base = copied(base)
                importance = {name: found.input_norms[name] * x for name, x in scales.items()}
                absorb_importance_(base.model, importance, rows_apart=variant == EVERY_PAIR)
                scales = None
        elif row.scores == "norms":
            with spent() as cost:
                importance = input_norms(base.model, self.source.ids_ST[: self.samples], 1, self.source.precision)
                absorb_importance_(base.model, importance, rows_apart=variant == EVERY_PAIR)
            note["scores"] = cost
        costs = [{key: part[key] for key in COSTS if key in part} for part in note.values()]
        if note:
            note["logits_moved"] = relative_error(self._logits(self.base.model), self._logits(base.model))
        return Induced(base, scales, note | together(*costs))

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        logits: Tensor = model(self.source.ids_ST[:1, :TRIED_TOKENS], use_cache=False).logits
        return logits

    def _rotate_residual_(self, model: Any) -> dict[str, Any]:
        """Principal axes lie side by side, strong ones first, which N:M cannot use: they get an order too."""
        recipe, given_ST = self.recipe(), self.source.ids_ST[: self.samples]
        ladder, held_out = recipe.build_ladder(), recipe.induction.held_out
        with spent() as cost:
            added = rotate_residual_(model, residual_axes(model, given_ST))
            if any(level.pattern for level in ladder.levels):
                ids_ST = torch.cat([given_ST, self.source.ids_ST[-held_out:]])
                autocast = autocast_factory(self.source.precision, ids_ST.device.type)
                choose_residual_order_(model, ids_ST, ladder, held_out, autocast)
        return {"added_parameters": added, **cost}


def copied(base: BaseModel) -> BaseModel:
    return replace(base, model=copy.deepcopy(base.model))


@torch.no_grad()
def residual_axes(model: Any, token_ids_ST: Tensor) -> Tensor:
    """(D, D) float64 orthogonal, principal axes of what the blocks' norms make of the residual stream, gains apart."""
    width = model.config.hidden_size
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=token_ids_ST.device)
    for ids_T in token_ids_ST:
        streams = model.base_model(ids_T[None], use_cache=False, output_hidden_states=True).hidden_states[:-1]
        for hidden_BTD in streams:
            x_TD = hidden_BTD[0].double()
            x_TD /= x_TD.square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            gram_DD.addmm_(x_TD.T, x_TD)
    return principal_basis(gram_DD).T.contiguous()
