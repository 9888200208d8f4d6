"""From a base model to an allocation plan: scores, cheap allocations, descent, evolution.

What `elastic-sparsity search` does, and the first stage of a recipe that asks for it.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.allocation import (
    SLOPES,
    Kept,
    Moves,
    bounds,
    by_depth,
    by_outliers,
    fitted,
    from_the_middle,
    trade,
    uniform,
)
from elastic_sparsity.allocation_file import (
    AllocationPlan,
    DescentPlan,
    LinearPlan,
    check_made,
    check_unfinished,
    load_plan,
    save_plan,
)
from elastic_sparsity.attention import training_attention
from elastic_sparsity.calibration_text import Progress, calibration_tokens, silent
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.descent import Descended, DescentSettings, Prices, descend, moved_by, settings_for
from elastic_sparsity.errors import ConfigError, OutputError
from elastic_sparsity.files import check_output_file
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory, dtype_name, resolve_precision, to_computing_dtype_
from elastic_sparsity.search import Generation, Judge, SearchSettings, evolve
from elastic_sparsity.supernet import Supernet, TopKL
from elastic_sparsity.wiring import check_equal_blocks

log = logging.getLogger(__name__)
Keep = Callable[[dict[str, Any], Kept], None]  # (fields of one level, what it keeps)

METHODS = ("search", "descent", "arithmetic", "owl", "uniform")
DESCENDING = ("search", "descent")
COARSE = (4, 2, 1)  # quanta of a search's first, second and last third
WIDE = (0.7, 0.4, 0.1)  # and its share of moves of whole types and blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocating:
    """How a plan is made.

    Attributes:
        method: "descent" from the best of the cheap ones; "search", which goes on from there by evolution, if it is
            given generations; or a cheap one alone: "arithmetic", "owl", "uniform".
        held_out: calibration samples, the last ones, that judge allocations.
    """

    method: str = "descent"
    held_out: int = 16
    descent: DescentSettings = field(default_factory=DescentSettings)
    search: SearchSettings = field(default_factory=lambda: SearchSettings(generations=0))

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} is unknown; expected one of {', '.join(METHODS)}.")

    @property
    def generations(self) -> int:
        """Of each level's evolution."""
        return self.search.generations if self.method == "search" else 0


def allocate(recipe: Recipe, wanted: Allocating, output: Path, progress: Progress = silent) -> AllocationPlan:
    """Writes the plan for a recipe's model, text and unstructured levels; goes on with an unfinished one.

    Raises: ConfigError: no unstructured level, too few samples, or what the model or text is refused for. OutputError:
        the output holds a finished plan, or another search's.
    """
    _check_samples(recipe, wanted)
    begun = _unfinished(output)
    if begun is not None:  # before the model is loaded, and text is sampled
        check_made(begun, _asked(recipe, wanted), recipe.ladder.sparsities, output)
    base = load_base(recipe.model.id, recipe.model.dtype)
    check_equal_blocks(base.model.config, "search")
    token_ids_ST, _ = calibration_tokens(recipe, base, progress)
    dtype = base.model.dtype
    to_computing_dtype_(base.model, resolve_precision(recipe.precision, base.model.device.type))  # as a run does
    scales = base.scales_of(recipe.scores.method)
    return allocate_on(base, token_ids_ST, recipe, wanted, output, begun, progress, dtype=dtype, channel_scales=scales)


def _asked(recipe: Recipe, wanted: Allocating) -> dict[str, Any]:
    """What of a plan's `made` is known before there is a model."""
    return {
        "method": wanted.method,
        "descent": asdict(wanted.descent) if wanted.method in DESCENDING else None,
        "search": asdict(wanted.search) if wanted.method == "search" else None,
        "held_out": wanted.held_out, "scores": recipe.scores.method, "damping": recipe.scores.damping,
        "samples": recipe.block.samples, "seed": recipe.seed,
    }  # fmt: skip


def _check_samples(recipe: Recipe, wanted: Allocating) -> None:
    if not recipe.ladder.sparsities:
        raise ConfigError("allocation: only unstructured levels have one; name at least one, e.g. 0.6.")
    stage = max(wanted.search.windows) if wanted.generations else 1
    if recipe.calibration.samples <= wanted.held_out or wanted.held_out < stage:
        raise ConfigError(
            f"allocation: {recipe.calibration.samples} calibration samples, {wanted.held_out} of them held out; a "
            f"stage of the search takes {stage}, and at least one must be left to score with."
        )


def allocate_on(
    base: BaseModel,
    token_ids_ST: Tensor,
    recipe: Recipe,
    wanted: Allocating,
    output: Path,
    begun: AllocationPlan | None,
    progress: Progress,
    *,
    dtype: torch.dtype,
    channel_scales: Mapping[str, Tensor],
) -> AllocationPlan:
    """`allocate` on a model that is whole in memory; its weights come back as they were.

    Args:
        begun: the unfinished plan at `output`, if there is one.
        dtype: in which the model was loaded, which its hash depends on.
        channel_scales: learned scales of the scores, by linear.
    """
    sparsities, scored = recipe.ladder.sparsities, recipe.calibration.samples - wanted.held_out
    made = _made(base, token_ids_ST, recipe, wanted, dtype)
    autocast = autocast_factory(made["precision"], made["device"])
    net = Supernet(base.model)
    plan = _new_plan(net, sparsities, json.loads(json.dumps(made)))
    if begun is not None:
        check_unfinished(begun, plan, output)
        plan = begun
    try:
        with training_attention(base.model), fused_layers(base.model):
            loss = TopKL(base.model, token_ids_ST[scored:], autocast)
            net.score_(
                token_ids_ST[: min(scored, recipe.block.samples)],
                sparsities,
                recipe.scores.method,
                recipe.scores.damping,
                recipe.block.batch_size,
                autocast,
                lambda done, total: progress("scores", done, total),
                channel_scales=channel_scales,
            )

            def judge(kept: Sequence[int], windows: Sequence[int]) -> float:
                net.apply_(kept)
                return loss(windows)

            def prices(kept: Sequence[int]) -> Prices:
                net.apply_(kept)
                return [curve.tolist() for curve in net.prices(lambda: loss.backward(range(wanted.held_out)))]

            return _levels(net, plan, wanted, judge, prices, recipe.seed, output, progress)
    finally:
        net.restore_()


def _made(
    base: BaseModel, token_ids_ST: Tensor, recipe: Recipe, wanted: Allocating, dtype: torch.dtype
) -> dict[str, Any]:
    """All that a plan depends on."""
    device = base.model.device.type
    return {
        **_asked(recipe, wanted), "base_model": base.identity, "dtype": dtype_name(dtype),
        "calibration_sha256": token_hash(token_ids_ST), "precision": resolve_precision(recipe.precision, device),
        "device": device,
    }  # fmt: skip


def plan_in_run(
    base: BaseModel,
    token_ids_ST: Tensor,
    recipe: Recipe,
    file: Path,
    progress: Progress,
    *,
    dtype: torch.dtype,
    channel_scales: Mapping[str, Tensor],
) -> AllocationPlan:
    """The plan that a recipe's `[allocation] search` asks for: the one in the file, made or finished there if need be.

    Args:
        dtype, channel_scales: as in `allocate_on`.
    Raises: ConfigError, OutputError: damaged, or of another run.
    """
    wanted = Allocating(held_out=recipe.allocation.held_out, descent=settings_for(recipe.allocation_strength))
    _check_samples(recipe, wanted)
    begun = load_plan(file) if file.exists() else None
    if begun is not None and begun.finished:
        check_made(begun, _made(base, token_ids_ST, recipe, wanted, dtype), recipe.ladder.sparsities, file)
        return begun
    return allocate_on(
        base, token_ids_ST, recipe, wanted, file, begun, progress, dtype=dtype, channel_scales=channel_scales
    )


def _unfinished(output: Path) -> AllocationPlan | None:
    """The search that was begun there.

    Raises: OutputError: what is there is finished or no plan.
    """
    check_output_file(output)
    if not output.exists():
        return None
    plan = load_plan(output)
    if plan.finished:
        raise OutputError(f"{output}: holds a finished plan; name another output or delete it.")
    return plan


def _new_plan(net: Supernet, sparsities: Sequence[float], made: dict[str, Any]) -> AllocationPlan:
    levels = [uniform(net.sizes, sparsity) for sparsity in sparsities]
    linears = {
        size.name: LinearPlan(shape=[size.rows, size.width], kept=[kept[i] for kept in levels])
        for i, size in enumerate(net.sizes)
    }
    return AllocationPlan(
        sparsities=list(sparsities), linears=linears, losses={}, held_out_kl={}, finished=False, made=made
    )


def _levels(
    net: Supernet,
    plan: AllocationPlan,
    wanted: Allocating,
    judge: Judge,
    prices: Callable[[Sequence[int]], Prices],
    seed: int,
    output: Path,
    progress: Progress,
) -> AllocationPlan:
    """Level after level from the middle one, each from its best cheap allocation."""
    done: dict[int, Kept] = {}
    for level in from_the_middle(len(plan.sparsities)):
        name, (low, high) = repr(plan.sparsities[level]), bounds(net.sizes, done, level, plan.sparsities)

        def keep(change: dict[str, Any], kept: Kept, level: int = level, name: str = name) -> None:
            nonlocal plan
            plan = _updated(plan, level, name, kept, change)
            save_plan(output, plan)

        if name not in plan.held_out_kl:
            kept, loss = _cheap(net, level, plan.sparsities, wanted, judge, low, high, done)
            keep({"losses": [], "held_out_kl": [loss]}, kept)
        if len(plan.held_out_kl[name]) == 1:
            if wanted.method in DESCENDING and not plan.losses[name]:
                _descend(net, plan, level, wanted, judge, prices, low, high, keep, progress)

            descended = plan.descents.get(name)
            loss, kept = min(descended.losses if descended else plan.held_out_kl[name]), plan.level(level)
            if wanted.generations:
                kept = plan.before.get(name, kept)
                keep({"before": kept}, plan.level(level))
                loss, kept = _evolved(net, plan, level, wanted, judge, (loss, kept), low, high, seed, keep, progress)
            keep({"held_out_kl": [*plan.held_out_kl[name], loss]}, kept)
        done[level] = plan.level(level)
    plan = plan.model_copy(update={"finished": True, "before": {}})
    save_plan(output, plan)
    return plan


def _descend(
    net: Supernet,
    plan: AllocationPlan,
    level: int,
    wanted: Allocating,
    judge: Judge,
    prices: Callable[[Sequence[int]], Prices],
    low: Kept,
    high: Kept,
    keep: Keep,
    progress: Progress,
) -> None:
    name, steps = repr(plan.sparsities[level]), wanted.descent.steps
    begun = plan.descents.get(name)
    state = (plan.held_out_kl[name], 0.0, 0) if begun is None else begun.state

    def on_step(now: Descended) -> None:
        keep({"descents": DescentPlan(losses=now.losses, curvature=now.curvature, stalled=now.stalled)}, now.kept)
        log.info("descent %s: step %d, KL %.4f, best %.4f", name, len(now.losses) - 1, now.losses[-1], now.loss)
        progress(f"descent {name}", len(now.losses) - 1, steps)

    rules = trade(net.sizes)

    def move(kept: Kept, found: Prices, curvature: float) -> Kept:
        return moved_by(kept, found, rules, low, high, wanted.descent.radius, curvature)

    descend(
        Descended(plan.level(level), *state), lambda kept: judge(kept, range(wanted.held_out)), prices,
        move, rules.steps, wanted.descent, on_step,
    )  # fmt: skip


def _evolved(
    net: Supernet,
    plan: AllocationPlan,
    level: int,
    wanted: Allocating,
    judge: Judge,
    start: tuple[float, Kept],
    low: Kept,
    high: Kept,
    seed: int,
    keep: Keep,
    progress: Progress,
) -> tuple[float, Kept]:
    """The best of evolution and of what it starts from, with its loss on all held-out windows, as `start` has it.

    Generations are judged on some of the windows: what is best on them may be worse on all.
    """
    name = repr(plan.sparsities[level])

    def on_generation(now: Generation) -> None:
        keep({"losses": now.losses}, now.kept)
        log.info("search %s: generation %d, KL %.4f", name, len(now.losses), now.losses[-1])
        progress(f"search {name}", len(now.losses), wanted.generations)

    found = evolve(
        Generation(plan.level(level), plan.losses[name]), judge, wanted.held_out,
        partial(_moves, net, wanted.generations), low, high, wanted.search, f"{seed} {name}", on_generation,
    )  # fmt: skip
    return min(start, (judge(found.kept, range(wanted.held_out)), found.kept), key=lambda x: x[0])


def _moves(net: Supernet, generations: int, number: int) -> Moves:
    third = min(len(COARSE) - 1, len(COARSE) * number // max(1, generations))
    types = net.depths.count(0)
    everything = range(len(net.sizes))
    by_type = tuple(tuple(everything[place::types]) for place in range(types))
    by_block = tuple(tuple(everything[start : start + types]) for start in everything[::types])
    return Moves(trade=trade(net.sizes, coarse=COARSE[third]), families=(by_type, by_block), wide=WIDE[third])


def _cheap(
    net: Supernet,
    level: int,
    sparsities: Sequence[float],
    wanted: Allocating,
    judge: Judge,
    low: Kept,
    high: Kept,
    done: dict[int, Kept],
) -> tuple[Kept, float]:
    """The best of the allocations that cost no search, and its loss on all held-out windows."""
    sparsity = sparsities[level]
    base, rules = uniform(net.sizes, sparsity), trade(net.sizes)
    shapes: dict[str, list[float]] = {}
    if wanted.method in (*DESCENDING, "uniform"):
        shapes["uniform"] = [float(kept) for kept in base]
    if wanted.method in (*DESCENDING, "owl"):
        shapes["owl"] = by_outliers(net.sizes, net.depths, sparsity, net.outliers)
    if wanted.method in (*DESCENDING, "arithmetic"):
        shapes |= {f"arithmetic {slope}": by_depth(net.sizes, net.depths, sparsity, slope) for slope in SLOPES}
    if wanted.method in DESCENDING:  # as a neighbouring level differs from its uniform one
        for other, kept in done.items():
            flat = uniform(net.sizes, sparsities[other])
            shapes[f"like {sparsities[other]}"] = [b + k - f for b, k, f in zip(base, kept, flat, strict=True)]
    found: dict[str, tuple[float, Kept]] = {}
    for name, shape in shapes.items():
        kept = fitted(shape, base, rules, low, high)
        found[name] = (judge(kept, range(wanted.held_out)), kept)
        log.info("allocation %s of level %s: KL %.4f", name, sparsity, found[name][0])
    loss, kept = min(found.values(), key=lambda x: x[0])
    return kept, loss


def _updated(plan: AllocationPlan, level: int, name: str, kept: Kept, change: dict[str, Any]) -> AllocationPlan:
    """With what one level keeps, and what else changed of it, by field."""
    linears = {}
    for (path, linear), count in zip(plan.linears.items(), kept, strict=True):
        counts = list(linear.kept)
        counts[level] = count
        linears[path] = linear.model_copy(update={"kept": counts})
    fields = {field: {**getattr(plan, field), name: value} for field, value in change.items()}
    return plan.model_copy(update={"linears": linears, **fields})
