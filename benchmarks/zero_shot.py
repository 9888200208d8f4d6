"""What does a level cost in zero-shot accuracy, next to the dense model and to one-shot pruning of each level alone?

lm-evaluation-harness over the models in memory, with the task files of `tasks/` and a folder of their .jsonl data
(PIQA, ARC-Easy, ARC-Challenge, OpenBookQA, WinoGrande, BoolQ, LAMBADA). A cell is one method at one level on one task.
Every cell is written to `results/NAME.json` when it is there, and the same command goes on with those that are missing:
it may be stopped at any time. Baselines are pruned on the first samples of the checkpoint's own calibration set.

    python benchmarks/zero_shot.py elastic-smollm2-135m --task-data zero_shot --dense --baselines wanda sparsegpt \\
        --calibration abc-news.txt
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import HERE, add_place, check_texts, exit_on_error, log, read_result, stamp
from rich.console import Console

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.baselines import prune_one_shot_
from elastic_sparsity.calibration_text import calibration_tokens
from elastic_sparsity.config import Recipe, make_recipe
from elastic_sparsity.data import token_hash
from elastic_sparsity.errors import ConfigError, NumericsError
from elastic_sparsity.files import write_json
from elastic_sparsity.measure import as_shipped, zero_shot_protocol
from elastic_sparsity.models import BaseModel, load_base
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.report import check_documents, plot_tasks, task_means, tasks_table
from elastic_sparsity.slicing import load_tokenizer
from elastic_sparsity.task_files import load_tasks
from elastic_sparsity.zero_shot import check_amounts, score_task

TASKS = "piqa,arc_easy,arc_challenge,openbookqa,winogrande,boolq,lambada_openai"


def main() -> None:
    args = arguments()
    check_texts(args.calibration)
    checkpoint = ElasticCheckpoint(args.checkpoint)
    tasks = asked_tasks(args)
    protocol = zero_shot_protocol(args.limit, args.precision) | {
        "checkpoint_id": checkpoint.config["checkpoint_id"],
        "base_model": checkpoint.config["base_model"],
        "baseline_samples": args.baseline_samples,
    }
    path = args.results / f"{args.name}.json"
    result = begun(path, protocol)
    tokenizer = load_tokenizer(args.checkpoint)
    for level, method, make in models(args, checkpoint, protocol["precision"]):
        done = {row["task"] for row in result["rows"] if (row["level"], row["method"]) == (level, method)}
        missing = [name for name in tasks if name not in done]
        if not missing:
            continue
        title = f"{method} {level}"
        try:
            for score in scores(make(), tokenizer, tasks, missing, args, protocol["precision"], title):
                result.get("failures", {}).pop(title, None)  # of an earlier start
                row = {"level": level, "method": method, **score}
                check_documents([*result["rows"], row])
                result["rows"].append(row)
                write_json(path, result)
        except NumericsError as error:  # of one model; the others can still be measured
            log(f"{title} failed: {error}")
            result.setdefault("failures", {})[title] = {"error": str(error), **stamp(protocol["seed"])}
            write_json(path, result)
    show(result, path.with_suffix(".png"))


def add_task_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--task-data", required=required, help="folder of the tasks' .jsonl files")
    parser.add_argument("--task-folder", default=HERE / "tasks", help="folder of task files")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, help="only the first documents of every task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="auto")


def asked_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Raises: ConfigError, DataError: if a task, its data or the harness is missing."""
    check_amounts(args.limit, args.batch_size)
    return load_tasks(args.tasks.split(","), folder=args.task_folder, data=args.task_data, limit=args.limit)


def scores(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    names: Iterable[str],
    args: argparse.Namespace,
    precision: str,
    title: str,
) -> Iterator[dict[str, Any]]:
    """A model's score on each named task as plain data, with the seconds it took, as soon as it is there."""
    for name in names:
        started = time.monotonic()
        score = score_task(
            model, tokenizer, name, tasks[name], limit=args.limit, batch_size=args.batch_size, precision=precision
        )
        seconds = round(time.monotonic() - started, 1)
        log(f"{title} {name}: {score.metric} {score.value:.4f} in {seconds:.0f} s")
        yield {**asdict(score), "seconds": seconds}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    add_task_arguments(parser, required=True)
    parser.add_argument("--levels", nargs="*", help="levels of the checkpoint; default: all")
    parser.add_argument("--dense", action="store_true", help="also the base model")
    parser.add_argument("--baselines", nargs="*", default=[], help="magnitude, wanda, obs, sparsegpt")
    parser.add_argument("--baseline-samples", type=int, default=128)
    parser.add_argument("--calibration", help="the text it was trained on; default: the path in its recipe")
    add_place(parser, "zero_shot")
    return parser.parse_args()


def begun(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """What an earlier start with this protocol left, or a new result.

    Raises: ConfigError: if the file is of another protocol: its cells cannot stand beside new ones.
    """
    if path.is_file():
        result = read_result(path, ("protocol", "rows"))
        if result["protocol"] != protocol:
            raise ConfigError(f"{path}: has the protocol {result['protocol']}, not {protocol}; give another --name.")
        log(f"{path}: goes on after {len(result['rows'])} cells")
        return dict(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    return {**stamp(protocol["seed"], ("lm-eval", "datasets")), "protocol": protocol, "rows": []}


def models(
    args: argparse.Namespace, checkpoint: ElasticCheckpoint, precision: str
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(level, method, function that makes the model) of all that is to be measured; nothing is made unless called."""
    data = dict(checkpoint.config["recipe"])
    if args.calibration:
        data["calibration"] = {**data["calibration"], "source": args.calibration}
    recipe = make_recipe(data)
    held: dict[str, Any] = {}

    def base() -> Any:
        if "base" not in held:
            held["base"] = load_base(recipe.model.id, recipe.model.dtype)
            if precision == "float32":  # also of weights in 16 bits: the protocol says what was computed
                held["base"].model.float()
        return held["base"]

    def elastic(level: Any) -> Any:
        return as_shipped(checkpoint, level, base().model)

    def one_shot(level: Any, method: str) -> Any:
        if "tokens" not in held:
            held["tokens"] = calibration_of(checkpoint, recipe, base())[: args.baseline_samples]
        model = copy.deepcopy(base().model)
        prune_one_shot_(
            model, held["tokens"], level, method, damping=recipe.scores.damping, batch_size=recipe.block.batch_size,
            autocast=autocast_factory(precision, model.device.type),
        )  # fmt: skip
        return model

    if args.dense:
        yield "dense", "dense", lambda: base().model
    levels = [checkpoint.ladder.find(name) for name in args.levels or [x.name for x in checkpoint.ladder.levels]]
    for level in levels:
        yield level.name, "elastic", lambda level=level: elastic(level)  # type: ignore[misc]
    for level in levels:
        for method in args.baselines:
            yield level.name, method, lambda level=level, method=method: one_shot(level, method)  # type: ignore[misc]


def calibration_of(checkpoint: ElasticCheckpoint, recipe: Recipe, base: BaseModel) -> torch.Tensor:
    """(S, T) samples that a checkpoint was trained on.

    Raises: ConfigError: if the text that is there gives others.
    """
    ids_ST, recorded = calibration_tokens(recipe, base)[0], checkpoint.config["data"]["calibration_sha256"]
    if token_hash(ids_ST) != recorded:
        raise ConfigError(
            f"--calibration: {recipe.calibration.source} gives samples of sha256 {token_hash(ids_ST)[:12]}..., "
            f"{checkpoint.folder} was trained on {recorded[:12]}...; name the text that it was trained on."
        )
    return ids_ST


def show(result: dict[str, Any], picture: Path) -> None:
    """One table, and a plot of the means if there are any."""
    order = {level: number for number, level in enumerate(dict.fromkeys(row["level"] for row in result["rows"]))}
    rows = sorted(result["rows"], key=lambda row: order[row["level"]])
    documents = result["protocol"]["documents"]
    title = f"zero-shot, % right ± standard error ({documents} documents a task)"
    Console(width=200).print(tasks_table(rows, title))
    for name, failure in result.get("failures", {}).items():
        Console(width=150).print(f"{name} failed: {failure['error']}", markup=False, style="red")
    if task_means(rows):
        plot_tasks(rows, picture, f"mean of {len({row['task'] for row in rows})} zero-shot tasks")


if __name__ == "__main__":
    exit_on_error(main)
