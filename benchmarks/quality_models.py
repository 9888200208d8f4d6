"""The models that quality.py measures: pruned or trained by method, level and seed. Trained checkpoints stay."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import schedules
import torch
from size import bitmask_bytes
from torch import Tensor
from trained import trained

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.baselines import METHODS as ONE_SHOT
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.ladder import Level
from elastic_sparsity.measure import as_shipped
from elastic_sparsity.model_shapes import ModelShapes, read_shapes
from elastic_sparsity.models import BaseModel
from elastic_sparsity.precision import cast_parameters_
from elastic_sparsity.slicing import load_level
from elastic_sparsity.supernet import linear_sizes

WHOLE = ("elastic", "elastic-uninduced", "epts", "epts-official")  # one run for all levels
TRAINED = (
    "elastic", "elastic-uninduced", "independent", "independent-same", "independent-lora", "independent-full",
    "independent-full-block", "epts", "epts-official",
)  # fmt: skip


class Cell(NamedTuple):
    """What is measured together.

    Attributes:
        method: a name of METHODS in quality.py; "independent-full@0.001" with that learning rate.
        level: "dense" for the dense model.
    """

    method: str
    level: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/{self.level}/{self.seed}"

    @property
    def kind(self) -> str:
        """The method without a learning rate."""
        return self.method.partition("@")[0]


@dataclass(frozen=True)
class Subject:
    """A model to measure, and what is known of it before: bytes, and seconds it took to make."""

    model: Any
    facts: dict[str, Any]


@dataclass
class Maker:
    """Makes the model of any cell.

    Attributes:
        recipe: of `schedules.elastic`, with its own seed.
        work: where trained checkpoints are kept.
    """

    recipe: Recipe
    base: BaseModel
    stored: torch.dtype
    work: Path | None
    baseline_samples: int
    full_lr: float
    autocast: Callable[[], Any]

    @cached_property
    def baseline_tokens(self) -> Tensor:
        return calibration_tokens(self.recipe, self.base)[0][: self.baseline_samples]

    @cached_property
    def names(self) -> list[str]:
        return [size.name for size in linear_sizes(self.base.model)]

    @cached_property
    def shapes(self) -> ModelShapes:
        return read_shapes(self.recipe.model.id, self.recipe.model.dtype)

    def make(self, cell: Cell) -> Subject:
        if cell.method == "dense":
            return Subject(self.base.model, {"bytes": self.base.model.num_parameters() * self.stored.itemsize})
        level = self.recipe.build_ladder().find(cell.level)
        return self.pruned(level, cell.method) if cell.method in ONE_SHOT else self.tuned(level, cell)

    def pruned(self, level: Level, method: str) -> Subject:
        model, started = copy.deepcopy(self.base.model), time.monotonic()
        prune_one_shot_(
            model, self.baseline_tokens, level, method, damping=self.recipe.scores.damping,
            batch_size=self.recipe.block.batch_size, autocast=self.autocast,
        )  # fmt: skip
        seconds = round(time.monotonic() - started, 1)
        return self.shipped(model, {"seconds": seconds})

    def shipped(self, model: Any, facts: dict[str, Any]) -> Subject:
        """A model of one level as its bitmask file holds it."""
        computed = self.base.model.dtype
        size = bitmask_bytes(model, self.base.tokenizer, self.names, self.stored)
        cast_parameters_(model, computed)
        return Subject(model, {**facts, "bytes": size})

    def tuned(self, level: Level, cell: Cell) -> Subject:
        checkpoint, sittings = self.checkpoint(level, cell)
        level = checkpoint.find(level.name)
        facts = {
            "seconds": round(sum(sitting["seconds"] for sitting in sittings), 1) if sittings else None,
            "sittings": sittings,
            "amounts": self.amounts(cell),
            "calibration_sha256": checkpoint.config["data"]["calibration_sha256"],
        }
        if cell.method.startswith("elastic"):
            sizes = {"bytes": checkpoint.bytes_of(level), "bytes_all": checkpoint.total_bytes()}
            return Subject(as_shipped(checkpoint, level, self.base.model), {**facts, **sizes})
        model = load_level(checkpoint, level, checkpoint.dtype)
        return self.shipped(model.to(self.base.model.device), facts)

    def checkpoint(self, level: Level, cell: Cell) -> tuple[ElasticCheckpoint, list[dict[str, Any]]]:
        if self.work is None:
            raise ConfigError(f"{cell.method}: is trained; name a folder outside the repository with --work.")
        # A sweep and the table that takes its best learning rate share their checkpoints.
        method = f"{cell.kind}@{self.lr_of(cell):g}" if cell.kind.startswith("independent-full") else cell.method
        of_level = "" if cell.method in WHOLE else f"-{level.name.replace(':', 'of')}"
        return trained(self.recipe_of(level, cell), self.work / f"{method}{of_level}-s{cell.seed}", self.base)

    def recipe_of(self, level: Level, cell: Cell) -> Recipe:
        recipe = schedules.elastic(self.recipe, cell.seed)
        if cell.method == "elastic":
            return recipe
        if cell.method == "elastic-uninduced":
            return schedules.without_induction(recipe, self.shapes)
        if cell.kind.startswith("epts"):
            return schedules.epts(recipe, self.shapes, official=cell.kind == "epts-official")
        if cell.kind.startswith("independent-full"):
            lr = self.lr_of(cell)
            return schedules.full_weight(recipe, level, lr, block_phase_only=cell.kind.endswith("block"))
        trainable = "adapters" if cell.kind == "independent-lora" else "as elastic"
        return schedules.independent(recipe, level, trainable=trainable, same_steps=cell.kind == "independent-same")

    def lr_of(self, cell: Cell) -> float:
        """Of full-weight tuning."""
        return float(cell.method.partition("@")[2] or self.full_lr)

    def amounts(self, cell: Cell) -> dict[str, int]:
        """What a trained cell's method means in steps and samples."""
        return schedules.amounts(self.recipe_of(self.recipe.build_ladder().find(cell.level), cell))
