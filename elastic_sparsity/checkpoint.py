"""The elastic checkpoint on disk: a folder of safetensors sections, one a shell and one an adapter group.

Maps dicts of tensors to files and back; knows no model class and no stage. The README holds the specification. A level
reads a prefix of the shells, the adapters of its groups, and what all levels share; nothing else is opened. A folder
may hold only some levels' files (a device's smaller download).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from elastic_sparsity.checkpoint_writer import config_lock
from elastic_sparsity.errors import CheckpointError, LevelError
from elastic_sparsity.files import file_sha256, write_json
from elastic_sparsity.ladder import AnyLevel, Level, StructuredLevel
from elastic_sparsity.manifest import (
    CONFIG_NAME,
    FileEntry,
    Manifest,
    by_density,
    read_manifest,
)
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.shells import (
    LoadedLinear,
    decode_shells,
    num_shells,
    shell_names,
)
from elastic_sparsity.tensor_file import Room, TensorFile, TensorSpec, check_headers

log = logging.getLogger(__name__)

L = TypeVar("L", bound=AnyLevel)
_NONE_HERE = "no level is complete here; copy or download one again."
SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def base_dtype(config: Mapping[str, Any]) -> str:
    """The dtype in which a run loaded its base model, as its recipe said it, from an elastic_config.json."""
    recipe = config.get("recipe")
    section = recipe.get("model") if isinstance(recipe, dict) else None
    dtype = section.get("dtype") if isinstance(section, dict) else None
    return dtype if isinstance(dtype, str) else "auto"


class ElasticCheckpoint:
    """A checkpoint opened for reading. Files are checked when a level first needs them, and not again.

    Raises: CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, folder: str | Path) -> None:
        where = Path(folder).absolute()  # a live model opens more files later, perhaps from elsewhere
        self.__setstate__((where, *read_manifest(where)))

    def __getstate__(self) -> tuple[Path, Manifest, dict[str, Any]]:
        """A pickled model keeps what it knows of its checkpoint: another one there later must not pass for it."""
        return self.folder, self.manifest, self.config

    def __setstate__(self, state: tuple[Path, Manifest, dict[str, Any]]) -> None:
        self.folder, self.manifest, self.config = state
        self.ladder = self.manifest.build_ladder()
        self.structured = self.manifest.structured_levels()
        self.ranks = self.manifest.ranks
        self.inheritance = self.manifest.inheritance
        self.dtype = DTYPES[self.manifest.dtype]
        self.linears = self.manifest.build_specs()
        self._sections: dict[str, dict[str, TensorFile]] = {}

    def __deepcopy__(self, memo: Any) -> "ElasticCheckpoint":
        return self  # models carry it, and open files cannot be copied

    def files_of(self, level: AnyLevel) -> list[FileEntry]:
        """Every tensor file a level reads."""
        return self.manifest.files_of(level)

    def bytes_of(self, level: AnyLevel) -> int:
        """Bytes of the tensor files a level reads."""
        return sum(entry.bytes for entry in self.files_of(level))

    def download_bytes(self, level: AnyLevel) -> int:
        """Bytes of every file of a level's download: tensors, config and tokenizer, and elastic_config.json itself."""
        extras = sum(entry.bytes for entry in self.manifest.extras)
        return self.bytes_of(level) + extras + (self.folder / CONFIG_NAME).stat().st_size

    def total_bytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(entry.bytes for entries in self.manifest.files.values() for entry in entries)

    @property
    def changed_base(self) -> bool:
        """Whether its run gave the base model other weights, of the same function, before it pruned (induction)."""
        training = self.config.get("training")
        induced = training.get("induction") if isinstance(training, dict) else None
        return isinstance(induced, dict) and "changes" in induced

    def is_complete(self, level: AnyLevel) -> bool:
        """Whether this folder holds all files of a level; says nothing of what is in them."""
        return all((self.folder / entry.file).is_file() for entry in self.files_of(level))

    def complete_among(self, levels: Sequence[L]) -> list[L]:
        """Those of some levels whose files are all here, in their order; a warning names the others.

        Raises: CheckpointError: if there is none.
        """
        here = [level for level in levels if self.is_complete(level)]
        if not here:
            raise CheckpointError(f"{self.folder}: {_NONE_HERE}")
        if len(here) < len(levels):
            left_out = ", ".join(level.name for level in levels if level not in here)
            log.warning("%s: not all files of %s are here; only the other levels are used", self.folder, left_out)
        return here

    def find(self, wanted: str | float | AnyLevel) -> AnyLevel:
        """A level by name; "auto" is the densest one whose files are all here (N:M, then structured ones last).

        Raises: LevelError: listing the levels; CheckpointError: if no level is complete.
        """
        if wanted != "auto":
            return self.manifest.find(wanted)
        for level in by_density(self.ladder, self.structured):
            if self.is_complete(level):
                return level
        raise CheckpointError(f"{self.folder}: {_NONE_HERE}")

    def find_masked(self, wanted: str | float | AnyLevel, what: str) -> Level:
        """As `find`, for what needs a level's masks. Args: what: the caller, as the error names it.

        Raises: LevelError: also for a structured level, which has none.
        """
        level = self.find(wanted)
        if isinstance(level, StructuredLevel):
            raise LevelError(
                f"{what}: level {level.name} is a smaller model without masks or adapters, found where only "
                f"{', '.join(x.name for x in self.ladder.levels)} will do; get it with from_pretrained or `slice`."
            )
        return level

    def active_groups(self, level: Level) -> list[int]:
        """Adapter groups a level adds up, its own last; none of rank zero."""
        return self.manifest.active_groups(level)

    def has_group(self, group: int) -> bool:
        """Whether the files of an adapter group are here."""
        return all((self.folder / entry.file).is_file() for entry in self.manifest.files[f"adapters-{group}"])

    def adapter_tensors(self, group: int) -> dict[str, Tensor]:
        """`NAME.lora_A` (rank, inputs) and `NAME.lora_B` (outputs, rank) of one group.

        Raises: CheckpointError.
        """
        return dict(self.tensors_of(f"adapters-{group}"))

    def tensors_of(self, section: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one section, one at a time.

        Raises: CheckpointError.
        """
        self._open_sections([section])
        for name, file in self._sections[section].items():
            yield name, file.read(name)

    def open_level(self, level: AnyLevel) -> "OpenLevel":
        """The tensors of one level. Opens the files that level needs and that are not open yet, no other one.

        Every file is checked (size, header, hash) when it is opened, before any tensor is read, and stays open.

        Raises: CheckpointError.
        """
        sections = self.manifest.sections_of(level)
        entries = [e for section in sections if section not in self._sections for e in self.manifest.files[section]]
        missing = [entry.file for entry in entries if not (self.folder / entry.file).is_file()]
        if missing:
            here = ", ".join(x.name for x in self.ladder.levels if self.is_complete(x)) or "none"
            raise CheckpointError(
                f"{self.folder}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, which level "
                f"{level.name} needs (complete here: {here}). `elastic-sparsity upgrade` fetches what is missing."
            )
        if not self._sections:
            for entry in self.manifest.extras:
                if entry.file in ("config.json", "generation_config.json"):
                    self.check_file(entry)
        self._open_sections(sections)
        return OpenLevel(self, level, {section: self._sections[section] for section in sections})

    def check_extras(self) -> None:
        """Size and hash of the model's config and tokenizer.

        Raises: CheckpointError.
        """
        for entry in self.manifest.extras:
            self.check_file(entry)

    def check_present(self) -> int:
        """Size and hash of every tensor file that is here and not open, also of sections no level reads.

        Returns: how many files are here.
        Raises: CheckpointError.
        """
        count = 0
        for section, entries in self.manifest.files.items():
            for entry in entries:
                is_here = (self.folder / entry.file).exists()
                count += is_here
                if is_here and section not in self._sections:
                    self.check_file(entry)
        return count

    def _open_sections(self, sections: Sequence[str]) -> None:
        to_open = {section: self.manifest.files[section] for section in sections if section not in self._sections}
        entries = [entry for parts in to_open.values() for entry in parts]
        opened = {entry.file: self._open_file(entry) for entry in entries}
        for section, parts in to_open.items():
            files = [opened[entry.file] for entry in parts]
            expected = self._expected_tensors(section)
            if expected is not None:
                check_headers(files, expected)
            self._sections[section] = {name: file for file in files for name in file.specs}

    def _open_file(self, entry: FileEntry) -> TensorFile:
        """A file of tensors whose size, hash and checkpoint are the recorded ones."""
        self.check_file(entry)
        file = TensorFile(self.folder / entry.file)
        if file.metadata.get("elastic_checkpoint") != self.manifest.checkpoint_id:
            raise CheckpointError(f"{file.path}: belongs to another elastic checkpoint.")
        return file

    def check_file(self, entry: FileEntry) -> None:
        """That a file is here with the recorded size and hash.

        Raises: CheckpointError.
        """
        path = self.folder / entry.file
        if not path.is_file():  # a pipe would block
            raise CheckpointError(f"{path}: is missing; copy or download it again.")
        try:
            size = path.stat().st_size
            found = file_sha256(path) if size == entry.bytes else ""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error
        if size != entry.bytes:
            raise CheckpointError(f"{path}: has {size} bytes, expected {entry.bytes}; copy or download it again.")
        if found != entry.sha256:
            cached = f" Delete {path.resolve()} and load it again from the hub." if path.is_symlink() else ""
            raise CheckpointError(f"{path}: sha256 differs from the recorded one; the file is damaged.{cached}")

    def _expected_tensors(self, section: str) -> dict[str, TensorSpec] | None:
        kind, _, which = section.partition("-")
        value_name, adapter_name = (SAFETENSORS_NAMES[x] for x in (self.manifest.dtype, self.manifest.adapter_dtype))
        if kind == "shell":
            number = shell_names(self.ladder).index(which)
            return {
                f"{name}.{part}": (value_name if part == "values" else "U8", shape)
                for name, spec in self.linears.items()
                for part, shape in spec.shell_shapes(number).items()
            }
        if kind == "adapters":
            rank = self.ranks[int(which)]
            shapes = {n: ((rank, s.shape[1]), (s.shape[0], rank)) for n, s in self.linears.items()}
            parts = (("lora_A", 0), ("lora_B", 1))
            return {f"{name}.{part}": (adapter_name, s[i]) for name, s in shapes.items() for part, i in parts}
        return None  # the model knows what is shared

    def level_linears(self, level: Level) -> Iterator[tuple[str, LoadedLinear]]:
        """Every linear at one level.

        Raises: CheckpointError: naming file and linear.
        """
        tensors = self.open_level(level)
        for name in self.linears:
            yield name, tensors.linear(name)

    def update_record(self, changes: Mapping[str, Any]) -> None:
        """Adds fields (e.g. measured quality) to elastic_config.json as it is by now, atomically.

        Others may have changed it since it was opened here: their records, and levels they added, stay.

        Raises: CheckpointError: if another checkpoint is there now. OutputError.
        """
        with config_lock(self.folder):
            manifest, config = read_manifest(self.folder)
            if manifest.checkpoint_id != self.manifest.checkpoint_id:
                raise CheckpointError(
                    f"{self.folder}: another checkpoint ({manifest.checkpoint_id}) is there now, of which this is no "
                    f"record ({', '.join(changes)}); open it again."
                )
            config |= changes
            write_json(self.folder / CONFIG_NAME, config, sync=True)  # over the only copy of all hashes and counts
        self.config = config


class OpenLevel:
    """One level's open files; tensors are read when asked for, from any thread."""

    def __init__(
        self, checkpoint: ElasticCheckpoint, level: AnyLevel, tensors: Mapping[str, Mapping[str, TensorFile]]
    ) -> None:
        self._checkpoint, self.level, self._tensors = checkpoint, level, tensors

    @property
    def masked(self) -> Level:
        """The level, of whose masks something is asked."""
        assert isinstance(self.level, Level), f"{self.level.name} has no masks"
        return self.level

    def files(self, section: str) -> Mapping[str, TensorFile]:
        """The file of every tensor of a section that this level reads, by the tensor's name."""
        return self._tensors[section]

    def shared(self) -> dict[str, Tensor]:
        """Everything that is not sparsified, by parameter name."""
        return {name: file.read(name) for name, file in self._tensors["shared"].items()}

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is not sparsified; reads no tensor.

        Raises: CheckpointError: if one has another dtype than the checkpoint.
        """
        expected = SAFETENSORS_NAMES[self._checkpoint.manifest.dtype]
        specs = {name: file.specs[name] for name, file in self._tensors["shared"].items()}
        for name, (dtype, _) in specs.items():
            if dtype != expected:
                where = f"{self._checkpoint.folder}: shared: {name}"
                raise CheckpointError(f"{where}: found {dtype}, expected {expected}.")
        return {name: shape for name, (_, shape) in specs.items()}

    def linear(self, name: str) -> LoadedLinear:
        """One linear at this level, by the formats' definition: slow, for exports and checks.

        Raises: CheckpointError: naming folder and linear.
        """
        spec = self._checkpoint.linears[name]
        weight, mask = decode_shells(self.shells(name), spec, self.masked, self.where(name))
        return LoadedLinear(weight, mask, self.pairs(name), spec.transposed)

    def shells(self, name: str, room: Room | None = None) -> list[dict[str, Tensor]]:
        """The shells of one linear that this level reads, core first; shapes and dtypes are as its spec says.

        Args:
            room: to read them into, until the next linear; None = memory of their own.
        Raises: CheckpointError.
        """
        checkpoint = self._checkpoint
        if room is not None:
            room.clear()
        shells = []
        for number in range(num_shells(checkpoint.ladder, self.masked)):
            files = self._tensors[f"shell-{shell_names(checkpoint.ladder)[number]}"]
            parts = [(part, f"{name}.{part}") for part in checkpoint.linears[name].shell_shapes(number)]
            shells.append({part: files[full].read(full, room) for part, full in parts})
        return shells

    def pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of the groups this level adds to one linear, in group order.

        Raises: CheckpointError.
        """
        pairs = []
        for section, files in self._tensors.items():
            if section.startswith("adapters-"):
                both = [files[f"{name}.{part}"].read(f"{name}.{part}") for part in ("lora_A", "lora_B")]
                pairs.append((both[0], both[1]))
        return pairs

    def where(self, name: str) -> str:
        """Folder and linear, as errors name them."""
        return f"{self._checkpoint.folder}: {name}"
