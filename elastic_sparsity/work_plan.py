"""How much work a run is: token-passes and floating-point operations by kind, and seconds from a block's probe.

A token-pass is one token through one block, or through the head. Arithmetic only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from elastic_sparsity.allocation import SLOPES
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.fold_plan import absorbed_passes, fold_passes
from elastic_sparsity.plan_sizes import Sizes, Work
from elastic_sparsity.structured_plan import structured_work

FORWARD, BOTH = "forward", "forward and backward"
GRADIENT, STEP = "gradient", "step"  # of both: passes by themselves, and those in a training step


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a probe of one block took, in seconds.

    Attributes:
        tokens: of the batch that was timed.
        forward: dense, one batch.
        step: one training step of all groups.
        masks: scores and masks of the block, from statistics that are there.
        scale: the recipe's tokens a batch, over `tokens`.
    """

    tokens: int
    forward: float
    step: float
    masks: float
    scale: float


def work_of(z: Sizes) -> list[Work]:
    """Every kind of work of a run. The backward pass counts both gradients, that of the whole weight too (as we do)."""
    s, block, wanted = z.shapes, z.recipe.block, z.recipe.end_to_end
    groups, length = z.recipe.build_ladder().num_groups, z.recipe.calibration.length
    tokens = block.samples * length
    forward = 2 * s.block_linears + 2 * length * s.heads * s.head_dim  # causal: half of T keys a token on average
    merge = 2 * sum(z.recipe.group_ranks()) * s.block_linears // 2  # half of the stacked rank on average
    trained = block.steps * groups * block.batch_size * length
    inputs = 1 if "dense" in (z.recipe.scores.stream, z.recipe.mixer.mode) else z.streams - 1
    outputs = 0 if z.recipe.mixer.mode == "dense" else groups
    # One pass for each batch size notes what the model hands its blocks; a step's batch is whole even of few samples.
    batches = {min(block.batch_size, block.samples), block.samples % block.batch_size, block.steps and block.batch_size}
    rows = [*_allocation(z), ("folds", "induction", FORWARD, fold_passes(z), 0)]
    if z.recipe.induction.reading == "absorbed":
        forward_passes, step_passes = absorbed_passes(z)
        rows += [("norms, held-out errors", "induction", FORWARD, forward_passes, 0),
                 ("absorbed scales", "induction", STEP, step_passes, 0)]  # fmt: skip
    elif z.recipe.induction.steps:
        learned = z.recipe.induction.steps * z.recipe.induction.batch_size * length
        # Of both models, before and after; more often only if what was learned has to be weakened.
        judged = 4 * len(z.recipe.build_ladder().levels) * z.recipe.induction.held_out * length
        given = min(z.recipe.induction.samples, z.recipe.calibration.samples) * length
        rows += [
            ("input norms, held-out KL", "induction", FORWARD, s.depth * (given + judged), 0),
            ("dense logits", "induction", FORWARD, s.depth * learned, 0),
            ("scales", "induction", STEP, s.depth * learned, 0),
        ]
    rows += [
        ("blocks' arguments", "block phase", FORWARD, s.depth * sum(batches) * length, 0),
        ("dense targets", "block phase", FORWARD, s.depth * tokens, 0),
        # The first block's streams are all the embeddings.
        ("statistics", "block phase", FORWARD, (1 + (s.depth - 1) * inputs) * tokens, 0),
        ("training", "block phase", STEP, s.depth * trained, s.depth * block.steps * groups),
        ("next inputs", "block phase", FORWARD, (s.depth - 1) * tokens * outputs, 0),
    ]
    if z.choices.trainable != "off":
        steps = wanted.steps * wanted.batch_size * length
        rows += [
            ("dense logits", "end to end", FORWARD, s.depth * steps, 0),
            ("training", "end to end", STEP, s.depth * steps, s.depth * wanted.steps),
        ]
    found = [
        Work(name=name, phase=phase, direction=FORWARD if kind == FORWARD else BOTH, passes=passes,
             flops=passes * forward * (1 if kind == FORWARD else 3) + 3 * merges * merge, in_steps=kind == STEP)
        for name, phase, kind, passes, merges in rows if passes
    ]  # fmt: skip
    for work in [work for work in found if work.phase == "allocation" and work.name != "scores"]:
        passes = work.passes // s.depth
        flops = 2.0 * s.width * s.vocabulary * passes * (1 if work.direction == FORWARD else 2)
        found.append(replace(work, name=f"head of {work.name}", passes=passes, flops=flops, is_head=True))
    # Both models' logits, and the gradient of the student's final states.
    learns = z.recipe.induction.reading == "scores"
    induced = learns * z.recipe.induction.steps * z.recipe.induction.batch_size * length
    trained = wanted.steps * wanted.batch_size * length if z.choices.trainable != "off" else 0
    for phase, steps in (("induction", induced), ("end to end", trained)):
        flops = 3 * 2.0 * s.width * s.vocabulary * steps
        if steps:
            found.append(Work(name="head", phase=phase, direction=BOTH, passes=2 * steps, flops=flops, is_head=True))
    return [*found, *structured_work(z)]


def _allocation(z: Sizes) -> Iterator[tuple[str, str, str, int, int]]:
    """Rows of a descent at its longest; mostly it ends sooner."""
    wanted, s, length = z.recipe.allocation, z.shapes, z.recipe.calibration.length
    if not wanted.search:
        return
    levels, held = len(z.recipe.ladder.sparsities), wanted.held_out * length
    scored = min(z.recipe.calibration.samples - wanted.held_out, z.recipe.block.samples) * length
    steps = DescentSettings().steps
    starts = 2 + len(SLOPES) + levels - 1
    judged = levels * (starts + steps + 1) * held
    yield "scores", "allocation", FORWARD, s.depth * 2 * scored, 0
    yield "judgements", "allocation", FORWARD, s.depth * (held + judged), 0
    yield "prices", "allocation", GRADIENT, s.depth * levels * steps * held, 0


def seconds_of(z: Sizes, works: Sequence[Work], timing: Timing) -> float:
    """Seconds of a run's arithmetic as a block's probe suggests; reading, writing and evaluation are not in it."""
    block, depth, groups = z.recipe.block, z.shapes.depth, z.recipe.build_ladder().num_groups
    per_token = timing.forward / timing.tokens
    step = timing.step * timing.scale
    passes = sum((1 if w.direction == FORWARD else 3) * w.passes for w in works if not (w.is_head or w.in_steps))
    total = passes * per_token + depth * (block.steps * step + timing.masks)
    induction = z.recipe.induction
    if induction.steps:  # a step masks every linear, and makes every weight's gradient
        batch = induction.batch_size if induction.reading == "scores" else 1
        one_level = step / groups * batch / block.batch_size
        total += depth * induction.steps * (one_level + timing.masks / 2)
    if z.choices.trainable != "off":
        wanted = z.recipe.end_to_end
        one_level = step / groups * wanted.batch_size / block.batch_size
        total += depth * wanted.steps * one_level
    head = sum(w.flops for w in works if w.is_head)
    orders = sum(w.flops for w in works if not w.passes)  # in float64: at half of float32's rate
    total += (head + 2 * orders) / (2 * z.shapes.block_linears / per_token)  # at the rate of a block's products
    return total
