"""A recipe's calibration samples: from its text, from the model itself (kept in the user's cache), or from both."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic_sparsity.arch import first_token, function_config
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import (
    check_vocabulary,
    read_text,
    sample_from_model,
    sample_windows,
    token_hash,
    tokenize,
    windows,
)
from elastic_sparsity.errors import ConfigError, DataError
from elastic_sparsity.files import is_file
from elastic_sparsity.models import BaseModel, cache_folder
from elastic_sparsity.precision import DTYPES, cast_parameters_, resolve_precision

log = logging.getLogger(__name__)

SAMPLER = 4  # another number whenever the same seed gives other text, so that what was kept is not taken for it
HELD_OUT_SEED = 1_000_003  # added to the recipe's seed: text that calibration never sees, whatever its amount

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who wants none."""


def calibration_tokens(recipe: Recipe, base: BaseModel, progress: Progress = silent) -> tuple[Tensor, Tensor | None]:
    """(S, T) calibration samples, and for "self" the held-out samples that evaluation uses when it has no text."""
    wanted = recipe.calibration
    check_length("calibration.length", wanted.length, base.model)
    if wanted.self_samples and base.stream is not None:
        field = 'source: "self"' if wanted.source == "self" else "self_share: the model's own text"
        raise ConfigError(
            f"calibration.{field} is written with the whole model, but its weights are read block by block; name a "
            "text and no share, or set memory.weights = 'resident'."
        )
    if wanted.source == "self":
        held_out = recipe.evaluation.max_windows or 32
        ids = _self_sampled(recipe, base, wanted.samples, recipe.seed, progress)
        return ids, _self_sampled(recipe, base, held_out, recipe.seed + HELD_OUT_SEED, progress)
    given = wanted.samples - wanted.self_samples
    text = read_text(
        wanted.source,
        name=wanted.name,
        split=wanted.split,
        text_column=wanted.text_column,
        max_chars=None if is_file(wanted.source) else 40 * given * wanted.length,
    )
    ids = tokenize(base.tokenizer, text)
    check_vocabulary(ids, base.model.config.vocab_size)
    first = first_token(base.model.config, base.tokenizer)
    ids_ST = sample_windows(ids, given, wanted.length, recipe.seed, first)
    if wanted.self_samples:
        ids_ST = interleave(ids_ST, _self_sampled(recipe, base, wanted.self_samples, recipe.seed, progress))
    return ids_ST, None


def interleave(first_ST: Tensor, second_ST: Tensor) -> Tensor:
    """(S1 + S2, T) both, each in its order, spread evenly: any first or last few have the proportion within a sample.

    Whoever takes a part of the samples takes the first ones (blocks) or the last ones (held out).
    """
    at = torch.cat([(torch.arange(len(ids)) + 0.5) / len(ids) for ids in (first_ST, second_ST)])
    return torch.cat([first_ST, second_ST])[at.argsort(stable=True)]


def _self_sampled(recipe: Recipe, base: BaseModel, samples: int, seed: int, progress: Progress) -> Tensor:
    """Sampled once per model and config, amount, temperature, precision and seed; kept in the user's cache."""
    wanted, device = recipe.calibration, base.model.device.type
    precision = resolve_precision(recipe.precision, device)
    config = hashlib.sha256(json.dumps(function_config(base.model.config), sort_keys=True).encode()).hexdigest()
    key = f"{base.identity['sha256'][:16]}-{config[:8]}-{samples}x{wanted.length}-t{wanted.temperature:g}"
    first = first_token(base.model.config, base.tokenizer)
    key += f"-{precision}-s{seed}" + ("" if first is None else f"-b{first}")
    path = cache_folder() / f"self-calibration-{SAMPLER}" / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["token_ids"]
        except (SafetensorError, KeyError):
            log.warning("%s is damaged; sampling again", path)
    # A cast copy: under autocast every generated token would cast all float32 weights again, half of its time.
    sampler = base.model
    if sampler.dtype != DTYPES[precision]:
        sampler = copy.deepcopy(sampler)
        cast_parameters_(sampler, DTYPES[precision])  # not its rotary frequencies, which `.to` would round
    ids = sample_from_model(
        sampler,
        samples,
        wanted.length,
        temperature=wanted.temperature,
        seed=seed,
        first=first,
        on_batch=lambda done, total: progress("sampling calibration text", done, total),
    )
    scratch = path.with_suffix(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"token_ids": ids}, scratch)
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written (%s); the text will be sampled again next time", path, error)
        scratch.unlink(missing_ok=True)
    return ids


def evaluation_windows(recipe: Recipe, base: BaseModel, held_out: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """(S, T) windows to measure on, and what they are, for the record.

    Raises: DataError: if the text is missing or too short. ConfigError: if a window is longer than the model can read.
    """
    wanted = recipe.evaluation
    first = first_token(base.model.config, base.tokenizer)
    if wanted.source is None:
        if held_out is None:
            raise DataError("evaluation.source: missing; without self-sampled calibration name a text to measure on.")
        protocol = {"text": "self-sampled, held out", "windows": list(held_out.shape)}
        return held_out, protocol if first is None else {**protocol, "begin_of_text": first}
    if not is_file(wanted.source):  # of a hub data set it would be the training split
        raise DataError(f"evaluation.source: {wanted.source!r}: no such file; name a text to measure on.")
    text = read_text(wanted.source)
    check_length("evaluation.window", wanted.window, base.model)
    ids = windows(tokenize(base.tokenizer, text), wanted.window, wanted.max_windows, first)
    check_vocabulary(ids, base.model.config.vocab_size)
    return ids, text_protocol(Path(wanted.source).name, ids, first)


def given_tokens(recipe: Recipe, protocol: Mapping[str, Any]) -> int:
    """How many tokens of a window of `evaluation_windows` nobody has to predict: the first, and a random one next."""
    return 2 if recipe.evaluation.source is None and "begin_of_text" in protocol else 1


def text_protocol(name: str, ids_ST: Tensor, first: int | None) -> dict[str, Any]:
    """What perplexity was measured on, for a record."""
    found = {"text": name, "sha256": token_hash(ids_ST), "windows": list(ids_ST.shape)}
    return found if first is None else {**found, "begin_of_text": first}


def check_length(field: str, length: int, model: Any) -> None:
    """Raises: ConfigError: if `length` tokens are more than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(f"{field}: {length} tokens, but the model reads at most {positions}; lower it.")
