"""Fixtures of the tests with bad inputs: one ledger, an offline and empty place to work in, and good inputs."""

import huggingface_hub.constants
import pytest
from hostile import Ledger
from hostile_values import QUICK

from elastic_sparsity.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="session")
def ledger(tmp_path_factory):
    """One for all files; tests/test_hostile_total.py prints it."""
    return Ledger(tmp_path_factory.mktemp("ledger"))


@pytest.fixture
def judged(ledger, monkeypatch, request):
    """Every test here runs offline in an empty folder, and fails if one of its cases was a problem."""
    monkeypatch.chdir(ledger.here)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", refuse_to_connect)
    monkeypatch.setattr("elastic_sparsity.report.plot_results", lambda rows, path, title: path.write_bytes(b"plot"))
    ledger.files.add(request.node.path.name)
    before = len(ledger.problems)
    yield
    ledger.check(before)


def refuse_to_connect(*_):
    raise OSError("no network in tests")


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "good.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def quick(tmp_path):
    """A recipe that samples its text from the model."""
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path


@pytest.fixture
def streamed(tmp_path, text_file):
    """A recipe whose model is read block by block."""
    path = tmp_path / "streamed.toml"
    text = QUICK.replace('source = "self"', f'source = "{text_file}"').replace('weights = "auto"', 'weights = "stream"')
    path.write_text(text.replace('trainable = "base"', 'trainable = "off"'))
    return path
