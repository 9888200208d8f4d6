"""A recipe's calibration samples: from its text, or sampled from the model itself and kept in the user's cache."""

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_sparsity.config import Recipe
from elastic_sparsity.data import read_text, sample_from_model, sample_windows, tokenize
from elastic_sparsity.models import BaseModel, cache_folder
from elastic_sparsity.precision import autocast_factory, resolve_precision

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who wants none."""


def calibration_tokens(recipe: Recipe, base: BaseModel, progress: Progress = silent) -> tuple[Tensor, Tensor | None]:
    """(S, T) calibration samples, and for "self" the held-out samples that evaluation uses when it has no text."""
    wanted = recipe.calibration
    if wanted.source == "self":
        held_out = recipe.evaluation.max_windows or 32
        ids = _self_sampled(recipe, base, wanted.samples + held_out, progress)
        return ids[: wanted.samples], ids[wanted.samples :]
    text = read_text(
        wanted.source,
        name=wanted.name,
        split=wanted.split,
        text_column=wanted.text_column,
        max_chars=None if Path(wanted.source).is_file() else 40 * wanted.samples * wanted.length,
    )
    return sample_windows(tokenize(base.tokenizer, text), wanted.samples, wanted.length, recipe.seed), None


def _self_sampled(recipe: Recipe, base: BaseModel, samples: int, progress: Progress) -> Tensor:
    """Sampled once per model, amount, temperature and seed; kept in the user's cache."""
    wanted = recipe.calibration
    key = f"{base.identity['sha256'][:16]}-{samples}x{wanted.length}-t{wanted.temperature:g}-s{recipe.seed}"
    path = cache_folder() / "self-calibration" / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["token_ids"]
        except (SafetensorError, KeyError):
            log.warning("%s is damaged; sampling again", path)
    with autocast_factory(resolve_precision(recipe.precision, base.model.device.type), base.model.device.type)():
        ids = sample_from_model(
            base.model,
            samples,
            wanted.length,
            temperature=wanted.temperature,
            seed=recipe.seed,
            on_batch=lambda done, total: progress("sampling calibration text", done, total),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file({"token_ids": ids}, scratch)
    scratch.replace(path)
    return ids
