"""What a run will need, before any work: memory, disk, token-passes, operations, and from a probe the time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from elastic_sparsity.adding import check_structured
from elastic_sparsity.allocation_file import allocation_of, load_plan
from elastic_sparsity.config import Recipe, StructuredSection, make_recipe
from elastic_sparsity.errors import ConfigError, MemoryPlanError
from elastic_sparsity.free_memory import free_here
from elastic_sparsity.memory_plan import memory_terms, peaks
from elastic_sparsity.model_shapes import ModelShapes, model_config, read_shapes, shapes_model
from elastic_sparsity.plan_sizes import Choices, Peak, Sizes, Term, Work
from elastic_sparsity.precision import computing_dtype, default_device, resolve_precision
from elastic_sparsity.supernet import linear_sizes
from elastic_sparsity.work_plan import Timing, seconds_of, work_of

Probe = Callable[..., Timing]


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """A change of the recipe that would lower a peak: what to set, and the peak then, in bytes."""

    setting: str
    place: str
    bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run before it runs.

    Attributes:
        limits: bytes of each place that may be used; a place without a limit is missing.
        terms: everything that will take memory or disk, with the stages in which it does.
        timing: of the probe; None if there was none.
        seconds: the estimate from it.
        knobs: what would lower the peaks that do not fit.
    """

    model: str
    choices: Choices
    limits: dict[str, int]
    terms: tuple[Term, ...]
    peaks: tuple[Peak, ...]
    work: tuple[Work, ...]
    timing: Timing | None
    seconds: float | None
    knobs: tuple[Knob, ...]

    @property
    def misfits(self) -> list[Peak]:
        """Peaks beyond their limit."""
        return [peak for peak in self.peaks if peak.bytes > self.limits.get(peak.place, peak.bytes)]

    def check(self) -> None:
        """Raises: MemoryPlanError: if something does not fit, naming the place, the figures and what helps."""
        if not self.misfits:
            return
        parts = [
            f"{peak.place}: needs {_gb(peak.bytes)} (stage {peak.stage!r}), has {_gb(self.limits[peak.place])}"
            for peak in self.misfits
        ]
        helps = [f"{x.setting} ({x.place} then {_gb(x.bytes)}{'' if x.fits else ', not enough alone'})"
                 for x in self.knobs]  # fmt: skip
        advice = "; ".join(helps) if helps else "no knob of the recipe helps: use a machine with more"
        raise MemoryPlanError(f"plan: {self.model} does not fit. {'; '.join(parts)}. What helps: {advice}.")


def plan(
    recipe: Recipe,
    *,
    config_file: Path | None = None,
    limits: dict[str, int] | None = None,
    gpu: bool | None = None,
    probe: bool | None = None,
) -> Plan:
    """Plans a run from the model's config alone; no weight is read.

    Args:
        config_file: a config.json to use instead of the model's.
        limits: bytes of "device", "host" and "disk"; a missing place is not limited (plan for other machines).
        gpu: plan for a GPU; None = as this machine is, or yes if `limits` names the device.
        probe: time a block with random weights here; None = if the model's weights are here.
    Raises: ConfigError (also for structured fractions, patterns, a dtype and an allocation plan that a run would
        refuse), UnsupportedModelError. Not if it does not fit: see `Plan.check`.
    """
    shapes = read_shapes(recipe.model.id, recipe.model.dtype, config_file)
    check_patterns(recipe, shapes)
    if shapes.stored not in (2, 4):
        raise ConfigError(
            f"model.dtype: the weights have {shapes.stored} bytes a number, which no stage takes; set 'float32'."
        )
    if recipe.structured.fractions or recipe.allocation.plan is not None:
        model = shapes_model(recipe.model.id, config_file)
        check_structured(recipe, model)
        if recipe.allocation.plan is not None:
            path = Path(recipe.allocation.plan)
            allocation_of(load_plan(path), path, linear_sizes(model), recipe.ladder.sparsities)
    limits = dict(limits or {})
    wrong = sorted(limits.keys() - {"device", "host", "disk"})
    if wrong or any(size <= 0 for size in limits.values()):
        raise ConfigError(f"plan: limits {limits}: expected device, host and disk, in bytes above zero.")
    if gpu is None:
        gpu = "device" in limits or default_device() == "cuda"
    if "device" in limits and not gpu:
        raise ConfigError("--device-memory: without a GPU the host's memory is the device's; give --host-memory.")
    choices = choose(recipe, shapes, limits, gpu)
    sizes, terms = Sizes(shapes, recipe, choices), memory_terms(shapes, recipe, choices)
    work, timing = work_of(sizes), None
    if shapes.has_weights if probe is None else probe:
        timing = _probe(recipe, shapes, choices, config_file)
    found = Plan(
        model=shapes.name, choices=choices, limits=limits, terms=tuple(terms), peaks=tuple(peaks(terms)),
        work=tuple(work), timing=timing, seconds=seconds_of(sizes, work, timing) if timing else None, knobs=(),
    )  # fmt: skip
    if not found.misfits:
        return found
    knobs = tuple(_knobs(recipe, shapes, found))
    return replace(found, knobs=knobs)


def check_patterns(recipe: Recipe, shapes: ModelShapes) -> None:
    """Raises: ConfigError: if a linear's inputs are not whole groups of one of the ladder's N:M patterns."""
    patterns = [(level.name, level.pattern[1]) for level in recipe.build_ladder().levels if level.pattern]
    for (name, group_size), linear in product(patterns, shapes.linears):
        if linear.inputs % group_size:
            raise ConfigError(
                f"ladder.patterns: {name!r}: {linear.path} of every block has {linear.inputs} inputs, which is no "
                f"multiple of {group_size}; drop this pattern or take one whose M divides it."
            )


def choose(recipe: Recipe, shapes: ModelShapes, limits: dict[str, int], gpu: bool, num_workers: int = 1) -> Choices:
    """What "auto" becomes: the first that fits, of what is fastest; if nothing does, what takes least.

    Training end to end is worth more than weights in memory, and these more than hidden states on the device.
    """
    precision = _precision(recipe, gpu)
    wanted = recipe.end_to_end.trainable if recipe.end_to_end.steps else "off"
    trainables = ("base", "adapters", "off") if wanted == "auto" else (wanted,)
    weights = ("resident", "stream") if recipe.memory.weights == "auto" else (recipe.memory.weights,)
    streams = not recipe.model.id.endswith(".gguf") and not recipe.model.id.startswith("random:")
    if recipe.memory.weights == "auto" and not streams:
        weights = ("resident",)  # no files to read in blocks
    if recipe.needs_whole_model:
        weights = ("resident",)
    where = recipe.memory.activations
    places = (("device", "host", "disk") if gpu else ("host", "disk")) if where == "auto" else (where,)
    # A recipe that asks for both by name gets both, and with one process the error that says what is missing.
    shared = recipe.end_to_end.shard and (num_workers > 1 or (wanted != "auto" and weights == ("stream",)))
    options = [
        Choices(weights=weight, activations=place, trainable=trainable, precision=precision, gpu=gpu)
        for trainable, weight, place in product(trainables, weights, places)
        if weight == "resident" or trainable == "off" or shared
    ]
    if not options:  # streamed weights and "auto": off, as a run does
        options = [Choices(weights="stream", activations=places[-1], trainable="off", precision=precision, gpu=gpu)]
    for option in options:
        if fits(recipe, shapes, option, limits):
            return option
    return options[-1]


def fits(recipe: Recipe, shapes: ModelShapes, choices: Choices, limits: dict[str, int]) -> bool:
    """Whether no place's peak is beyond its limit.

    Structured levels come after all that is chosen, and need what they need whatever it is: they are left out.
    """
    alone = recipe.model_copy(update={"structured": StructuredSection()})
    return not misfits(alone, shapes, choices, limits)


def misfits(recipe: Recipe, shapes: ModelShapes, choices: Choices, limits: dict[str, int]) -> list[Peak]:
    """Peaks beyond their limit."""
    found = peaks(memory_terms(shapes, recipe, choices))
    return [peak for peak in found if peak.bytes > limits.get(peak.place, peak.bytes)]


def _precision(recipe: Recipe, gpu: bool) -> str:
    if gpu and default_device() != "cuda":  # planned for another machine: GPUs multiply bfloat16
        return "bfloat16" if recipe.precision == "auto" else recipe.precision
    return resolve_precision(recipe.precision, "cuda" if gpu else "cpu")


def _probe(recipe: Recipe, shapes: ModelShapes, choices: Choices, config_file: Path | None) -> Timing:
    from elastic_sparsity.probe import probe  # slow import, only here

    dtype = computing_dtype(shapes.dtype, choices.precision, "cuda" if choices.gpu else "cpu")
    one = replace(choices, weights="stream", activations="disk", trainable="off")
    needed = max(p.bytes for p in peaks(memory_terms(shapes, recipe, one)) if p.place != "disk")
    if needed > free_here()["host"]:
        raise ConfigError(f"--probe: one block needs {_gb(needed)} here, which is not free; give --no-probe.")
    config = model_config(recipe.model.id, config_file)
    return probe(recipe, config, choices.trainable, choices.precision, dtype)


def _knobs(recipe: Recipe, shapes: ModelShapes, found: Plan) -> Iterator[Knob]:
    """Single changes that lower a peak that does not fit by 1 % or more, the strongest first."""
    for misfit in found.misfits:
        place, best = misfit.place, []
        for setting, changes in _settings(recipe, found.choices):
            try:
                changed = make_recipe(_merged(recipe.model_dump(mode="json"), changes))
            except ConfigError:
                continue  # not with the rest of this recipe
            choices = choose(changed, shapes, found.limits, found.choices.gpu)
            size = next((p.bytes for p in peaks(memory_terms(shapes, changed, choices)) if p.place == place), 0)
            if size < 0.99 * misfit.bytes:
                best.append(Knob(setting=setting, place=place, bytes=size, fits=size <= found.limits[place]))
        yield from sorted(best, key=lambda knob: knob.bytes)


def _settings(recipe: Recipe, choices: Choices) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    off = {"trainable": "off"}
    if recipe.structured.fractions and recipe.structured_steps:
        yield "structured.steps = 0", {"structured": {"steps": 0}}
    if recipe.induction.steps:
        absorbed = recipe.induction.reading == "absorbed"
        setting = "induction.steps = 0" + absorbed * ' with induction.reading = "scores"'
        yield setting, {"induction": {"steps": 0, "reading": "scores"}}
    if recipe.induction.folds:
        yield "induction.folds = []", {"induction": {"folds": []}}
    if recipe.allocation.search:
        yield "allocation.search = false", {"allocation": {"search": False}}
    if choices.weights == "resident" and not recipe.needs_whole_model:
        both = choices.trainable != "off"
        text = 'memory.weights = "stream"' + (' with end_to_end.trainable = "off"' if both else "")
        yield text, {"memory": {"weights": "stream"}, "end_to_end": off}
    if choices.activations == "device":
        yield 'memory.activations = "host"', {"memory": {"activations": "host"}}
    if choices.activations != "disk":
        yield 'memory.activations = "disk"', {"memory": {"activations": "disk"}}
    if choices.trainable == "base":
        yield 'end_to_end.trainable = "adapters"', {"end_to_end": {"trainable": "adapters"}}
    if choices.trainable != "off":
        yield 'end_to_end.trainable = "off"', {"end_to_end": off}
    if choices.trainable != "off" or (recipe.structured.fractions and recipe.structured_steps):
        if not recipe.end_to_end.gradient_checkpointing:
            yield "end_to_end.gradient_checkpointing = true", {"end_to_end": {"gradient_checkpointing": True}}
        if recipe.end_to_end.batch_size > 1:
            yield "end_to_end.batch_size = 1", {"end_to_end": {"batch_size": 1}}
    if recipe.block.base_lr:
        yield "block.base_lr = 0", {"block": {"base_lr": 0.0}}
    if recipe.block.batch_size > 1:
        yield "block.batch_size = 1", {"block": {"batch_size": 1}}
    if recipe.block.samples > 1:
        half = recipe.block.samples // 2
        yield f"block.samples = {half}", {"block": {"samples": half}}
    if recipe.calibration.length > 64:
        half = recipe.calibration.length // 2
        yield f"calibration.length = {half}", {"calibration": {"length": half}}


def _merged(data: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**data, **{section: {**data[section], **fields} for section, fields in changes.items()}}


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
