"""What a run is, before any stage: its model, text and choices, and whether it is the one that was interrupted here."""

import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.adding import check_structured
from elastic_sparsity.allocation import by_linear, progressions, weakened
from elastic_sparsity.allocation_file import AllocationPlan, allocation_of, check_model, load_plan
from elastic_sparsity.allocator import keep_freed_tensors_, return_freed_tensors_
from elastic_sparsity.arch import function_config
from elastic_sparsity.block_phase import Job
from elastic_sparsity.calibration_text import Progress, calibration_tokens, evaluation_windows
from elastic_sparsity.config import Recipe, StructuredSection
from elastic_sparsity.data import token_hash
from elastic_sparsity.errors import ConfigError, OutputError
from elastic_sparsity.free_memory import free_here
from elastic_sparsity.inducing import check_base_model, check_stages
from elastic_sparsity.manifest import read_manifest
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import BaseModel, load_base, stream_base
from elastic_sparsity.plan_sizes import Choices, Peak
from elastic_sparsity.planning import check_patterns, choose, misfits
from elastic_sparsity.precision import DTYPES, default_device, dtype_name, resolve_precision, to_computing_dtype_
from elastic_sparsity.run_folder import RunFolder
from elastic_sparsity.supernet import linear_depths, linear_sizes
from elastic_sparsity.workers import Workers

log = logging.getLogger(__name__)


def prepare(
    recipe: Recipe, folder: RunFolder, workers: Workers, progress: Progress
) -> tuple[Job, torch.dtype, dict[str, Any]]:
    """Model, text and choices of a run. Returns: the job, the base model's stored dtype, and what the run is."""
    with workers.main_first():  # the others find downloads, conversions and sampled text in the cache
        check_stages(recipe)
        if recipe.allocation.search and workers.count > 1:
            raise ConfigError(
                f"allocation.search: runs in one process, found {workers.count}; make the plan first with "
                "`elastic-sparsity search`, and name it as allocation.plan."
            )
        plan = None if recipe.allocation.plan is None else load_plan(Path(recipe.allocation.plan))
        planned = settle(recipe, workers.count, folder.decided(), num_local=workers.local)
    planned = workers.of_main(planned)  # the others see the memory of a moment later
    check_shares(recipe, workers, planned.trainable)
    with workers.main_first():
        base = open_base(recipe, planned.weights)
        if base.model.dtype not in DTYPES.values():
            raise ConfigError(f"model.dtype: the weights are {base.model.dtype}, which no stage takes; set 'float32'.")
        check_base_model(recipe, base)
        check_stored_range(recipe, base)
        allocation = _allocation(with_trainable(recipe, planned.trainable), base, plan)
        check_structured(recipe, base.model)
        if recipe.evaluation.source is not None:
            evaluation_windows(recipe, base, None)  # a text that cannot be used should not cost a run
        token_ids, _ = calibration_tokens(recipe, base, progress)
    model, stored_dtype = base.model, base.model.dtype
    precision = resolve_precision(recipe.precision, model.device.type)
    to_computing_dtype_(model, precision)
    if base.stream is not None:
        base.stream.dtype = model.dtype
    identity = {
        "base_model": base.identity,
        "recipe": recipe.model_dump(mode="json", exclude={"memory"}),
        "data": {"calibration_sha256": token_hash(token_ids), "calibration_tokens": token_ids.numel()},
        "versions": versions(),
    }
    with workers.main_first():
        began = {**identity, "precision": precision, "device": model.device.type, "allocation": allocation}
        began["recipe"] = binding(recipe)
        began["config"] = function_config(model.config)
        choices = folder.claim(began, {"trainable": planned.trainable})
    job = Job(
        recipe=recipe,
        base=base,
        token_ids_ST=token_ids.to(model.device),
        trainable=choices["trainable"],
        precision=precision,
        activations=planned.activations,
        workers=workers,
        folder=folder,
        generator=torch.Generator().manual_seed(recipe.seed),
        progress=progress,
        allocation=allocation,
    )
    if base.stream is not None and job.trainable != "off" and not job.sharded:
        raise ConfigError(
            "memory.weights: 'stream' with an end-to-end phase needs several processes that share the model, found "
            f"{workers.count}; start it with accelerate launch or torchrun, or set end_to_end.trainable = 'off'."
        )
    return job, stored_dtype, {**identity, "resolved": {"precision": precision, "trainable": job.trainable}}


def binding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe an interrupted run cannot change: all that its finished blocks depend on.

    Not how the end-to-end phase behind them trains (a snapshot of it is of its own settings), in which dtype the
    checkpoint is written (unless folded weights are rounded for it), which structured levels are added to it, and what
    is measured of it: what an error there advises can be done without losing hours.
    """
    free = {"memory", "evaluation", "structured"} | (set() if recipe.induction.changes_weights else {"checkpoint"})
    found = recipe.model_dump(mode="json", exclude=free)
    wanted = recipe.end_to_end
    found["end_to_end"] = {"trainable": wanted.trainable, "shard": wanted.shard, "is_on": wanted.steps > 0}
    return found


def settle(recipe: Recipe, num_workers: int, decided: Mapping[str, Any], *, num_local: int = 1) -> Choices:
    """What "auto" becomes, by the plan's figures and the memory that is free.

    Args:
        decided: what an interrupted run had decided, which a run that goes on cannot change.
        num_local: processes on this machine.
    Raises: ConfigError: if the ladder has a pattern that the model's linears cannot take.
    """
    if decided.get("trainable") in ("base", "adapters", "off"):
        recipe = with_trainable(recipe, decided["trainable"])
    shapes = read_shapes(recipe.model.id, recipe.model.dtype)
    check_patterns(recipe, shapes)
    limits, gpu = free_here(), default_device() == "cuda"
    own, room = recipe, limits
    if not gpu and not recipe.end_to_end.shard:  # every process has a whole model in the host memory that they share
        own, room = share_of(recipe, num_workers), {**limits, "host": limits["host"] // num_local}
    choices = choose(own, shapes, room, gpu, num_workers)
    if choices.trainable == "off" and recipe.end_to_end.trainable == "auto" and recipe.end_to_end.steps:
        why = "weights are streamed" if recipe.memory.weights == "stream" else "its training does not fit into memory"
        log.warning("end-to-end phase is off: %s; `elastic-sparsity plan` says more", why)
    elif choices.trainable == "adapters" and recipe.end_to_end.trainable == "auto":
        log.warning("end-to-end phase trains the adapters alone: base weights too do not fit into memory")
    alone = own.model_copy(update={"structured": StructuredSection()})
    warn_of_misfits("the run", misfits(alone, shapes, choices, room), room, "")
    late = [peak for peak in misfits(recipe, shapes, choices, limits) if peak.stage in ("structured", "tuning")]
    tip = " (structured.steps = 0 leaves out their tuning)"
    warn_of_misfits("structured levels, made last by one process,", late, limits, tip)
    return choices


def warn_of_misfits(what: str, found: Sequence[Peak], limits: Mapping[str, int], tip: str) -> None:
    """Warns of stages that need more memory than is free; hours later they would end the run."""
    for peak in found:
        log.warning(
            "%s may not fit: %s memory, stage %s, needs %.1f GB of %.1f GB; `elastic-sparsity plan` says what helps%s",
            what, peak.place, peak.stage, peak.bytes / 1e9, limits[peak.place] / 1e9, tip,
        )  # fmt: skip


def with_trainable(recipe: Recipe, trainable: str) -> Recipe:
    """The recipe with what "auto" became as its own wish."""
    end_to_end = recipe.end_to_end.model_copy(update={"trainable": trainable})
    return recipe.model_copy(update={"end_to_end": end_to_end})


def share_of(recipe: Recipe, num_workers: int) -> Recipe:
    """The recipe with the samples and places in a batch that one of several processes has."""
    parts = {"block": ("samples", "batch_size"), "end_to_end": ("batch_size",), "induction": ("batch_size",)}
    shared = {}
    for name, fields in parts.items():
        section = getattr(recipe, name)
        shared[name] = section.model_copy(update={x: -(-getattr(section, x) // num_workers) for x in fields})
    return recipe.model_copy(update=shared)


def check_shares(recipe: Recipe, workers: Workers, trainable: str) -> None:
    """Raises: ConfigError: before any work, if a stage's batches cannot be shared out to the processes."""
    workers.places(recipe.block.batch_size, "block.batch_size")
    if recipe.block.samples < recipe.block.batch_size and workers.count > 1:
        raise ConfigError(f"block.samples: {recipe.block.samples} are fewer than a batch of {recipe.block.batch_size}.")
    if trainable != "off":
        workers.places(recipe.end_to_end.batch_size, "end_to_end.batch_size")
    if recipe.induction.steps and recipe.induction.reading == "scores":
        workers.places(recipe.induction.batch_size, "induction.batch_size")


def open_base(recipe: Recipe, weights: str) -> BaseModel:
    """The base model, whole in memory ("resident") or block by block ("stream")."""
    if weights == "stream":
        return_freed_tensors_()
        return stream_base(recipe.model.id, recipe.model.dtype, torch.device(default_device()))
    keep_freed_tensors_()
    return load_base(recipe.model.id, recipe.model.dtype)


def check_stored_range(recipe: Recipe, base: BaseModel) -> None:
    """Raises: ConfigError: if `checkpoint.dtype` cannot hold the base model's weights, before anything is trained."""
    wanted = DTYPES.get(recipe.checkpoint.dtype)
    if wanted is None or torch.finfo(wanted).max >= torch.finfo(base.model.dtype).max or base.stream is not None:
        return
    limit = torch.finfo(wanted).max
    beyond = [name for name, weight in base.model.named_parameters() if float(weight.detach().abs().max()) > limit]
    if beyond:
        raise ConfigError(
            f"checkpoint.dtype: {recipe.checkpoint.dtype} holds at most {limit:g}, which {len(beyond)} parameters of "
            f"the base model exceed, first {beyond[0]}; choose bfloat16 or float32."
        )


def _allocation(recipe: Recipe, base: BaseModel, plan: AllocationPlan | None) -> dict[str, tuple[int, ...]]:
    """Weights kept a row by linear and level, by the recipe's plan or slope; empty = uniform."""
    model, sparsities = base.model, recipe.ladder.sparsities
    sizes = linear_sizes(model)
    if plan is not None:
        path = Path(str(recipe.allocation.plan))
        found = allocation_of(plan, path, sizes, sparsities)
        check_model(plan, path, base.identity, dtype_name(model.dtype))
        return of_strength(recipe, model, found)
    if not any(recipe.slopes()):
        return {}
    return by_linear(sizes, progressions(sizes, linear_depths(model), sparsities, recipe.slopes()))


def of_strength(recipe: Recipe, model: Any, plan: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A plan, as far towards it as the recipe wants; its "auto" has to be decided, see `with_trainable`."""
    sizes, sparsities = linear_sizes(model), recipe.ladder.sparsities
    levels = [[plan[size.name][level] for size in sizes] for level in range(len(sparsities))]
    return by_linear(sizes, weakened(levels, sizes, sparsities, recipe.allocation_strength))


def check_own(output: Path, identity: Mapping[str, Any]) -> None:
    """That the checkpoint at `output` is the one that this run made before it was killed.

    What is measured of it may be something else by now; and before there is a structured level, how they are made.

    Raises: OutputError.
    """
    (manifest, found), wanted = read_manifest(output), json.loads(json.dumps(identity))
    made = [level.fraction for level in manifest.structured_levels()]
    was, asked = (_made_by(config.get("recipe"), made) for config in (found, wanted))
    same = {"recipe": was == asked, **{key: found.get(key) == wanted[key] for key in ("base_model", "data")}}
    other = [key for key, is_same in same.items() if not is_same]
    if other:
        raise OutputError(
            f"{output}: holds a checkpoint of another {' and '.join(other)} than the unfinished run {output}.run, "
            "which needs this place; move the checkpoint away, or name another output."
        )


def _made_by(recipe: Any, made: Sequence[float]) -> Any:
    """The part of a recorded recipe that the levels with masks, and those structured ones, depend on."""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("structured"), dict):
        return recipe
    found = {key: part for key, part in recipe.items() if key not in ("memory", "evaluation", "structured")}
    if not made:
        return found
    structured = recipe["structured"]
    asked = [fraction in structured["fractions"] for fraction in made]
    return {**found, "structured": {**structured, "fractions": asked}}


def versions(packages: Sequence[str] = ("elastic-sparsity", "torch", "transformers", "safetensors")) -> dict[str, str]:
    """Installed versions, for the checkpoint's record."""
    return {name: importlib.metadata.version(name) for name in packages}
