"""Bad unfinished runs: `<output>.run` damaged, begun with other settings, or nobody's run. As in test_hostile.py."""

import json
import math
import os
import shutil
from random import Random

import pytest
from hostile import edited, fingerprint, replaced
from hostile_inputs import link, make, make_device
from hostile_values import QUICK

from elastic_sparsity import optimize, read_recipe

pytest_plugins = ("hostile_fixtures",)
pytestmark = pytest.mark.usefixtures("judged")

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


class Crash(Exception):
    pass


def crash(*_, **__):
    raise Crash


class Runs:
    """A recipe, folders of runs of it that crashed at various moments, and the checkpoint that they would have made."""

    def __init__(self, room, patches):
        self.room, self.text, self.recipe = room, room / "text.txt", room / "recipe.toml"
        self.text.write_text(TEXT)
        self.recipe.write_text(QUICK.replace('source = "self"', f'source = "{self.text}"'))
        optimize(read_recipe(self.recipe), room / "whole")
        self.whole = contents(room / "whole")
        for name, patch in patches.items():
            with pytest.MonkeyPatch.context() as context, pytest.raises(Crash):
                patch(context)
                optimize(read_recipe(self.recipe), room / name)
        self.folders = {name: room / f"{name}.run" for name in patches}

    def put(self, name, output):
        """The run that crashed at `name`, as if it were one of this output. Returns: its folder."""
        return shutil.copytree(self.folders[name], run_of(output))


def run_of(output):
    return output.with_name(f"{output.name}.run")


def contents(folder):
    """A checkpoint's files; run.json says how long the run took."""
    found = fingerprint(folder)
    found.pop("run.json", None)
    return found


def in_second_block(context):
    import elastic_sparsity.block_phase as block_phase

    real, calls = block_phase.train_block_, []

    def train(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) if len(calls) == 1 else crash()

    context.setattr(block_phase, "train_block_", train)


def at_the_end(context):
    """With a snapshot of the end-to-end phase."""
    import elastic_sparsity.pipeline as pipeline

    real = pipeline.Snapshots
    context.setattr(pipeline, "Snapshots", lambda **fields: real(**fields, seconds=0, share=math.inf))
    context.setattr(pipeline, "save_run", crash)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), {"in-second-block": in_second_block, "at-the-end": at_the_end})


def go_on(ledger, runs, case, *, cli=False, restart=False, recipe=None, is_right=None):
    """Runs the recipe into the ledger's output, by API or command line."""
    recipe = recipe or runs.recipe
    if cli:
        extra = ["--restart"] if restart else []
        ledger.cli("train", recipe, "--output", ledger.out, "-q", *extra, case=f"resumed: {case}", is_right=is_right)
    else:
        call = lambda: optimize(read_recipe(recipe), ledger.out, restart=restart)  # noqa: E731
        ledger.api("optimize", call, case=f"resumed: {case}", is_right=is_right)
    clear(ledger.outputs)


def clear(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def as_folder(path):
    path.unlink()
    make(path)
    (path / "thesis.tex").write_text("precious")


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_link(path):
    path.unlink()
    link(path, "nowhere")


def ways_to_damage(random):
    """Words and a function of a file."""

    def field(path):
        root = json.loads(path.read_text())
        replaced(root, random)
        path.write_text(json.dumps(root))

    return {
        "missing": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "cut off": lambda path: path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size or 1)]),
        "junk": lambda path: path.write_bytes(random.randbytes(path.stat().st_size)),
        "longer": lambda path: path.write_bytes(path.read_bytes() * 2),
        "edited": lambda path: path.write_bytes(edited(path.read_bytes(), random)),
        "nested": lambda path: path.write_text("[" * 10**5),
        "text": lambda path: path.write_text('"x"'),
        "a folder": as_folder,
        "a pipe": as_pipe,
        "a link to nothing": as_link,
        "another's": lambda path: path.write_bytes(random.choice(sorted(path.parent.iterdir())).read_bytes()),
        "a field": lambda path: field(path.with_name("run.json")),
    }


def test_damaged_runs(ledger, runs):
    """A damaged file is named, or does not matter: a run that goes on ends with the bytes of a whole one."""
    random = Random(11)
    ways = ways_to_damage(random)
    for number in range(340):
        name, way = random.choice(list(runs.folders)), random.choice(list(ways))
        folder = runs.put(name, ledger.out)
        path = folder / random.choice(["run.json", *sorted(path.name for path in folder.iterdir())])
        ways[way](path)
        case = f"{name}: {path.name} {way}"
        restart = number % 10 == 0
        is_right = lambda: contents(ledger.out) == runs.whole  # noqa: E731
        go_on(ledger, runs, case, cli=number % 3 == 0, restart=restart, is_right=is_right)


OTHER_SETTINGS = (
    ("seed = 0", "seed = 1"), ('"float32"', '"bfloat16"'), ('"random:llama"', '"random:opt"'), ("[0.5]", "[0.6]"),
    ('["2:4"]', '["1:4"]'), ('["2:4"]', "[]"), ("length = 16", "length = 15"), ("samples = 4", "samples = 3"),
    ("steps = 1", "steps = 2"), ("batch_size = 2", "batch_size = 1"), ("adapter_lr = 1e-3", "adapter_lr = 2e-3"),
    ("base_lr = 0.0", "base_lr = 1e-5"), ("ranks = 2", "ranks = 3"), ('mode = "own"', 'mode = "dense"'),
    ('loss = "relative"', 'loss = "mse"'), ('method = "wanda"', 'method = "magnitude"'),
    ("damping = 0.01", "damping = 1.0"), ('trainable = "base"', 'trainable = "off"'),
    ('dtype = "auto"', 'dtype = "float16"'),
)  # fmt: skip


def test_settings_that_no_finished_block_depends_on(ledger, runs, tmp_path):
    """Goes on, and ends with the bytes of a whole run of these."""
    other = tmp_path / "other.toml"
    for old, new in (("clip_norm = 1.0", "clip_norm = 0.5"), ("max_windows = 2", "max_windows = 3")):
        text = runs.recipe.read_text()
        assert old in text
        other.write_text(text.replace(old, new))
        optimize(read_recipe(other), tmp_path / new.split()[0])
        whole = contents(tmp_path / new.split()[0])
        for name in runs.folders:
            for cli in (False, True):
                runs.put(name, ledger.out)
                is_right = lambda whole=whole: contents(ledger.out) == whole  # noqa: E731
                go_on(ledger, runs, f"{name}: {new} for {old}", cli=cli, recipe=other, is_right=is_right)


def test_other_settings_and_texts(ledger, runs, tmp_path):
    """Neither goes on with the run that began, nor harms it."""
    other = tmp_path / "other.toml"
    for number, (old, new) in enumerate(OTHER_SETTINGS):
        text = runs.recipe.read_text()
        assert old in text
        other.write_text(text.replace(old, new))
        for name in runs.folders:
            for cli in (False, True):
                runs.put(name, ledger.out)
                case = f"{name}: {new} for {old}"
                go_on(ledger, runs, case, cli=cli, recipe=other, is_right=lambda: False)
        if number % 5 == 0:
            runs.put(name, ledger.out)
            go_on(ledger, runs, f"{case}, from the start", recipe=other, restart=True)
    try:
        for number, text in enumerate(("x" + TEXT, TEXT.upper(), "x", "", "\0" * 999, TEXT[:200])):
            runs.text.write_text(text)
            for name in runs.folders:
                runs.put(name, ledger.out)
                go_on(ledger, runs, f"{name}: text {number}", cli=number % 2 == 0, is_right=lambda: False)
    finally:
        runs.text.write_text(TEXT)


def no_runs(room):
    """What may lie where an unfinished run would be, and is none: words -> function of that path."""
    precious = room / "precious"

    def files(*names):
        return lambda path: [make(path), *((path / name).write_text("precious") for name in names)]

    def folder(name):
        return lambda path: (make(make(path) / name) / "thesis.tex").write_text("precious")

    return {
        "a file": lambda path: path.write_text("precious"),
        "a link to a file": lambda path: link(path, precious),
        "a link to a full folder": lambda path: link(path, room),
        "a link to nothing": lambda path: link(path, room / "nowhere"),
        "a loop": lambda path: link(path, path),
        "a pipe": os.mkfifo,
        "a device": make_device,
        "somebody's folder": files("thesis.tex"),
        "somebody's hidden files": files(".git"),
        "somebody's models": files("model.safetensors", "config.json"),
        "a folder with a folder": folder("lock"),
        "a folder of a block's name": folder("block-0000.safetensors"),
        "a folder of a record's name": folder("run.json"),
        "a lock that is a link": lambda path: link(make(path) / "lock", precious),
        "a lock that is a pipe": lambda path: os.mkfifo(make(path) / "lock"),
        "a record that is a pipe": lambda path: os.mkfifo(make(path) / "run.json"),
        "a record without end": lambda path: link(make(path) / "run.json", "/dev/zero"),
        "a block that is a pipe": lambda path: os.mkfifo(make(path) / "block-0000.safetensors"),
        "a block that is a link": lambda path: link(make(path) / "block-0000.safetensors", precious),
    }


def test_what_is_no_run_stays(ledger, runs, tmp_path, quick):
    (tmp_path / "precious").write_text("precious")
    for words, fill in no_runs(tmp_path).items():
        for restart in (False, True):
            for cli in (False, True):
                fill(run_of(ledger.out))
                go_on(ledger, runs, f"beside {words}", cli=cli, restart=restart, is_right=lambda: False)
            fill(run_of(ledger.out))
            ledger.cli("demo", "-q", "--output", ledger.out, *["--restart"] * restart, is_right=lambda: False)
            clear(ledger.outputs)
    assert (tmp_path / "precious").read_text() == "precious"
