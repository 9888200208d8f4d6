"""Structured levels for a checkpoint that is there: the flow behind `elastic-sparsity add-structured`, and of a run.

`add_structured` adds the model that `prune` would make of the same base model and text, in the checkpoint's dtype.
A run prunes by the block phase's samples, and tunes on all by the end-to-end phase's settings.
Either starts from the base model and not from a trained level, whose zeros would come along.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.calibration_text import Progress, silent
from elastic_sparsity.checkpoint import ElasticCheckpoint, base_dtype
from elastic_sparsity.checkpoint_writer import add_section
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.files import check_output_file
from elastic_sparsity.hub import is_hub_id
from elastic_sparsity.ladder import StructuredLevel, structured_name
from elastic_sparsity.manifest import CONFIG_NAME
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import resolve_precision
from elastic_sparsity.pruning import pruning_recipe, pruning_tokens, smaller_model
from elastic_sparsity.run_folder import RunFolder
from elastic_sparsity.skeleton import model_config
from elastic_sparsity.structured import Scores, check_scores
from elastic_sparsity.structured_parts import sizes_for, usual_multiple
from elastic_sparsity.structured_search import Search, check_search
from elastic_sparsity.structured_section import section_tensors, structured_level
from elastic_sparsity.structured_sizes import Sizes, check_sparsity, counts_text


def add_structured(
    path: str | Path,
    fractions: Sequence[float],
    *,
    calibration: str = "self",
    model: str | None = None,
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
    precision: str = "auto",
    progress: Progress = silent,
) -> list[StructuredLevel]:
    """Adds structured levels to an elastic checkpoint, in its folder, one after the other.

    Each is there or not there: a call that is interrupted leaves a whole checkpoint with those that were finished. No
    file but elastic_config.json changes, and no other level. An interrupted search of counts leaves its steps in
    `structured-0.5.search.json` there, and the same call goes on from them.

    Args:
        path: folder of an elastic checkpoint; of its tensors only `shared` is read.
        fractions: of the parameters of the blocks' linears that go; a level each, "structured-0.5".
        model: the base model; None = the one that the checkpoint records.
        calibration, scores, search, accumulate, multiple, samples, length, batch_size, damping, steps, lr, seed,
            precision: as in `prune`.
    Returns: the new levels.
    Raises: ConfigError: fractions that are no fractions, that no counts meet, or that come out alike.
        CheckpointError: another base model, or a level that is there already. UnsupportedModelError, DataError,
        NumericsError, OutputError. All but the last three before any work.
    """
    check_fractions(fractions)
    check_scores(scores)
    check_search(search, scores, samples)
    if is_hub_id(path):
        raise ConfigError(f"{path}: is no folder; download the checkpoint and name its folder.")
    checkpoint = ElasticCheckpoint(path)
    for fraction in fractions:
        _check_new(checkpoint, fraction)
    check_output_file(checkpoint.folder / CONFIG_NAME)  # a folder that cannot be written to should not cost the work
    recipe = pruning_recipe(
        "add-structured",
        model=_base_model(checkpoint, model),
        calibration={"source": calibration, "samples": samples, "length": length},
        batch_size=batch_size,
        damping=damping,
        steps=steps,
        lr=lr,
        seed=seed,
        precision=precision,
    )
    base = load_base(recipe.model.id, recipe.model.dtype)
    check_base(checkpoint, base)
    check_sizes(base.model, fractions, multiple, checkpoint.structured)
    tokens_ST = pruning_tokens(recipe, base, scores, progress)
    del base
    return write_levels(
        checkpoint, recipe, tokens_ST, fractions,
        scores=scores, search=search, accumulate=accumulate, multiple=multiple,
        search_path=lambda name: checkpoint.folder / f"{name}.search.json",
        load=lambda: load_base(recipe.model.id, recipe.model.dtype).model, progress=progress,
    )  # fmt: skip


def check_structured(recipe: Recipe, model: Any) -> None:
    """That a recipe's structured levels can be made of its model.

    Raises: ConfigError, UnsupportedModelError: see `check_sizes`, `check_search`.
    """
    wanted = recipe.structured
    check_sizes(model, wanted.fractions, wanted.multiple)
    if wanted.fractions:
        check_search(wanted.search, wanted.scores, recipe.block.samples)


def add_levels(recipe: Recipe, folder: Path, token_ids_ST: Tensor, kept: RunFolder, progress: Progress) -> bool:
    """Adds a recipe's structured levels to the checkpoint that a run made; those that are there are done.

    Args:
        token_ids_ST: the run's calibration samples.
        kept: the run's own folder: there the search of a level's counts keeps its steps, and there are the base
            model's weights, if the run changed them: what all levels share comes from these.
    Returns: whether there was anything to do.
    Raises: NumericsError, OutputError; the checkpoint is whole then, and the same call goes on.
    """
    checkpoint, wanted = ElasticCheckpoint(folder), recipe.structured
    done = [level.fraction for level in checkpoint.structured]
    fractions = [fraction for fraction in wanted.fractions if fraction not in done]
    if not fractions:
        return False

    def load() -> Any:
        model = load_base(recipe.model.id, recipe.model.dtype).model
        if recipe.induction.changes_weights:
            kept.restore_base_(model.float())
        return model

    write_levels(
        checkpoint, recipe, token_ids_ST, fractions,
        scores=wanted.scores, search=wanted.search, accumulate=True, multiple=wanted.multiple,
        search_path=kept.structured, load=load, progress=progress,
    )  # fmt: skip
    return True


def write_levels(
    checkpoint: ElasticCheckpoint,
    recipe: Recipe,
    token_ids_ST: Tensor,
    fractions: Sequence[float],
    *,
    scores: Scores,
    search: Search | None,
    accumulate: bool,
    multiple: int | None,
    search_path: Callable[[str], Path],
    load: Callable[[], Any],
    progress: Progress,
) -> list[StructuredLevel]:
    """Prunes and adds, fraction by fraction. All has been checked.

    Args:
        load: gives the base model, anew for every fraction.
        search_path: where the search of a level's counts keeps its steps, by the level's name; gone once it is added.
    """
    levels: list[StructuredLevel] = []
    pruning_ST = token_ids_ST[: 0 if scores == "magnitude" else recipe.block.samples]
    for fraction in fractions:
        model = load()
        at_once = usual_multiple(model) if multiple is None else multiple
        made = smaller_model(
            recipe,
            model,
            token_ids_ST,
            fraction,
            scores=scores,
            search=search,
            accumulate=accumulate,
            multiple=at_once,
            dtype=checkpoint.dtype,
            search_path=search_path(structured_name(fraction)),
            load=load,
            progress=progress,
        )
        level = structured_level(fraction, made.model, made.sizes, biases=scores == "flap")
        record = {
            "scores": scores,
            "search": search,
            "accumulate": accumulate,
            "multiple": at_once,
            "damping": recipe.scores.damping,
            "precision": resolve_precision(recipe.precision, model.device.type),
            "seed": recipe.seed,
            "sparsity": made.sizes.sparsity,
            "searched": None if made.searched is None else made.searched.record(),
            "calibration_tokens": pruning_ST.numel(),
            "calibration_sha256": token_hash(pruning_ST),
            "tuning": _tuning(recipe, token_ids_ST, made.tuned_kl),
        }
        add_section(checkpoint.folder, level, section_tensors(made.model, made.kept, made.sizes), record)
        if search is not None:
            search_path(level.name).unlink(missing_ok=True)
        levels.append(level)
        del model, made  # before the next one is loaded
    return levels


def _tuning(recipe: Recipe, token_ids_ST: Tensor, kl: float | None) -> dict[str, Any] | None:
    """How a level was tuned, for its record; None if it was not."""
    if kl is None:
        return None
    return {
        "steps": recipe.structured_steps,
        "lr": recipe.structured.lr,
        "batch_size": recipe.end_to_end.batch_size,
        "calibration_sha256": token_hash(token_ids_ST),
        "kl_to_dense": kl,
    }


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises: ConfigError: unless there are fractions between 0 and 1, each once."""
    if not fractions:
        raise ConfigError("fractions: none; name at least one, e.g. 0.5.")
    for fraction in fractions:
        check_sparsity(fraction)
    if any(b - a < 1e-6 for a, b in pairwise(sorted(fractions))):
        raise ConfigError(f"fractions: {', '.join(f'{x:g}' for x in fractions)} names one twice.")


def check_sizes(
    model: Any, fractions: Sequence[float], multiple: int | None, others: Sequence[StructuredLevel] = ()
) -> list[Sizes]:
    """The counts that every fraction comes to.

    Args:
        others: levels that are there.
    Raises: ConfigError: no counts meet a fraction, or two fractions come to the same. UnsupportedModelError.
    """
    depth = len(decoder_blocks(model))
    seen = {level.counts(depth): level.fraction for level in others}
    found = []
    for fraction in fractions:
        sizes = sizes_for(model, fraction, multiple)
        counts = sizes.groups, sizes.channels
        if counts in seen:
            raise ConfigError(
                f"fractions: {fraction:g} and {seen[counts]:g} both keep {counts_text(counts[0])} key/value heads and "
                f"{counts_text(counts[1])} MLP channels; leave one out."
            )
        seen[counts] = fraction
        found.append(sizes)
    return found


def check_base(checkpoint: ElasticCheckpoint, base: BaseModel) -> None:
    """That a checkpoint was made of this model: its recorded hash, what all levels share, and the linears' shapes.

    Raises: CheckpointError: naming what differs.
    """
    where = f"{checkpoint.folder}: cannot be extended from {base.identity['id']}"
    recorded = checkpoint.config.get("base_model")
    sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
    if sha256 is not None and sha256 != base.identity["sha256"]:
        raise CheckpointError(
            f"{where}: it holds other weights (sha256 {base.identity['sha256'][:12]}...) than the base model recorded "
            f"({str(sha256)[:12]}...)."
        )
    checkpoint.check_extras()
    kinds = base.model.config.model_type, model_config(checkpoint).model_type
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{where}: it is a {kinds[0]!r}, the checkpoint a {kinds[1]!r}.")
    shapes = {name: tuple(weight_OI(linear).shape) for name, linear in linears_of(base.model).items()}
    if shapes != {name: spec.shape for name, spec in checkpoint.linears.items()}:
        raise CheckpointError(f"{where}: its linears are not those of the checkpoint.")
    rest = dict(base.model.named_parameters())
    for name in shapes:
        del rest[f"{name}.weight"]
    for name, tensor in checkpoint.tensors_of("shared"):
        weight = rest.pop(name, None)
        if weight is None or not torch.equal(weight.detach().cpu().to(checkpoint.dtype), tensor):
            hint = ""
            if checkpoint.changed_base:
                hint = (
                    " Its run changed the model's weights first (induction): name structured.fractions in the recipe."
                )
            raise CheckpointError(f"{where}: {name} differs, which all levels share.{hint}")
    if rest:
        raise CheckpointError(f"{where}: the checkpoint has no {min(rest)}.")


def _check_new(checkpoint: ElasticCheckpoint, fraction: float) -> None:
    for level in checkpoint.structured:
        if abs(level.fraction - fraction) < 1e-6:
            raise CheckpointError(f"{checkpoint.folder}: has level {level.name} already; leave it out.")


def _base_model(checkpoint: ElasticCheckpoint, model: str | None) -> dict[str, str]:
    """Id and dtype, as a recipe's `model`."""
    record = checkpoint.config.get("base_model")
    recorded = record.get("id") if isinstance(record, dict) else None
    found = model or recorded
    if not isinstance(found, str):
        raise CheckpointError(f"{checkpoint.folder}: does not record its base model; name it.")
    return {"id": found, "dtype": base_dtype(checkpoint.config)}
