"""The command `report`: a page and a model card about a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_sparsity.terminal import say


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command()(report)


def report(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="The page; default: report.html in the folder.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="A file of `eval --output` about this checkpoint or its base model; can be given again."),
    ] = None,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Also write README.md, the model card.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a page or card that is not ours.")] = False,
) -> None:
    """One HTML page that opens offline, and the model card README.md, from what the checkpoint recorded of itself.

    With --results also what `eval` measured of it later.
    """
    from elastic_sparsity.reporting import CARD_NAME, write_report

    page = write_report(checkpoint, output, results=results or (), card=card, force=force)
    say(f"{page}: the report" + (f"; {Path(checkpoint) / CARD_NAME}: the model card." if card else "."))
