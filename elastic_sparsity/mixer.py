"""The feature mixer: from one block's outputs at several levels to the next block's training inputs. torch only.

EPTS (arXiv 2606.25285) mixes the levels' outputs with fixed weights into one input that every level trains on. Here
the same module also learns the weights, or leaves every level on a stream of its own, which is what a deployed level
will see. It serves any expectation over levels (e.g. arXiv 2503.09657, eq. 5): only the weights differ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import ShapeError


def convex_mix(outputs: Sequence[Tensor], weights_K: Tensor) -> Tensor:
    """Sum of `outputs` (equal shapes) under non-negative weights that sum to one.

    Raises: ShapeError: if the weights are no convex combination of `outputs`.
    """
    if (
        weights_K.shape != (len(outputs),)
        or (weights_K < 0).any()
        or not abs(float(weights_K.detach().sum()) - 1) <= 1e-4
    ):
        raise ShapeError(
            f"mixer: {len(outputs)} outputs need as many weights >= 0 that sum to 1, found {weights_K.tolist()}."
        )
    mixed = outputs[0] * weights_K[0]
    for output, weight in zip(outputs[1:], weights_K[1:], strict=True):
        mixed = mixed + output * weight
    return mixed


class FeatureMixer(nn.Module):
    """Chooses what each adapter group's loss gets as block input.

    Args:
        mode: "fixed" (constant weights), "learned" (softmax of trained logits), "own" (each group its own stream) or
            "dense" (everyone the dense stream; an ablation, the train/test mismatch of the original PTS papers).
        initial_weights: convex weights over the groups, for "fixed" and as the start of "learned".
    """

    def __init__(self, mode: str, initial_weights: Sequence[float]) -> None:
        super().__init__()
        self.mode = mode
        start = torch.tensor(list(initial_weights), dtype=torch.float32)
        self.start = start / start.sum()
        self.logits = nn.Parameter(self.start.clamp_min(1e-6).log(), requires_grad=mode == "learned")

    @property
    def weights(self) -> Tensor:
        """(K,) convex weights, differentiable in "learned" mode."""
        return self.logits.softmax(dim=0) if self.mode == "learned" else self.start

    def forward(self, per_group: Sequence[Tensor], dense: Tensor, group: int) -> Tensor:
        """Input of `group` from the streams of all groups (each (B, T, D)) and the dense stream."""
        if self.mode == "dense":
            return dense
        if self.mode == "own":
            return per_group[group]
        return convex_mix(per_group, self.weights.to(per_group[0].device))
