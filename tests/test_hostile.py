"""Thousands of bad arguments and recipes: each is refused in a few clear lines, at once, and nothing is harmed.

Everything is seeded. `hostile.py` says what counts; the last test prints the counts.
"""

# ruff: noqa: B023  every function made in a loop is called before the next turn

import itertools
from random import Random

import pytest
from conftest import tiny_recipe
from hostile import REFUSED
from hostile_fixtures import make
from hostile_inputs import (
    levels,
    on_the_command_line,
    places,
    recipes,
)
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

AT_LEAST = 5000


def test_recipes(ledger, tmp_path):
    path, refused = tmp_path / "recipe.toml", []
    for words, data in recipes(Random(1), 1200):
        path.write_bytes(data)
        outcome, _ = ledger.api("read_recipe", lambda: read_recipe(path), case=words, inputs=[path])
        if outcome == REFUSED:
            refused.append((words, data))
    for number, (words, data) in enumerate(refused[:130] + refused[130::3]):
        path.write_bytes(data)
        overrides = (["--calibration", "x.txt"], ["--model", "random:opt"], ["--evaluation", "x.txt"], [])[number % 4]
        model = (
            {
                "--calibration": {"calibration": {"source": "x.txt"}},
                "--model": {"model": {"id": "random:opt"}},
                "--evaluation": {"evaluation": {"source": "x.txt"}},
            }.get(overrides[0], {})
            if overrides
            else {}
        )
        outcome, _ = ledger.api(
            "read_recipe", lambda: read_recipe(path, model), case=f"{words}, {model}", inputs=[path]
        )
        if outcome == REFUSED:
            ledger.cli("train", path, *overrides, "--output", ledger.out, "-q", inputs=[path], case=words)


def test_levels(ledger, tiny_checkpoint):
    live = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    copy_level(tiny_checkpoint, 0.6, ledger.room / "device")
    device = ledger.room / "device"
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
    for level in levels(Random(2), 60):
        for name, call in calls.items():
            if level == "auto" and name in ("bench", "upgrade"):
                continue
            ledger.api(
                name,
                lambda: call(level),
                case=f"level {brief(level, 60)}",
                inputs=[tiny_checkpoint, device],
                keep=grown,
            )


def grown(old, new):
    """Whether an upgrade only added files."""
    return all(new.get(name) == content for name, content in old.items())


def test_levels_at_the_command_line(ledger, tiny_checkpoint, text_file):
    copy_level(tiny_checkpoint, 0.6, ledger.room / "device2")
    device = ledger.room / "device2"
    for level in map(on_the_command_line, [*LEVELS[::2], *itertools.islice(levels(Random(3), 100), len(LEVELS), None)]):
        if len(level) > 10**4:
            continue
        for arguments in (
            ["slice", tiny_checkpoint, f"--level={level}", "--output", ledger.out],
            ["slice", tiny_checkpoint, f"--level={level}", "--output", ledger.out, "--format", "elastic"],
            ["export", tiny_checkpoint, f"--level={level}", "--output", ledger.out, "--format", "bitmask"],
            ["export-peft", tiny_checkpoint, f"--level={level}", "--output", ledger.out],
            ["upgrade", device, "--from", tiny_checkpoint, f"--level={level}"],
            [
                "eval",
                tiny_checkpoint,
                "--text",
                text_file,
                f"--level={level}",
                "--window",
                "16",
                "--max-windows",
                "1",
                "-q",
            ],
        ):
            ledger.cli(*arguments, inputs=[tiny_checkpoint, device, text_file], keep=grown)


def test_budgets(ledger, tiny_checkpoint):
    values = (*LEVELS, *SIZES)
    for value in values:
        for name in ("max_bytes", "max_ms_per_token", "min_quality", "profile"):
            if value is None:
                continue
            options = {name: value} | (
                {"profile": "phone"} if name == "max_ms_per_token" else {"max_bytes": 1} if name == "profile" else {}
            )
            ledger.api(
                "choose_level", lambda: choose_level(tiny_checkpoint, **options), case=f"{name}={brief(value, 60)}"
            )
    for name in ("--max-bytes", "--max-ms-per-token", "--min-quality", "--device-profile"):
        for value in (*SIZES, *NUMBERS, *WORDS):
            if len(value) < 400:
                extra = (
                    ["--device-profile", "phone"]
                    if name == "--max-ms-per-token"
                    else ["--max-bytes", "1"]
                    if name == "--device-profile"
                    else []
                )
                ledger.cli("slice", tiny_checkpoint, f"{name}={value}", *extra, "--output", ledger.out)


def test_options(ledger, tiny_checkpoint):
    for value in (*LEVELS, *WORDS):
        for name in (
            "dtype",
            "device",
            "device_map",
            "runtime",
            "offload_folder",
            "device_profile",
            "merge_adapters",
            "revision",
            "cache_dir",
            "nonsense",
        ):
            if value is None or name == "merge_adapters" or (name == "device_map" and value == "auto"):
                continue
            ledger.api(
                "from_pretrained",
                lambda: ElasticModel.from_pretrained(tiny_checkpoint, 0.7, **{name: value}),
                case=f"{name}={brief(value, 60)}",
            )
        ledger.api(
            "export_level",
            lambda: export_level(tiny_checkpoint, 0.7, ledger.out, value),
            case=f"format={brief(value, 60)}",
        )
        ledger.api(
            "export_level",
            lambda: export_level(tiny_checkpoint, 0.7, ledger.out, "bitmask", dtype=value),
            case=f"dtype={brief(value, 60)}",
        )
        ledger.api(
            "save_sliced",
            lambda: save_sliced(tiny_checkpoint, 0.7, ledger.out, value),
            case=f"dtype={brief(value, 60)}",
        )


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
        "mixer": {"lr": (1e300,), "weights": ((1e308,) * 4, (1e-320,) * 4)},
        "adapters": {"ranks": (33, 10**6, 10**12, 2**70, (2, 2, 2, -1), (0,))},
        "ladder": {"patterns": (("2:3",), ("1:32",), ("31:32", "2:7"))},
        "evaluation": {"max_windows": (1,), "baseline_samples": (10**18,)},
        "checkpoint": {"dtype": ("float16",)},
    }
    for section, names in fields.items():
        for name, values in names.items():
            for value in values:
                for method in ("wanda", "obs"):
                    changes = {
                        "scores": {"method": method},
                        "end_to_end": {"trainable": "base"},
                        "mixer": {"mode": "learned"},
                    }
                    changes[section] = {**changes.get(section, {}), name: value}
                    ledger.api(
                        "optimize",
                        lambda: optimize(tiny_recipe(**changes), ledger.out),
                        case=f"{section}.{name}={brief(value, 30)}, {method}",
                    )


def test_command_lines(ledger, tiny_checkpoint, text_file, quick, tmp_path):
    random = Random(10)
    good = {
        "train": [quick],
        "slice": [tiny_checkpoint],
        "upgrade": [tmp_path],
        "inspect": [tiny_checkpoint],
        "export-peft": [tiny_checkpoint],
        "overlay": [tiny_checkpoint],
        "restore": [tiny_checkpoint],
        "eval": [tiny_checkpoint],
        "export": [tiny_checkpoint],
        "bench": [tiny_checkpoint],
        "doctor": [],
        "demo": [],
    }
    numbers = {
        "bench": ["--batch", "--prompt", "--new-tokens", "--repeats", "--threads", "--device", "--way", "--level"],
        "eval": ["--window", "--max-windows", "--precision", "--reference", "--level"],
        "slice": ["--dtype", "--format", "--level"],
        "export": ["--dtype", "--format", "--level"],
    }
    rest = {
        "bench": ["--prompt", "2", "--new-tokens", "1", "--repeats", "1", "--batch", "1"],
        "eval": ["--text", text_file, "-q"],
        "slice": ["--output", ledger.out],
        "export": ["--output", ledger.out],
    }
    for command, options in numbers.items():
        for option in options:
            for value in (*NUMBERS, *WORDS):
                if command == "bench" and value == "1_0":  # Python's 10, which takes a while
                    continue
                ledger.cli(command, *good[command], *rest[command], f"{option}={value}")
    pool = [
        "--level",
        "--output",
        "--format",
        "--from",
        "--text",
        "-q",
        "--nonsense",
        "-x",
        "--",
        "--help=1",
        "--verify",
        "--json",
        "--base",
        "--model",
        "=",
        "-",
        "0.7",
        "",
        "[/]",
        "\ud800",
        "--output=",
        "--level=",
        "-qq",
        "--no-quiet",
        "@file",
        "--version",
        "extra",
    ]
    for _ in range(400):
        command = random.choice([*good, "nonsense", "", "SLICE", "--level"])
        extra = random.choices(pool, k=random.randint(1, 4))
        if command in ("demo", "bench", "doctor"):
            extra.append("--nonsense")
        ledger.cli(command, *good.get(command, []), *extra)
    for output in places(make(tmp_path / "places")).values():
        ledger.cli(
            "eval",
            "random:llama",
            "--text",
            text_file,
            "--window",
            "64",
            "--max-windows",
            "1",
            "-q",
            f"--output={output}",
        )


def test_all_of_it(ledger, capsys):
    """The counts; run the whole file to get them."""
    with capsys.disabled():
        print(f"\n{ledger.table()}")
    if ledger.tests == {name for name in globals() if name.startswith("test_")}:
        assert ledger.bad_inputs() >= AT_LEAST
