"""The command line: arguments into one call each; tables, bars and errors for people."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from elastic_sparsity.config import Recipe, read_recipe
from elastic_sparsity.errors import ConfigError, ElasticSparsityError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")]
LevelOption = Annotated[str, typer.Option(help='A level of the ladder: "0.6", "60%" or "2:4".')]


def main() -> None:
    """Runs the app; a user's mistake becomes one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except ElasticSparsityError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(2)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Bars with time left for every stage, and the log above them."""
    import transformers  # slow import, only for commands that work

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True, quiet=quiet)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logger = logging.getLogger("elastic_sparsity")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def recipe_path(name: str) -> Path:
    """A recipe file, or a recipe of the package by name ("smoke", "smollm2-135m", ...).

    Raises: ConfigError: listing the package's recipes.
    """
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).parent
    folder = next(f for f in (here / "recipes", here.parent / "recipes") if f.is_dir())  # installed, or a checkout
    known = {path.stem: path for path in folder.glob("*.toml")}
    if name not in known:
        raise ConfigError(f"recipe {name!r}: no such file; recipes of the package: {', '.join(sorted(known))}.")
    return known[name]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the elastic checkpoint.")] = Path("elastic-smollm2-135m"),
    quiet: Quiet = False,
) -> None:
    """Make SmolLM2-135M elastic: no hub, no data set, 2 cores (the model comes through pip)."""
    _run(read_recipe(recipe_path("demo")), output, quiet)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one of the package's.")],
    output: Annotated[Path, typer.Option(help="Folder for the elastic checkpoint.")],
    model: Annotated[str | None, typer.Option(help="Model folder, hub id or .gguf file.")] = None,
    calibration: Annotated[str | None, typer.Option(help='Text file, hub data set or "self".')] = None,
    evaluation: Annotated[str | None, typer.Option(help="Text file to measure perplexity on.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: one run makes one elastic checkpoint."""
    overrides: dict[str, dict[str, Any]] = {}
    if model is not None:
        overrides["model"] = {"id": model}
    if calibration is not None:
        overrides["calibration"] = {"source": calibration}
    if evaluation is not None:
        overrides["evaluation"] = {"source": evaluation}
    _run(read_recipe(recipe_path(recipe), overrides), output, quiet)


def _run(recipe: Recipe, output: Path, quiet: bool) -> None:
    from elastic_sparsity.files import write_json
    from elastic_sparsity.measure import measure
    from elastic_sparsity.pipeline import optimize
    from elastic_sparsity.report import human_bytes, plot_results, results_table

    with _progress(quiet) as progress:
        checkpoint = optimize(recipe, output, progress)
        has_text = recipe.evaluation.source is not None or recipe.calibration.source == "self"
        rows = measure(recipe, checkpoint, progress) if has_text else []
    console = Console()
    if rows:
        protocol = checkpoint.config["quality"]["protocol"]
        title = f"{protocol['text']}, {protocol['windows'][0]} windows of {protocol['windows'][1]} tokens"
        console.print(results_table(rows, title))
        write_json(output / "results.json", {"protocol": protocol, "rows": rows})
        plot_results(rows, output / "results.png", title)
    size = human_bytes(checkpoint.total_bytes())
    console.print(f"{output}: one checkpoint of {size} serves {', '.join(x.title for x in checkpoint.ladder.levels)}.")


@app.command("slice")
def slice_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an elastic checkpoint.")],
    level: LevelOption,
    output: Annotated[Path, typer.Option(help="Folder for the plain Hugging Face model.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
) -> None:
    """Write one level as a plain Hugging Face folder that any tool opens."""
    from elastic_sparsity.precision import DTYPES
    from elastic_sparsity.slicing import save_sliced

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    with _progress(quiet=True):
        save_sliced(checkpoint, level, output, DTYPES[dtype] if dtype else None)
    Console().print(f"{output}: level {level}, open it with AutoModelForCausalLM.from_pretrained.")


@app.command("eval")
def eval_command(
    path: Annotated[str, typer.Argument(help="Elastic checkpoint, Hugging Face folder, hub id or .gguf file.")],
    text: Annotated[str, typer.Option(help="Text file to measure on.")],
    level: Annotated[str | None, typer.Option(help="One level of an elastic checkpoint; default: all.")] = None,
    reference: Annotated[str | None, typer.Option(help="Dense model, for KL.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.", min=8)] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Perplexity and KL to a reference, for dense, sliced and elastic models alike."""
    from elastic_sparsity.files import write_json
    from elastic_sparsity.measure import evaluate_path
    from elastic_sparsity.report import results_table

    if precision not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"--precision: {precision!r} is not auto, float32 or bfloat16.")
    with _progress(quiet) as progress:
        rows, protocol = evaluate_path(
            path,
            text,
            level=level,
            reference=reference,
            window=window,
            max_windows=max_windows,
            precision=precision,
            progress=progress,
        )
    counts = protocol["windows"]
    Console().print(results_table(rows, f"{protocol['text']}, {counts[0]} windows of {counts[1]} tokens"))
    if output is not None:
        write_json(output, {"protocol": protocol, "rows": rows})
