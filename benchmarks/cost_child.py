"""One run of a recipe in a process of its own, timed in parts by wall clock and CPU: what cost.py starts."""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from counting import PassCounter
from memory import high_water

from elastic_sparsity import block_phase, pipeline
from elastic_sparsity.config import make_recipe

CLOCKS = ("wall", "cpu")  # CPU: user and system seconds of the process, on all its threads


class _EnoughBlocks(Exception):
    """Stops a run that is timed in part."""


class Spans:
    """Seconds of a run's parts, each time that it was entered, by clock and part."""

    def __init__(self) -> None:
        self.by_clock: dict[str, dict[str, list[float]]] = {clock: {"blocks": [], "training": []} for clock in CLOCKS}
        self.start()

    def start(self) -> tuple[float, float]:
        """Sets the mark that `since_mark` counts from. Returns: it."""
        self.mark = time.monotonic(), time.process_time()
        return self.mark

    def add(self, part: str, started: tuple[float, float]) -> None:
        for clock, begin, end in zip(CLOCKS, started, (time.monotonic(), time.process_time()), strict=True):
            self.by_clock[clock].setdefault(part, []).append(end - begin)

    def since_mark(self, part: str) -> None:
        self.add(part, self.mark)
        self.start()

    def time_calls(self, owner: Any, attribute: str, part: str) -> None:
        """Times a function wherever it is called; a part that begins sets the mark."""
        original = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.start() if part != "training" else (time.monotonic(), time.process_time())
            try:
                return original(*args, **kwargs)
            finally:
                self.add(part, started)

        setattr(owner, attribute, call)


def run(recipe_file: str, blocks: int) -> dict[str, Any]:
    """Runs a recipe, or its first blocks (0 = all), in this process. Returns: what it took."""
    spans, counters = Spans(), []
    prepare = pipeline.prepare

    def counted(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        counters.append(PassCounter(prepared[0].blocks))
        return prepared

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "blocks":
            spans.since_mark("blocks")
            if done == blocks:
                raise _EnoughBlocks

    pipeline.prepare = counted
    spans.time_calls(pipeline, "run_block_phase_", "block phase")
    spans.time_calls(pipeline, "run_end_to_end_", "end to end")
    spans.time_calls(block_phase, "train_block_", "training")
    recipe = make_recipe(json.loads(Path(recipe_file).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughBlocks):
        pipeline.optimize(recipe, Path(folder) / "checkpoint", progress)
    seconds = {"wall": time.time() - psutil.Process().create_time(), "cpu": time.process_time()}
    found = {clock: {"seconds": seconds[clock], **spans.by_clock[clock]} for clock in CLOCKS}
    return {**found, "peak_bytes": high_water(reset=False), "passes": dict(counters[0].passes)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
