"""Invertible matrices, turns and permutations that a block's own weights absorb: the function stays.

Unlike the channel scales of arXiv 2602.21652, matrices and turns change Wanda's masks, and permutations change N:M
masks. A matrix per key/value head lies between values and output, a complex number per RoPE pair between queries and
keys, a permutation over the MLP's intermediate channels or over those of a value head. Source: the orthogonal matrices
per head of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406); any invertible one will do without an operation
at run time. The complex numbers are our generalisation of the scales of arXiv 2602.21652 to what RoPE commutes with.
Letters: K key/value heads, C channels of a head, P RoPE pairs of a head, F intermediate channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import weight_OI as view_OI
from elastic_sparsity.errors import AbsorptionError, ShapeError
from elastic_sparsity.folding import Draft, checked_permutation, finite, real_values
from elastic_sparsity.wiring import heads_of, linear_at, mlp_rows, wiring_of

MAX_CONDITION = 1e5  # of a matrix per head; its rounding errors grow as this, and 1e-16 times it still passes the gate


def mix_values_(block: nn.Module, config: Any, matrices_KCC: Tensor) -> None:
    """Values of key/value head k become A_k v; the output linear takes A_k back for every query head that reads it.

    Exact because attention mixes tokens, not channels.

    Args:
        matrices_KCC: (key/value heads, head size, head size) floats, best float64.
    Raises: ShapeError, NumericsError; AbsorptionError: if a matrix is singular or nearly so (condition above 1e5).
    """
    row, heads = wiring_of(config), heads_of(block, config)
    num_kv, size = heads.value_KC.shape
    matrices_KCC = real_values(matrices_KCC, (num_kv, size, size), f"matrices between {row.value} and {row.out}")
    spectrum_KC = torch.linalg.svdvals(matrices_KCC)
    bad = (spectrum_KC[:, 0] > MAX_CONDITION * spectrum_KC[:, -1]) | (spectrum_KC[:, -1] == 0)
    if bad.any():
        worst = int(bad.nonzero()[0])
        raise AbsorptionError(
            f"matrices between {row.value} and {row.out}: that of head {worst} has singular values from "
            f"{float(spectrum_KC[worst, -1]):.1e} to {float(spectrum_KC[worst, 0]):.1e}; expected a condition below "
            f"{MAX_CONDITION:.0e}. Move it towards an orthogonal matrix."
        )
    inverses_KCC = torch.linalg.inv(matrices_KCC)
    draft = Draft(block)
    weight_OI, bias_O, out_OI = draft.weight_OI(row.value), draft.parameter(row.value, "bias"), draft.weight_OI(row.out)
    for head in range(num_kv):
        rows_C = heads.value_KC[head]
        matrix, inverse = matrices_KCC[head].to(weight_OI.device), inverses_KCC[head].to(out_OI.device)
        weight_OI[rows_C] = matrix @ weight_OI[rows_C]
        if bias_O is not None:
            bias_O[rows_C] = matrix @ bias_O[rows_C]
        for columns_C in heads.out_KRC[head]:
            out_OI[:, columns_C] = out_OI[:, columns_C] @ inverse
    draft.write_()


def turn_query_key_(block: nn.Module, config: Any, factors_KP: Tensor) -> None:
    """Keys times c, queries times 1 / conj(c), for each pair of channels that RoPE turns: a rotation and a scale.

    RoPE multiplies such a pair, as a complex number, by exp(i position), which commutes; Re(conj(q) k) stays.

    Args:
        factors_KP: (key/value heads, RoPE pairs of a head) complex, none zero.
    Raises: ShapeError, NumericsError; AbsorptionError: if the model has no RoPE, or norms on its queries and keys.
    """
    row, heads = wiring_of(config), heads_of(block, config)
    where = f"factors between {row.query} and {row.key}"
    if not heads.pairs or row.head_norms:
        reason = "norms on queries and keys" if row.head_norms else "no RoPE"
        raise AbsorptionError(f"{where}: {config.model_type} has {reason}; expected RoPE alone. Leave this one out.")
    if factors_KP.shape != (len(heads.key_KC), heads.pairs):
        raise ShapeError(
            f"{where}: found shape {tuple(factors_KP.shape)}; expected {(len(heads.key_KC), heads.pairs)}."
        )
    if not factors_KP.is_complex() or (factors_KP == 0).any():
        raise AbsorptionError(f"{where}: found a zero or {factors_KP.dtype}; expected complex numbers, none zero.")
    factors_KP = finite(torch.view_as_real(factors_KP.detach().to(torch.complex128)), where)
    factors_KP = torch.view_as_complex(factors_KP)
    draft = Draft(block)
    for head, factors_P in enumerate(factors_KP):
        _turn_(draft, row.key, heads.key_KC[head], factors_P)
        for rows_C in heads.query_KRC[head]:
            _turn_(draft, row.query, rows_C, 1 / factors_P.conj())
    draft.write_()


def _turn_(draft: Draft, path: str, rows_C: Tensor, factors_P: Tensor) -> None:
    pairs = len(factors_P)
    first_P, second_P = rows_C[:pairs], rows_C[pairs : 2 * pairs]
    weight_OI, bias_O = draft.weight_OI(path), draft.parameter(path, "bias")
    for rows in (weight_OI, bias_O[:, None] if bias_O is not None else None):
        if rows is not None:
            turned = torch.complex(rows[first_P], rows[second_P]) * factors_P.to(rows.device)[:, None]
            rows[first_P], rows[second_P] = turned.real, turned.imag


def permute_values_(block: nn.Module, config: Any, order_KC: Tensor) -> None:
    """New channel c of a value head is the old channel order[c]; bit-exact in every dtype, up to the order of sums.

    Args:
        order_KC: (key/value heads, head size) int64, every row a permutation.
    Raises: ShapeError, AbsorptionError.
    """
    row, heads = wiring_of(config), heads_of(block, config)
    shape = (heads.value_KC.shape[0], heads.value_KC.shape[1])
    order_KC = checked_permutation(order_KC, shape, f"order of {row.value}'s channels").cpu()
    _permute_outputs_(block, row.value, heads.value_KC, heads.value_KC.gather(1, order_KC))
    old_KRC = heads.out_KRC.gather(2, order_KC[:, None].expand(heads.out_KRC.shape))
    _permute_inputs_(block, row.out, heads.out_KRC, old_KRC)


def permute_mlp_(block: nn.Module, config: Any, order_F: Tensor) -> None:
    """New intermediate channel f of the MLP is the old one order[f]; exact for any elementwise activation.

    Args:
        order_F: (intermediate size,) int64 permutation.
    Raises: ShapeError, AbsorptionError.
    """
    row, rows = wiring_of(config), mlp_rows(block, config)
    order_F = checked_permutation(order_F, (len(rows[0][1]),), f"order of {row.down}'s inputs").cpu()
    for path, rows_F in rows:
        _permute_outputs_(block, path, rows_F, rows_F[order_F])
    _permute_inputs_(block, row.down, torch.arange(len(order_F)), order_F)


@torch.no_grad()
def _permute_outputs_(block: nn.Module, path: str, new: Tensor, old: Tensor) -> None:
    linear = linear_at(block, path)
    for rows in (view_OI(linear), linear.bias):
        if rows is not None:
            rows[new.flatten()] = rows[old.flatten()]


@torch.no_grad()
def _permute_inputs_(block: nn.Module, path: str, new: Tensor, old: Tensor) -> None:
    weight_OI = view_OI(linear_at(block, path))
    weight_OI[:, new.flatten()] = weight_OI[:, old.flatten()]
