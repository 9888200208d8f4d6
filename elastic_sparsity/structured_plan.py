"""What the structured levels of a recipe need: memory, disk and work. Arithmetic on shapes, no tensor and no model.

Letters: I inputs of a branch's last linear, S samples, T tokens, D width.
"""

from collections.abc import Iterator

from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.model_shapes import LinearShape, ModelShapes
from elastic_sparsity.plan_sizes import Sizes, Term, Work, backward_term, head_term, teacher_term
from elastic_sparsity.structured_sizes import HELD_OUT
from elastic_sparsity.wiring import WIRINGS

PHASE = "structured"
STAGE, TUNING = (PHASE,), ("tuning",)
PASSES = 3  # of every sample through every block: the inputs of either branch's last linear, and the next block's


def structured_terms(z: Sizes) -> Iterator[Term]:
    """The terms of the last two stages; none if a recipe has no structured level."""
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
        name="what is cut out", bytes=4 * kept, place="device", stages=STAGE,
        why=f"{kept:,} weights of the largest level x 4, while the masked model is there",
    )  # fmt: skip
    size = sum(round((1 - fraction) * s.depth * s.block_linears) for fraction in wanted.fractions)
    yield Term(
        name="structured levels", bytes=s.stored * size, place="disk", stages=STAGE + TUNING,
        why=f"{size:,} weights of all of them x {s.stored}",
    )  # fmt: skip
    if z.recipe.structured_steps:
        yield from _tuning_terms(z, total, kept)
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


def _tuning_terms(z: Sizes, total: int, kept: int) -> Iterator[Term]:
    """Args: total: numbers of the whole model. kept: weights of the largest level."""
    s, wanted = z.shapes, z.recipe.end_to_end
    linears, p = s.depth * s.block_linears, z.product
    # What is not cut is in float32 by now; the term of the embeddings counts them as they were.
    yield Term(
        name="dense teacher", bytes=4 * (total - linears) + p * linears + (4 - z.weight) * s.rest, place="device",
        stages=TUNING, why=f"{linears:,} weights of linears x {p}, {total - linears:,} other numbers x 4",
    )  # fmt: skip
    copies, also = (p, f", {p} bytes each in products") if p != 4 else (0, "")
    yield Term(
        name="smaller model, gradients and Adam's moments", bytes=(16 + copies) * kept, place="device", stages=TUNING,
        why=f"4 x {kept:,} float32 numbers of the largest level{also}",
    )  # fmt: skip
    tokens = wanted.batch_size * z.recipe.calibration.length
    times = f"{tokens:,} tokens, as of whole blocks"
    yield backward_term(z, tokens, times, TUNING, checkpointed=wanted.gradient_checkpointing)
    yield head_term(z, tokens, TUNING, 4)


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
    """Forward passes; the greedy orders and refits, which are in float64 and no pass; the steps that tune."""
    s, wanted = z.shapes, z.recipe.structured
    forward = 2 * s.block_linears + 2 * z.recipe.calibration.length * s.heads * s.head_dim
    tuning = list(_tuning_work(z, forward))
    if not wanted.fractions or wanted.scores == "magnitude":
        return tuning
    passes = PASSES * s.depth * z.recipe.block.samples * z.recipe.calibration.length * len(wanted.fractions)
    rows = [Work(name="inputs of the branches' ends", phase=PHASE, direction="forward", passes=passes,
                 flops=passes * forward)]  # fmt: skip
    if wanted.scores == "obs":
        # Factor, inverse and factor in order: 4/3 I^3. Downdates: 2 I^3, and 2 I^2 D; the refit 3 I^2 D.
        each = sum(10 / 3 * x.inputs**3 + 5.0 * x.inputs**2 * x.outputs for x in ends_of(s))
        flops = each * s.depth * len(wanted.fractions)
        searches = 1 + (wanted.search is not None)
        rows.append(Work(name="orders and refits", phase=PHASE, direction="forward", passes=0, flops=flops * searches))
    return [*rows, *_search_work(z, forward), *tuning]


def _tuning_work(z: Sizes, forward: int) -> Iterator[Work]:
    """A smaller block's passes count by the weights that it keeps."""
    s, like, fractions = z.shapes, z.recipe.end_to_end, z.recipe.structured.fractions
    tokens = z.recipe.structured_steps * like.batch_size * z.recipe.calibration.length
    if not tokens or not fractions:
        return
    dense, small = s.depth * tokens * len(fractions), round(s.depth * tokens * sum(1 - x for x in fractions))
    yield Work(name="dense logits", phase=PHASE, direction="forward", passes=dense, flops=dense * forward)
    both = "forward and backward"
    yield Work(name="tuning", phase=PHASE, direction=both, passes=small, flops=3 * small * forward)
    passes = 2 * tokens * len(fractions)
    yield Work(name="head of tuning", phase=PHASE, direction=both, passes=passes, is_head=True,
               flops=1.5 * passes * 2.0 * s.width * s.vocabulary)  # fmt: skip


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
