"""The command `add-structured`: physically smaller models as further levels of an elastic checkpoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.terminal import say


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command("add-structured")
    def add_structured_command(
        checkpoint: Annotated[Path, typer.Argument(help="Folder of an elastic checkpoint.")],
        fractions: Annotated[str, typer.Option(help="Shares of the blocks' linears to remove, e.g. 0.25,0.5.")],
        calibration: Annotated[str, typer.Option(help='Text file, hub data set or "self".')] = "self",
        model: Annotated[str | None, typer.Option(help="The base model; default: the recorded one.")] = None,
        scores: Annotated[str, typer.Option(help="obs (refits what stays), flap or magnitude.")] = "obs",
        multiple: Annotated[
            int | None, typer.Option(help="MLP channels stay in multiples of this; default: 32, or what divides.")
        ] = None,
        samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
        length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
        batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 4,
        damping: Annotated[float, typer.Option(help="Of the input covariance, relative to its mean diagonal.")] = 0.01,
        seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
        precision: Annotated[str, typer.Option(help="Of products: auto, float32 or bfloat16.")] = "auto",
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Add smaller models (fewer heads and MLP channels) as levels that `slice` writes as plain models."""
        from elastic_sparsity.adding import add_structured
        from elastic_sparsity.checkpoint import ElasticCheckpoint
        from elastic_sparsity.report import human_bytes
        from elastic_sparsity.structured import SCORES, Scores

        if scores not in SCORES:
            raise ConfigError(f"--scores: {scores!r} is not one of {', '.join(SCORES)}.")
        with progress(quiet) as report:
            levels = add_structured(
                checkpoint,
                _numbers(fractions),
                calibration=calibration,
                model=model,
                scores=cast(Scores, scores),
                multiple=multiple,
                samples=samples,
                length=length,
                batch_size=batch_size,
                damping=damping,
                seed=seed,
                precision=precision,
                progress=report,
            )
        whole = ElasticCheckpoint(checkpoint)
        for level in levels:
            say(
                f"{checkpoint}: holds level {level.name} ({level.key_value_heads} key/value heads and "
                f"{level.channels:,} MLP channels a block; {human_bytes(whole.bytes_of(level))} with what is shared)."
            )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions: {text!r} are no numbers; write e.g. 0.25,0.5.") from None
