"""Floating-point operations that the passes of a recipe need, in closed form, and their check by torch's counter.

A product of (N, I) and (I, O) costs 2 N I O. Only products count; norms, softmax, masks and the optimiser are free.
Letters: N tokens of a batch, T tokens of a sample, O outputs, I inputs, r rank.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from elastic_sparsity import attention
from elastic_sparsity import end_to_end as phase_two
from elastic_sparsity.activations import HOST
from elastic_sparsity.arch import architecture_of, decoder_blocks, head_function, weight_OI
from elastic_sparsity.block_phase import Job, attach_elastic_
from elastic_sparsity.models import load_base
from elastic_sparsity.precision import autocast_factory, resolve_precision
from elastic_sparsity.run_folder import RunFolder
from elastic_sparsity.workers import Workers


@dataclass(frozen=True)
class Counts:
    """Operations in the run's precision, and those that have to be float32 (adapters, statistics, scores)."""

    low: float = 0.0
    float32: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.low + other.low, self.float32 + other.float32)

    def __mul__(self, factor: float) -> "Counts":
        return Counts(self.low * factor, self.float32 * factor)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model of equal blocks, and of a training batch."""

    linears: dict[str, tuple[int, int]]  # path -> (O, I)
    input_widths: tuple[int, ...]  # of the different inputs: q, k and v share one, gate and up another
    num_blocks: int
    heads: int
    head_width: int
    width: int
    vocabulary: int
    length: int  # tokens of a sample
    tokens: int  # tokens of a training batch
    ranks: tuple[int, ...]  # active rank of every level

    @classmethod
    def of(cls, model: Any, recipe: Any) -> "Shapes":
        block, config = decoder_blocks(model)[0], model.config
        paths = architecture_of(config.model_type).linears
        linears = {path: tuple(weight_OI(block.get_submodule(path)).shape) for path in paths}
        ladder, ranks = recipe.build_ladder(), recipe.group_ranks()
        return cls(
            linears=linears,  # type: ignore[arg-type]
            input_widths=tuple(linears[paths[at]][1] for at in (0, 3, 4, 6)),  # llama: q, o, gate, down
            num_blocks=len(decoder_blocks(model)),
            heads=config.num_attention_heads,
            head_width=config.hidden_size // config.num_attention_heads,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
            length=recipe.calibration.length,
            tokens=recipe.end_to_end.batch_size * recipe.calibration.length,
            ranks=tuple(
                sum(ranks[group] for group in ladder.active_groups(level, recipe.adapters.inheritance))
                for level in ladder.levels
            ),
        )

    @property
    def weights(self) -> int:
        """Of one block."""
        return sum(o * i for o, i in self.linears.values())

    def attention(self, tokens: int) -> float:
        """One block's scores and sums of values, the causal half only. The backward pass costs twice that."""
        pairs = tokens * (self.length + 1) / 2
        return 2 * 2 * pairs * self.heads * self.head_width

    def rank_operations(self, products: int) -> float:
        """`products` products of (O, r) and (r, I) on every linear of a block, mean over the levels."""
        return products * 2 * self.weights * sum(self.ranks) / len(self.ranks)

    def first_inputs(self) -> int:
        """Weights of the linears that read the block's input: no gradient of it is needed in a block on its own."""
        return sum(o * i for o, i in list(self.linears.values())[:3])


def block_phase_counts(shapes: Shapes, recipe: Any) -> dict[str, Counts]:
    """Operations by part over all blocks."""
    tokens, blocks = recipe.block.samples * shapes.length, shapes.num_blocks
    levels, streams = len(recipe.build_ladder().levels), recipe.build_ladder().num_groups
    passes = 1 + (blocks - 1) * streams  # the first block's streams are one
    forward = 2 * tokens * shapes.weights + shapes.attention(tokens)
    last = list(shapes.linears.values())[-1]
    second_order = recipe.scores.method == "obs"
    gram = second_order * sum(tokens * width**2 for width in shapes.input_widths)  # symmetric: half of 2 N I^2
    batch = recipe.block.batch_size * shapes.length
    backward = 2 * batch * (2 * shapes.weights - shapes.first_inputs()) + 2 * shapes.attention(batch)
    trained = Counts(2 * batch * shapes.weights + shapes.attention(batch) + backward, shapes.rank_operations(3))
    return {
        "statistics": Counts(forward - 2 * tokens * last[0] * last[1], gram) * passes,
        "scores and masks": Counts(
            0, second_order * blocks * sum(width**3 for width in shapes.input_widths)
        ),  # inverse
        "targets": Counts(forward) * blocks,
        "training": trained * (blocks * recipe.block.steps * levels),
        "outputs": Counts(forward) * ((blocks - 1) * streams),
    }


def end_to_end_step(shapes: Shapes) -> dict[str, Counts]:
    """Operations by part of one step; base values are trained."""
    tokens, blocks = shapes.tokens, shapes.num_blocks
    linears, attended = 2 * tokens * shapes.weights * blocks, shapes.attention(tokens) * blocks
    backward = 2 * linears - 2 * tokens * shapes.first_inputs()  # the embedding is frozen
    return {
        "teacher's blocks": Counts(linears),
        "student's blocks": Counts(linears),
        "backward of the blocks": Counts(backward),
        "attention": Counts(4 * attended),
        "merging weights and masks": Counts(0, shapes.rank_operations(1) * blocks),
        "their gradients": Counts(0, shapes.rank_operations(2) * blocks),
        "head and KL": Counts(3 * 2 * tokens * shapes.width * shapes.vocabulary),
    }


def end_to_end(shapes: Shapes, recipe: Any) -> dict[str, Counts]:
    """Operations by part over all steps."""
    return {part: count * recipe.end_to_end.steps for part, count in end_to_end_step(shapes).items()}


def check_counts(recipe: Any, shapes: Shapes, ids: torch.Tensor) -> dict[str, float]:
    """What `FlopCounterMode` counts in one end-to-end step of every level over our counts.

    Attention is compared apart: slices compute more than the causal half that we count.
    """
    precision = resolve_precision(recipe.precision, "cpu")
    model = elastic_model(recipe, ids, precision)
    autocast: Callable[[], Any] = autocast_factory(precision, "cpu")
    with autocast():
        head = head_function(model)
    levels = recipe.build_ladder().levels

    def counted(hidden: torch.Tensor) -> torch.Tensor:  # the counter's hooks refuse a leaf inside autograd.grad
        return head(hidden.view_as(hidden))

    with attention.training_attention(model), FlopCounterMode(display=False) as counter:
        for level in levels:
            batch = ids[: recipe.end_to_end.batch_size]
            phase_two._step_loss(model, counted, batch, level, autocast).backward()
    found = counter.get_flop_counts()["Global"]
    attended = sum(found.pop(name, 0) for name in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    ours = end_to_end_step(shapes)
    wanted = ours.pop("attention").low
    rest = sum(count.low + count.float32 for count in ours.values())
    return {
        "products": round(sum(found.values()) / len(levels) / rest, 4),
        "attention": round(attended / len(levels) / wanted, 4),
    }


def elastic_model(recipe: Any, ids: torch.Tensor, precision: str) -> Any:
    """The base model with elastic linears in it, masked by magnitude: operations do not depend on masks."""
    base = load_base(recipe.model.id, recipe.model.dtype)
    fields = {"scores": recipe.scores.model_copy(update={"method": "magnitude"})}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            recipe=recipe.model_copy(update=fields), base=base, token_ids_ST=ids, trainable="base",
            precision=precision, activations=HOST, workers=Workers(), folder=RunFolder(Path(folder), writes=False),
            generator=torch.Generator().manual_seed(recipe.seed), progress=lambda stage, done, total: None,
        )  # fmt: skip
        for block in job.blocks:
            linears = {path: block.get_submodule(path) for path in job.linears}
            attach_elastic_(job, block, linears, dict.fromkeys(linears), "block")  # type: ignore[arg-type]
    return base.model
