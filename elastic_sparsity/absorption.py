"""Channel scales and shifts that a block's own weights absorb: the function stays, the weights differ.

Source: arXiv 2602.21652, eq. 3, Y = [S^-1 (X - shift)] [W S] + [b + W shift], and Q S_a, K S_a^-1 beside it (both as in
OmniQuant, arXiv 2308.13137). What we changed: a pair exists only where it is exact. Scales of q and k are tied within
each pair of channels that RoPE turns (which the paper leaves out), heads of grouped-query attention share theirs,
Gemma's gains are 1 + weight, and a GELU passes no scale. `wiring` says what is where.

With exact absorption Wanda's masks do not change (|W s| times ||X|| / s): scales alone help magnitude, not Wanda.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import AbsorptionError
from elastic_sparsity.folding import Draft, real_values
from elastic_sparsity.wiring import Wiring, heads_of, linear_at, mlp_rows, wiring_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """The channels of one module that a pair scales.

    Attributes:
    path: of a linear or a norm, inside the block.
    inputs: True = columns of the weight; False = rows and bias, or a norm's gain and bias.
    channels_N: int64, each channel once; all of the module's, or those of a head or a half if it is fused.
    values_N: int64, which of the pair's free values each of them takes.
    gain_offset: what a norm adds to its stored gain.
    """

    path: str
    inputs: bool
    channels_N: Tensor
    values_N: Tensor
    gain_offset: float = 0.0

    def spread(self, values: Tensor, width: int, fill: float) -> Tensor:
        """(width,): every channel's value, `fill` where the pair has none. Differentiable in `values`."""
        channels, taken = self.channels_N.to(values.device), self.values_N.to(values.device)
        return values.new_full((width,), fill).index_put((channels,), values[taken])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A vector of free values that a block absorbs.

    Attributes:
    name: unique in a block, one of `PAIR_NAMES`.
    kind: "norm", "value", "mlp" or "query_key".
    num_values: free values, after ties.
    multiplied: sides times s: the consumers' inputs; of "query_key" the keys' outputs.
    divided: the producer's side, divided by s; of "query_key" the queries' outputs.
    positive: whether every scale must be above zero; otherwise any but zero.
    """

    name: str
    kind: str
    num_values: int
    multiplied: tuple[Side, ...]
    divided: tuple[Side, ...]
    positive: bool = False

    @property
    def consumers(self) -> tuple[str, ...]:
        """The linears whose input columns the pair multiplies; none for "query_key"."""
        return tuple(side.path for side in self.multiplied if side.inputs)


# A builder returns the pair, or why this block has none.
_Builder = Callable[[nn.Module, Wiring, Any], Pair | str]


def _norm_pair(block: nn.Module, name: str, path: str, readers: tuple[str, ...], offset: float) -> Pair | str:
    if not path:
        return "its norms are on the residual stream (post-LN), which the next sum reads too"
    weight = getattr(block.get_submodule(path), "weight", None)
    if weight is None:
        return f"{path} has no gain that could absorb a scale"
    channels = torch.arange(weight.shape[0])
    return Pair(
        name=name,
        kind="norm",
        num_values=len(channels),
        multiplied=tuple(
            Side(path=reader, inputs=True, channels_N=channels, values_N=channels)
            for reader in readers
            if linear_at(block, reader)
        ),
        divided=(Side(path=path, inputs=False, channels_N=channels, values_N=channels, gain_offset=offset),),
    )


def _value_out(block: nn.Module, row: Wiring, config: Any) -> Pair | str:
    heads = heads_of(block, config)
    values_KC = torch.arange(heads.value_KC.numel()).view(heads.value_KC.shape)
    # repeat_kv copies head k to R neighbouring query heads: (K, 1, C) expanded, not a repeat of the whole vector.
    values_KRC = values_KC[:, None].expand(heads.out_KRC.shape)
    return Pair(
        name="v_o",
        kind="value",
        num_values=values_KC.numel(),
        multiplied=(
            Side(path=row.out, inputs=True, channels_N=heads.out_KRC.flatten(), values_N=values_KRC.flatten()),
        ),
        divided=(
            Side(path=row.value, inputs=False, channels_N=heads.value_KC.flatten(), values_N=values_KC.flatten()),
        ),
    )


def _query_key(block: nn.Module, row: Wiring, config: Any) -> Pair | str:
    if row.head_norms:
        return f"{' and '.join(row.head_norms)} take the scale of queries and keys out again"
    heads = heads_of(block, config)
    num_kv, size = heads.key_KC.shape
    # Both channels that RoPE turns into one another take one value; channels it leaves alone have their own.
    value_C = torch.arange(size)
    value_C[heads.pairs :] -= heads.pairs
    values_KC = value_C + (size - heads.pairs) * torch.arange(num_kv)[:, None]
    values_KRC = values_KC[:, None].expand(heads.query_KRC.shape)
    return Pair(
        name="q_k",
        kind="query_key",
        num_values=num_kv * (size - heads.pairs),
        multiplied=(Side(path=row.key, inputs=False, channels_N=heads.key_KC.flatten(), values_N=values_KC.flatten()),),
        divided=(
            Side(path=row.query, inputs=False, channels_N=heads.query_KRC.flatten(), values_N=values_KRC.flatten()),
        ),
    )


def _up_down(block: nn.Module, row: Wiring, config: Any) -> Pair | str:
    if not row.gate:
        return "its MLP has no gate; an activation lies between both linears"
    return _mlp_pair(block, "up_down", row, config, positive=False)


def _fc1_fc2(block: nn.Module, row: Wiring, config: Any) -> Pair | str:
    if row.gate:
        return "its MLP is a GLU; the pair to use is up_down"
    activation = getattr(config, row.activation, None)
    if activation != "relu":
        return f"its activation is {activation}; only a ReLU passes a positive scale"
    return _mlp_pair(block, "fc1_fc2", row, config, positive=True)


def _mlp_pair(block: nn.Module, name: str, row: Wiring, config: Any, *, positive: bool) -> Pair:
    path, rows = mlp_rows(block, config)[-1]
    values = torch.arange(len(rows))
    return Pair(
        name=name,
        kind="mlp",
        num_values=len(rows),
        multiplied=(Side(path=row.down, inputs=True, channels_N=values, values_N=values),),
        divided=(Side(path=path, inputs=False, channels_N=rows, values_N=values),),
        positive=positive,
    )


_BUILDERS: dict[str, _Builder] = {
    "norm_qkv": lambda block, row, _: _norm_pair(
        block, "norm_qkv", row.attention_norm, row.attention_inputs, row.gain_offset
    ),
    "q_k": _query_key,
    "v_o": _value_out,
    "norm_mlp": lambda block, row, _: _norm_pair(block, "norm_mlp", row.mlp_norm, row.mlp_inputs, row.gain_offset),
    "up_down": _up_down,
    "fc1_fc2": _fc1_fc2,
}
PAIR_NAMES = tuple(_BUILDERS)


def scale_pairs(block: nn.Module, config: Any) -> tuple[Pair, ...]:
    """Every pair of the block whose scales are exact, in the order in which data flows.

    Args:
        block: one of `arch.decoder_blocks`; read, not modified.
        config: the model's.
    Raises: UnsupportedModelError: if the block is not what its architecture's row says.
    """
    row = wiring_of(config)
    built = [build(block, row, config) for build in _BUILDERS.values()]
    return tuple(pair for pair in built if isinstance(pair, Pair))


def shift_pairs(block: nn.Module, config: Any) -> tuple[Pair, ...]:
    """The pairs of the block that can absorb a shift: those with a bias on the producer and on every consumer.

    Raises: UnsupportedModelError.
    """
    return tuple(pair for pair in scale_pairs(block, config) if not _no_shift(block, pair))


def pair_named(block: nn.Module, config: Any, name: str) -> Pair:
    """One of `scale_pairs`.

    Raises: AbsorptionError: if there is no pair of that name, or it is not exact for this architecture, saying why.
    """
    if name not in _BUILDERS:
        raise AbsorptionError(f"pair {name!r}: no such name; expected one of {', '.join(PAIR_NAMES)}.")
    built = _BUILDERS[name](block, wiring_of(config), config)
    if isinstance(built, str):
        exact = ", ".join(pair.name for pair in scale_pairs(block, config))
        raise AbsorptionError(f"pair {name}: not exact for {config.model_type}: {built}. Exact here: {exact}.")
    return built


def scale_pair_(block: nn.Module, pair: Pair, scales: Tensor) -> None:
    """Folds scales into the block, in float64, rounded once to each parameter's dtype (arXiv 2602.21652, eq. 3).

    Args:
        pair: of this block, or of one of the same shapes.
        scales: (pair.num_values,) floats, none zero; above zero if `pair.positive`.
    Raises: ShapeError, NumericsError, AbsorptionError: on scales that are not so, or results that overflow the dtype;
        UnsupportedModelError: if a linear is none any more, or carries adapters. The block is then as before.
    """
    scales = real_values(scales, (pair.num_values,), f"scales of {pair.name}")
    bad = scales[scales <= 0 if pair.positive else scales == 0]
    if len(bad):
        raise AbsorptionError(
            f"scales of {pair.name}: {len(bad)} of {pair.num_values} are not allowed, first {float(bad[0])}; expected "
            f"{'scales above zero, which a ReLU passes' if pair.positive else 'no zero'}. Clamp them first."
        )
    draft = _draft(block, pair)
    for side in pair.multiplied:
        _multiply_(draft, side, scales)
    for side in pair.divided:
        _multiply_(draft, side, 1 / scales)
    draft.write_()


def _draft(block: nn.Module, pair: Pair) -> Draft:
    """Adapters may have been attached since the pair was built."""
    for side in (*pair.multiplied, *pair.divided):
        if side.inputs or pair.kind != "norm":
            linear_at(block, side.path)
    return Draft(block)


def _multiply_(draft: Draft, side: Side, factors: Tensor) -> None:
    weight, bias = draft.parameter(side.path, "weight"), draft.parameter(side.path, "bias")
    assert weight is not None, side.path
    if weight.ndim == 1:
        factors_O = side.spread(factors.to(weight.device), len(weight), 1.0)
        weight.add_(side.gain_offset).mul_(factors_O).sub_(side.gain_offset)
    else:
        weight_OI = draft.weight_OI(side.path)
        factors_O = side.spread(factors.to(weight.device), weight_OI.shape[1 if side.inputs else 0], 1.0)
        weight_OI.mul_(factors_O if side.inputs else factors_O[:, None])
    if bias is not None and not side.inputs:
        bias.mul_(factors_O)


def round_gains_(block: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """Rounds the gains of a block's norms to a narrower dtype; the linears that read them take up what that changes.

    Rounded without it, a small gain of Gemma, stored as gain - 1, would lose most of its digits, or all.

    Args:
        block: in float32 or float64. Its other parameters are not rounded.
    """
    for pair in scale_pairs(block, config):
        if pair.kind != "norm":
            continue
        (side,) = pair.divided
        stored = block.get_parameter(f"{side.path}.weight").detach().double()
        narrow = stored.to(dtype)
        gains, rounded = stored + side.gain_offset, narrow.double() + side.gain_offset
        lost = (rounded == 0) & (gains != 0)  # the next number on the gain's side is not zero
        beside = torch.nextafter(narrow, narrow + gains.sign().to(dtype)).double() + side.gain_offset
        rounded = torch.where(lost, beside, rounded)
        kept = (gains != 0) & rounded.isfinite()
        scale_pair_(block, pair, torch.where(kept, gains / rounded, 1.0))


def shift_pair_(block: nn.Module, pair: Pair, shifts: Tensor) -> None:
    """Folds a shift of the consumers' input into the biases: producer's - shift, consumers' + W shift (eq. 3).

    After values it is exact because attention weights sum to one.

    Args:
        pair: one of `shift_pairs` of this block.
        shifts: (pair.num_values,) floats.
    Raises: as `scale_pair_`; AbsorptionError: if a bias is missing, or an activation lies in between.
    """
    reason = _no_shift(block, pair)
    if reason:
        raise AbsorptionError(f"shift of {pair.name}: {reason}; use the pairs that shift_pairs() lists.")
    shifts = real_values(shifts, (pair.num_values,), f"shifts of {pair.name}")
    draft = _draft(block, pair)
    for side in pair.divided:
        bias = draft.parameter(side.path, "bias")
        assert bias is not None
        bias -= side.spread(shifts.to(bias.device), len(bias), 0.0)
    for side in pair.multiplied:
        bias, weight_OI = draft.parameter(side.path, "bias"), draft.weight_OI(side.path)
        assert bias is not None
        bias += weight_OI @ side.spread(shifts.to(bias.device), weight_OI.shape[1], 0.0)
    draft.write_()


def _no_shift(block: nn.Module, pair: Pair) -> str:
    """Why the pair absorbs no shift; "" if it does."""
    if pair.kind not in ("norm", "value"):
        return f"found a pair of kind {pair.kind}, whose product or activation passes no shift"
    paths = [side.path for side in (*pair.divided, *pair.multiplied)]
    missing = [path for path in paths if getattr(block.get_submodule(path), "bias", None) is None]
    return f"{', '.join(missing)}: found no bias; expected one on both sides" if missing else ""
