"""The packed runtime: a model of packed linears gives the dense slice's logits, switches levels, and refuses misuse."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_recipe
from test_contract import IDS, train_and_save

from elastic_sparsity import ElasticModel, native, optimize, save_sliced, set_level
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import CheckpointError, ConfigError
from elastic_sparsity.packed import DIRECT_TOKENS, PackedLinear, Workspace
from elastic_sparsity.packed_weight import pack_weight
from elastic_sparsity.tiny import TINY_FAMILIES

USABLE = [path.name for path in native.instruction_paths() if path.problem is None]


def packed_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_gives_the_logits_of_its_dense_slice(family, tmp_path):
    train_and_save(family, tmp_path / "checkpoint")
    checkpoint = ElasticCheckpoint(tmp_path / "checkpoint")
    for level in checkpoint.ladder.levels:
        dense = ElasticModel.from_pretrained(tmp_path / "checkpoint", level.name)
        packed = ElasticModel.from_pretrained(tmp_path / "checkpoint", level.name, runtime="packed")
        assert packed_linears(packed).keys() == checkpoint.linears.keys()
        for ids in (IDS[:1, :1], IDS[:2, :5], IDS):  # one token, a few, and more than `DIRECT_TOKENS`
            with torch.no_grad():
                assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-5), level
    assert IDS.numel() > DIRECT_TOKENS


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_generates_what_the_dense_slice_does(path, dtype, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, path)
    dense = ElasticModel.from_pretrained(tiny_checkpoint, "60%", dtype=dtype)
    packed = ElasticModel.from_pretrained(tiny_checkpoint, "60%", dtype=dtype, runtime="packed")
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # of logits up to 1
    for tokens in (1, 3, 60):
        with torch.no_grad():
            found, expected = packed(IDS[:, :tokens]).logits, dense(IDS[:, :tokens]).logits
        assert found.dtype == dtype and torch.allclose(found, expected, atol=tolerance)
    if dtype == torch.float32:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(packed.generate(IDS[:1, :4], **options), dense.generate(IDS[:1, :4], **options))


def test_memory_is_the_packed_weights(tiny_checkpoint):
    dense = ElasticModel.from_pretrained(tiny_checkpoint, "70%")
    packed = ElasticModel.from_pretrained(tiny_checkpoint, "70%", runtime="packed")
    names = [f"{name}.weight" for name in packed_linears(packed)]
    shared = sum(p.numel() * 4 for name, p in dense.named_parameters() if name not in names)
    weights = sum(module.packed.num_bytes for module in packed_linears(packed).values())
    assert packed.get_memory_footprint(return_buffers=False) == shared
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in dense.buffers())
    assert packed.get_memory_footprint() == shared + weights + buffers


def test_set_level_switches_packed_weights(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, "70%", runtime="packed")
    for level in ("50%", "2:4", "60%", "70%"):
        set_level(model, level)
        expected = ElasticModel.from_pretrained(tiny_checkpoint, level, runtime="packed")
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected(IDS).logits), level
        assert model.elastic_state.level == expected.elastic_state.level


def test_a_failed_switch_leaves_packed_weights(tiny_checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    model = ElasticModel.from_pretrained(folder, "70%", runtime="packed")
    with torch.no_grad():
        before = model(IDS).logits
    damaged = folder / "shell-level-0.5.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(CheckpointError):
        set_level(model, "50%")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before) and model.elastic_state.level.name == "0.7"


def test_masked_base_without_adapters(tiny_checkpoint):
    options = {"level": "60%", "merge_adapters": False}
    dense = ElasticModel.from_pretrained(tiny_checkpoint, **options)
    packed = ElasticModel.from_pretrained(tiny_checkpoint, runtime="packed", device="cpu", **options)
    with torch.no_grad():
        assert torch.allclose(packed(IDS).logits, dense(IDS).logits, atol=1e-5)


def test_models_can_be_copied(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, "60%", runtime="packed")
    twin = copy.deepcopy(model)
    set_level(twin, "70%")
    with torch.no_grad():
        assert not torch.equal(twin(IDS).logits, model(IDS).logits)


def test_a_recipe_without_unstructured_levels(tmp_path):
    optimize(tiny_recipe(ladder={"sparsities": [], "patterns": ["2:4"]}), tmp_path / "c")
    dense = ElasticModel.from_pretrained(tmp_path / "c", "2:4")
    packed = ElasticModel.from_pretrained(tmp_path / "c", "2:4", runtime="packed")
    with torch.no_grad():
        assert torch.allclose(packed(IDS).logits, dense(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "sparse"}, "runtime: 'sparse' is not one of dense, packed, semi_structured"),
        ({"runtime": "semi_structured", "device": "cpu"}, "'semi_structured' cannot run here: cpu is no NVIDIA GPU"),
        ({"runtime": "packed", "dtype": "float16"}, "runtime: 'packed' has no float16"),
        ({"runtime": "packed", "device_map": {"": "cpu"}}, "runtime: 'packed' is for the CPU"),
        ({"max_bytes": "1GB", "level": "60%"}, "level '60%' leaves nothing to choose"),
    ],
)
def test_what_cannot_be_loaded(options, message, tiny_checkpoint):
    with pytest.raises(ConfigError, match=message):
        ElasticModel.from_pretrained(tiny_checkpoint, **options)


def test_budgets_choose_level_and_runtime(tiny_checkpoint):
    checkpoint = ElasticCheckpoint(tiny_checkpoint)
    smallest = min(checkpoint.ladder.levels, key=checkpoint.download_bytes)
    limit = checkpoint.download_bytes(smallest)
    assert ElasticModel.from_pretrained(tiny_checkpoint, max_bytes=limit).elastic_state.level == smallest
    chosen = ElasticModel.from_pretrained(tiny_checkpoint, device_profile="laptop-avx2", max_bytes="1GB")
    assert packed_linears(chosen), "the laptop's profile says that packed is faster"
    dense = ElasticModel.from_pretrained(
        tiny_checkpoint, device_profile="laptop-avx2", max_bytes="1GB", runtime="dense"
    )
    assert not packed_linears(dense)


def test_misuse_is_refused(tiny_checkpoint, tmp_path):
    model = ElasticModel.from_pretrained(tiny_checkpoint, "60%", runtime="packed")
    linear = next(iter(packed_linears(model).values()))
    with pytest.raises(
        ConfigError,
        match=r"found an input \(1, 32\) of torch.bfloat16 on cpu, expected \(\.\.\., 32\) of torch.float32",
    ):
        linear(torch.ones(1, linear.in_features, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="packed weights are for inference"):
        linear(torch.ones(1, linear.in_features, requires_grad=True))
    with pytest.raises(ConfigError, match=r"found an input \(2, 128\).*expected \(\.\.\., 32\)"):
        linear(torch.ones(2, 128))
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features))
    with pytest.raises(ConfigError, match="packed weights are for inference"):
        linear(torch.ones(1, linear.in_features))
    linear.bias = None
    indices = linear.mask_OW, linear.starts
    linear.type(torch.float32)
    assert linear.mask_OW is indices[0] and linear.starts is indices[1], "only values have a dtype to change"
    with pytest.raises(ConfigError, match="cannot become torch.float16 on cpu"):
        linear.half()
    with pytest.raises(ConfigError, match="cannot become torch.float32 on meta"):
        linear.to("meta")
    with pytest.raises(ConfigError, match="packed weights are not saved from a live model"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="it has no weight yet"):
        PackedLinear(4, 4, None, None, Workspace())(torch.ones(1, 4))
    with pytest.raises(ConfigError, match=r"found a weight of \(2, 3\), expected \(4, 4\)"):
        weight = pack_weight(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.float32)
        PackedLinear(4, 4, None, None, Workspace()).set_packed(weight)
    save_sliced(tiny_checkpoint, "60%", tmp_path / "plain")  # the way that is named


def test_dtypes_change_as_those_of_a_dense_model(tiny_checkpoint):
    dense = ElasticModel.from_pretrained(tiny_checkpoint, "60%").to(torch.bfloat16)
    packed = ElasticModel.from_pretrained(tiny_checkpoint, "60%", runtime="packed").to("cpu", torch.bfloat16)
    assert {linear.values.dtype for linear in packed_linears(packed).values()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.allclose(packed(IDS).logits, dense(IDS).logits, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, DIRECT_TOKENS, DIRECT_TOKENS + 1])
def test_autocast_computes_in_the_weights_dtype(dtype, tokens, tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, "60%", runtime="packed", dtype=dtype)
    linear = next(iter(packed_linears(model).values()))
    x = torch.randn(tokens, linear.in_features)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == dtype
        assert torch.isfinite(model(IDS[:1]).logits).all()


@pytest.mark.parametrize("runtime", ["dense", "packed"])
def test_defaults_of_the_process_do_not_matter(runtime, tiny_checkpoint, monkeypatch):
    """Memory that compiled code writes to must not follow torch's default dtype or device."""
    expected = ElasticModel.from_pretrained(tiny_checkpoint, "2:4", runtime=runtime)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = ElasticModel.from_pretrained(tiny_checkpoint, "60%", dtype=torch.float32, runtime=runtime)
        set_level(model, "2:4")
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    if runtime == "packed":
        linear = next(iter(packed_linears(model).values()))
        x = torch.randn(DIRECT_TOKENS + 1, linear.in_features)
        outside = linear(x), linear(x[:1])
        with torch.device("meta"):
            inside = linear(x), linear(x[:1])
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_two_models_can_be_loaded_at_once(tiny_checkpoint):
    def load(number):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        return ElasticModel.from_pretrained(tiny_checkpoint, "50%", dtype=dtype, runtime="packed")

    expected = load(0)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load, range(8)))
    with torch.no_grad():
        assert all(torch.equal(model(IDS).logits, expected(IDS).logits) for model in models[::2])


def test_a_thread_sees_one_level_whole():
    """Another thread switches between a dense and a sparse weight all the time; every product is of one of them."""
    weight, x = torch.randn(64, 256), torch.randn(1, 256)
    masks = torch.rand(64, 256) > 0.1, torch.rand(64, 256) > 0.95
    packed = [pack_weight(weight, mask, torch.float32) for mask in masks]
    linear = PackedLinear(256, 64, None, native.kernels(), Workspace())
    possible = []
    for one in packed:
        linear.set_packed(one)
        possible.append(linear(x))
    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(lambda: [linear.set_packed(packed[number % 2]) for number in range(20_000)])
        while not switching.done():
            found = linear(x)
            assert any(torch.equal(found, one) for one in possible)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_trace_is_refused(tiny_checkpoint):
    model = ElasticModel.from_pretrained(tiny_checkpoint, "60%", runtime="packed")
    linear = next(iter(packed_linears(model).values()))
    with pytest.raises(ConfigError, match="cannot be traced"):
        torch.jit.trace(linear, torch.ones(1, linear.in_features))
    assert torch.isfinite(linear(torch.ones(1, linear.in_features))).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_give_what_one_does(has_bias, dtype, monkeypatch):
    """A prompt's product by tiles of any size, also from two threads at once."""
    weight, mask = torch.randn(50, 96), torch.rand(50, 96) > 0.5
    bias = torch.nn.Parameter(torch.randn(50).to(dtype), requires_grad=False) if has_bias else None
    linear = PackedLinear(96, 50, bias, native.kernels(), Workspace())
    linear.set_packed(pack_weight(weight, mask, dtype))
    x = torch.randn(2 * DIRECT_TOKENS, 96).to(dtype)
    expected = torch.nn.functional.linear(x, (weight * mask).to(dtype), bias)
    for rows in (1, 7, 32, 50):
        monkeypatch.setattr("elastic_sparsity.packed.TILE_BYTES", rows * 96 * dtype.itemsize)
        assert torch.allclose(linear(x), expected, rtol=0.01, atol=1e-4 if dtype == torch.float32 else 0.05), rows
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: linear(x), range(16)))
        assert all(torch.equal(y, found[0]) for y in found)
