"""Shared fixtures: the smallest recipe, and a trained tiny checkpoint made once a session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elastic_sparsity import optimize
from elastic_sparsity.config import make_recipe

TINY_RECIPE = {
    "model": {"id": "random:llama"},
    "calibration": {"source": "self", "samples": 6, "length": 16},
    "evaluation": {"max_windows": 2},
    "ladder": {"sparsities": [0.5, 0.6, 0.7], "patterns": ["2:4"]},
    "adapters": {"ranks": 2},
    "block": {"steps": 2, "samples": 4, "batch_size": 2},
    "end_to_end": {"trainable": "base", "steps": 4, "batch_size": 2},
    "precision": "float32",
}


def tiny_recipe(**sections):
    """The tiny recipe with single fields replaced: `tiny_recipe(ladder={"patterns": []})`."""
    data = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY_RECIPE.items()}
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return make_recipe(data)


def merging_tokenizer(size=290, pre_tokenizer=None, text="", ignore_merges=False):
    """A byte-level BPE tokenizer with a few merges, learned from `text` too; splits text as GPT-2's by default."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["zeros that stay zero in the sparse weights of the fox " * 20, text * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )


def in_processes(count, script, *arguments):
    """Runs a script from the repository's root, in several processes by torchrun, and gives what came of it."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"] if count > 1 else []
    return subprocess.run(
        [sys.executable, *several, *map(str, (script, *arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Text for a few short samples; files with other needs have a fixture of this name of their own."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="module")
def settings(text_file):
    """How the tests of structured levels prune tiny models."""
    return {"calibration": str(text_file), "samples": 6, "length": 16, "multiple": 8, "precision": "float32"}


def pytest_collection_modifyitems(items):
    """Over several processes a file stays in one, and so do all files with bad inputs, which fill one ledger."""
    for item in items:
        name = item.path.name
        item.add_marker(pytest.mark.xdist_group("hostile" if name.startswith("test_hostile") else name))


def pytest_terminal_summary(terminalreporter):
    """What tests want to be read, also if they ran in another process."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            terminalreporter.write_line(f"\n{name}\n{text}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch, request):
    """Tests never read or fill the user's cache, except the one that fetches the real model."""
    if "real_model" not in request.keywords:
        folder = tmp_path_factory.getbasetemp() / "cache"
        monkeypatch.setenv("ELASTIC_SPARSITY_CACHE", str(folder))
    torch.set_num_threads(2 if "real_model" in request.keywords else 1)  # tiny matrices only lose by threads


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of an elastic checkpoint of a tiny random Llama. Read only; copy it to damage it."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_SPARSITY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        optimize(tiny_recipe(), folder)
    return folder
