"""The command that says what a run needs before it runs."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic_sparsity.config import read_recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.free_memory import free_here
from elastic_sparsity.plan_sizes import STAGES
from elastic_sparsity.planning import Plan
from elastic_sparsity.planning import plan as plan_run
from elastic_sparsity.report import human_bytes, parse_bytes


def register(app: typer.Typer, recipe_path: Callable[[str], Path]) -> None:
    """Adds the command to an app. `recipe_path` finds a recipe by file or name."""

    @app.command()
    def plan(
        recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one of the package's.")],
        model: Annotated[str | None, typer.Option(help="Model folder, hub id or .gguf file.")] = None,
        calibration: Annotated[str | None, typer.Option(help='Text file, hub data set or "self".')] = None,
        config: Annotated[Path | None, typer.Option(help="A config.json to plan for, instead of the model's.")] = None,
        device_memory: Annotated[str | None, typer.Option(help="Of the GPU, e.g. 24GB.")] = None,
        host_memory: Annotated[str | None, typer.Option(help="Of the host, e.g. 64GB.")] = None,
        disk: Annotated[str | None, typer.Option(help="Free on the disk of the output, e.g. 500GB.")] = None,
        gpu: Annotated[
            bool | None, typer.Option("--gpu/--no-gpu", help="Default: as this machine, or with --device-memory.")
        ] = None,
        probe: Annotated[
            bool | None,
            typer.Option("--probe/--no-probe", help="Time one block here. Default: if the weights are here."),
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    ) -> None:
        """What a run will need of memory, disk and time, from the model's config alone; exit 2 if it does not fit.

        With a size given, other places have no limit; with none, the limits are what is free on this machine. With
        --config, or a --gpu that is not here, it is another machine, and only sizes are limits.
        """
        overrides: dict[str, dict[str, Any]] = {}
        if model is not None:
            overrides["model"] = {"id": model}
        if calibration is not None:
            overrides["calibration"] = {"source": calibration}
        limits = limits_of(**{"--device-memory": device_memory, "--host-memory": host_memory, "--disk": disk})
        if not limits and config is None:
            limits = limits_here(gpu)
        wanted = read_recipe(recipe_path(recipe), overrides)
        found = plan_run(wanted, config_file=config, limits=limits, gpu=gpu, probe=probe)
        if json:
            typer.echo(dumps(as_json(found), indent=2))
        else:
            show(found, Console(emoji=False))
        found.check()


def limits_here(gpu: bool | None) -> dict[str, int]:
    """What is free on this machine, without its GPU if it shall not be used; empty for a GPU that is not here."""
    free = {**free_here(), "disk": shutil.disk_usage(Path.cwd()).free}
    if gpu is False:
        free.pop("device", None)
    return {} if gpu and "device" not in free else free


def limits_of(**texts: str | None) -> dict[str, int]:
    """{"--host-memory": "64GB"} -> {"host": 64_000_000_000}.

    Raises: ConfigError: naming the option.
    """
    found = {}
    for option, text in texts.items():
        if text is not None:
            try:
                size = parse_bytes(text)
            except ConfigError as error:
                raise ConfigError(f"{option}: {error}") from None
            if not size:
                raise ConfigError(f"{option}: {text!r} is nothing; give what there is, e.g. 64GB.")
            found[option.removeprefix("--").removesuffix("-memory")] = size
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "model": plan.model,
        "choices": asdict(plan.choices),
        "limits": plan.limits,
        "fits": not plan.misfits,
        "peaks": [
            {"place": p.place, "bytes": p.bytes, "stage": p.stage, "terms": [t.name for t in p.terms]}
            for p in plan.peaks
        ],
        "terms": [asdict(term) for term in plan.terms],
        "work": [asdict(work) for work in plan.work],
        "probe": None if plan.timing is None else asdict(plan.timing),
        "seconds": plan.seconds,
        "knobs": [asdict(knob) for knob in plan.knobs],
    }


def show(plan: Plan, console: Console) -> None:
    """Prints a plan's tables."""
    c = plan.choices
    console.print(
        f"{plan.model}: weights {c.weights}, hidden states on {c.activations}, end to end {c.trainable}, "
        f"{c.precision} products, {'with' if c.gpu else 'without'} a GPU",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not plan.limits:
        console.print("No limits: give --device-memory, --host-memory or --disk to see whether it fits.")
    console.print(terms_table(plan))
    console.print(peaks_table(plan))
    console.print(work_table(plan))
    console.print(time_line(plan), markup=False, highlight=False, soft_wrap=True)


def terms_table(plan: Plan) -> Table:
    """Every term with its explanation; the peak's own are marked."""
    table = Table(title="what takes memory and disk (* = at the peak of its place)")
    for column in ("where", "what", "bytes", "stages", "how it is computed"):
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    at_peak = {id(term) for peak in plan.peaks for term in peak.terms}
    for peak in plan.peaks:
        for term in (term for term in plan.terms if term.place == peak.place):
            stages = "all" if term.stages == STAGES else ", ".join(term.stages)
            star = " *" if id(term) in at_peak else ""
            table.add_row(term.place, term.name + star, human_bytes(term.bytes), stages, term.why)
        table.add_section()
    return table


def peaks_table(plan: Plan) -> Table:
    """The peaks against the limits."""
    table = Table(title="peaks")
    for column in ("where", "peak", "in stage", "there is", "fits"):
        table.add_column(column, justify="right" if column in ("peak", "there is") else "left")
    for peak in plan.peaks:
        limit = plan.limits.get(peak.place)
        fits = "" if limit is None else "yes" if peak.bytes <= limit else "[bold red]NO[/]"
        table.add_row(
            peak.place, human_bytes(peak.bytes), peak.stage, "" if limit is None else human_bytes(limit), fits
        )
    return table


def work_table(plan: Plan) -> Table:
    """Token-passes and operations by kind."""
    table = Table(title="work (a token-pass is one token through one block, or through the head)")
    for column in ("phase", "kind", "direction", "token-passes", "operations"):
        table.add_column(column, justify="right" if column in ("token-passes", "operations") else "left")
    for work in plan.work:
        table.add_row(work.phase, work.name, work.direction, f"{work.passes:,}", f"{work.flops:.2e}")
    table.add_section()
    total, flops = sum(w.passes for w in plan.work), sum(w.flops for w in plan.work)
    table.add_row("", "all", "", f"{total:,}", f"{flops:.2e}")
    return table


def time_line(plan: Plan) -> str:
    """The estimated time, and what it comes from."""
    if plan.timing is None or plan.seconds is None:
        return "Time: not estimated. --probe times one block with random weights on this machine."
    t, hours = plan.timing, plan.seconds / 3600
    amount = f"{hours:.1f} hours" if hours >= 1 else f"{plan.seconds / 60:.1f} minutes"
    return (
        f"Time: about {amount} on this machine. An estimate from one block with random weights and {t.tokens:,} tokens "
        f"({t.forward:.3f} s forward, {t.step:.3f} s a training step of all groups, {t.masks:.3f} s for masks), "
        "without reading, writing and evaluation."
    )
