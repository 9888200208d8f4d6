"""The block phase: its losses by hand, what one step minimises, that training helps every level, and its error."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from elastic_sparsity.adapters import ElasticLinear
from elastic_sparsity.distill import (
    BLOCK_LOSSES,
    BlockSettings,
    Share,
    block_outputs,
    cosine,
    draw_levels,
    mse_loss,
    relative_loss,
    train_block_,
)
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.ladder import Ladder, keep_count
from elastic_sparsity.masks import drop_levels, pattern_mask
from elastic_sparsity.mixer import FeatureMixer

WIDTH = 16
LADDER = Ladder(sparsities=(0.5, 0.75), patterns=("2:4",))
SETTINGS = BlockSettings(
    steps=60, batch_size=3, adapter_lr=3e-2, base_lr=0.0, mixer_lr=1e-2, loss="relative", densest_weight=0.0
)


class Problem:
    """One elastic linear as a block, with correlated inputs, a stream a group, and the dense block's output."""

    def __init__(self, *, samples: int = 6, train_base: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        linear.weight.data.normal_(generator=generator)
        scores = linear.weight.detach().abs()
        self.block = ElasticLinear(
            linear,
            LADDER,
            (2, 2, 2),
            inheritance="shared",
            drop_level_OI=drop_levels(scores, [keep_count(WIDTH, s) for s in LADDER.sparsities]),
            pattern_masks=[pattern_mask(scores, 2, 4)],
            train_base=train_base,
            teacher_dtype=torch.float32,
            generator=generator,
        )
        mixing = torch.randn(4, WIDTH, generator=generator)
        self.dense = torch.randn(samples, 5, 4, generator=generator) @ mixing
        self.target = linear(self.dense).detach()
        noises = (0.02, 0.05, 0.03)
        self.streams = [self.dense + n * torch.randn(self.dense.shape, generator=generator) for n in noises]

    def output(self, level_index: int) -> Tensor:
        """The block on a group's whole stream."""
        self.block.level = LADDER.levels[level_index]
        with torch.no_grad():
            return self.block(self.streams[level_index])

    def train(self, mixer: str | FeatureMixer = "own", seed: int = 0, **changes) -> dict[str, float]:
        settings = replace(SETTINGS, **changes)
        return train_block_(
            self.block,
            [self.block],
            LADDER,
            self.streams,
            self.dense,
            self.target,
            FeatureMixer(mixer, (1.0, 1.0, 1.0)) if isinstance(mixer, str) else mixer,
            settings,
            torch.Generator().manual_seed(seed),
            "block 3",
            nullcontext,
            Share(places=range(settings.batch_size), num_samples=self.target.shape[0]),
        )


def test_losses_by_hand():
    target = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])  # energies 25 and 1
    output = torch.tensor([[[3.0, 9.0], [2.0, 1.0]]])  # errors 25 and 4
    assert float(relative_loss(output, target)) == pytest.approx((25 / 25 + 4 / 1) / 2, rel=1e-4)
    assert float(mse_loss(output, target)) == pytest.approx((25 + 4) / 4)
    for loss in BLOCK_LOSSES.values():
        assert float(loss(target, target)) == 0.0


def test_losses_of_half_tensors_are_float32():
    target = torch.full((1, 2, 4), 300.0, dtype=torch.float16)  # its square overflows float16
    assert float(relative_loss(0 * target, target)) == pytest.approx(1.0, rel=1e-4)
    assert float(mse_loss(0 * target, target)) == pytest.approx(90000.0)


def test_relative_loss_equals_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    ratios = []
    for out, wanted in zip(output.reshape(-1, 8).tolist(), target.reshape(-1, 8).tolist(), strict=True):
        error = sum((a - b) ** 2 for a, b in zip(out, wanted, strict=True))
        ratios.append(error / sum(b**2 for b in wanted))
    assert float(relative_loss(output, target)) == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_a_massive_activation_does_not_dominate_the_relative_loss():
    """Ten tokens, one 100 times as large, all off by 10 %: every token counts the same, unlike in the plain mean."""
    target = torch.ones(1, 10, 8)
    target[0, 0] *= 100
    error = 0.1 * target

    def share_of_massive(loss):
        only = torch.zeros_like(error)
        only[0, 0] = error[0, 0]
        return float(loss(target + only, target) / loss(target + error, target))

    assert share_of_massive(relative_loss) == pytest.approx(0.1, abs=0.001)
    assert share_of_massive(mse_loss) > 0.99


def test_a_target_of_zeros_gives_a_finite_loss():
    target = torch.ones(1, 3, 4)
    target[0, 1] = 0.0
    assert math.isfinite(float(relative_loss(target + 0.1, target)))
    assert math.isfinite(float(relative_loss(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))))


@pytest.mark.parametrize(
    ("step", "num_steps", "warmup", "factor"),
    [(0, 10, 0.0, 1.0), (5, 10, 0.0, 0.5), (0, 10, 0.5, 0.2), (4, 10, 0.5, 0.5 * (1 + math.cos(0.4 * math.pi)))],
)
def test_cosine_by_hand(step, num_steps, warmup, factor):
    assert cosine(step, num_steps, warmup) == pytest.approx(factor)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_cosine_stays_in_its_range(warmup):
    factors = [cosine(step, 37, warmup) for step in range(37)]
    assert min(factors) > 0
    assert max(factors) <= 1


def test_draw_levels_gives_one_of_every_group():
    assert draw_levels(LADDER, torch.Generator()) == list(LADDER.levels)
    grouped = Ladder(sparsities=(0.1, 0.2, 0.3, 0.4), patterns=("2:4",), group_ends=(0.3, 0.4))
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_levels(grouped, generator) for _ in range(60)]
    assert all([level.group for level in levels] == [0, 1, 2] for levels in drawn)
    assert {levels[0].name for levels in drawn} == {"0.1", "0.2", "0.3"}


@pytest.mark.parametrize("loss", ["relative", "mse"])
@pytest.mark.parametrize("mixer", ["own", "learned", "fixed", "dense"])
def test_training_lowers_the_loss_of_every_level(loss, mixer):
    problem = Problem()
    before = [float(BLOCK_LOSSES[loss](problem.output(k), problem.target)) for k in range(3)]
    found = problem.train(mixer, loss=loss)
    after = [float(BLOCK_LOSSES[loss](problem.output(k), problem.target)) for k in range(3)]
    assert all(new < 0.6 * old for new, old in zip(after, before, strict=True))
    assert list(found) == ["0.5", "0.75", "2:4"]
    assert all(value < 0.6 * old for value, old in zip(found.values(), before, strict=True))


def test_the_base_moves_only_if_asked():
    problem = Problem(train_base=True)
    before = problem.block.weight.detach().clone()
    problem.train()
    assert torch.equal(problem.block.weight, before)
    problem.train(base_lr=1e-3)
    served = problem.block.mask(LADDER.levels[0]) | problem.block.mask(LADDER.levels[2])
    assert torch.equal(problem.block.weight != before, served)


def test_learned_weights_leave_a_useless_stream():
    problem = Problem()
    problem.streams[1] = torch.randn(problem.dense.shape, generator=torch.Generator().manual_seed(9))
    mixer = FeatureMixer("learned", (1.0, 1.0, 1.0))
    problem.train(mixer)
    assert mixer.weights[1] < 0.3 < min(mixer.weights[0], mixer.weights[2])
    fixed = FeatureMixer("fixed", (1.0, 1.0, 1.0))
    problem.train(fixed)
    assert fixed.weights.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_first_step_reports_the_loss_spelled_out(share):
    """One sample, one step: masked base against the target, and against the densest level's output by its share."""
    problem = Problem(samples=1)
    outputs = [problem.output(k) for k in range(3)]
    to_target = [float(relative_loss(output, problem.target)) for output in outputs]
    to_densest = [float(relative_loss(output, outputs[0])) for output in outputs]
    expected = [to_target[0], *((1 - share) * to_target[k] + share * to_densest[k] for k in (1, 2))]
    found = problem.train(steps=1, densest_weight=share)
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_no_steps_change_nothing():
    problem = Problem()
    before = problem.block.lora_A.detach().clone()
    assert problem.train(steps=0) == {}
    assert torch.equal(problem.block.lora_A, before)
    assert (problem.block.lora_B == 0).all()


def test_same_seed_same_adapters():
    first, second, other = Problem(), Problem(), Problem()
    assert first.train(steps=5) == second.train(steps=5)
    other.train(steps=5, seed=1)
    assert torch.equal(first.block.lora_B, second.block.lora_B)
    assert not torch.equal(first.block.lora_B, other.block.lora_B)


@pytest.mark.parametrize(("group", "name"), [(0, "0.5"), (1, "0.75"), (2, "2:4")])
def test_a_loss_that_is_not_finite_names_its_level(group, name):
    problem = Problem()
    problem.streams[group] = problem.streams[group] * float("nan")
    with pytest.raises(NumericsError, match=f"^block 3: loss of level {name} is nan at step 0; lower block.adapter_lr"):
        problem.train()


@pytest.mark.parametrize("mode", ["own", "dense", "learned", "fixed"])
def test_block_outputs_are_the_next_streams(mode):
    problem = Problem()
    problem.train(steps=3)
    mixer = FeatureMixer(mode, (1.0, 2.0, 1.0))
    with torch.no_grad():
        inputs = [mixer(problem.streams, problem.dense, group) for group in range(3)]
    merged = [problem.block.merged(level) for level in LADDER.levels]
    expected = [x @ weight.T for x, weight in zip(inputs, merged, strict=True)]
    if mode == "dense":
        expected = [problem.target] * 3
    if mode == "fixed":
        expected = [0.25 * expected[0] + 0.5 * expected[1] + 0.25 * expected[2]] * 3
    found = block_outputs(
        problem.block,
        [slice(0, 3), slice(3, problem.dense.shape[0])],
        [problem.block],
        LADDER,
        problem.streams,
        problem.dense,
        problem.target,
        mixer,
        torch.Generator(),
        lambda group: torch.empty_like(problem.dense),
    )
    assert len(found) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (found[0] is found[1]) == (mode in ("fixed", "dense"))
    assert mode == "dense" or problem.block.level is None
