"""The command `induce`: a model that computes the same and is easier to prune."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic_sparsity.config import make_recipe
from elastic_sparsity.terminal import number_or_text, plain, say


def show_blocks(results: Sequence[Any]) -> None:
    """How far the masked blocks' held-out errors fell, by level; see `inducing.summary`."""
    if not results:
        return
    from elastic_sparsity.inducing import summary

    table = Table(title="Held-out error of the masked blocks (Wanda's or magnitude's masks), change")
    for column in ("part", "level", "change", "blocks changed"):
        table.add_column(column, justify="left" if column in ("part", "level") else "right")
    for kind, found in summary(results).items():
        for level, ratio in found["error_ratio"].items():
            blocks = f"{found['changed']} of {found['blocks']}"
            table.add_row(kind, plain(level), f"{100 * (ratio - 1):+.1f} %", blocks)
    Console(emoji=False).print(table)


def register(app: typer.Typer, progress: Callable[[bool], AbstractContextManager[Any]]) -> None:
    """Adds the command to an app. `progress` shows bars while a command works, unless it shall be quiet."""

    @app.command()
    def induce(
        model: Annotated[str, typer.Argument(help="Model folder, hub id or .gguf file.")],
        output: Annotated[Path, typer.Option(help="Folder for the induced model.")],
        calibration: Annotated[str, typer.Option(help='Text file, hub data set or "self".')] = "self",
        reading: Annotated[
            str, typer.Option(help="The paper's scales: scores or absorbed; norms: no learning.")
        ] = "scores",
        folds: Annotated[
            str,
            typer.Option(
                help="Beyond the paper: residual_order, values, query_key, value_order, mlp_order, commas between; "
                'auto: values, and for N:M levels mlp_order; "": none.'
            ),
        ] = "auto",
        start: Annotated[str, typer.Option(help="Where absorbed scales begin: medians (eq. 5) or ones.")] = "medians",
        penalty: Annotated[
            str, typer.Option(help="Beside the error of absorbed scales: spectral (eq. 8) or entropy.")
        ] = "spectral",
        scores: Annotated[str, typer.Option(help="Whose masks: wanda, or magnitude (absorbed only).")] = "wanda",
        levels: Annotated[str, typer.Option(help="Levels it will be pruned to.")] = "0.5,0.6,0.7,2:4",
        steps: Annotated[int, typer.Option(help="Optimiser steps, one level each.")] = 120,
        samples: Annotated[int, typer.Option(help="Calibration samples.")] = 256,
        length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
        seed: Annotated[int, typer.Option(help="Of the samples and of the order of levels.")] = 0,
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Fold blocks, learn what every input channel counts, write a plain Hugging Face model that computes the same.

        Its weights' magnitudes follow what was learned; elastic runs that score by activations read it from a file
        beside them.
        """
        names = [name.strip() for name in levels.split(",")]
        recipe = make_recipe(
            {
                "seed": seed,
                "model": {"id": model},
                "calibration": {"source": calibration, "samples": samples, "length": length},
                "ladder": {
                    "sparsities": [number_or_text(name) for name in names if ":" not in name],
                    "patterns": [name for name in names if ":" in name],
                },
                "scores": {"method": scores},
                "induction": {
                    "reading": reading,
                    "start": start,
                    "penalty": penalty,
                    "folds": "auto" if folds.strip() == "auto" else [x.strip() for x in folds.split(",") if x.strip()],
                    "steps": steps,
                    "samples": min(64, samples),
                    "held_out": max(1, min(8, samples // 4)),
                },
                "block": {"samples": min(128, samples)},
            },
            "induce",
        )
        from elastic_sparsity.inducing import induce as write_induced

        with progress(quiet) as report:
            found = write_induced(recipe, output, report)
        show_blocks(found.blocks)
        if not found.kl_before:
            say(f"{output}: induced model")
            return
        table = Table(title="KL to the dense model on held-out samples, nats a token (Wanda's masks)")
        for column in ("level", "before", "after"):
            table.add_column(column, justify="left" if column == "level" else "right")
        for name, before in found.kl_before.items():
            table.add_row(plain(name), f"{before:.3f}", f"{found.kl_after[name]:.3f}")
        Console(emoji=False).print(table)
        if not found.used:
            say("No gain: all scales are 1, and weights hold the norms of their inputs alone, as with --reading norms; "
                "try more --steps or other --calibration text.")  # fmt: skip
        say(f"{output}: induced model")
