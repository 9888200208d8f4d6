"""Text in, token windows out: the perplexity protocol, all file types, and what bad text gets."""

import json
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity import data
from elastic_sparsity.data import draw, read_text, sample_from_model, sample_windows, token_hash, tokenize, windows
from elastic_sparsity.errors import DataError, NumericsError
from elastic_sparsity.tiny import byte_tokenizer, tiny_model


def test_text_file_is_read_whole_and_byte_exact(tmp_path):
    text = "First line.\n\n  Second: \u00e4\u20ac\n = Title = \n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) == text


def test_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in ("one", "two")))
    assert read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    from datasets import Dataset

    Dataset.from_dict({"body": ["one", "two"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert read_text(str(tmp_path / "a.parquet"), text_column="body") == "one\n\ntwo"
    with pytest.raises(DataError, match="no column 'text'; it has body"):
        read_text(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("a.pdf", b"x", "unknown ending '.pdf'"),
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n ", "holds no text"),
        ("latin.txt", b"caf\xe9 \xff\xfe", "cannot be read"),
        ("broken.jsonl", b'{"text": ', "cannot be read"),
        ("broken.parquet", b"PAR1 nonsense", "cannot be read"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    source = str(path)
    with pytest.raises(DataError, match=message) as caught:
        read_text(source)
    assert name in str(caught.value)


def test_windows_do_not_overlap_and_drop_the_tail():
    assert windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(10), 4, max_windows=1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(DataError, match="10 tokens are fewer than one window of 11"):
        windows(torch.arange(10), 11)


def test_samples_are_distinct_windows_in_seeded_order():
    ids = torch.arange(40)
    chosen = sample_windows(ids, 6, 4, seed=1)
    assert len({tuple(row) for row in chosen.tolist()}) == 6
    assert all(row[0] % 4 == 0 for row in chosen.tolist())
    assert torch.equal(chosen, sample_windows(ids, 6, 4, seed=1))
    assert not torch.equal(chosen, sample_windows(ids, 6, 4, seed=2))
    begun = sample_windows(ids, 6, 4, seed=1, first=99)
    assert begun.shape == (6, 4) and (begun[:, 0] == 99).all()
    assert {tuple(row[1:].tolist()) for row in begun} <= {tuple(row.tolist()) for row in windows(ids, 3)}
    with pytest.raises(DataError, match="40 tokens give 10 samples of 4 tokens, but the recipe asks for 11"):
        sample_windows(ids, 11, 4, seed=1)


def test_byte_tokenizer_keeps_every_byte():
    tokenizer = byte_tokenizer()
    text = "Zero \x00, tab\t, \u20ac and emoji \U0001f600"
    ids = tokenize(tokenizer, text)
    assert ids.numel() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_self_sampling_is_seeded_and_follows_the_model():
    model = tiny_model("llama")
    make = lambda seed: sample_from_model(model, 3, 12, temperature=1.0, seed=seed, on_batch=lambda *_: None)  # noqa: E731
    first = make(0)
    assert first.shape == (3, 12) and torch.equal(first, make(0)) and not torch.equal(first, make(1))
    assert (first[:, 1:] != 0).all(), "the end-of-text token is never sampled"
    cold = sample_from_model(model, 3, 12, temperature=1e-4, seed=0, on_batch=lambda *_: None)
    greedy = model(cold[:, :-1]).logits
    greedy[..., 0] = float("-inf")
    assert torch.equal(greedy.argmax(-1), cold[:, 1:]), "at temperature zero every token is the model's best"


def test_draws_follow_the_softmax_and_leave_out_what_has_no_share():
    """Against the shares themselves, 40,000 draws; a token of no share is never drawn, at the ends of a row either."""
    logits = torch.tensor([[float("-inf"), 0.3, -1.0, float("-inf"), 2.0, -0.5, float("-inf")]])
    drawn = draw(logits.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=7) / 40_000
    wanted = logits.softmax(-1)[0]
    assert not shares[wanted == 0].any()
    assert torch.all((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / 40_000).sqrt())


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["least", "greatest"])
def test_the_ends_of_the_unit_interval_draw_a_token_that_has_a_share(value, monkeypatch):
    """Also where a product with the total would round up to it, as no generator ever gives."""
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, generator: torch.full(shape, value, dtype=dtype))
    assert int(draw(logits, torch.Generator())) == (1 if value == 0.0 else 2)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_draws_are_those_of_one_running_sum(block, size, seed, part_left_out):
    """The oracle: the first token whose running sum is above the random number, without blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(50, size, generator=generator)
    logits[torch.rand(50, size, generator=generator) < part_left_out] = float("-inf")
    logits[:, int(torch.randint(size, (), generator=generator))] = 1.0  # one at least has a share
    with mock.patch.object(data, "DRAW_BLOCK", block):
        found = draw(logits, torch.Generator().manual_seed(seed))[:, 0]
    sums = logits.softmax(-1).double().cumsum(-1)
    at = torch.rand(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * sums[:, -1:]
    assert torch.equal(found, (sums <= at).sum(-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45])
def test_a_temperature_of_nothing_is_a_named_error(temperature):
    """In float32 the logits are infinite or not a number then."""
    model = tiny_model("llama")
    with pytest.raises(NumericsError, match="not finite"):
        sample_from_model(model, 2, 12, temperature=temperature, seed=0, on_batch=lambda *_: None)


def test_token_hash_tells_apart():
    assert token_hash(torch.arange(3)) != token_hash(torch.arange(4))
