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


def roomy_cache(model: Any, num_tokens: int) -> Any:
    """The same with room for `num_tokens` from the start: the usual one copies all its keys and values at every token.

    Layers of another kind than the one that grows (sliding windows, states) stay as they are; more tokens than there is
    room for are copied as usual. The logits are bit for bit those with the usual cache.
    """
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.room is not None and (self.keys is None or self.keys.data_ptr() != self.room[0].data_ptr()):
                self.room = None  # somebody reset it, or chose or repeated sequences, which gave new tensors
            if end > num_tokens or (start and self.room is None):
                self.room = None
                found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
                return found
            if self.room is None:  # what the first call sets beside the tensors is the library's own business
                super().update(key_states, value_states, *args, **kwargs)
                self.room = _room(key_states, num_tokens), _room(value_states, num_tokens)
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

    cache = empty_cache(model)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _room(states: Tensor, num_tokens: int) -> Tensor:
    """Uninitialised, for `num_tokens` instead of the tokens (dimension -2) of `states`."""
    return states.new_empty((*states.shape[:-2], num_tokens, states.shape[-1]))
