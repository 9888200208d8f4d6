"""Commands about the machine: what it can do, and how fast a checkpoint runs on it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from elastic_sparsity.errors import ConfigError
from elastic_sparsity.files import check_output_file
from elastic_sparsity.terminal import say

ProgressContext = Callable[[bool], AbstractContextManager[Any]]
"""Called with `quiet`; gives a context whose value is the progress callback."""


def register(app: typer.Typer, progress: ProgressContext) -> None:
    """Adds the commands to an app."""
    app.command()(doctor)

    @app.command()
    def bench(
        checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
        level: Annotated[list[str] | None, typer.Option(help="A level; may be given again. Default: all.")] = None,
        way: Annotated[list[str] | None, typer.Option(help="A way; may be given again. Default: all here.")] = None,
        batch: Annotated[str, typer.Option(help="Sequences decoded at once; 1 must be among them.")] = "1,8,32",
        prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
        new_tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.", min=1)] = 32,
        repeats: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
        threads: Annotated[int | None, typer.Option(help="Threads of torch; default: as it chooses.", min=1)] = None,
        device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
        name: Annotated[str | None, typer.Option(help="Name of the profile; default: the processor's.")] = None,
        output: Annotated[Path | None, typer.Option(help="File for the device profile (JSON).")] = None,
        quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")] = False,
    ) -> None:
        """Time dense and every other way that exists here, and say which to use; makes a device profile."""
        from elastic_sparsity.bench import bench as measure_device
        from elastic_sparsity.device_profile import write_profile
        from elastic_sparsity.device_report import lines_table, shapes_table, sizes_table, speed_table, verdict_lines
        from elastic_sparsity.precision import default_device

        if output is not None:
            check_output_file(output)
        with progress(quiet) as report:
            profile = measure_device(
                checkpoint,
                levels=level or None,
                ways=way or None,
                batches=parse_batches(batch),
                prompt=prompt,
                new_tokens=new_tokens,
                repeats=repeats,
                threads=threads,
                device=device or default_device(),
                name=name,
                progress=report,
            )
        console = Console(emoji=False)
        for table in (speed_table, sizes_table, shapes_table, lines_table):
            console.print(table(profile))
        for line in verdict_lines(profile):
            console.print(line, markup=False, soft_wrap=True)
        if output is not None:
            write_profile(profile, output)
            say(f"{output}: the device profile; give it to `slice --device-profile`.")


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What this machine can do: which ways to run a level exist here, and why the others do not."""
    from elastic_sparsity.device_report import machine_table, ways_table
    from elastic_sparsity.doctor import as_json, read_facts, verdicts

    facts = read_facts()
    rows = verdicts(facts)
    if json:
        typer.echo(dumps(as_json(facts, rows), indent=2))
        return
    console = Console(emoji=False)
    console.print(machine_table(facts))
    console.print(ways_table(rows))


def parse_batches(text: str) -> list[int]:
    """ "1,8,32" -> [1, 8, 32].

    Raises: ConfigError.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 7 for part in parts):
        raise ConfigError(f"--batch: {text!r} is no list of numbers; write e.g. 1,8,32.")
    return [int(part) for part in parts]
