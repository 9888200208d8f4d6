"""The order of the residual channels: chosen for N:M, judged on what it was not chosen by, and never a worse one."""

from contextlib import nullcontext

import pytest
import torch
from exact import VARIANTS, logits, model_of, weights

from elastic_sparsity import residual_order
from elastic_sparsity.arch import linears_of, weight_OI
from elastic_sparsity.errors import AbsorptionError, ConfigError
from elastic_sparsity.folding import check_function_kept
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.residual_order import choose_residual_order_, reader_scores, square_sums
from elastic_sparsity.tiny import tiny_model

LADDER = Ladder(sparsities=(0.5,), patterns=("2:4", "4:8"))
IDS = torch.randint(4, 250, (10, 24), generator=torch.Generator().manual_seed(0))
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def choose(model, ladder=LADDER, held_out=4):
    return choose_residual_order_(model, IDS, ladder, held_out, nullcontext)


def dropped(model, ids, kept, group):
    """Of a tiny Llama: the share of squared scores that N:M drops, from hooks; every second row, from the second."""
    squares, names = {}, [name for name in linears_of(model) if name.endswith(READERS)]

    def hook(name):
        return lambda _, args: squares.update({name: squares.get(name, 0) + args[0].double().square().sum((0, 1))})

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    shares = []
    for name in names:
        scores = (model.get_submodule(name).weight.detach().double()[1::2].square() * squares[name]).unflatten(
            1, (-1, group)
        )
        shares.append(float(scores.sort(dim=2).values[..., : group - kept].sum() / scores.sum()))
    return sum(shares) / len(shares)


def test_what_it_says_is_what_is_dropped_by_other_rows_on_held_out_samples():
    model = tiny_model("llama")
    before = {"2:4": dropped(model, IDS[6:], 2, 4), "4:8": dropped(model, IDS[6:], 4, 8)}
    found = choose(model)
    after = {"2:4": dropped(model, IDS[6:], 2, 4), "4:8": dropped(model, IDS[6:], 4, 8)}
    assert found.used and found.kind == "residual_order" and found.chosen in ("2:4", "4:8")
    assert found.before == pytest.approx(before, rel=1e-4) and found.after == pytest.approx(after, rel=1e-4)
    assert after["2:4"] < before["2:4"]


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "opt-350m"])
def test_the_function_stays(variant):
    model = model_of(variant, torch.float32)
    before, old = logits(model), weights(model)
    found = choose(model)
    check_function_kept(before, logits(model), torch.float32)
    assert found.used == any(not torch.equal(old[name], new) for name, new in model.state_dict().items() if name in old)


def test_an_order_that_does_not_help_what_it_was_not_chosen_by_is_left_out(monkeypatch):
    worse = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    model = tiny_model("llama")
    choose(model)  # the best that it finds: any other is worse
    old = weights(model)
    monkeypatch.setattr(residual_order, "improved_order", lambda scores, kept, group: worse)
    found = choose(model)
    assert not found.used and found.chosen == "none" and found.before == found.after
    assert all(torch.equal(old[name], new) for name, new in model.state_dict().items() if name in old)


def test_rows_that_choose_and_rows_that_judge_are_others(monkeypatch):
    """Few enough for the memory, of every linear, and each linear counts as much."""
    model = tiny_model("llama")
    sums = square_sums(model, IDS, nullcontext)
    assert len(sums) == 2 * len(READERS)
    monkeypatch.setattr(residual_order, "NUMBERS", 2000)
    stride = residual_order._stride(model)
    total = sum(weight_OI(linears_of(model)[name]).numel() for name in sums)
    assert stride > 2 and (stride - 1) * 2000 < total <= stride * 2000
    for first in (0, stride // 2):
        scores = reader_scores(model, sums, first, stride)
        assert scores.shape[1] == 32 and abs(float(scores.sum()) - len(sums)) < 1e-3
    rows = set(range(0, 32, stride)), set(range(stride // 2, 32, stride))
    assert not rows[0] & rows[1]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="'residual_order' changes N:M masks alone"):
        choose(tiny_model("llama"), Ladder(sparsities=(0.5,)))
    with pytest.raises(ConfigError, match="leave none to learn from"):
        choose(tiny_model("llama"), held_out=10)
    with pytest.raises(AbsorptionError, match="embeddings of width 16"):
        choose(model_of("opt-350m", torch.float32))
