"""Structured pruning from a model's name to a folder: the flow behind `elastic-sparsity prune`."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import decoder_blocks, linears_of, not_finite
from elastic_sparsity.calibration_text import Progress, calibration_tokens, silent
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.end_to_end import EndToEndSettings
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.files import atomic_folder, check_output_file, check_output_folder
from elastic_sparsity.models import BaseModel, load_base, weights_hash
from elastic_sparsity.precision import DTYPES, autocast_factory, resolve_precision
from elastic_sparsity.structured import Scores, check_scores, prune_structured_
from elastic_sparsity.structured_parts import Kept, in_dtype, sizes_for, sliced_model, usual_multiple
from elastic_sparsity.structured_search import Search, Searched, check_search, search_sizes
from elastic_sparsity.structured_search_file import SearchFile
from elastic_sparsity.structured_sizes import Sizes, check_sparsity
from elastic_sparsity.structured_tuning import tune_

TUNING_BATCH = 2  # samples of a step that tunes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What `prune` did: the counts by block, how they were found, and the parameters of the whole model."""

    sizes: Sizes
    searched: Searched | None
    parameters_before: int
    parameters_after: int


def prune(
    model_id: str,
    output: str | Path,
    *,
    sparsity: float,
    calibration: str = "self",
    scores: Scores = "obs",
    search: Search | None = None,
    accumulate: bool = True,
    multiple: int | None = None,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 4,
    damping: float = 0.01,
    steps: int = 0,
    lr: float = 3e-4,
    seed: int = 0,
    dtype: str = "auto",
    precision: str = "auto",
    progress: Progress = silent,
) -> Pruned:
    """Writes a physically smaller Hugging Face model: fewer heads and MLP channels.

    An ordinary one, with the same counts in every block; or, with search "blocks", one of counts by block that
    `load_pruned` opens. An interrupted search leaves its steps in `<output>.search.json`, and the same call goes on.

    Args:
        model_id: as in `load_base`.
        sparsity: share of the parameters of the blocks' linears to remove; met as nearly as whole heads and the
            multiple allow.
        calibration: text file, hub data set or "self"; "magnitude" reads none, but to tune.
        scores, accumulate, damping, batch_size: as in `prune_structured_`.
        search: None = counts by rule; "equal" also tries other divisions between heads and channels; "blocks" lets
            blocks differ. Both judge by the last 16 samples, which the final refit uses like the others; they need
            scores "obs", and always accumulate.
        multiple: the MLP channels that stay are a multiple of it, and so many go before the costs of the rest are
            computed again; None = 32, or the power of two below that divides.
        samples, length: calibration samples and tokens of one.
        steps, lr: optimiser steps, of two samples each, that tune the linears after the cut towards the dense model's
            logits, and their learning rate; 0 = none.
        dtype: of the model, loaded and written; "auto" = as stored.
    Raises: ConfigError, UnsupportedModelError, DataError, NumericsError, OutputError.
    """
    check_sparsity(sparsity)
    check_scores(scores)
    check_search(search, scores, samples)
    recipe = pruning_recipe(
        "prune",
        model={"id": model_id, "dtype": dtype},
        calibration={"source": calibration, "samples": samples, "length": length},
        batch_size=batch_size,
        damping=damping,
        steps=steps,
        lr=lr,
        seed=seed,
        precision=precision,
    )
    output = Path(os.path.abspath(output))  # "." has no name  # noqa: PTH100
    check_output_folder(output)
    search_path = output.with_name(f"{output.name}.search.json")
    if search is not None:
        check_output_file(search_path)
    base = load_base(model_id, dtype)
    model, multiple = base.model, usual_multiple(base.model) if multiple is None else multiple
    sizes_for(model, sparsity, multiple)  # a budget that cannot be met costs no work
    before = model.num_parameters()
    made = smaller_model(
        recipe,
        model,
        pruning_tokens(recipe, base, scores, progress),
        sparsity,
        scores=scores,
        search=search,
        accumulate=accumulate,
        multiple=multiple,
        dtype=model.dtype,
        search_path=search_path,
        load=lambda: load_base(model_id, dtype).model,
        progress=progress,
    )
    with atomic_folder(output) as scratch:
        made.model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
    if search is not None:
        search_path.unlink(missing_ok=True)
    return Pruned(
        sizes=made.sizes,
        searched=made.searched,
        parameters_before=before,
        parameters_after=made.model.num_parameters(),
    )


def load_pruned(folder: str | Path, dtype: str = "auto") -> tuple[Any, Any]:
    """The model and the tokenizer of a folder that `prune` or `slice` wrote, also where its blocks differ in size.

    Such a model is kept by `save_pretrained`: its class cuts its own blocks, which pickle cannot name.

    Args:
        dtype: "auto" = as stored.
    Raises: ConfigError: no such folder, or it is damaged. UnsupportedModelError, NumericsError.
    """
    base = load_base(str(folder), dtype)
    return base.model, base.tokenizer


def pruning_recipe(
    where: str,
    *,
    model: dict[str, Any],
    calibration: dict[str, Any],
    batch_size: int,
    damping: float,
    steps: int,
    lr: float,
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
        "end_to_end": {"batch_size": TUNING_BATCH},
        "structured": {"steps": steps, "lr": lr},
    }
    return make_recipe(data, where)


def pruning_tokens(recipe: Recipe, base: BaseModel, scores: Scores, progress: Progress) -> Tensor:
    """(S, T) calibration samples; none for "magnitude" without tuning."""
    if scores == "magnitude" and not recipe.structured_steps:
        return torch.zeros(0, 0, dtype=torch.int64)
    return calibration_tokens(recipe, base, progress)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smaller:
    """A smaller model, the units that stay, a block each, how their numbers were found, and KL to dense if tuned."""

    model: Any
    kept: list[Kept]
    sizes: Sizes
    searched: Searched | None
    tuned_kl: float | None


def smaller_model(
    recipe: Recipe,
    model: Any,
    token_ids_ST: Tensor,
    sparsity: float,
    *,
    scores: Scores,
    search: Search | None,
    accumulate: bool,
    multiple: int,
    dtype: torch.dtype,
    search_path: Path,
    load: Callable[[], Any],
    progress: Progress = silent,
) -> Smaller:
    """Prunes, cuts and tunes a model, which is spent then. Products, damping, batches and tuning are the recipe's.

    Args:
        token_ids_ST: calibration samples: the block phase's prune, all tune.
        sparsity: checked already, as the multiple is.
        multiple: MLP channels that go before the costs of the rest are computed again.
        dtype: of the smaller model; the work is done in float32.
        search_path: where a search keeps its steps. It stays: what it cost is lost only when the model is written.
        load: gives the dense model that tuning goes towards: `model` as it was, in the same basis.
    Raises: NumericsError: bad statistics or losses, or a weight that `dtype` cannot hold. OutputError: the search's
        file is of another search, damaged, or cannot be written.
    """
    title = f"structured {100 * sparsity:g} %"
    device, model = model.device.type, model.float()
    autocast = autocast_factory(resolve_precision(recipe.precision, device), device)
    damping, batch_size = recipe.scores.damping, recipe.block.batch_size
    pruning_ST, searched = token_ids_ST[: recipe.block.samples], None
    if search is not None:
        searched = _searched(
            recipe, model, pruning_ST, sparsity, multiple, search, autocast, search_path, title, progress
        )
    sizes = sizes_for(model, sparsity, multiple) if searched is None else searched.sizes
    kept = prune_structured_(
        model,
        pruning_ST,
        sizes,
        scores=scores,
        accumulate=accumulate,
        at_once=multiple,
        damping=damping,
        batch_size=batch_size,
        autocast=autocast,
        on_block=lambda done, total: progress(f"pruning blocks, {title}", done, total),
    )
    small, kl = sliced_model(model, kept), None
    for block in decoder_blocks(model):
        block.to("meta")  # its memory goes to what comes next
    if recipe.structured_steps:
        kl = _tune_(recipe, small, load().float(), token_ids_ST, title, progress)
    small = _finite_in(small, dtype, title)
    return Smaller(model=small, kept=kept, sizes=sizes, searched=searched, tuned_kl=kl)


def _searched(
    recipe: Recipe,
    model: Any,
    token_ids_ST: Tensor,
    sparsity: float,
    multiple: int,
    search: Search,
    autocast: Callable[[], Any],
    path: Path,
    title: str,
    progress: Progress,
) -> Searched:
    """Counts by a search that goes on where one of the same model, text and settings was interrupted."""
    descent, damping, batch_size = DescentSettings(), recipe.scores.damping, recipe.block.batch_size
    made = {
        "model_sha256": weights_hash(model),
        "calibration_sha256": token_hash(token_ids_ST),
        "sparsity": sparsity,
        "multiple": multiple,
        "search": search,
        "descent": asdict(descent),
        "damping": damping,
        "batch_size": batch_size,
        "precision": resolve_precision(recipe.precision, model.device.type),
        "device": model.device.type,
    }
    return search_sizes(
        model, token_ids_ST, sparsity, multiple, search=search, damping=damping, batch_size=batch_size,
        autocast=autocast, settings=descent, file=SearchFile(path, made), what=f"blocks, {title}", progress=progress,
    )  # fmt: skip


def _finite_in(small: Any, dtype: torch.dtype, title: str) -> Any:
    """The smaller model in the dtype. Raises: NumericsError: it has weights that the dtype cannot hold."""
    small = in_dtype(small, dtype)
    bad = not_finite(small)
    if bad:
        raise NumericsError(
            f"{title}: {len(bad)} parameters are not finite in {dtype}, e.g. {bad[0]}; "
            "use another dtype, or a lower structured.lr (--lr)."
        )
    return small


def _tune_(recipe: Recipe, small: Any, teacher: Any, token_ids_ST: Tensor, title: str, progress: Progress) -> float:
    """Tunes a smaller model towards the dense one, in float32, which is spent then. Returns: its KL to dense."""
    precision, like = resolve_precision(recipe.precision, small.device.type), recipe.end_to_end
    settings = EndToEndSettings(
        steps=recipe.structured_steps,
        base_lr=recipe.structured.lr,
        **like.model_dump(include={"batch_size", "adapter_lr", "warmup", "clip_norm", "gradient_checkpointing"}),
    )
    for linear in linears_of(teacher).values():  # for good: nobody reads them in float32
        linear.weight.data = linear.weight.data.to(DTYPES[precision])  # type: ignore[union-attr, assignment]
    return tune_(
        small,
        teacher,
        token_ids_ST,
        settings,
        autocast=autocast_factory(precision, small.device.type),
        on_step=lambda done, total: progress(f"tuning, {title}", done, total),
        title=title,
    )
