"""The elastic checkpoint on disk: names, shapes, validation, atomic writes. Maps dicts of tensors to files and back.

Knows no model class and no stage. A folder holds `elastic_config.json`, `dense.safetensors` (all that is not
sparsified), `adapters.safetensors` and one `shell-*.safetensors` a shell. Shells go from sparse to dense: the core
(what the sparsest level keeps), one increment per denser level, then what only an N:M level needs. A level reads a
prefix of them. The order of values is row-major over the positions a shell adds. Letters: O outputs, I inputs.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic_sparsity.errors import CheckpointError, OutputError, ShapeError
from elastic_sparsity.ladder import Ladder, Level, keep_count
from elastic_sparsity.masks import mask_at, pack_bits, unpack_bits
from elastic_sparsity.precision import DTYPES

FORMAT = "elastic_sparsity"
FORMAT_VERSION = 1
CONFIG_NAME = "elastic_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecord:
    """What training leaves of one linear.

    Attributes:
        weight_OI: base values; only those that some level keeps are stored.
        drop_level_OI: uint8, None if the ladder has no unstructured level.
        pattern_masks: bool (O, I), one an N:M pattern.
        pairs: (A (r, I), B (O, r)) of every group, float32.
        transposed: the model stores this weight as (inputs, outputs).
    """

    weight_OI: Tensor
    drop_level_OI: Tensor | None
    pattern_masks: Sequence[Tensor]
    pairs: Sequence[tuple[Tensor, Tensor]]
    transposed: bool


@dataclass(frozen=True, slots=True)
class LoadedLinear:
    """One linear at one level: base values (others zero), mask, and the adapters' (A, B) pairs that level uses."""

    weight_OI: Tensor
    mask_OI: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    transposed: bool


def shell_names(ladder: Ladder) -> list[str]:
    """Shells in file order: sparsest level first ("core"), then denser increments, then patterns."""
    unstructured = [f"level-{level.name}" for level in reversed(ladder.levels) if level.pattern is None]
    if unstructured:
        unstructured[0] = "core"
    return [*unstructured, *(f"pattern-{p.replace(':', 'of')}" for p in ladder.patterns)]


def num_shells(ladder: Ladder, level: Level) -> int:
    """How many shells, from the core on, a level reads."""
    if level.pattern is None:
        return ladder.num_unstructured - level.index
    return level.index + 1


def encode_shells(record: LinearRecord, ladder: Ladder, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(packed mask, values) of every shell of one linear.

    An unstructured shell's bits run over the positions that no earlier shell holds; a pattern's over all positions,
    and its values are those no earlier shell holds.
    """
    covered = torch.zeros(record.weight_OI.shape, dtype=torch.bool)
    weight = record.weight_OI.detach().cpu().to(dtype)
    shells = []
    for level in reversed(range(ladder.num_unstructured)):
        assert record.drop_level_OI is not None
        mask = mask_at(record.drop_level_OI.cpu(), level)
        shells.append((pack_bits(mask[~covered]), weight[mask & ~covered]))
        covered |= mask
    for mask in record.pattern_masks:
        shells.append((pack_bits(mask.cpu()), weight[mask.cpu() & ~covered]))
        covered |= mask.cpu()
    return shells


def decode_shells(
    shells: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], ladder: Ladder, level: Level, where: str
) -> tuple[Tensor, Tensor]:
    """Base values (zero where no shell read so far holds one) and mask of a level, from its prefix of shells.

    Raises: CheckpointError: if bits and values disagree, or a row's count is not the ladder's.
    """
    weight = torch.zeros(shape, dtype=shells[0][1].dtype)
    covered = torch.zeros(shape, dtype=torch.bool)
    mask = covered
    for number, (bits, values) in enumerate(shells):
        is_pattern = number >= ladder.num_unstructured
        open_positions = torch.ones(shape, dtype=torch.bool) if is_pattern else ~covered
        try:
            added = unpack_bits(bits, int(open_positions.sum()))
        except ShapeError as error:
            raise CheckpointError(f"{where}: shell {number}: {error}") from None
        mask = torch.zeros(shape, dtype=torch.bool).masked_scatter_(open_positions, added)
        new = mask & ~covered
        if values.ndim != 1 or int(new.sum()) != values.numel() or values.dtype != weight.dtype:
            raise CheckpointError(
                f"{where}: shell {number} holds {tuple(values.shape)} {values.dtype} values for {int(new.sum())} "
                f"positions; the file is damaged."
            )
        weight.masked_scatter_(new, values)
        covered |= mask
    mask = mask if level.pattern is not None else covered
    _check_counts(mask, level, where)
    return weight, mask


def _check_counts(mask_OI: Tensor, level: Level, where: str) -> None:
    if level.pattern is None:
        expected = keep_count(mask_OI.shape[1], level.sparsity)
        wrong = int((mask_OI.sum(dim=1) != expected).sum())
    else:
        kept, size = level.pattern
        wrong = int((mask_OI.reshape(-1, size).sum(dim=1) > kept).sum())
    if wrong:
        raise CheckpointError(f"{where}: level {level.name}: {wrong} rows or groups keep another number than promised.")


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_folder(folder: Path) -> None:
    """Raises: OutputError: unless `folder` can be made, or is an empty folder that can be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: already holds something; choose another output folder or move it away.")
    if folder.is_mount():
        raise OutputError(f"{folder}: is a mount point, which cannot be replaced; name a new folder inside it.")
    scratch = _scratch_beside(folder)
    try:
        scratch.mkdir(parents=True)
        scratch.rmdir()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error}.") from error


def _scratch_beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Raises: OutputError: if `folder` is taken, cannot be made, or the disk is full.
    """
    check_output_folder(folder)
    scratch = _scratch_beside(folder)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if folder.exists():
            folder.rmdir()
        scratch.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder}: cannot be written: {error}; nothing was left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """UTF-8 JSON under a temporary name, then renamed."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error}; what was there is unchanged.") from error


def write_checkpoint(
    folder: Path,
    linears: Mapping[str, LinearRecord],
    dense: Mapping[str, Tensor],
    *,
    ladder: Ladder,
    ranks: Sequence[int],
    inheritance: str,
    dtype: str,
    record: Mapping[str, Any],
    save_extras: Callable[[Path], None],
) -> None:
    """Writes a whole checkpoint, or nothing.

    Args:
        linears: by fully qualified name.
        dense: everything that is not sparsified, stored once, in `dtype` if floating.
        record: more for elastic_config.json (base model, recipe, versions, data hashes, losses).
        save_extras: writes the model's own config and tokenizer into the folder it gets.
    Raises: OutputError.
    """
    checkpoint_id = uuid.uuid4().hex
    metadata = {"format": "pt", "elastic_checkpoint": checkpoint_id}
    names = shell_names(ladder)
    with atomic_folder(folder) as scratch:
        files: dict[str, dict[str, Any]] = {}

        def save(name: str, tensors: Mapping[str, Tensor]) -> None:
            path = scratch / f"{name}.safetensors"
            save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata=metadata)
            files[name] = {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}

        shells: list[dict[str, Tensor]] = [{} for _ in names]
        adapters: dict[str, Tensor] = {}
        for name, linear in linears.items():
            for shell, (bits, values) in zip(shells, encode_shells(linear, ladder, DTYPES[dtype]), strict=True):
                shell[f"{name}.mask"], shell[f"{name}.values"] = bits, values
            for group, (lora_A, lora_B) in enumerate(linear.pairs):
                if lora_A.shape[0]:
                    adapters[f"{name}.lora_A.{group}"] = lora_A.detach().cpu().float()
                    adapters[f"{name}.lora_B.{group}"] = lora_B.detach().cpu().float()
        for name, tensors in zip(names, shells, strict=True):
            save(f"shell-{name}", tensors)
        save("adapters", adapters)
        save("dense", {k: t.detach().cpu().to(DTYPES[dtype]) if t.is_floating_point() else t for k, t in dense.items()})
        save_extras(scratch)
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "checkpoint_id": checkpoint_id,
            "ladder": {
                "sparsities": ladder.sparsities,
                "patterns": ladder.patterns,
                "group_ends": ladder.group_ends,
                "pattern_parent": ladder.pattern_parent,
            },
            "ranks": list(ranks),
            "inheritance": inheritance,
            "dtype": dtype,
            "linears": {
                name: {"shape": list(linear.weight_OI.shape), "transposed": linear.transposed}
                for name, linear in linears.items()
            },
            "files": files,
            **record,
        }
        write_json(scratch / CONFIG_NAME, config)


class ElasticCheckpoint:
    """A checkpoint opened for reading; checks its config and that every file has the recorded size.

    Raises: CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self._read_config()
        try:
            fields = self.config["ladder"]
            ends = fields["group_ends"]
            self.ladder = Ladder(
                sparsities=tuple(fields["sparsities"]),
                patterns=tuple(fields["patterns"]),
                group_ends=None if ends is None else tuple(ends),
                pattern_parent=fields["pattern_parent"],
            )
            self.ranks = [int(rank) for rank in self.config["ranks"]]
            self.inheritance = str(self.config["inheritance"])
            self.dtype = DTYPES[self.config["dtype"]]
            self.linears = {
                str(name): ((int(x["shape"][0]), int(x["shape"][1])), bool(x["transposed"]))
                for name, x in self.config["linears"].items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / CONFIG_NAME}: missing or malformed field ({type(error).__name__}: {error})."
            ) from None
        if len(self.ranks) != self.ladder.num_groups or not isinstance(self.config.get("files"), dict):
            raise CheckpointError(
                f"{self.folder / CONFIG_NAME}: {len(self.ranks)} ranks for {self.ladder.num_groups} groups, "
                "or no list of files."
            )
        self._check_files()

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_NAME
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder}: no elastic checkpoint here ({CONFIG_NAME} is missing).") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from None
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not the config of an elastic checkpoint.")
        if config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {config.get('format_version')!r}; this release reads {FORMAT_VERSION}. "
                "Upgrade elastic-sparsity or make the checkpoint again."
            )
        return config

    def _check_files(self) -> None:
        problems = []
        for name in [*(f"shell-{n}" for n in shell_names(self.ladder)), "adapters", "dense"]:
            entry = self.config.get("files", {}).get(name)
            if not isinstance(entry, dict) or entry.get("file") != f"{name}.safetensors":
                problems.append(f"{CONFIG_NAME} does not list {name}.safetensors")
                continue
            path = self.folder / f"{name}.safetensors"
            size = path.stat().st_size if path.is_file() else None
            if size != entry.get("bytes"):
                found = "is missing" if size is None else f"has {size} bytes"
                problems.append(f"{path.name} {found}, expected {entry.get('bytes')}")
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}. Copy or make the checkpoint again.")

    def bytes_of(self, level: Level) -> int:
        """Bytes that loading a level needs: its shells, its groups' adapters, and what is not sparsified."""
        count = num_shells(self.ladder, level)
        shells = sum(self._entry(f"shell-{n}")["bytes"] for n in shell_names(self.ladder)[:count])
        ranks = sum(self.ranks[group] for group in self.ladder.active_groups(level, self.inheritance))
        adapters = sum(4 * ranks * (shape[0] + shape[1]) for shape, _ in self.linears.values())
        return int(shells + adapters + self._entry("dense")["bytes"])

    def total_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(int(entry["bytes"]) for entry in self.config["files"].values())

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = self.config["files"][name]
        return entry

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.folder / f"{name}.safetensors"
        try:
            if file_sha256(path) != self._entry(name).get("sha256"):
                raise CheckpointError(f"{path}: sha256 differs from the recorded one; the file is damaged.")
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("elastic_checkpoint") != self.config.get("checkpoint_id"):
                    raise CheckpointError(f"{path}: belongs to another elastic checkpoint.")
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error

    def dense_tensors(self) -> dict[str, Tensor]:
        """Everything that is not sparsified, by parameter name."""
        with self._open("dense") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict

    def level_linears(self, level: Level) -> Iterator[tuple[str, LoadedLinear]]:
        """Every linear at one level, opening only the shells that level needs.

        Raises: CheckpointError: naming file and linear.
        """
        names = [f"shell-{n}" for n in shell_names(self.ladder)[: num_shells(self.ladder, level)]]
        with _all_of([self._open(name) for name in names]) as shells, self._open("adapters") as adapters:
            for name, (shape, transposed) in self.linears.items():
                parts = [(shell.get_tensor(f"{name}.mask"), shell.get_tensor(f"{name}.values")) for shell in shells]
                weight, mask = decode_shells(parts, shape, self.ladder, level, f"{self.folder}: {name}")
                pairs = [
                    (adapters.get_tensor(f"{name}.lora_A.{group}"), adapters.get_tensor(f"{name}.lora_B.{group}"))
                    for group in self.ladder.active_groups(level, self.inheritance)
                    if self.ranks[group]
                ]
                for lora_A, lora_B in pairs:
                    if lora_B.shape != (shape[0], lora_A.shape[0]) or lora_A.shape[1] != shape[1]:
                        raise CheckpointError(f"{self.folder}: {name}: adapter shapes do not fit {shape}.")
                yield name, LoadedLinear(weight, mask, pairs, transposed)

    def update_record(self, changes: Mapping[str, Any]) -> None:
        """Adds fields (e.g. measured quality) to elastic_config.json, atomically."""
        self.config = {**self.config, **changes}
        write_json(self.folder / CONFIG_NAME, self.config)


@contextmanager
def _all_of(managers: Sequence[Any]) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(manager) for manager in managers]
