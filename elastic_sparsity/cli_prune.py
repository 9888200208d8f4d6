"""The command `prune`: a plain model with fewer heads and MLP channels, which every dense runtime runs faster."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.terminal import say


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command()
    def prune(
        model: Annotated[str, typer.Argument(help="Model folder, hub id or .gguf file.")],
        structured: Annotated[float, typer.Option(help="Share of the blocks' linears to remove, e.g. 0.5.")],
        output: Annotated[Path, typer.Option(help="Folder for the smaller model.")],
        calibration: Annotated[str, typer.Option(help='Text file, hub data set or "self".')] = "self",
        scores: Annotated[str, typer.Option(help="obs (refits what stays), flap or magnitude.")] = "obs",
        multiple: Annotated[
            int | None, typer.Option(help="MLP channels stay in multiples of this; default: 32, or what divides.")
        ] = None,
        samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
        length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
        batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 4,
        damping: Annotated[float, typer.Option(help="Of the input covariance, relative to its mean diagonal.")] = 0.01,
        seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
        dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
        precision: Annotated[str, typer.Option(help="Of products: auto, float32 or bfloat16.")] = "auto",
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Remove whole heads and MLP channels, and refit what stays: an ordinary, smaller Hugging Face model."""
        from elastic_sparsity.pruning import prune as write_pruned
        from elastic_sparsity.structured import SCORES, Scores

        if scores not in SCORES:
            raise ConfigError(f"--scores: {scores!r} is not one of {', '.join(SCORES)}.")
        with progress(quiet) as report:
            found = write_pruned(
                model,
                output,
                sparsity=structured,
                calibration=calibration,
                scores=cast(Scores, scores),
                multiple=multiple,
                samples=samples,
                length=length,
                batch_size=batch_size,
                damping=damping,
                seed=seed,
                dtype=dtype,
                precision=precision,
                progress=report,
            )
        sizes, share = found.sizes, 100 * found.sizes.sparsity
        say(
            f"In each of {found.num_blocks} blocks {sizes.groups} of {sizes.num_groups} key/value heads stay, with "
            f"their query heads, and {sizes.channels:,} of {sizes.num_channels:,} MLP channels: {share:.2f} % of the "
            f"blocks' linears removed, {found.parameters_before:,} parameters became {found.parameters_after:,}."
        )
        say(f"{output}: a plain model, open it with AutoModelForCausalLM.from_pretrained.")
