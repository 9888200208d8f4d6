"""The command line: arguments into one call each; tables, bars and errors for people."""

import os
import sys
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from elastic_sparsity.cli_device import register as register_device
from elastic_sparsity.cli_eval import register as register_eval
from elastic_sparsity.cli_export import register as register_export
from elastic_sparsity.cli_induce import register as register_induce
from elastic_sparsity.cli_plan import register as register_plan
from elastic_sparsity.cli_progress import progress as progress_shown
from elastic_sparsity.cli_prune import register as register_prune
from elastic_sparsity.cli_report import register as register_report
from elastic_sparsity.cli_search import register as register_search
from elastic_sparsity.cli_structured import register as register_structured
from elastic_sparsity.config import Recipe, read_recipe
from elastic_sparsity.errors import ConfigError, ElasticSparsityError
from elastic_sparsity.files import is_file
from elastic_sparsity.terminal import plain, say

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
register_export(app)
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No bars and no log, only the result.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted run left.")]
LEVELS = 'A level: "0.6", "60%", "2:4", or "structured-0.5" if the checkpoint has one.'
LevelOption = Annotated[str, typer.Option(help=LEVELS)]


def main() -> None:
    """Runs the app; a user's mistake becomes one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except ElasticSparsityError as error:
        console = Console(emoji=False, stderr=True, soft_wrap=True)
        console.print("[bold red]error:[/]", end=" ", highlight=False)
        console.print(plain(str(error)), markup=False, highlight=False)
        sys.exit(2)


def recipe_path(name: str) -> Path:
    """A recipe file, or a recipe of the package by name ("smoke", "smollm2-135m", ...).

    Raises: ConfigError: listing the package's recipes.
    """
    if is_file(name):
        return Path(name)
    here = Path(__file__).parent
    folder = next(f for f in (here / "recipes", here.parent / "recipes") if f.is_dir())  # installed, or a checkout
    known = {path.stem: path for path in folder.glob("*.toml")}
    if name not in known:
        raise ConfigError(f"recipe {name!r}: no such file; recipes of the package: {', '.join(sorted(known))}.")
    return known[name]


register_plan(app, recipe_path)
register_induce(app, progress_shown)
register_search(app, progress_shown)
register_prune(app, progress_shown)
register_structured(app, progress_shown)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the elastic checkpoint.")] = Path("elastic-smollm2-135m"),
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Make SmolLM2-135M elastic: no hub, no data set, 2 cores (the model comes through pip)."""
    _run(read_recipe(recipe_path("demo")), output, quiet, restart)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one of the package's.")],
    output: Annotated[Path, typer.Option(help="Folder for the elastic checkpoint.")],
    model: Annotated[str | None, typer.Option(help="Model folder, hub id or .gguf file.")] = None,
    calibration: Annotated[str | None, typer.Option(help='Text file, hub data set or "self".')] = None,
    evaluation: Annotated[str | None, typer.Option(help="Text file to measure perplexity on.")] = None,
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: one run makes one elastic checkpoint. An interrupted run goes on when it is started again.

    So does its measuring of quality, if only that was interrupted.
    """
    overrides: dict[str, dict[str, Any]] = {}
    if model is not None:
        overrides["model"] = {"id": model}
    if calibration is not None:
        overrides["calibration"] = {"source": calibration}
    if evaluation is not None:
        overrides["evaluation"] = {"source": evaluation}
    _run(read_recipe(recipe_path(recipe), overrides), output, quiet, restart)


def _run(recipe: Recipe, output: Path, quiet: bool, restart: bool) -> None:
    from elastic_sparsity.files import write_json
    from elastic_sparsity.measure import measure
    from elastic_sparsity.measure_memory import check_memory, warn_of_memory
    from elastic_sparsity.pipeline import optimize
    from elastic_sparsity.quality_record import measures_quality, unmeasured
    from elastic_sparsity.report import human_bytes, plot_results, results_table
    from elastic_sparsity.workers import Workers

    check_memory(recipe)
    workers = Workers()
    with progress_shown(quiet or not workers.is_main) as progress:
        warn_of_memory(recipe, workers)
        made = None if restart else unmeasured(recipe, output)
        checkpoint = optimize(recipe, output, progress, restart=restart) if made is None else made
        rows = []
        if measures_quality(recipe):
            rows = measure(recipe, checkpoint, progress, made_earlier=made is not None)
    workers.close()
    if not workers.is_main:
        return
    console = Console(emoji=False)
    if rows:
        protocol = checkpoint.config["quality"]["protocol"]
        title = f"{protocol['text']}, {protocol['windows'][0]} windows of {protocol['windows'][1]} tokens"
        console.print(results_table(rows, title))
        write_json(output / "results.json", {"protocol": protocol, "rows": rows})
        plot_results(rows, output / "results.png", title)
    size = human_bytes(checkpoint.total_bytes())
    say(f"{output}: one checkpoint of {size} serves {', '.join(x.title for x in checkpoint.manifest.levels())}.")


@app.command("slice")
def slice_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    level: Annotated[str | None, typer.Option(help=LEVELS)] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Best level whose whole download fits, e.g. 60MB.")] = None,
    max_ms_per_token: Annotated[
        float | None, typer.Option(help="Best level that decodes a token in time; needs --device-profile.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(help="Dense perplexity / the level's; alone: the smallest level that has it."),
    ] = None,
    device_profile: Annotated[
        str | None, typer.Option(help="File made by bench, or an estimate of the package (phone, laptop-avx2, ...).")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help='"transformers": a plain model. "elastic": only the level\'s files.')
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
) -> None:
    """Write one level: as a plain Hugging Face folder that any tool opens, or as a smaller elastic checkpoint."""
    from elastic_sparsity.choosing import choose_level
    from elastic_sparsity.precision import DTYPES
    from elastic_sparsity.report import human_bytes
    from elastic_sparsity.sized import opened_by
    from elastic_sparsity.slicing import save_sliced
    from elastic_sparsity.transfer import copy_level

    chosen = format or ("transformers" if level is not None else "elastic")
    budgets: dict[str, Any] = {"max_bytes": max_bytes, "max_ms_per_token": max_ms_per_token, "min_quality": min_quality}
    has_budget = any(value is not None for value in budgets.values())
    if (level is not None) == has_budget:
        raise ConfigError("slice: give either --level or --max-bytes, --max-ms-per-token, --min-quality.")
    if level is not None and device_profile is not None:
        raise ConfigError("--device-profile: chooses a level under a budget; leave out it or --level.")
    if chosen not in ("transformers", "elastic"):
        raise ConfigError(f"--format: {format!r} is not transformers or elastic.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    if dtype is not None and chosen == "elastic":
        raise ConfigError("--dtype: an elastic output keeps the checkpoint's; leave it out, or write transformers.")
    if max_bytes is not None and chosen == "transformers":
        raise ConfigError("--max-bytes: a plain folder stores zeros too, all levels have one size there; use elastic.")
    if device_profile is not None and chosen == "transformers":
        raise ConfigError("--device-profile: a plain folder runs dense, all levels take one time there; use elastic.")
    with progress_shown(quiet=True):
        wanted = level
        if wanted is None:
            choice = choose_level(checkpoint, profile=device_profile, **budgets)
            wanted = choice.level
            say(choice.explanation)
        if chosen == "transformers":
            save_sliced(checkpoint, wanted, output, DTYPES[dtype] if dtype else None)
            how = opened_by(output)
        else:
            made = copy_level(checkpoint, wanted, output)
            size = human_bytes(made.bytes_of(made.find(wanted)))
            how = f"{size} of tensors; open it with ElasticModel.from_pretrained, add levels with `upgrade`"
    say(f"{output}: level {wanted}, {how}.")


@app.command()
def upgrade(
    folder: Annotated[Path, typer.Argument(help="A smaller elastic checkpoint, made by slice --format elastic.")],
    source: Annotated[str, typer.Option("--from", help="Folder or hub id of the whole checkpoint.")],
    level: LevelOption,
) -> None:
    """Add the files that a denser level needs to a device's smaller checkpoint."""
    from elastic_sparsity.transfer import upgrade as upgrade_folder

    with progress_shown(quiet=True):
        written = upgrade_folder(folder, source, level)
    say(f"{folder}: holds level {level}; added {', '.join(written) or 'nothing'}.")


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove every promise from the bytes; exit 1 if not.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Levels, bytes, quality, sparsity by layer type and block; with --verify, also whether it is what it claims."""
    from elastic_sparsity.inspection import block_sparsities, layer_types, levels
    from elastic_sparsity.report import checks_table, layer_table, levels_table
    from elastic_sparsity.structured_sizes import counts_text
    from elastic_sparsity.verify import verify as verify_folder

    with progress_shown(quiet=json) as progress:
        found = [asdict(level) for level in levels(checkpoint)]
        types = [asdict(kind) for kind in layer_types(checkpoint)]
        blocks = [asdict(block) for block in block_sparsities(checkpoint)]
        checks = [asdict(check) for check in verify_folder(checkpoint, progress)] if verify else []
    if json:
        typer.echo(dumps({"levels": found, "layer_types": types, "blocks": blocks, "checks": checks}, indent=2))
    else:
        console = Console(emoji=False)
        console.print(levels_table(found, checkpoint))
        titles = [level["title"] for level in found if not level["structured"]]
        console.print(layer_table(types, titles))
        if len({block["sparsity"] for block in blocks}) > 1:  # an allocation shared sparsity out to them
            console.print(layer_table(blocks, titles, what="block"))
        for level in (level for level in found if level["structured"]):
            heads, channels = counts_text(level["key_value_heads"]), counts_text(level["channels"])
            tuned = f"tuned by {level['tuning_steps']} steps" if level["tuning_steps"] else "not tuned"
            console.print(f"{level['title']}: {heads} key/value heads and {channels} MLP channels a block, {tuned}")
        if verify:
            console.print(checks_table(checks))
    if not all(check["passed"] for check in checks):
        raise typer.Exit(1)


@app.command("export-peft")
def export_peft_command(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an elastic checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder for one PEFT adapter folder a group.")],
    level: Annotated[str | None, typer.Option(help="Only the groups of this level.")] = None,
) -> None:
    """Write the adapters as PEFT LoRA folders."""
    from elastic_sparsity.peft_export import export_peft

    with progress_shown(quiet=True):
        names = export_peft(checkpoint, output, level)
    say(f"{output}: {', '.join(names)}, and levels.json. After a merge: reapply_masks_.")


@app.command()
def overlay(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an elastic checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder for masks and adapters.")],
    base: Annotated[str | None, typer.Option(help="Base model; default: the recorded one.")] = None,
) -> None:
    """Write masks and adapters without any weight of the base model."""
    from elastic_sparsity.overlay import write_overlay

    with progress_shown(quiet=True):
        write_overlay(checkpoint, output, base)
    say(f"{output}: holds no weight of the base; `restore` it beside the base model.")


@app.command()
def restore(
    overlay: Annotated[Path, typer.Argument(help="Folder made by overlay.")],
    output: Annotated[Path, typer.Option(help="Folder for the elastic checkpoint.")],
    base: Annotated[str | None, typer.Option(help="Where the base model is; default: the recorded id.")] = None,
) -> None:
    """Make the whole checkpoint again from an overlay and its base model, bit for bit."""
    from elastic_sparsity.overlay import restore_overlay

    with progress_shown(quiet=True):
        restore_overlay(overlay, output, base)
    say(f"{output}: the whole checkpoint, every file with its recorded sha256.")


register_eval(app, progress_shown)
register_device(app, progress_shown)
register_report(app)
