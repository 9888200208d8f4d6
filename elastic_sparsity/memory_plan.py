"""What a run will need of device, host and disk: arithmetic on shapes and a recipe, no tensor and no model.

A term is something that lives in some stages of a run. The peak of a place is the largest sum over its stages; a place
is "device", "host" or "disk". Without a GPU the host is the device. All figures are bytes of live tensors; that
a process takes hardly more is `allocator`'s work, and where it does not work there is a term "holes".
Letters in the explanations: W weights of a block's linears, L of the largest, w bytes a number of the model in memory,
p bytes a number in products, B samples a batch, T tokens, D width, S samples, K streams, R stacked rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from elastic_sparsity.config import Recipe
from elastic_sparsity.files import is_file
from elastic_sparsity.fold_plan import fold_terms
from elastic_sparsity.masks import SORTED_AT_ONCE
from elastic_sparsity.model_shapes import ModelShapes
from elastic_sparsity.plan_sizes import (
    PER_BLOCK,
    PLACES,
    STAGES,
    Choices,
    Peak,
    Sizes,
    Term,
    backward_term,
    checkpoint_bytes,
    head_term,
    sampling_term,
    teacher_term,
)
from elastic_sparsity.structured_plan import structured_terms

PROCESS = 400_000_000  # measured: Python, torch, transformers and what they load, on Linux without CUDA
DATASETS = 90_000_000  # measured: the datasets library, for text that is no local file
CUDA_HOST, CUDA_DEVICE = 1_500_000_000, 600_000_000  # assumed, not measured: libraries and context of CUDA
CUDA_SLACK = 0.05  # assumed, not measured: what torch's caching allocator loses to holes
HEAP_LARGEST = 32 << 20  # bytes of a tensor up to which glibc keeps what was freed; see `allocator`
CHARACTERS = 40  # a token of the calibration, as `calibration_text` reads of a data set


def memory_terms(shapes: ModelShapes, recipe: Recipe, choices: Choices) -> list[Term]:
    """Every term of a run."""
    sizes = Sizes(shapes, recipe, choices)
    terms = [
        *_process(sizes),
        *_weights(sizes),
        *_reading(sizes),
        *_allocation(sizes),
        *_induction(sizes),
        *fold_terms(sizes),
    ]
    terms += [*_streams(sizes), *_block(sizes)]
    terms += [*_training(sizes), *_end_to_end(sizes), *_saving(sizes), *structured_terms(sizes), *_disk(sizes)]
    if not choices.gpu:
        terms = [replace(term, place="host") if term.place == "device" else term for term in terms]
    return [term for term in [*terms, *_holes(terms, choices, shapes, recipe)] if term.bytes]


def _holes(terms: Sequence[Term], choices: Choices, shapes: ModelShapes, recipe: Recipe) -> Iterator[Term]:
    """What allocators lose."""
    early = _early(recipe)
    stages = [*early, *PER_BLOCK, *([] if choices.trainable == "off" else ["end to end"]), "saving"]
    if recipe.structured.fractions:
        stages += ["structured", *(["tuning"] if recipe.structured_steps else [])]
    if choices.gpu:
        why = f"{CUDA_SLACK:.0%} of the stage's rest, for torch's caching allocator; assumed, not measured"
        for stage in stages:
            size = int(CUDA_SLACK * _total(terms, "device", stage))
            yield Term(name="holes", bytes=size, place="device", stages=(stage,), why=why)
    elif choices.weights == "resident" and 4 * shapes.largest_linear < HEAP_LARGEST:
        kept = ("other blocks, trained", "hidden states")
        passing = [t for t in terms if t.place == "host" and set(t.stages) <= set(PER_BLOCK) and t.name not in kept]
        yield Term(
            name="holes", bytes=_total(passing, "host", "training"), place="host",
            stages=tuple(stage for stage in stages if stage not in early),
            why="what a block needs for its training, once again: tensors below 32 MiB come from the C library's heap, "
            "which keeps it (measured: 0.5 to 1.3 times that, another with every run; none with streamed weights)",
        )  # fmt: skip


def _early(recipe: Recipe) -> tuple[str, ...]:
    """The stages before the first block."""
    asked = {"induction": recipe.induction.is_asked, "allocation": recipe.allocation.search}
    return ("load", *(stage for stage, is_asked in asked.items() if is_asked))


def peaks(terms: Sequence[Term]) -> list[Peak]:
    """The peak of every place that is used."""
    found = []
    for place in PLACES:
        stage = max(STAGES, key=lambda name: _total(terms, place, name))
        if total := _total(terms, place, stage):
            inside = tuple(term for term in terms if term.place == place and stage in term.stages)
            found.append(Peak(place=place, bytes=total, stage=stage, terms=inside))
    return found


def _total(terms: Sequence[Term], place: str, stage: str) -> int:
    return sum(term.bytes for term in terms if term.place == place and stage in term.stages)


def _process(z: Sizes) -> Iterator[Term]:
    why = "Python, torch, transformers and what they load; measured on Linux without CUDA"
    yield Term(name="process", bytes=PROCESS, place="host", stages=STAGES, why=why)
    if z.choices.gpu:
        why = "libraries and context of CUDA; assumed, not measured"
        yield Term(name="CUDA", bytes=CUDA_HOST, place="host", stages=STAGES, why=why)
        yield Term(name="CUDA", bytes=CUDA_DEVICE, place="device", stages=STAGES, why=why)
    if z.recipe.calibration.source != "self" and not is_file(z.recipe.calibration.source):
        yield Term(name="datasets library", bytes=DATASETS, place="host", stages=STAGES, why="measured, as above")
    tokens = z.recipe.calibration.samples * z.recipe.calibration.length
    why = "S x T token ids of 8 bytes"
    yield Term(name="calibration tokens", bytes=8 * tokens, place="device", stages=STAGES, why=why)


def _weights(z: Sizes) -> Iterator[Term]:
    s, w = z.shapes, z.weight
    yield Term(
        name="embeddings, last norm, head", bytes=s.rest * w, place="device", stages=STAGES,
        why=f"{s.rest:,} numbers x {w}; they stay",
    )  # fmt: skip
    linears, other = s.block_linears, s.block_other
    if z.choices.weights == "resident":
        yield Term(
            name="all blocks", bytes=s.depth * (linears + other) * w, place="device",
            stages=_early(z.recipe),
            why=f"{s.depth} x ({linears:,} + {other:,}) numbers x {w}",
        )  # fmt: skip
        yield Term(
            name="other blocks, trained", bytes=(s.depth - 1) * z.trained_block, place="device", stages=PER_BLOCK,
            why=f"{s.depth - 1} x (dense weights, masks, float32 adapters"
            f"{', float32 masters' if z.moves_base else ''}): the model is whole in memory, all but the last are done",
        )  # fmt: skip
    yield Term(
        name="weights of one block", bytes=(linears + other) * w, place="device", stages=PER_BLOCK[:2],
        why=f"(W {linears:,} + {other:,}) x {w}",
    )  # fmt: skip
    master = f", beside a float32 master of {4 * linears:,} bytes" if z.moves_base else ""
    if z.choices.weights == "stream":
        yield Term(
            name="a second block", bytes=(linears + other) * w, place="device", stages=PER_BLOCK[:1],
            why="once, as the whole model runs to see how its blocks are called",
        )  # fmt: skip
    yield Term(
        name="weights of one block, elastic", bytes=(z.dense + (4 if z.moves_base else 0)) * linears + other * w,
        place="device", stages=PER_BLOCK[2:], why=f"dense copy W x {z.dense} + {other:,} x {w}{master}",
    )  # fmt: skip


def _reading(z: Sizes) -> Iterator[Term]:
    s = z.shapes
    yield Term(
        name="largest tensor while it is checked", bytes=s.largest * (2 * s.stored + 3), place="host",
        stages=("load",), why=f"{s.largest:,} numbers x (itself and its absolute value, {s.stored} each, 3 masks)",
    )  # fmt: skip
    if z.recipe.calibration.self_samples:
        yield sampling_term(z)
    tokens = CHARACTERS * z.recipe.calibration.samples * z.recipe.calibration.length // 4
    yield Term(
        name="calibration text", bytes=tokens * 100, place="host", stages=("load",),
        why=f"at most {CHARACTERS} characters a token of S x T are read; 4 make a token; about 100 bytes a token while "
        "it is cut up (assumed); a local file is read whole",
    )  # fmt: skip
    if z.choices.gpu:
        whole = z.choices.weights == "resident"
        yield Term(
            name="weights on their way to the device", place="host", stages=("load",),
            bytes=s.stored * (s.total if whole else s.largest),
            why="the model is loaded into host memory first" if whole else "one tensor at a time",
        )  # fmt: skip


def _allocation(z: Sizes) -> Iterator[Term]:
    s, wanted, stage = z.shapes, z.recipe.allocation, ("allocation",)
    if not wanted.search:
        return
    length, numbers = z.recipe.calibration.length, s.depth * s.block_linears
    yield Term(
        name="masked weights, their gradients, the order", bytes=numbers * (2 * z.weight + 2), place="device",
        stages=stage, why=f"{s.depth} x W x ({z.weight} + {z.weight} + 2)",
    )  # fmt: skip
    yield backward_term(z, length, "T", stage)
    yield Term(
        name="prices of the largest linear", bytes=28 * s.largest_linear, place="device", stages=stage,
        why=f"L {s.largest_linear:,} x 28: products in float32 and float64, places of 8 bytes",
    )  # fmt: skip
    yield teacher_term(z, wanted.held_out, stage)
    yield head_term(z, length, stage, z.weight)


def _induction(z: Sizes) -> Iterator[Term]:
    s, p, wanted, stage = z.shapes, z.product, z.recipe.induction, ("induction",)
    if not wanted.steps or wanted.reading != "scores":
        return
    tokens = wanted.batch_size * z.recipe.calibration.length
    yield Term(
        name="masked weights", bytes=s.depth * s.block_linears * p, place="device", stages=stage,
        why=f"{s.depth} x W x {p}, kept for the backward pass",
    )  # fmt: skip
    yield backward_term(z, tokens, f"{tokens:,} tokens", stage)
    yield Term(
        name="scores of the largest linear", bytes=20 * s.largest_linear, place="device", stages=stage,
        why=f"L {s.largest_linear:,} x 20: scores, saliency, margins and temporaries in float32",
    )  # fmt: skip
    yield head_term(z, tokens, stage, z.weight)


def _streams(z: Sizes) -> Iterator[Term]:
    if z.choices.activations != "disk":
        yield Term(
            name="hidden states", bytes=2 * z.streams * z.stream, stages=PER_BLOCK, place=z.choices.activations,
            why=f"{z.streams} streams, of this block and of the next: 2 x {z.streams} x S x T x D x {z.weight}",
        )  # fmt: skip
    block = z.recipe.block
    batch = block.batch_size * z.recipe.calibration.length * z.shapes.width * z.weight
    taken = z.recipe.build_ladder().num_groups + 2
    yield Term(
        name="a batch of hidden states", bytes=taken * batch, place="device", stages=("training",),
        why=f"inputs of {taken - 2} groups, dense input and target: {taken} x B x T x D x {z.weight}",
    )  # fmt: skip
    if z.choices.gpu and z.choices.activations != "device":
        yield Term(
            name="a batch of hidden states on its way", bytes=batch, place="host", stages=("training",),
            why=f"B x T x D x {z.weight}",
        )  # fmt: skip


def _block(z: Sizes) -> Iterator[Term]:
    s, block, p = z.shapes, z.recipe.block, z.product
    tokens = block.batch_size * z.recipe.calibration.length
    widest = max(max(linear.inputs, linear.outputs) for linear in s.linears)
    yield Term(
        name="forward of one batch", place="device", stages=("statistics",),
        bytes=tokens * (4 * widest * p + 6 * s.width * 4) + (s.block_linears * p if p != z.weight else 0),
        why=f"per token 4 x widest ({widest:,}) x {p} + 6 x D x 4"
        + (f", and W x {p}, cast once" if p != z.weight else ""),
    )  # fmt: skip
    yield Term(
        name="squares of one input", bytes=tokens * max(s.input_widths()) * (4 + (0 if p == 4 else 4)),
        place="device", stages=("statistics",), why="widest input in float32, for the sum of its squares",
    )  # fmt: skip
    if z.recipe.scores.method == "obs":
        squares = [width * width for width in s.input_widths()]
        yield Term(
            name="input covariances", bytes=4 * sum(squares), place="device", stages=("statistics", "scores"),
            why="I x I float32 for every different input of the block",
        )  # fmt: skip
        yield Term(
            name="inverse of one covariance", bytes=12 * max(squares), place="device", stages=("scores",),
            why="copy, Cholesky factor and inverse of the widest, float32",
        )  # fmt: skip
    yield Term(
        name="scores of the largest linear", bytes=4 * s.largest_linear, place="device", stages=("scores",),
        why=f"L {s.largest_linear:,} x 4",
    )  # fmt: skip
    rows = min(s.largest_linear, SORTED_AT_ONCE)
    each = 48 if z.choices.gpu else 12
    yield Term(
        name="making and ordering scores", bytes=max(4 * s.largest_linear, rows * each), place="device",
        stages=("scores",), why=f"the larger of L x 4, and {rows:,} numbers at once x {each}: sorted copy, int64 order"
        + (", buffers of the GPU's sort (from its source, not measured)" if z.choices.gpu else ""),
    )  # fmt: skip
    yield Term(
        name="masks", bytes=z.masks * s.block_linears, place="device", stages=PER_BLOCK[1:],
        why=f"W x {z.masks}: a byte of drop levels, and one a pattern ({z.patterns})",
    )  # fmt: skip
    yield Term(
        name="adapters", bytes=4 * z.adapter, place="device", stages=PER_BLOCK[1:],
        why=f"{z.adapter:,} float32 numbers: stacked rank x (inputs + outputs)",
    )  # fmt: skip


def _training(z: Sizes) -> Iterator[Term]:
    s, p, moved = z.shapes, z.product, z.recipe.block.base_lr > 0
    trained = z.adapter + (s.block_linears if moved else 0)
    if not z.recipe.block.steps:
        return
    yield Term(
        name="gradients and Adam's moments", bytes=12 * trained, place="device", stages=("training",),
        why=f"3 x {trained:,} float32 numbers",
    )  # fmt: skip
    if z.choices.gpu or moved:
        each = 4 * trained if z.choices.gpu else 8 * s.largest_linear
        yield Term(
            name="temporaries of Adam", bytes=each, place="device", stages=("training",), why="square roots, float32"
        )
    yield Term(
        name="effective weights and masks", bytes=(p + 1) * s.block_linears, place="device", stages=("training",),
        why=f"W x ({p} + 1), kept for one level's backward pass at a time",
    )  # fmt: skip
    extra = 4 + p if p != 4 or z.weight != 4 else 4
    yield Term(
        name="merging and gradient of one linear", bytes=extra * s.largest_linear, place="device",
        stages=("training",), why=f"L x {extra}: weight + B A in float32, or the whole weight's gradient",
    )  # fmt: skip
    tokens = z.recipe.block.batch_size * z.recipe.calibration.length
    inner = max(linear.inputs for linear in s.linears)
    yield Term(
        name="activations kept for the backward pass", bytes=z.kept_for_backward(tokens), place="device",
        stages=("training",), why=f"{z.kept_for_backward(tokens) // tokens:,} bytes a token: inputs and outputs of "
        f"linears, norms and loss in float32{', attention' if z.attention(tokens) else ''}; B x T = {tokens:,}",
    )  # fmt: skip
    yield Term(
        name="gradients on their way", bytes=tokens * (inner * p + 2 * s.width * 4), place="device",
        stages=("training",), why=f"B x T x (inner width {inner:,} x {p} + 2 x D x 4)",
    )  # fmt: skip


def _end_to_end(z: Sizes) -> Iterator[Term]:
    if z.choices.trainable == "off":
        return
    s, p, wanted, stage = z.shapes, z.product, z.recipe.end_to_end, ("end to end",)
    base = z.choices.trainable == "base"
    yield Term(
        name="all blocks, elastic", bytes=s.depth * z.trained_block, place="device", stages=("end to end", "saving"),
        why=f"{s.depth} x (dense weights, masks, float32 adapters{', float32 masters' if z.moves_base else ''})",
    )  # fmt: skip
    trained = s.depth * (z.adapter + (s.block_linears if base else 0))
    yield Term(
        name="gradients and Adam's moments", bytes=12 * trained, place="device", stages=stage,
        why=f"3 x {trained:,} float32 numbers",
    )  # fmt: skip
    depth = 1 if wanted.gradient_checkpointing else s.depth
    yield Term(
        name="effective weights and masks", bytes=depth * (p + 1) * s.block_linears, place="device", stages=stage,
        why=f"{depth} x W x ({p} + 1), kept for the backward pass",
    )  # fmt: skip
    yield Term(
        name="merging and gradient of one linear", bytes=(8 if p == 4 else 6) * s.largest_linear, place="device",
        stages=stage, why="largest linear in float32 and in products",
    )  # fmt: skip
    tokens = wanted.batch_size * z.recipe.calibration.length
    yield backward_term(z, tokens, f"{tokens:,} tokens", stage, checkpointed=wanted.gradient_checkpointing)
    yield head_term(z, tokens, stage, z.weight)


def _saving(z: Sizes) -> Iterator[Term]:
    s, state = z.shapes, z.masks * z.shapes.block_linears + 4 * z.adapter
    moved = 4 * s.block_linears if z.recipe.block.base_lr > 0 else 0
    if z.choices.gpu:
        yield Term(
            name="a finished block on its way to disk", bytes=state + moved, place="host", stages=("commit",),
            why="masks (a byte each), float32 adapters" + (", float32 weights" if moved else ""),
        )  # fmt: skip
    yield Term(
        name="pattern masks as bytes", bytes=z.patterns * s.block_linears, place="device", stages=("commit",),
        why=f"W x {z.patterns}, copied as they are written",
    )  # fmt: skip
    stored, densest = s.stored, 1 - min((*z.recipe.ladder.sparsities, 1.0))
    if z.choices.trainable == "off" and z.choices.weights == "resident":
        yield Term(
            name="all blocks, elastic", bytes=s.depth * z.trained_block, place="device", stages=("saving",),
            why=f"{s.depth} x (dense weights, masks, float32 adapters)",
        )  # fmt: skip
    read = 0 if z.choices.weights == "resident" else (4 if moved else z.weight) + 1 + 2 * z.patterns
    each = read + stored + 4 + (densest or 1) * (stored + 8)
    linear, other = int(each * s.largest_linear), s.largest * max(stored + z.weight, 2 * stored + 3)
    yield Term(
        name="largest linear or embedding while it is written", bytes=max(linear, other), place="host",
        stages=("saving",), why=f"linear: L x {each:.1f} (itself as read and as stored, masks, int64 positions and "
        f"values of what is kept); embedding: {s.largest:,} x {other // s.largest}",
    )  # fmt: skip


def _disk(z: Sizes) -> Iterator[Term]:
    s, moved = z.shapes, 4 * z.shapes.block_linears if z.recipe.block.base_lr > 0 else 0
    each = z.masks * s.block_linears + 4 * z.adapter + moved
    yield Term(
        name="finished blocks", bytes=s.depth * each, place="disk", stages=STAGES[6:],
        why=f"{s.depth} x (masks a byte each, float32 adapters{', float32 weights' if moved else ''}), until the end",
    )  # fmt: skip
    yield Term(
        name="hidden states", bytes=2 * z.streams * z.stream, place="disk", stages=("commit",),
        why=f"{z.streams} streams, of this block and of the next: 2 x {z.streams} x S x T x D x {z.weight}, kept for a "
        "resume wherever they live",
    )  # fmt: skip
    if z.choices.trainable != "off":
        trained = s.depth * (z.adapter + (s.block_linears if z.choices.trainable == "base" else 0))
        yield Term(
            name="snapshots of the end-to-end phase", bytes=24 * trained, place="disk",
            stages=("end to end", "saving"), why=f"2 (old and new) x 3 x {trained:,} float32 numbers",
        )  # fmt: skip
    size = checkpoint_bytes(z)
    yield Term(
        name="checkpoint", bytes=size, place="disk", stages=STAGES[STAGES.index("saving") :],
        why="values, positions and bitmaps of all levels, adapters, embeddings; a pattern's weights as if by chance "
        "(so at most)",
    )  # fmt: skip
    if not s.has_weights:
        yield Term(
            name="base model", bytes=s.total * s.stored, place="disk", stages=STAGES,
            why=f"{s.total:,} numbers x {s.stored}; downloaded first",
        )  # fmt: skip
