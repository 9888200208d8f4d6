"""Thousands of bad inputs at every entry point: each is refused in a few clear lines, at once, and nothing is harmed.

Everything is seeded. `hostile.py` says what counts; the last test prints the counts.
"""

import functools
import itertools
import json
import os
import shutil
from pathlib import Path
from random import Random

import huggingface_hub.constants
import pytest
from conftest import merging_tokenizer, tiny_recipe
from hostile import REFUSED, VALID, Ledger, edited, fingerprint, nodes, replaced
from hostile_inputs import (
    LEVELS,
    NUMBERS,
    QUICK,
    RECIPE,
    SIZES,
    WORDS,
    levels,
    on_the_command_line,
    places,
    recipes,
)
from hostile_models import JSON_VALUES, MODELS, Workshop, models, text_paths, texts

from elastic_sparsity import (
    ElasticModel,
    choose_level,
    copy_level,
    export_level,
    export_peft,
    load_packed,
    optimize,
    read_recipe,
    reapply_masks_,
    restore_overlay,
    save_sliced,
    set_level,
    upgrade,
    verify,
    write_overlay,
)
from elastic_sparsity import levels as list_levels
from elastic_sparsity.bench import bench
from elastic_sparsity.data import read_text
from elastic_sparsity.device_profile import profile_path, read_profile
from elastic_sparsity.errors import brief
from elastic_sparsity.files import atomic_folder
from elastic_sparsity.inspection import layer_types
from elastic_sparsity.models import load_base
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

AT_LEAST = 5000


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return Ledger(tmp_path_factory.mktemp("ledger"))


@pytest.fixture(autouse=True)
def judged(ledger, monkeypatch, request):
    """Every test here runs offline in an empty folder, and fails if one of its cases was a problem."""
    monkeypatch.chdir(ledger.here)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", refuse_to_connect)
    ledger.tests.add(request.node.name.partition("[")[0])
    before = len(ledger.problems)
    yield
    ledger.check(before)


def refuse_to_connect(*_):
    raise OSError("no network in tests")


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "good.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def quick(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path


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
        model = {"--calibration": {"calibration": {"source": "x.txt"}}, "--model": {"model": {"id": "random:opt"}},
                 "--evaluation": {"evaluation": {"source": "x.txt"}}}.get(overrides[0], {}) if overrides else {}  # fmt: skip
        outcome, _ = ledger.api(
            "read_recipe", lambda: read_recipe(path, model), case=f"{words}, {model}", inputs=[path]
        )
        if outcome == REFUSED:
            ledger.cli("train", path, *overrides, "--output", ledger.out, "-q", inputs=[path], case=words)


def test_recipe_paths(ledger, tmp_path):
    for words, path in {
        **places(tmp_path),
        **{x: x for x in WORDS},
        "endless": "/dev/zero",
        "urandom": "/dev/urandom",
    }.items():
        ledger.api("read_recipe", lambda: read_recipe(path), case=words)
        ledger.cli("train", path, "--output", ledger.out, "-q", case=f"recipe {words}")


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


def test_paths_of_checkpoints(ledger, tiny_checkpoint, tmp_path, text_file):
    """What should be a checkpoint's folder is something else."""
    everything = {
        **places(tmp_path),
        **{x: x for x in WORDS},
        **{f"text {k}": v for k, v in text_paths(make(tmp_path / "texts")).items()},
        "text file": text_file,
    }
    for words, path in everything.items():
        for name, call in {
            "from_pretrained": lambda: ElasticModel.from_pretrained(path, 0.7),
            "levels": lambda: list_levels(path),
            "verify": lambda: verify(path),
            "choose_level": lambda: choose_level(path, max_bytes=10**9),
            "copy_level": lambda: copy_level(path, 0.7, ledger.out),
            "upgrade": lambda: upgrade(path, tiny_checkpoint, 0.7),
            "write_overlay": lambda: write_overlay(path, ledger.out),
            "restore_overlay": lambda: restore_overlay(path, ledger.out),
            "load_packed": lambda: load_packed(path),
            "export_peft": lambda: export_peft(path, ledger.out),
            "bench": lambda: bench(path, prompt=2, new_tokens=1, repeats=1, batches=(1,)),
            "read_profile": lambda: read_profile(path),
            "load_base": lambda: load_base(str(path)),
        }.items():  # fmt: skip
            ledger.api(name, call, case=f"path {words}")
        for arguments in (
            ["inspect", path], ["slice", path, "--level", "0.7", "--output", ledger.out], ["eval", path, "--text", text_file, "-q"],
            ["overlay", path, "--output", ledger.out], ["restore", path, "--output", ledger.out], ["export-peft", path, "--output", ledger.out],
            ["slice", tiny_checkpoint, "--max-ms-per-token", "1", "--device-profile", path, "--output", ledger.out], ["bench", path, "-q"],
            ["upgrade", path, "--from", tiny_checkpoint, "--level", "0.7"], ["export", path, "--level", "0.7", "--format", "bitmask", "--output", ledger.out],
        ):  # fmt: skip
            ledger.cli(*arguments, case=f"{arguments[0]} path {words}")


def make(folder):
    folder.mkdir()
    return folder


def test_places_for_outputs(ledger, tiny_checkpoint, tmp_path, text_file, quick, good_model):
    room = make(tmp_path / "places")
    overlay = make_overlay(ledger.room / "overlays")
    for words, place in places(room).items():
        for name, call in {
            "optimize": lambda: optimize(tiny_recipe(), place),
            "save_sliced": lambda: save_sliced(tiny_checkpoint, 0.7, place),
            "copy_level": lambda: copy_level(tiny_checkpoint, 0.7, place),
            "export_level": lambda: export_level(tiny_checkpoint, 0.7, place, "bitmask"),
            "export_peft": lambda: export_peft(tiny_checkpoint, place),
            "write_overlay": lambda: write_overlay(overlay / "checkpoint", place),
            "restore_overlay": lambda: restore_overlay(overlay / "overlay", place),
        }.items():
            ledger.api(name, call, case=f"output {words}", inputs=[room])
        for arguments in (
            ["train", quick, "-q", "--output", place], ["demo", "-q", "--output", place], ["slice", tiny_checkpoint, "--level", "0.7", "--output", place],
            ["slice", tiny_checkpoint, "--max-bytes", "9MB", "--output", place], ["export", tiny_checkpoint, "--level", "0.7", "--format", "bitmask", "--output", place],
            ["export-peft", tiny_checkpoint, "--output", place], ["overlay", overlay / "checkpoint", "--output", place], ["restore", overlay / "overlay", "--output", place],
        ):  # fmt: skip
            ledger.cli(*arguments, inputs=[room], case=f"{arguments[0]} output {words}")


def make_overlay(room):
    """A checkpoint that can have an overlay, and that."""
    if not room.exists():
        optimize(tiny_recipe(end_to_end={"trainable": "adapters"}, evaluation={"max_windows": 1}), room / "checkpoint")
        write_overlay(room / "checkpoint", room / "overlay")
    return room


def test_texts(ledger, tmp_path, quick):
    here = make(tmp_path / "texts")
    quick_text = quick.read_text()
    for number, (name, data) in enumerate(texts(Random(4), 100)):
        path = here / name
        path.write_bytes(data)
        ledger.api("read_text", lambda: read_text(str(path)), case=name, inputs=[path])
        if len(data) < 10**5:
            ledger.cli(
                "eval", "random:llama", "--text", path, "--window", "64", "--max-windows", "1", "-q", inputs=[path]
            )
            option = ("--calibration", "--evaluation")[number % 2]
            ledger.cli("train", quick, option, path, "--output", ledger.out, "-q", inputs=[path])
        path.unlink()
    for words, path in text_paths(make(tmp_path / "paths")).items():
        ledger.api("read_text", lambda: read_text(str(path)), case=words)
        ledger.cli("eval", "random:llama", f"--text={path}", "--window", "64", "-q", case=f"eval {words}")
        for option in ("--calibration", "--evaluation"):
            ledger.cli("train", quick, f"{option}={path}", "--output", ledger.out, "-q", case=f"train {option} {words}")
    assert quick.read_text() == quick_text


def test_base_models(ledger, good_model, tmp_path, quick, text_file):
    workshop = Workshop(good_model, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    for number, (words, damage) in enumerate(models(Random(5), 250)):
        import sys, time

        print(time.time(), number, words, file=sys.__stderr__, flush=True)
        folder = workshop.make(damage)
        ledger.api("load_base", lambda: load_base(str(folder)), case=words, inputs=[folder])
        kind = number % 3
        if kind == 0 or number < len(MODELS) // 2:
            ledger.cli(
                "train", quick, "--model", folder, "--output", ledger.out, "-q", inputs=[folder], case=f"train {words}"
            )
        if kind == 1:
            ledger.cli(
                "eval",
                folder,
                "--text",
                text_file,
                "--window",
                "64",
                "--max-windows",
                "1",
                "-q",
                inputs=[folder],
                case=f"eval {words}",
            )
        if kind == 2:
            ledger.cli(
                "eval",
                "random:llama",
                "--reference",
                folder,
                "--text",
                text_file,
                "--window",
                "64",
                "--max-windows",
                "1",
                "-q",
                inputs=[folder],
                case=f"reference {words}",
            )
    for value in (
        *WORDS,
        *(f"random:{word}" for word in WORDS),
        *(f"pypi:{word}" for word in WORDS),
        *(f"{word}.gguf" for word in WORDS),
    ):
        ledger.api("load_base", lambda: load_base(value), case=repr(value))
        ledger.cli("train", quick, f"--model={value}", "--output", ledger.out, "-q")


def test_gguf_files(ledger, tmp_path, quick):
    good = make_gguf(tmp_path / "good")
    random, path = Random(6), tmp_path / "bad.gguf"
    for number in range(80):
        head = 2000 if number % 2 else len(good)
        path.write_bytes(edited(good[:head], random) + good[head:] if number > 20 else good[: number * len(good) // 21])
        ledger.api("load_base", lambda: load_base(str(path)), case=f"gguf {number}", inputs=[path])
        if number % 4 == 0:
            ledger.cli(
                "train",
                quick,
                "--model",
                path,
                "--output",
                ledger.out,
                "-q",
                inputs=[path],
                case=f"train gguf {number}",
            )


def make_gguf(folder):
    from elastic_sparsity.export_gguf import GGUF_FILE, write_gguf

    folder.mkdir()
    tokenizer = merging_tokenizer()
    write_gguf(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, folder)
    return (folder / GGUF_FILE).read_bytes()


def test_numbers_that_training_cannot_survive(ledger):
    fields = {
        "calibration": {"temperature": (1e-300, 1e300), "length": (8, 256), "samples": (6,)},
        "block": {"adapter_lr": (1e30, 1e300), "base_lr": (1e30, 1e300), "batch_size": (10**18,), "densest_weight": (1.0,)},
        "end_to_end": {"adapter_lr": (1e30, 1e300), "base_lr": (1e30, 1e300), "clip_norm": (1e-300, 1e300), "batch_size": (10**18,), "warmup": (1.0,)},
        "scores": {"damping": (1e-300, 1e300)}, "mixer": {"lr": (1e300,), "weights": ((1e308,) * 4, (1e-320,) * 4)},
        "adapters": {"ranks": (33, 10**6, 10**12, 2**70)}, "ladder": {"patterns": (("2:3",), ("1:32",), ("31:32", "2:7"))},
        "evaluation": {"max_windows": (1,), "baseline_samples": (10**18,)}, "checkpoint": {"dtype": ("float16",)},
    }  # fmt: skip
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


def damaged_json(path, random):
    root = json.loads(path.read_text())
    words = replaced(root, random)
    path.write_text(json.dumps(root))
    return words


def test_checkpoints(ledger, tiny_checkpoint, tmp_path):
    """Every file of a checkpoint, at every command that opens one."""
    random, folder = Random(7), tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    names = sorted(path.name for path in tiny_checkpoint.iterdir())
    live = ElasticModel.from_pretrained(tiny_checkpoint, 0.6)
    level = lambda: random.choice(("0.5", "0.6", "0.7", "2:4", "auto"))
    calls = {
        "from_pretrained": lambda: ElasticModel.from_pretrained(folder, level()),
        "levels": lambda: list_levels(folder),
        "layer_types": lambda: layer_types(folder),
        "verify": lambda: failed(verify(folder)),
        "save_sliced": lambda: save_sliced(folder, level(), ledger.out),
        "copy_level": lambda: copy_level(folder, level(), ledger.out),
        "choose_level": lambda: choose_level(folder, profile="phone", max_ms_per_token=1e6, min_quality=1e-6),
        "export_peft": lambda: export_peft(folder, ledger.out),
        "export_level": lambda: export_level(
            folder, level(), ledger.out, random.choice(("bitmask", "packed-2of4", "gguf"))
        ),
        "write_overlay": lambda: write_overlay(folder, ledger.out),
        "reapply_masks_": lambda: reapply_masks_(live, folder, level()),
        "bench": lambda: bench(folder, prompt=2, new_tokens=1, repeats=1, batches=(1,), ways=["dense-float32"]),
    }
    commands = (
        ["inspect", folder], ["inspect", folder, "--json"], ["inspect", folder, "--verify"], ["slice", folder, "--level", "0.7", "--output", ledger.out],
        ["slice", folder, "--max-bytes", "1GB", "--output", ledger.out], ["export", folder, "--level", "2:4", "--format", "bitmask", "--output", ledger.out],
        ["export-peft", folder, "--output", ledger.out], ["overlay", folder, "--output", ledger.out], ["upgrade", folder, "--from", tiny_checkpoint, "--level", "0.7"],
        ["slice", folder, "--max-ms-per-token", "100", "--device-profile", "phone", "--output", ledger.out],
    )  # fmt: skip
    for number in range(1500):
        name = random.choice((*names, "elastic_config.json", "config.json"))
        path, original = folder / name, (folder / name).read_bytes()
        if name.endswith(".json") and number % 2:
            words = f"{name}: {damaged_json(path, random)}"
            if name == "elastic_config.json" and number % 4 == 1:
                right_digest(path)
        else:
            words = f"{name} edited, number {number}"
            path.write_bytes(edited(original, random))
        if number % 5 == 4:
            command = random.choice(commands)
            ledger.cli(
                *command,
                inputs=[folder],
                case=f"{' '.join(map(str, command[:3]))} {words}",
                keep=repaired(tiny_checkpoint),
                damage_code=1,
            )
        else:
            call = random.choice(list(calls))
            ledger.api(call, calls[call], case=words, inputs=[folder])
        path.write_bytes(original)


def right_digest(path):
    from elastic_sparsity.manifest import digest

    try:
        root = json.loads(path.read_text())
        root["digest"] = digest(root)
        path.write_text(json.dumps(root))
    except (KeyError, ValueError):
        pass


def failed(checks):
    bad = [check for check in checks if not check.passed]
    return f"{REFUSED}: {bad[0].detail}" if bad else None


def repaired(pristine):
    """Whether what an upgrade changed is now as in the whole checkpoint."""
    whole = fingerprint(pristine)
    return lambda old, new: all(content == old.get(name) or content == whole.get(name) for name, content in new.items())


def test_damaged_sources_targets_and_overlays(ledger, tiny_checkpoint, tmp_path):
    random = Random(8)
    made = make_overlay(ledger.room / "overlays")
    copy_level(tiny_checkpoint, 0.7, tmp_path / "device")
    export_level(tiny_checkpoint, "2:4", tmp_path / "bitmask", "bitmask")
    export_level(tiny_checkpoint, "2:4", tmp_path / "packed", "packed-2of4", dtype="float16")
    shutil.copytree(tiny_checkpoint, tmp_path / "source")
    shutil.copytree(made / "overlay", tmp_path / "overlay")
    jobs = {
        "upgrade": ("source", lambda: upgrade(tmp_path / "device", tmp_path / "source", "0.5")),
        "upgrade of": ("device", lambda: upgrade(tmp_path / "device", tmp_path / "source", "0.5")),
        "restore_overlay": ("overlay", lambda: restore_overlay(tmp_path / "overlay", ledger.out)),
        "load_packed": ("bitmask", lambda: load_packed(tmp_path / "bitmask")),
        "load_packed 2:4": ("packed", lambda: load_packed(tmp_path / "packed")),
    }
    whole = repaired(tiny_checkpoint)
    pristine = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name, _ in jobs.values()}
    for number in range(700):
        entry, (name, call) = random.choice(list(jobs.items()))
        path = tmp_path / name / random.choice(sorted(pristine[name]))
        if path.suffix == ".json" and number % 2:
            words = f"{path.name}: {damaged_json(path, random)}"
        elif number % 7 == 0:
            path.unlink()
            words = f"{path.name} missing"
        else:
            words = f"{path.name} edited, number {number}"
            path.write_bytes(edited(path.read_bytes(), random))
        ledger.api(
            entry,
            call,
            case=words,
            inputs=[tmp_path / name, tmp_path / "device"],
            keep=whole if "upgrade" in entry else None,
        )
        if entry == "restore_overlay" and number % 3 == 0:
            ledger.cli(
                "restore",
                tmp_path / "overlay",
                "--output",
                ledger.out,
                inputs=[tmp_path / "overlay"],
                case=f"restore {words}",
            )
        for folder, files in pristine.items():
            for extra in {p.name for p in (tmp_path / folder).iterdir()} - files.keys():
                (tmp_path / folder / extra).unlink()
            for file, data in files.items():
                if folder in (name, "device"):
                    (tmp_path / folder / file).write_bytes(data)


def test_device_profiles(ledger, tiny_checkpoint, tmp_path):
    random, path = Random(9), tmp_path / "profile.json"
    profile = bench(tiny_checkpoint, prompt=2, new_tokens=1, repeats=1, batches=(1,), levels=["0.7"])
    measured = json.dumps(profile.model_dump()).encode()
    estimate = profile_path("phone").read_bytes()
    for number in range(900):
        path.write_bytes((measured, estimate)[number % 2])
        if number % 3:
            words = damaged_json(path, random)
        else:
            words = f"edited, number {number}"
            path.write_bytes(edited(path.read_bytes(), random))
        if number % 4:
            ledger.api("read_profile", lambda: read_profile(path), case=words, inputs=[path])
        elif number % 8:
            ledger.api(
                "choose_level",
                lambda: choose_level(tiny_checkpoint, profile=path, max_ms_per_token=1e5),
                case=words,
                inputs=[path],
            )
        else:
            ledger.cli(
                "slice",
                tiny_checkpoint,
                "--max-ms-per-token",
                "1e5",
                "--device-profile",
                path,
                "--output",
                ledger.out,
                inputs=[path],
                case=words,
            )


def test_command_lines(ledger, tiny_checkpoint, text_file, quick, tmp_path):
    random = Random(10)
    good = {
        "train": [quick], "slice": [tiny_checkpoint], "upgrade": [tmp_path], "inspect": [tiny_checkpoint], "export-peft": [tiny_checkpoint],
        "overlay": [tiny_checkpoint], "restore": [tiny_checkpoint], "eval": [tiny_checkpoint], "export": [tiny_checkpoint], "bench": [tiny_checkpoint],
        "doctor": [], "demo": [],
    }  # fmt: skip
    numbers = {
        "bench": ["--batch", "--prompt", "--new-tokens", "--repeats", "--threads", "--device", "--way", "--level"],
        "eval": ["--window", "--max-windows", "--precision", "--reference", "--level"],
        "slice": ["--dtype", "--format", "--level"], "export": ["--dtype", "--format", "--level"],
    }  # fmt: skip
    rest = {"bench": ["--prompt", "2", "--new-tokens", "1", "--repeats", "1", "--batch", "1"], "eval": ["--text", text_file, "-q"],
            "slice": ["--output", ledger.out], "export": ["--output", ledger.out]}  # fmt: skip
    for command, options in numbers.items():
        for option in options:
            for value in (*NUMBERS, *WORDS):
                if (command, option) in (("bench", "--threads"), ("bench", "--repeats")) and value == "1_0":
                    continue
                ledger.cli(command, *good[command], *rest[command], f"{option}={value}")
    pool = ["--level", "--output", "--format", "--from", "--text", "-q", "--nonsense", "-x", "--", "--help=1", "--verify", "--json", "--base", "--model", "=",
            "-", "0.7", "", "[/]", "\ud800", "--output=", "--level=", "-qq", "--no-quiet", "@file", "--version", "extra"]  # fmt: skip
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
    own = {name for name in globals() if name.startswith("test_")}
    with capsys.disabled():
        print(f"\n{ledger.table()}")
    ledger.check()
    if ledger.tests == own:
        assert ledger.bad_inputs() >= AT_LEAST
