"""The words and rows that the page and the model card share. Plain text: each of them escapes it for its own format."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from elastic_sparsity.report import human_bytes, level_title, task_lines
from elastic_sparsity.report_facts import Facts, Figure, LevelFacts
from elastic_sparsity.report_results import DENSE, Measured, QualityRow, TaskRow

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
DRAWN_METHODS, DRAWN_MAPS, DRAWN_LOSSES = 8, 6, 20  # the tables have all
NO_FIGURES = (
    "No quality is stored in this checkpoint: neither perplexity nor KL to the dense model was measured. "
    "elastic-sparsity eval measures both, report --results shows them."
)
ONLY_LATER = (
    "The run itself stored no quality in this checkpoint; what elastic-sparsity eval measured later stands below as "
    "far as this report was given it."
)
ACCURACIES = "Accuracies, exact matches and F1 in percent, ± standard error over documents. "
QUALITY_HEAD = ("level", "perplexity", "KL to the reference")
NO_LOSSES = "This checkpoint has no training record by block, so there is no error by layer to show."


def number(value: float | None, digits: int) -> str:
    """A measured figure; what was not measured or is not finite is said in words."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.4g}"


def perplexity(figure: Figure | QualityRow | None) -> str:
    return number(figure.perplexity if figure else None, 2)


def kl(figure: Figure | QualityRow | None) -> str:
    if isinstance(figure, Figure) and figure.method == "dense":
        return "0"  # by definition
    return number(figure.kl if figure else None, 4)


def zeros(level: LevelFacts) -> str:
    """Share of zeros; what a pattern promises is a lower bound."""
    return f"{'>= ' if level.is_pattern else ''}{100 * level.sparsity:.2f} %{' removed' if level.is_structured else ''}"


def lead(facts: Facts) -> str:
    """What this is, in two sentences."""
    base, count = facts.base_id or "a base model that is not recorded", len(facts.levels)
    levels = listed([level.title for level in facts.levels])
    return (
        f"One elastic sparse checkpoint of {base}: a folder that is sliced at load time to any of its "
        f"{count} {'level' if count == 1 else 'levels'} ({levels}). A level is an ordinary Hugging Face causal "
        f"language model with exact zeros, and reads only its own part of {size(facts.total_bytes)}."
    )


def listed(names: Sequence[str], most: int = 12) -> str:
    """a, b, c ... of many."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} ... of {len(names)}"


def drawn(count: int, most: int, what: str) -> str:
    """What a caption adds if not all is drawn."""
    return "" if count <= most else f" Of {count:,} {what}, {most} are drawn."


def size(count: float) -> str:
    return human_bytes(count)


def example_level(facts: Facts) -> LevelFacts:
    """A level to show commands with: of those that are here the middle one."""
    here = [level for level in facts.levels if level.available] or list(facts.levels)
    return here[(len(here) - 1) // 2]


def protocol(facts: Facts) -> str:
    """What the figures were measured on, as one sentence."""
    if not facts.figures:
        return ONLY_LATER if facts.results.quality else NO_FIGURES
    if not facts.protocol:
        return "How these figures were measured is not recorded."
    return f"Measured on: {'; '.join(x if key == 'windows' else f'{key} {x}' for key, x in facts.protocol)}."


def sources(facts: Facts) -> str:
    """Where everything in the report comes from."""
    results = facts.results.quality or facts.results.tasks
    return f"the checkpoint's own files {'and result files of eval' if results else 'alone'}"


def measured_later(measured: Measured[Any]) -> str:
    """What rows of `eval` were measured on, when and where, as one or two sentences."""
    told = "; ".join(x if key == "windows" else f"{key} {x}" for key, x in measured.protocol)
    return f"Measured on: {told or NOT_RECORDED}. By elastic-sparsity eval, {measured.when_and_where}."


def quality_rows(measured: Measured[QualityRow]) -> list[tuple[str, str, str]]:
    """Level, perplexity and KL; the last is to whatever reference the protocol names."""
    return [(level_title(row.level), perplexity(row), kl(row)) for row in measured.rows]


def task_rows(measured: Measured[TaskRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: a task a line, the mean last, a level a column."""
    return task_lines([{**row.model_dump(), "method": ""} for row in measured.rows])


def other_rows(facts: Facts) -> list[Figure]:
    """Figures of the dense model and of other methods, and elastic ones of levels that the ladder lacks."""
    names = {level.name for level in (*facts.levels, *facts.structured)}
    shown = {id(facts.figure(name, "elastic")) for name in names}
    return [row for row in facts.figures if id(row) not in shown]


def row_title(figure: Figure) -> str:
    return level_title(figure.level)


def totals(facts: Facts) -> list[tuple[str, int]]:
    """Bytes of all levels together, in four ways; the last two are computed."""
    count = len(facts.levels)
    return [
        ("this checkpoint, all levels", facts.total_bytes),
        (f"{count} x single-level elastic folder", sum(level.bytes for level in facts.levels)),
        (f"{count} x bitmask file, merged (computed)", sum(level.alone_bytes for level in facts.levels)),
        (f"{count} x dense file with zeros (computed)", count * facts.dense_bytes),
    ]


def made_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """How the checkpoint was made: (what, value), values not recorded said so."""
    yield "base model", facts.base_id or NOT_RECORDED
    yield "sha256 of the base's weights", facts.base_sha256 or NOT_RECORDED
    yield "architecture", facts.model_type or NOT_RECORDED
    yield "sparsified", f"{facts.num_weights:,} weights in {facts.num_linears:,} linears"
    yield "values, adapters", f"{facts.dtype}, {facts.adapter_dtype}"
    yield "adapter ranks", f"{listed([str(rank) for rank in facts.ranks])}; inheritance {facts.inheritance}"
    if not facts.calibration:
        yield "calibration text", NOT_RECORDED
    for key, value in facts.calibration:
        yield f"calibration {key}", value
    yield "seed", facts.seed or NOT_RECORDED
    yield "precision of products", facts.precision or NOT_RECORDED
    yield "trained end to end", facts.trainable or NOT_RECORDED
    if facts.end_to_end_kl:
        pairs = [f"{level_title(name)} {number(value, 4)}" for name, value in facts.end_to_end_kl]
        yield "training KL to dense at its end", listed(pairs)
    yield "versions", listed([f"{name} {version}" for name, version in facts.versions]) or NOT_RECORDED
    yield "checkpoint id", facts.checkpoint_id
    yield from _run_rows(facts)


def _run_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    run = facts.run
    if run is None:
        yield "time and peak memory of the run", f"{NOT_RECORDED} (no run.json here that can be read)"
        return
    yield "time of the run", NOT_RECORDED if run.seconds is None else duration(run.seconds)
    yield "peak memory of the run", NOT_RECORDED if run.peak_bytes is None else size(run.peak_bytes)
    if run.workers is not None and run.workers > 1:
        traffic = NOT_RECORDED if run.traffic_bytes is None else size(run.traffic_bytes)
        yield "processes", f"{run.workers:.0f}; exchanged by each {traffic}"


def duration(seconds: float) -> str:
    """93 -> "1 min 33 s"."""
    if seconds < 60 or seconds > 1e9:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def limits(facts: Facts) -> Iterator[str]:
    """What the figures do not say, and what was not measured, one sentence or two each."""
    yield from _missing_figures(facts)
    if facts.figures or facts.results.quality:
        yield "Perplexity on one text says little about answers, reasoning, other languages or safety."
    yield from _tasks_limits(facts)
    if ("text", "self-sampled, held out") in facts.protocol:
        yield "The figures are of text that the base model itself wrote, not of people's text; they flatter."
    yield "One run, one seed: how much the figures would vary between runs was not measured."
    if any(level.is_pattern for level in facts.levels):
        yield "Zeros of an N:M level are what its pattern promises; there may be more."
    yield (
        "Zeros alone make nothing faster: time and memory in use were not measured here. elastic-sparsity bench "
        "measures them on your device."
    )
    missing = [level.title for level in facts.levels if not level.available]
    if missing:
        yield f"The files of {listed(missing)} are not in this folder; elastic-sparsity upgrade fetches them."
    if facts.license is None:
        yield "The base model's license is not recorded here. It applies to this checkpoint too; look it up."
    yield "The base model's own limits hold for every level; what else its sparse copies get wrong was not measured."


def _tasks_limits(facts: Facts) -> Iterator[str]:
    if not facts.results.tasks:
        yield "Task accuracy was not measured, or is not among what this report was given."
        return
    yield "Standard errors of accuracies are over documents alone; a few points between levels can be chance."
    if not any(row.level == DENSE for measured in facts.results.tasks for row in measured.rows):
        yield "Task accuracy of the dense model is not among what this report was given."


def _missing_figures(facts: Facts) -> Iterator[str]:
    if not facts.figures:
        yield "The run itself measured no quality." if facts.results.quality else NO_FIGURES
        return
    found = [(level.title, facts.figure(level.name, "elastic")) for level in facts.levels]
    no_perplexity = [title for title, row in found if row is None or row.perplexity is None]
    no_kl = [title for title, row in found if row is None or row.kl is None]
    if no_perplexity:
        yield f"Perplexity was not measured at {listed(no_perplexity)}."
    if no_kl:
        yield f"KL to the dense model was not measured at {listed(no_kl)}."
    odd = [title for title, row in found if row and row.perplexity is not None and not math.isfinite(row.perplexity)]
    if odd:
        yield f"The recorded perplexity at {listed(odd)} is no finite number; do not use that level."
    if facts.figure("dense", "dense") is None:
        yield "The dense model was not measured beside the levels."
    if not set(facts.methods) - {"elastic"}:
        yield "No other pruning method was measured on the same text."
