"""From a folder or a hub id to a folder that holds one level's files. Knows huggingface_hub, no tensor."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.files import is_file, is_folder
from elastic_sparsity.manifest import CONFIG_NAME, FileEntry, Manifest, by_density, read_manifest

HUB_OPTIONS = frozenset({"revision", "cache_dir", "token", "endpoint", "local_files_only"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class _Secret:
    """A token that is not pickled with the model that holds it: there it becomes None, the machine's own login."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __deepcopy__(self, memo: object) -> "_Secret":
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def without_secrets(hub: dict[str, Any]) -> dict[str, Any]:
    """Hub options that may be kept with a model, which users pickle."""
    token = hub.get("token")
    return {**hub, "token": _Secret(token)} if isinstance(token, str) else hub


def with_secrets(hub: dict[str, Any]) -> dict[str, Any]:
    """The options again that `without_secrets` was given."""
    return {key: value.value if isinstance(value, _Secret) else value for key, value in hub.items()}


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` is meant as "owner/name" on a hub: it looks so, and no folder has this name."""
    return not is_folder(path) and bool(_HUB_ID.fullmatch(str(path))) and not str(path).startswith((".", "~"))


def checkpoint_folder(
    path: str | Path,
    level: str | float | None = None,
    *,
    files: Callable[[Manifest], Iterable[FileEntry]] | None = None,
    **hub: Any,
) -> Path:
    """`path` itself if it is a folder; for a hub id, the cache folder after fetching what a level reads.

    Args:
        files: what to fetch, instead of a level's files.
        level: None = elastic_config.json alone; "auto" = the densest level (without the hub: of those in the cache).
        **hub: `revision`, `cache_dir`, `token`, `endpoint`, `local_files_only`, as in huggingface_hub.
    Raises: CheckpointError: no such folder or repository, or the download failed. ConfigError: unknown option.
        LevelError: outside the ladder.
    """
    unknown = sorted(hub.keys() - HUB_OPTIONS)
    if unknown:
        raise ConfigError(
            f"unknown argument {unknown[0]!r}; besides its own arguments this call takes, for a hub id, "
            f"{', '.join(sorted(HUB_OPTIONS))}."
        )
    if not is_hub_id(path):
        return Path(path)
    from huggingface_hub import hf_hub_download  # slow import, only here

    no_answer = None if hub.get("local_files_only") else _no_answer(path, hub)
    if no_answer is not None:
        hub = {**hub, "local_files_only": True}  # the cache may still do

    def fetch(name: str, options: dict[str, Any]) -> Path:
        try:
            return Path(hf_hub_download(str(path), name, **options))
        except Exception as error:
            cause = no_answer or error
            raise CheckpointError(
                f"{path}: no folder of this name, and {name} cannot be fetched from the hub: "
                f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            ) from cause

    config = fetch(CONFIG_NAME, hub)
    folder = config.parent
    if files is None:
        if level is None or (level == "auto" and hub.get("local_files_only")):
            return folder  # of "auto" the densest level that is in the cache will be taken
        files = partial(_level_files, level=level)
    manifest, _ = read_manifest(folder)
    pinned = {**hub, "revision": folder.name}  # the commit, so that all files are of one version
    for entry in files(manifest):
        if fetch(entry.file, pinned).stat().st_size != entry.bytes and not hub.get("local_files_only"):
            fetch(entry.file, {**pinned, "force_download": True})  # huggingface_hub trusts what is in its cache
    return folder


def _no_answer(path: str | Path, hub: dict[str, Any]) -> Exception | None:
    """Why a hub cannot be asked: it is down, or HF_HUB_OFFLINE is set. None if it answers, be it with a refusal.

    Asks once: hf_hub_download would ask a hub that is down for minutes.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # slow imports, only here
    from huggingface_hub.errors import HfHubHTTPError

    try:
        url = hf_hub_url(str(path), CONFIG_NAME, revision=hub.get("revision"), endpoint=hub.get("endpoint"))
        get_hf_file_metadata(url, token=hub.get("token"))
    except Exception as error:  # also types of huggingface_hub's HTTP library, which changes by version
        if not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500:
            return error
    return None


def can_fetch(path: str | Path, **hub: Any) -> bool:
    """Whether files that are not here yet can be had: `path` is a hub id, and its hub answers."""
    return is_hub_id(path) and not hub.get("local_files_only") and _no_answer(path, hub) is None


def elastic_folder(path: str | Path, **hub: Any) -> Path | None:
    """Folder with the elastic_config.json at `path` (of a hub id: fetched); None if none can be had there.

    None also means that a hub does not answer and its cache has nothing: a plain model may still be in another cache.

    Raises: ConfigError: unknown option.
    """
    if is_file(path) or not is_hub_id(path):  # "models/x.gguf" looks like a hub id too
        return Path(path) if is_file(Path(path) / CONFIG_NAME) else None
    try:
        return checkpoint_folder(path, **hub)
    except CheckpointError:
        return None


def fetch_levels(path: str | Path, levels: Iterable[str | float] | None, **hub: Any) -> Path:
    """`path` itself if it is a folder; for a hub id, the cache folder after fetching what several levels read.

    Args:
        levels: None = all of the ladder, so no structured one.
    Raises: as `checkpoint_folder`.
    """

    def files(manifest: Manifest) -> list[FileEntry]:
        wanted = manifest.build_ladder().levels if levels is None else [manifest.find(level) for level in levels]
        return [*manifest.extras, *dict.fromkeys(entry for level in wanted for entry in manifest.files_of(level))]

    return checkpoint_folder(path, files=files, **hub)


def _level_files(manifest: Manifest, level: str | float) -> list[FileEntry]:
    found = by_density(manifest.build_ladder())[0] if level == "auto" else manifest.find(level)
    return [*manifest.extras, *manifest.files_of(found)]
