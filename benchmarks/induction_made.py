"""Pieces of induction for the benchmarks: what is learned or folded, made once and kept; pruned models, judged once.

A piece's question is the model's weights, the calibration tokens and the settings, so the same piece serves every row
and both scripts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from induction_work import Piece, WorkFolder, code_sha256
from torch import Tensor

from elastic_sparsity.arch import linears_of
from elastic_sparsity.attention import training_attention
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.feature_stage import BlockResult
from elastic_sparsity.fold_choice import FoldResult
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.inducing import absorb, fold, learn
from elastic_sparsity.induction import Induced
from elastic_sparsity.models import BaseModel, weights_hash
from elastic_sparsity.precision import weights_under
from elastic_sparsity.workers import Workers

SECTIONS = ("ladder", "scores", "induction")  # of a recipe; its text counts by its tokens
SHARED = ("inducing", "importance", "soft_mask", "ladder", "arch", "blocks", "distill", "feature_stage", "wiring")
# What decides a piece's numbers: when one of these modules changes, the piece is made anew.
CODE = {
    "scores": (*SHARED, "induction", "end_to_end"),
    "folds": (*SHARED, "fold_choice", "functional_fold", "channel_order", "head_basis",
              "metric_refresh", "rotation", "folding", "calibrate", "residual", "residual_order"),
    "absorbed": (*SHARED, "absorbed_stage", "functional_fold", "absorption", "spectral_loss",
                 "head_basis", "metric_refresh", "folding", "calibrate"),
}  # fmt: skip
COSTS = ("seconds", "cpu_seconds", "peak_bytes", "added_bytes", "peak_gpu_bytes")


@dataclass(frozen=True, slots=True)
class Source:
    """What pieces are made from, the model apart."""

    work: WorkFolder
    ids_ST: Tensor
    precision: str

    def question(self, name: str, recipe: Recipe, base: BaseModel) -> dict[str, Any]:
        sections = {name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS}
        return {**sections, "seed": recipe.seed, "weights_sha256": weights_hash(base.model),
                "tokens_sha256": token_hash(self.ids_ST), "precision": self.precision,
                "code_sha256": code_sha256(CODE[name])}  # fmt: skip

    def learned(self, recipe: Recipe, base: BaseModel) -> tuple[Induced, dict[str, Any]]:
        """Reading B of `base`, and the facts."""

        def make() -> Piece:
            with training_attention(base.model), fused_layers(base.model):  # as `induce` does
                found = learn(recipe, base, self.ids_ST, self.precision, Workers())
            tensors = {f"scale:{name}": scale for name, scale in found.scales.items()}
            tensors |= {f"norm:{name}": norm for name, norm in found.input_norms.items()}
            wanted = recipe.induction
            tokens = wanted.steps * wanted.batch_size * self.ids_ST.shape[1]
            return tensors, {"used": found.used, "kl_before": found.kl_before, "kl_after": found.kl_after,
                             "tokens": tokens}  # fmt: skip

        tensors, facts = self.work.piece("scores", self.question("scores", recipe, base), make)
        device = base.model.device
        scales, norms = ({name.removeprefix(kind): tensor.to(device) for name, tensor in tensors.items()
                          if name.startswith(kind)} for kind in ("scale:", "norm:"))  # fmt: skip
        found = Induced(scales=scales, input_norms=norms, kl_before=facts["kl_before"], kl_after=facts["kl_after"],
                        used=facts["used"])  # fmt: skip
        return found, facts

    def folded(self, recipe: Recipe, base: BaseModel) -> tuple[BaseModel, dict[str, Any]]:
        """A copy of `base` with the recipe's folds."""
        return self._changed("folds", recipe, base, fold)

    def absorbed(self, recipe: Recipe, base: BaseModel) -> tuple[BaseModel, dict[str, Any]]:
        """A copy of `base` that went through reading A."""
        return self._changed("absorbed", recipe, base, absorb)

    def _changed(
        self, name: str, recipe: Recipe, base: BaseModel, change_: Callable[..., list[BlockResult]]
    ) -> tuple[BaseModel, dict[str, Any]]:
        def make() -> Piece:
            changed = replace(base, model=copy.deepcopy(base.model))
            results = change_(recipe, changed, self.ids_ST, self.precision)
            before = dict(base.model.named_parameters())
            tensors = {key: value for key, value in changed.model.named_parameters()
                       if not torch.equal(value, before[key])}  # fmt: skip
            return tensors, {"blocks": [_result(x) for x in results]}

        tensors, facts = self.work.piece(name, self.question(name, recipe, base), make)
        return with_parameters(base, tensors), facts


def _result(found: BlockResult) -> list[Any]:
    chosen = [found.kind, found.chosen] if isinstance(found, FoldResult) else [found.used]
    return [*chosen, found.before, found.after]


@torch.no_grad()
def with_parameters(base: BaseModel, changed: dict[str, Tensor]) -> BaseModel:
    """A copy of `base` with some parameters replaced."""
    model = copy.deepcopy(base.model)
    parameters = dict(model.named_parameters())
    for name, value in changed.items():
        parameters[name].copy_(value)
    return replace(base, model=model)


def judged(model: Any, cells: dict[str, Any], windows_ST: Tensor, autocast: Callable[[], Any]) -> dict[str, Any]:
    """A pruned model's perplexity and weights' hash; of weights that a cell was measured with, that cell's."""
    sha256 = weights_hash(model)
    for name, cell in cells.items():
        if cell.get("weights_sha256") == sha256:
            return {"perplexity": cell["perplexity"], "weights_sha256": sha256, "same_weights_as": name}
    with weights_under(autocast, linears_of(model).values()):  # saves a tenth of the time
        found = evaluate({"it": model}, windows_ST, autocast=autocast)["it"].perplexity
    return {"perplexity": found, "weights_sha256": sha256}
