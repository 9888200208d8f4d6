"""The script that trains a small OPT: a plain folder that the package takes, cached, resumed, refused if of others."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_sparsity.errors import ConfigError, DataError, OutputError
from elastic_sparsity.models import load_base

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_small_opt as script

TINY = script.Settings(
    vocabulary=300, context=16, hidden=16, layers=2, heads=2, steps=6, batch_size=2, learning_rate=1e-2, warmup=1
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "news.txt"
    path.write_text("".join(f"The quick brown fox number {i} jumps over the lazy dog.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def made(text):
    return script.train_small_opt(str(text), text.parent / "opt", TINY, log_every=2)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_folder_is_a_plain_model_as_opt_125m_is(made):
    base = load_base(str(made))
    config = base.model.config
    assert config.model_type == "opt" and config.do_layer_norm_before and config.activation_function == "relu"
    assert config.enable_bias and config.tie_word_embeddings and config.word_embed_proj_dim == config.hidden_size
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(made)
    words = "The lazy fox: naïve, 42!\n"
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == words and max(ids) < 300
    record = json.loads((made / script.RECORD_NAME).read_text())
    held_out = record["held_out"]
    assert 1 < held_out["perplexity"] < 300 and held_out["protocol"].endswith("the last 2 % of the text")
    assert record["parameters"] == base.model.num_parameters() and record["settings"]["steps"] == 6


def test_training_helps(text, made, tmp_path):
    random = script.make_model(TINY).state_dict()
    assert any(not torch.equal(value, random[name]) for name, value in weights(made).items())
    longer = script.train_small_opt(str(text), tmp_path / "longer", replace(TINY, steps=60))
    found = [json.loads((path / script.RECORD_NAME).read_text())["held_out"] for path in (made, longer)]
    assert found[1]["perplexity"] < found[0]["perplexity"] and found[1]["perplexity"] < found[1]["unigram"]


def test_a_finished_folder_is_left_as_it_is(text, made, monkeypatch, capsys):
    monkeypatch.setattr(script, "_trainer", None)  # it would be called
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert script.train_small_opt(str(text), made, TINY) == made
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert "finished already, held-out perplexity" in capsys.readouterr().out
    assert not (made.parent / ".opt.training").exists()


class _Interrupt(script.TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on(text, made, tmp_path, monkeypatch):
    """And ends with the very weights of one that was not interrupted."""
    real = script._trainer

    def interrupted(*args):
        trainer = real(*args)
        trainer.add_callback(_Interrupt())
        return trainer

    out = tmp_path / "opt"
    with monkeypatch.context() as patch:
        patch.setattr(script, "_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train_small_opt(str(text), out, TINY, save_every=2)
    assert not out.exists() and (tmp_path / ".opt.training" / "checkpoint-4").is_dir()
    with pytest.raises(ConfigError, match=r"\.opt\.training: is of learning_rate 0.01, not 0.5; name another output"):
        script.train_small_opt(str(text), out, replace(TINY, learning_rate=0.5))
    lines = []
    monkeypatch.setattr(script, "log", lines.append)
    script.train_small_opt(str(text), out, TINY, save_every=2)
    assert "goes on from checkpoint-4" in lines and not (tmp_path / ".opt.training").exists()
    once, twice = weights(made), weights(out)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_other_settings_and_texts_are_refused_by_name(text, made, tmp_path):
    with pytest.raises(ConfigError, match="opt: is of layers 2, not 3; seed 0, not 1; name another output or remove"):
        script.train_small_opt(str(text), made, replace(TINY, layers=3, seed=1))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "x")
    with pytest.raises(ConfigError, match=r"opt: is of text \w{12}, not \w{12};"):
        script.train_small_opt(str(other), made, TINY)
    with pytest.raises(DataError, match="no such file"):
        script.train_small_opt(str(tmp_path / "no.txt"), tmp_path / "out", TINY)
    with pytest.raises(ConfigError, match="are more than 15,000,000"):
        script.make_model(replace(TINY, hidden=1024, layers=6))
    with pytest.raises(ConfigError, match="--hidden: 16 is no multiple of --heads, 3"):
        script.make_model(replace(TINY, heads=3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="already holds something"):
        script.train_small_opt(str(text), tmp_path / "mine", TINY)
    other.write_text("short")
    with pytest.raises(DataError, match="fewer than"):
        script.train_small_opt(str(other), tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.training").exists()


def test_samples_cover_the_text_epoch_after_epoch():
    samples = script.Samples(torch.arange(170), replace(TINY, steps=20))
    assert len(samples) == 40
    starts = [int(x["input_ids"][0]) for x in samples]
    assert len({x % 16 for x in starts[:9]}) == 1, "one offset an epoch"
    assert len(set(starts[:9])) == 9 and starts[:9] != sorted(starts[:9]) and max(starts) + 16 <= 170
    assert torch.equal(samples[0]["labels"], torch.arange(starts[0], starts[0] + 16))
