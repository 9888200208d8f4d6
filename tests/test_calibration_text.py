"""Calibration samples: of a text, of the model's own, or of both."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity import ElasticCheckpoint, calibration_text, data, measure, optimize
from elastic_sparsity.calibration_text import calibration_tokens, evaluation_windows, interleave
from elastic_sparsity.config import EvaluationSection
from elastic_sparsity.data import rows_together, sample_from_model, sample_windows, tokenize
from elastic_sparsity.errors import ConfigError, DataError
from elastic_sparsity.models import load_base
from elastic_sparsity.tiny import tiny_model


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "cache_folder", lambda: tmp_path / "cache")
    return load_base("random:llama", "float32")


@pytest.fixture
def recipe(tmp_path):
    """8 samples of 16 tokens from a text that has that many."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i) for i in range(400)))
    return lambda **fields: tiny_recipe(calibration={"source": str(text), "samples": 8, "length": 16, **fields})


def test_a_hub_data_set_is_no_text_to_measure_on(base, monkeypatch):
    """It would be its training split, whole."""
    monkeypatch.setattr(calibration_text, "read_text", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match="evaluation.source: 'wikitext': no such file; name a text"):
        evaluation_windows(tiny_recipe(evaluation={"source": "wikitext"}), base, None)


@pytest.mark.parametrize(("family", "begins"), [("gemma2", True), ("gemma3_text", True), ("llama", False)])
def test_every_sample_of_gemma_begins_with_its_token(family, begins, recipe, tmp_path, monkeypatch):
    """Given text, text of its own, both, and what is measured: by a run, and later."""
    monkeypatch.setattr(calibration_text, "cache_folder", lambda: tmp_path / "cache")
    base = load_base(f"random:{family}", "float32")
    base.tokenizer.bos_token = base.tokenizer.convert_ids_to_tokens(7)
    text = recipe().calibration.source
    measured = recipe().model_copy(update={"evaluation": EvaluationSection(source=text, window=16)})
    windows_ST, protocol = evaluation_windows(measured, base, None)
    own = tiny_recipe(calibration={"source": "self", "samples": 4, "length": 16})
    both = recipe(self_share=0.5)
    for ids_ST in (calibration_tokens(recipe(), base)[0], *calibration_tokens(own, base),
                   calibration_tokens(both, base)[0], windows_ST):  # fmt: skip
        assert (ids_ST[:, 0] == 7).all() == begins and ids_ST.shape[1] == 16
        assert len(ids_ST[:, 1].unique()) > 1
    assert protocol.get("begin_of_text") == (7 if begins else None)
    whole = tokenize(base.tokenizer, Path(text).read_text())
    assert torch.equal(windows_ST[:, int(begins) :].flatten(), whole[: windows_ST[:, int(begins) :].numel()])


def test_a_random_token_is_not_to_be_predicted(tmp_path, monkeypatch):
    """Text of Gemma's own begins with its token and a random one; the loss is over what the model wrote."""
    monkeypatch.setattr(calibration_text, "cache_folder", lambda: tmp_path / "cache")
    recipe = tiny_recipe(model={"id": "random:gemma2"}, end_to_end={"trainable": "off"})
    base = load_base("random:gemma2", "float32")
    held_out = calibration_tokens(recipe, base)[1]
    windows_ST, protocol = evaluation_windows(recipe, base, held_out)
    assert protocol["begin_of_text"] == 0 and calibration_text.given_tokens(recipe, protocol) == 2
    with torch.no_grad():
        log_p = base.model(windows_ST).logits[:, 1:-1].log_softmax(-1)
    expected = math.exp(-log_p.gather(-1, windows_ST[:, 2:, None]).mean())
    optimize(recipe, tmp_path / "c")
    rows = measure.measure(recipe, ElasticCheckpoint(tmp_path / "c"))
    assert rows[0]["perplexity"] == pytest.approx(expected, rel=1e-4)
    base.tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="tokenizer: has no bos_token, which text for gemma2 begins with"):
        calibration_tokens(recipe, base)


def test_what_is_measured_later_begins_as_the_run_did(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i) for i in range(400)))
    recipe = tiny_recipe(
        model={"id": "random:gemma2"},
        calibration={"source": str(text)},
        evaluation={"source": str(text), "window": 32, "max_windows": 3, "baselines": []},
        end_to_end={"trainable": "off"},
    )
    checkpoint = optimize(recipe, tmp_path / "c")
    run = {row["level"]: row["perplexity"] for row in measure.measure(recipe, checkpoint)}
    for path in (str(tmp_path / "c"), "random:gemma2"):
        later, protocol = measure.evaluate_path(path, str(text), window=32, max_windows=3, precision="float32")
        assert protocol["begin_of_text"] == 0
        for row in later:
            assert row["perplexity"] == pytest.approx(run[row["level"]], rel=1e-5)


@given(st.integers(0, 40), st.integers(0, 40))
def test_interleaved_samples_keep_their_order_and_are_spread_evenly(first, second):
    """Any run of the first samples holds the two within one of their proportion, which nothing can better by much."""
    found = interleave(torch.arange(first)[:, None], 1000 + torch.arange(second)[:, None])[:, 0]
    is_second = found >= 1000
    assert torch.equal(found[~is_second], torch.arange(first))
    assert torch.equal(found[is_second], 1000 + torch.arange(second))
    seen = is_second.cumsum(0)
    wanted = torch.arange(1, first + second + 1) * second / max(first + second, 1)
    assert ((seen - wanted).abs() <= 1.0).all()


def test_a_share_is_the_models_own_text_among_the_given_one(base, recipe):
    mixed, held_out = calibration_tokens(recipe(samples=12, self_share=1 / 3), base)
    given_ST, _ = calibration_tokens(recipe(samples=8), base)
    own_ST, _ = calibration_tokens(recipe(source="self", samples=4), base)
    assert mixed.shape == (12, 16) and held_out is None
    assert torch.equal(mixed, interleave(given_ST, own_ST))
    assert torch.equal(mixed[1::3], own_ST), "every third"


def test_text_sampled_in_bfloat16_turns_by_exact_angles(base, recipe, monkeypatch):
    """Rotary frequencies are buffers, which a model in bfloat16 has in float32: rounded, far positions turn wrongly."""
    seen = []
    monkeypatch.setattr(
        calibration_text, "sample_from_model", lambda model, *_, **__: seen.append(model) or torch.zeros(2, 16).long()
    )
    calibration_tokens(recipe(source="self").model_copy(update={"precision": "bfloat16"}), base)
    assert {x.dtype for x in seen[0].parameters()} == {torch.bfloat16} != {x.dtype for x in base.model.parameters()}
    frequencies = dict(base.model.named_buffers())
    assert frequencies and all(torch.equal(x, frequencies[name]) for name, x in seen[0].named_buffers())


def test_without_a_share_all_samples_are_of_the_text(base, recipe):
    found, _ = calibration_tokens(recipe(), base)
    ids = tokenize(base.tokenizer, Path(recipe().calibration.source).read_text())
    assert torch.equal(found, sample_windows(ids, 8, 16, seed=recipe().seed))


def test_of_self_the_model_writes_everything_whatever_the_share(base, recipe):
    whole, _ = calibration_tokens(recipe(source="self"), base)
    assert torch.equal(whole, calibration_tokens(recipe(source="self", self_share=0.25), base)[0])


@pytest.mark.parametrize(("fields", "named"), [({"source": "self"}, "source"), ({"self_share": 0.5}, "self_share")])
def test_a_model_read_block_by_block_writes_nothing(base, recipe, fields, named):
    base = dataclasses.replace(base, stream=object())
    with pytest.raises(ConfigError, match=f"calibration.{named}: .*block by block"):
        calibration_tokens(recipe(**fields), base)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), True, "half"])
def test_a_share_outside_its_range_is_named(recipe, share):
    with pytest.raises(ConfigError, match="calibration.self_share"):
        recipe(self_share=share)


@pytest.mark.parametrize(("share", "own"), [(0.05, 0), (0.95, 8)])
def test_a_share_of_no_sample_or_of_all_is_refused(recipe, share, own):
    with pytest.raises(ConfigError, match=f"calibration.self_share: {share} of 8 samples are {own}; at least one"):
        recipe(self_share=share)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "qwen3"])
def test_sequences_are_sampled_together_as_their_keys_and_values_fit(family, monkeypatch):
    """The cache's own tensors say how many bytes a sequence takes."""
    model = tiny_model(family).eval()
    cache = model(torch.zeros(1, 24, dtype=torch.int64), use_cache=True).past_key_values
    sequence = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert data._cache_bytes(model, 24) == sequence
    seen = []
    monkeypatch.setattr(data, "SELF_BATCH", 2)
    found = sample_from_model(model, 5, 12, temperature=1.0, seed=0, on_batch=lambda *at: seen.append(at))
    assert found.shape == (5, 12) and seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("weights", "sequence", "together"),
    [(10, 2**30, 2), (8 * 2**30, 2**30, 8), (10, 3 * 2**30, 1), (10, 1, data.SELF_BATCH)],
    ids=["2 GiB", "as many bytes as the weights", "one at least", "no more than pays"],
)
def test_how_many_sequences_are_sampled_together(weights, sequence, together):
    assert rows_together(weights, sequence) == together
