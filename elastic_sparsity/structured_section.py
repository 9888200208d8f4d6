"""The section of a structured level: the linears of a smaller model inside an elastic checkpoint.

Why its values are stored whole, though the shells hold weights of the same linears. The linears that read what goes are
refitted, every value another; of the other rows the shells lack what no level keeps (0.4 of all), and what they keep
the end-to-end phase moves. Measured on a tiny bfloat16 model: of the sections of fractions 0.25 and 0.5, 0.31 and 0.25
were bit-equal to the shells after 4 steps of that phase, 0.03 and 0.03 after 100 (recipes: 400), and 0.48 and 0.39 if
it left the base alone. So sharing could only pay on disk, for an untrained base; a download would grow, since to find
scattered weights a reader needs all shells, more bytes than the section. A structured level reads this section and
what all levels share.
Which units stay is one bit a unit: one byte string for one choice, with nothing to sort or to repeat.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks, linears_of, weight_OI
from elastic_sparsity.checkpoint import SAFETENSORS_NAMES, ElasticCheckpoint, OpenLevel
from elastic_sparsity.errors import CheckpointError, LevelError, ShapeError
from elastic_sparsity.ladder import StructuredLevel
from elastic_sparsity.packing import pack_bits, unpack_bits
from elastic_sparsity.structured_parts import Kept, sliced_config
from elastic_sparsity.structured_sizes import Sizes
from elastic_sparsity.tensor_file import TensorSpec, check_headers
from elastic_sparsity.wiring import num_groups, wiring_of


def section_tensors(small: Any, kept: Sequence[Kept], sizes: Sizes) -> dict[str, Tensor]:
    """Everything a section holds, by name: `NAME.weight` (O, I), `NAME.bias` where there is one, `NAME.units`.

    Args:
        small: what `sliced_model` gave, in the dtype to store.
        kept: the units that stay, a block each.
    """
    found = {}
    for name, linear in linears_of(small).items():
        found[f"{name}.weight"] = weight_OI(linear).detach().contiguous()
        if linear.bias is not None:
            assert isinstance(linear.bias, Tensor)
            found[f"{name}.bias"] = linear.bias.detach()
    paths = _branch_ends(small.config)
    prefix, totals = architecture_of(small.config.model_type).blocks, {"attention": sizes.num_groups}
    totals["mlp"] = sizes.num_channels
    for index, block in enumerate(kept):
        for branch, units_U in block.items():
            stays = torch.zeros(totals[branch], dtype=torch.bool, device="cpu")
            stays[units_U] = True
            found[f"{prefix}.{index}.{paths[branch]}.units"] = pack_bits(stays)
    return found


def structured_level(fraction: float, small: Any, sizes: Sizes, biases: bool) -> StructuredLevel:
    """What elastic_config.json says of a smaller model."""
    return StructuredLevel(
        fraction=fraction,
        key_value_heads=_one_if_equal(sizes.groups),
        channels=_one_if_equal(sizes.channels),
        biases=biases,
        weights=sum(weight_OI(linear).numel() for linear in linears_of(small).values()),
    )


def _one_if_equal(counts: tuple[int, ...]) -> int | tuple[int, ...]:
    return counts[0] if len(set(counts)) == 1 else counts


def level_config(config: Any, checkpoint: ElasticCheckpoint, level: StructuredLevel) -> Any:
    """The smaller model's config, from the whole one's.

    Raises: CheckpointError: if the level keeps more than there is, or says so of another number of blocks.
    """
    counts = _counts(config, checkpoint, level)
    for branch, total in _totals(config, checkpoint).items():
        if max(counts[branch]) > total:
            raise CheckpointError(
                f"{checkpoint.folder}: level {level.name} keeps {max(counts[branch])} of {total} units of {branch}."
            )
    row = wiring_of(config)
    width = checkpoint.linears[f"{architecture_of(config.model_type).blocks}.0.{row.out}"].shape[1]
    return sliced_config(config, groups=counts["attention"], channels=counts["mlp"], width=width, biases=level.biases)


def _counts(config: Any, checkpoint: ElasticCheckpoint, level: StructuredLevel) -> dict[str, tuple[int, ...]]:
    """What every block keeps, by branch.

    Raises: CheckpointError: of another number of blocks than there are.
    """
    depth = len(checkpoint.linears) // len(architecture_of(config.model_type).linears)
    try:
        return dict(zip(("attention", "mlp"), level.counts(depth), strict=True))
    except LevelError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None


def check_section(
    model: nn.Module, config: Any, checkpoint: ElasticCheckpoint, files: OpenLevel
) -> dict[str, tuple[int, ...]]:
    """That a section holds exactly what the smaller model needs; reads headers only.

    Args:
        model: the smaller model, on the meta device.
        config: of the whole model.
    Returns: the shapes of the parameters it holds, as the model stores them.
    Raises: CheckpointError: naming file and tensor.
    """
    level = _structured(files)
    found = files.files(level.name)
    expected = dict(_expected(model, config, checkpoint))
    opened = {id(file): file for file in found.values()}
    check_headers(list(opened.values()), expected)
    weights = sum(shape[0] * shape[1] for name, (_, shape) in expected.items() if name.endswith(".weight"))
    if weights != level.weights:
        raise CheckpointError(
            f"{checkpoint.folder}: level {level.name} has {weights} weights, elastic_config.json says {level.weights}."
        )
    shapes = {name: shape for name, (_, shape) in expected.items() if not name.endswith(".units")}
    for name, spec in checkpoint.linears.items():
        if spec.transposed:
            shapes[f"{name}.weight"] = shapes[f"{name}.weight"][::-1]
    return shapes


def _expected(model: nn.Module, config: Any, checkpoint: ElasticCheckpoint) -> Iterator[tuple[str, TensorSpec]]:
    dtype = SAFETENSORS_NAMES[checkpoint.manifest.dtype]
    for name, linear in linears_of(model).items():
        yield f"{name}.weight", (dtype, tuple(weight_OI(linear).shape))
        if linear.bias is not None:
            yield f"{name}.bias", (dtype, tuple(linear.bias.shape))  # type: ignore[arg-type]
    prefix, paths = architecture_of(config.model_type).blocks, _branch_ends(config)
    for branch, total in _totals(config, checkpoint).items():
        for index in range(len(decoder_blocks(model))):
            yield f"{prefix}.{index}.{paths[branch]}.units", ("U8", (-(-total // 8),))


def read_section(config: Any, checkpoint: ElasticCheckpoint, files: OpenLevel) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a section holds, as the model stores them, after `check_section`.

    Args:
        config: of the whole model.
    Raises: CheckpointError: if the units are not as many as promised.
    """
    level = _structured(files)
    kept_units(config, checkpoint, files)
    for name, file in files.files(level.name).items():
        linear, _, part = name.rpartition(".")
        if part != "units":
            tensor = file.read(name)
            yield name, tensor.T.contiguous() if part == "weight" and checkpoint.linears[linear].transposed else tensor


def kept_units(config: Any, checkpoint: ElasticCheckpoint, files: OpenLevel) -> dict[str, Tensor]:
    """Bitmaps of the units that stay, by the name of the linear that reads them.

    Raises: CheckpointError: if they are not as many as promised, or more than there are.
    """
    level, found = _structured(files), {}
    counts, totals = _counts(config, checkpoint, level), _totals(config, checkpoint)
    branches = {path: branch for branch, path in _branch_ends(config).items()}
    prefix = f"{architecture_of(config.model_type).blocks}."
    for name, file in files.files(level.name).items():
        linear, _, part = name.rpartition(".")
        if part != "units":
            continue
        index, _, end = linear.removeprefix(prefix).partition(".")
        branch, promised = branches[end], counts[branches[end]][int(index)]
        try:
            stays = unpack_bits(file.read(name), totals[branch])
        except ShapeError as error:
            raise CheckpointError(f"{file.path}: {name}: {error}") from None
        if int(stays.sum()) != promised:
            raise CheckpointError(
                f"{file.path}: {name}: {int(stays.sum())} of {totals[branch]} units stay, expected {promised}; "
                "the file is damaged."
            )
        found[linear] = stays
    return found


def _structured(files: OpenLevel) -> StructuredLevel:
    assert isinstance(files.level, StructuredLevel)
    return files.level


def _branch_ends(config: Any) -> dict[str, str]:
    """Path of the last linear of every branch that can lose units."""
    row = wiring_of(config)
    return {**({"attention": row.out} if row.free_heads else {}), "mlp": row.down}


def _totals(config: Any, checkpoint: ElasticCheckpoint) -> Mapping[str, int]:
    """How many units every such branch of the whole model has."""
    row, prefix = wiring_of(config), architecture_of(config.model_type).blocks
    channels = checkpoint.linears[f"{prefix}.0.{row.down}"].shape[1]
    if not row.free_heads:
        return {"mlp": channels}
    return {"attention": num_groups(config), "mlp": channels}
