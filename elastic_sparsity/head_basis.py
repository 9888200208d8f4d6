"""Bases of a head's values, and angles of its query and key pairs, in which few weights hold most. torch only.

Absorbed exactly (`rotation`), unlike scales they change Wanda's scores. Source of the aim: DenoiseRotator (arXiv
2505.23049): importance normalised to a distribution, its entropy lowered. What we changed: only matrices that weights
absorb, so that nothing is added at run time; closed forms first.
Letters: C channels of a head, R query heads that read it, D model width, P RoPE pairs, A angles.
"""

import torch
from torch import Tensor

from elastic_sparsity.errors import ShapeError
from elastic_sparsity.metric_refresh import mixed_square_sum

FLOOR = 1e-8  # of the mean variance: directions in which values never move keep a finite inverse


def principal_basis(gram_CC: Tensor) -> Tensor:
    """Orthogonal (C, C) float64 that makes the values' second moments diagonal, largest first: A v is A = Q^T."""
    return torch.linalg.eigh(gram_CC.double()).eigenvectors.flip(-1).transpose(-1, -2).contiguous()


def balanced_basis(gram_CC: Tensor, out_DC: Tensor) -> Tensor:
    """Invertible (C, C) float64 that makes values white and the output's columns orthogonal, most energy first.

    With S = gram^(1/2) and S out^T out S = U L U^T it is A = U^T S^-1: the value-output product's singular directions.
    """
    values_C, vectors_CC = torch.linalg.eigh(gram_CC.double())
    values_C = values_C.clamp_min(FLOOR * float(values_C.mean().clamp_min(torch.finfo(torch.float64).tiny)))
    root_CC = vectors_CC * values_C.sqrt() @ vectors_CC.T
    inverse_CC = vectors_CC / values_C.sqrt() @ vectors_CC.T
    energy_CC = root_CC @ out_DC.double().T @ out_DC.double() @ root_CC
    return (torch.linalg.eigh(energy_CC).eigenvectors.flip(-1).T @ inverse_CC).contiguous()


def in_proportion(matrix_CC: Tensor, value_CD: Tensor, out_RDC: Tensor, max_condition: float) -> Tensor:
    """Rows of a basis scaled, so that weights on both sides of it stand to each other as the head's did before.

    Scales change none of Wanda's masks, but one learning rate trains both sides: white values made those of two blocks
    of SmolLM2-135M 400 times smaller against the output's weights, and the first steps of training broke them.

    Args:
        matrix_CC: an invertible basis.
        value_CD: rows of the value linear for this head; out_RDC: the output linear's columns for each query head.
        max_condition: beyond it channels are scaled less unlike each other than that would take.
    Returns: (C, C) float64. Channels without a weight on one side keep the others' mean scale.
    """
    matrix, value, out = matrix_CC.double(), value_CD.double(), out_RDC.double()
    value_C, out_C = (matrix @ value).square().mean(1), (out @ torch.linalg.inv(matrix)).square().mean((0, 1))
    logs_C = (value.square().mean() * out_C).log() - (out.square().mean() * value_C).log()
    known_C = logs_C.isfinite()
    if not known_C.any():
        return matrix
    middle = logs_C[known_C].mean()
    spread = 2 * torch.log(max_condition / torch.linalg.cond(matrix)).clamp_min(0.0)
    apart_C = torch.where(known_C, logs_C - middle, 0.0).clamp(-spread, spread)
    return matrix * ((middle + apart_C) / 4).exp()[:, None]


def entropy(energy_OI: Tensor) -> Tensor:
    """Mean over rows of the entropy of a row's energy, made a distribution; nats. Scale-free: a row's scale is nothing.

    Rows count by their energy, as they do in the output's error.
    """
    total_O1 = energy_OI.sum(dim=1, keepdim=True).clamp_min(torch.finfo(energy_OI.dtype).tiny)
    share_OI = energy_OI / total_O1
    # Not xlogy: its gradient at a share of zero is infinite, and weights that were quantised hold many zeros.
    entropy_O = -(share_OI * share_OI.clamp_min(torch.finfo(share_OI.dtype).tiny).log()).sum(dim=1)
    return (entropy_O * total_O1[:, 0]).sum() / total_O1.sum()


def turned_values(
    value_CD: Tensor, value_energy_D: Tensor, out_RDC: Tensor, gram_RCC: Tensor, start_CC: Tensor, steps: int, lr: float
) -> Tensor:
    """A rotation behind `start_CC` that lowers the entropy of Wanda's squared scores of values and output.

    Args:
        value_CD: rows of the value linear for this head; value_energy_D: sums of squares of its inputs.
        out_RDC: the output linear's columns for each query head; gram_RCC: sums of x x^T of their inputs.
        start_CC: the basis to start from.
        steps: of Adam on a skew-symmetric matrix, whose exponential is the rotation.
    Returns: (C, C) float64, rotation @ start.
    """
    size = start_CC.shape[0]
    start = start_CC.double()
    back = torch.linalg.inv(start)
    value, out, gram = start @ value_CD.double(), out_RDC.double() @ back, start @ gram_RCC.double() @ start.T
    value, out, gram = (x.detach().float() for x in (value, out, gram))
    energy_D = value_energy_D.float()
    free_CC = torch.zeros(size, size, requires_grad=True)
    optimizer = torch.optim.Adam([free_CC], lr=lr)
    best, best_rotation = float("inf"), torch.eye(size)
    for step in range(steps + 1):
        rotation = torch.matrix_exp(free_CC.triu(1) - free_CC.triu(1).T)
        of_value = entropy((rotation @ value).square() * energy_D)
        turned_RDC, norms_RC = out @ rotation.T, mixed_square_sum(gram, rotation)
        of_out = entropy((turned_RDC.square() * norms_RC[:, None]).flatten(0, 1))
        loss = of_value + of_out
        if float(loss.detach()) < best:
            best, best_rotation = float(loss.detach()), rotation.detach()
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    # In float64 again, where rounding would leave a rotation of 1e-7: condition and norms stay exact.
    exact, _ = torch.linalg.qr(best_rotation.double())
    signs_C = (exact * best_rotation.double()).sum(dim=0).sign()
    return (exact * signs_C) @ start


def pair_angles(query_R2PD: Tensor, key_2PD: Tensor, energy_D: Tensor, kept: int, num_angles: int = 32) -> Tensor:
    """The turn of every RoPE pair that keeps most of both sides' energy when `kept` of each row's weights stay.

    Args:
        query_R2PD: rows of each query head, first and second channel of every pair; key_2PD: those of the key.
        energy_D: sums of squares of their inputs.
        kept: weights kept a row.
        num_angles: tried over a quarter turn, after which rows only swap and change sign; the first is zero.
    Returns: (P,) float64 radians; zero where no turn keeps more.
    Raises: ShapeError.
    """
    if query_R2PD.shape[1:] != key_2PD.shape or key_2PD.shape[-1:] != energy_D.shape:
        raise ShapeError(
            f"angles: queries {tuple(query_R2PD.shape)}, keys {tuple(key_2PD.shape)}, {len(energy_D)} inputs."
        )
    angles_A = torch.arange(num_angles, dtype=torch.float64) * (torch.pi / 2 / num_angles)
    weighted = torch.cat([key_2PD[None], query_R2PD]).float() * energy_D.float().sqrt()
    first, second = weighted[:, 0], weighted[:, 1]  # (1 + R, P, D)
    total = weighted.square().sum(dim=(1, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    worth = []
    for angle in angles_A.tolist():
        cosine, sine = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        turned = torch.stack([cosine * first - sine * second, sine * first + cosine * second])
        held = turned.square().topk(kept, dim=-1, sorted=False).values.sum(dim=(0, -1)) / total
        worth.append(held[0] + held[1:].mean(dim=0))
    worth_AP = torch.stack(worth)
    best_P = worth_AP.argmax(dim=0)
    gains = worth_AP.gather(0, best_P[None])[0] > worth_AP[0]
    return torch.where(gains, angles_A[best_P], 0.0)
