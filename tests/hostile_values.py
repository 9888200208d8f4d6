"""Values that fields, levels, sizes and names should not have, and the good recipes they are put into."""

# ruff: noqa: RUF001  the look-alikes are the point

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
shard = false
[checkpoint]
dtype = "auto"
[memory]
weights = "auto"
activations = "auto"
"""

QUICK = RECIPE.replace("[0.5, 0.6, 0.7]", "[0.5]").replace("[2, 2, 2, 2]", "2")

TOML_VALUES = (
    "true", "0", "1", "-1", "1.0", "-0.5", "1e400", "-inf", "nan", "inf", "1e-320", str(10**18), "9" * 5000,
    "0x" + "f" * 300, "1979-05-27T07:32:00Z", "07:32:00", '""', '"x"', '"0.5"', '"2:4"', '"\\u0000"', '"../x"',
    "'" + "y" * 5000 + "'", '"""\n\n"""', "[]", "[0]", "[[]]", "[0.5, 0.5]", "[0.7, 0.6]", "[1, 2, 3]",
    '["2:4", "2:4"]', "{}", "{a = 1}", "[nan]", "[1e308]", "[-1]", "[true]", "[" + "0.5, " * 3000 + "]",
    "[" * 5000 + "]" * 5000, "[" * 50 + "]" * 50, '"\ud800"', '"é"',
)  # fmt: skip

LADDERS = (
    "sparsities = []", "sparsities = [1.0]", "sparsities = [0.5, 0.5]", "sparsities = [0.6, 0.5]",
    "sparsities = [-0.1]", "sparsities = [0.5, 1.5]", "sparsities = [nan]", "sparsities = [0.5, nan]",
    "sparsities = [inf]", "sparsities = [50]", "sparsities = ['0.5']", "sparsities = 0.5",
    "sparsities = [0.5, 0.5000001]", "sparsities = [true]",
    *(f"patterns = ['{x}']" for x in (
        "4:2", "0:0", "2:3:4", "2:2", "2:33", "-2:4", "2.0:4", " 2:4", "2:4 ", "2", ":", "", "2:", ":4", "a:b",
        "\u0662:\u0664", "\u00b2:4", "0:4", "2\u20094", "9" * 5000 + ":4", "2:" + "9" * 5000, "02:04:", "x" * 10**5,
    )),
    "patterns = ['2:4', '2:4']", "patterns = ['2:4', 4]", "patterns = '2:4'", "patterns = [[2, 4]]", "patterns = {}",
    "group_ends = []", "group_ends = [0.5]", "group_ends = [0.7, 0.5]", "group_ends = [0.1, 0.7]",
    "group_ends = [nan]", "group_ends = [0.5, nan]", "group_ends = [-1.0, 0.7]", "group_ends = [0.7, 0.8, 0.9]",
    "pattern_parent = 'both'", "sparsities = []\npatterns = []",
    "sparsities = []\npatterns = ['2:4']\ngroup_ends = [0.5]",
    "sparsities = [" + ",".join(f"{i / 300:.6f}" for i in range(300)) + "]", "sparsities = [" + "0.5," * 10**6 + "]",
    "sparsities = [" + ",".join(f"{i / 1e6:.6f}" for i in range(10**6)) + "]",
    "sparsities = [" + "'x'," * 10**5 + "]", "patterns = [" + "'2:4'," * 10**6 + "]",
    "patterns = [" + "'9:4'," * 10**5 + "]",
    "group_ends = [" + ",".join(f"{i / 1e5:.6f}" for i in range(10**5)) + "]",
    "sparsities = [" + ",".join(f"{i / 200:.6f}" for i in range(200)) + "]\ngroup_ends = [" + "0.1," * 200 + "]",
)  # fmt: skip

LEVELS = (
    None, True, False, "", " ", "auto ", "AUTO", "dense", "none", "0", "1", "-1", 0, 1, 2, -1, 0.0, 1.0, 0.55, -0.5,
    50, 0.5000001, float("nan"), float("inf"), -float("inf"), "nan", "inf", "-inf", "nan%", "inf%", "1e400", "1e-400",
    "50", "50 percent", "%", "%%", "50%%", "%50", "0.5%", "55%", "-50%", "4:2", "2:4:8", "2:", ":4", ":", "2/4",
    "2-4", "2：4", "２:４", "٠.٥٥", "0,5", "0.5.", "0x1", "½", "five", "\0", "0.5\0", "2:4\0", "0.5\n0.6", "\ud800",
    "\udcff", "é" * 99, "0" * 5000, "9" * 5000, "0." + "5" * 10**5, "x" * 10**6, "2:4" * 10**5, 10**400, -(10**400),
    10**5000, 2**63, 1e308, 5e-324, [], [0.5], ["0.5", "0.6"], (), ("0.5",), {}, {"level": 0.5}, {0.5}, b"0.5",
    b"\xff", object, len, 0.5j, Ellipsis, "../../etc/passwd", "[red]0.5[/]", "[/]", "[/red", "\\[", "%s%n", "{0}",
    "\x1b[2J", "0.5; rm -rf /", "--level", "-h",
)  # fmt: skip

NUMBERS = (
    "0", "-1", "1e400", "nan", "inf", "-inf", "", " ", "x", "1.5", "0x10", "1_0", "١", "9" * 400, "1e-400", "--",
    "1,2", "None", "true",
)  # fmt: skip

SIZES = (
    "0", "-1", "-5MB", "nan", "infMB", "1e400GB", "MB", "", " ", "60 MBB", "60XB", "6 0MB", "1e3 ", "9" * 5000,
    "9" * 400 + "GB", "٦MB", "0.0001", "½MB", "60MB60", "\0", "x" * 10**5,
)  # fmt: skip

WORDS = (
    "", " ", "x", "é", "\ud800", "GGUF", "gguf ", "int8", "float64", "None", "auto ", "[/]", "[red]", "../x",
    "a" * 300, "\x1b[2J", "transformers,elastic",
)  # fmt: skip
