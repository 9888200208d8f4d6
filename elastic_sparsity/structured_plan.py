"""What the structured levels of a recipe need: memory, disk and work. Arithmetic on shapes, no tensor and no model.

Letters: I inputs of a branch's last linear, S samples, T tokens, D width.
"""

from collections.abc import Iterator

from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.model_shapes import LinearShape, ModelShapes
from elastic_sparsity.plan_sizes import Sizes, Term, Work, backward_term, teacher_term
from elastic_sparsity.structured_sizes import HELD_OUT
from elastic_sparsity.wiring import WIRINGS

PHASE = "structured"
STAGE = (PHASE,)
PASSES = 3  # of every sample through every block: the inputs of either branch's last linear, and the next block's


def structured_terms(z: Sizes) -> Iterator[Term]:
    """The terms of the last stage; none if a recipe has no structured level."""
    s, wanted = z.shapes, z.recipe.structured
    if not wanted.fractions:
        return
    total = s.depth * (s.block_linears + s.block_other) + s.rest
    yield Term(
        name="base model, once more", bytes=4 * total - s.rest * z.weight, place="device", stages=STAGE,
        why=f"{total:,} numbers x 4, less the embeddings that are counted as they stay",
    )  # fmt: skip
    kept = round((1 - min(wanted.fractions)) * s.depth * s.block_linears)
    yield Term(
        name="what is cut out", bytes=s.stored * kept, place="device", stages=STAGE,
        why=f"{kept:,} weights of the largest level x {s.stored}, while the masked model is there",
    )  # fmt: skip
    size = sum(round((1 - fraction) * s.depth * s.block_linears) for fraction in wanted.fractions)
    yield Term(
        name="structured levels", bytes=s.stored * size, place="disk", stages=STAGE,
        why=f"{size:,} weights of all of them x {s.stored}",
    )  # fmt: skip
    if wanted.scores == "magnitude":
        return
    stream = z.recipe.block.samples * z.recipe.calibration.length * s.width * 4
    yield Term(
        name="hidden states",
        bytes=2 * stream,
        place="device",
        stages=STAGE,
        why="2 (this block's, the next's) x S x T x D x 4",
    )
    if wanted.scores == "obs":
        width = max(linear.inputs for linear in ends_of(s))
        yield Term(
            name="covariance, inverse, factors", bytes=(4 + 4 * 8) * width**2 + 3 * 8 * width * s.width,
            place="device", stages=STAGE,
            why=f"I x I with I = {width:,}: in float32, and 4 in float64; 3 weights I x D in float64",
        )  # fmt: skip
    if wanted.search is not None:
        yield from _search_terms(z)


def _search_terms(z: Sizes) -> Iterator[Term]:
    s = z.shapes
    has_gradients = z.recipe.structured.search == "blocks"
    number = 16 if has_gradients else 12
    each = sum(8 * x.inputs**2 + number * x.inputs * x.outputs for x in ends_of(s))
    yield Term(
        name="factors of all branches", bytes=s.depth * each, place="device", stages=STAGE,
        why=f"{s.depth} blocks' branches' ends: I x I and I x D in float64, I x D in float32"
        + (", and its gradient" if has_gradients else ""),
    )  # fmt: skip
    yield teacher_term(z, HELD_OUT, STAGE)
    if has_gradients:
        yield backward_term(z, z.recipe.calibration.length, "T", STAGE)


def structured_work(z: Sizes) -> list[Work]:
    """Forward passes, and the greedy orders and refits, which are in float64 and no pass."""
    s, wanted = z.shapes, z.recipe.structured
    if not wanted.fractions or wanted.scores == "magnitude":
        return []
    passes = PASSES * s.depth * z.recipe.block.samples * z.recipe.calibration.length * len(wanted.fractions)
    forward = 2 * s.block_linears + 2 * z.recipe.calibration.length * s.heads * s.head_dim
    rows = [Work(name="inputs of the branches' ends", phase=PHASE, direction="forward", passes=passes,
                 flops=passes * forward)]  # fmt: skip
    if wanted.scores == "obs":
        # Factor, inverse and factor in order: 4/3 I^3. Downdates: 2 I^3, and 2 I^2 D; the refit 3 I^2 D.
        each = sum(10 / 3 * x.inputs**3 + 5.0 * x.inputs**2 * x.outputs for x in ends_of(s))
        flops = each * s.depth * len(wanted.fractions)
        searches = 1 + (wanted.search is not None)
        rows.append(Work(name="orders and refits", phase=PHASE, direction="forward", passes=0, flops=flops * searches))
    return [*rows, *_search_work(z, forward)]


def _search_work(z: Sizes, forward: int) -> Iterator[Work]:
    """Of a descent at its longest; mostly it ends sooner. Judging the head's logits is counted apart."""
    s, wanted, length = z.shapes, z.recipe.structured, z.recipe.calibration.length
    if wanted.search is None:
        return
    count, held = len(wanted.fractions), HELD_OUT * length
    scored = PASSES * s.depth * (z.recipe.block.samples * length - held) * count
    steps = DescentSettings().steps if wanted.search == "blocks" else 0
    judged = (1 + s.kv_heads + steps) * held * count
    head = 2.0 * s.width * s.vocabulary
    rows = [("inputs for the search's orders", scored, 0, 1), ("judgements", s.depth * judged, judged, 1)]
    if steps:
        rows.append(("gradients", s.depth * steps * held * count, steps * held * count, 3))
    for name, passes, heads, times in rows:
        direction = "forward" if times == 1 else "forward and backward"
        yield Work(name=name, phase=PHASE, direction=direction, passes=passes, flops=passes * forward * times)
        if heads:
            flops = heads * head * (1 if times == 1 else 2)
            yield Work(
                name=f"head of {name}", phase=PHASE, direction=direction, passes=heads, flops=flops, is_head=True
            )


def ends_of(s: ModelShapes) -> list[LinearShape]:
    """The linears that end a block's branches. (Where heads stay, that of attention is none of ours: at most, then.)"""
    paths = {path for row in WIRINGS.values() for path in (row.out, row.down)}
    return [linear for linear in s.linears if linear.path in paths]
