"""Checkpoints that a benchmark trains: kept in its work folder, found again, and gone on with after an interruption."""

import json
import time
from pathlib import Path
from typing import Any

from cells import log, stamp

from elastic_sparsity import ElasticCheckpoint, optimize
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.files import write_json
from elastic_sparsity.manifest import CONFIG_NAME
from elastic_sparsity.models import BaseModel
from elastic_sparsity.run_folder import is_unfinished

KEEP_EVERY = 10.0  # seconds between notes of the time spent


class Sittings:
    """The times that a run took, a sitting from each start to its end or interruption, with when and by what code."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.all: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    @property
    def seconds(self) -> float:
        return round(sum(sitting["seconds"] for sitting in self.all), 1)

    def begin(self, seed: int) -> None:
        self.all.append({**stamp(seed), "seconds": 0.0})
        self._started = self._noted = time.monotonic()

    def note(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._noted >= KEEP_EVERY:
            self.all[-1]["seconds"], self._noted = round(now - self._started, 1), now
            write_json(self.file, self.all)


def trained(recipe: Recipe, folder: Path, base: BaseModel) -> tuple[ElasticCheckpoint, list[dict[str, Any]]]:
    """The checkpoint that a recipe makes of `base`, trained now unless it is there, and the sittings it took.

    Raises: ConfigError: if another recipe's is there, or one of another text with the same name.
    """
    sittings = Sittings(folder.with_name(f"{folder.name}.sittings.json"))
    if not (folder / CONFIG_NAME).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not is_unfinished(folder):
            sittings.all.clear()  # those of a checkpoint that was moved away
        log(f"{folder.name}: training")
        sittings.begin(recipe.seed)

        def progress(stage: str, done: int, total: int) -> None:
            sittings.note()
            if done == total:
                log(f"{folder.name}: {stage} done")

        try:
            optimize(recipe, folder, progress)
        finally:
            sittings.note(at_once=True)
    checkpoint = ElasticCheckpoint(folder)
    wanted, found = question(recipe.model_dump(mode="json")), question(made_with(checkpoint))
    differing = [name for name in wanted if wanted[name] != found.get(name)]
    if differing:
        raise ConfigError(
            f"{folder}: was made by another recipe, which differs in {', '.join(differing)}; name another --work "
            "folder, or move it away."
        )
    recorded, asked = checkpoint.config["data"]["calibration_sha256"], token_hash(calibration_tokens(recipe, base)[0])
    if recorded != asked:
        raise ConfigError(
            f"{folder}: was made with calibration tokens of sha256 {recorded[:16]}, the text now gives {asked[:16]}; "
            "name another --work folder, or move it away."
        )
    return checkpoint, sittings.all


def made_with(checkpoint: ElasticCheckpoint) -> dict[str, Any]:
    """The recipe that made it, with what recipes say since then at its default."""
    return make_recipe(checkpoint.config["recipe"], f"{checkpoint.folder}: recipe").model_dump(mode="json")


def question(recipe: dict[str, Any]) -> dict[str, Any]:
    """The sections of a recipe that a checkpoint's weights depend on; of its text the name: `trained` compares it."""
    sections = {name: value for name, value in recipe.items() if name not in ("evaluation", "memory")}
    source = Path(recipe["calibration"]["source"]).name
    return sections | {"calibration": {**recipe["calibration"], "source": source}}
