"""The end-to-end phase's loss against torch's, its balanced order of levels, and its steps on a toy model."""

import math
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic_sparsity import end_to_end
from elastic_sparsity.adapters import ElasticLinear, set_level_
from elastic_sparsity.distill import Share
from elastic_sparsity.end_to_end import (
    HEAD_ROWS,
    EndToEndSettings,
    Snapshots,
    balanced_order,
    head_kl,
    train_end_to_end_,
)
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import drop_levels

LADDER = Ladder(sparsities=(0.5, 0.75))
SETTINGS = EndToEndSettings(steps=40, batch_size=2, adapter_lr=3e-2, base_lr=0.0, warmup=0.05, clip_norm=1.0)


def reference_kl(student: Tensor, teacher: Tensor, head: nn.Module) -> Tensor:
    log_p, log_q = (head(hidden).flatten(0, -2).log_softmax(dim=-1) for hidden in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def small_head(width: int = 6, vocabulary: int = 11) -> nn.Module:
    head = nn.Sequential(nn.Linear(width, vocabulary), nn.Tanh()).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.normal_(generator=generator)
    return head


def test_kl_by_hand():
    """Teacher (1/4, 3/4) against a uniform student: 1/4 log 1/2 + 3/4 log 3/2, and gradient student - teacher."""
    teacher = torch.tensor([[[0.0, math.log(3.0)]]])
    student = torch.zeros(1, 1, 2, requires_grad=True)
    kl = head_kl(student, teacher, lambda hidden: hidden)
    assert float(kl.detach()) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    kl.backward()
    assert student.grad.flatten().tolist() == pytest.approx([0.25, -0.25], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, HEAD_ROWS - 1), (1, HEAD_ROWS), (3, 43), (2, 150), (2, HEAD_ROWS)])
def test_kl_and_its_gradient_equal_torch(shape):
    generator = torch.Generator().manual_seed(1)
    head = small_head()
    start, teacher = (torch.randn(*shape, 6, generator=generator) for _ in range(2))
    ours, theirs = start.clone().requires_grad_(), start.double().requires_grad_()
    loss, reference = head_kl(ours, teacher, head), reference_kl(theirs, teacher.double(), small_head().double())
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    (3.0 * loss).backward()
    (3.0 * reference).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-8)


def test_kl_of_equal_states_is_zero_and_so_is_its_gradient():
    hidden = torch.randn(2, 70, 6, generator=torch.Generator().manual_seed(0))
    student = hidden.clone().requires_grad_()
    loss = head_kl(student, hidden, small_head())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad.abs().max() < 1e-9


def test_states_are_not_modified_and_bfloat16_keeps_its_dtype():
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(1, 130, 6, generator=generator).bfloat16() for _ in range(2))
    before = (student.clone(), teacher.clone())
    leaf = student.requires_grad_()
    loss = head_kl(leaf, teacher, small_head().bfloat16())
    loss.backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])
    assert leaf.grad.dtype == torch.bfloat16
    expected = reference_kl(before[0].float(), before[1].float(), small_head())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=0.05)


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_order_is_balanced_in_every_round(num_levels, steps, seed):
    levels = Ladder(sparsities=tuple(k / 10 for k in range(num_levels))).levels
    order = balanced_order(levels, steps, torch.Generator().manual_seed(seed))
    assert len(order) == steps
    for start in range(0, steps, num_levels):
        part = order[start : start + num_levels]
        assert len({level.index for level in part}) == len(part)
    counts = Counter(level.index for level in order)
    assert all(steps // num_levels <= counts[k] <= -(-steps // num_levels) for k in range(num_levels))


def test_order_is_shuffled_and_seeded():
    levels = Ladder(sparsities=tuple(k / 10 for k in range(6))).levels
    first, again, other = (balanced_order(levels, 30, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first == again != other
    rounds = {tuple(level.index for level in first[start : start + 6]) for start in range(0, 30, 6)}
    assert len(rounds) > 1


class Body(nn.Module):
    """An embedding and one elastic linear."""

    def __init__(self, train_base: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 8).requires_grad_(False)
        self.embedding.weight.normal_(generator=generator)
        linear = nn.Linear(8, 6).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        scores = linear.weight.abs()
        self.linear = ElasticLinear(
            linear,
            LADDER,
            (2, 2),
            inheritance="shared",
            drop_level_OI=drop_levels(scores, [keep_count(8, s) for s in LADDER.sparsities]),
            pattern_masks=[],
            train_base=train_base,
            teacher_dtype=torch.float32,
            generator=generator,
        )

    def forward(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.linear(self.embedding(ids)))


class Toy(nn.Module):
    """The part of a causal LM that the end-to-end phase uses."""

    def __init__(self, train_base: bool = False) -> None:
        super().__init__()
        self.base_model = Body(train_base)


def run(model: Toy, snapshots: Snapshots | None = None, **changes) -> tuple[dict[str, float], list[tuple[int, int]]]:
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(4))
    numbers = {name: getattr(SETTINGS, name) for name in EndToEndSettings.__slots__} | changes
    done = []
    generator = torch.Generator().manual_seed(5)
    settings = EndToEndSettings(**numbers)
    losses = train_end_to_end_(
        model,
        small_head(),
        LADDER,
        ids,
        settings,
        generator,
        nullcontext,
        lambda *progress: done.append(progress),
        Share(places=range(settings.batch_size), num_samples=ids.shape[0]),
        snapshots,
    )
    return losses, done


@pytest.mark.parametrize(("cost", "expected"), [(0.0, [3, 6, 9, 12]), (0.25, [3, 8])])
def test_snapshots_take_their_share_of_the_time_and_no_more(cost, expected, monkeypatch):
    """By a clock that a step moves by a second, and a snapshot by its cost: one in three seconds, or a twentieth."""
    now, taken = [0.0], []

    def save(tensors, note):
        taken.append(note["step"])
        now[0] += cost

    def step_loss(*args):
        now[0] += 1.0
        return real(*args)

    real = end_to_end._step_loss
    monkeypatch.setattr(end_to_end, "_step_loss", step_loss)
    monkeypatch.setattr(end_to_end, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run(Toy(), Snapshots(load=lambda: None, save=save, seconds=3.0, share=0.05), steps=12)
    assert taken == expected


def kl_of_levels(model: Toy) -> list[float]:
    """KL of every level to the dense model over all tokens, by torch."""
    ids = torch.arange(11)[None]
    values = []
    with torch.no_grad():
        set_level_(model, None)
        teacher = model.base_model(ids, False).last_hidden_state
        for level in LADDER.levels:
            set_level_(model, level)
            values.append(float(reference_kl(model.base_model(ids, False).last_hidden_state, teacher, small_head())))
    set_level_(model, None)
    return values


@pytest.mark.parametrize("base_lr", [0.0, 1e-2])
def test_training_lowers_every_level_and_leaves_the_dense_model(base_lr):
    model = Toy(train_base=True)
    ids = torch.arange(11)[None]
    dense, base = model.base_model(ids, False).last_hidden_state, model.base_model.linear.weight.detach().clone()
    before = kl_of_levels(model)
    losses, done = run(model, base_lr=base_lr)
    assert all(new < 0.85 * old for new, old in zip(kl_of_levels(model), before, strict=True))
    assert list(losses) == ["0.5", "0.75"]
    assert done == [(step, 40) for step in range(1, 41)]
    assert model.base_model.linear.level is None
    assert torch.equal(model.base_model(ids, False).last_hidden_state, dense)
    assert torch.equal(model.base_model.linear.weight, base) == (not base_lr)


def test_the_first_losses_are_those_of_the_untrained_levels():
    """Without learning rate nothing moves, so the reported losses are the levels' KL on the samples they met."""
    model = Toy()
    losses, _ = run(model, steps=6, batch_size=3, adapter_lr=0.0)
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        teacher = model.base_model(ids, False).last_hidden_state
        for level in LADDER.levels:
            set_level_(model, level)
            expected = reference_kl(model.base_model(ids, False).last_hidden_state, teacher, small_head())
            assert losses[level.name] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_names_its_level():
    model = Toy()
    model.base_model.linear.lora_A.data.fill_(float("nan"))
    generator = torch.Generator().manual_seed(5)
    first = balanced_order(LADDER.levels, 1, generator)[0].name
    with pytest.raises(NumericsError, match=f"^end-to-end phase: loss of level {first} is nan at step 0; lower end_to"):
        run(model)
