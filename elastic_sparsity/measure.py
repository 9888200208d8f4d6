"""Measuring checkpoints and models as a user would load them: quality and bytes as table rows."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from elastic_sparsity.arch import first_token
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import (
    Progress,
    calibration_tokens,
    check_length,
    evaluation_windows,
    given_tokens,
    silent,
    text_protocol,
)
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import check_vocabulary, read_text, token_hash, tokenize, windows
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.evaluate import Quality, evaluate
from elastic_sparsity.files import is_file, is_folder
from elastic_sparsity.hub import elastic_folder, fetch_levels, is_hub_id
from elastic_sparsity.ladder import AnyLevel, Level
from elastic_sparsity.models import PACKAGED_MODELS, load_base, packaged_model_folder
from elastic_sparsity.precision import (
    autocast_factory,
    cast_parameters_,
    default_device,
    resolve_precision,
    to_computing_dtype_,
)
from elastic_sparsity.quality_record import (
    DENSE,
    ELASTIC,
    Cell,
    QualityRecord,
    Row,
    cells_of,
    check_same,
    recorded_quality,
)
from elastic_sparsity.skeleton import model_config
from elastic_sparsity.slicing import load_level, load_tokenizer
from elastic_sparsity.workers import Workers
from elastic_sparsity.zero_shot import check_amounts, score_task

log = logging.getLogger(__name__)


def measure(
    recipe: Recipe,
    checkpoint: ElasticCheckpoint,
    progress: Progress = silent,
    *,
    kl: bool = True,
    made_earlier: bool = False,
) -> list[dict[str, Any]]:
    """Quality and bytes of dense, baselines and every elastic level, as table rows; also stored in the checkpoint.

    The checkpoint is evaluated as a user would load it, level by level; several workers share the windows. What a level
    gave is recorded at once, and not measured again by a call of the same protocol. A baseline that breaks down gets no
    row: the record says why under "left_out". Without `kl` the dense model runs only once.

    Args:
        made_earlier: whether the checkpoint is not of a run that ended just now, see `unmeasured`.
    Raises: OutputError: if model or text are others by now than `made_earlier`. NumericsError: of a level, or dense.
    """
    workers = Workers()
    with workers.main_first():
        base = load_base(recipe.model.id, recipe.model.dtype)
        token_ids, held_out = calibration_tokens(recipe, base, progress)
    if made_earlier:
        check_same(checkpoint, base.identity["sha256"], token_hash(token_ids))
    windows_ST, protocol = evaluation_windows(recipe, base, held_out)
    precision = resolve_precision(recipe.precision, base.model.device.type)
    to_computing_dtype_(base.model, precision)  # also of weights in 16 bits: the protocol says what was computed
    protocol = {**protocol, "precision": precision}
    bench = _Bench(
        recipe=recipe,
        checkpoint=checkpoint,
        dense=base.model,
        calibration_ST=token_ids[: recipe.evaluation.baseline_samples or recipe.block.samples],
        windows_ST=windows_ST,
        given=given_tokens(recipe, protocol),
        autocast=autocast_factory(precision, base.model.device.type),
        kl=kl,
        workers=workers,
        progress=progress,
    )
    record = recorded_quality(checkpoint)
    if record.protocol != protocol or any((row["kl"] is not None) != kl for row in record.rows.values()):
        if record.rows and workers.is_main:
            log.warning("%s: its recorded quality is of another protocol, and is measured anew", checkpoint.folder)
        record = QualityRecord(protocol, {}, {})
    for level in checkpoint.manifest.levels():
        missing = [cell for cell in cells_of(recipe, [level]) if not record.has(cell)]
        if not missing:
            continue
        rows, left_out = bench.measure(level, [method for _, method in missing])
        record = QualityRecord(protocol, record.rows | rows, record.left_out | left_out)
        if workers.is_main:
            checkpoint.update_record({"quality": record.as_json(cells_of(recipe, checkpoint.manifest.levels()))})
    workers.wait()
    return record.in_order(cells_of(recipe, checkpoint.manifest.levels()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """Measures one level after another."""

    recipe: Recipe
    checkpoint: ElasticCheckpoint
    dense: Any
    calibration_ST: Tensor
    windows_ST: Tensor
    given: int
    autocast: Callable[[], Any]
    kl: bool
    workers: Workers
    progress: Progress

    def measure(self, level: AnyLevel, methods: Sequence[str]) -> tuple[dict[Cell, Row], dict[Cell, str]]:
        """Rows of one level, "dense" among the methods if it is wanted, and why baselines have none."""
        models, errors = {}, {}
        for method in methods:
            try:
                models[method] = self._model(level, method)
            except NumericsError as error:
                if method in (DENSE, ELASTIC):
                    raise
                errors[method] = str(error)
        for method, share in zip(methods, self.workers.mean([float(x in errors) for x in methods]), strict=True):
            if share and models.pop(method, None) is not None:  # all have to measure the same models
                errors[method] = "another worker could not make it"
        found, broken = self._evaluated(level, models)
        errors |= broken
        for method, why in errors.items():
            if self.workers.is_main:
                log.warning("%s at %s is left out: %s", method, level.title, why)
        dense_bytes = self.dense.num_parameters() * self.checkpoint.dtype.itemsize
        rows = {}
        for method, quality in found.items():
            name = DENSE if method == DENSE else level.name
            size = self.checkpoint.bytes_of(level) if method == ELASTIC else dense_bytes
            rows[name, method] = _row(name, method, quality, size)
        return rows, {(level.name, method): why for method, why in errors.items()}

    def _model(self, level: AnyLevel, method: str) -> Any:
        """Raises: NumericsError: if a baseline breaks down."""
        if method == DENSE:
            return self.dense
        if method == ELASTIC:
            return as_shipped(self.checkpoint, level, self.dense)
        assert isinstance(level, Level), f"{level.name} has no masks, which baselines make"
        model = copy.deepcopy(self.dense)
        prune_one_shot_(
            model,
            self.calibration_ST,
            level,
            method,
            damping=self.recipe.scores.damping,
            batch_size=self.recipe.block.batch_size,
            autocast=self.autocast,
            on_block=partial(self.progress, f"{method} at {level.title}"),
        )
        return model

    def _evaluated(self, level: AnyLevel, models: Mapping[str, Any]) -> tuple[dict[str, Quality], dict[str, str]]:
        """Quality of all, together; one by one only if some model's is no number, to tell which. And why without."""
        if not models:
            return {}, {}
        measured = partial(
            evaluate,
            windows_ST=self.windows_ST,
            given=self.given,
            reference=self.dense if self.kl else None,
            autocast=self.autocast,
            on_window=partial(self.progress, f"evaluating {level.title}"),
            share=range(self.workers.rank, self.windows_ST.shape[0], self.workers.count),
            sum_=self.workers.sum_,
        )
        try:
            return measured(models), {}
        except NumericsError:
            if not models.keys() - {DENSE, ELASTIC}:
                raise
        found: dict[str, Quality] = {}
        errors = {}
        for method, model in models.items():
            try:
                found |= measured({method: model})
            except NumericsError as error:
                if method in (DENSE, ELASTIC):
                    raise
                errors[method] = str(error)
        return found, errors


def as_shipped(checkpoint: ElasticCheckpoint, level: AnyLevel, base_model: Any) -> Any:
    """A level's weights, rounded as a user gets them, in a model that computes in the base model's dtype."""
    model = load_level(checkpoint, level, checkpoint.dtype).to(base_model.device)
    cast_parameters_(model, base_model.dtype)
    return model


def _row(level: str, method: str, quality: Quality, num_bytes: int | None) -> Row:
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
    teacher = None if reference is None else load_base(reference)
    if teacher is not None:
        to_computing_dtype_(teacher.model, resolved)
    rows: list[dict[str, Any]] = []
    (tokenizer, first), origin, jobs = _jobs(path, level, dtype, hub)
    ids = windows(tokenize(tokenizer, read_text(text)), window, max_windows, first)
    protocol = {**text_protocol(Path(text).name, ids, first), "precision": resolved}
    if reference is not None and teacher is not None:
        protocol |= {"reference": Path(reference).name, "reference_sha256": teacher.identity["sha256"]}
    on_start(protocol, origin)
    for name, method, size, load in jobs:
        model = None  # two levels need not fit
        model = load().to(device)
        check_length("--window", window, model)
        check_vocabulary(ids, model.config.vocab_size)
        to_computing_dtype_(model, resolved)  # also of weights in 16 bits: the protocol says what was computed
        found = evaluate(
            {method: model},
            ids,
            reference=None if teacher is None else teacher.model,
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
    (tokenizer, _), origin, jobs = _jobs(path, level, dtype, hub)
    device = default_device()
    resolved = resolve_precision(precision, device)
    rows: list[dict[str, Any]] = []
    for level_name, method, _, load in jobs:
        model = None  # two levels need not fit
        model = load().to(device)
        to_computing_dtype_(model, resolved)  # emulated products of bfloat16 weights would be slow besides
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
) -> tuple[tuple[Any, int | None], dict[str, str], list[tuple[str, str, int | None, Callable[[], Any]]]]:
    """What is to be measured at `path`.

    Returns: the tokenizer and the token that windows begin with; of which weights; and (level, method, bytes, loader)
        of every model.
    """
    folder = elastic_folder(path, **hub)
    if folder is None:
        if level is not None:
            raise ConfigError(f"{path}: --level needs an elastic checkpoint; this is none.")
        base = load_base(path, dtype)
        size = _stored_bytes(path)
        origin = {"weights_sha256": base.identity["sha256"]}
        text = base.tokenizer, first_token(base.model.config, base.tokenizer)
        return text, origin, [("dense", "as it is", size, partial(getattr, base, "model"))]
    if dtype != "auto":
        raise ConfigError(f"{path}: --dtype is for plain models; levels have the dtype of their checkpoint.")
    checkpoint = ElasticCheckpoint(folder)
    levels = checkpoint.manifest.levels() if level is None else [checkpoint.manifest.find(level)]
    if is_hub_id(path):  # the files of the same commit
        fetch_levels(path, [x.name for x in levels], **{**hub, "revision": folder.name})
    elif level is None:
        levels = checkpoint.complete_among(levels)
    checkpoint.check_extras()  # the tokenizer among them
    tokenizer = load_tokenizer(folder)
    return (
        (tokenizer, first_token(model_config(checkpoint), tokenizer)),
        {"checkpoint_id": checkpoint.manifest.checkpoint_id},
        [
            (x.name, "elastic", checkpoint.bytes_of(x), partial(load_level, checkpoint, x, checkpoint.dtype))
            for x in levels
        ],
    )


def _stored_bytes(path: str) -> int | None:
    """Bytes of a plain model's weight files on this disk; None if they are not known to be here (a hub's cache)."""
    if path in PACKAGED_MODELS:
        path = str(packaged_model_folder(path))
    files = [Path(path)] if is_file(path) else [*Path(path).glob("model*.safetensors")] if is_folder(path) else []
    return sum(file.stat().st_size for file in files) or None
