"""Singular values and importance of a model's linears before and after induction, in one picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from refresh import norms_anew

from elastic_sparsity.arch import architecture_of, decoder_blocks, linears_of, weight_OI
from elastic_sparsity.importance import wanda_scores

BUCKETS = 200


@torch.no_grad()
def draw(before: Any, after: Any, token_ids_ST: torch.Tensor, file: Path) -> None:
    """Two rows of panels for each of the first, the middle and the last block, one column a kind of linear.

    Above: singular values over the largest. Below: share of a row's squared importance that its largest weights hold,
    importance being Wanda's |W| |X|, with each model's own inputs: what pruning keeps.

    Args:
        token_ids_ST: calibration samples for |X|, on the models' device.
    """
    models = {"before": before, "after": after}
    norms = {label: norms_anew(model, linears_of(model), token_ids_ST) for label, model in models.items()}
    row, paths = architecture_of(before.config.model_type), architecture_of(before.config.model_type).linears
    blocks = shown_blocks(len(decoder_blocks(before)))
    figure, axes = pyplot.subplots(
        2 * len(blocks), len(paths), figsize=(2.6 * len(paths), 4.6 * len(blocks)), layout="constrained", squeeze=False
    )
    for place, index in enumerate(blocks):
        above, below = axes[2 * place], axes[2 * place + 1]
        for column, path in enumerate(paths):
            name = f"{row.blocks}.{index}.{path}"
            for label, model in models.items():
                weight_of = weight_OI(linears_of(model)[name]).detach().float()
                spectrum = torch.linalg.svdvals(weight_of).cpu()
                above[column].semilogy(spectrum / spectrum[0], label=label)
                scores_OI = wanda_scores(weight_of, norms[label][name].square_sum_I)
                below[column].plot(torch.linspace(0, 1, BUCKETS), held_share(scores_OI).cpu(), label=label)
            above[column].set_title(f"{index}: {path}", fontsize=8)
        above[0].set_ylabel("singular value / largest")
        below[0].set_ylabel("share of squared |W| |X|")
    axes[-1, len(paths) // 2].set_xlabel("share of a row's weights, most important first")
    axes[0, 0].legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def shown_blocks(count: int) -> list[int]:
    """The first, the middle and the last of them, each once."""
    return sorted({0, count // 2, count - 1})


def held_share(scores_OI: torch.Tensor) -> torch.Tensor:
    """(BUCKETS,): mean over rows of the share of squared scores that a row's largest ones hold."""
    ordered = scores_OI.square().sort(dim=1, descending=True).values
    shares = (ordered.cumsum(dim=1) / ordered.sum(dim=1, keepdim=True).clamp_min(1e-30)).mean(dim=0)
    places = torch.linspace(0, len(shares) - 1, BUCKETS).long()
    return shares[places]
