"""One token after the other from any causal LM: a cache of keys and values, under either name transformers gives it."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def stepper(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """A function of (token ids (B, T), cache) that gives the logits (B, V) after the last; the cache grows."""
    names = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    cache_name = "cache" if "cache" in names else "past_key_values"  # transformers renamed it in version 5

    def step(ids_BT: Tensor, cache: Any) -> Tensor:
        logits: Tensor = model(input_ids=ids_BT, use_cache=True, **{cache_name: cache}, **last).logits
        return logits[:, -1]

    return step


def greedy_stepper(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """The same, giving every sequence's likeliest next token (B, 1)."""
    step = stepper(model)
    return lambda ids_BT, cache: step(ids_BT, cache).argmax(-1, keepdim=True)


def empty_cache(model: Any) -> Any:
    """A cache of keys and values as `generate` makes it."""
    from transformers import DynamicCache  # slow import, only here

    return DynamicCache(config=model.config)
