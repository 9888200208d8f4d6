"""The plan that `elastic-sparsity search` writes and a recipe names: weights kept a row, by linear and level. JSON.

An unfinished search keeps its state in the same file, after every generation.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from elastic_sparsity.allocation import Kept, Size, total, uniform
from elastic_sparsity.errors import ConfigError, OutputError, brief
from elastic_sparsity.files import write_json

MAX_BYTES = 64 << 20


class LinearPlan(BaseModel):
    """One linear: its (O, I) shape, and weights kept a row at every level, densest first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    shape: list[int] = Field(min_length=2, max_length=2)
    kept: list[int]


class DescentPlan(BaseModel):
    """Where a level's descent stands, see `descent.Descended`.

    Only the next step needs `curvature` and `stalled`, and a finished plan has none: one of a version that did not
    note them yet serves as well. An unfinished one does not, see `check_unfinished`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    losses: list[FiniteFloat] = Field(min_length=1)
    curvature: FiniteFloat | None = None
    stalled: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, data: Any) -> Any:
        """`refused` is what plans counted before `stalled`: no step goes by it any more."""
        if isinstance(data, dict) and type(data.get("refused")) is int:
            return {name: value for name, value in data.items() if name != "refused"}
        return data

    @property
    def state(self) -> tuple[list[float], float, int]:
        """Losses, curvature and stalled of a descent that can go on: `check_unfinished` let it pass."""
        assert self.curvature is not None and self.stalled is not None
        return self.losses, self.curvature, self.stalled


class AllocationPlan(BaseModel):
    """All linears of a model.

    Attributes:
        sparsities: of the levels, densest first.
        losses: the parent's KL to the dense model after each generation, by level; other text in every generation.
        held_out_kl: of the start and of what was found, on all held-out text, by level.
        descents: KL of every step on all held-out text, and what the next step goes by, by level.
        before: what an evolution that is under way began with, by level.
        finished: whether all levels are final.
        made: how it was made: method, model, text, seed, arithmetic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal["elastic-sparsity-allocation"] = "elastic-sparsity-allocation"
    format_version: Literal[1] = 1
    sparsities: list[FiniteFloat]
    linears: dict[str, LinearPlan]
    losses: dict[str, list[FiniteFloat]]
    held_out_kl: dict[str, list[FiniteFloat]]
    descents: dict[str, DescentPlan] = {}
    before: dict[str, list[int]] = {}
    finished: bool
    made: dict[str, Any]

    def level(self, index: int) -> Kept:
        """Kept weights a row of one level, by linear."""
        return [linear.kept[index] for linear in self.linears.values()]


def save_plan(path: Path, plan: AllocationPlan) -> None:
    """Raises: OutputError: the path cannot be written."""
    write_json(path, plan.model_dump(exclude=None if plan.before else {"before"}), sync=True)


def load_plan(path: Path) -> AllocationPlan:
    """Raises: ConfigError: missing, no plan, or of another version."""
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        if path.stat().st_size > MAX_BYTES:
            raise OSError(f"{path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        return AllocationPlan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{path}: no allocation plan: {brief(place)}: {brief(problem['msg'])}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable allocation plan: {brief(error)}.") from None


def check_unfinished(plan: AllocationPlan, fresh: AllocationPlan, path: Path) -> None:
    """Whether a search that would make `fresh` can go on with what was kept of it.

    Raises: OutputError: another search's, of a version that noted less, or damaged.
    """
    for level, descent in plan.descents.items():
        if descent.curvature is None or descent.stalled is None:
            raise OutputError(
                f"{path}: holds an unfinished search of an older version, which did not note curvature and stalled "
                f"(descents.{brief(level)}); it cannot go on: delete it or name another output."
            )
    check_made(plan, fresh.made, fresh.sparsities, path)
    names = [repr(sparsity) for sparsity in fresh.sparsities]
    sizes = [Size(name=name, rows=x.shape[0], width=x.shape[1]) for name, x in fresh.linears.items()]
    intact = list(plan.linears) == list(fresh.linears) and all(
        x.shape == [size.rows, size.width] and len(x.kept) == len(names) and all(1 <= n <= size.width for n in x.kept)
        for x, size in zip(plan.linears.values(), sizes, strict=True)
    )
    begun = plan.held_out_kl.keys()
    intact = intact and begun == plan.losses.keys() and begun <= set(names) and plan.descents.keys() <= begun
    intact = intact and all(len(kl) in (1, 2) for kl in plan.held_out_kl.values())
    intact = intact and plan.before.keys() <= begun
    for i, name in enumerate(names):
        budget = total(sizes, fresh.level(i))
        for kept in (plan.level(i), plan.before.get(name, plan.level(i))) if intact else ():
            intact = intact and len(kept) == len(sizes) and total(sizes, kept) == budget
    if not intact:
        raise OutputError(f"{path}: holds a damaged search; delete it or name another output.")


def check_made(plan: AllocationPlan, made: dict[str, Any], sparsities: Sequence[float], path: Path) -> None:
    """That a search is of these settings, as far as they are known.

    Raises: OutputError.
    """
    other = [
        key for key, value in json.loads(json.dumps(made)).items() if key not in plan.made or plan.made[key] != value
    ]
    other += ["levels"] if plan.sparsities != list(sparsities) else []
    older = [key for key in other if key not in plan.made and key != "levels"]
    if other:
        what = "an older version, which did not note" if older == other else "other settings:"
        names = ", ".join(sorted(other))
        raise OutputError(f"{path}: holds a search of {what} {names}; delete it or name another output.")


def check_model(plan: AllocationPlan, path: Path, identity: Mapping[str, str], dtype: str) -> None:
    """That a plan was made for these weights: another model's may have the same names and shapes.

    A plan that does not say is not refused, nor one for another dtype: the same weights then have another hash.

    Args:
        identity: of the base model, see `models.BaseModel`.
        dtype: in which it is loaded.
    Raises: ConfigError.
    """
    recorded = plan.made.get("base_model")
    sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
    if sha256 not in (None, identity["sha256"]) and plan.made.get("dtype") == dtype:
        raise ConfigError(
            f"{path}: is of another model: of weights with sha256 {brief(str(sha256)[:12])}..., those of "
            f"{identity['id']} have {identity['sha256'][:12]}...; search again (of an induced model after `induce`)."
        )


def allocation_of(
    plan: AllocationPlan, path: Path, sizes: Sequence[Size], sparsities: Sequence[float]
) -> dict[str, tuple[int, ...]]:
    """Weights kept a row at every level by linear, checked against the model and the ladder that shall use them.

    Args:
        sparsities: of the ladder, densest first; some of the plan's, or all.
    Raises: ConfigError: unfinished, of linears of other names or shapes, without one of the levels, not nested, or not
        the budget.
    """
    if not plan.finished:
        raise ConfigError(f"{path}: its search is unfinished; start it again with the same output to go on.")
    if not set(sparsities) <= set(plan.sparsities):
        raise ConfigError(f"{path}: is for the levels {brief(plan.sparsities)}, the ladder has {list(sparsities)}.")
    places = [plan.sparsities.index(sparsity) for sparsity in sparsities]
    if plan.linears.keys() != {size.name for size in sizes}:
        odd = min(plan.linears.keys() ^ {size.name for size in sizes})
        raise ConfigError(f"{path}: is of another model: {brief(odd)} is in one of them only; search again.")
    for size in sizes:
        linear, expected = plan.linears[size.name], [size.rows, size.width]
        if linear.shape != expected:
            raise ConfigError(
                f"{path}: {size.name} has shape {brief(linear.shape)}, the model's {expected}; search again."
            )
        counts = (size.width, *linear.kept, 1)
        if len(linear.kept) != len(plan.sparsities) or any(a < b for a, b in itertools.pairwise(counts)):
            raise ConfigError(f"{path}: {size.name} keeps {brief(linear.kept)} of {size.width}: not nested levels.")
    for place, sparsity in zip(places, sparsities, strict=True):
        kept = total(sizes, [plan.linears[size.name].kept[place] for size in sizes])
        budget = total(sizes, uniform(sizes, sparsity))
        if kept != budget:
            raise ConfigError(
                f"{path}: keeps {kept} weights at level {sparsity}, the budget is {budget}; search again."
            )
    return {size.name: tuple(plan.linears[size.name].kept[place] for place in places) for size in sizes}
