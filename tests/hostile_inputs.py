"""Bad inputs, seeded: recipes, texts, levels, numbers and places. Base models are in hostile_models.py."""

import json
import os
import tomllib

from hostile import edited

RECIPE = """\
seed = 0
precision = "float32"
[model]
id = "random:llama"
dtype = "auto"
[calibration]
source = "self"
samples = 6
length = 16
temperature = 1.0
[evaluation]
window = 16
max_windows = 2
baselines = ["wanda"]
[ladder]
sparsities = [0.5, 0.6, 0.7]
patterns = ["2:4"]
pattern_parent = "densest"
[scores]
method = "wanda"
damping = 0.01
patterns = "free"
[adapters]
ranks = [2, 2, 2, 2]
inheritance = "shared"
[mixer]
mode = "own"
lr = 0.1
[block]
steps = 1
samples = 4
batch_size = 2
adapter_lr = 1e-3
base_lr = 0.0
loss = "relative"
[end_to_end]
trainable = "base"
steps = 1
batch_size = 2
warmup = 0.05
clip_norm = 1.0
[checkpoint]
dtype = "auto"
"""
QUICK = RECIPE.replace("[0.5, 0.6, 0.7]", "[0.5]").replace("[2, 2, 2, 2]", "2")

TOML_VALUES = (
    "true", "0", "1", "-1", "1.0", "-0.5", "1e400", "-inf", "nan", "inf", "1e-320", str(10**18), "9" * 5000, "0x" + "f" * 300,
    "1979-05-27T07:32:00Z", "07:32:00", '""', '"x"', '"0.5"', '"2:4"', '"\\u0000"', '"../x"', "'" + "y" * 5000 + "'",
    '"""\n\n"""', "[]", "[0]", "[[]]", "[0.5, 0.5]", "[0.7, 0.6]", "[1, 2, 3]", '["2:4", "2:4"]', "{}", "{a = 1}", "[nan]",
    "[1e308]", "[-1]", "[true]", "[" + "0.5, " * 3000 + "]", "[" * 5000 + "]" * 5000, "[" * 50 + "]" * 50, '"\ud800"', '"é"',
)  # fmt: skip
LADDERS = (
    "sparsities = []", "sparsities = [1.0]", "sparsities = [0.5, 0.5]", "sparsities = [0.6, 0.5]", "sparsities = [-0.1]",
    "sparsities = [0.5, 1.5]", "sparsities = [nan]", "sparsities = [0.5, nan]", "sparsities = [inf]", "sparsities = [50]",
    "sparsities = ['0.5']", "sparsities = 0.5", "sparsities = [0.5, 0.5000001]", "sparsities = [true]",
    *(f"patterns = ['{x}']" for x in ("4:2", "0:0", "2:3:4", "2:2", "2:33", "-2:4", "2.0:4", " 2:4", "2:4 ", "2", ":", "",
      "2:", ":4", "a:b", "\u0662:\u0664", "\u00b2:4", "0:4", "2\u20094", "9" * 5000 + ":4", "2:" + "9" * 5000, "02:04:", "x" * 10**5)),
    "patterns = ['2:4', '2:4']", "patterns = ['2:4', 4]", "patterns = '2:4'", "patterns = [[2, 4]]", "patterns = {}",
    "group_ends = []", "group_ends = [0.5]", "group_ends = [0.7, 0.5]", "group_ends = [0.1, 0.7]", "group_ends = [nan]",
    "group_ends = [0.5, nan]", "group_ends = [-1.0, 0.7]", "group_ends = [0.7, 0.8, 0.9]", "pattern_parent = 'both'",
    "sparsities = []\npatterns = []", "sparsities = []\npatterns = ['2:4']\ngroup_ends = [0.5]",
    "sparsities = [" + ",".join(f"{i / 300:.6f}" for i in range(300)) + "]",
    "sparsities = [" + "0.5," * 10**6 + "]",
    "sparsities = [" + ",".join(f"{i / 1e6:.6f}" for i in range(10**6)) + "]",
    "sparsities = [" + "'x'," * 10**5 + "]",
    "patterns = [" + "'2:4'," * 10**6 + "]",
    "patterns = [" + "'9:4'," * 10**5 + "]",
    "group_ends = [" + ",".join(f"{i / 1e5:.6f}" for i in range(10**5)) + "]",
    "sparsities = [" + ",".join(f"{i / 200:.6f}" for i in range(200)) + "]\ngroup_ends = [" + "0.1," * 200 + "]",
)  # fmt: skip


def whole_files():
    """Recipes that are wrong as a whole: (words, bytes)."""
    deep = "a." * 3000 + "b = 1\n"
    for name, text in {
        "empty": "", "a blank": " \n\t\n", "a word": "recipe", "JSON": json.dumps(tomllib.loads(RECIPE)),
        "only a section": "[model]", "no model": RECIPE.replace('id = "random:llama"', ""),
        "twice": RECIPE + RECIPE, "a section twice": RECIPE + "[block]\n", "a key twice": RECIPE + 'dtype = "float16"\n',
        "nested arrays": "x = " + "[" * 10**5, "closed nested arrays": "x = " + "[" * 10**5 + "]" * 10**5,
        "nested tables": "x = " + "{a = " * 10**4 + "1" + "}" * 10**4, "a deep key": deep, "a deep table": f"[{deep[:-7]}b]\n",
        "tables below a value": "model = 1\n[model]\nid = 'x'\n", "sections as values": "model = 1\ncalibration = 2\nladder = 3",
        "sections as arrays": "[[model]]\nid='x'\n[[calibration]]\nsource='x'\n[[ladder]]\n", "a huge key": f"{'k' * 10**5} = 1\n",
        "a thousand unknown keys": "".join(f"k{i} = 1\n" for i in range(1000)) + RECIPE,
        "a thousand unknown sections": RECIPE + "".join(f"[s{i}]\n" for i in range(1000)),
        "an open string": RECIPE + 'x = "abc', "an open multi-line string": RECIPE + 'x = """abc', "CR only": RECIPE.replace("\n", "\r"),
        "one digit too many": RECIPE.replace("seed = 0", "seed = " + "7" * 10**5), "a key of dots": "...=1",
        "an escape": RECIPE.replace("random:llama", "\\q"), "a NUL": RECIPE.replace("random", "ran\0dom"),
        "a terminal escape": RECIPE.replace("random:llama", "\\u001b[2J\\u0007x"), "markup": RECIPE.replace("random:llama", "[/red]x[bold"),
    }.items():  # fmt: skip
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


LEVELS = (
    None, True, False, "", " ", "auto ", "AUTO", "dense", "none", "0", "1", "-1", 0, 1, 2, -1, 0.0, 1.0, 0.55, -0.5, 50, 0.5000001,
    float("nan"), float("inf"), -float("inf"), "nan", "inf", "-inf", "nan%", "inf%", "1e400", "1e-400", "50", "50 percent", "%", "%%", "50%%",
    "%50", "0.5%", "55%", "-50%", "4:2", "2:4:8", "2:", ":4", ":", "2/4", "2-4", "2：4", "２:４", "٠.٥٥", "0,5", "0.5.", "0x1", "½", "five",
    "\0", "0.5\0", "2:4\0", "0.5\n0.6", "\ud800", "\udcff", "é" * 99, "0" * 5000, "9" * 5000, "0." + "5" * 10**5, "x" * 10**6, "2:4" * 10**5,
    10**400, -(10**400), 10**5000, 2**63, 1e308, 5e-324, [], [0.5], ["0.5", "0.6"], (), ("0.5",), {}, {"level": 0.5}, {0.5}, b"0.5", b"\xff",
    object, len, 0.5j, Ellipsis, "../../etc/passwd", "[red]0.5[/]", "[/]", "[/red", "\\[", "%s%n", "{0}", "\x1b[2J", "0.5; rm -rf /", "--level", "-h",
)  # fmt: skip


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


NUMBERS = (
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "",
    " ",
    "x",
    "1.5",
    "0x10",
    "1_0",
    "١",
    "9" * 400,
    "1e-400",
    "--",
    "1,2",
    "None",
    "true",
)
SIZES = (
    "0",
    "-1",
    "-5MB",
    "nan",
    "infMB",
    "1e400GB",
    "MB",
    "",
    " ",
    "60 MBB",
    "60XB",
    "6 0MB",
    "1e3 ",
    "9" * 5000,
    "9" * 400 + "GB",
    "٦MB",
    "0.0001",
    "½MB",
    "60MB60",
    "\0",
    "x" * 10**5,
)
WORDS = (
    "",
    " ",
    "x",
    "é",
    "\ud800",
    "GGUF",
    "gguf ",
    "int8",
    "float64",
    "None",
    "auto ",
    "[/]",
    "[red]",
    "../x",
    "a" * 300,
    "\x1b[2J",
    "transformers,elastic",
)


def places(room):
    """Outputs that cannot be made: (words, path). `room` gets what lies in the way."""
    (room / "file").write_text("precious")
    (room / "full").mkdir()
    (room / "full" / "thesis.tex").write_text("precious")
    (room / "dangling").symlink_to(room / "nowhere" / "at all")
    (room / "loop").symlink_to(room / "loop")
    (room / "to file").symlink_to(room / "file")
    (room / "to full").symlink_to(room / "full")
    os.mkfifo(room / "pipe")
    return {
        "a file": room / "file", "a full folder": room / "full", "below a file": room / "file" / "out", "deep below a file": room / "file" / "a" / "b",
        "a link to a file": room / "to file", "a link to a full folder": room / "to full", "below a link to a file": room / "to file" / "x",
        "a loop": room / "loop", "below a loop": room / "loop" / "x", "a pipe": room / "pipe", "below a pipe": room / "pipe" / "x",
        "a long name": room / ("n" * 300), "below a long name": room / ("n" * 300) / "x", "a long path": room / "/".join(["d" * 200] * 30),
        "a NUL": room / "a\0b", "below a NUL": room / "a\0b" / "c", "a lone surrogate": room / "a\ud800b", "a device": "/dev/null", "below a device": "/dev/null/x",
        "the root": "/", "a mount": "/proc", "below proc": "/proc/elastic/x", "the working folder's parent": room, "a name just too long": room / ("m" * 250),
        "the empty path": "" , "dots": room / "full" / "..", "sys": "/sys/elastic",
    }  # fmt: skip
