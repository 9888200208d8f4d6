"""The induction stage of a recipe, within a run and on its own (`elastic-sparsity induce`).

First the folds beyond the paper, then one of the paper's three readings. On its own it writes a model.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.absorbed_stage import absorb_learned_, check_method
from elastic_sparsity.absorption import Pair, round_gains_, scale_pair_, scale_pairs
from elastic_sparsity.arch import architecture_of, decoder_blocks, head_function, not_finite
from elastic_sparsity.attention import training_attention
from elastic_sparsity.calibration_text import Progress, calibration_tokens, silent
from elastic_sparsity.config import Recipe
from elastic_sparsity.distill import Share
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.feature_stage import ROUNDING, BlockResult, StageSettings
from elastic_sparsity.files import atomic_folder, check_output_folder
from elastic_sparsity.fold_choice import (
    FOLDS,
    RESIDUAL_ORDER,
    FoldSettings,
    check_exact_folds,
    check_kinds,
    choose_folds_,
)
from elastic_sparsity.folding import check_function_kept, relative_error
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.induction import Induced, InductionSettings, input_statistics, learn_channel_scales
from elastic_sparsity.induction_file import save_scales
from elastic_sparsity.ladder import Level
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory, cast_parameters_, resolve_precision, to_computing_dtype_
from elastic_sparsity.residual import check_residual
from elastic_sparsity.residual_order import choose_residual_order_
from elastic_sparsity.wiring import check_equal_blocks
from elastic_sparsity.workers import Workers

log = logging.getLogger(__name__)
SEED = 1_000_003  # apart from the run's own generator, so that the stage changes no later random choice
LOG_WIDEST = math.log(1e3)  # absorbed scales stay within this factor: a channel that is never active has norm 0
TRIED_TOKENS = 64


def learn(
    recipe: Recipe, base: BaseModel, token_ids_ST: Tensor, precision: str, workers: Workers, progress: Progress = silent
) -> Induced:
    """Runs a recipe's `induction` section on a model that is whole in memory; the model comes back as it was.

    Raises: ConfigError, NumericsError.
    """
    wanted, model = recipe.induction, base.model
    autocast = autocast_factory(precision, model.device.type)
    with autocast():
        head = head_function(model)
    share = Share(
        places=workers.places(wanted.batch_size, "induction.batch_size"),
        num_samples=token_ids_ST.shape[0],
        mean=workers.mean,
        mean_gradients_=workers.mean_gradients_,
    )
    return learn_channel_scales(
        model,
        head,
        recipe.build_ladder(),
        token_ids_ST,
        "magnitude" if recipe.scores.method == "magnitude" else "wanda",
        InductionSettings(**wanted.model_dump(exclude={"reading", "folds", "spectral", "penalty", "start"})),
        torch.Generator().manual_seed(recipe.seed + SEED),
        autocast,
        share,
        lambda done, total: progress("induction", done, total),
        workers.sum_,
    )


def check_base_model(recipe: Recipe, base: BaseModel) -> None:
    """That a run can do with its model what its `induction` section asks for: before hours of work, not in the middle.

    Raises: ConfigError, UnsupportedModelError. AbsorptionError: if the architecture has no exact form of a fold.
    """
    if recipe.induction.changes_weights:
        check_equal_blocks(base.model.config, "induction")
        if base.channel_scales:
            raise ConfigError(
                f"{base.identity['id']}: holds scales that were learned for its weights as they are, which "
                "induction.folds and reading = 'absorbed' would change; leave these out, or give the original model."
            )
        check_exact_folds(base.model, recipe.induction.folds)
        if RESIDUAL_ORDER in recipe.induction.folds:
            check_residual(base.model)


def change_weights_(
    recipe: Recipe,
    base: BaseModel,
    token_ids_ST: Tensor,
    precision: str,
    progress: Progress = silent,
    dtype: torch.dtype | None = None,
) -> list[BlockResult]:
    """The recipe's folds, then the scales of reading "absorbed": other weights, the same function.

    Args:
        dtype: of the weights afterwards; None = as before.
    Raises: ConfigError, UnsupportedModelError, NumericsError. AbsorptionError: a fold is not exact here, or the logits
        moved.
    """
    with _function_kept(base.model, token_ids_ST, dtype or base.model.dtype):
        blocks = fold(recipe, base, token_ids_ST, precision, progress) if recipe.induction.folds else []
        if recipe.induction.reading == "absorbed":
            blocks += absorb(recipe, base, token_ids_ST, precision, progress)
    return blocks


def round_all_gains_(model: Any, dtype: torch.dtype) -> None:
    """`round_gains_` in every block, if the model's dtype is finer than the one its weights will be kept in."""
    if torch.finfo(dtype).eps > torch.finfo(model.dtype).eps:
        for block in decoder_blocks(model):
            round_gains_(block, model.config, dtype)


def summary(results: Sequence[BlockResult]) -> dict[str, dict[str, Any]]:
    """By kind of change: blocks, blocks changed, and by level the held-out error behind it over the one before.

    Ratios are geometric means over the blocks. Of the residual order, which is the whole model's, they are those of the
    squared scores that N:M drops.
    """
    by_kind: dict[str, list[BlockResult]] = {}
    for result in results:
        by_kind.setdefault(getattr(result, "kind", "absorbed"), []).append(result)
    found = {}
    for kind, blocks in by_kind.items():
        ratios = {
            level: math.exp(sum(_log(x.after[level]) - _log(x.before[level]) for x in blocks if x.used) / len(blocks))
            for level in blocks[0].before
        }
        found[kind] = {"blocks": len(blocks), "changed": sum(x.used for x in blocks), "error_ratio": ratios}
    return found


def _log(error: float) -> float:
    return math.log(max(error, ROUNDING))


@contextmanager
def _function_kept(model: Any, token_ids_ST: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Weights are float32 inside, and `dtype` behind it; the logits must be those of before.

    Raises: AbsorptionError: on leaving, if they moved. NumericsError: a weight that `dtype` cannot hold.
    """
    cast_parameters_(model, torch.float32)
    before = _logits(model, token_ids_ST)
    yield
    error = check_function_kept(before, _logits(model, token_ids_ST), torch.float32)
    log.info("induction: absorbed; the logits moved by %.1e of their largest, which is rounding", error)
    if dtype != torch.float32:  # the base model's weights were exact in it, those made of them are not
        round_all_gains_(model, dtype)
        cast_parameters_(model, dtype)
        if bad := not_finite(model):
            raise NumericsError(
                f"induction: {', '.join(bad[:5])}: folding gives weights that {dtype} cannot hold; give model.dtype = "
                "'float32' or 'bfloat16'."
            )
        cast_parameters_(model, torch.float32)
        rounded = relative_error(before, _logits(model, token_ids_ST))
        log.info("induction: rounding to %s, as the base model is stored, moves the logits by %.1e", dtype, rounded)
        cast_parameters_(model, dtype)


def induce(recipe: Recipe, output: str | Path, progress: Progress = silent) -> Induced:
    """Writes a plain Hugging Face model that computes what the base model computes but is easier to prune.

    First the recipe's `induction.folds`, then its reading. "scores": norms and linears absorb scales (`absorption`)
    such that the magnitude of a weight is its scaled importance: any pruner that goes by magnitude profits. Scores with
    activations undo such scales, so what was learned is written beside the model too (`induction_file`): elastic runs
    take it from there, `prune_one_shot_` takes it when given. "norms": the same with scales of 1, in closed form, so
    that N:M by magnitude is N:M by Wanda. "absorbed": scales and shifts learned on features stay in the weights alone.

    Returns: what was learned; without scales unless the reading is "scores" and has steps.
    Raises: ConfigError: nothing to do, a reading that is no stage before pruning, or anything the base model or text is
        refused for. AbsorptionError: if a fold is not exact here, or the logits moved. OutputError.
    """
    wanted = recipe.induction
    _check_can_induce(recipe)
    output = Path(output)
    check_output_folder(output)
    base = load_base(recipe.model.id, recipe.model.dtype)
    check_equal_blocks(base.model.config, "induce")
    check_base_model(recipe, base)
    token_ids_ST, _ = calibration_tokens(recipe, base, progress)
    token_ids_ST, model = token_ids_ST.to(base.model.device), base.model
    precision, dtype, blocks = resolve_precision(recipe.precision, model.device.type), model.dtype, []
    learns, closed = wanted.reading == "scores" and wanted.steps > 0, wanted.reading == "norms"
    to_computing_dtype_(model, precision)
    if wanted.changes_weights:
        behind = model.dtype if learns or closed else dtype  # rounded once, at the end
        blocks = change_weights_(recipe, base, token_ids_ST, precision, progress, behind)
    found = Induced(scales={}, input_norms={}, kl_before={}, kl_after={}, used=any(x.used for x in blocks))
    if learns:
        with training_attention(model), fused_layers(model):
            found = learn(recipe, base, token_ids_ST, precision, Workers(), progress)
    elif closed:
        norms = input_norms(model, token_ids_ST[: wanted.samples], wanted.batch_size, precision)
        found = replace(found, input_norms=norms, used=True)
    if learns or closed:
        importance = {name: norm_I * found.scales.get(name, 1.0) for name, norm_I in found.input_norms.items()}
        with _function_kept(model, token_ids_ST, dtype):
            absorb_importance_(model, importance, rows_apart=only_patterns(recipe.build_ladder().levels))
    with atomic_folder(output) as scratch:
        model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        if found.scales:
            save_scales(scratch, found.scales)
    return replace(found, blocks=tuple(blocks))


def input_norms(model: Any, token_ids_ST: Tensor, batch_size: int, precision: str) -> dict[str, Tensor]:
    """Norm of every input channel of every linear over the samples, (I,) by linear name."""
    device, share = model.device.type, Share(places=range(batch_size), num_samples=token_ids_ST.shape[0])
    found = input_statistics(
        model, token_ids_ST, share, batch_size, autocast_factory(precision, device), lambda _: None
    )
    return {name: statistics.square_sum_I.sqrt() for name, statistics in found.items()}


def _check_can_induce(recipe: Recipe) -> None:
    if not recipe.induction.is_asked:
        raise ConfigError("induction.steps: 0 steps learn nothing; expected 1 or more, or some induction.folds.")
    if recipe.induction.reading == "norms":
        check_kinds(recipe.induction.folds, recipe.build_ladder(), (RESIDUAL_ORDER, *FOLDS))
    else:
        check_stages(recipe)
    learns = recipe.induction.reading == "scores" and recipe.induction.steps > 0
    if learns and recipe.scores.method == "magnitude":
        raise ConfigError("scores.method: 'magnitude' would learn scales that know no input; use 'wanda'.")


def check_stages(recipe: Recipe) -> None:
    """That the `induction` section is one of stages before pruning.

    Raises: ConfigError.
    """
    wanted = recipe.induction
    if wanted.reading == "gains":
        raise ConfigError(
            "induction.reading: 'gains' are tuned after masking, one level at a time, and change what the dense model "
            "computes; expected 'scores' or 'absorbed'. Call gains.tune_gains_ behind prune_one_shot_."
        )
    if wanted.reading == "norms":
        raise ConfigError(
            "induction.reading: 'norms' makes weights' magnitudes Wanda's scores, for other pruners (`induce`); "
            "in a run use scores.method = 'wanda', which is the same."
        )
    if wanted.reading == "absorbed" and not wanted.steps:
        raise ConfigError("induction.steps: 0 steps absorb nothing; expected 1 or more, or reading = 'scores'.")
    if wanted.reading == "absorbed":
        check_method(recipe.scores.method)
    check_kinds(wanted.folds, recipe.build_ladder(), (RESIDUAL_ORDER, *FOLDS))


def fold(
    recipe: Recipe, base: BaseModel, token_ids_ST: Tensor, precision: str, progress: Progress = silent
) -> list[BlockResult]:
    """The recipe's `induction.folds`, chosen on its first `samples` and its last `held_out` calibration samples.

    Raises: ConfigError, AbsorptionError.
    """
    wanted, ladder = recipe.induction, recipe.build_ladder()
    found: list[BlockResult] = []
    samples_ST = _few(token_ids_ST, wanted.samples, wanted.held_out)
    autocast = autocast_factory(precision, base.model.device.type)
    of_blocks = [kind for kind in wanted.folds if kind != RESIDUAL_ORDER]
    if RESIDUAL_ORDER in wanted.folds:
        check_exact_folds(base.model, of_blocks)  # which `choose_folds_` does only behind it
        found.append(choose_residual_order_(base.model, samples_ST, ladder, wanted.held_out, autocast))
    if of_blocks:
        settings = FoldSettings(held_out=wanted.held_out)
        report = partial(progress, "folds")
        found += choose_folds_(base.model, samples_ST, ladder, of_blocks, settings, autocast, report)
    return found


def absorb(
    recipe: Recipe, base: BaseModel, token_ids_ST: Tensor, precision: str, progress: Progress = silent
) -> list[BlockResult]:
    """Reading "absorbed", on as many samples as `fold`; the learning rate is OmniQuant's, not `induction.lr`.

    Raises: ConfigError, NumericsError.
    """
    wanted = recipe.induction
    return absorb_learned_(
        base.model,
        _few(token_ids_ST, wanted.samples, wanted.held_out),
        recipe.build_ladder(),
        recipe.scores.method,
        StageSettings(
            steps=wanted.steps,
            held_out=wanted.held_out,
            spectral=wanted.spectral,
            penalty=wanted.penalty,
            temperature=wanted.temperature,
            paper_start=wanted.start == "medians",
        ),
        torch.Generator().manual_seed(recipe.seed + SEED),
        autocast_factory(precision, base.model.device.type),
        lambda done, total: progress("induction", done, total),
    )


def _few(token_ids_ST: Tensor, samples: int, held_out: int) -> Tensor:
    """The first samples and, without overlap, the last ones."""
    given = min(samples, len(token_ids_ST) - held_out)
    return torch.cat([token_ids_ST[:given], token_ids_ST[len(token_ids_ST) - held_out :]])


@torch.no_grad()
def _logits(model: Any, token_ids_ST: Tensor) -> Tensor:
    logits: Tensor = model(token_ids_ST[:1, :TRIED_TOKENS], use_cache=False).logits
    return logits


def only_patterns(levels: Sequence[Level]) -> bool:
    """Whether magnitudes are only ever compared within a row: N:M groups are, other levels order the whole matrix."""
    return all(level.pattern for level in levels)


def absorb_importance_(model: Any, importance: Mapping[str, Tensor], *, rows_apart: bool) -> None:
    """Folds every input channel's importance into the weights, wherever the architecture has an exact pair for it.

    The function is kept; a weight's magnitude becomes |weight| times the importance of its input, up to a common factor
    of the linear. Linears that share a producer share the scale: the geometric mean of what they ask for.

    Args:
        importance: positive (I,) by linear name.
        rows_apart: whether only weights of one row will be compared. If not, only what comes from a norm takes its
            importance: a linear that produces the channels has its rows divided by it, and then whole rows of it go
            (SmolLM2-135M by magnitude at 50 %: perplexity 598 as it is, 126 behind norms alone, 242,004 everywhere).
    """
    prefix = architecture_of(model.config.model_type).blocks
    for index, block in enumerate(decoder_blocks(model)):
        for pair in scale_pairs(block, model.config):
            if pair.consumers and (rows_apart or pair.kind == "norm"):
                scale_pair_(block, pair, _wanted_scales(pair, f"{prefix}.{index}", importance))


def _wanted_scales(pair: Pair, where: str, importance: Mapping[str, Tensor]) -> Tensor:
    """(pair.num_values,) float64: geometric means over all input channels that take a value, 1 on average."""
    sums, counts = (torch.zeros(pair.num_values, dtype=torch.float64) for _ in range(2))
    for side in pair.multiplied:
        wanted = importance[f"{where}.{side.path}"].double().cpu()[side.channels_N.cpu()]
        logs = wanted.clamp_min(torch.finfo(torch.float32).tiny).log()
        logs = logs - logs.median()
        sums.index_add_(0, side.values_N.cpu(), logs.clamp(-LOG_WIDEST, LOG_WIDEST))
        counts.index_add_(0, side.values_N.cpu(), torch.ones_like(logs))
    logs = sums / counts
    return (logs - logs.mean()).exp()
