"""Bad base models: functions that damage a copy of a good folder."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import torch
from hostile import GONE, JSON_VALUES, edited, replaced
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"


def config(name="config.json", **changes):
    """Damage: fields of a JSON file set, or removed if GONE."""

    def damage(folder):
        root = json.loads((folder / name).read_text())
        for key, value in changes.items():
            root[key] = value
            if value is GONE:
                del root[key]
        (folder / name).write_text(json.dumps(root))

    return damage


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def tensors(change, name=WEIGHTS):
    """Damage: a safetensors file after `change(dict of tensors)`."""

    def damage(folder):
        parts = load_file(folder / name)
        change(parts)
        save_file(parts, folder / name, metadata={"format": "pt"})

    return damage


def header(change, tail=None):
    """Damage: the JSON header of the weights after `change(header)`."""

    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8:end])
        change(parsed)
        text = json.dumps(parsed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + (data[end:] if tail is None else tail))

    return damage


def index(shard="model-00001-of-00002.safetensors", **changes):
    """Damage: weights behind an index that names `shard` for one tensor."""

    def damage(folder):
        parts = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "model-00002-of-00002.safetensors")
        weight_map = dict.fromkeys(parts, "model-00002-of-00002.safetensors") | {Q: shard}
        root = {"metadata": {"total_size": 1}, "weight_map": weight_map, **changes}
        (folder / INDEX).write_text(json.dumps(root))

    return damage


def pipe(name):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def gone(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def link(name, target):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


class Bomb:
    def __reduce__(self):
        return os.system, ("touch RAN",)


def pickled(folder):
    """Only a pickle that would run a command."""
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({Q: Bomb()}))


def remote_code(folder, model_type="evil"):
    code = (
        "open('RAN', 'w').close()\nfrom transformers import *\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    (folder / "evil.py").write_text(code)
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.Evil")
    config(model_type=model_type, auto_map=names)(folder)
    names = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config("tokenizer_config.json", tokenizer_class="Evil", auto_map=names)(folder)


ODD_DTYPES = ("I64", "I32", "U8", "BOOL", "F64", "F8_E4M3", "F8_E5M2", "F4", "C64", "X9", "", None, 7)
QUANTISED = {
    method: {
        "quant_method": method,
        "bits": 4,
        "load_in_4bit": True,
        "group_size": 128,
        "weight_block_size": [128, 128],
    }
    for method in (
        "bitsandbytes",
        "gptq",
        "awq",
        "fp8",
        "compressed-tensors",
        "quanto",
        "hqq",
        "torchao",
        "nonsense",
        "mxfp4",
    )
}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip

MODELS = {
    "no config.json": gone("config.json"),
    "no weights": gone(WEIGHTS),
    "no tokenizer": gone("tokenizer.json", "tokenizer_config.json"),
    "no tokenizer.json": gone("tokenizer.json"),
    "empty folder": gone("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    **{
        f"{name} {what}": content(name, data)
        for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        for what, data in {
            "empty": b"",
            "{": b"{",
            "[]": b"[]",
            "null": b"null",
            "0xff": b"\xff" * 999,
            "NULs": bytes(999),
            "a string": b'"x"',
            "1": b"1",
            "nested": b"[" * 10**5,
            "UTF-16": '{"a": 1}'.encode("utf-16"),
            "{}": b"{}",
        }.items()
    },
    **{
        f"{name} a pipe": pipe(name)
        for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX)
    },
    **{f"{name} a loop": link(name, name) for name in ("config.json", WEIGHTS, "tokenizer.json")},
    **{f"{name} a dangling link": link(name, "nowhere") for name in ("config.json", WEIGHTS, "tokenizer.json")},
    **{f"{name} endless": link(name, "/dev/zero") for name in ("config.json", WEIGHTS)},
    **{
        f"{name} = {value!r:.30}": config(**{name: value})
        for name in SIZES
        for value in (GONE, 0, -1, 3, 10**9, 2**40, 10**30, 2.5, "32", None, [32], True, float("nan"))
    },
    **{
        f"model_type {value!r:.30}": config(model_type=value)
        for value in (
            GONE,
            None,
            "",
            "bloom",
            "bert",
            "t5",
            "mamba",
            "qwen2",
            "opt",
            "gpt2",
            "llama ",
            "LLAMA",
            "évil",
            "../llama",
            7,
            [],
            {},
            "llava",
            "x" * 5000,
        )
    },
    **{
        f"rotary {value!r:.50}": config(rope_parameters=value)
        for value in (
            None,
            7,
            "x",
            [],
            {"rope_type": "evil"},
            {"rope_type": "yarn", "rope_theta": 0, "factor": -1},
            {"rope_type": "default", "rope_theta": "x"},
            {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2},
            {"rope_theta": float("nan"), "rope_type": "default"},
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "partial_rotary_factor": 1e8},
        )
    },
    **{f"quantised {name}": config(quantization_config=value) for name, value in QUANTISED.items()},
    **{
        f"dtype {value!r:.30}": config(dtype=value, torch_dtype=value)
        for value in ("int8", "float8_e4m3fn", "evil", 7, None, [], "os.system", "")
    },
    **{
        f"{key} {value!r:.30}": config(**{key: value})
        for key, value in (
            ("hidden_act", "evil"),
            ("hidden_act", None),
            ("hidden_act", 7),
            ("architectures", None),
            ("architectures", ["Evil"]),
            ("architectures", 7),
            ("tie_word_embeddings", True),
            ("tie_word_embeddings", "x"),
            ("attention_bias", True),
            ("mlp_bias", True),
            ("rms_norm_eps", "x"),
            ("rms_norm_eps", float("nan")),
            ("attn_implementation", "evil/kernel"),
            ("_attn_implementation", "evil/kernel"),
            ("pad_token_id", 10**9),
            ("eos_token_id", "x"),
            ("num_labels", 10**7),
            ("sub_configs", {}),
            ("text_config", {}),
            ("layer_types", ["evil", "evil"]),
            ("base_model_tp_plan", {"x": "y"}),
            ("transformers_version", "x"),
            ("initializer_range", "x"),
            ("attention_dropout", 2.0),
            ("use_cache", "x"),
        )
    },
    "NaN": tensors(lambda t: t[Q].fill_(torch.nan)),
    "one infinity": tensors(lambda t: t[Q].view(-1)[7:8].fill_(-torch.inf)),
    "NaN embedding": tensors(lambda t: t["model.embed_tokens.weight"][3].fill_(torch.nan)),
    "a tensor missing": tensors(lambda t: t.pop(Q)),
    "all tensors missing": tensors(dict.clear),
    "no head": tensors(lambda t: t.pop("lm_head.weight")),
    "a tensor too many": tensors(lambda t: t.update(evil=torch.ones(3))),
    "a bias too many": tensors(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(32)})),
    "other names": tensors(lambda t: [t.update({f"evil.{name}": t.pop(name)}) for name in list(t)]),
    **{
        f"shape {shape}": tensors(lambda t, shape=shape: t.update({Q: torch.ones(shape)}))
        for shape in ((32,), (32, 31), (16, 32), (1, 32, 32), (0, 32), ())
    },
    **{
        f"as {dtype}": tensors(lambda t, dtype=dtype: t.update({Q: t[Q].to(dtype)}))
        for dtype in (
            torch.int64,
            torch.uint8,
            torch.int8,
            torch.bool,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.complex64,
        )
    },
    **{
        f"all as {dtype}": tensors(lambda t, dtype=dtype: t.update({n: x.to(dtype) for n, x in t.items()}))
        for dtype in (torch.int64, torch.uint8, torch.float64, torch.float8_e4m3fn, torch.bool)
    },
    **{f"header dtype {value!r}": header(lambda h, value=value: h[Q].update(dtype=value)) for value in ODD_DTYPES},
    **{
        f"header shape {value}": header(lambda h, value=value: h[Q].update(shape=value))
        for value in ([2**62, 2**62], [-32, -32], [32], [], None, ["32", 32], [1e9, 1])
    },
    **{
        f"header offsets {value}": header(lambda h, value=value: h[Q].update(data_offsets=value))
        for value in ([0, 4], [2**40, 2**40 + 4096], [4096, 0], [-1, 4095], [0], None, "x", [0, 2**64])
    },
    "header without weights": header(lambda h: None, tail=b""),
    "header twice as long": lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "metadata not text": header(lambda h: h.update(__metadata__={"format": 7})),
    "format tf": header(lambda h: h.update(__metadata__={"format": "evil"})),
    "no metadata": header(lambda h: h.pop("__metadata__", None)),
    **{
        f"weights cut to {share}": (
            lambda f, share=share: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[: int(share * 140000)])
        )
        for share in (1e-5, 1e-4, 0.01, 0.1, 0.5, 0.99)
    },
    "weights doubled": lambda f: (f / WEIGHTS).write_bytes(2 * (f / WEIGHTS).read_bytes()),
    "weights a folder": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
    "config.json a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "tokenizer.json a folder": lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").mkdir()),
    **{
        f"index to {shard!r:.40}": index(shard)
        for shard in (
            "model-00001-of-00002.safetensors",
            "../other.safetensors",
            "/etc/passwd",
            "/dev/zero",
            "",
            ".",
            "..",
            "x" * 300,
            "a\0b",
            "config.json",
            7,
            None,
            [],
        )
    },
    "index empty map": index(weight_map={}),
    "index a list": index(weight_map=[]),
    "index no map": index(weight_map=None),
    "index of one number": index(weight_map=7),
    "index metadata": index(metadata=None),
    "index not JSON": lambda f: (index()(f), (f / INDEX).write_text("{")),
    "pickle only": pickled,
    "remote code": remote_code,
    "remote code, llama": lambda f: remote_code(f, "llama"),
    "tokenizer class": config("tokenizer_config.json", tokenizer_class="Evil"),
    "tokenizer class 7": config("tokenizer_config.json", tokenizer_class=7),
    "tokenizer class of another": config("tokenizer_config.json", tokenizer_class="T5Tokenizer"),
    "no tokenizer class": config("tokenizer_config.json", tokenizer_class=GONE),
    "tokenizer model": config("tokenizer.json", model=GONE),
    "tokenizer model evil": config("tokenizer.json", model={"type": "Evil"}),
    "tokenizer no vocabulary": config("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}),
    "tokenizer beyond the vocabulary": config(
        "tokenizer.json", model={"type": "BPE", "merges": [], "vocab": {chr(33 + i): 10**6 + i for i in range(90)}}
    ),
    "tokenizer merges": config("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
    "chat template": config("tokenizer_config.json", chat_template="{% evil"),
    "added tokens": config("tokenizer_config.json", added_tokens_decoder={"x": 7}),
}

JSON_FILES = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def models(random, count):
    """(words, damage) of base models; a few are still good."""
    yield from MODELS.items()
    for _ in range(count):
        if random.random() < 0.5:
            yield random_field(random)
        else:
            yield random_bytes(random)


def random_field(random):
    name, seed = random.choice(JSON_FILES), random.randrange(2**32)

    def damage(folder):
        root = json.loads((folder / name).read_text())
        replaced(root, type(random)(seed), JSON_VALUES)
        (folder / name).write_text(json.dumps(root))

    return f"{name} field, seed {seed}", damage


def random_bytes(random):
    name, seed = random.choice((*JSON_FILES, WEIGHTS, WEIGHTS)), random.randrange(2**32)

    def damage(folder):
        data = (folder / name).read_bytes()
        head = 2500 if name == WEIGHTS else len(data)
        (folder / name).write_bytes(edited(data[:head], type(random)(seed)) + data[head:])

    return f"{name} bytes, seed {seed}", damage


class Workshop:
    """Damaged copies of one good folder, each at the same place."""

    def __init__(self, good, room):
        self.good, self.folder = Path(good), Path(room) / "model"

    def make(self, damage):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder, symlinks=True)
        damage(self.folder)
        return self.folder
