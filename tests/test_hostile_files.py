"""Thousands of bad files: texts, base models, checkpoints, overlays, profiles. As in test_hostile.py."""

# ruff: noqa: B023  every function made in a loop is called before the next turn

import copy
import json
import shutil
from functools import partial
from random import Random

import pytest
import torch
from conftest import merging_tokenizer, tiny_recipe
from hostile import REFUSED, edited, fingerprint, replaced
from hostile_inputs import make, make_overlay
from hostile_models import Workshop, models
from hostile_texts import text_paths, texts
from hostile_values import WORDS

from elastic_sparsity import (
    ElasticModel,
    choose_level,
    copy_level,
    export_level,
    export_peft,
    load_packed,
    optimize,
    reapply_masks_,
    restore_overlay,
    save_sliced,
    upgrade,
    verify,
    write_overlay,
)
from elastic_sparsity import levels as list_levels
from elastic_sparsity.allocating import Allocating, allocate
from elastic_sparsity.allocation_file import load_plan
from elastic_sparsity.bench import bench
from elastic_sparsity.data import read_text
from elastic_sparsity.device_profile import profile_path, read_profile
from elastic_sparsity.inducing import induce
from elastic_sparsity.induction_file import FILE_NAME
from elastic_sparsity.inspection import layer_types
from elastic_sparsity.models import load_base, stream_base
from elastic_sparsity.search import SearchSettings
from elastic_sparsity.tiny import tiny_model

pytest_plugins = ("hostile_fixtures",)
pytestmark = pytest.mark.usefixtures("judged")

ONE_WINDOW = ("--window", "64", "--max-windows", "1", "-q")


def test_texts(ledger, tmp_path, quick):
    here = make(tmp_path / "texts")
    for number, (name, data) in enumerate(texts(Random(4), 60)):
        path = here / name
        path.write_bytes(data)
        ledger.api("read_text", lambda: read_text(str(path)), case=name, inputs=[path])
        if len(data) < 10**5:
            ledger.cli("eval", "random:llama", "--text", path, *ONE_WINDOW, inputs=[path])
            option = ("--calibration", "--evaluation")[number % 2]
            ledger.cli("train", quick, option, path, "--output", ledger.out, "-q", inputs=[path, quick])
        path.unlink()
    for words, path in text_paths(make(tmp_path / "paths")).items():
        ledger.api("read_text", lambda: read_text(str(path)), case=words)
        ledger.cli("eval", "random:llama", f"--text={path}", *ONE_WINDOW, case=f"eval {words}")
        for option in ("--calibration", "--evaluation"):
            ledger.cli("train", quick, f"{option}={path}", "--output", ledger.out, "-q", case=f"train {option} {words}")


def stream(model_id):
    return stream_base(model_id, "auto", torch.device("cpu"))


def test_base_models(ledger, good_model, tmp_path, quick, streamed, text_file):
    workshop = Workshop(good_model, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    for number, (words, damage) in enumerate(models(Random(5), 100)):
        folder = workshop.make(damage)
        ledger.api("load_base", lambda: load_base(str(folder)), case=words, inputs=[folder])
        ledger.api("stream_base", lambda: stream(str(folder)), case=words, inputs=[folder])
        train = ["train", "--model", folder, "--output", ledger.out, "-q"]
        measure = ["eval", "--text", text_file, *ONE_WINDOW]
        commands = (
            [*train, quick],
            [*measure, folder],
            [*train, streamed],
            [*measure, "random:llama", "--reference", folder],
        )
        ledger.cli(*commands[number % 4], inputs=[folder], case=f"{number % 4}: {words}")
        plan = ["plan", quick, "--no-probe", ("--model", "--config")[number // 2 % 2]]
        if number % 2:
            ledger.cli(*plan, folder, inputs=[folder], case=f"plan: {words}")
        if "tokenizer" in words and number % 4 != 1:
            ledger.cli(*commands[1], inputs=[folder], case=f"1: {words}")
    kinds = ("{}", "random:{}", "pypi:{}", "{}.gguf")
    for number, value in enumerate(kind.format(word) for kind in kinds for word in WORDS):
        ledger.api("load_base", lambda: load_base(value), case=repr(value))
        ledger.api("stream_base", lambda: stream(value), case=repr(value))
        recipe = (quick, streamed)[number % 2]
        ledger.cli("train", recipe, f"--model={value}", "--output", ledger.out, "-q")


def test_induced_models(ledger, tmp_path, text_file):
    """Damaged scales beside a good model, and bad models to induce."""
    command = ["induce", "--steps", 1, "--samples", 6, "--length", 8, "--calibration", text_file, "-q", "--output"]
    made = tmp_path / "good"
    induce(tiny_recipe(induction={"steps": 1, "held_out": 2}), made)
    good, random = (made / FILE_NAME).read_bytes(), Random(11)
    folder = shutil.copytree(made, tmp_path / "bad")
    for number in range(80):
        header = int.from_bytes(good[:8], "little") + 8
        head = header if number % 2 else len(good)
        cut = good[: number * len(good) // 21] if number <= 20 else edited(good[:head], random) + good[head:]
        (folder / FILE_NAME).write_bytes(cut)
        case = f"induced {number}"
        ledger.api("load_base", lambda: load_base(str(folder)), case=case, inputs=[folder])
        if number % 4 == 0:
            ledger.cli("eval", folder, "--text", text_file, *ONE_WINDOW, inputs=[folder], case=case)
        if number % 4 == 1:
            ledger.cli(*command, ledger.out, folder, inputs=[folder], case=case)


def test_allocation_plans(ledger, tmp_path, quick):
    """Damaged plans: read alone, by a run, and by a search that would go on with them."""
    made, path = tmp_path / "good.json", tmp_path / "bad.json"
    recipe = tiny_recipe(calibration={"samples": 8}, ladder={"sparsities": (0.5, 0.6, 0.7), "patterns": ()})
    settings = SearchSettings(generations=1, windows=(1, 2), survivors=(2,))
    allocate(recipe, Allocating(held_out=4, search=settings), made)
    good, random = json.loads(made.read_text()), Random(13)
    for number in range(120):
        if number % 3:
            changed = copy.deepcopy(good) if number % 3 == 1 else {**copy.deepcopy(good), "finished": False}
            case = f"plan {number}: {replaced(changed, random)}"
            path.write_text(json.dumps(changed))
        else:
            case = f"plan {number}"
            path.write_text(made.read_text()[: number * made.stat().st_size // 120])
        ledger.api("load_plan", lambda: load_plan(path), case=case, inputs=[path])
        used = tiny_recipe(allocation={"plan": str(path)})
        ledger.api("optimize", partial(optimize, used, ledger.out), case=case, inputs=[path])
        if number % 3 == 2:  # a finished one is refused
            search = Allocating(held_out=4, search=settings)
            ledger.api(
                "allocate", lambda: allocate(recipe, search, path), case=case, inputs=[path], keep=lambda *_: True
            )


def test_gguf_files(ledger, tmp_path, quick):
    good = make_gguf(tmp_path / "good")
    random, path = Random(6), tmp_path / "bad.gguf"
    for number in range(80):
        head = 2000 if number % 2 else len(good)
        path.write_bytes(edited(good[:head], random) + good[head:] if number > 20 else good[: number * len(good) // 21])
        case = f"gguf {number}"
        ledger.api("load_base", lambda: load_base(str(path)), case=case, inputs=[path])
        if number % 4 == 1:
            ledger.cli("plan", quick, "--no-probe", "--model", path, inputs=[path], case=case)
        if number % 4 == 0:
            ledger.cli("train", quick, "--model", path, "--output", ledger.out, "-q", inputs=[path], case=case)


def make_gguf(folder):
    from elastic_sparsity.export_gguf import GGUF_FILE, write_gguf

    folder.mkdir()
    tokenizer = merging_tokenizer()
    write_gguf(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, folder)
    return (folder / GGUF_FILE).read_bytes()


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

    def level():
        return random.choice(("0.5", "0.6", "0.7", "2:4", "auto"))

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
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["inspect", folder, "--verify"],
        ["slice", folder, "--level", "0.7", "--output", ledger.out],
        ["slice", folder, "--max-bytes", "1GB", "--output", ledger.out],
        ["export", folder, "--level", "2:4", "--format", "bitmask", "--output", ledger.out],
        ["export-peft", folder, "--output", ledger.out],
        ["overlay", folder, "--output", ledger.out],
        ["upgrade", folder, "--from", tiny_checkpoint, "--level", "0.7"],
        ["slice", folder, "--max-ms-per-token", "100", "--device-profile", "phone", "--output", ledger.out],
    )
    for number in range(800):
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
            call = random.choice([*calls, *calls, *(name for name in calls if name != "bench")])  # it takes a while
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
    for number in range(500):
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
            overlay = tmp_path / "overlay"
            ledger.cli("restore", overlay, "--output", ledger.out, inputs=[overlay], case=f"restore {words}")
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
        options = {"profile": path, "max_ms_per_token": 1e5}
        arguments = ["--max-ms-per-token", "1e5", "--device-profile", path, "--output", ledger.out]
        if number % 4:
            ledger.api("read_profile", lambda: read_profile(path), case=words, inputs=[path])
        elif number % 8:
            ledger.api("choose_level", lambda: choose_level(tiny_checkpoint, **options), case=words, inputs=[path])
        else:
            ledger.cli("slice", tiny_checkpoint, *arguments, inputs=[path], case=words)
