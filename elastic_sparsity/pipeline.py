"""The main flow: one run turns a base model into one elastic checkpoint. Reads top to bottom."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.adapters import elastic_linears
from elastic_sparsity.adding import add_levels
from elastic_sparsity.allocating import plan_in_run
from elastic_sparsity.allocation_file import allocation_of
from elastic_sparsity.allocator import usual_allocator_after
from elastic_sparsity.arch import (
    head_function,
    is_transposed,
    not_finite,
)
from elastic_sparsity.attention import training_attention
from elastic_sparsity.block_phase import Job, peak_bytes, restore_block_, run_block_phase_
from elastic_sparsity.block_state import Lazy, linear_state, record_of, saved_record
from elastic_sparsity.calibration_text import Progress, silent
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.checkpoint_writer import write_checkpoint
from elastic_sparsity.config import Recipe
from elastic_sparsity.distill import Share
from elastic_sparsity.end_to_end import EndToEndSettings, Snapshots, train_end_to_end_
from elastic_sparsity.errors import NumericsError, OutputError
from elastic_sparsity.files import check_output_folder, is_file, write_json
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.inducing import change_weights_, learn, round_all_gains_, summary
from elastic_sparsity.manifest import CONFIG_NAME, RUN_NAME
from elastic_sparsity.precision import DTYPES, dtype_name
from elastic_sparsity.preparing import check_own, of_strength, prepare, with_trainable
from elastic_sparsity.run_folder import is_unfinished, run_folder
from elastic_sparsity.sharding import shard_block_, whole_tensors
from elastic_sparsity.shells import LinearRecord
from elastic_sparsity.supernet import linear_sizes
from elastic_sparsity.workers import Workers

log = logging.getLogger(__name__)


def optimize(
    recipe: Recipe, output: str | Path, progress: Progress = silent, *, restart: bool = False
) -> ElasticCheckpoint:
    """Runs a recipe and writes the elastic checkpoint to `output`.

    What is finished is kept in `<output>.run` until then: a run that was interrupted goes on from there when it is
    called again, and ends with the same bytes. Structured levels come last, each added to a checkpoint that is whole
    without it. Under `accelerate launch` all processes share the work.

    Args:
        restart: begin anew, whatever an interrupted run left.
    Raises: ElasticSparsityError: bad recipe, model, text or output; nothing is then left at `output`. ConfigError: if
        another run was interrupted there.
    """
    output, started, workers = Path(output), time.monotonic(), Workers()
    # A checkpoint that is there may be the unfinished run's own, from just before it was killed.
    if workers.is_main and (restart or not (is_unfinished(output) and is_file(output / CONFIG_NAME))):
        check_output_folder(output)
    with run_folder(output, restart=restart, writes=workers.is_main) as folder, usual_allocator_after():
        job, stored_dtype, identity = prepare(recipe, folder, workers, progress if workers.is_main else silent)
        is_trained, token_ids = is_file(output / CONFIG_NAME), job.token_ids_ST
        if is_trained:
            check_own(output, identity)
            note_recipe(output, identity["recipe"], workers)
        if not is_trained:
            train_and_save(job, output, identity, stored_dtype)
        del job  # the trained model, before the base model is loaded again
        if workers.is_main:
            is_extended = add_levels(recipe, output, token_ids, folder, progress)
            if is_extended or not is_trained:
                record_run(output, time.monotonic() - started, workers)
        workers.wait()
    return ElasticCheckpoint(output)


def note_recipe(output: Path, recipe: dict[str, Any], workers: Workers) -> None:
    """Records what an interrupted run's recipe has become since its checkpoint was written, see `check_own`."""
    checkpoint = ElasticCheckpoint(output)
    if workers.is_main and checkpoint.config.get("recipe") != recipe:
        checkpoint.update_record({"recipe": recipe})


def train_and_save(job: Job, output: Path, identity: dict[str, Any], stored_dtype: torch.dtype) -> None:
    """All stages that train; the first worker writes the checkpoint."""
    folded = run_folds_(job, stored_dtype)
    with training_attention(job.base.model), fused_layers(job.base.model):
        job, induced = run_induction(job)
        job = run_allocation(job, stored_dtype)
        block_losses, mixer_weights = run_block_phase_(job)
        final_kl = run_end_to_end_(job)
    training = {"induction": {**induced, **folded}, "block_losses": block_losses, "end_to_end_kl": final_kl}
    if job.workers.is_main:
        save_run(job, output, {**identity, "training": training}, stored_dtype, mixer_weights)


def run_allocation(job: Job, stored_dtype: torch.dtype) -> Job:
    """Searches how much each linear keeps, if the recipe asks for it. Returns: the job with what was found."""
    recipe = with_trainable(job.recipe, job.trainable)  # a plan's strength depends on it
    if not recipe.allocation.search:
        return job
    plan = plan_in_run(
        job.base, job.token_ids_ST, recipe, job.folder.allocation, job.progress,
        dtype=stored_dtype, channel_scales=job.channel_scales,
    )  # fmt: skip
    found = allocation_of(plan, job.folder.allocation, linear_sizes(job.base.model), recipe.ladder.sparsities)
    return replace(job, allocation=of_strength(recipe, job.base.model, found))


def run_folds_(job: Job, stored_dtype: torch.dtype) -> dict[str, Any]:
    """Gives the base model weights that are easier to prune and compute the same, if the recipe asks for it.

    Args:
        stored_dtype: of the base model.
    Returns: the record of what was changed, by kind; empty if nothing was asked for.
    """
    recipe, base, folder = job.recipe, job.base, job.folder
    if not recipe.induction.changes_weights:
        return {}
    if job.workers.is_main and not folder.has_base:
        blocks = change_weights_(recipe, base, job.token_ids_ST, job.precision, job.progress)
        round_all_gains_(base.model, DTYPES[dtype_of_checkpoint(recipe, stored_dtype)])
        folder.save_base(dict(base.model.named_parameters()), {"changes": summary(blocks)})
    job.workers.wait()
    return folder.restore_base_(base.model)


def run_induction(job: Job) -> tuple[Job, dict[str, Any]]:
    """Learns how much every input channel counts, before anything is scored (arXiv 2602.21652).

    Returns: the job with the scales, and KL by level before and after; empty if the recipe asks for none, in which case
    scales that came with the base model are used.
    """
    if not job.recipe.induction.steps or job.recipe.induction.reading != "scores":
        return replace(job, channel_scales=job.base.scales_of(job.recipe.scores.method)), {}
    found = job.folder.load_induction()
    if found is None:
        learned = learn(job.recipe, job.base, job.token_ids_ST, job.precision, job.workers, job.progress)
        found = learned.scales, {"kl_before": learned.kl_before, "kl_after": learned.kl_after, "used": learned.used}
        job.folder.save_induction(*found)
    scales, note = found
    return replace(job, channel_scales=scales), note


def run_end_to_end_(job: Job) -> dict[str, float]:
    """Trains all levels' logits towards the dense model's. Returns the final KL by level, empty if it is off."""
    if job.trainable == "off":
        return {}
    model, wanted, workers = job.base.model, job.recipe.end_to_end, job.workers
    settings = EndToEndSettings(
        **wanted.model_dump(exclude={"trainable", "base_lr", "shard"}),
        base_lr=wanted.base_lr if job.trainable == "base" else 0.0,
    )
    with job.autocast():
        head = head_function(model)
    if job.sharded:
        share_out_(job)
    share = Share(
        places=workers.places(wanted.batch_size, "end_to_end.batch_size"),
        num_samples=job.token_ids_ST.shape[0],
        mean=workers.mean,
        mean_gradients_=(lambda parameters: None) if job.sharded else workers.mean_gradients_,
    )
    snapshots = None  # of a model in parts nothing is kept before it is trained
    if not job.sharded:
        own = wanted.model_dump(mode="json")
        snapshots = Snapshots(load=partial(job.folder.load_snapshot, own), save=partial(job.folder.save_snapshot, own))
    found = train_end_to_end_(
        model,
        head,
        job.recipe.build_ladder(),
        job.token_ids_ST,
        settings,
        job.generator,
        job.autocast,
        lambda done, total: job.progress("end to end", done, total),
        share,
        snapshots,
    )
    if job.sharded:
        collect(job)
    return found


def share_out_(job: Job) -> None:
    """Leaves every worker its part of each block; a block that is not in memory is read just before."""
    for index, block in enumerate(job.blocks):
        if job.base.stream is not None:
            job.base.stream.load_block_(index, block)
            restore_block_(job, index)
        shard_block_(block, job.workers.count, job.workers.device.type)


def collect(job: Job) -> None:
    """Gathers the trained blocks, one at a time; the first worker keeps them in the run's folder."""
    rest: dict[str, Tensor] = {}
    for index, block in enumerate(job.blocks):
        linears = dict(elastic_linears(block))
        tensors = {f"{path}.{part}": t for path, e in linears.items() for part, t in linear_state(e, False).items()}
        for name, whole in whole_tensors(block):
            path, _, part = name.rpartition(".")
            if path in linears and part != "bias":
                tensors[name] = whole
            else:
                rest[f"{job.prefix}.{index}.{name}"] = whole
        job.folder.save_trained(str(index), tensors)
    job.folder.save_trained("rest", rest)
    job.workers.wait()


def save_run(job: Job, output: Path, record: dict[str, Any], stored_dtype: torch.dtype, mixer_weights: Tensor) -> None:
    """Writes a trained model's checkpoint, linear by linear.

    Raises: NumericsError: if training left NaN or infinity; OutputError.
    """
    base, recipe = job.base, job.recipe
    model, stream = base.model, base.stream
    names = [f"{job.prefix}.{index}.{path}" for index in range(len(job.blocks)) for path in job.linears]

    def record_of_file(name: str, transposed: bool) -> LinearRecord:
        # A sharded model's state holds all weights, so that its stream, if it has one, is not asked.
        stored = partial(model.get_parameter if stream is None else stream.read, f"{name}.weight")
        return saved_record(job.linear_state(name), stored, transposed, recipe.group_ranks())

    records: Mapping[str, LinearRecord]
    shared: Mapping[str, Tensor]
    if job.sharded:
        records = Lazy(names, lambda name: record_of_file(name, model.get_submodule(name).transposed))
        file = job.folder.open_trained("rest")
        outside = {n: p.detach() for n, p in model.named_parameters() if not n.startswith(f"{job.prefix}.")}
        shared = {**outside, **{name: file.read(name) for name in file.specs}}
    elif stream is None:
        if broken := not_finite(model):
            raise NumericsError(
                f"training: left NaN or infinity in {len(broken)} parameters, first {broken[0]}; lower "
                "end_to_end.adapter_lr or end_to_end.base_lr, or set precision = 'float32'."
            )
        records = {name: record_of(linear) for name, linear in elastic_linears(model)}
        parts = {f"{name}.{part}" for name in records for part in ("weight", "lora_A", "lora_B")}
        shared = {n: p.detach() for n, p in model.named_parameters() if n not in parts}
    else:
        records = Lazy(names, lambda name: record_of_file(name, is_transposed(model.get_submodule(name))))
        weights = {f"{name}.weight" for name in names}
        shared = Lazy([name for name in stream.shapes if name not in weights], stream.read)

    def save_extras(folder: Path) -> None:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)

    write_checkpoint(
        output,
        records,
        shared,
        ladder=recipe.build_ladder(),
        ranks=recipe.group_ranks(),
        inheritance=recipe.adapters.inheritance,
        dtype=dtype_of_checkpoint(recipe, stored_dtype),
        record=record,
        save_extras=save_extras,
        optional={"mixer": {"weights": mixer_weights}},
    )


def dtype_of_checkpoint(recipe: Recipe, stored_dtype: torch.dtype) -> str:
    """The dtype, by name, of the values that a run writes."""
    return dtype_name(stored_dtype) if recipe.checkpoint.dtype == "auto" else recipe.checkpoint.dtype


def record_run(output: Path, seconds: float, workers: Workers) -> None:
    """Adds run.json: what differs between equal runs, so no part of the checkpoint, which is complete without it."""
    run = {"seconds": round(seconds, 1), "peak_bytes": peak_bytes()}
    try:
        write_json(output / RUN_NAME, {**run, "workers": workers.count, "traffic_bytes": workers.traffic})
    except OutputError as error:
        log.warning("%s", error)
