"""Elastic checkpoint + level -> an ordinary transformers model, with exactly the promised zeros; and switching it."""

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from elastic_sparsity.checkpoint import ElasticCheckpoint, OpenLevel
from elastic_sparsity.choosing import choose_level
from elastic_sparsity.decoding import FLOATS, Decoder, check_finite
from elastic_sparsity.errors import CheckpointError, ConfigError, LevelError
from elastic_sparsity.files import atomic_folder, check_output_folder, strange_file
from elastic_sparsity.hub import checkpoint_folder, is_hub_id, with_secrets, without_secrets
from elastic_sparsity.ladder import AnyLevel, StructuredLevel
from elastic_sparsity.native import kernels
from elastic_sparsity.packed import PackedLinear, pack_linears_
from elastic_sparsity.packed_weight import PackedWeight
from elastic_sparsity.placement import (
    DeviceMap,
    check_placement,
    check_runtime,
    dispatched,
    find_places,
    place_of,
    place_of_profile,
    resolve_dtype,
)
from elastic_sparsity.semi_structured import to_semi_structured_
from elastic_sparsity.skeleton import import_model_class, model_config, skeleton
from elastic_sparsity.structured_section import read_section
from elastic_sparsity.tensor_file import Room
from elastic_sparsity.ways import DENSE, PACKED, SEMI_STRUCTURED

STATE = "elastic_state"  # attribute of a model made here
T = TypeVar("T")
# transformers switches torch's default dtype while it makes a model, and decoding its number of threads: both are the
# whole process's, so two models are not loaded at once.
_LOADING = threading.RLock()
P = ParamSpec("P")


def _one_at_a_time(call: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(call)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOADING:
            return call(*args, **kwargs)

    return locked


@dataclass(kw_only=True, slots=True)
class ElasticState:
    """Where a live model came from and which level it is at.

    Attributes:
        hub: arguments of `checkpoint_folder` that fetch another level of the same commit, `without_secrets`; None for
            a folder.
    """

    checkpoint: ElasticCheckpoint
    level: AnyLevel
    merge_adapters: bool
    runtime: str = DENSE
    hub: dict[str, Any] | None = None


class ElasticModel:
    """Entry point in the manner of transformers: `ElasticModel.from_pretrained(folder, level="60%")`."""

    @staticmethod
    def from_pretrained(
        path: str | Path,
        level: str | float = "auto",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | int | torch.device | None = None,
        device_map: DeviceMap | None = None,
        offload_folder: str | Path | None = None,
        merge_adapters: bool = True,
        runtime: str | None = None,
        device_profile: str | Path | None = None,
        max_bytes: int | str | None = None,
        max_ms_per_token: float | None = None,
        min_quality: float | None = None,
        **hub: Any,
    ) -> Any:
        """One level of an elastic checkpoint as its ordinary `transformers` causal LM, in eval mode.

        Args:
            path: folder of an elastic checkpoint, or a hub id, of which only the level's files are downloaded.
            level: 0.6, "0.6", "60%", "2:4", or "auto": the densest level that is here (on a hub: the densest); or
                "structured-0.5": a smaller model, if the checkpoint has one.
            dtype: of the model, also by name ("float16"); None or "auto" = the checkpoint's.
            device: where to put the model; None = CPU.
            device_map: as in transformers ("auto", "balanced", {"": 0}, ...), through accelerate; instead of `device`.
            offload_folder: for weights that a device map puts on "disk": in a new folder of their own in it, which is
                yours to remove when the model is gone.
            merge_adapters: False leaves the masked base weights alone, to put the exported PEFT adapters on them.
            runtime: "dense" (default), or "packed": sparsified weights stay a bitmask and kept values in memory,
                smaller and, for few tokens, faster; on the CPU, in float32 or bfloat16, for inference. Or
                "semi_structured": torch's 2:4 products on an NVIDIA GPU from Ampere on (level 2:4, for inference).
            device_profile, max_bytes, max_ms_per_token, min_quality: with level "auto", the best level within these
                budgets, see `choose_level`; a profile also decides dtype, runtime and device where they are not given.
            **hub: `revision`, `cache_dir`, `token`, `endpoint`, `local_files_only` for a hub id.
        Not beside other threads that use torch: its number of threads is changed for the time of the call. (Several
        threads may load and switch: they wait for each other.)

        Raises: LevelError: outside the ladder, listing the levels. CheckpointError: damaged or missing files.
            ConfigError: unknown dtype, device or argument.
        """
        check_placement(device, device_map, offload_folder)
        if any(x is not None for x in (device_profile, max_bytes, max_ms_per_token, min_quality)):
            if level != "auto":
                raise ConfigError(f'from_pretrained: level {level!r} leaves nothing to choose; budgets go with "auto".')
            if max_ms_per_token is not None and device_map is not None:
                raise ConfigError("max_ms_per_token: a profile is of one device; give `device`, not `device_map`.")
            choice = choose_level(
                path,
                profile=device_profile,
                max_bytes=max_bytes,
                max_ms_per_token=max_ms_per_token,
                min_quality=min_quality,
                runtime=runtime,
                dtype=dtype,
                **hub,
            )
            logging.getLogger(__name__).info(choice.explanation)
            level, dtype, runtime = choice.level, choice.dtype, choice.runtime
            if device_map is None:
                device = place_of_profile(choice.device, device)
        runtime = runtime or DENSE
        check_runtime(runtime, device, device_map, dtype)
        resolve_dtype(dtype, torch.float32)  # before a download
        if runtime == SEMI_STRUCTURED and device is None:
            device = "cuda"
        checkpoint = ElasticCheckpoint(checkpoint_folder(path, level, **hub))
        resolved = resolve_dtype(dtype, checkpoint.dtype)
        check_runtime(runtime, device, device_map, resolved)
        model = load_level(
            checkpoint,
            checkpoint.find(level),
            resolved,
            device_map={"": device} if device is not None and runtime != PACKED else device_map,
            offload_folder=offload_folder,
            merge_adapters=merge_adapters,
            runtime=runtime,
        )
        if is_hub_id(path):  # another level of the same commit can be fetched later
            getattr(model, STATE).hub = without_secrets({**hub, "path": path, "revision": checkpoint.folder.name})
        return model


@_one_at_a_time
@torch.inference_mode(False)
def load_level(
    checkpoint: ElasticCheckpoint,
    level: AnyLevel,
    dtype: torch.dtype,
    *,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    merge_adapters: bool = True,
    runtime: str = DENSE,
) -> Any:
    """The model of one level; merged in float32, masked, then cast. See `ElasticModel.from_pretrained`."""
    is_structured = isinstance(level, StructuredLevel)
    if is_structured and (runtime != DENSE or not merge_adapters):
        what = f"runtime: {runtime!r}" if runtime != DENSE else "merge_adapters: False"
        raise ConfigError(f"{what} is for levels with masks; {level.name} is a smaller dense model, leave it out.")
    if runtime == SEMI_STRUCTURED and getattr(level, "pattern", None) != (2, 4):
        raise ConfigError(f"runtime: {runtime!r} takes level 2:4, found {level.name}.")
    with ThreadPoolExecutor(1) as pool:  # while one thread hashes the files, another imports the model's class
        opening = pool.submit(checkpoint.open_level, level)
        import_model_class(checkpoint.folder)
        files = opening.result()
    model, generation = skeleton(checkpoint, files, dtype)
    places = find_places(model, device_map, offload_folder)
    tensors: dict[str, Tensor] = {}
    if runtime == PACKED:
        linears = pack_linears_(model, {name: spec.shape for name, spec in checkpoint.linears.items()}, kernels())
        _set_packed_(linears, _packed_level(checkpoint, files, merge_adapters, dtype))
    elif not is_structured:
        weights = {
            name: torch.empty(spec.stored_shape, dtype=dtype, device=place_of(places, name))
            for name, spec in checkpoint.linears.items()
        }
        _write_level_(weights, checkpoint, files, merge_adapters)
        tensors = {f"{name}.weight": weight for name, weight in weights.items()}
    _return_freed_memory()
    own = read_section(model_config(checkpoint), checkpoint, files) if is_structured else ()
    for name, tensor in chain(files.shared().items(), own):  # its biases replace the shared ones
        weight = tensor.to(dtype)
        check_finite(weight, name, kernels())
        tensors[name] = weight.to(place_of(places, name))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.eval().requires_grad_(runtime == DENSE)
    if generation is not None:
        model.generation_config = generation
    if places is not None:
        model = dispatched(model, places, offload_folder)
    if runtime == SEMI_STRUCTURED:
        to_semi_structured_(model, list(checkpoint.linears))
    state = ElasticState(checkpoint=checkpoint, level=level, merge_adapters=merge_adapters, runtime=runtime)
    setattr(model, STATE, state)
    return model


def _write_level_(
    weights: Mapping[str, Tensor],
    checkpoint: ElasticCheckpoint,
    files: OpenLevel,
    merge_adapters: bool,
    before: dict[str, Tensor] | None = None,
) -> None:
    """Fills the linears' weights. They exist before the work starts, so that what it needs in between is used again.

    Args:
        before: gets a copy of every weight that is overwritten.
    Raises: CheckpointError: damaged shells, or weights that are not finite; some are then written already.
    """
    decoder = Decoder(files.masked, kernels())

    def write(name: str, room: Room) -> None:
        weight = weights[name]
        shells, pairs = files.shells(name, room), files.pairs(name) if merge_adapters else []
        if before is not None:
            before[name] = weight.clone()
        decoder.write_(shells, checkpoint.linears[name], pairs, weight, files.where(name))

    _one_core_each(write, weights)


def _packed_level(
    checkpoint: ElasticCheckpoint, files: OpenLevel, merge_adapters: bool, dtype: torch.dtype
) -> dict[str, PackedWeight]:
    """Raises: CheckpointError: damaged shells, or weights that are not finite."""
    decoder = Decoder(files.masked, kernels())

    def pack(name: str, room: Room) -> PackedWeight:
        pairs = files.pairs(name) if merge_adapters else []
        return decoder.pack(files.shells(name, room), checkpoint.linears[name], pairs, dtype, files.where(name))

    return dict(zip(checkpoint.linears, _one_core_each(pack, checkpoint.linears), strict=True))


def _set_packed_(linears: Mapping[str, PackedLinear], weights: Mapping[str, PackedWeight]) -> None:
    for name, linear in linears.items():
        linear.set_packed(weights[name])


def _one_core_each(work: Callable[[str, Room], T], names: Iterable[str]) -> list[T]:
    """Runs `work` for every name in as many threads as torch has, one core and one room each.

    Half of decoding (bits, positions) is serial in any library, and torch's own threads wait for each other at every
    small operation, which costs ten times the work when another process wants the cores too.
    """
    threads = torch.get_num_threads()
    rooms = threading.local()

    def start() -> None:
        torch.set_num_threads(1)
        rooms.mine = Room()

    try:
        with ThreadPoolExecutor(threads, initializer=start) as pool:
            return list(pool.map(lambda name: work(name, rooms.mine), names))
    finally:
        torch.set_num_threads(threads)


def _return_freed_memory() -> None:
    """glibc keeps freed memory for later; after a load nothing that large comes. Other systems have no such call."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the last on Windows
        ctypes.CDLL(None).malloc_trim(0)


@_one_at_a_time
@torch.no_grad()
def set_level(model: nn.Module, level: str | float) -> None:
    """Switches a live model to another level, in place.

    Only files the model has not opened yet are read (of a hub: downloaded); none of a denser level when it goes
    sparser. The old weights are kept until the new ones are all there, and put back if something fails, so for that
    time the sparsified weights take twice their memory.

    Args:
        model: from `ElasticModel.from_pretrained`; its sparsified weights are overwritten, all else is left alone.
    Raises: LevelError: outside the ladder, or from or to a structured level. CheckpointError: damaged or missing
        files; the model is as it was.
        ConfigError: the model was not made here, or its weights were replaced or offloaded.
    """
    state: ElasticState | None = getattr(model, STATE, None)
    if state is None:
        raise ConfigError("set_level: this model was not made by ElasticModel.from_pretrained; load it with that.")
    wanted = state.checkpoint.find(level)
    if wanted == state.level:
        return
    for found in (wanted, state.level):
        if isinstance(found, StructuredLevel):
            raise LevelError(
                f"set_level: {found.name} is a smaller model, which no other level becomes in place, nor it another; "
                "load the level with from_pretrained."
            )
    if state.runtime == SEMI_STRUCTURED:
        raise ConfigError("set_level: a model of 2:4 products cannot become another level; load that anew.")
    packed = _live_packed(model, state.checkpoint)
    weights = {} if packed else _live_weights(model, state.checkpoint)
    if state.hub is not None and not state.checkpoint.is_complete(wanted):
        checkpoint_folder(level=wanted.name, **with_secrets(state.hub))
    files = state.checkpoint.open_level(wanted)
    if packed:
        dtype = next(iter(packed.values())).packed.values.dtype
        _set_packed_(packed, _packed_level(state.checkpoint, files, state.merge_adapters, dtype))
        state.level = wanted
        return
    before: dict[str, Tensor] = {}
    try:
        _write_level_(weights, state.checkpoint, files, state.merge_adapters, before)
    except BaseException:
        for name, weight in before.items():
            weights[name].copy_(weight)
        raise
    state.level = wanted


def _live_packed(model: nn.Module, checkpoint: ElasticCheckpoint) -> dict[str, PackedLinear]:
    """The packed linears of a model loaded with runtime="packed"; none of any other model."""
    modules = dict(model.named_modules())
    found = {name: linear for name in checkpoint.linears if isinstance(linear := modules.get(name), PackedLinear)}
    if found and len(found) < len(checkpoint.linears):
        raise ConfigError(
            f"set_level: only {len(found)} of {len(checkpoint.linears)} linears are packed; load it anew."
        )
    return found


def _live_weights(model: nn.Module, checkpoint: ElasticCheckpoint) -> dict[str, Tensor]:
    weights = {}
    for name, spec in checkpoint.linears.items():
        try:
            weight = model.get_parameter(f"{name}.weight")
        except AttributeError:
            raise ConfigError(
                f"set_level: the model has no {name}.weight any more; switch before wrapping it."
            ) from None
        shape = spec.stored_shape
        if tuple(weight.shape) != shape or weight.is_meta or weight.dtype not in FLOATS:
            raise ConfigError(f"set_level: {name}.weight is offloaded or changed; expected a float {shape} in memory.")
        weights[name] = weight.detach()
    return weights


def save_sliced(
    path: str | Path, level: str | float, output: str | Path, dtype: torch.dtype | str | None = None, **hub: Any
) -> None:
    """Writes one level as a plain Hugging Face folder that needs nothing of ours to open.

    Raises: LevelError, CheckpointError; OutputError: if `output` is taken or cannot be written.
    """
    check_output_folder(Path(output))
    folder = checkpoint_folder(path, level, **hub)
    ElasticCheckpoint(folder).check_extras()
    model = ElasticModel.from_pretrained(folder, level, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    with atomic_folder(Path(output)) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises: CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer  # slow import, only here

    try:
        if strange := strange_file(Path(path)):
            raise OSError(f"{strange.name} is no file")
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types for one cause
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
