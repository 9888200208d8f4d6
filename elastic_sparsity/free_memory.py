"""How much memory is free on this machine, also in a container. Knows nothing of sparsity."""

import math
import re
from pathlib import Path

import psutil
import torch

from elastic_sparsity.precision import default_device

FREE_SHARE = 0.9  # of what is free: other programs live too
# Files of a memory control group: its limit, what it uses, and what of memory.stat the kernel gives back when asked.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_here() -> dict[str, int]:
    """Most of the memory that is free now, in bytes."""
    own = psutil.Process().memory_info().rss  # a plan counts it
    free = {"host": int(FREE_SHARE * host_free()) + own}
    if default_device() == "cuda":
        free["device"] = int(FREE_SHARE * device_free())
    return free


def device_free() -> int:
    """Bytes that are free on this process's GPU, which it begins to use by this."""
    return int(torch.cuda.mem_get_info()[0])


def host_free() -> int:
    """Bytes of the host's memory that can be had without swapping, and without its container being ended for it."""
    return int(min(psutil.virtual_memory().available, cgroup_free()))


def cgroup_free(root: Path = Path("/")) -> float:
    """Bytes that this process's memory control groups leave it: a container's limit is one. Infinite without a limit.

    Args:
        root: of the file system that is asked.
    """
    found = math.inf
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")  # inside a container it may be missing: the mount itself is then its group
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            found = min(found, _group_free(folder, *(_CGROUP_V1 if controllers else _CGROUP_V2)))
    return found


def _group_free(folder: Path, limit: str, usage: str, reclaimable: str) -> float:
    try:
        room = int(_text(folder / limit)) - int(_text(folder / usage))
    except ValueError:  # "max", or a group without a memory controller
        return math.inf
    cached = re.search(rf"^{reclaimable} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, room + (int(cached[1]) if cached else 0))


def _text(path: Path) -> str:
    """A small file of the kernel; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
