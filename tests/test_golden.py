"""Files written by the first release of format version 2 must load for ever, bit for bit.

tests/golden/v2 was written on 2026-11-23 with small dyadic numbers, so that its weights are exact in any order of
summation: two linears (one stored transposed), levels 50 / 55 / 75 % and 2:4, ranks 2, 1, 0, 1, bfloat16. Its expected
weights are in v2_weights.json. A change that breaks this test needs a new format version.
tests/golden/v2_structured was written on 2026-11-27: a tiny Llama's structured levels 50 % (equal counts) and 25 %
(counts by block) in bfloat16, without shells. v2_structured.json has a hash of every parameter's bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_sparsity.adapters import merge
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.slicing import ElasticModel

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "v2_weights.json").read_text())
STRUCTURED = json.loads((GOLDEN / "v2_structured.json").read_text())


@pytest.mark.parametrize("level", EXPECTED)
def test_golden_files_load_as_they_were_written(level):
    checkpoint = ElasticCheckpoint(GOLDEN / "v2")
    found = {
        name: merge(linear.weight_OI, linear.pairs, linear.mask_OI)
        for name, linear in checkpoint.level_linears(checkpoint.find(level))
    }
    assert found.keys() == EXPECTED[level].keys()
    for name, weight in found.items():
        assert torch.equal(weight, torch.tensor(EXPECTED[level][name]))


@pytest.mark.parametrize(("level", "counts"), [("structured-0.5", (1, 32)), ("structured-0.25", ((1, 2), (56, 24)))])
def test_golden_structured_levels_load_as_they_were_written(level, counts):
    found = ElasticCheckpoint(GOLDEN / "v2_structured").find(level)
    assert (found.key_value_heads, found.channels) == counts
    model = ElasticModel.from_pretrained(GOLDEN / "v2_structured", level)
    assert STRUCTURED[level] == {
        name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, parameter in model.named_parameters()
    }


def raw(file):
    """A safetensors file by its own specification: 8 bytes of header length, JSON, bytes."""
    data = (GOLDEN / "v2" / file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__")
    return {name: np.frombuffer(data[end:], np.uint8)[slice(*x["data_offsets"])] for name, x in header.items()}


def bits(data):
    return [byte >> bit & 1 for byte in data.tolist() for bit in range(8)]


def test_the_specification_read_by_hand():
    """Elias-Fano positions of one increment, decoded in plain Python from README's words."""
    config = json.loads((GOLDEN / "v2" / "elastic_config.json").read_text())
    name, universe = "blocks.0.up", 6 * 40
    kept = config["linears"][name]["kept"]
    core, increment = raw("shell-core.safetensors"), raw("shell-level-0.55.safetensors")
    in_core = [p for p, bit in enumerate(bits(core[f"{name}.mask"])) if bit]
    assert len(in_core) == 6 * kept[2]
    count = 6 * (kept[1] - kept[2])
    low = max(0, (universe // count).bit_length() - 1)
    data, width = increment[f"{name}.positions"], -(-count // 8)
    planes = [bits(data[plane * width : (plane + 1) * width]) for plane in range(low)]
    ones = [i for i, bit in enumerate(bits(data[low * width :])) if bit]
    found = [((one - i) << low) + sum(planes[p][i] << p for p in range(low)) for i, one in enumerate(ones)]
    kept_now = (torch.tensor(EXPECTED["0.55"][name]).flatten() != 0).nonzero().flatten().tolist()
    assert len(ones) == count and sorted([*in_core, *found]) == sorted(set(in_core) | set(found))
    assert set(kept_now) <= set(in_core) | set(found), "a kept weight may be zero by value, never the reverse"
