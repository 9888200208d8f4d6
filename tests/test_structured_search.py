"""Searching counts: the net against pruning itself, prices against finite differences, and the way to a folder."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from exact import VARIANTS, cut_sizes, model_of

from elastic_sparsity import structured_search
from elastic_sparsity.arch import decoder_blocks, linears_of, weight_OI
from elastic_sparsity.errors import ConfigError, NumericsError, OutputError, ShapeError
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.pruning import load_pruned, prune
from elastic_sparsity.sized import heads_may_differ, sizes_field
from elastic_sparsity.structured import prune_structured_
from elastic_sparsity.structured_parts import sizes_for, sliced_model
from elastic_sparsity.structured_search import check_search, search_sizes
from elastic_sparsity.structured_search_file import SearchFile
from elastic_sparsity.structured_sizes import HELD_OUT
from elastic_sparsity.supernet import TopKL
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.unit_net import UnitNet
from elastic_sparsity.wiring import wiring_of

IDS = torch.randint(4, 260, (HELD_OUT + 4, 24), generator=torch.Generator().manual_seed(0))
AUTOCAST = autocast_factory("float32", "cpu")


def scored(model, sizes, damping=0.01):
    net = UnitNet(model)
    net.score_(IDS[:4], sizes, damping=damping, at_once=8, batch_size=4, autocast=AUTOCAST)
    return net


def kept_of(net, sizes):
    counts = {"attention": sizes.groups, "mlp": sizes.channels}
    return [counts[name][depth] for name, depth in zip(net.names, net.depths, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_net_keeps_what_pruning_keeps(variant):
    """Scored on the stream of these counts and set to them, it is the pruned model; restored, the dense one."""
    dense = model_of(variant, torch.float32)
    pruned, net_model = copy.deepcopy(dense), copy.deepcopy(dense)
    sizes = cut_sizes(dense)
    prune_structured_(pruned, IDS[:4], sizes, at_once=8, autocast=AUTOCAST)
    net = scored(net_model, sizes)
    assert net.totals == [sizes.num_groups if name == "attention" else sizes.num_channels for name in net.names]
    for name, weight in net_model.state_dict().items():
        assert torch.equal(weight, dense.state_dict()[name]), "dense again after scoring"
    net.apply_(kept_of(net, sizes))
    for (name, found), wanted in zip(linears_of(net_model).items(), linears_of(pruned).values(), strict=True):
        assert torch.allclose(weight_OI(found), weight_OI(wanted), atol=1e-5), name
        if found.bias is not None:
            assert torch.allclose(found.bias, wanted.bias, atol=1e-5), name
    net.apply_(net.totals)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(net_model.parameters(), dense.parameters(), strict=True))
    net.restore_()
    assert all(torch.equal(x, y) for x, y in zip(net_model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_prices_are_the_gradient_along_the_refit(family):
    """Against the slow way: refit to every count, and take the product of the change with autograd's gradient."""
    model = tiny_model(family)
    sizes = cut_sizes(model)
    net = scored(model, sizes)
    loss = TopKL(model, IDS[-3:], AUTOCAST)
    kept = kept_of(net, sizes)
    net.apply_(kept)
    found = net.prices(lambda: loss.backward(range(3)))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss.backward(range(3))
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for i, curve in enumerate(found):
        assert len(curve) == net.totals[i] + 1 and curve[kept[i]] == 0
        for count in {1, max(1, kept[i] // 2), net.totals[i]}:
            net.apply_([count if j == i else k for j, k in enumerate(kept)])
            change = sum(
                float((gradients[name].double() * (parameters[name] - before[name]).double()).sum())
                for name in gradients
            )
            assert float(curve[count]) == pytest.approx(change, rel=2e-3, abs=2e-6)
        net.apply_(kept)


def test_what_a_net_refuses():
    model = tiny_model("llama")
    sizes = cut_sizes(model)
    with pytest.raises(ShapeError, match="score first"):
        UnitNet(model).apply_([1] * 4)
    net = scored(model, sizes)
    with pytest.raises(ShapeError, match="block 0, attention: 0 kept of 2 units"):
        net.apply_([0, 64, 2, 64])
    with pytest.raises(ShapeError, match="no gradient"):
        net.prices(lambda: None)

    def poisoned():
        for linear in linears_of(model).values():
            linear.weight.grad = torch.full_like(linear.weight, float("nan"))

    with pytest.raises(NumericsError, match="not finite"):
        net.prices(poisoned)


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "opt-350m", "gemma2"])
def test_a_search_keeps_the_budget_and_lowers_the_loss(variant):
    model = model_of(variant, torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    even = sizes_for(model, 0.4, 8)
    options = {"damping": 0.01, "batch_size": 4, "autocast": AUTOCAST}
    equal = search_sizes(model, IDS, 0.4, 8, search="equal", **options)
    assert len(set(equal.sizes.groups)) == len(set(equal.sizes.channels)) == 1 and equal.losses == []
    has_choice = bool(equal.equal)
    assert has_choice == wiring_of(model.config).free_heads
    if has_choice:
        assert equal.equal[equal.sizes.groups[0]] == min(equal.equal.values())
    steps = []
    found = search_sizes(
        model, IDS, 0.4, 8, search="blocks", progress=lambda stage, done, total: steps.append(stage), **options
    )
    sizes = found.sizes
    assert found.losses[0] == min(found.equal.values()) and len(found.losses) > 1
    assert not has_choice or found.equal == equal.equal
    whole = search_sizes(model, IDS, 0.4, 8, search="blocks", strength=1.0, **options)
    assert whole.losses == found.losses and (found.strength, whole.strength) == (0.5, 1.0)
    assert (min(found.losses) < found.losses[0]) == (whole.sizes != equal.sizes)
    assert whole.sizes != equal.sizes or sizes == equal.sizes, "half of no way"
    assert min(sizes.removed, equal.sizes.removed) >= even.removed and sizes.total == even.total
    assert all(1 <= count <= even.num_groups for count in sizes.groups)
    assert all(count % 8 == 0 and 8 <= count <= even.num_channels for count in sizes.channels)
    if not heads_may_differ(wiring_of(model.config)):
        assert len(set(sizes.groups)) == 1
    assert steps[:2] == ["ordering blocks"] * 2 and set(steps[2:]) == {"counts of blocks"}
    again = search_sizes(model, IDS, 0.4, 8, search="blocks", **options)
    assert again == found
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_loss_it_reports_is_that_of_its_counts():
    model = tiny_model("llama")
    options = {"damping": 0.01, "batch_size": 4, "autocast": AUTOCAST}
    found = search_sizes(model, IDS, 0.4, 8, search="blocks", strength=1.0, **options)
    loss = TopKL(model, IDS[-HELD_OUT:], AUTOCAST)
    net = scored(model, sizes_for(model, 0.4, 8))
    net.apply_(kept_of(net, found.sizes))
    assert loss(range(HELD_OUT)) == pytest.approx(min(found.losses), rel=1e-4)


def test_heads_that_no_config_can_say(tmp_path):
    """Of 8 key/value heads a Llama of width 64 can say 1, 2, 4 and 8; blocks may keep 3, 5, 6 or 7 all the same."""
    model = tiny_model("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    even = sizes_for(model, 0.4, 8)
    for groups in ((6, 3), (5, 5), (7, 8)):
        masked = copy.deepcopy(model)
        sizes = replace(even, groups=groups, channels=(16, 16))
        cut = sliced_model(masked, prune_structured_(masked, IDS, sizes, at_once=8, autocast=AUTOCAST))
        assert cut.config.num_key_value_heads == 8 and sizes_field(cut.config) == (list(groups), [16, 16])
        with torch.no_grad():
            expected = masked(IDS, use_cache=False).logits
            assert torch.allclose(cut(IDS, use_cache=False).logits, expected, atol=2e-5)
            cut.save_pretrained(tmp_path / str(groups))
            byte_tokenizer().save_pretrained(tmp_path / str(groups))
            back, _ = load_pruned(tmp_path / str(groups))
            assert torch.allclose(back(IDS, use_cache=False).logits, expected, atol=2e-5)


def test_other_starts_remove_no_less():
    """SmolLM2's shapes: by rule 2 of 3 heads stay at 50 %, and the others would have removed less."""
    model = tiny_model("llama", hidden_size=36, num_attention_heads=9, num_key_value_heads=3, intermediate_size=96)
    for sparsity in (0.25, 0.4, 0.5):
        start = sizes_for(model, sparsity, 8)
        others = structured_search._other_starts(model, start, sparsity, 8)
        assert {found.groups[0] for found in others} | {start.groups[0]} == {1, 2, 3}
        for found in others:
            assert found.removed >= start.removed and found.channels[0] % 8 == 0
            pruned = sliced_model(model, prune_structured_(copy.deepcopy(model), IDS, found, scores="magnitude",
                                                           autocast=AUTOCAST))  # fmt: skip
            assert model.num_parameters() - pruned.num_parameters() == found.removed


def test_an_interrupted_search_leaves_the_dense_weights(monkeypatch):
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for place in ("prices", "apply_"):
        calls, real = [], getattr(UnitNet, place)

        def interrupt(self, *args, calls=calls, real=real):
            calls.append(1)
            if len(calls) == 2 or real.__name__ == "prices":
                raise KeyboardInterrupt
            return real(self, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(UnitNet, place, interrupt)
            search_sizes(model, IDS, 0.4, 8, search="blocks", damping=0.01, batch_size=4, autocast=AUTOCAST)
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("search", ["equal", "blocks"])
def test_an_interrupted_search_goes_on_to_the_same_counts(search, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "counts of blocks":
            raise Stop

    made, path = {"what": search}, tmp_path / "s.json"
    options = {"damping": 0.01, "batch_size": 4, "autocast": AUTOCAST, "search": search}
    whole = search_sizes(tiny_model("llama"), IDS, 0.4, 8, **options)
    if search == "blocks":
        assert len(whole.losses) > 3 and min(whole.losses) < whole.losses[0]
    for _ in whole.losses[1:]:  # after every step
        with pytest.raises(Stop):
            search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, made), progress=stop, **options)
        assert not json.loads(path.read_text())["finished"]
    found = search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, made), **options)
    assert found == whole

    class Never:  # what is finished is not done again
        def __init__(self, *args):
            raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastic_sparsity.structured_search.TopKL", Never)
        assert search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, made), **options) == whole
    with pytest.raises(OutputError, match=r"s\.json: holds an unfinished search of other settings \('what'\)"):
        search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, {"what": "other"}), **options)
    kept = json.loads(path.read_text())
    for change, message in (
        ({"kept": kept["kept"][1:]}, "its counts are not this model's"),
        ({"kept": [0, *kept["kept"][1:]]}, "its counts are not this model's"),
        ({"kept": [2, 64] * 2}, "its counts do not keep the budget"),
        ({"equal": {"7": 1.0}}, "its counts do not keep the budget"),
        ({"losses": []}, "at least 1 item"),
        ({"odd": 1}, "Extra inputs"),
        ({"stalled": "1"}, "valid integer"),
    ):
        path.write_text(json.dumps({**kept, **change}))
        with pytest.raises(OutputError, match=f"holds no search that can go on: .*{message}"):
            search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, made), **options)
    for text in ("", "[]", "{", "[" * 5000):
        path.write_text(text)
        with pytest.raises(OutputError, match="holds no search that can go on"):
            search_sizes(tiny_model("llama"), IDS, 0.4, 8, file=SearchFile(path, made), **options)


def test_a_prune_without_a_search_touches_no_file_of_one(tmp_path, monkeypatch):
    (tmp_path / "small.search.json").write_text("mine")
    options = {"sparsity": 0.4, "multiple": 8, "samples": 20, "length": 24}
    prune("random:llama", tmp_path / "small", **options)
    assert (tmp_path / "small.search.json").read_text() == "mine"
    (tmp_path / "other.search.json").mkdir()
    monkeypatch.setattr("elastic_sparsity.pruning.load_base", None)  # refused before a model is loaded
    with pytest.raises(OutputError, match=r"other\.search\.json"):
        prune("random:llama", tmp_path / "other", search="blocks", **options)


def test_a_prune_that_is_killed_keeps_its_search(tmp_path, monkeypatch):
    options = {"sparsity": 0.4, "multiple": 8, "samples": 20, "length": 24, "search": "blocks"}
    whole = prune("random:llama", tmp_path / "whole", **options)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("elastic_sparsity.pruning.prune_structured_", killed)
        prune("random:llama", tmp_path / "small", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["small.search.json"]
    with pytest.raises(OutputError, match=r"other settings \('calibration_sha256'\)"):
        prune("random:llama", tmp_path / "small", **{**options, "seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr("elastic_sparsity.structured_search.TopKL", None)  # nothing is judged again
        assert prune("random:llama", tmp_path / "small", **options) == whole
    assert not (tmp_path / "small.search.json").exists()
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "small" / file.name).read_bytes()


def test_one_block_has_nothing_to_share_out_but_ends():
    model = tiny_model("llama", num_hidden_layers=1)
    assert len(decoder_blocks(model)) == 1
    found = search_sizes(model, IDS, 0.4, 8, search="blocks", damping=0.01, batch_size=4, autocast=AUTOCAST)
    assert len(found.sizes.groups) == 1


def test_prune_writes_a_folder_that_comes_back(tmp_path):
    options = {"sparsity": 0.4, "multiple": 8, "samples": 20, "length": 24}
    found = prune("random:llama", tmp_path / "small", search="blocks", **options)
    model, _ = load_pruned(tmp_path / "small")
    assert model.num_parameters() == found.parameters_after < found.parameters_before
    assert found.searched is not None and min(found.searched.losses) <= found.searched.losses[0]
    assert found.parameters_before - found.parameters_after == found.sizes.removed
    widths = tuple(block.mlp.down_proj.weight.shape[1] for block in decoder_blocks(model))
    assert widths == found.sizes.channels
    even = prune("random:llama", tmp_path / "even", **options)
    assert even.searched is None and found.parameters_after <= even.parameters_after


def test_what_a_search_refuses(tmp_path):
    with pytest.raises(ConfigError, match="search: 'best' is not one of equal, blocks"):
        check_search("best", "obs", 128)
    with pytest.raises(ConfigError, match="needs the exact refits of scores 'obs', found 'flap'"):
        prune("random:llama", tmp_path / "x", sparsity=0.5, scores="flap", search="equal")
    with pytest.raises(ConfigError, match="16 calibration samples, of which 16 are held out"):
        prune("random:llama", tmp_path / "x", sparsity=0.5, samples=16, search="blocks")
    with pytest.raises(ConfigError, match="10 calibration samples"):
        search_sizes(tiny_model("llama"), IDS[:10], 0.4, 8, search="equal", damping=0.01, batch_size=4,
                     autocast=AUTOCAST)  # fmt: skip
    assert not (tmp_path / "x").exists()
