"""Timing every way that exists on a device, end to end and linear by linear, into a device profile.

All ways of a level are loaded side by side and take turns in every round, in another order each time, so that what else
the machine does falls on all of them; a speedup is the median of the ratios within single rounds, over the dense way
that is fastest. The loop is our own: `generate` would time its own bookkeeping too.
"""

import copy
import gc
import itertools
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.calibration_text import Progress, check_length, silent
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.device_profile import FORMAT, FORMAT_VERSION, Profile, WayEntry, fit_way
from elastic_sparsity.doctor import Facts, existing_ways, read_facts, verdicts
from elastic_sparsity.errors import ConfigError, brief
from elastic_sparsity.free_memory import device_free
from elastic_sparsity.generating import empty_cache, greedy_stepper
from elastic_sparsity.hub import fetch_levels
from elastic_sparsity.ladder import Level
from elastic_sparsity.slicing import ElasticModel
from elastic_sparsity.ways import DENSE, Way, linear_bytes, misfit, streamed_bytes

log = logging.getLogger(__name__)
WARM_UP_TOKENS = 2
Load = Callable[[Path, Level, Way, str], Any]
"""Called with (folder, level, way, device); gives a causal LM in eval mode."""


def load_way(folder: Path, level: Level, way: Way, device: str) -> Any:
    """A level the way a user would load it."""
    options: dict[str, Any] = {} if way.runtime == DENSE else {"runtime": way.runtime}
    return ElasticModel.from_pretrained(folder, level.name, dtype=way.dtype, device=device, **options)


def bench(
    path: str | Path,
    *,
    levels: Sequence[str] | None = None,
    ways: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    name: str | None = None,
    facts: Facts | None = None,
    load: Load = load_way,
    progress: Progress = silent,
    **hub: Any,
) -> Profile:
    """Times levels of a checkpoint on this machine, in every way that exists here.

    Args:
        path: folder or hub id of an elastic checkpoint.
        levels, ways: names; None = all that exist.
        batches: sequences decoded at once; 1 is among them, as predictions rest on it.
        prompt: tokens a sequence, random ones, before the first new token; also what prefill is timed on.
        new_tokens: decoded in each round and batch.
        repeats: rounds, after one to warm up.
        threads: of torch for the time of the call; None = as it is.
        device: "cpu" or "cuda".
        name: of the profile; None = what the machine calls its processor.
        facts: of the machine; None = as found.
        load: how a way is loaded.
    Raises: ConfigError: unknown way, batches without 1, a prompt longer than the model reads, too little memory.
        LevelError, CheckpointError.
    """
    _check_settings(batches, prompt, new_tokens, repeats, threads, device, name)
    with _threads(threads):
        found = facts or read_facts()
        chosen = _chosen_ways(found, ways, device)
        checkpoint = ElasticCheckpoint(fetch_levels(path, levels, **hub))
        if levels:
            wanted = [checkpoint.find_masked(x, "bench") for x in levels]
        else:
            wanted = checkpoint.complete_among(checkpoint.ladder.levels)
        run = _Run(
            checkpoint=checkpoint, batches=tuple(sorted(set(batches))), prompt=prompt, new_tokens=new_tokens,
            repeats=repeats, device=device, load=load, progress=progress,
        )  # fmt: skip
        fitting = _fitting(checkpoint, chosen)
        for level in wanted:
            run.time_level([way for way in fitting if way.serves(level)], level, found)
        return run.profile(name, found)


def _check_settings(
    batches: Sequence[int],
    prompt: int,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    device: str,
    name: str | None,
) -> None:
    if 1 not in batches or min(batches) < 1:
        raise ConfigError(f"bench: batches {list(batches)} must be above 0 and contain 1, as predictions rest on it.")
    for field_name, value in (("prompt", prompt), ("new tokens", new_tokens), ("repeats", repeats)):
        if not 1 <= value <= 10**6:
            raise ConfigError(f"bench: {field_name}: {brief(value)} is not between 1 and 1000000.")
    if threads is not None and not 1 <= threads <= 4096:
        raise ConfigError(f"bench: threads: {brief(threads)} is not between 1 and 4096.")
    if name is not None and not (name.isprintable() and len(name) <= 200):
        raise ConfigError(f"bench: name {brief(name)} is no line of text of at most 200 characters.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"bench: device {device!r} is not cpu or cuda.")


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(wanted or before)
        yield
    finally:
        torch.set_num_threads(before)


def _chosen_ways(facts: Facts, wanted: Sequence[str] | None, device: str) -> list[Way]:
    existing = {way.name: way for way in existing_ways(verdicts(facts), device)}
    names = list(existing) if wanted is None else list(wanted)
    unknown = [name for name in names if name not in existing]
    if unknown or not names:
        raise ConfigError(
            f"bench: way {', '.join(unknown) or 'none'} does not exist on {device} here; there are: "
            f"{', '.join(existing) or 'none'}. `elastic-sparsity doctor` says why."
        )
    if all(existing[name].runtime != DENSE for name in names):
        raise ConfigError(f"bench: ways {', '.join(names)}: add a dense one, which the others are compared with.")
    return [existing[name] for name in names]


def _fitting(checkpoint: ElasticCheckpoint, ways: Sequence[Way]) -> list[Way]:
    """Those that can run the checkpoint's linears; a warning says why the others cannot. A dense way always can."""
    problems = {way: misfit(checkpoint.linears, way) for way in ways}
    for way, problem in problems.items():
        if problem is not None:
            log.warning("bench: %s is left out: %s", way.name, problem)
    return [way for way, problem in problems.items() if problem is None]


@dataclass(kw_only=True, slots=True)
class _Times:
    """Seconds of one way at one level: one entry a round."""

    prefill: list[float] = field(default_factory=list)
    step: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(kw_only=True, slots=True)
class _Run:
    """One call of `bench`: its settings, and the rows found so far."""

    checkpoint: ElasticCheckpoint
    batches: tuple[int, ...]
    prompt: int
    new_tokens: int
    repeats: int
    device: str
    load: Load
    progress: Progress
    measurements: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)

    def time_level(self, ways: Sequence[Way], level: Level, facts: Facts) -> None:
        """Loads every way of a level, times them in turns, and lets go of them."""
        self._check_memory(ways, level, facts)
        models = {way: self.load(self.checkpoint.folder, level, way, self.device) for way in ways}
        try:
            with torch.inference_mode():
                times = self._time_models(models, level)
                self._add_measurements(models, times, level)
                self._time_shapes(models, level)
        finally:
            models.clear()
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _check_memory(self, ways: Sequence[Way], level: Level, facts: Facts) -> None:
        needed = sum(streamed_bytes(self.checkpoint, level, way) for way in ways)
        free = device_free() if self.device == "cuda" else facts.free_bytes
        if needed > free:
            raise ConfigError(
                f"bench: {', '.join(way.name for way in ways)} at {level.title} need {needed} bytes side by side, "
                f"{free} are there; time fewer ways with --way."
            )

    def _time_models(self, models: Mapping[Way, Any], level: Level) -> dict[Way, _Times]:
        times = {way: _Times() for way in models}
        first = next(iter(models.values()))
        check_length("bench: prompt and new tokens", self.prompt + self.new_tokens, first)
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(first.config.vocab_size, (1, self.prompt), generator=random).to(self.device)
        stage = f"timing {level.title}"
        rounds = self.repeats + 1
        for number in range(rounds):
            is_warm_up = number == 0
            for way in _rotated(list(models), number):
                self._time_once(models[way], ids, _Times() if is_warm_up else times[way], is_warm_up)
            self.progress(stage, number + 1, rounds)
        return times

    def _time_once(self, model: Any, ids_BT: Tensor, times: _Times, is_warm_up: bool) -> None:
        step, prefilled = greedy_stepper(model), empty_cache(model)
        seconds, token = self._timed(lambda: step(ids_BT, prefilled))
        times.prefill.append(seconds)
        for batch in self.batches:
            cache = copy.deepcopy(prefilled)
            cache.batch_repeat_interleave(batch)
            token_B1, found = token.repeat(batch, 1), []
            for _ in range(WARM_UP_TOKENS if is_warm_up else self.new_tokens):
                seconds, token_B1 = self._timed(lambda ids=token_B1, cache=cache: step(ids, cache))  # type: ignore[misc]
                found.append(seconds)
            times.step[batch].append(statistics.median(found))

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = time.perf_counter()
        result = call()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _add_measurements(self, models: Mapping[Way, Any], times: Mapping[Way, _Times], level: Level) -> None:
        dense = [way for way in models if way.runtime == DENSE]

        def speedup(way: Way, seconds: Callable[[_Times], list[float]]) -> float:
            best = min(dense, key=lambda x: statistics.median(seconds(times[x])))
            if way == best:
                return 1.0
            pairs = zip(seconds(times[best]), seconds(times[way]), strict=True)
            return statistics.median(reference / mine for reference, mine in pairs)

        for way, model in models.items():
            mine = times[way]
            self.measurements.append(
                {
                    "checkpoint_id": self.checkpoint.manifest.checkpoint_id,
                    "level": level.name,
                    "way": way.name,
                    "disk_bytes": self.checkpoint.bytes_of(level),
                    "resident_bytes": resident_bytes(model),
                    "streamed_bytes": streamed_bytes(self.checkpoint, level, way),
                    "linears": len(self.checkpoint.linears),
                    "prefill": {
                        "tokens_per_s": self.prompt / statistics.median(mine.prefill),
                        "speedup": speedup(way, lambda found: found.prefill),
                    },
                    "decode": [
                        {
                            "batch": batch,
                            "step_s": statistics.median(mine.step[batch]),
                            "speedup": speedup(way, lambda found, batch=batch: found.step[batch]),  # type: ignore[misc]
                        }
                        for batch in self.batches
                    ],
                }
            )

    def _time_shapes(self, models: Mapping[Way, Any], level: Level) -> None:
        names = defaultdict(list)
        for name, spec in self.checkpoint.linears.items():
            names[spec.shape].append(name)
        for number, (shape, members) in enumerate(names.items()):
            for tokens in self.batches:
                found: dict[Way, list[float]] = {way: [] for way in models}
                for turn in range(self.repeats + 1):
                    for way in _rotated(list(models), turn):
                        seconds = self._time_linears(models[way], members, tokens, shape[1], way)
                        if turn:  # the first warms up
                            found[way].append(seconds)
                for way, seconds_of_rounds in found.items():
                    self.shapes.append(
                        {
                            "outputs": shape[0],
                            "inputs": shape[1],
                            "level": level.name,
                            "way": way.name,
                            "tokens": tokens,
                            "seconds": statistics.median(seconds_of_rounds),
                        }
                    )
            self.progress(f"timing linears of {level.title}", number + 1, len(names))

    def _time_linears(self, model: Any, names: Sequence[str], tokens: int, inputs: int, way: Way) -> float:
        """Seconds a linear, all of one shape in turn, so that weights come from memory as they do in a model."""
        modules = [model.get_submodule(name) for name in names]
        x_TI = torch.ones(1, tokens, inputs, dtype=getattr(torch, way.dtype), device=self.device)
        seconds, _ = self._timed(lambda: [module(x_TI) for module in modules])
        return seconds / len(modules)

    def profile(self, name: str | None, facts: Facts) -> Profile:
        """All rows, and the line of every way."""
        on_gpu = self.device == "cuda"
        model = facts.gpus[0].name if on_gpu else facts.cpu
        return Profile.model_validate(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "kind": "measured",
                "name": name or model,
                "source": f"elastic-sparsity bench, {time.strftime('%Y-%m-%d')}",
                "device": {
                    "kind": self.device,
                    "model": model,
                    "architecture": facts.gpus[0].architecture if on_gpu else facts.architecture,
                    "features": None if facts.features is None else sorted(facts.features),
                    "threads": torch.get_num_threads(),
                    "memory_bytes": facts.gpus[0].memory_bytes if on_gpu else facts.memory_bytes,
                    "torch": facts.torch,
                    "instruction_path": facts.active_path,
                },
                "protocol": {"prompt": self.prompt, "new_tokens": self.new_tokens, "repeats": self.repeats},
                "ways": {row["way"]: self._fit(row["way"]).model_dump() for row in self.measurements},
                "measurements": self.measurements,
                "shapes": self.shapes,
            }
        )

    def _fit(self, name: str) -> WayEntry:
        runtime, _, dtype = name.rpartition("-")
        way = Way(runtime=runtime, dtype=dtype)
        specs = defaultdict(list)
        for spec in self.checkpoint.linears.values():
            specs[spec.shape].append(spec)

        def bytes_of(shape: tuple[int, int], level: str) -> float:
            """Mean over a shape's linears, as their time is: an allocation lets each keep another number."""
            found = self.checkpoint.ladder.find(level)
            return statistics.mean(linear_bytes(spec, found, way) for spec in specs[shape])

        whole = [
            (row["linears"], row["streamed_bytes"], next(x["step_s"] for x in row["decode"] if x["batch"] == 1))
            for row in self.measurements
            if row["way"] == name
        ]
        single = [
            (bytes_of((x["outputs"], x["inputs"]), x["level"]), x["seconds"])
            for x in self.shapes
            if x["way"] == name and x["tokens"] == 1
        ]
        return fit_way(way, whole, single)


def _rotated(ways: list[Way], by: int) -> list[Way]:
    start = by % len(ways)
    return ways[start:] + ways[:start]


def resident_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    held = itertools.chain.from_iterable(map(_with_memory, itertools.chain(model.parameters(), model.buffers())))
    tensors = {tensor.data_ptr(): tensor for tensor in held}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _with_memory(tensor: Tensor) -> list[Tensor]:
    """The tensor, or what it is made of: torch's 2:4 weight has no memory of its own, and says that it is dense."""
    if not isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]
