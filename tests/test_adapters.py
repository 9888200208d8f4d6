"""Elastic linears: every level against (W + BA) * M spelled out, its gradients, its inheritance, and peft."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastic_sparsity.adapters import (
    ElasticLinear,
    _MaskedLinear,
    elastic_linears,
    merge,
    merged_once,
    replace_module_,
    set_level_,
)
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import drop_levels, pattern_mask

O, I = 6, 16  # noqa: E741  outputs, inputs
LADDER = Ladder(sparsities=(0.25, 0.5, 0.75), patterns=("2:4",), pattern_parent="all")
RANKS = (2, 1, 3, 2)
GROUPS = {"shared": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]], "none": [[0], [1], [2], [3]]}
GROUPS["detached"] = GROUPS["shared"]
INHERITANCES = sorted(GROUPS)


def plain(kind: str = "linear", bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(I, O, bias=bias) if kind == "linear" else Conv1D(O, I)
        if bias:
            nn.init.normal_(linear.bias)
        if kind == "conv1d":
            nn.init.normal_(linear.weight, std=0.3)
    return linear


def elastic(
    linear: nn.Module,
    ladder: Ladder = LADDER,
    ranks: tuple[int, ...] = RANKS,
    *,
    inheritance: str = "shared",
    train_base: bool = False,
    trained: bool = True,
) -> ElasticLinear:
    """An elastic linear with masks by magnitude; `trained` gives B random values."""
    scores = weight_OI(linear).detach().abs()
    generator = torch.Generator().manual_seed(1)
    made = ElasticLinear(
        linear,
        ladder,
        ranks,
        inheritance=inheritance,
        drop_level_OI=drop_levels(scores, [keep_count(scores.shape[1], s) for s in ladder.sparsities]),
        pattern_masks=[pattern_mask(scores, *level.pattern) for level in ladder.levels if level.pattern],
        train_base=train_base,
        teacher_dtype=torch.float32,
        generator=generator,
    )
    if trained:
        made.lora_B.data.normal_(generator=generator)
    return made


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, I)), generator=torch.Generator().manual_seed(2))


def forward(linear: ElasticLinear, level: int | None, x: Tensor) -> Tensor:
    linear.level = None if level is None else LADDER.levels[level]
    return linear(x)


def expected_weight(linear: ElasticLinear, level: int, groups: list[int]) -> Tensor:
    """(W + sum of B A) * M in float64, from the stacked pair by explicit column ranges."""
    starts = [0, *itertools.accumulate(RANKS)]
    total = linear.weight.detach().double().clone()
    for group in groups:
        part = slice(starts[group], starts[group + 1])
        total += linear.lora_B.detach().double()[:, part] @ linear.lora_A.detach().double()[part]
    return total * linear.mask(LADDER.levels[level])


def test_merge_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pair = (torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [10.0]]))  # B A = [[2, -2], [10, -10]]
    mask = torch.tensor([[True, False], [True, True]])
    assert merge(weight, [pair], mask).tolist() == [[3.0, 0.0], [13.0, -6.0]]
    assert merge(weight, [pair, pair], mask).tolist() == [[5.0, 0.0], [23.0, -16.0]]
    assert merge(weight.bfloat16(), [], mask).dtype == torch.float32
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_zero_init_is_the_masked_base(kind):
    linear = plain(kind)
    made = elastic(linear, trained=False)
    assert made.lora_A.abs().max() > 0
    for level in LADDER.levels:
        masked = weight_OI(linear) * made.mask(level)
        assert torch.equal(made.merged(level), masked)
        torch.testing.assert_close(forward(made, level.index, inputs()), F.linear(inputs(), masked, linear.bias))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("inheritance", INHERITANCES)
@pytest.mark.parametrize("train_base", [False, True])
def test_every_level_is_the_formula_merged_or_not(kind, inheritance, train_base):
    linear = plain(kind)
    made = elastic(linear, inheritance=inheritance, train_base=train_base)
    x = inputs()
    for level, groups in zip(LADDER.levels, GROUPS[inheritance], strict=True):
        expected = expected_weight(made, level.index, groups)
        merged = made.merged(level)
        assert made.active_groups(level) == groups
        assert merged.dtype == torch.float32
        assert (merged[~made.mask(level)] == 0).all()
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            forward(made, level.index, x), F.linear(x, merged, linear.bias), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("train_base", [False, True])
def test_no_level_is_the_dense_original(train_base):
    linear = plain()
    made = elastic(linear, train_base=train_base)
    made.weight.data += float(train_base)  # a trained base must not move the teacher
    assert torch.equal(forward(made, None, inputs()), linear(inputs()))
    conv = plain("conv1d")
    torch.testing.assert_close(forward(elastic(conv, train_base=train_base), None, inputs()), conv(inputs()))


def test_the_teacher_of_a_trained_base_has_its_own_dtype():
    linear = plain()
    made = ElasticLinear(
        linear,
        Ladder(sparsities=(0.5,)),
        (2,),
        inheritance="shared",
        drop_level_OI=drop_levels(linear.weight.detach().abs(), [I // 2]),
        pattern_masks=[],
        train_base=True,
        teacher_dtype=torch.bfloat16,
        generator=torch.Generator(),
    )
    rounded = linear.weight.detach().bfloat16()
    assert made.dense.dtype == torch.bfloat16
    assert torch.equal(forward(made, None, inputs()), F.linear(inputs(), rounded.float(), linear.bias))
    assert torch.equal(made.weight, linear.weight)


def test_no_bias():
    linear = plain(bias=False)
    made = elastic(linear)
    assert torch.equal(forward(made, None, inputs()), linear(inputs()))
    torch.testing.assert_close(forward(made, 1, inputs()), inputs() @ made.merged(LADDER.levels[1]).T)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(5, I), (2, 5, I)])
def test_gradients_equal_those_of_plain_autograd(rank, shape):
    generator = torch.Generator().manual_seed(3)
    leaves = [inputs(*shape), *(torch.randn(*s, generator=generator) for s in ((O, I), (rank, I), (O, rank)))]
    mask = torch.rand(O, I, generator=generator) < 0.5
    upstream = torch.randn(*shape[:-1], O, generator=generator)
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    _MaskedLinear.apply(*ours, mask).backward(upstream)
    theirs = [leaf.double().requires_grad_() for leaf in leaves]
    x, weight, lora_A, lora_B = theirs
    F.linear(x, (weight + lora_B @ lora_A) * mask).backward(upstream.double())
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad.double(), their.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inheritance", INHERITANCES)
@pytest.mark.parametrize("level", range(4))
def test_only_the_groups_a_loss_may_move_get_gradient(inheritance, level):
    made = elastic(plain(), inheritance=inheritance, train_base=True)
    forward(made, level, inputs()).square().sum().backward()
    moved = GROUPS[inheritance][level] if inheritance == "shared" else [level]
    for group, part in enumerate(made.slices):
        for grad in (made.lora_A.grad[part], made.lora_B.grad[:, part]):
            assert bool((grad != 0).any()) == (group in moved)
    assert torch.equal(made.weight.grad != 0, made.mask(LADDER.levels[level]))


@pytest.mark.parametrize(("inheritance", "reacts"), [("shared", True), ("detached", True), ("none", False)])
def test_denser_groups_reach_sparser_levels_only_if_inherited(inheritance, reacts):
    made = elastic(plain(), inheritance=inheritance)
    before = [forward(made, level, inputs()).detach() for level in range(4)]
    made.group_pair(1)[1].data += 1.0
    changed = [not torch.equal(forward(made, level, inputs()), before[level]) for level in range(4)]
    assert changed == [False, True, reacts, reacts]


def test_a_frozen_base_shares_memory_and_gets_no_gradient():
    linear = plain()
    made = elastic(linear)
    assert made.weight.data_ptr() == linear.weight.data_ptr()
    forward(made, 2, inputs()).sum().backward()
    assert made.weight.grad is None
    master = elastic(linear, train_base=True).weight
    assert master.data_ptr() != linear.weight.data_ptr()
    assert master.dtype == torch.float32


def test_bfloat16_autocast_multiplies_bfloat16_and_trains_float32():
    made, exact = (elastic(plain(), train_base=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = forward(made, 2, inputs())
    reference = forward(exact, 2, inputs())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), reference, rtol=0.02, atol=0.1)
    output.sum().backward()
    reference.sum().backward()
    for name in ("weight", "lora_A", "lora_B"):
        grad, wanted = getattr(made, name).grad, getattr(exact, name).grad
        assert grad.dtype == torch.float32
        assert (grad - wanted).norm() < 0.01 * wanted.norm()


def test_agrees_with_peft_when_the_mask_is_all_true():
    linear = plain()
    ladder = Ladder(sparsities=(0.0,))
    made = elastic(linear, ladder, (3,))
    assert made.mask(ladder.levels[0]).all()
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["0"], lora_dropout=0.0)
    reference = get_peft_model(nn.Sequential(plain()), config)
    lora = reference.base_model.model[0]
    lora.lora_A["default"].weight.data.copy_(made.lora_A.data)
    lora.lora_B["default"].weight.data.copy_(made.lora_B.data)
    made.level = ladder.levels[0]
    ours, theirs = made(inputs()), reference(inputs())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(made.lora_A.grad, lora.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.lora_B.grad, lora.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
    lora.merge()
    torch.testing.assert_close(made.merged(ladder.levels[0]), lora.weight.data, rtol=1e-5, atol=1e-5)


def test_same_generator_same_adapter():
    first, second = elastic(plain()), elastic(plain())
    assert torch.equal(first.lora_A, second.lora_A)
    assert first.lora_A.abs().max() <= 1 / I**0.5


def test_modules_are_found_replaced_and_switched():
    model = nn.ModuleDict({"block": nn.Sequential(plain(), nn.ReLU())})
    made = elastic(plain())
    replace_module_(model, "block.0", made)
    assert model["block"][0] is made
    assert [(name, linear is made) for name, linear in elastic_linears(model)] == [("block.0", True)]
    set_level_(model, LADDER.levels[3])
    assert made.level is LADDER.levels[3]
    set_level_(model, None)
    assert made.level is None


@pytest.mark.parametrize(("ranks", "num_patterns"), [((1, 1, 1), 1), ((1, 1, 1, 1), 0)])
def test_ranks_and_pattern_masks_must_fit_the_ladder(ranks, num_patterns):
    message = f"adapter: {len(ranks)} ranks and {num_patterns} pattern masks for a ladder of 4 groups and 1 patterns."
    with pytest.raises(ShapeError, match=re.escape(message)):
        ElasticLinear(
            plain(),
            LADDER,
            ranks,
            inheritance="shared",
            drop_level_OI=torch.zeros(O, I, dtype=torch.uint8),
            pattern_masks=[torch.ones(O, I, dtype=torch.bool)] * num_patterns,
            train_base=False,
            teacher_dtype=torch.float32,
            generator=torch.Generator(),
        )


def test_merged_once_gives_the_same_values_and_merges_at_the_first_call_only():
    made, x = elastic(plain(), train_base=True), inputs()
    expected = forward(made, 2, x).detach()
    with merged_once([made]):
        assert torch.equal(forward(made, 2, x), expected)
        made.weight.data += 1.0
        held = forward(made, 2, x)
        assert torch.equal(held, expected)
        assert not held.requires_grad
    assert made.held is None
    assert not torch.equal(forward(made, 2, x), expected)


def test_groups_that_are_no_neighbours_are_summed_all_the_same():
    """A pattern inside the densest level inherits its group and not those of the levels between."""
    ladder = Ladder(sparsities=(0.25, 0.5, 0.75), patterns=("2:4",), pattern_parent="densest")
    made = elastic(plain(), ladder)
    level = ladder.levels[3]
    assert made.active_groups(level) == [0, 3]
    made.level = level
    expected = F.linear(inputs(), made.merged(level), made.bias)
    torch.testing.assert_close(made(inputs()), expected, rtol=1e-5, atol=1e-5)
