"""Bad inputs, seeded: recipes, levels and places. Texts and base models have files of their own."""

import json
import os
import stat
import tomllib

from conftest import tiny_recipe
from hostile import edited
from hostile_values import LADDERS, LEVELS, RECIPE, TOML_VALUES

from elastic_sparsity import optimize, write_overlay


def whole_files():
    """Recipes that are wrong as a whole: (words, bytes)."""
    deep = "a." * 3000 + "b = 1\n"
    for name, text in {
        "empty": "",
        "a blank": " \n\t\n",
        "a word": "recipe",
        "JSON": json.dumps(tomllib.loads(RECIPE)),
        "only a section": "[model]",
        "no model": RECIPE.replace('id = "random:llama"', ""),
        "twice": RECIPE + RECIPE,
        "a section twice": RECIPE + "[block]\n",
        "a key twice": RECIPE + 'dtype = "float16"\n',
        "nested arrays": "x = " + "[" * 10**5,
        "closed nested arrays": "x = " + "[" * 10**5 + "]" * 10**5,
        "nested tables": "x = " + "{a = " * 10**4 + "1" + "}" * 10**4,
        "a deep key": deep,
        "a deep table": f"[{deep[:-7]}b]\n",
        "tables below a value": "model = 1\n[model]\nid = 'x'\n",
        "sections as values": "model = 1\ncalibration = 2\nladder = 3",
        "sections as arrays": "[[model]]\nid='x'\n[[calibration]]\nsource='x'\n[[ladder]]\n",
        "a huge key": f"{'k' * 10**5} = 1\n",
        "a thousand unknown keys": "".join(f"k{i} = 1\n" for i in range(1000)) + RECIPE,
        "a thousand unknown sections": RECIPE + "".join(f"[s{i}]\n" for i in range(1000)),
        "an open string": RECIPE + 'x = "abc',
        "an open multi-line string": RECIPE + 'x = """abc',
        "CR only": RECIPE.replace("\n", "\r"),
        "one digit too many": RECIPE.replace("seed = 0", "seed = " + "7" * 10**5),
        "a key of dots": "...=1",
        "an escape": RECIPE.replace("random:llama", "\\q"),
        "a NUL": RECIPE.replace("random", "ran\0dom"),
        "a terminal escape": RECIPE.replace("random:llama", "\\u001b[2J\\u0007x"),
        "markup": RECIPE.replace("random:llama", "[/red]x[bold"),
    }.items():
        yield name, text.encode()
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037", "utf-7"):
        yield encoding, RECIPE.encode(encoding)
    yield "latin-1", RECIPE.replace("llama", "lläma").encode("latin-1")
    yield "NULs", bytes(3000)
    yield "0xff", b"\xff" * 3000
    yield "an ELF header", b"\x7fELF" + bytes(range(256)) * 9


def recipes(random, count):
    """(words, bytes) of recipes; a few are still good."""
    yield from whole_files()
    start, end = RECIPE.index("sparsities"), RECIPE.index("[scores]")
    for ladder in LADDERS:
        yield f"ladder: {ladder[:60]}", (RECIPE[:start] + ladder + "\n" + RECIPE[end:]).encode()
    lines = RECIPE.splitlines()
    fields = [number for number, line in enumerate(lines) if "=" in line]
    for _ in range(count):
        kind = random.randrange(4)
        changed = list(lines)
        number = random.choice(fields)
        key = changed[number].partition(" =")[0]
        if kind == 0:
            yield "edited bytes", edited(RECIPE.encode(), random)
            continue
        if kind == 1:
            value = random.choice(TOML_VALUES)
            changed[number] = f"{key} = {value}"
            words = f"{key} = {value[:60]}"
        elif kind == 2:
            wrong = random.choice(
                (key[:-1] or "q", key.upper(), key + "s", f'"{key} "', f'"{key}\\u0000"', f"{key}.x", "ïd", "''")
            )
            changed[number] = changed[number].replace(key, wrong, 1)
            words = f"{key} as {wrong}"
        else:
            other = random.choice(fields)
            changed[number], changed[other] = changed[other], changed[number]
            words = f"{key} and {changed[number]!r} swapped"
        yield words, "\n".join(changed).encode("utf-8", "surrogatepass")


def levels(random, count):
    """Levels that no ladder here has; with a few that it might."""
    yield from LEVELS
    for _ in range(count):
        kind = random.randrange(4)
        if kind == 0:
            yield random.uniform(-2, 2)
        elif kind == 1:
            yield "".join(chr(random.randrange(0xD7FF)) for _ in range(random.randint(1, 12)))
        elif kind == 2:
            yield (
                f"{random.randrange(-3, 40)}:{random.randrange(-3, 40)}"
                if random.random() < 0.8
                else random.randrange(-(10**9), 10**9)
            )
        else:
            yield edited(random.choice(("0.5", "60%", "2:4", "auto")).encode(), random, 2).decode("latin-1")


def on_the_command_line(value):
    """A value as a shell could pass it: a string without NUL."""
    return str(value) if not isinstance(value, int) or abs(value) < 10**300 else "9" * 400


def make_device(path):
    """A node like /dev/null of our own: what replaces its output would, as root, replace the machine's."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)
    return path


def places(room):
    """Outputs that cannot be made: words -> path. All lie in `room`, which gets what is in the way: never name a path
    of the machine here, as a defect may replace it.
    """
    (room / "file").write_text("precious")
    (room / "full").mkdir()
    (room / "full" / "thesis.tex").write_text("precious")
    (room / "dangling").symlink_to(room / "nowhere" / "at all")
    (room / "loop").symlink_to(room / "loop")
    (room / "to file").symlink_to(room / "file")
    (room / "to full").symlink_to(room / "full")
    os.mkfifo(room / "pipe")
    device = make_device(room / "device")
    return {
        "a file": room / "file",
        "a full folder": room / "full",
        "below a file": room / "file" / "out",
        "deep below a file": room / "file" / "a" / "b",
        "a link to a file": room / "to file",
        "a link to a full folder": room / "to full",
        "below a link to a file": room / "to file" / "x",
        "a loop": room / "loop",
        "below a loop": room / "loop" / "x",
        "a pipe": room / "pipe",
        "below a pipe": room / "pipe" / "x",
        "a long name": room / ("n" * 300),
        "below a long name": room / ("n" * 300) / "x",
        "a long path": room / "/".join(["d" * 200] * 30),
        "a NUL": room / "a\0b",
        "below a NUL": room / "a\0b" / "c",
        "a lone surrogate": room / "a\ud800b",
        "a device": device,
        "below a device": device / "x",
        "the working folder's parent": room,
        "a name just too long": room / ("m" * 250),
        "the empty path": "",
        "dots": room / "full" / "..",
    }


def make(folder):
    folder.mkdir()
    return folder


def link(path, target):
    path.symlink_to(target)
    return path


def make_overlay(room):
    """A checkpoint that can have an overlay, and that."""
    if not room.exists():
        optimize(tiny_recipe(end_to_end={"trainable": "adapters"}, evaluation={"max_windows": 1}), room / "checkpoint")
        write_overlay(room / "checkpoint", room / "overlay")
    return room
