"""Choosing a level: the best measured quality that a device's bytes and milliseconds allow, and why."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.device_profile import Prediction, Profile, predict_fastest, read_profile
from elastic_sparsity.errors import ConfigError, LevelError, ProfileError, brief
from elastic_sparsity.hub import can_fetch, checkpoint_folder
from elastic_sparsity.inspection import is_number, level_info
from elastic_sparsity.ladder import AnyLevel, StructuredLevel
from elastic_sparsity.manifest import by_density
from elastic_sparsity.placement import check_runtime_name, resolve_dtype
from elastic_sparsity.precision import dtype_name
from elastic_sparsity.report import human_bytes, parse_bytes
from elastic_sparsity.ways import DENSE, RUNTIMES, Way, misfit


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A level for a device.

    Attributes:
        level: its name, as `ElasticModel.from_pretrained` takes it.
        runtime: "dense", "packed" or "semi_structured"; without a profile the one asked for, else "dense".
        dtype: by name, of the way that was predicted; without a profile the one asked for, None = the checkpoint's.
        device: "cpu" or "cuda", what the profile is of; None without a profile.
        ms_per_token: at batch 1; None without a profile.
        how: "measured", "predicted" or "estimate, not measured"; None without a profile.
        bytes: of every file of its download.
        quality: dense perplexity over the level's, as recorded when the checkpoint was made; None if not recorded.
        explanation: why this level, and why not the next better one.
    """

    level: str
    runtime: str
    dtype: str | None
    device: str | None
    ms_per_token: float | None
    how: str | None
    bytes: int
    quality: float | None
    explanation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    level: AnyLevel
    bytes: int
    available: bool
    perplexity: float | None
    quality: float | None
    prediction: Prediction | None

    @property
    def title(self) -> str:
        return f"{self.level.title} {self.prediction.way.runtime}" if self.prediction else self.level.title

    @property
    def ms_per_token(self) -> float | None:
        return None if self.prediction is None else self.prediction.ms_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class _Budget:
    max_bytes: int | None
    max_ms_per_token: float | None
    min_quality: float | None

    @property
    def seeks_smallest(self) -> bool:
        return self.max_bytes is None and self.max_ms_per_token is None

    def excess(self, found: _Candidate) -> list[tuple[float, str]]:
        """What a level misses: by which factor, and in words; empty if it meets every budget."""
        missed = []
        if self.max_bytes is not None and found.bytes > self.max_bytes:
            missed.append((found.bytes / self.max_bytes, f"its {found.bytes} bytes are over {self.max_bytes}"))
        if self.max_ms_per_token is not None and found.prediction is not None:
            ms, limit = found.prediction.ms_per_token, self.max_ms_per_token
            if ms > limit:
                words = f"its {ms:.3g} ms a token ({found.prediction.how_text}) are over {limit:g}"
                missed.append((ms / limit, words))
        if self.min_quality is not None and found.quality is None:
            missed.append((math.inf, "its quality is not recorded"))
        elif self.min_quality is not None and found.quality is not None and found.quality < self.min_quality:
            words = f"its quality {found.quality:.3g} is below {self.min_quality:g}"
            missed.append((self.min_quality / found.quality, words))
        return missed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """How a model is going to be loaded; None = not decided."""

    runtime: str | None
    dtype: str | None

    @classmethod
    def checked(cls, runtime: str | None, dtype: torch.dtype | str | None, stored: torch.dtype) -> "_Wanted":
        """Raises: ConfigError."""
        if runtime is not None:
            check_runtime_name(runtime)
        return cls(runtime=runtime, dtype=None if dtype is None else dtype_name(resolve_dtype(dtype, stored)))

    def allows(self, way: Way) -> bool:
        return self.runtime in (None, way.runtime) and self.dtype in (None, way.dtype)

    def __str__(self) -> str:
        asked = [f"{name} {value}" for name, value in (("runtime", self.runtime), ("dtype", self.dtype)) if value]
        return " and ".join(asked) or "any runtime"


def choose_level(
    path: str | Path,
    *,
    profile: Profile | str | Path | None = None,
    max_bytes: int | str | None = None,
    max_ms_per_token: float | None = None,
    min_quality: float | None = None,
    runtime: str | None = None,
    dtype: torch.dtype | str | None = None,
    **hub: Any,
) -> Choice:
    """The best level under the budgets; with `min_quality` alone, the one of fewest bytes that reaches it.

    Best is the lowest recorded perplexity; if none is recorded, the densest, a structured level after all others. Only
    levels whose files are here (of a hub id whose hub answers: all) are offered. Reads elastic_config.json only.

    Args:
        path: folder or hub id of an elastic checkpoint.
        profile: of the device: a file, a name of the package's profiles, or what `read_profile` gave. With it the level
            comes with its fastest way and the milliseconds that way needs.
        max_bytes: of all files of the download, also as "60MB".
        max_ms_per_token: at batch 1; needs `profile`.
        min_quality: dense perplexity / the level's perplexity, as recorded: 1 is as good as dense.
        runtime, dtype: how it is going to be loaded, as `ElasticModel.from_pretrained` takes them; None = whichever is
            fastest. Levels that cannot be loaded so, and milliseconds of other ways, do not count.
    Raises: LevelError: no level meets the budgets; it names the nearest. ConfigError: no budget or a wrong one.
        ProfileError: the profile has no way of this runtime and dtype. CheckpointError.
    """
    budget = _check_budget(profile, max_bytes, max_ms_per_token, min_quality)
    device = profile if profile is None or isinstance(profile, Profile) else read_profile(profile)
    checkpoint = ElasticCheckpoint(checkpoint_folder(path, None, **hub))
    wanted = _Wanted.checked(runtime, dtype, checkpoint.dtype)
    device = None if device is None else _fitting(device, checkpoint, wanted)
    levels = _runnable(checkpoint, device, wanted)
    offers_all = not all(checkpoint.is_complete(level) for level in levels) and can_fetch(path, **hub)
    candidates = [_candidate(checkpoint, level, device, offers_all) for level in levels]
    if not any(found.available for found in candidates):
        raise LevelError(f"{path}: no level is complete here; copy or download one again.")
    _check_quality_recorded(path, budget, candidates)
    ranked = _ranked(candidates, budget)
    fitting = [found for found in ranked if found.available and not budget.excess(found)]
    if not fitting:
        raise LevelError(f"{path}: {_nothing_fits(budget, [found for found in ranked if found.available])}")
    chosen = fitting[0]
    better = ranked[: ranked.index(chosen)]
    return Choice(
        level=chosen.level.name,
        runtime=chosen.prediction.way.runtime if chosen.prediction else wanted.runtime or DENSE,
        dtype=chosen.prediction.way.dtype if chosen.prediction else wanted.dtype,
        device=None if device is None else device.device.kind,
        ms_per_token=chosen.ms_per_token,
        how=chosen.prediction.how_text if chosen.prediction else None,
        bytes=chosen.bytes,
        quality=chosen.quality,
        explanation=_explanation(chosen, better, budget, device),
    )


def _check_budget(profile: Any, max_bytes: Any, max_ms_per_token: Any, min_quality: Any) -> _Budget:
    if max_bytes is None and max_ms_per_token is None and min_quality is None:
        raise ConfigError("choose_level: no budget; give max_bytes, max_ms_per_token or min_quality.")
    for name, value in (("max_ms_per_token", max_ms_per_token), ("min_quality", min_quality)):
        if value is not None and not (is_number(value) and value > 0):
            raise ConfigError(f"{name}: {brief(value)} is not a number above 0.")
    if max_ms_per_token is not None and profile is None:
        raise ConfigError(
            "max_ms_per_token: needs a device profile; `elastic-sparsity bench` makes one of this device, "
            "and the package has estimates for typical ones (phone, laptop-avx2, ...)."
        )
    size = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
        raise ConfigError(f"max_bytes: {brief(max_bytes)} is not a whole number above 0, nor a size such as 60MB.")
    return _Budget(max_bytes=size, max_ms_per_token=max_ms_per_token, min_quality=min_quality)


def _fitting(device: Profile, checkpoint: ElasticCheckpoint, wanted: _Wanted) -> Profile:
    """The profile without the ways that nobody wants or that cannot hold this checkpoint's linears.

    It may be measured on another checkpoint's.
    """
    fitting = {name: entry for name, entry in device.ways.items() if misfit(checkpoint.linears, entry.way) is None}
    ways = {name: entry for name, entry in fitting.items() if wanted.allows(entry.way)}
    if not ways:
        known = ", ".join(fitting) or "none that fits these shapes"
        raise ProfileError(f"profile {device.name!r}: no way of {wanted}; it has {known}.")
    return device.model_copy(update={"ways": ways})


def _runnable(checkpoint: ElasticCheckpoint, device: Profile | None, wanted: _Wanted) -> list[AnyLevel]:
    """Densest first, the levels that a way of the device's profile (without one: the runtime wanted) can hold."""
    levels = by_density(checkpoint.ladder, checkpoint.structured)
    if device is not None:
        ways = [entry.way for entry in device.ways.values()]
    else:
        runtimes = RUNTIMES if wanted.runtime is None else (wanted.runtime,)
        named = (Way(runtime=runtime, dtype=wanted.dtype or dtype_name(checkpoint.dtype)) for runtime in runtimes)
        ways = [way for way in named if misfit(checkpoint.linears, way) is None]
    found = [level for level in levels if any(way.serves(level) for way in ways)]
    if not found:
        raise LevelError(f"{checkpoint.folder}: no level of this checkpoint runs by {wanted}.")
    return found


def _candidate(checkpoint: ElasticCheckpoint, level: AnyLevel, device: Profile | None, offered: bool) -> _Candidate:
    info = level_info(checkpoint, level)
    perplexity, dense = _perplexity(info.perplexity), _dense_perplexity(checkpoint)
    return _Candidate(
        level=level,
        bytes=checkpoint.download_bytes(level),
        available=offered or info.available,
        perplexity=perplexity,
        quality=None if perplexity is None or dense is None else dense / perplexity,
        prediction=None if device is None else predict_fastest(device, checkpoint, level),
    )


def _perplexity(value: Any) -> float | None:
    """A record's number, if it is one: records are not checked when a checkpoint is opened."""
    return float(value) if is_number(value) and value > 0 else None


def _dense_perplexity(checkpoint: ElasticCheckpoint) -> float | None:
    quality = checkpoint.config.get("quality")
    rows = quality.get("rows") if isinstance(quality, dict) else None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("level") == "dense":
            return _perplexity(row.get("perplexity"))
    return None


def _check_quality_recorded(path: Any, budget: _Budget, candidates: list[_Candidate]) -> None:
    masked = [found for found in candidates if not isinstance(found.level, StructuredLevel)]
    if budget.min_quality is None or all(found.quality is not None for found in masked):
        return  # a structured level may have been added later, and is then not chosen by quality
    raise ConfigError(
        f"{path}: min_quality needs the perplexity of dense and of every level, which this checkpoint does not record; "
        "make it with an evaluation text (`train --evaluation`), or choose by bytes or milliseconds."
    )


def _ranked(candidates: list[_Candidate], budget: _Budget) -> list[_Candidate]:
    """Most wanted first. Candidates come densest first, and sorting keeps that order where nothing else decides."""
    best = sorted(candidates, key=lambda found: math.inf if found.perplexity is None else found.perplexity)
    return sorted(best, key=lambda found: found.bytes) if budget.seeks_smallest else best


def _nothing_fits(budget: _Budget, candidates: list[_Candidate]) -> str:
    """Why no level is chosen: the one budget that none meets, or how every level misses."""
    if budget.max_bytes is not None and all(found.bytes > budget.max_bytes for found in candidates):
        least = min(candidates, key=lambda found: found.bytes)
        return f"no level fits into {budget.max_bytes} bytes; the smallest, {least.level.title}, needs {least.bytes}."
    if budget.max_ms_per_token is not None:
        predictions = [(x, x.prediction) for x in candidates if x.prediction is not None]
        fastest, found = min(predictions, key=lambda pair: pair[1].ms_per_token)
        if found.ms_per_token > budget.max_ms_per_token:
            verb = "measured" if found.how == "measured" else "predicted"
            note = f" ({found.how_text})" if found.how == "estimate" else ""
            return (
                f"no level decodes within {budget.max_ms_per_token:g} ms a token; the fastest, {fastest.title}, "
                f"is {verb} at {found.ms_per_token:.3g} ms{note}."
            )
    if budget.min_quality is not None:
        known = [(x, x.quality) for x in candidates if x.quality is not None]
        if known:  # a structured level's quality need not be recorded
            best, quality = max(known, key=lambda pair: pair[1])
            if quality < budget.min_quality:
                wanted = f"{budget.min_quality:g}"
                return f"no level reaches quality {wanted}; the best, {best.level.title}, has {quality:.3g}."
    nearest = min(candidates, key=lambda found: max(factor for factor, _ in budget.excess(found)))
    rows = [f"{x.title}: {' and '.join(words for _, words in budget.excess(x))}" for x in candidates]
    return f"no level meets all budgets; the nearest is {nearest.title}. {'; '.join(rows)}."


def _explanation(chosen: _Candidate, better: list[_Candidate], budget: _Budget, device: Profile | None) -> str:
    facts = [human_bytes(chosen.bytes)]
    if chosen.prediction is not None:
        facts.append(f"{chosen.prediction.ms_per_token:.3g} ms a token ({chosen.prediction.how_text})")
    if chosen.quality is not None:
        facts.append(f"quality {chosen.quality:.3g}")
    sentences = [f"{chosen.title}: {', '.join(facts)}."]
    if budget.seeks_smallest:
        rank = f"the smallest level of quality {budget.min_quality:g} or more"
        comparative = "smaller"
    else:
        measured = "best recorded perplexity" if chosen.perplexity is not None else "densest, as no quality is recorded"
        rank, comparative = f"the best level within the budget ({measured})", "better"
    sentences.append(f"It is {rank}.")
    if better:
        next_one = better[-1]
        missed = [words for _, words in budget.excess(next_one)] or ["its files are not here"]
        sentences.append(f"Not the {comparative} {next_one.title}: {' and '.join(missed)}.")
    if chosen.prediction is not None:
        way = chosen.prediction.way
        sentences.append(f'Load it with runtime="{way.runtime}", dtype="{way.dtype}".')
    if device is not None and device.is_estimate:
        sentences.append(f"Profile {device.name!r} is an estimate, not measured; `elastic-sparsity bench` measures.")
    return " ".join(sentences)
