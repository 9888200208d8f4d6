"""A permutation or a rotation of the whole residual stream, absorbed by everything that writes to it or reads it.

Source: QuaRot (arXiv 2404.00456): norm gains into the next linears, then one orthogonal matrix for the whole model.
What we changed: any orthogonal matrix, an untied head only if its norm's gain demands it, and permutations, which
every norm allows. A model with a parameter that the tables do not place is refused, not half changed.
Letters: D model width. The new stream is h R; for a permutation h[order].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import decoder_blocks, is_transposed
from elastic_sparsity.errors import AbsorptionError, UnsupportedModelError
from elastic_sparsity.folding import checked_permutation, real_values
from elastic_sparsity.wiring import Wiring, linear_at, wiring_of

ORTHOGONAL = 1e-10  # largest entry of R^T R - 1 in float64; float32's 1e-7 would be an error of every layer
NUMBERS_AT_ONCE = 1 << 24  # of a parameter in float64: a head of 128k tokens would take gigabytes


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter of which one dimension is the residual stream; `reads` = gain of the norm in between, as stored."""

    parameter: Tensor
    dim: int
    norm: bool = False
    reads: Tensor | None = None


def check_residual(model: Any) -> None:
    """That `permute_residual_` can take a model.

    Raises: AbsorptionError, UnsupportedModelError: as it does.
    """
    _places(model)


@torch.no_grad()
def permute_residual_(model: Any, order_D: Tensor) -> None:
    """New channel d of the residual stream is the old one order[d]. Exact for every norm; tied embeddings stay tied.

    Args:
        model: a causal LM of a supported family.
        order_D: (D,) int64 permutation.
    Raises: ShapeError; AbsorptionError: if this is no permutation, or embeddings are of another width (OPT-350M);
        UnsupportedModelError: if the model has parameters that its row does not place.
    """
    places = _places(model)
    order_D = checked_permutation(order_D, (model.config.hidden_size,), "order of the residual channels")
    for place in places:
        parameter = place.parameter
        parameter.copy_(parameter.index_select(place.dim, order_D.to(parameter.device)))


@torch.no_grad()
def rotate_residual_(model: Any, rotation_DD: Tensor) -> int:
    """The residual stream times an orthogonal matrix. RMS norms alone commute with it, once linears took their gains.

    A gain that is the same for all channels commutes too: with such a final norm a tied head stays tied; otherwise it
    is untied to take the gain, and `config.tie_word_embeddings` set to False. Every weight is rounded once.

    Args:
        model: a causal LM of a supported family with RMS norms.
        rotation_DD: (D, D) floats, orthogonal to 1e-10: from `torch.linalg.qr` in float64.
    Returns: how many parameters untying the head added; 0 if it was not tied, or could stay.
    Raises: ShapeError, NumericsError; AbsorptionError: if this is not orthogonal, or the model has LayerNorms, or norms
        after its branches with different gains (Gemma-2, Gemma-3), or embeddings of another width, or float16 weights;
        UnsupportedModelError: if the model has parameters that its row does not place.
    """
    row = wiring_of(model.config)
    if any(place.parameter.dtype == torch.float16 for place in _places(model)):
        raise AbsorptionError(
            "rotation of the residual stream: found float16 weights, which it may carry out of range, one after the "
            "other; expected another dtype. Load the model in float32 or bfloat16."
        )
    _check_norms(model, row)
    width = model.config.hidden_size
    rotation_DD = real_values(rotation_DD, (width, width), "rotation of the residual stream")
    identity = torch.eye(width, dtype=torch.float64, device=rotation_DD.device)
    error = float((rotation_DD.T @ rotation_DD - identity).abs().max())
    if error > ORTHOGONAL:
        raise AbsorptionError(
            f"rotation of the residual stream: R^T R differs from 1 by up to {error:.1e}; expected at most "
            f"{ORTHOGONAL:.0e}. Take Q of torch.linalg.qr of a float64 matrix."
        )
    added = _untie_head_(model, row)
    places = _places(model)
    for place in places:
        if not place.norm:
            _rotate_(place, rotation_DD, row.gain_offset)
    for place in places:
        if place.reads is not None:
            place.reads.fill_(1.0 - row.gain_offset)
    return added


def _rotate_(place: _Place, rotation_DD: Tensor, gain_offset: float) -> None:
    matrix_XD = torch.atleast_2d(place.parameter.movedim(place.dim, -1))
    matrix_DD = rotation_DD.to(matrix_XD.device)
    if place.reads is not None:
        gain_D = place.reads.double() + gain_offset
        matrix_DD = gain_D.to(matrix_XD.device)[:, None] * matrix_DD
    for part in matrix_XD.split(max(1, NUMBERS_AT_ONCE // len(matrix_DD))):
        part.copy_(part.double() @ matrix_DD)


def _gain(norm: Any, row: Wiring) -> Tensor:
    gain: Tensor = norm.weight.detach().double() + row.gain_offset
    return gain


def _check_norms(model: Any, row: Wiring) -> None:
    """That rotations commute with every norm once the gains before linears are folded."""
    for index, block in enumerate(decoder_blocks(model)):
        for path in (row.attention_norm, row.mlp_norm, *row.post_norms):
            norm = block.get_submodule(path) if path else None
            where = f"block {index}, {path}"
            if isinstance(norm, nn.LayerNorm):
                raise AbsorptionError(
                    f"{where}: found a LayerNorm, whose mean is not that of rotated channels; expected RMS norms. "
                    "Permute the residual stream instead, or rotate inside heads."
                )
            if norm is not None and path in row.post_norms and len(_gain(norm, row).unique()) > 1:
                raise AbsorptionError(
                    f"{where}: found different gains on a branch's output, which the residual sum reads and no linear "
                    "can take; expected one gain for all channels. Permute the residual stream instead."
                )


def _untie_head_(model: Any, row: Wiring) -> int:
    """Gives a tied head weights of its own if it must take a gain. Returns: parameters added."""
    head, embedding = model.get_output_embeddings(), model.get_submodule(row.embeddings[0])
    gain_D = _gain(model.get_submodule(row.final_norm), row)
    if head.weight is not embedding.weight or len(gain_D.unique()) == 1:
        return 0
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    return int(head.weight.numel())


def _places(model: Any) -> list[_Place]:
    """Every parameter that lies along the residual stream, each once.

    Raises: AbsorptionError, UnsupportedModelError.
    """
    row, head = wiring_of(model.config), model.get_output_embeddings()
    places = [_Place(_embedding(model, path), 1) for path in row.embeddings]
    inner = [getattr(head, "bias", None)]  # parameters along something else
    for block in decoder_blocks(model):
        placed, others = _block_places(block, row)
        places += placed
        inner += others
    final = list(_norm_places(model, row.final_norm))
    places += [*final, _Place(head.weight, 1, reads=final[0].parameter if final else None)]
    # Of tied weights the embedding's place counts, which reads no norm.
    unique = list({id(place.parameter): place for place in reversed(places)}.values())
    known = {id(place.parameter) for place in unique} | {id(parameter) for parameter in inner}
    extra = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if extra:
        raise UnsupportedModelError(
            f"{', '.join(extra[:5])}: found {len(extra)} parameters that the row of {model.config.model_type} does not "
            "place; expected a plain model of this family, without adapters."
        )
    return unique


def _embedding(model: Any, path: str) -> Tensor:
    weight: Tensor = model.get_submodule(path).weight
    width = model.config.hidden_size
    if weight.shape[1] != width:
        raise AbsorptionError(
            f"{path}: found embeddings of width {weight.shape[1]}; expected the model's {width}. A projection lies in "
            "between (OPT-350M), which is not handled; change the blocks alone."
        )
    if weight.is_meta:
        raise UnsupportedModelError(f"{path}: found no values (meta device); load the model first.")
    return weight


def _block_places(block: nn.Module, row: Wiring) -> tuple[list[_Place], list[Tensor | None]]:
    """The block's parameters along the residual stream, and the others."""
    norms = (row.attention_norm, row.mlp_norm, *row.post_norms)
    places = [place for path in norms for place in _norm_places(block, path)]
    others: list[Tensor | None] = [
        parameter for path in row.head_norms for parameter in block.get_submodule(path).parameters()
    ]
    readers = [(path, row.attention_norm) for path in row.attention_inputs]
    readers += [(path, row.mlp_norm) for path in row.mlp_inputs]
    for path, norm in readers:
        linear = linear_at(block, path)
        gain = block.get_submodule(norm).weight if norm else None
        places.append(_Place(linear.weight, 0 if is_transposed(linear) else 1, reads=cast(Tensor | None, gain)))
        others.append(linear.bias)
    for path in (row.out, row.down):
        linear = linear_at(block, path)
        places.append(_Place(linear.weight, 1 if is_transposed(linear) else 0))
        if linear.bias is not None:
            places.append(_Place(linear.bias, 0))
    return places, others


def _norm_places(root: nn.Module, path: str) -> Iterator[_Place]:
    norm = dict(root.named_modules()).get(path) if path else None  # OPT may leave the final norm out
    for parameter in norm.parameters() if norm is not None else ():
        yield _Place(parameter, 0, norm=True)
