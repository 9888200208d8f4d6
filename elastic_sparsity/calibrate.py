"""Input statistics of one block's linears, over the streams that block will really see."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.activations import Activations
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.blocks import BlockCall, BlockRunner, input_hooks
from elastic_sparsity.importance import InputStatistics


@torch.no_grad()
def block_statistics(
    runner: BlockRunner,
    call: BlockCall,
    linears: Mapping[str, nn.Module],
    streams: Sequence[Activations],
    *,
    gram: bool,
    means: bool = False,
    autocast: Callable[[], Any],
    where: str,
    sum_: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> dict[str, InputStatistics]:
    """Statistics by linear name; linears that share an input share one object.

    Args:
        linears: dense linears of the block, by path.
        streams: inputs (S, T, D) of the block; equal objects count once.
        sum_: adds up tensors over all workers, in place.
    Raises: NumericsError: if a statistic is not finite, naming the linear.
    """
    statistics: dict[str, InputStatistics] = {}

    def observe(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in statistics:
            width = weight_OI(linears[names[0]]).shape[1]
            shared = InputStatistics(width, gram=gram, means=means, device=x.device)
            statistics.update(dict.fromkeys(names, shared))
        statistics[names[0]].update(x)

    with autocast(), input_hooks(dict(linears), observe):
        for stream in {id(stream): stream for stream in streams}.values():
            for batch in runner.batches():
                call(stream[batch])
    for shared in {id(found): found for found in statistics.values()}.values():
        shared.reduce(sum_)
    for name, found in statistics.items():
        found.checked(f"{where}.{name}")
    return statistics


@torch.no_grad()
def dense_statistics(
    model: Any, linears: Mapping[str, nn.Module], token_ids_ST: Tensor, autocast: Callable[[], Any]
) -> dict[str, InputStatistics]:
    """Statistics of a whole model's linears from one pass, a sample at a time; those that share an input share one.

    Args:
        linears: of the model, by name.
    Raises: NumericsError: if a statistic is not finite, naming the linear.
    """
    found: dict[str, InputStatistics] = {}

    def observe(names: tuple[str, ...], x: Tensor) -> None:
        if names[0] not in found:
            found.update(dict.fromkeys(names, InputStatistics(x.shape[-1], gram=False, device=x.device)))
        found[names[0]].update(x)

    with autocast(), input_hooks(dict(linears), observe):
        for ids_T in token_ids_ST:
            model.base_model(ids_T[None], use_cache=False)
    return {name: statistics.checked(name) for name, statistics in found.items()}
