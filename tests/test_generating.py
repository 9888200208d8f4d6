"""One token after the other: the cache with room against the usual one, which is transformers' own."""

from itertools import pairwise

import pytest
import torch

from elastic_sparsity.generating import empty_cache, roomy_cache, stepper
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

IDS = torch.randint(4, 250, (3, 9), generator=torch.Generator().manual_seed(0))


def logits_with(model, cache, change=None):
    """Two tokens at once, then one after the other; `change` is called after the fourth."""
    step, found, ids = stepper(model), [], IDS
    with torch.inference_mode():
        found.append(step(ids[:, :2], cache))
        for position in range(2, ids.shape[1]):
            found.append(step(ids[:, position : position + 1], cache))
            if change is not None and position == 4:
                change(cache)
                ids = ids.repeat_interleave(cache.layers[0].keys.shape[0] // ids.shape[0], 0)
    return found


@pytest.mark.parametrize("room", [9, 40, 5, 1], ids="room for {}".format)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_same_logits_bit_for_bit(family, room):
    """Also when there is less room than tokens: then it goes on as the usual one."""
    model = tiny_model(family)
    for ours, theirs in zip(
        logits_with(model, roomy_cache(model, room)), logits_with(model, empty_cache(model)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_sequences_may_be_repeated_on_the_way():
    model = tiny_model("llama")
    found = [logits_with(model, make, lambda cache: cache.batch_repeat_interleave(2))
             for make in (roomy_cache(model, 20), empty_cache(model))]  # fmt: skip
    assert found[0][-1].shape[0] == 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_keys_and_values_stay_where_they_are():
    model, places = tiny_model("llama"), []
    for cache in (roomy_cache(model, 9), empty_cache(model)):
        places.append([])
        step = stepper(model)
        for position in range(9):
            step(IDS[:, position : position + 1], cache)
            places[-1].append(cache.layers[0].values.data_ptr())
    ours, theirs = places
    assert len(set(ours)) == 1
    assert all(before != after for before, after in pairwise(theirs)), "the usual one copies"


def test_layers_that_do_not_grow_are_the_librarys_own():
    model = tiny_model("gemma2")  # every second layer a sliding window
    ours, theirs = roomy_cache(model, 9).layers, empty_cache(model).layers
    kinds = [type(layer) is type(other) for layer, other in zip(ours, theirs, strict=True)]
    assert True in kinds and False in kinds
