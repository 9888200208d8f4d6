"""How many heads and MLP channels stay, so that a budget of parameters is met. Whole numbers only, no model.

Equal counts in every block, which an ordinary config.json expresses; or counts by block, as prices of units say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from elastic_sparsity.errors import ConfigError

HELD_OUT = 16  # calibration samples by which a search of counts judges


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What stays, block by block.

    Attributes:
    groups: key/value heads that stay, each with all its query heads.
    channels: intermediate channels of the MLP that stay, multiples of what was asked.
    num_groups, num_channels: what every block of the whole model has.
    removed, total: parameters of all blocks' linears, weights and biases.
    """

    groups: tuple[int, ...]
    num_groups: int
    channels: tuple[int, ...]
    num_channels: int
    removed: int
    total: int

    @property
    def sparsity(self) -> float:
        """The realised share of the parameters of the blocks' linears that goes."""
        return self.removed / self.total


def counts_text(counts: int | Sequence[int]) -> str:
    """For people: "672", or "160 to 1,536" if blocks differ."""
    found = [counts] if isinstance(counts, int) else counts
    return f"{min(found):,}" if len(set(found)) == 1 else f"{min(found):,} to {max(found):,}"


def choose_sizes(
    sparsity: float,
    *,
    num_blocks: int,
    total: int,
    group_cost: int,
    num_groups: int,
    channel_cost: int,
    num_channels: int,
    multiple: int,
    allowed_groups: Sequence[int],
) -> Sizes:
    """The same counts in every block: attention keeps its share or a little more, the MLP makes up for it.

    The smallest allowed count of groups that is at least the share, or the next larger, or else the next smaller one,
    for which a count of channels exists that meets the budget to within half a multiple. More rather than fewer: a
    whole head is dearer than channels of its size (SmolLM2-135M less 25 %: 3 of 3 heads 50.3, 2 of 3 85.7 perplexity).

    Args:
        sparsity: of all parameters of the blocks' linears; above 0, below 1.
        total: these parameters of one block.
        group_cost, channel_cost: parameters that go with one key/value head, or with one channel.
        multiple: the channels that stay are a multiple of it.
        allowed_groups: counts that the architecture's config can express; all of them if heads must stay.
    Raises: ConfigError: if the sparsity is out of range, the multiple does not divide, or no counts meet the budget.
    """
    check_sparsity(sparsity)
    if multiple < 1 or num_channels % multiple:
        raise ConfigError(f"multiple: {multiple} does not divide the {num_channels} channels of the MLP.")
    target, steps = Fraction(sparsity) * total, num_channels // multiple
    wanted = (1 - Fraction(sparsity)) * num_groups
    for groups in sorted(allowed_groups, key=lambda count: (count < wanted, abs(count - wanted))):
        rest = target - (num_groups - groups) * group_cost
        gone = floor(rest / (multiple * channel_cost) + Fraction(1, 2))
        if not 0 <= gone < steps:
            continue
        removed = (num_groups - groups) * group_cost + gone * multiple * channel_cost
        if not removed:
            raise ConfigError(
                f"sparsity: {sparsity:g} of the blocks' linears is less than half of what can go at once; raise it, or "
                "lower the multiple."
            )
        return Sizes(
            groups=(groups,) * num_blocks,
            num_groups=num_groups,
            channels=(num_channels - gone * multiple,) * num_blocks,
            num_channels=num_channels,
            removed=removed * num_blocks,
            total=total * num_blocks,
        )
    least = min(allowed_groups, default=num_groups)
    most = (num_groups - least) * group_cost + (num_channels - multiple) * channel_cost
    raise ConfigError(
        f"sparsity: {sparsity:g} of the blocks' linears cannot be removed; with at least {least} of {num_groups} "
        f"key/value heads and {multiple} of {num_channels} channels left, at most {most / total:.3f} can."
    )


def check_sparsity(sparsity: float) -> None:
    """Raises: ConfigError: unless it is above 0 and below 1."""
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity: {sparsity:g} is not between 0 and 1; 0.5 removes half of the blocks' linears.")
