"""What the folds of a run's induction stage (`fold_choice`, `residual_order`) will take: memory, disk and passes."""

from collections.abc import Iterator

from elastic_sparsity.fold_choice import ORDERS, RESIDUAL_ORDER
from elastic_sparsity.plan_sizes import STAGES, Sizes, Term

STAGE = ("induction",)
VALUE_MATRICES = 3  # candidates of the kind "values": two closed forms and a learned rotation


def fold_terms(z: Sizes) -> Iterator[Term]:
    """Memory of the stage, with the whole model in float32, and what it leaves on disk."""
    s, wanted = z.shapes, z.recipe.induction
    if not wanted.changes_weights:
        return
    yield Term(
        name="all weights in float32", bytes=s.total * (4 - z.weight), place="device", stages=STAGE,
        why=f"{s.total:,} numbers x {4 - z.weight} more than they are stored in",
    )  # fmt: skip
    tokens = (_given(z) + wanted.held_out) * z.recipe.calibration.length
    yield Term(
        name="hidden states", bytes=2 * tokens * s.width * 4, place="device", stages=STAGE,
        why=f"of this block and of the next: 2 x {tokens:,} tokens x D x 4",
    )  # fmt: skip
    grams = 4 * sum(width * width for width in s.input_widths()) if "values" in wanted.folds else 0
    yield Term(
        name="a changed block, masked", bytes=8 * s.block_linears + grams, place="device", stages=STAGE,
        why="W x 8: a copy and its masked weights in float32" + (", and I x I of every different input" * bool(grams)),
    )  # fmt: skip
    yield Term(
        name="base model's weights", bytes=s.total * z.weight, place="disk", stages=STAGES[1:],
        why=f"{s.total:,} numbers x {z.weight}, as the stage left them, until the end",
    )  # fmt: skip


def fold_passes(z: Sizes) -> int:
    """Token-passes through single blocks: norms, targets, and every candidate judged at every level it is for."""
    wanted, depth, length = z.recipe.induction, z.shapes.depth, z.recipe.calibration.length
    if not wanted.folds:
        return 0
    given, levels, patterns = _given(z), len(z.recipe.build_ladder().levels), z.patterns
    passes = depth * (2 * given + wanted.held_out) if set(wanted.folds) != {RESIDUAL_ORDER} else 0
    for kind in wanted.folds:
        if kind == RESIDUAL_ORDER:
            passes += depth * (given + wanted.held_out)
            continue
        candidates = VALUE_MATRICES if kind == "values" else patterns if kind in ORDERS else 1
        passes += depth * (1 + candidates) * (patterns if kind in ORDERS else levels) * wanted.held_out
    return passes * length


def absorbed_passes(z: Sizes) -> tuple[int, int]:
    """Token-passes of reading "absorbed" through single blocks: forward alone, and training steps of one sample."""
    wanted, depth, length = z.recipe.induction, z.shapes.depth, z.recipe.calibration.length
    given = _given(z)
    judged = 2 * len(z.recipe.build_ladder().levels) * wanted.held_out
    return depth * (2 * given + wanted.held_out + judged) * length, depth * wanted.steps * length


def _given(z: Sizes) -> int:
    """Samples that the stage takes its statistics from, beside those that judge."""
    return min(z.recipe.induction.samples, z.recipe.calibration.samples - z.recipe.induction.held_out)
