"""Structured pruning from a model's name to a folder: the flow behind `elastic-sparsity prune`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.calibration_text import Progress, calibration_tokens, silent
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.files import atomic_folder, check_output_folder
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory, resolve_precision
from elastic_sparsity.structured import Scores, check_scores, prune_structured_
from elastic_sparsity.structured_parts import Kept, sizes_for, sliced_model, usual_multiple
from elastic_sparsity.structured_sizes import Sizes, check_sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What `prune` did: the counts in each of `num_blocks` blocks, and the parameters of the whole model."""

    sizes: Sizes
    num_blocks: int
    parameters_before: int
    parameters_after: int


def prune(
    model_id: str,
    output: str | Path,
    *,
    sparsity: float,
    calibration: str = "self",
    scores: Scores = "obs",
    accumulate: bool = True,
    multiple: int | None = None,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 4,
    damping: float = 0.01,
    seed: int = 0,
    dtype: str = "auto",
    precision: str = "auto",
    progress: Progress = silent,
) -> Pruned:
    """Writes an ordinary, physically smaller Hugging Face model: fewer heads and MLP channels, the same in every block.

    Args:
        model_id: as in `load_base`.
        sparsity: share of the parameters of the blocks' linears to remove; met as nearly as whole heads and the
            multiple allow.
        calibration: text file, hub data set or "self"; "magnitude" reads none.
        scores, accumulate, damping, batch_size: as in `prune_structured_`.
        multiple: the MLP channels that stay are a multiple of it, and so many go before the costs of the rest are
            computed again; None = 32, or the power of two below that divides.
        samples, length: calibration samples and tokens of one.
        dtype: of the model, loaded and written; "auto" = as stored.
    Raises: ConfigError, UnsupportedModelError, DataError, NumericsError, OutputError.
    """
    check_sparsity(sparsity)
    check_scores(scores)
    recipe = pruning_recipe(
        "prune",
        model={"id": model_id, "dtype": dtype},
        calibration={"source": calibration, "samples": samples, "length": length},
        batch_size=batch_size,
        damping=damping,
        seed=seed,
        precision=precision,
    )
    output = Path(output)
    check_output_folder(output)
    base = load_base(model_id, dtype)
    model, multiple = base.model, usual_multiple(base.model) if multiple is None else multiple
    sizes, before = sizes_for(model, sparsity, multiple), model.num_parameters()
    small, kept = smaller_model(
        recipe,
        model,
        pruning_tokens(recipe, base, scores, progress),
        sizes,
        scores=scores,
        accumulate=accumulate,
        multiple=multiple,
        dtype=model.dtype,
        on_block=lambda done, total: progress("pruning blocks", done, total),
    )
    with atomic_folder(output) as scratch:
        small.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
    return Pruned(sizes=sizes, num_blocks=len(kept), parameters_before=before, parameters_after=small.num_parameters())


def pruning_recipe(
    where: str,
    *,
    model: dict[str, Any],
    calibration: dict[str, Any],
    batch_size: int,
    damping: float,
    seed: int,
    precision: str,
) -> Recipe:
    """What structured pruning takes of a recipe, checked. Args: where: the command, for messages.

    Raises: ConfigError.
    """
    data = {
        "seed": seed,
        "precision": precision,
        "model": model,
        "calibration": calibration,
        "ladder": {},
        "scores": {"damping": damping},
        "block": {"samples": calibration["samples"], "batch_size": batch_size},
    }
    return make_recipe(data, where)


def pruning_tokens(recipe: Recipe, base: BaseModel, scores: Scores, progress: Progress) -> Tensor:
    """(S, T) calibration samples; none for "magnitude"."""
    if scores == "magnitude":
        return torch.zeros(0, 0, dtype=torch.int64)
    return calibration_tokens(recipe, base, progress)[0][: recipe.block.samples]


def smaller_model(
    recipe: Recipe,
    model: Any,
    token_ids_ST: Tensor,
    sizes: Sizes,
    *,
    scores: Scores,
    accumulate: bool,
    multiple: int,
    dtype: torch.dtype,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, list[Kept]]:
    """Prunes and cuts a model, which is spent then. Products, damping and batches are the recipe's.

    Args:
        multiple: MLP channels that go before the costs of the rest are computed again.
        dtype: of the smaller model; the work is done in float32.
    Returns: the smaller model, and the units that stay, a block each.
    """
    device = model.device.type
    kept = prune_structured_(
        model.float(),
        token_ids_ST,
        sizes,
        scores=scores,
        accumulate=accumulate,
        at_once=multiple,
        damping=recipe.scores.damping,
        batch_size=recipe.block.batch_size,
        autocast=autocast_factory(resolve_precision(recipe.precision, device), device),
        on_block=on_block,
    )
    return sliced_model(model.to(dtype), kept), kept
