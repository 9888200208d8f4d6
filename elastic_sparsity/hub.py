"""From a folder or a hub id to a folder that holds one level's files. Knows huggingface_hub, no tensor."""

import re
from pathlib import Path
from typing import Any

from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.manifest import CONFIG_NAME, by_density, read_manifest

HUB_OPTIONS = frozenset({"revision", "cache_dir", "token", "endpoint", "local_files_only"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def checkpoint_folder(path: str | Path, level: str | float | None = None, **hub: Any) -> Path:
    """`path` itself if it is a folder; for a hub id, the cache folder after fetching what a level reads.

    Args:
        level: None = elastic_config.json alone; "auto" = the densest level.
        **hub: `revision`, `cache_dir`, `token`, `endpoint`, `local_files_only`, as in huggingface_hub.
    Raises: CheckpointError: no such folder or repository, or the download failed. ConfigError: unknown option.
        LevelError: outside the ladder.
    """
    unknown = sorted(hub.keys() - HUB_OPTIONS)
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; for a hub id there are {', '.join(sorted(HUB_OPTIONS))}.")
    if Path(path).is_dir() or not _HUB_ID.fullmatch(str(path)) or str(path).startswith((".", "~")):
        return Path(path)
    from huggingface_hub import hf_hub_download  # slow import, only here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(name: str, options: dict[str, Any]) -> Path:
        try:
            return Path(hf_hub_download(str(path), name, **options))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{path}: no folder of this name, and {name} cannot be fetched from the hub: "
                f"{type(error).__name__}: {reason}"
            ) from error

    config = fetch(CONFIG_NAME, hub)
    folder = config.parent
    if level is None:
        return folder
    manifest, _ = read_manifest(folder)
    ladder = manifest.build_ladder()
    found = by_density(ladder)[0] if level == "auto" else ladder.find(level)
    pinned = {**hub, "revision": folder.name}  # the commit, so that all files are of one version
    for entry in [*manifest.extras, *manifest.files_of(found)]:
        fetch(entry.file, pinned)
    return folder
