"""Measuring checkpoints and models as a user would load them: quality and bytes as table rows."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import Progress, calibration_tokens, check_length, evaluation_windows, silent
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import check_vocabulary, read_text, token_hash, tokenize, windows
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.evaluate import Quality, evaluate
from elastic_sparsity.hub import elastic_folder, fetch_levels, is_hub_id
from elastic_sparsity.ladder import AnyLevel, StructuredLevel
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory, default_device, resolve_precision
from elastic_sparsity.slicing import load_level, load_tokenizer
from elastic_sparsity.workers import Workers
from elastic_sparsity.zero_shot import check_amounts, score_task


def measure(
    recipe: Recipe, checkpoint: ElasticCheckpoint, progress: Progress = silent, *, kl: bool = True
) -> list[dict[str, Any]]:
    """Quality and bytes of dense, baselines and every elastic level, as table rows; also stored in the checkpoint.

    The checkpoint is evaluated as a user would load it, level by level; several workers share the windows. Without `kl`
    the dense model runs only once.
    """
    workers = Workers()
    with workers.main_first():
        base = load_base(recipe.model.id, recipe.model.dtype)
        token_ids, held_out = calibration_tokens(recipe, base, progress)
    windows_ST, protocol = evaluation_windows(recipe, base, held_out)
    precision = resolve_precision(recipe.precision, base.model.device.type)
    autocast = autocast_factory(precision, base.model.device.type)
    dense_bytes = base.model.num_parameters() * checkpoint.dtype.itemsize
    shared = token_ids[: recipe.evaluation.baseline_samples or recipe.block.samples]
    rows: list[dict[str, Any]] = []
    for level in checkpoint.manifest.levels():
        models = {} if rows else {"dense": base.model}
        models["elastic"] = _as_shipped(checkpoint, level, base.model)
        for method in recipe.evaluation.baselines:
            if isinstance(level, StructuredLevel):
                break  # they make masks
            models[method] = copy.deepcopy(base.model)
            stage = f"{method} at {level.title}"
            prune_one_shot_(
                models[method],
                shared,
                level,
                method,
                damping=recipe.scores.damping,
                batch_size=recipe.block.batch_size,
                autocast=autocast,
                on_block=lambda done, total, stage=stage: progress(stage, done, total),  # type: ignore[misc]
            )
        stage = f"evaluating {level.title}"
        found = evaluate(
            models,
            windows_ST,
            reference=base.model if kl else None,
            autocast=autocast,
            on_window=lambda done, total, stage=stage: progress(stage, done, total),  # type: ignore[misc]
            share=range(workers.rank, windows_ST.shape[0], workers.count),
            sum_=workers.sum_,
        )
        for name, quality in found.items():
            size = checkpoint.bytes_of(level) if name == "elastic" else dense_bytes
            rows.append(_row("dense" if name == "dense" else level.name, name, quality, size))
    if workers.is_main:
        checkpoint.update_record({"quality": {"protocol": {**protocol, "precision": precision}, "rows": rows}})
    workers.wait()
    return rows


def _as_shipped(checkpoint: ElasticCheckpoint, level: AnyLevel, base_model: Any) -> Any:
    """A level's weights, rounded as a user gets them, in a model that computes in the base model's dtype."""
    return load_level(checkpoint, level, checkpoint.dtype).to(base_model.device, base_model.dtype)


def _row(level: str, method: str, quality: Quality, num_bytes: int) -> dict[str, Any]:
    return {"level": level, "method": method, "perplexity": quality.perplexity, "kl": quality.kl, "bytes": num_bytes}


def evaluate_path(
    path: str,
    text: str,
    *,
    level: str | None = None,
    dtype: str = "auto",
    reference: str | None = None,
    window: int = 2048,
    max_windows: int | None = None,
    precision: str = "auto",
    progress: Progress = silent,
    on_start: Callable[[dict[str, Any], dict[str, str]], None] = lambda protocol, origin: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    **hub: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and protocol for any causal LM, or for one or all levels of an elastic checkpoint that are in the folder.

    Every row names what was measured: "checkpoint_id", or "weights_sha256" of a plain model.

    Args:
        path: folder, hub id or .gguf file; of an elastic hub id only the files of the measured levels are downloaded.
        dtype: of a plain model's weights: "auto" = as stored; as `model.dtype` of a recipe, whose base model it is.
        on_start: gets the protocol and what is measured, before anything is.
        on_row: gets every row as soon as it is there.
        **hub: as in `checkpoint_folder`, for an elastic hub id.
    Raises: ConfigError, DataError, CheckpointError, LevelError.
    """
    device = default_device()
    resolved = resolve_precision(precision, device)
    teacher = None if reference is None else load_base(reference).model
    if teacher is not None and resolved == "float32":
        teacher = teacher.float()
    rows: list[dict[str, Any]] = []
    tokenizer, origin, jobs = _jobs(path, level, dtype, hub)
    ids = windows(tokenize(tokenizer, read_text(text)), window, max_windows)
    protocol = {"text": Path(text).name, "sha256": token_hash(ids), "windows": list(ids.shape), "precision": resolved}
    if reference is not None:
        protocol["reference"] = Path(reference).name
    on_start(protocol, origin)
    for name, method, size, load in jobs:
        model = load().to(device)
        check_length("--window", window, model)
        check_vocabulary(ids, model.config.vocab_size)
        if resolved == "float32":  # also of weights in 16 bits: the protocol says what was computed
            model = model.float()
        found = evaluate(
            {method: model},
            ids,
            reference=teacher,
            autocast=autocast_factory(resolved, model.device.type),
            on_window=lambda done, total, name=name: progress(f"evaluating {name}", done, total),  # type: ignore[misc]
        )
        rows.append(_row(name, method, found[method], size) | origin)
        on_row(rows[-1])
    return rows, protocol


def zero_shot_path(
    path: str,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    level: str | None = None,
    dtype: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    **hub: Any,
) -> list[dict[str, Any]]:
    """Zero-shot rows, one a level and task, for whatever `evaluate_path` takes; they name it as its rows do.

    Args:
        tasks: of `load_tasks`.
        dtype: as in `evaluate_path`.
        limit, batch_size, seed: as in `zero_shot`.
        on_row: gets every row as soon as it is there.
    Raises: as `evaluate_path` and `zero_shot`.
    """
    check_amounts(limit, batch_size)
    tokenizer, origin, jobs = _jobs(path, level, dtype, hub)
    device = default_device()
    resolved = resolve_precision(precision, device)
    rows: list[dict[str, Any]] = []
    for level_name, method, _, load in jobs:
        model = load().to(device)
        if resolved == "float32":  # products of bfloat16 weights too; emulated ones would be slow besides
            model = model.float()
        for name, task in tasks.items():
            score = score_task(
                model,
                tokenizer,
                name,
                task,
                limit=limit,
                batch_size=batch_size,
                precision=resolved,
                seed=seed,
                on_progress=lambda _, done, total, at=f"{name}, {level_name}": progress(at, done, total),  # type: ignore[misc]
            )
            rows.append({"level": level_name, "method": method, **asdict(score), **origin})
            on_row(rows[-1])
    return rows


def zero_shot_protocol(limit: int | None, precision: str = "auto", seed: int = 0) -> dict[str, Any]:
    """What a zero-shot figure depends on besides model and data; figures of two protocols are not comparable."""
    resolved = resolve_precision(precision, default_device())
    return {"lm_eval": version("lm-eval"), "documents": limit or "all", "precision": resolved, "seed": seed}


def _jobs(
    path: str, level: str | None, dtype: str, hub: dict[str, Any]
) -> tuple[Any, dict[str, str], list[tuple[str, str, int, Callable[[], Any]]]]:
    """The tokenizer, what is measured, and (level, method, bytes, loader) of every model to measure at `path`."""
    folder = elastic_folder(path, **hub)
    if folder is None:
        if level is not None:
            raise ConfigError(f"{path}: --level needs an elastic checkpoint; this is none.")
        base = load_base(path, dtype)
        size = base.model.get_memory_footprint()
        origin = {"weights_sha256": base.identity["sha256"]}
        return base.tokenizer, origin, [("dense", "as it is", size, partial(getattr, base, "model"))]
    if dtype != "auto":
        raise ConfigError(f"{path}: --dtype is for plain models; levels have the dtype of their checkpoint.")
    checkpoint = ElasticCheckpoint(folder)
    levels = checkpoint.manifest.levels() if level is None else [checkpoint.manifest.find(level)]
    if is_hub_id(path):  # the files of the same commit
        fetch_levels(path, [x.name for x in levels], **{**hub, "revision": folder.name})
    elif level is None:
        levels = checkpoint.complete_among(levels)
    checkpoint.check_extras()  # the tokenizer among them
    return (
        load_tokenizer(folder),
        {"checkpoint_id": checkpoint.manifest.checkpoint_id},
        [
            (x.name, "elastic", checkpoint.bytes_of(x), partial(load_level, checkpoint, x, checkpoint.dtype))
            for x in levels
        ],
    )
