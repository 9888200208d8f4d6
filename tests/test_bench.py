"""Bench on the tiny checkpoint: with a clock that only the models move, so that every number is known; and for real."""

import gc
import re
import time
import types
import weakref

import pytest
import torch
from conftest import tiny_recipe
from machines import gpu, kernels, machine
from torch import nn

from elastic_sparsity import ElasticCheckpoint, ElasticModel, optimize
from elastic_sparsity.bench import bench, load_way, resident_bytes
from elastic_sparsity.device_profile import predict, read_profile, write_profile
from elastic_sparsity.errors import CheckpointError, ConfigError, LevelError
from elastic_sparsity.generating import empty_cache, greedy_stepper
from elastic_sparsity.semi_structured import pack_2of4
from elastic_sparsity.shells import LinearSpec
from elastic_sparsity.tiny import tiny_model
from elastic_sparsity.ways import Way, linear_bytes, misfit, streamed_bytes

QUICK = {"batches": (1, 4), "prompt": 8, "new_tokens": 3, "repeats": 2}
PACKED = machine(**kernels("avx2", avx2=None))
TWO_WAYS = {"levels": ["0.7"], "ways": ["dense-float32", "packed-float32"], "facts": PACKED}
DENSE = Way(runtime="dense", dtype="float32")
BYTES_PER_S = {"dense": 1e6, "packed": 0.5e6}
OVERHEAD_S = {"dense": 1e-3, "packed": 2e-3}


class SlowModels:
    """Loads real models that move a clock of their own: a linear by its bytes, all the rest by overhead.

    Dense linears cost the same for any number of tokens, packed ones cost more with each.
    """

    noise = 1.0  # factor on all times

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.asked = []  # way and tokens of every call of a whole model
        self.contexts = []  # tokens in the cache before each
        self.alive = []
        clock = types.SimpleNamespace(perf_counter=lambda: self.now, strftime=time.strftime)
        monkeypatch.setattr("elastic_sparsity.bench.time", clock)

    def load(self, folder, level, way, device):
        checkpoint = ElasticCheckpoint(folder)
        model = ElasticModel.from_pretrained(folder, level.name, dtype=way.dtype, device=device)
        linears = 0
        for name, spec in checkpoint.linears.items():
            size = linear_bytes(spec, level, way)
            linears += size
            model.get_submodule(name).register_forward_pre_hook(self.hook(way, size))
        rest = streamed_bytes(checkpoint, level, way) - linears
        overhead = OVERHEAD_S[way.runtime] * len(checkpoint.linears)

        def before(module, args, kwargs):
            self.asked.append((way.name, kwargs["input_ids"].numel()))
            cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
            self.contexts.append(cache.get_seq_length())
            self.now += self.noise * (overhead + rest / BYTES_PER_S[way.runtime])

        model.register_forward_pre_hook(before, with_kwargs=True)
        gc.collect()
        self.alive.append((level.name, weakref.ref(model)))
        assert {name for name, model in self.alive if model() is not None} == {level.name}, "other levels are gone"
        return model

    def hook(self, way, size):
        def before(module, args):
            tokens = args[0].numel() // args[0].shape[-1] if way.runtime == "packed" else 1
            self.now += self.noise * tokens * size / BYTES_PER_S[way.runtime]

        return before


def test_every_number_of_a_known_machine(tiny_checkpoint, monkeypatch):
    slow = SlowModels(monkeypatch)
    profile = bench(tiny_checkpoint, levels=["0.7", "0.5"], facts=PACKED, load=slow.load, **QUICK)
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    assert list(profile.ways) == ["dense-float32", "packed-bfloat16", "packed-float32"]
    for name, entry in profile.ways.items():
        runtime = name.partition("-")[0]
        assert entry.bytes_per_s == pytest.approx(BYTES_PER_S[runtime])
        assert entry.overhead_s == pytest.approx(OVERHEAD_S[runtime])
        assert entry.fit_error == pytest.approx(0, abs=1e-9)
    assert [(row.level, row.way) for row in profile.measurements] == [
        (level, way) for level in ("0.7", "0.5") for way in profile.ways
    ]
    linears = sum(x.size for x in checkpoint.linears.values())
    for row in profile.measurements:
        level, way = checkpoint.find(row.level), profile.ways[row.way].way
        size = streamed_bytes(checkpoint, level, way)
        packed = sum(linear_bytes(x, level, way) for x in checkpoint.linears.values())

        def step(tokens, way=way, size=size, packed=packed):
            more = (tokens - 1) * packed if way.runtime == "packed" else 0
            return 14 * OVERHEAD_S[way.runtime] + (size + more) / BYTES_PER_S[way.runtime]

        dense_s = 14 * OVERHEAD_S["dense"] + streamed_bytes(checkpoint, level, DENSE) / 1e6
        assert row.streamed_bytes == size and row.linears == 14
        assert row.disk_bytes == checkpoint.bytes_of(level)
        assert [(x.batch, x.step_s) for x in row.decode] == [(1, pytest.approx(step(1))), (4, pytest.approx(step(4)))]
        assert [x.speedup for x in row.decode] == [pytest.approx(dense_s / step(n)) for n in (1, 4)]
        assert row.prefill.tokens_per_s == pytest.approx(8 / step(8))
        assert row.prefill.speedup == pytest.approx(dense_s / step(8))
        assert row.resident_bytes >= linears * (2 if way.dtype == "bfloat16" else 4)
        assert predict(profile, checkpoint, level, row.way).ms_per_token == pytest.approx(1000 * step(1))
    for row in profile.shapes:
        way, level = profile.ways[row.way].way, checkpoint.find(row.level)
        spec = next(x for x in checkpoint.linears.values() if x.shape == (row.outputs, row.inputs))
        tokens = row.tokens if way.runtime == "packed" else 1
        assert row.seconds == pytest.approx(tokens * linear_bytes(spec, level, way) / BYTES_PER_S[way.runtime])
    shapes = {x.shape for x in checkpoint.linears.values()}
    assert len(profile.shapes) == len(shapes) * 2 * 3 * 2  # levels, ways, numbers of tokens


def test_the_line_of_linears_that_keep_different_numbers(tmp_path, monkeypatch):
    """Linears of one shape are timed together; the bytes beside that time are their mean too."""
    recipe = tiny_recipe(
        allocation={"slope": 0.4}, adapters={"ranks": 0}, block={"steps": 0}, end_to_end={"trainable": "off"}
    )
    checkpoint = optimize(recipe, tmp_path / "c")
    assert len({spec.kept for spec in checkpoint.linears.values() if spec.shape == (32, 32)}) > 1
    slow = SlowModels(monkeypatch)
    profile = bench(tmp_path / "c", levels=["0.7", "0.5"], facts=PACKED, load=slow.load, **QUICK)
    for entry in profile.ways.values():
        assert entry.bytes_per_s == pytest.approx(BYTES_PER_S[entry.runtime])
        assert entry.overhead_s == pytest.approx(OVERHEAD_S[entry.runtime])


def test_ways_take_turns(tiny_checkpoint, monkeypatch):
    slow = SlowModels(monkeypatch)
    bench(
        tiny_checkpoint, levels=["0.7"], ways=["dense-float32", "packed-float32"], facts=PACKED, load=slow.load, **QUICK
    )
    prefills = [way for way, tokens in slow.asked if tokens == 8]
    assert prefills == ["dense-float32", "packed-float32", "packed-float32", "dense-float32", *prefills[:2]]
    sizes = [tokens for way, tokens in slow.asked]
    assert sizes == 2 * [8, 1, 1, 4, 4] + 4 * [8, 1, 1, 1, 4, 4, 4], "two tokens warm up, three count"
    assert slow.contexts == 2 * [0, 8, 9, 8, 9] + 4 * [0, 8, 9, 10, 8, 9, 10], "each batch goes on from the prompt"


def test_a_machine_that_slows_down_does_not_change_a_speedup(tiny_checkpoint, monkeypatch):
    slow = SlowModels(monkeypatch)
    settings = {**TWO_WAYS, "load": slow.load, **QUICK, "repeats": 4}
    quiet = bench(tiny_checkpoint, **settings)
    slow.asked.clear()
    monkeypatch.setattr(SlowModels, "noise", property(lambda self: 1 + 0.02 * len(self.asked)))
    loud = bench(tiny_checkpoint, **settings)
    (_, before), (_, after) = ([row.decode[0] for row in x.measurements] for x in (quiet, loud))
    assert after.step_s > 1.5 * before.step_s
    assert after.speedup == pytest.approx(before.speedup, rel=0.03)


def test_dense_for_real_end_to_end(tiny_checkpoint, tmp_path):
    seen = []
    threads = torch.get_num_threads()
    profile = bench(
        tiny_checkpoint, levels=["60%", "2:4"], ways=["dense-float32"], name="here", threads=1,
        progress=lambda *row: seen.append(row), **QUICK,
    )  # fmt: skip
    assert torch.get_num_threads() == threads
    assert [(row.level, row.way) for row in profile.measurements] == [
        ("0.6", "dense-float32"),
        ("2:4", "dense-float32"),
    ]
    assert all(x.step_s > 0 and x.speedup == 1 for row in profile.measurements for x in row.decode)
    assert profile.name == "here" and not profile.is_estimate and profile.device.threads == 1
    assert {stage for stage, _, _ in seen} >= {"timing 60 %", "timing linears of 2:4"}
    assert all(done <= total for _, done, total in seen)
    write_profile(profile, tmp_path / "here.json")
    assert read_profile(tmp_path / "here.json") == profile


def test_the_real_loader_asks_for_the_way(tiny_checkpoint, monkeypatch):
    level = ElasticCheckpoint(tiny_checkpoint).find(0.7)
    model = load_way(tiny_checkpoint, level, Way(runtime="dense", dtype="bfloat16"), "cpu")
    assert model.dtype == torch.bfloat16 and model.elastic_state.level == level
    seen = {}
    monkeypatch.setattr(ElasticModel, "from_pretrained", lambda *args, **options: seen.update(options))
    load_way(tiny_checkpoint, level, Way(runtime="packed", dtype="float32"), "cpu")
    assert seen == {"dtype": "float32", "device": "cpu", "runtime": "packed"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "gpt_neox", "phi3"])
def test_the_timed_loop_decodes_what_the_model_says(family):
    model = tiny_model(family)
    ids_BT = torch.randint(260, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        step, cache = greedy_stepper(model), empty_cache(model)
        token, tokens = step(ids_BT, cache), []
        cache.batch_repeat_interleave(3)
        token = token.repeat(3, 1)
        for _ in range(4):
            tokens.append(token)
            token = step(token, cache)
        for expected in tokens:
            found = model(input_ids=ids_BT, use_cache=False).logits[:, -1:].argmax(-1)
            assert torch.equal(expected, found.repeat(3, 1))
            ids_BT = torch.cat([ids_BT, found], dim=1)


def test_resident_bytes_count_what_is_tied_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("mask", torch.zeros(5, dtype=torch.uint8))

    assert resident_bytes(Model()) == 4 * 3 * 4 + 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_resident_bytes_of_2of4_weights_are_those_they_are_made_of():
    def sparse():
        weight = torch.zeros(64, 128, dtype=torch.float16)
        packed, meta = pack_2of4(weight)
        return torch.sparse.SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)

    model = nn.Sequential(*(nn.Linear(128, 64, dtype=torch.float16) for _ in range(2)))
    for linear in model:
        linear.weight = nn.Parameter(sparse(), requires_grad=False)
    way = Way(runtime="semi_structured", dtype="float16")
    spec = LinearSpec(shape=(64, 128), transposed=False, kept=(), pattern_values=(64 * 64,))
    assert resident_bytes(model) == 2 * (linear_bytes(spec, None, way) + 64 * 2)


@pytest.mark.parametrize(
    ("shape", "transposed", "runtime", "problem"),
    [
        ((64, 128), False, "semi_structured", None),
        ((64, 100), False, "semi_structured", r"b is \(64, 100\) in float16; 2:4 products take multiples of \(32, 64"),
        ((16, 128), False, "semi_structured", r"b is \(16, 128\)"),
        ((64, 128), True, "semi_structured", "b is stored transposed"),
        ((16, 100), True, "dense", None),
        ((16, 100), True, "packed", "packed has no float16"),
    ],
)
def test_linears_that_2of4_products_do_not_take(shape, transposed, runtime, problem):
    specs = {
        name: LinearSpec(shape=size, transposed=flag, kept=(), pattern_values=(0,))
        for name, size, flag in (("a", (32, 64), False), ("b", shape, transposed))
    }
    found = misfit(specs, Way(runtime=runtime, dtype="float16"))
    assert found is None if problem is None else re.match(problem, found)


def test_a_way_that_cannot_hold_the_linears_is_left_out(tiny_checkpoint, monkeypatch, caplog):
    """k_proj has 16 rows. A GPU that is not here: so nothing is timed, but asked for."""
    asked = []

    def load(folder, level, way, device):
        asked.append((level.name, way.name))

    class Loaded(Exception):
        pass

    def stop(*_args):
        raise Loaded

    monkeypatch.setattr("elastic_sparsity.bench._Run._time_models", stop)
    monkeypatch.setattr("elastic_sparsity.bench.device_free", lambda: 10**9)
    with pytest.raises(Loaded):
        bench(tiny_checkpoint, levels=["2:4"], facts=machine(gpus=(gpu(),)), device="cuda", load=load, **QUICK)
    assert asked == [("2:4", "dense-bfloat16"), ("2:4", "dense-float16")]
    assert re.search(r"bench: semi_structured-float16 is left out: \S+ is \(\d+, \d+\) in float16", caplog.text)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batches": (8,)}, ConfigError, r"batches \[8\] must be above 0 and contain 1"),
        ({"batches": (1, 0)}, ConfigError, "must be above 0"),
        ({"batches": ()}, ConfigError, "contain 1"),
        ({"prompt": 0}, ConfigError, "prompt: 0 is not between 1 and 1000000"),
        ({"new_tokens": 0}, ConfigError, "new tokens: 0"),
        ({"repeats": 0}, ConfigError, "repeats: 0"),
        ({"threads": 0}, ConfigError, "threads: 0"),
        ({"device": "tpu"}, ConfigError, "device 'tpu' is not cpu or cuda"),
        ({"device": "cuda"}, ConfigError, "way none does not exist on cuda here; there are: none"),
        ({"ways": ["dense-int8"]}, ConfigError, "way dense-int8 does not exist on cpu here; there are: dense-float32"),
        ({"ways": ["packed-float32"]}, ConfigError, "add a dense one, which the others are compared with"),
        ({"prompt": 254}, ConfigError, "257 tokens, but the model reads at most 256"),
        ({"levels": ["0.9"]}, LevelError, "it has: 0.5"),
        (
            {"facts": machine(free_bytes=1000)},
            ConfigError,
            "bytes side by side, 1000 are there; time fewer",
        ),
        ({"facts": machine(gpus=(gpu(),)), "device": "cuda"}, ConfigError, "9 are there"),
    ],
)
def test_wrong_settings(changes, error, message, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("elastic_sparsity.bench.device_free", lambda: 9)
    threads = torch.get_num_threads()
    with pytest.raises(error, match=message):
        bench(tiny_checkpoint, **{"facts": PACKED, "load": load_dense, **QUICK, **changes})
    assert torch.get_num_threads() == threads


def load_dense(folder, level, way, device):
    return ElasticModel.from_pretrained(folder, level.name, dtype=way.dtype)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no elastic checkpoint here"):
        bench(tmp_path)
