"""The command `prune`: a plain model with fewer heads and MLP channels, which every dense runtime runs faster."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.terminal import say

LR = 3e-4
# Options of both commands that prune structures.
Calibration = Annotated[str, typer.Option(help='Text file, hub data set or "self".')]
ScoresName = Annotated[str, typer.Option(help="obs (refits what stays), flap or magnitude.")]
SearchName = Annotated[
    str | None,
    typer.Option(help="Search the counts: equal (the same in every block) or blocks (each its own). Default: by rule."),
]
Multiple = Annotated[
    int | None, typer.Option(help="MLP channels stay in multiples of this; default: 32, or what divides.")
]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
Length = Annotated[int, typer.Option(help="Tokens of a sample.")]
BatchSize = Annotated[int, typer.Option(help="Samples at a time.")]
Damping = Annotated[float, typer.Option(help="Of the input covariance, relative to its mean diagonal.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps that then tune what stays to the dense model; 0 = none.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help=f"Of that tuning; default: {LR:g}.")]
Seed = Annotated[int, typer.Option(help="Of the choice of samples.")]
Precision = Annotated[str, typer.Option(help="Of products: auto, float32 or bfloat16.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")]


def checked_scores(name: str) -> Any:
    """The scores an option names. Raises: ConfigError: unknown."""
    from elastic_sparsity.structured import SCORES

    return _known("--scores", name, SCORES)


def checked_search(name: str | None) -> Any:
    """The search an option names. Raises: ConfigError: unknown."""
    from elastic_sparsity.structured_search import SEARCHES

    return None if name is None else _known("--search", name, SEARCHES)


def checked_rate(lr: float | None, steps: int) -> float:
    """The rate of the tuning. Raises: ConfigError: one is given, but no steps that would take it."""
    if lr is not None and not steps:
        raise ConfigError("--lr: is the rate of a tuning, and without --steps there is none; give --steps with it.")
    return LR if lr is None else lr


def _known(option: str, name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise ConfigError(f"{option}: {name!r} is not one of {', '.join(names)}.")
    return name


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command()
    def prune(
        model: Annotated[str, typer.Argument(help="Model folder, hub id or .gguf file.")],
        structured: Annotated[float, typer.Option(help="Share of the blocks' linears to remove, e.g. 0.5.")],
        output: Annotated[Path, typer.Option(help="Folder for the smaller model.")],
        calibration: Calibration = "self",
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
        dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
        precision: Precision = "auto",
        quiet: Quiet = False,
    ) -> None:
        """Remove whole heads and MLP channels, refit what stays, and tune it if asked: a smaller Hugging Face model."""
        from elastic_sparsity.pruning import prune as write_pruned
        from elastic_sparsity.sized import opened_by
        from elastic_sparsity.structured_sizes import counts_text

        chosen, counts, rate = checked_scores(scores), checked_search(search), checked_rate(lr, steps)
        with progress(quiet) as report:
            found = write_pruned(
                model,
                output,
                sparsity=structured,
                calibration=calibration,
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
                dtype=dtype,
                precision=precision,
                progress=report,
            )
        sizes, share = found.sizes, 100 * found.sizes.sparsity
        say(
            f"In each of {len(sizes.groups)} blocks {counts_text(sizes.groups)} of {sizes.num_groups} key/value heads "
            f"stay, with their query heads, and {counts_text(sizes.channels)} of {sizes.num_channels:,} MLP channels: "
            f"{share:.2f} % of the blocks' linears removed, {found.parameters_before:,} parameters became "
            f"{found.parameters_after:,}."
        )
        if found.searched is not None:
            heads, channels = (", ".join(map(str, counts)) for counts in (sizes.groups, sizes.channels))
            say(f"Searched, by block: {heads} key/value heads; {channels} channels.")
        say(f"{output}: {opened_by(output)}.")
