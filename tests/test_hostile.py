"""Thousands of bad arguments and recipes: each is refused in a few clear lines, at once, and nothing is harmed.

Everything is seeded. `hostile.py` says what counts; test_hostile_total.py prints the counts of all these files.
"""

# ruff: noqa: B023  every function made in a loop is called before the next turn

import itertools
from random import Random

import pytest
from conftest import tiny_recipe
from hostile import REFUSED
from hostile_inputs import levels, make, on_the_command_line, places, recipes
from hostile_values import LEVELS, NUMBERS, SIZES, WORDS

from elastic_sparsity import (
    ElasticModel,
    choose_level,
    copy_level,
    export_level,
    export_peft,
    optimize,
    read_recipe,
    reapply_masks_,
    save_sliced,
    set_level,
    upgrade,
)
from elastic_sparsity.bench import bench
from elastic_sparsity.errors import brief

pytest_plugins = ("hostile_fixtures",)
pytestmark = pytest.mark.usefixtures("judged")

ONE_WINDOW = ("--window", "64", "--max-windows", "1", "-q")
ONE_TOKEN = ("--prompt", "2", "--new-tokens", "1", "--repeats", "1", "--batch", "1")


def test_recipes(ledger, tmp_path):
    path, number = tmp_path / "recipe.toml", 0
    overrides = (["--calibration", "x.txt"], ["--model", "random:opt"], ["--evaluation", "x.txt"], ["--restart"], [])
    for words, data in recipes(Random(1), 1200):
        path.write_bytes(data)
        outcome, _ = ledger.api("read_recipe", lambda: read_recipe(path), case=words, inputs=[path])
        number += outcome == REFUSED
        if outcome == REFUSED and (number < 130 or number % 3 == 0):  # the first ones are no random ones
            override = overrides[number % len(overrides)]
            ledger.cli("train", path, *override, "--output", ledger.out, "-q", inputs=[path], case=words)
            ledger.cli("plan", path, "--no-probe", inputs=[path], case=words)


def test_levels(ledger, tiny_checkpoint):
    live, device = ElasticModel.from_pretrained(tiny_checkpoint, 0.6), ledger.room / "device"
    copy_level(tiny_checkpoint, 0.6, device)
    calls = {
        "from_pretrained": lambda level: ElasticModel.from_pretrained(tiny_checkpoint, level),
        "set_level": lambda level: set_level(live, level),
        "save_sliced": lambda level: save_sliced(tiny_checkpoint, level, ledger.out),
        "copy_level": lambda level: copy_level(tiny_checkpoint, level, ledger.out),
        "export_level": lambda level: export_level(tiny_checkpoint, level, ledger.out, "bitmask"),
        "export_peft": lambda level: export_peft(tiny_checkpoint, ledger.out, [] if level is None else level),
        "reapply_masks_": lambda level: reapply_masks_(live, tiny_checkpoint, level),
        "upgrade": lambda level: upgrade(device, tiny_checkpoint, level),
        "bench": lambda level: bench(tiny_checkpoint, levels=[level], prompt=2, new_tokens=1, repeats=1, batches=(1,)),
    }
    inputs = [tiny_checkpoint, device]
    for level in levels(Random(2), 60):
        for name, call in calls.items():
            if level == "auto" and name in ("bench", "upgrade"):
                continue
            ledger.api(name, lambda: call(level), case=f"level {brief(level, 60)}", inputs=inputs, keep=grown)


def grown(old, new):
    """Whether an upgrade only added files."""
    return all(new.get(name) == content for name, content in old.items())


def test_levels_at_the_command_line(ledger, tiny_checkpoint, text_file):
    device = ledger.room / "device2"
    copy_level(tiny_checkpoint, 0.6, device)
    random_ones = itertools.islice(levels(Random(3), 100), len(LEVELS), None)
    for level in map(on_the_command_line, [*LEVELS[::2], *random_ones]):
        if len(level) > 10**4:
            continue
        this = (tiny_checkpoint, f"--level={level}")
        for arguments in (
            ["slice", *this, "--output", ledger.out],
            ["slice", *this, "--output", ledger.out, "--format", "elastic"],
            ["export", *this, "--output", ledger.out, "--format", "bitmask"],
            ["export-peft", *this, "--output", ledger.out],
            ["upgrade", device, "--from", *this],
            ["eval", *this, "--text", text_file, *ONE_WINDOW],
        ):
            ledger.cli(*arguments, inputs=[tiny_checkpoint, device, text_file], keep=grown)


def test_budgets(ledger, tiny_checkpoint):
    needed = {"max_ms_per_token": {"profile": "phone"}, "profile": {"max_bytes": 1}}  # or the value is never looked at
    for name in ("max_bytes", "max_ms_per_token", "min_quality", "profile"):
        for value in (*LEVELS, *SIZES):
            if value is not None:
                options = {name: value, **needed.get(name, {})}
                case = f"{name}={brief(value, 60)}"
                ledger.api("choose_level", lambda: choose_level(tiny_checkpoint, **options), case=case)
    needed = {"--max-ms-per-token": ["--device-profile", "phone"], "--device-profile": ["--max-bytes", "1"]}
    for name in ("--max-bytes", "--max-ms-per-token", "--min-quality", "--device-profile"):
        for value in (*SIZES, *NUMBERS, *WORDS):
            if len(value) < 400:
                extra = needed.get(name, [])
                ledger.cli("slice", tiny_checkpoint, f"{name}={value}", *extra, "--output", ledger.out)


OPTIONS = (
    "dtype", "device", "device_map", "runtime", "offload_folder", "device_profile", "revision", "cache_dir", "nonsense",
)  # fmt: skip


def test_options(ledger, tiny_checkpoint):
    calls = {
        "export_level format": lambda value: export_level(tiny_checkpoint, 0.7, ledger.out, value),
        "export_level dtype": lambda value: export_level(tiny_checkpoint, 0.7, ledger.out, "bitmask", dtype=value),
        "save_sliced dtype": lambda value: save_sliced(tiny_checkpoint, 0.7, ledger.out, value),
        **{
            f"from_pretrained {name}": lambda value, name=name: ElasticModel.from_pretrained(
                tiny_checkpoint, 0.7, **{name: value}
            )
            for name in OPTIONS
        },
    }
    for value in (*LEVELS, *WORDS):
        for name, call in calls.items():
            entry, _, option = name.partition(" ")
            if (value is None and entry == "from_pretrained") or (option == "device_map" and value == "auto"):
                continue  # the defaults
            ledger.api(entry, lambda: call(value), case=f"{option}={brief(value, 60)}")


def test_numbers_that_training_cannot_survive(ledger):
    fields = {
        "calibration": {"temperature": (1e-300, 1e300), "length": (8, 256), "samples": (6,)},
        "block": {
            "adapter_lr": (1e30, 1e300),
            "base_lr": (1e30, 1e300),
            "batch_size": (10**18,),
            "densest_weight": (1.0,),
        },
        "end_to_end": {
            "adapter_lr": (1e30, 1e300),
            "base_lr": (1e30, 1e300),
            "clip_norm": (1e-300, 1e300),
            "batch_size": (10**18,),
            "warmup": (1.0,),
        },
        "scores": {"damping": (1e-300, 1e300)},
        "allocation": {"slope": (-1.0, 1e-300, (0.0, 1.0, -1.0), (0.1,), ()), "plan": ("", "\0", "/", "a" * 5000)},
        "mixer": {"lr": (1e300,), "weights": ((1e308,) * 4, (1e-320,) * 4)},
        "adapters": {"ranks": (33, 10**6, 10**12, 2**70, (2, 2, 2, -1), (0,))},
        "ladder": {"patterns": (("2:3",), ("1:32",), ("31:32", "2:7"))},
        "evaluation": {"max_windows": (1,), "baseline_samples": (10**18,)},
        "checkpoint": {"dtype": ("float16",)},
        "memory": {"activations": ("disk", "evil"), "weights": ("stream", "evil")},
    }
    for section, name, value, method in (
        (section, name, value, method)
        for section, names in fields.items()
        for name, values in names.items()
        for value in values
        for method in ("wanda", "obs")
    ):
        changes = {"scores": {"method": method}, "end_to_end": {"trainable": "base"}, "mixer": {"mode": "learned"}}
        changes[section] = {**changes.get(section, {}), name: value}
        case = f"{section}.{name}={brief(value, 30)}, {method}"
        ledger.api("optimize", lambda: optimize(tiny_recipe(**changes), ledger.out), case=case)


PIECES = (
    "--level", "--output", "--format", "--from", "--text", "-q", "--nonsense", "-x", "--", "--help=1", "--verify",
    "--json", "--base", "--model", "=", "-", "0.7", "", "[/]", "\ud800", "--output=", "--level=", "-qq", "--no-quiet",
    "@file", "--version", "extra", "--restart", "--restart=x",
)  # fmt: skip
EVAL_OPTIONS = ("--window", "--max-windows", "--precision", "--reference", "--level")
INDUCE_OPTIONS = ("--levels", "--length", "--seed", "--calibration", "--reading", "--folds")
SEARCH_OPTIONS = ("--levels", "--length", "--seed", "--method", "--preset", "--held-out")
ONE_SEARCH = ("--samples", "2", "--length", "8", "--held-out", "8", "--generations", "1", "-q")
ONE_STEP = ("--steps", "1", "--samples", "6", "--length", "8", "-q")
PRUNE_OPTIONS = ("--structured", "--multiple", "--scores", "--length", "--damping", "--dtype", "--calibration")
FEW = ("--samples", "4", "--length", "8", "-q")
BENCH_OPTIONS = ("--batch", "--prompt", "--new-tokens", "--repeats", "--threads", "--device", "--way", "--level")


def test_command_lines(ledger, tiny_checkpoint, text_file, quick, tmp_path):
    """Options with bad values, then arguments thrown together."""
    numbers = {
        ("bench", tiny_checkpoint, *ONE_TOKEN): BENCH_OPTIONS,
        ("eval", tiny_checkpoint, "--text", text_file, "-q"): EVAL_OPTIONS,
        ("slice", tiny_checkpoint, "--output", ledger.out): ("--dtype", "--format", "--level"),
        ("export", tiny_checkpoint, "--output", ledger.out): ("--dtype", "--format", "--level"),
        ("induce", "random:llama", "--output", ledger.out, *ONE_STEP): INDUCE_OPTIONS,
        ("search", "random:llama", "--output", ledger.out, *ONE_SEARCH): SEARCH_OPTIONS,
        ("prune", "random:llama", "--structured", "0.5", "--output", ledger.out, *FEW): PRUNE_OPTIONS,
        ("plan", quick, "--no-probe"): ("--device-memory", "--host-memory", "--disk", "--config", "--model"),
    }
    for command, options in numbers.items():
        for option in options:
            for value in (*NUMBERS, *WORDS, *(SIZES if command[0] == "plan" else ())):
                if "\0" in value or len(value) > 10**4:  # no shell can pass it
                    continue
                if command[0] == "bench" and value == "1_0":  # Python's 10, which takes a while
                    continue
                ledger.cli(*command, f"{option}={value}")
    commands = ["slice", "inspect", "export-peft", "overlay", "restore", "eval", "export", "bench"]
    first = {
        **{command: [tiny_checkpoint] for command in commands},
        "train": [quick],
        "induce": ["random:llama", *ONE_STEP],
        "search": ["random:llama", *ONE_SEARCH],
        "prune": ["random:llama", "--structured", "0.5", *FEW],
        "plan": [quick, "--no-probe"],
        "upgrade": [tmp_path],
    }
    random = Random(10)
    for _ in range(400):
        command = random.choice([*first, "doctor", "demo", "nonsense", "", "SLICE", "--level"])
        extra = []
        for piece in random.choices(PIECES, k=random.randint(1, 4)):
            extra += [piece, ledger.out] if piece == "--output" else [piece]
        if command in ("demo", "bench", "doctor"):  # they might run, and take long
            extra.append("--nonsense")
        ledger.cli(command, *first.get(command, []), *extra)
    for output in places(make(tmp_path / "places")).values():
        ledger.cli("eval", "random:llama", "--text", text_file, *ONE_WINDOW, f"--output={output}")
