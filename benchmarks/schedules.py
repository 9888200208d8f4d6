"""What every trained method of the benchmarks runs: recipes made from the elastic one, on the same tokens. No model.

The accounting, in one place:

- Block phase: every step trains every group once, on one batch; a group serves one level here. So the elastic run
  spends `block.steps` batches a block on each level, and a run for one level does the same steps.
- End to end: one level a step in balanced order, so each level gets `end_to_end.steps` over the number of levels. Where
  that does not come out even, a run for one level takes the larger number. It reads the first of the same samples.
- Steps of other levels also move the adapters that a level inherits (2:4 inherits those of the densest level). That is
  what sharing gives, and is not charged to the level; but a run for one level gets adapters of the whole rank that the
  level adds up in the elastic checkpoint, so that it has as much to train.
- Full-weight block tuning has no end-to-end phase: it spends all of the level's tokens in each block.
- Statistics, dense targets and the teacher's logits are work, not training tokens: `cost.py` counts and times them.
- EPTS has no end-to-end phase: it gets steps until the *token-passes through blocks* of its whole run, all kinds
  alike, are those of the whole elastic run ("equal passes"). Its own steps are another run, on request. A step of
  either sees as many tokens as one of its code, which takes samples of 2,048: of shorter samples a batch.
"""

from pathlib import Path
from typing import Any

from elastic_sparsity import read_recipe
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.fold_choice import ORDERS
from elastic_sparsity.ladder import Level
from elastic_sparsity.model_shapes import ModelShapes
from elastic_sparsity.plan_sizes import Choices, Sizes
from elastic_sparsity.work_plan import Work, work_of

RECIPES = Path(__file__).parents[1] / "recipes"
UNPREPARED: dict[str, dict[str, Any]] = {
    "induction": {"folds": []},
    "allocation": {"search": False, "strength": None},
    "structured": {"fractions": []},
}
"""Leaves folds and search out: they would be most of a short run, and a search's length is not known before."""
FULL_LR = 3e-4
"""Of full-weight block tuning, unless told otherwise: what `smollm2-135m` trained base values with until 2026-11-29."""


def elastic(recipe: Recipe, seed: int) -> Recipe:
    """The recipe itself, with nothing left to the memory that happens to be free.

    Raises: ConfigError: if its levels' shares of the tokens are not fixed numbers.
    """
    if recipe.ladder.group_ends is not None:
        raise ConfigError("ladder.group_ends: groups of several levels draw one at random; give every level its own.")
    if recipe.allocation.plan is not None:
        raise ConfigError(
            "allocation.plan: is for the whole ladder, no run for one level can use it; use search = true."
        )
    trainable = {"auto": "base"}.get(recipe.end_to_end.trainable, recipe.end_to_end.trainable)
    return changed(recipe, {"end_to_end": {"trainable": trainable if recipe.end_to_end.steps else "off"}}, seed)


def level_steps(recipe: Recipe) -> tuple[int, int]:
    """(steps in each block, end-to-end steps) that the elastic run spends on every one of its levels, rounded up."""
    levels = len(recipe.build_ladder().levels)
    end_to_end = 0 if recipe.end_to_end.trainable == "off" else recipe.end_to_end.steps
    return recipe.block.steps, -(-end_to_end // levels)


def level_tokens(recipe: Recipe) -> int:
    """Training tokens through each block that a level gets: a run's of this module, and the elastic run's."""
    block, end_to_end = level_steps(recipe)
    return recipe.calibration.length * (block * recipe.block.batch_size + end_to_end * recipe.end_to_end.batch_size)


def without_induction(recipe: Recipe, shapes: ModelShapes) -> Recipe:
    """The elastic run without its induction stage, whose token-passes go into further end-to-end steps, rounded up.

    Args:
        recipe: of `elastic`.
    Raises: ConfigError: if it has no such stage, or nothing is trained end to end.
    """
    if not recipe.induction.is_asked or recipe.end_to_end.trainable == "off":
        raise ConfigError(
            "elastic-uninduced: needs a recipe with induction and an end-to-end phase; this one lacks one."
        )

    def without(steps: int) -> Recipe:
        induction = {"folds": [], "steps": 0, "reading": "scores"}
        return changed(recipe, {"induction": induction, "end_to_end": {"steps": steps}})

    steps, budget = recipe.end_to_end.steps, block_passes(recipe, shapes)
    spared = budget - block_passes(without(steps), shapes)
    one = block_passes(without(steps + 1), shapes) - block_passes(without(steps), shapes)
    return without(steps + -(-spared // one))


def independent(recipe: Recipe, level: Level, *, trainable: str = "as elastic", same_steps: bool = False) -> Recipe:
    """The recipe for one level alone, on the tokens that the elastic run spends on it.

    Args:
        recipe: of `elastic`.
        trainable: "as elastic", or "adapters": base values never move.
        same_steps: as many steps as the whole elastic run instead: what somebody who wants this level alone would run.
    """
    ladder = recipe.build_ladder()
    ranks = recipe.group_ranks()
    active = ladder.active_groups(level, recipe.adapters.inheritance)
    slopes = recipe.slopes()
    changes: dict[str, dict[str, Any]] = {
        "ladder": one_level(level),
        "adapters": {"ranks": sum(ranks[group] for group in active)},
        "mixer": {"weights": None},
        "scores": {"patterns": "free"},  # the only level there is
        "induction": {"folds": [kind for kind in recipe.induction.folds if level.pattern or kind not in ORDERS]},
        "allocation": {
            "slope": 0.0 if level.pattern else slopes[level.index],
            "search": recipe.allocation.search and not level.pattern,
            "strength": None if level.pattern else recipe.allocation.strength,
        },
        "structured": {"fractions": []},  # other models, and no level's tokens
    }
    if not same_steps:
        changes["end_to_end"] = {"steps": level_steps(recipe)[1]}
    if trainable == "adapters":
        changes["block"] = {"base_lr": 0.0}
        if recipe.end_to_end.trainable != "off":
            changes.setdefault("end_to_end", {})["trainable"] = "adapters"
    return changed(recipe, changes)


def full_weight(recipe: Recipe, level: Level, lr: float = FULL_LR, *, block_phase_only: bool = False) -> Recipe:
    """Block tuning of one level's kept weights, no adapters, no end-to-end phase (in the manner of EBFT, 2402.12419).

    All of the level's tokens go through each block, and of as many samples as they can hold: fewer would be read again
    and again while the elastic run goes on to new ones. Masks and dense targets are of all these samples.

    Args:
        block_phase_only: the elastic run's steps and samples of the block phase instead, none of its end-to-end ones.
    """
    block: dict[str, Any] = {"base_lr": lr}
    if not block_phase_only:
        batch = recipe.block.batch_size
        steps = -(-level_tokens(recipe) // (batch * recipe.calibration.length))
        samples = max(recipe.block.samples, min(recipe.calibration.samples, steps * batch))
        block |= {"steps": steps, "samples": samples}
    changes = {"block": block, "adapters": {"ranks": 0}, "end_to_end": {"trainable": "off"}}
    return changed(independent(recipe, level), changes)


def amounts(recipe: Recipe) -> dict[str, int]:
    """What a run trains on, for the record of a figure."""
    block, end_to_end = recipe.block, recipe.end_to_end
    found = {"block_steps": block.steps, "block_samples": block.samples, "block_batch": block.batch_size}
    is_off = end_to_end.trainable == "off"
    return found | {"end_to_end_steps": 0 if is_off else end_to_end.steps, "end_to_end_batch": end_to_end.batch_size}


def one_level(level: Level) -> dict[str, Any]:
    return {
        "sparsities": [] if level.pattern else [level.sparsity],
        "patterns": [level.name] if level.pattern else [],
    }


def epts(recipe: Recipe, shapes: ModelShapes, *, official: bool = False) -> Recipe:
    """EPTS's schedule (`recipes/epts-7b.toml`) on the elastic recipe's model and text.

    Args:
        recipe: of `elastic`.
        official: 1,280 steps a block on the tokens of 128 samples of 2,048 (fewer if the recipe has no more), as its
            code; else 128 samples of the recipe's length (more would leave little for training), and as many steps as
            make its token-passes those of the elastic run.
    """
    theirs = read_recipe(RECIPES / "epts-7b.toml")
    ends = theirs.ladder.group_ends or ()
    extra = [s for s in recipe.ladder.sparsities if s <= ends[-1] and s not in theirs.ladder.sparsities]
    sections = ("adapters", "mixer", "block", "scores", "induction", "allocation", "end_to_end")
    changes = {name: getattr(theirs, name).model_dump(mode="json") for name in sections}
    changes["structured"] = {"fractions": []}
    changes["ladder"] = {
        "sparsities": sorted([*theirs.ladder.sparsities, *extra]),
        "patterns": [],
        "group_ends": list(ends),
    }
    theirs_in_ours = max(1, round(theirs.calibration.length / recipe.calibration.length))
    samples = theirs.block.samples * (theirs_in_ours if official else 1)
    samples = min(samples, recipe.calibration.samples)
    changes["block"] |= {"batch_size": min(theirs_in_ours, samples), "samples": samples}
    if official:
        return changed(recipe, changes)

    def passes(steps: int) -> int:
        changes["block"]["steps"] = steps
        return block_passes(changed(recipe, changes), shapes)

    fixed, budget = passes(0), block_passes(recipe, shapes)
    steps = round((budget - fixed) / (passes(1) - fixed))
    if steps < 1:
        raise ConfigError("EPTS schedule: the elastic run's tokens do not give it one step a block; train longer.")
    changes["block"]["steps"] = steps
    return changed(recipe, changes)


def planned_work(recipe: Recipe, shapes: ModelShapes) -> list[Work]:
    """The package's plan of a run with the model in memory."""
    choices = Choices(
        weights="resident", activations="host", trainable=recipe.end_to_end.trainable, precision="float32", gpu=False
    )
    return work_of(Sizes(shapes, recipe, choices))


def block_passes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Planned token-passes through blocks, forward ones and those with a backward pass alike, the head's left out."""
    return sum(work.passes for work in planned_work(recipe, shapes) if not work.is_head)


def changed(recipe: Recipe, changes: dict[str, dict[str, Any]], seed: int | None = None) -> Recipe:
    """A recipe with single fields replaced."""
    data = recipe.model_dump(mode="json")
    for section, fields in changes.items():
        data[section] |= fields
    return make_recipe(data if seed is None else {**data, "seed": seed})
