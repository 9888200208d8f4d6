"""The processes of a run: one, or several started by `accelerate launch` (or torchrun), each with a share of samples.

Sample s belongs to place s % B of every training batch of B samples; each worker has B / N places, so a step sees the
same samples whatever the number N of workers, and hidden states never travel: statistics and gradients do.
"""

import datetime
import functools
import gc
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from elastic_sparsity.errors import ConfigError

LONGEST_WAIT = datetime.timedelta(days=2)  # NCCL's default is ten minutes
Value = TypeVar("Value")
_CACHED = type(functools.cache(lambda: None))


class Workers:
    """This process among its equals.

    Attributes:
        local: how many of them are on this machine.
        traffic: bytes that this one handed to reductions.
    """

    def __init__(self) -> None:
        # Its functions keep, as default arguments, the group that exists when it is first imported (transformers'
        # models import it): a group held for ever keeps its threads, which abort the process now and then as it exits.
        if torch.distributed.is_available():
            importlib.import_module("torch.distributed.nn")
        from accelerate import PartialState  # slow import, only here

        # The others wait while the main process works alone for long (structured levels, sampled text).
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if self.count > 1 else 1
        self.traffic = 0

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def places(self, batch_size: int, field: str) -> range:
        """This worker's places in a batch.

        Raises: ConfigError: if the batch cannot be shared out evenly.
        """
        if batch_size % self.count:
            raise ConfigError(
                f"{field}: {batch_size} samples cannot be shared by {self.count} processes; use a multiple."
            )
        share = batch_size // self.count
        return range(self.rank * share, (self.rank + 1) * share)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Adds up tensors of one dtype over all workers, in place, in one message."""
        parts = list(tensors)
        if self.count == 1 or not parts:
            return
        from accelerate.utils import reduce

        # NCCL knows no host memory, and some parameters (the mixer's) are there while others are on the GPU.
        flat = torch.cat([part.detach().flatten().to(self.device) for part in parts])
        self.traffic += flat.numel() * flat.dtype.itemsize
        summed: Tensor = reduce(flat, "sum")  # type: ignore[assignment]
        for part, values in zip(parts, summed.split([part.numel() for part in parts]), strict=True):
            part.detach().copy_(values.view(part.shape))

    def mean_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Averages gradients over all workers; a parameter without one counts as zero everywhere."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.sum_(gradients)
        for gradient in gradients:
            gradient.div_(self.count)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Mean of each number over all workers."""
        found = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        self.sum_([found])
        return (found / self.count).tolist()

    def of_main(self, value: Value) -> Value:
        """The first worker's value; all have to come here."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first worker goes through alone, the others after it: they find its downloads done."""
        with self._state.main_process_first():
            yield

    def close(self) -> None:
        """Leaves the group, after everyone came here: one who is gone early looks like a crash to the others."""
        if self.count > 1:
            self.wait()
            _empty_sharding_caches()
            self._state.destroy_process_group()


def _empty_sharding_caches() -> None:
    """Has torch forget what it worked out about a model in parts: that holds the process group, as above.

    Two of the three names are private to torch; a release without them keeps the group's threads to the end.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    debug = importlib.import_module("torch.distributed.tensor.debug")
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    getattr(debug, "_clear_sharding_prop_cache", int)()
    getattr(redistribute, "_planner_cache", {}).clear()
    for found in gc.get_objects():
        if isinstance(found, _CACHED) and (found.__module__ or "").startswith("torch.distributed."):
            found.cache_clear()
    gc.collect()  # modules and their hooks refer to each other
