"""Structured pruning from a model's name to a folder: the flow behind `elastic-sparsity prune`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_sparsity.calibration_text import Progress, calibration_tokens, silent
from elastic_sparsity.config import make_recipe
from elastic_sparsity.files import atomic_folder, check_output_folder
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory, resolve_precision
from elastic_sparsity.structured import Scores, check_scores, prune_structured_
from elastic_sparsity.structured_parts import sizes_for, sliced_model, usual_multiple
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
    recipe = make_recipe(
        {
            "seed": seed,
            "precision": precision,
            "model": {"id": model_id, "dtype": dtype},
            "calibration": {"source": calibration, "samples": samples, "length": length},
            "ladder": {},
            "scores": {"damping": damping},
            "block": {"samples": samples, "batch_size": batch_size},
        },
        "prune",
    )
    output = Path(output)
    check_output_folder(output)
    base = load_base(model_id, dtype)
    model, stored_dtype = base.model, base.model.dtype
    multiple = usual_multiple(model) if multiple is None else multiple
    sizes, before = sizes_for(model, sparsity, multiple), model.num_parameters()
    token_ids_ST = torch.zeros(0, 0, dtype=torch.int64)
    if scores != "magnitude":
        token_ids_ST, _ = calibration_tokens(recipe, base, progress)
    kept = prune_structured_(
        model.float(),
        token_ids_ST,
        sizes,
        scores=scores,
        accumulate=accumulate,
        at_once=multiple,
        damping=damping,
        batch_size=batch_size,
        autocast=autocast_factory(resolve_precision(precision, model.device.type), model.device.type),
        on_block=lambda done, total: progress("pruning blocks", done, total),
    )
    small = sliced_model(model.to(stored_dtype), kept)
    with atomic_folder(output) as scratch:
        small.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
    return Pruned(sizes=sizes, num_blocks=len(kept), parameters_before=before, parameters_after=small.num_parameters())
