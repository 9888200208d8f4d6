"""The main flow: one run turns a base model into one elastic checkpoint. Reads top to bottom."""

import importlib.metadata
import logging
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import ElasticLinear, elastic_linears, replace_module_
from elastic_sparsity.arch import architecture_of, check_finite_weights, decoder_blocks, head_function, weight_OI
from elastic_sparsity.attention import training_attention
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.calibration_text import Progress, calibration_tokens, evaluation_windows, silent
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.checkpoint_writer import write_checkpoint
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.distill import BlockSettings, block_outputs, train_block_
from elastic_sparsity.end_to_end import EndToEndSettings, train_end_to_end_
from elastic_sparsity.files import check_output_folder
from elastic_sparsity.importance import InputStatistics, importance_scores
from elastic_sparsity.ladder import keep_count
from elastic_sparsity.masks import drop_levels, mask_at, pattern_mask
from elastic_sparsity.mixer import FeatureMixer
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory, resolve_precision, weights_in
from elastic_sparsity.shells import LinearRecord

log = logging.getLogger(__name__)


def optimize(recipe: Recipe, output: str | Path, progress: Progress = silent) -> ElasticCheckpoint:
    """Runs a recipe and writes the elastic checkpoint to `output`.

    Raises: ElasticSparsityError: bad recipe, model, text or output; nothing is then left at `output`.
    """
    output, started = Path(output), time.monotonic()
    check_output_folder(output)
    base = load_base(recipe.model.id, recipe.model.dtype)
    if recipe.evaluation.source is not None:
        evaluation_windows(recipe, base, None)  # a text that cannot be used should not cost a run
    token_ids, _ = calibration_tokens(recipe, base, progress)
    model, stored_dtype, installed = base.model, base.model.dtype, versions()
    precision = resolve_precision(recipe.precision, model.device.type)
    if precision == "float32":
        model.float()
    token_ids = token_ids.to(model.device)
    generator = torch.Generator().manual_seed(recipe.seed)
    trainable = resolve_trainable(recipe, model)

    # Sparsity induction (arXiv 2602.21652) belongs here: it changes the base weights before anything is scored.
    with training_attention(model):
        block_losses, mixer_weights = run_block_phase_(
            model, token_ids, recipe, trainable, precision, generator, progress
        )
        final_kl = run_end_to_end_(model, token_ids, recipe, trainable, precision, generator, progress)
    record = {
        "base_model": base.identity,
        "recipe": recipe.model_dump(mode="json"),
        "resolved": {"precision": precision, "trainable": trainable},
        "data": {"calibration_sha256": token_hash(token_ids.cpu()), "calibration_tokens": token_ids.numel()},
        "versions": installed,
        "training": {
            "block_losses": block_losses,
            "end_to_end_kl": final_kl,
            "seconds": round(time.monotonic() - started, 1),
            "peak_bytes": peak_bytes(),
        },
    }
    save_model_(model, base, recipe, output, record, stored_dtype, mixer_weights)
    return ElasticCheckpoint(output)


def resolve_trainable(recipe: Recipe, model: Any) -> str:
    """What the end-to-end phase trains: "base", "adapters" or "off"; decides "auto" by the memory there is."""
    wanted = recipe.end_to_end
    if wanted.trainable == "off" or not wanted.steps:
        return "off"
    if wanted.trainable != "auto":
        return wanted.trainable
    shapes = [weight_OI(block.get_submodule(p)).shape for block in decoder_blocks(model) for p in _paths(model)]
    base = sum(o * i for o, i in shapes)
    adapters = sum(recipe.group_ranks()) * sum(o + i for o, i in shapes)
    tokens = wanted.batch_size * recipe.calibration.length
    width, depth = model.config.hidden_size, len(decoder_blocks(model))
    product = 2 if resolve_precision(recipe.precision, model.device.type) == "bfloat16" else 4  # bytes a number
    # Saved for the backward pass: the effective weight and its mask; per token about 60 bytes a width and block
    # (measured on SmolLM2-135M). Masks: drop level and one byte a pattern.
    common = 64 * tokens * width * depth + (2 * product + 1 + len(recipe.ladder.patterns)) * base
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    for choice, needed in (("base", (16 + product) * base + 16 * adapters), ("adapters", 16 * adapters)):
        if needed + common < 0.9 * free:
            return choice
    log.warning("end-to-end phase is off: %.1f GB are free, it would need more; use a smaller batch", free / 1e9)
    return "off"


def _paths(model: Any) -> tuple[str, ...]:
    return architecture_of(model.config.model_type).linears


def run_block_phase_(
    model: Any,
    token_ids: Tensor,
    recipe: Recipe,
    trainable: str,
    precision: str,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[list[dict[str, float]], Tensor]:
    """Masks and trains block by block; leaves elastic linears in the model.

    Returns: each block's losses by level, and its mixer weights (blocks, groups).
    """
    blocks, row, ladder = decoder_blocks(model), architecture_of(model.config.model_type), recipe.build_ladder()
    autocast = autocast_factory(precision, model.device.type)
    settings = BlockSettings(mixer_lr=recipe.mixer.lr, **recipe.block.model_dump(exclude={"samples"}))
    runner = BlockRunner(model.base_model, list(blocks), token_ids[: recipe.block.samples], recipe.block.batch_size)
    dense = runner.first_hidden()
    streams: list[Tensor] = [dense] * ladder.num_groups
    losses, mixed = [], []
    for index, block in enumerate(blocks):
        started, where, call = time.monotonic(), f"{row.blocks}.{index}", runner.call(index)
        linears = {path: block.get_submodule(path) for path in row.linears}
        gram = recipe.scores.method == "obs"
        with weights_in(linears.values(), precision):
            with autocast():
                target = runner.map(call, dense)
            statistics = block_statistics(runner, call, linears, streams, gram=gram, autocast=autocast, where=where)
        elastic = attach_elastic_(block, linears, statistics, recipe, trainable, precision, generator)
        mixer = FeatureMixer(recipe.mixer.mode, recipe.mixer_weights())
        found = train_block_(call, elastic, ladder, streams, dense, target, mixer, settings, generator, where, autocast)
        if index + 1 < len(blocks):
            with autocast():
                streams = block_outputs(call, runner.map, elastic, ladder, streams, dense, target, mixer, generator)
        dense = target
        losses.append(found)
        mixed.append(mixer.weights.detach())
        seconds = time.monotonic() - started
        log.info(
            "block %d/%d  %s  %.1f s  peak %.1f GB", index + 1, len(blocks), _losses(found), seconds, peak_bytes() / 1e9
        )
        progress("blocks", index + 1, len(blocks))
    return losses, torch.stack(mixed).cpu()


def attach_elastic_(
    block: nn.Module,
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    recipe: Recipe,
    trainable: str,
    precision: str,
    generator: torch.Generator,
) -> list[ElasticLinear]:
    """Scores and masks one block's linears and puts elastic ones in their place."""
    ladder, made = recipe.build_ladder(), []
    for path, linear in linears.items():
        weight = weight_OI(linear)
        scores = importance_scores(recipe.scores.method, weight, statistics[path], recipe.scores.damping, path)
        counts = [keep_count(weight.shape[1], s) for s in ladder.sparsities]
        drop_level = drop_levels(scores, counts) if counts else None
        densest = mask_at(drop_level, 0) if drop_level is not None and recipe.scores.patterns == "within" else None
        patterns = [pattern_mask(scores, *p, densest) for p in (level.pattern for level in ladder.levels) if p]
        elastic = ElasticLinear(
            linear,
            ladder,
            recipe.group_ranks(),
            inheritance=recipe.adapters.inheritance,
            drop_level_OI=drop_level,
            pattern_masks=patterns,
            train_base=trainable == "base" or recipe.block.base_lr > 0,
            teacher_dtype=torch.bfloat16 if precision == "bfloat16" else weight.dtype,
            generator=generator,
        )
        replace_module_(block, path, elastic)
        made.append(elastic)
    return made


def run_end_to_end_(
    model: Any,
    token_ids: Tensor,
    recipe: Recipe,
    trainable: str,
    precision: str,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, float]:
    """Trains all levels' logits towards the dense model's. Returns the final KL by level, empty if it is off."""
    if trainable == "off":
        return {}
    autocast = autocast_factory(precision, model.device.type)
    settings = EndToEndSettings(
        **recipe.end_to_end.model_dump(exclude={"trainable", "base_lr"}),
        base_lr=recipe.end_to_end.base_lr if trainable == "base" else 0.0,
    )
    with autocast():
        head = head_function(model)
    return train_end_to_end_(
        model,
        head,
        recipe.build_ladder(),
        token_ids,
        settings,
        generator,
        autocast,
        lambda done, total: progress("end to end", done, total),
    )


def save_model_(
    model: Any,
    base: BaseModel,
    recipe: Recipe,
    output: Path,
    record: dict[str, Any],
    stored_dtype: torch.dtype,
    mixer_weights: Tensor,
) -> None:
    """Writes a trained model's checkpoint.

    Raises: NumericsError: if training left NaN or infinity; OutputError.
    """
    check_finite_weights(model)
    records = {
        name: LinearRecord(
            weight_OI=e.weight.detach(),
            drop_level_OI=e.drop_level,
            pattern_masks=e.pattern_masks,
            pairs=[e.group_pair(group) for group in range(e.ladder.num_groups)],
            transposed=e.transposed,
        )
        for name, e in elastic_linears(model)
    }
    parts = tuple(f"{name}.{part}" for name in records for part in ("weight", "lora_A", "lora_B"))
    dense = {name: p.detach() for name, p in model.named_parameters() if name not in parts}
    dtype: str = recipe.checkpoint.dtype
    if dtype == "auto":
        dtype = str(stored_dtype).removeprefix("torch.")

    def save_extras(folder: Path) -> None:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)

    write_checkpoint(
        output,
        records,
        dense,
        ladder=recipe.build_ladder(),
        ranks=recipe.group_ranks(),
        inheritance=recipe.adapters.inheritance,
        dtype=dtype,
        record=record,
        save_extras=save_extras,
        optional={"mixer": {"weights": mixer_weights}},
    )


def _losses(losses: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in losses.items())


def peak_bytes() -> int:
    """Largest resident size this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(packages: Sequence[str] = ("elastic-sparsity", "torch", "transformers", "safetensors")) -> dict[str, str]:
    """Installed versions, for the checkpoint's record."""
    return {name: importlib.metadata.version(name) for name in packages}
