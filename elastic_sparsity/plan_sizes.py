"""The vocabulary of a plan (stages, choices, terms, peaks, work), and sizes that several of its terms are made of."""

from dataclasses import dataclass

from elastic_sparsity.allocation import TOP
from elastic_sparsity.config import Recipe
from elastic_sparsity.data import rows_together
from elastic_sparsity.ladder import keep_count
from elastic_sparsity.model_shapes import ModelShapes
from elastic_sparsity.precision import computing_dtype
from elastic_sparsity.shells import LinearSpec

STAGES = (
    "load", "induction", "allocation", "statistics", "scores", "training", "commit",
    "end to end", "saving", "structured", "tuning",
)  # fmt: skip
PER_BLOCK = STAGES[3:7]
PLACES = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """How a run will be done, nothing left to "auto".

    Attributes:
        weights: "resident" or "stream".
        activations: "device", "host" or "disk".
        trainable: of the end-to-end phase: "base", "adapters" or "off".
        precision: "float32" or "bfloat16" products.
        gpu: whether the device has memory of its own.
    """

    weights: str
    activations: str
    trainable: str
    precision: str
    gpu: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """Something that takes `bytes` of `place` during `stages`; `why` says how it was computed."""

    name: str
    bytes: int
    place: str
    stages: tuple[str, ...]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The largest need of a place, in which stage it comes, and what it is made of."""

    place: str
    bytes: int
    stage: str
    terms: tuple[Term, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One kind of work.

    Attributes:
        phase: "allocation", "induction", "block phase", "end to end" or "structured".
        direction: "forward", or "forward and backward".
        passes: token-passes.
        flops: floating-point operations of matrix products, attention and merging.
        is_head: whether its passes are through the head, not through blocks.
        in_steps: whether it is the training steps that a probe times whole; other passes take a forward's time each,
            and with a backward pass three times that.
    """

    name: str
    phase: str
    direction: str
    passes: int
    flops: float
    is_head: bool = False
    in_steps: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers that several terms need."""

    shapes: ModelShapes
    recipe: Recipe
    choices: Choices

    @property
    def product(self) -> int:
        return 2 if self.choices.precision == "bfloat16" else 4

    @property
    def weight(self) -> int:
        device = "cuda" if self.choices.gpu else "cpu"
        return computing_dtype(self.shapes.dtype, self.choices.precision, device).itemsize

    @property
    def moves_base(self) -> bool:
        return self.recipe.block.base_lr > 0 or self.choices.trainable == "base"

    @property
    def dense(self) -> int:
        """Bytes of the dense weight beside the trained one; `weight` itself if training does not move it."""
        return min(self.product, self.weight) if self.moves_base else self.weight

    @property
    def adapter(self) -> int:
        """Numbers of a block's adapters."""
        return sum(self.recipe.group_ranks()) * self.shapes.block_sides

    @property
    def streams(self) -> int:
        """Different hidden states that a block starts from, with the dense model's."""
        mode = self.recipe.mixer.mode
        return {"dense": 1, "fixed": 2}.get(mode, self.recipe.build_ladder().num_groups + 1)

    @property
    def stream(self) -> int:
        """Bytes of one stream."""
        return self.recipe.block.samples * self.recipe.calibration.length * self.shapes.width * self.weight

    @property
    def patterns(self) -> int:
        return len(self.recipe.ladder.patterns)

    @property
    def masks(self) -> int:
        """Bytes a weight of drop levels and pattern masks."""
        return bool(self.recipe.ladder.sparsities) + self.patterns

    @property
    def trained_block(self) -> int:
        """Bytes of a block after its training, as a model in memory keeps it."""
        s = self.shapes
        master = 4 * s.block_linears if self.moves_base else 0
        return (self.dense + self.masks) * s.block_linears + master + 4 * self.adapter + self.weight * s.block_other

    def kept_for_backward(self, tokens: int) -> int:
        """Bytes of the activations that one block keeps for its backward pass, for so many tokens of a batch."""
        s, p = self.shapes, self.product
        inputs, outputs = sum(s.input_widths()), sum(linear.outputs for linear in s.linears)
        gated = any(linear.path.endswith(("gate_proj", "gate_up_proj")) for linear in s.linears)
        inner = max(linear.inputs for linear in s.linears)
        relu = any(
            linear.path == "fc1" for linear in s.linears
        )  # OPT: keeps what it gives, which the next linear keeps
        function = inner if gated else -inner if relu else 0
        # Inputs and outputs of linears; the activation function's; norms and the loss in float32.
        numbers = p * (inputs + outputs + function) + s.width * (4 * s.norms + self.weight + 4 * 2)
        if s.head_norms:
            numbers += 4 * (s.heads + s.kv_heads) * s.head_dim
        return tokens * numbers + self.attention(tokens)

    def attention(self, tokens: int) -> int:
        """Bytes of attention's probabilities: kept by our bfloat16 kernel on a CPU only, half of T x T a head."""
        if self.choices.gpu or self.product != 2:
            return 0
        return tokens * (self.recipe.calibration.length + 128) // 2 * self.shapes.heads * 2


def teacher_term(z: Sizes, samples: int, stages: tuple[str, ...]) -> Term:
    """What a search keeps of the dense model, to judge by so many samples."""
    length, top = z.recipe.calibration.length, min(TOP, z.shapes.vocabulary - 1)
    return Term(
        name="the dense model's likeliest tokens", bytes=samples * length * top * 8, place="device", stages=stages,
        why=f"{samples} samples x T x {top} tokens x 8",
    )  # fmt: skip


def backward_term(z: Sizes, tokens: int, times: str, stages: tuple[str, ...], *, checkpointed: bool = False) -> Term:
    """What a gradient through all blocks keeps.

    Args:
        times: how the tokens are called.
        checkpointed: one block at a time, and all blocks' inputs.
    """
    blocks, kept = z.shapes.depth, z.kept_for_backward(tokens)
    depth = 1 if checkpointed else blocks
    inputs = tokens * z.shapes.width * z.weight * blocks if checkpointed else 0
    return Term(
        name="activations kept for the backward pass", bytes=depth * kept + inputs, place="device", stages=stages,
        why=f"{depth} block(s) x {kept // tokens:,} bytes a token x {times}"
        + (f", and {blocks} blocks' inputs" if inputs else ""),
    )  # fmt: skip


def head_term(z: Sizes, tokens: int, stages: tuple[str, ...], weight: int) -> Term:
    """What the KL to the dense model's logits takes. Args: weight: bytes of a number of the head."""
    s, p = z.shapes, z.product
    head = s.vocabulary * s.width * p if p != weight else 0
    return Term(
        name="head and logits", bytes=head + 128 * s.vocabulary * (3 * 4 + 4 * p) + 6 * tokens * s.width * 4,
        place="device", stages=stages, why="128 tokens' logits of both models in float32, final hidden states"
        + (f", the head cast to {p} bytes" if head else ""),
    )  # fmt: skip


def sampling_term(z: Sizes) -> Term:
    """Text that the model writes itself, its sequences side by side."""
    s, p = z.shapes, z.product
    numbers = s.rest + s.depth * (s.block_linears + s.block_other)
    sequence = 2 * s.depth * s.kv_heads * s.head_dim * z.recipe.calibration.length * p
    rows = min(rows_together(numbers * p, sequence), z.recipe.calibration.self_samples)
    copied = 0 if s.stored == p else numbers * p
    return Term(
        name="sampling calibration text", bytes=copied + rows * (sequence + s.vocabulary * 16), place="device",
        stages=("load",),
        why=f"{rows} sequences x (keys and values {sequence:,} + V {s.vocabulary:,} x 16 of logits and their softmax)"
        f"{', a cast copy of the weights' if copied else ''}",
    )  # fmt: skip


def checkpoint_bytes(z: Sizes) -> int:
    """About the size of the checkpoint. Exact but for the values that only N:M levels keep."""
    s, ladder = z.shapes, z.recipe.build_ladder()
    dtype = {"float32": 4, "bfloat16": 2, "float16": 2}.get(z.recipe.checkpoint.dtype, s.stored)
    total = s.rest * dtype + s.depth * (s.block_other * dtype + z.adapter * dtype)
    for linear in s.linears:
        kept = tuple(keep_count(linear.inputs, sparsity) for sparsity in ladder.sparsities)
        uncovered, new = linear.size - linear.outputs * (kept[0] if kept else 0), []
        for level in ladder.levels:
            if level.pattern:
                added = int(uncovered * level.pattern[0] / level.pattern[1])
                new.append(added)
                uncovered -= added
        spec = LinearSpec(shape=(linear.outputs, linear.inputs), transposed=False, kept=kept, pattern_values=tuple(new))
        for shell in range(len(kept) + len(new)):
            sizes = {part: shape[0] for part, shape in spec.shell_shapes(shell).items()}
            total += s.depth * sum(count * (dtype if part == "values" else 1) for part, count in sizes.items())
    return total
