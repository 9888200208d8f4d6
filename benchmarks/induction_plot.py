"""Singular values and importance of a model's linears before and after induction, in one picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot

from elastic_sparsity.arch import architecture_of, decoder_blocks, linears_of, weight_OI

BUCKETS = 200


def draw(before: Any, after: Any, file: Path) -> None:
    """Two rows of panels, one column a kind of linear, all from the middle block.

    Above: singular values over the largest. Below: share of a row's squared magnitude that its largest weights hold,
    which is what pruning by magnitude keeps.
    """
    row, index = architecture_of(before.config.model_type), len(decoder_blocks(before)) // 2
    names = [f"{row.blocks}.{index}.{path}" for path in row.linears]
    figure, axes = pyplot.subplots(2, len(names), figsize=(2.6 * len(names), 5.2), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        for model, label in ((before, "before"), (after, "after")):
            weight = weight_OI(linears_of(model)[name]).detach().float()
            spectrum = torch.linalg.svdvals(weight)
            axes[0, column].semilogy(spectrum / spectrum[0], label=label)
            axes[1, column].plot(torch.linspace(0, 1, BUCKETS), held_share(weight), label=label)
        axes[0, column].set_title(name.removeprefix(f"{row.blocks}."), fontsize=8)
    axes[0, 0].set_ylabel("singular value / largest")
    axes[1, 0].set_ylabel("share of squared magnitude")
    axes[1, len(names) // 2].set_xlabel("share of a row's weights, largest first")
    axes[0, 0].legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def held_share(weight_OI: torch.Tensor) -> torch.Tensor:
    """(BUCKETS,): mean over rows of the energy in a row's largest weights."""
    ordered = weight_OI.square().sort(dim=1, descending=True).values
    shares = (ordered.cumsum(dim=1) / ordered.sum(dim=1, keepdim=True).clamp_min(1e-30)).mean(dim=0)
    places = torch.linspace(0, len(shares) - 1, BUCKETS).long()
    return shares[places]
