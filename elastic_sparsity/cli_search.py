"""The command `search`: how much sparsity each linear takes, for all levels of a ladder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic_sparsity.config import make_recipe
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.search import SearchSettings
from elastic_sparsity.terminal import number_or_text, say

PRESETS = {
    "fast": (DescentSettings(), SearchSettings(generations=0)),
    "paper": (
        DescentSettings(steps=40),
        SearchSettings(generations=200, offspring=128, windows=(4, 32, 256), survivors=(16, 4)),
    ),
}


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command()
    def search(
        model: Annotated[str, typer.Argument(help="Model folder, hub id or .gguf file.")],
        output: Annotated[Path, typer.Option(help="The plan, a .json file; an unfinished search there goes on.")],
        calibration: Annotated[str, typer.Option(help='Text file, hub data set or "self".')] = "self",
        levels: Annotated[str, typer.Option(help="Sparsities, from 0 to 1.")] = "0.5,0.6,0.7",
        method: Annotated[str, typer.Option(help='"search", "descent", "arithmetic", "owl" or "uniform".')] = "search",
        preset: Annotated[str, typer.Option(help='"fast", or "paper" (hours on a GPU).')] = "fast",
        steps: Annotated[int | None, typer.Option(help="Of each level's descent, instead of the preset's.")] = None,
        generations: Annotated[
            int | None, typer.Option(help="Of an evolution after it, instead of the preset's.")
        ] = None,
        samples: Annotated[int, typer.Option(help="Calibration samples that choose the masks.")] = 128,
        length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
        held_out: Annotated[int | None, typer.Option(help="More samples, that judge allocations.")] = None,
        scores: Annotated[str, typer.Option(help="Which weights go first: wanda, magnitude, ria or obs.")] = "wanda",
        seed: Annotated[int, typer.Option(help="Of the samples and of the moves.")] = 0,
        dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
        precision: Annotated[str, typer.Option(help="Of products: auto, float32 or bfloat16.")] = "auto",
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Find how many weights each linear keeps at each level, nested, with exactly the levels' number in all.

        A recipe uses the plan through `allocation.plan`.
        """
        if preset not in PRESETS:
            raise ConfigError(f"--preset: {preset!r} is unknown; expected one of {', '.join(PRESETS)}.")
        from elastic_sparsity.allocating import METHODS, Allocating, allocate  # torch, only here
        from elastic_sparsity.allocation_plot import plot_plan

        for option, value, takers in (
            ("--steps", steps, ("search", "descent")), ("--generations", generations, ("search",)),
        ):  # fmt: skip
            if value is not None and method in METHODS and method not in takers:
                raise ConfigError(f"{option}: method {method!r} has none; give it with {' or '.join(takers)}.")
        descent, settings = PRESETS[preset]
        if steps is not None:
            descent = replace(descent, steps=steps)
        if generations is not None:
            settings = replace(settings, generations=generations)
        judged = max(16, *settings.windows) if held_out is None else held_out
        recipe = make_recipe(
            {
                "seed": seed,
                "precision": precision,
                "model": {"id": model, "dtype": dtype},
                "scores": {"method": scores},
                "calibration": {"source": calibration, "samples": samples + judged, "length": length},
                "ladder": {"sparsities": [number_or_text(text) for text in levels.split(",")]},
                "block": {"samples": samples},
            },
            "search",
        )
        with progress(quiet) as report:
            plan = allocate(
                recipe, Allocating(method=method, held_out=judged, descent=descent, search=settings), output, report
            )
        table = Table(title="KL to the dense model on held-out text, nats a token")
        for column in ("level", "best start", "found", "steps", "generations"):
            table.add_column(column, justify="left" if column == "level" else "right")
        for sparsity in plan.sparsities:
            start, found = plan.held_out_kl[repr(sparsity)]
            descended = plan.descents.get(repr(sparsity))
            counts = (0 if descended is None else len(descended.losses) - 1, len(plan.losses[repr(sparsity)]))
            table.add_row(f"{100 * sparsity:g} %", f"{start:.3f}", f"{found:.3f}", *map(str, counts))
        Console(emoji=False).print(table)
        picture = output.with_name(f"{output.name}.png")
        plot_plan(plan, picture)
        say(f"{output}: allocation plan; {picture}: over depth")
