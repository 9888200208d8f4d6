"""An order of input channels under which an N:M pattern keeps more. torch only.

Channels of equal weight compete within their group of M; another order lets them compete with weaker ones. Source: the
idea and the assignment per place of "Plug-and-Play" (RIA, ICLR 2024, section 4.2). What we changed: an assignment is
improved by exchanging pairs instead of solved by the Hungarian method, so every round gains or stops, and the order
that was there is never lost against.
Letters: O rows, I channels, G groups.
"""

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError

LEAST_GAIN = 1e-6  # of all scores: below it a round was rounding


def kept_share(scores_OI: Tensor, kept: int, group_size: int) -> float:
    """Sum of the `kept` highest scores of every group over the sum of all; 1 if all scores are zero."""
    total = float(scores_OI.sum(dtype=torch.float64))
    groups = _groups(scores_OI, group_size)
    return float(groups.topk(kept, dim=2).values.sum(dtype=torch.float64)) / total if total else 1.0


@torch.no_grad()
def improved_order(scores_OI: Tensor, kept: int, group_size: int, rounds: int = 2) -> Tensor:
    """An order that keeps at least as much as the one given.

    Args:
        scores_OI: non-negative and additive, e.g. squared importance.
        kept: of every `group_size` neighbours, in every row.
        rounds: passes over all places of a group; fewer if one gains nothing.
    Returns: (I,) int64; new channel i is the old one order[i].
    Raises: ShapeError: if the groups do not divide the width, or keep all or nothing.
    """
    width = scores_OI.shape[1]
    if not 0 < kept < group_size:
        raise ShapeError(f"order: keeping {kept} of {group_size} leaves nothing to choose; expected fewer, and some.")
    order_I, best = torch.arange(width, device=scores_OI.device), kept_share(scores_OI, kept, group_size)
    scores_OI = scores_OI.float()
    for _ in range(rounds):
        tried_I = order_I.clone()
        for place in range(group_size):
            groups_OGM = _groups(scores_OI[:, tried_I], group_size)
            moved_G = _exchanged(_worth(groups_OGM, place, kept))
            tried_GM = tried_I.view(-1, group_size)
            tried_GM[:, place] = tried_GM[moved_G, place]
        found = kept_share(scores_OI[:, tried_I], kept, group_size)
        if found <= best + LEAST_GAIN:
            break
        order_I, best = tried_I, found
    return order_I


def _groups(scores_OI: Tensor, group_size: int) -> Tensor:
    rows, width = scores_OI.shape
    if width % group_size:
        raise ShapeError(f"order: found {width} channels; expected a multiple of the pattern's {group_size}.")
    return scores_OI.reshape(rows, -1, group_size)


def _worth(groups_OGM: Tensor, place: int, kept: int) -> Tensor:
    """(G, G): what group g keeps, over all rows, if the channel at `place` is that of group h.

    A channel is kept if it beats the `kept`-th of the others, so the sum is theirs with the larger of both. What the
    others above it give is the same for all h, and left out.
    """
    others = [i for i in range(groups_OGM.shape[2]) if i != place]
    rival_OG = groups_OGM[:, :, others].topk(kept, dim=2).values[..., -1]
    moved_OG = groups_OGM[:, :, place]
    found = moved_OG.new_empty(moved_OG.shape[1], moved_OG.shape[1])
    for group in range(len(found)):
        found[group] = torch.maximum(rival_OG[:, group, None], moved_OG).sum(dim=0)
    return found


def _exchanged(worth_GG: Tensor) -> Tensor:
    """(G,): which group's channel each group takes; exchanges of two that gain, until none does."""
    groups = len(worth_GG)
    taken_G, index_G = torch.arange(groups), torch.arange(groups)
    worth_GG = worth_GG.cpu()
    least = LEAST_GAIN * float(worth_GG.diagonal().sum().abs()) / max(1, groups)
    for _ in range(4 * groups):
        now_GG = worth_GG[:, taken_G]  # [g, h]: g has what h has now
        own_G = now_GG.diagonal()
        gain_GG = now_GG + now_GG.T - own_G[:, None] - own_G
        best_G, with_G = gain_GG.max(dim=1)
        free = torch.ones(groups, dtype=torch.bool)
        changed = False
        for group in best_G.argsort(descending=True, stable=True).tolist():
            other = int(with_G[group])
            if best_G[group] <= least:
                break
            if free[group] and free[other]:  # both gains are still those computed above
                free[group] = free[other] = False
                taken_G[group], taken_G[other] = taken_G[other].clone(), taken_G[group].clone()
                changed = True
        if not changed:
            break
    assert torch.equal(taken_G.sort().values, index_G)
    return taken_G.to(worth_GG.device)
