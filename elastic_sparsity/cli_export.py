"""The command `export`: one level in the format of another tool."""

from pathlib import Path
from typing import Annotated

import typer

from elastic_sparsity.exports import FORMATS, export_level
from elastic_sparsity.terminal import say


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("export")(_export)


def _export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
    level: Annotated[str, typer.Option(help='A level of the ladder: "0.6", "60%" or "2:4".')],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; default: float32 for onnx and openvino, else the checkpoint's.")
    ] = None,
) -> None:
    """Write one level for ONNX Runtime, OpenVINO, llama.cpp or a sparse kernel; says what its zeros are worth there."""
    import transformers  # slow import, only here

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = export_level(checkpoint, level, output, format, dtype=dtype)
    say(f"{output}: level {made.level} as {format}: {made.gain}")
