"""What a piece of work took: seconds, and the process's peak memory while it ran."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from memory import high_water


@contextmanager
def spent() -> Iterator[dict[str, float]]:
    """Gives a dict and fills it when the block ends.

    seconds: by the clock; cpu_seconds: of the process on all its threads. peak_bytes: the largest resident size of the
    process since the block began, model and all; added_bytes: how much that is above its size as the block began, which
    is too little by what earlier work freed but the process kept. The system's mark is reset for it: it would be that
    of whatever ran before. With a GPU also peak_gpu_bytes. Blocks must not lie inside one another. Linux only.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    high_water(reset=True)
    found: dict[str, float] = {}
    start_bytes, started, cpu_started = high_water(reset=False), time.monotonic(), time.process_time()
    yield found
    if has_gpu:
        torch.cuda.synchronize()
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    found["seconds"] = round(time.monotonic() - started, 1)
    found["cpu_seconds"] = round(time.process_time() - cpu_started, 1)
    found["peak_bytes"] = high_water(reset=False)
    found["added_bytes"] = found["peak_bytes"] - start_bytes


def together(*parts: dict[str, float]) -> dict[str, float]:
    """What several blocks took one after another: sums of seconds, the largest peaks; zeros if there is none."""
    sums = {key: round(sum(part[key] for part in parts), 1) for key in ("seconds", "cpu_seconds")}
    peaks = {key: max((part[key] for part in parts), default=0) for key in ("peak_bytes", "added_bytes")}
    gpu = [part["peak_gpu_bytes"] for part in parts if "peak_gpu_bytes" in part]
    return {**sums, **peaks, **({"peak_gpu_bytes": max(gpu)} if gpu else {})}
