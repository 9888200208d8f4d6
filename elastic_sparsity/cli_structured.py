"""The command `add-structured`: physically smaller models as further levels of an elastic checkpoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_sparsity.cli_prune import (
    BatchSize,
    Calibration,
    Damping,
    LearningRate,
    Length,
    Multiple,
    Precision,
    Quiet,
    Samples,
    ScoresName,
    SearchName,
    Seed,
    Steps,
    checked_rate,
    checked_scores,
    checked_search,
)
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.terminal import say


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command("add-structured")
    def add_structured_command(
        checkpoint: Annotated[Path, typer.Argument(help="Folder of an elastic checkpoint.")],
        fractions: Annotated[str, typer.Option(help="Shares of the blocks' linears to remove, e.g. 0.25,0.5.")],
        calibration: Calibration = "self",
        model: Annotated[str | None, typer.Option(help="The base model; default: the recorded one.")] = None,
        scores: ScoresName = "obs",
        search: SearchName = None,
        multiple: Multiple = None,
        samples: Samples = 128,
        length: Length = 512,
        batch_size: BatchSize = 4,
        damping: Damping = 0.01,
        steps: Steps = 0,
        lr: LearningRate = None,
        seed: Seed = 0,
        precision: Precision = "auto",
        quiet: Quiet = False,
    ) -> None:
        """Add smaller models (fewer heads and MLP channels) as levels that `slice` writes as plain models."""
        from elastic_sparsity.adding import add_structured
        from elastic_sparsity.checkpoint import ElasticCheckpoint
        from elastic_sparsity.report import human_bytes
        from elastic_sparsity.structured_sizes import counts_text

        chosen, counts, rate = checked_scores(scores), checked_search(search), checked_rate(lr, steps)
        with progress(quiet) as report:
            levels = add_structured(
                checkpoint,
                _numbers(fractions),
                calibration=calibration,
                model=model,
                scores=chosen,
                search=counts,
                multiple=multiple,
                samples=samples,
                length=length,
                batch_size=batch_size,
                damping=damping,
                steps=steps,
                lr=rate,
                seed=seed,
                precision=precision,
                progress=report,
            )
        whole = ElasticCheckpoint(checkpoint)
        for level in levels:
            say(
                f"{checkpoint}: holds level {level.name} ({counts_text(level.key_value_heads)} key/value heads "
                f"and {counts_text(level.channels)} MLP channels a block; {human_bytes(whole.bytes_of(level))} with "
                "what is shared)."
            )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions: {text!r} are no numbers; write e.g. 0.25,0.5.") from None
