"""The block phase of a run: block after block scored, masked and trained; finished ones are kept for a resume.

A block is committed by its file in the run's folder, which is written after the hidden states that the next one starts
from. A base model may be whole in memory, or one block at a time (`weight_stream`); both give the same bits.
"""

import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.activations import Activations, ActivationStore
from elastic_sparsity.adapters import ElasticLinear, replace_module_
from elastic_sparsity.arch import architecture_of, weight_OI
from elastic_sparsity.block_state import linear_state, restore_linear_
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.config import Recipe
from elastic_sparsity.distill import BlockSettings, Share, block_outputs, own_samples, train_block_
from elastic_sparsity.errors import OutputError
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.ladder import keep_count
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.mixer import FeatureMixer
from elastic_sparsity.models import BaseModel
from elastic_sparsity.precision import DTYPES, autocast_factory, dtype_name, weights_in
from elastic_sparsity.run_folder import RunFolder
from elastic_sparsity.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run, ready to work.

    Attributes:
        token_ids_ST: all calibration samples, on the device.
        trainable: what the end-to-end phase will train: "base", "adapters" or "off".
        precision: "float32" or "bfloat16" products.
        activations: where hidden states live: "device", "host" or "disk".
        channel_scales: what induction learned, by linear name; empty without it.
        allocation: weights kept a row at every unstructured level, by linear name; empty = uniform.
    """

    recipe: Recipe
    base: BaseModel
    token_ids_ST: Tensor
    trainable: str
    precision: str
    activations: str
    workers: Workers
    folder: RunFolder
    generator: torch.Generator
    progress: Callable[[str, int, int], None]
    channel_scales: Mapping[str, Tensor] = field(default_factory=dict)
    allocation: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether the end-to-end phase shares the model out among several workers."""
        return self.recipe.end_to_end.shard and self.workers.count > 1 and self.trainable != "off"

    @property
    def prefix(self) -> str:
        """Where the blocks are in the model."""
        return architecture_of(self.base.model.config.model_type).blocks

    @property
    def blocks(self) -> nn.ModuleList:
        return self.base.model.get_submodule(self.prefix)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of a block's linears."""
        return architecture_of(self.base.model.config.model_type).linears

    def autocast(self) -> Any:
        return autocast_factory(self.precision, self.base.model.device.type)()

    def linear_state(self, name: str) -> dict[str, Tensor]:
        """A finished linear's state, by its name in the model."""
        number, _, path = name.removeprefix(f"{self.prefix}.").partition(".")
        file = self.folder.open_trained(number) if self.sharded else self.folder.open_block(int(number))
        return {x.removeprefix(f"{path}."): file.read(x) for x in file.specs if x.startswith(f"{path}.")}

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """A block with its weights in memory."""
        return nullcontext(self.blocks[index]) if self.base.stream is None else self.base.stream.block(index)


def run_block_phase_(job: Job) -> tuple[list[dict[str, float]], Tensor]:
    """Masks and trains block by block, from the first unfinished one on.

    Leaves elastic linears in a model that is whole in memory; of any model, every block's state in the run's folder.

    Returns: each block's losses by level, and its mixer weights (blocks, groups).
    """
    blocks, workers, recipe = job.blocks, job.workers, job.recipe
    runner, store, share = _runner(job)
    done = min(job.folder.finished_blocks(), len(blocks))
    workers.wait()  # nobody writes before everyone has counted
    notes = restore_blocks_(job, done)
    if done == len(blocks):
        return _summary(notes)
    if done:
        if workers.is_main:  # once for all
            _check_streams(store, notes[-1])
        dense, streams = _kept_streams(store, notes[-1])
    else:
        dense = runner.first_hidden(lambda shape, dtype, _: store.new("block0000-dense", shape[1:], dtype))
        streams = [dense] * recipe.build_ladder().num_groups
    for index in range(done, len(blocks)):
        started = time.monotonic()
        with job.block(index) as block:
            found, dense, streams = _train_block(job, index, block, runner, store, share, dense, streams)
        del block  # before the next one is read
        notes.append(found)
        losses = " ".join(f"{name}={value:.4g}" for name, value in found["losses"].items())
        seconds = time.monotonic() - started
        log.info("block %d/%d  %s  %.1f s  peak %.1f GB", index + 1, len(blocks), losses, seconds, peak_bytes() / 1e9)
        job.progress("blocks", index + 1, len(blocks))
    return _summary(notes)


def _summary(notes: Sequence[dict[str, Any]]) -> tuple[list[dict[str, float]], Tensor]:
    return [note["losses"] for note in notes], torch.tensor([note["mixer"] for note in notes])


def _runner(job: Job) -> tuple[BlockRunner, ActivationStore, Share]:
    """The runner over this worker's samples, the place for its hidden states, and its share of the training."""
    wanted, workers, model, stream = job.recipe.block, job.workers, job.base.model, job.base.stream
    places = workers.places(wanted.batch_size, "block.batch_size")
    rows = own_samples(wanted.samples, places, wanted.batch_size)
    runner = BlockRunner(
        model.base_model,
        job.blocks,  # the list itself: a block that is loaded takes its place in it
        job.token_ids_ST[rows],
        len(places),
        nullcontext if stream is None else stream.running,
    )
    store = ActivationStore(job.folder.path, job.activations, rows, wanted.samples, model.device)
    means: dict[str, Any] = {"mean": workers.mean, "mean_gradients_": workers.mean_gradients_}
    return runner, store, Share(places=places, num_samples=wanted.samples, **means)


def restore_blocks_(job: Job, count: int) -> list[dict[str, Any]]:
    """Puts the first `count` finished blocks back into a model that is whole in memory. Returns: their notes.

    Also sets the generator as it was after the last of them.
    """
    notes = []
    for index in range(count):
        if job.base.stream is None:
            note = restore_block_(job, index)
        else:
            tensors, note = job.folder.load_block(index)
            job.generator.set_state(tensors["generator"])
        notes.append(note)
    if count:
        log.info("blocks 1 to %d of %d were finished before", count, len(job.blocks))
        job.progress("blocks", count, len(job.blocks))
    return notes


def restore_block_(job: Job, index: int) -> dict[str, Any]:
    """Puts a finished block's elastic linears where its dense ones are. Returns: its note."""
    tensors, note = job.folder.load_block(index)
    job.generator.set_state(tensors.pop("generator"))
    for path in job.linears:
        state = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
        restore_linear_(job.blocks[index], path, state, partial(_elastic, job, generator=torch.Generator()))
    return note


def _keep_streams(
    store: ActivationStore, start: str, dense: Activations, streams: Sequence[Activations]
) -> dict[str, Any]:
    """Puts the next block's inputs on disk, each once. Returns: what `_kept_streams` needs."""
    names = {id(dense): f"{start}-dense"}
    groups = [names.setdefault(id(stream), f"{start}-group{group}") for group, stream in enumerate(streams)]
    for kept in {id(x): x for x in (dense, *streams)}.values():
        store.save(names[id(kept)], kept)
    dtype = dtype_name(dense.dtype)
    return {"dense": f"{start}-dense", "groups": groups, "shape_TD": tuple(dense.shape[1:]), "dtype": dtype}


def _stream_names(kept: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([kept["dense"], *kept["groups"]]))


def _check_streams(store: ActivationStore, note: dict[str, Any]) -> None:
    for name, expected in note["streams"]["crc32"].items():
        if store.checksum(name) != expected:
            raise OutputError(f"{store.folder / name}.activations: is damaged; start again with --restart.")


def _kept_streams(store: ActivationStore, note: dict[str, Any]) -> tuple[Activations, list[Activations]]:
    """The hidden states that the next block starts from; groups that share a stream share the object."""
    kept = note["streams"]
    found: dict[str, Activations] = {}
    for name in _stream_names(kept):
        loaded = store.load(name, kept["shape_TD"], DTYPES[kept["dtype"]])
        if loaded is None:
            raise OutputError(f"{store.folder / name}.activations: missing or cut off; start again with --restart.")
        found[name] = loaded
    return found[kept["dense"]], [found[name] for name in kept["groups"]]


def _train_block(
    job: Job,
    index: int,
    block: nn.Module,
    runner: BlockRunner,
    store: ActivationStore,
    share: Share,
    dense: Activations,
    streams: Sequence[Activations],
) -> tuple[dict[str, Any], Activations, list[Activations]]:
    """One block: scores, masks, training, outputs, commit. Returns: its note, and the next block's inputs."""
    recipe, ladder, is_last = job.recipe, job.recipe.build_ladder(), index + 1 == len(job.blocks)
    where, call = f"{job.prefix}.{index}", runner.call(index)
    linears = {path: block.get_submodule(path) for path in job.linears}
    shape_TD, dtype = tuple(dense.shape[1:]), dense.dtype
    start = f"block{index + 1:04d}"
    gram = recipe.scores.method == "obs"
    seen = [dense] if recipe.scores.stream == "dense" else streams
    with weights_in(linears.values(), job.precision):
        with job.autocast():
            target = runner.map(call, dense, store.new(f"{start}-dense", shape_TD, dtype))
        statistics = block_statistics(
            runner, call, linears, seen, gram=gram, autocast=job.autocast, where=where, sum_=job.workers.sum_
        )
    elastic = attach_elastic_(job, block, linears, statistics, where)
    mixer = FeatureMixer(recipe.mixer.mode, recipe.mixer_weights())
    settings = BlockSettings(mixer_lr=recipe.mixer.lr, **recipe.block.model_dump(exclude={"samples"}))
    losses = train_block_(
        call, elastic, ladder, streams, dense, target, mixer, settings, job.generator, where, job.autocast, share
    )
    outputs: list[Activations] = []
    if not is_last:
        with job.autocast():
            outputs = block_outputs(
                call, list(runner.batches()), elastic, ladder, streams, dense, target, mixer, job.generator,
                lambda group: store.new(f"{start}-group{group}", shape_TD, dtype),
            )  # fmt: skip
    kept = None if is_last else _keep_streams(store, start, target, outputs)
    note = {"losses": losses, "mixer": mixer.weights.tolist(), "streams": kept}
    job.workers.wait()  # every worker's hidden states are on disk before the block counts as done
    if kept and job.workers.is_main:
        kept["crc32"] = {name: store.checksum(name) for name in _stream_names(kept)}
    moved = recipe.block.base_lr > 0
    state = {f"{path}.{part}": tensor for path, e in zip(linears, elastic, strict=True)
             for part, tensor in linear_state(e, moved).items()}  # fmt: skip
    job.folder.save_block(index, {**state, "generator": job.generator.get_state()}, note)
    if job.workers.is_main:
        store.keep_only(_stream_names(kept) if kept else [])
    job.workers.wait()  # nobody writes the next block's files before the old ones are gone
    return note, target, outputs


def attach_elastic_(
    job: Job, block: nn.Module, linears: dict[str, nn.Module], statistics: dict[str, InputStatistics], where: str
) -> list[ElasticLinear]:
    """Scores and masks the linears of the block at `where` and puts elastic ones in their place."""
    recipe, ladder, made = job.recipe, job.recipe.build_ladder(), []
    for path, linear in linears.items():
        weight, scale_I = weight_OI(linear), job.channel_scales.get(f"{where}.{path}")
        scores = importance_scores(
            recipe.scores.method, weight, statistics[path], recipe.scores.damping, f"{where}.{path}", scale_I
        )
        flat = [keep_count(weight.shape[1], s) for s in ladder.sparsities]
        counts = job.allocation.get(f"{where}.{path}", flat)
        drop_level = drop_levels(scores, counts) if counts else None
        densest = mask_at(drop_level, 0) if drop_level is not None and recipe.scores.patterns == "within" else None
        patterns = [pattern_mask(scores, *p, densest) for p in (level.pattern for level in ladder.levels) if p]
        elastic = _elastic(job, linear, drop_level, patterns, generator=job.generator)
        replace_module_(block, path, elastic)
        made.append(elastic)
    return made


def _elastic(
    job: Job,
    linear: nn.Module,
    drop_level: Tensor | None,
    patterns: Sequence[Tensor],
    *,
    generator: torch.Generator,
) -> ElasticLinear:
    weight = weight_OI(linear)
    return ElasticLinear(
        linear,
        job.recipe.build_ladder(),
        job.recipe.group_ranks(),
        inheritance=job.recipe.adapters.inheritance,
        drop_level_OI=drop_level,
        pattern_masks=patterns,
        train_base=job.trainable == "base" or job.recipe.block.base_lr > 0,
        teacher_dtype=torch.bfloat16 if job.precision == "bfloat16" else weight.dtype,
        generator=generator,
    )


def peak_bytes() -> int:
    """Largest resident size this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
