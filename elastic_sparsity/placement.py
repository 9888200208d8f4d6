"""Where a model's weights go: dtypes and accelerate's device maps, checked before anything is read. No format."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_sparsity.errors import ConfigError, OutputError, brief
from elastic_sparsity.precision import DTYPES
from elastic_sparsity.semi_structured import semi_structured_problem
from elastic_sparsity.ways import DENSE, RUNTIMES, SEMI_STRUCTURED

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
Places = Mapping[str, Any]  # module name prefix -> device, "cpu" or "disk"
DeviceMap = str | int | torch.device | Places  # as transformers takes it: also one device for all


def resolve_dtype(dtype: torch.dtype | str | None, stored: torch.dtype) -> torch.dtype:
    """The dtype a user means; None and "auto" are the stored one.

    Raises: ConfigError.
    """
    if dtype is None or dtype == "auto":
        return stored
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"dtype: {brief(dtype)} is not one of {', '.join(DTYPES)} or auto.")
    return found


def check_placement(device: Any, device_map: Any, offload_folder: Any) -> None:
    """That the machine has the devices a user names.

    Raises: ConfigError.
    """
    if device is not None and device_map is not None:
        raise ConfigError("from_pretrained: give either `device` or `device_map`.")
    if isinstance(device_map, Mapping):
        wanted = list(device_map.values())
    else:
        wanted = [] if device_map is None or device_map in AUTOMATIC else [device_map]
    wanted += [] if device is None else [device]
    for place in wanted:
        if place == "disk" and isinstance(device_map, Mapping) and offload_folder is not None:
            continue
        if place == "disk":
            raise ConfigError('device_map: "disk" needs a mapping of modules and an `offload_folder`.')
        is_number = isinstance(place, int) and not isinstance(place, bool) and place >= 0  # of an accelerator
        try:
            is_here = _is_here(torch.device(place))
        except (RuntimeError, TypeError, ValueError):
            if not is_number:
                raise ConfigError(f"device: {brief(place)} is no device; maps are {', '.join(AUTOMATIC)}.") from None
            is_here = False  # torch without any accelerator knows no numbers
        if not is_here:
            raise ConfigError(f"device: {brief(place)} is not on this machine.")


def _is_here(device: torch.device) -> bool:
    if device.type == "meta":
        return False
    if device.type == "cuda":  # without making a context on it
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # of other backends, each its own
        return False
    return True


def check_runtime_name(runtime: str) -> None:
    """Raises: ConfigError."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime: {brief(runtime)} is not one of {', '.join(RUNTIMES)}.")


def check_runtime(runtime: str, device: Any, device_map: Any, dtype: torch.dtype | str | None) -> None:
    """That a runtime is known and can serve the place and dtype a user names. (None as dtype says nothing.)

    Raises: ConfigError.
    """
    check_runtime_name(runtime)
    if runtime == DENSE:
        return
    if runtime == SEMI_STRUCTURED:
        problem = semi_structured_problem("cuda" if device is None else device)
        if problem is not None:
            raise ConfigError(f"runtime: {brief(runtime)} cannot run here: {problem}")
        if device_map is not None or dtype in (torch.float32, "float32"):
            raise ConfigError(f'runtime: {brief(runtime)} takes device="cuda", no device_map, and bfloat16 or float16.')
        return
    if device_map is not None or (device is not None and torch.device(device).type != "cpu"):
        raise ConfigError(f'runtime: {brief(runtime)} is for the CPU; leave device and device_map out, or use "dense".')
    if dtype in (torch.float16, "float16"):
        raise ConfigError(f'runtime: {brief(runtime)} has no float16; use dtype="bfloat16" or "float32".')


def place_of_profile(kind: str | None, device: Any) -> Any:
    """The device for a level that was chosen by a profile of `kind`, "cpu" or "cuda"; None = chosen without one.

    Raises: ConfigError: if the device is of another kind, or this machine has none of it: its milliseconds are others.
    """
    if kind is None:
        return device
    if device is not None and torch.device(device).type != kind:
        raise ConfigError(
            f"device: {brief(device)}, but device_profile is of a {kind} device; give a profile of this one, or take "
            "what `choose_level` says as `level`."
        )
    if kind != "cpu" and not _is_here(torch.device(kind)):
        raise ConfigError(
            f"device_profile: is of a {kind} device, which is not on this machine; to load its level here, take what "
            "`choose_level` says as `level`."
        )
    return device if device is not None or kind == "cpu" else kind


def find_places(model: nn.Module, device_map: DeviceMap | None, offload_folder: str | Path | None) -> Places | None:
    """Device of every module by name prefix; None = everything on the CPU.

    Raises: ConfigError: if a map leaves out a parameter or buffer, or an automatic one needs an `offload_folder`.
    """
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        # Tied ones by all their names, and buffers, as accelerate asks for them.
        left_out = [name for name in model.state_dict() if _prefix(device_map, name) is None]
        if left_out:
            raise ConfigError(f"device_map: names no place for {left_out[0]}; add its module, or '' for all the rest.")
        return device_map
    if not isinstance(device_map, str) or device_map not in AUTOMATIC:
        return {"": device_map}
    places = _automatic(model, device_map)
    on_disk = [name for name, place in places.items() if place == "disk"]
    if on_disk and offload_folder is None:
        raise ConfigError(
            f"device_map: {device_map!r} puts {len(on_disk)} modules on disk, first {on_disk[0]}, as the rest of the "
            "memory here is too small for them; give an `offload_folder` or a smaller dtype."
        )
    return places


def _automatic(model: nn.Module, device_map: str) -> Places:
    """Places by the memory there is; what fits nowhere is on "disk"."""
    from accelerate import infer_auto_device_map  # slow imports, only here
    from accelerate.utils import get_balanced_memory

    # A set in transformers 5, which accelerate before 1.14 takes for the name of one class.
    whole: Any = list(getattr(model, "_no_split_modules", None) or ())
    memory: Any = None
    if device_map != "sequential":
        low: Any = device_map == "balanced_low_0"
        memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=low)
    return infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)


def dispatched(model: nn.Module, places: Places, offload_folder: str | Path | None) -> Any:
    """The model with its modules on their devices.

    Raises: OutputError: if what goes to "disk" cannot be written.
    """
    from accelerate import dispatch_model  # slow import, only here

    if "disk" not in places.values():
        return dispatch_model(model, dict(places))
    assert offload_folder is not None
    own = None
    try:
        folder = Path(offload_folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # accelerate takes what lies in a folder, be it another level's; and that model may still read it.
        own = tempfile.mkdtemp(prefix="level-", dir=folder)
        return dispatch_model(model, dict(places), offload_dir=own)
    except OSError as error:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise OutputError(f"offload_folder: {str(offload_folder)!r} cannot be written: {error}.") from error


def place_of(places: Places | None, name: str) -> Any:
    """Device to make a weight on; what goes to "disk" comes by way of the CPU."""
    device = "cpu" if places is None else places[_prefix(places, name) or ""]
    return "cpu" if device == "disk" else device


def _prefix(places: Places, name: str) -> str | None:
    fitting = [p for p in places if p == "" or name == p or name.startswith(f"{p}.")]
    return max(fitting, key=len, default=None)
