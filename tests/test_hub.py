"""A hub id: only the level's files are downloaded, all of one commit; every failure is one quick line.

The hub is a small server in this process that speaks the two requests of `hf_hub_download`.
"""

import copy
import hashlib
import pickle
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from test_checkpoint import flip, truncate

from elastic_sparsity import (
    ElasticModel,
    choose_level,
    copy_level,
    export_peft,
    levels,
    save_sliced,
    set_level,
    upgrade,
    verify,
)
from elastic_sparsity.bench import bench
from elastic_sparsity.errors import CheckpointError, ConfigError, ElasticSparsityError, LevelError
from elastic_sparsity.hub import elastic_folder, with_secrets
from elastic_sparsity.manifest import CONFIG_NAME, read_manifest
from elastic_sparsity.measure import evaluate_path

REPOSITORY = "someone/elastic-tiny"
FIRST, SECOND = "1" * 40, "2" * 40  # commits
SHELLS = ["shell-core.safetensors", "shell-level-0.6.safetensors", "shell-level-0.5.safetensors"]  # sparsest first
ADAPTERS = [f"adapters-{group}.safetensors" for group in range(3)]  # densest first
EVERY_LEVEL = {*SHELLS, "shell-pattern-2of4.safetensors", "adapters-3.safetensors"}


class Hub(ThreadingHTTPServer):
    """Serves one repository. Tests change its attributes to break it."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits = {FIRST: folder}
        self.main = FIRST
        self.moves_to = None  # main's next commit, as soon as elastic_config.json has been read
        self.overloaded = False
        self.cut = None  # a file whose connection breaks before its first byte
        self.asked = []  # (method, revision, file)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.options = {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def sent(self):
        """Names of the files downloaded since the last call, each at most once."""
        files = [file for method, _, file in self.asked if method == "GET"]
        self.asked.clear()
        assert len(files) == len(set(files))
        return set(files)


class HubHandler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does, with the headers that huggingface_hub reads."""

    def do_HEAD(self):
        if self.server.overloaded:
            return self.answer(503, {})
        match = re.fullmatch(r"/(.+/.+)/resolve/([^/]+)/(.+)", self.path)
        if match is None or match[1] != REPOSITORY:  # the real hub does not tell strangers what exists
            return self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revision, file = match[2], match[3]
        self.server.asked.append((self.command, revision, file))
        commit = self.server.main if revision == "main" else revision
        if commit not in self.server.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        path = self.server.commits[commit] / file
        if not path.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.answer(200, headers, data, cut=file == self.server.cut)
        if self.command == "GET" and file == CONFIG_NAME and self.server.moves_to:
            self.server.main = self.server.moves_to
        return None

    do_GET = do_HEAD

    def answer(self, status, headers, data=b"", cut=False):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET" and not cut:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny_checkpoint, tmp_path, monkeypatch):
    """The server; `hub.options` are the keyword arguments that lead to it. No other host is within reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    look_up = socket.getaddrinfo

    def look_up_here(host, *args, **kwargs):
        if host not in ("127.0.0.1", b"127.0.0.1"):
            raise OSError(f"a test asked for {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    huggingface_hub.close_session()  # it may remember a proxy
    server = Hub(tiny_checkpoint)
    server.options = {"endpoint": server.url, "cache_dir": tmp_path / "cache", "token": False}
    yield server
    server.stop()
    huggingface_hub.close_session()


@pytest.fixture
def broken(hub, tiny_checkpoint, tmp_path):
    """A copy of the checkpoint that the hub now serves, to be damaged."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    hub.commits[FIRST] = folder
    return folder


@pytest.fixture
def common_files(tiny_checkpoint):
    """What every level reads: config, tokenizer, shared weights, the sparsest shell, the first adapters."""
    manifest, _ = read_manifest(tiny_checkpoint)
    extras = {entry.file for entry in manifest.extras}
    assert {"config.json", "tokenizer.json"} <= extras
    return {CONFIG_NAME, "shared.safetensors", SHELLS[0], ADAPTERS[0]} | extras


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def failing(error_type, match, call, *args, seconds=4, **kwargs):
    """Runs a call that must fail soon, with one line that matches."""
    start = time.monotonic()
    with pytest.raises(error_type, match=match) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ElasticSparsityError)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < seconds


def test_a_level_downloads_only_its_files(hub, common_files, tiny_checkpoint):
    model = ElasticModel.from_pretrained(REPOSITORY, level="70%", **hub.options)
    assert hub.sent() == common_files | set(ADAPTERS)
    assert_same_weights(model, ElasticModel.from_pretrained(tiny_checkpoint, level="70%"))


def test_a_denser_level_downloads_the_rest(hub, common_files, tiny_checkpoint):
    ElasticModel.from_pretrained(REPOSITORY, level="70%", **hub.options)
    assert hub.sent() == common_files | set(ADAPTERS)
    model = ElasticModel.from_pretrained(REPOSITORY, level="50%", **hub.options)
    assert hub.sent() == set(SHELLS[1:])
    assert_same_weights(model, ElasticModel.from_pretrained(tiny_checkpoint, level="50%"))
    ElasticModel.from_pretrained(REPOSITORY, level="70%", **hub.options)
    assert hub.sent() == set()


def test_auto_is_the_densest(hub, common_files):
    model = ElasticModel.from_pretrained(REPOSITORY, **hub.options)
    assert hub.sent() == common_files | set(SHELLS)
    assert model.elastic_state.level.name == "0.5"


def test_levels_reads_the_config_only(hub, tiny_checkpoint):
    rows = levels(REPOSITORY, **hub.options)
    assert hub.sent() == {CONFIG_NAME}
    assert [(row.name, row.bytes) for row in rows] == [(row.name, row.bytes) for row in levels(tiny_checkpoint)]
    assert not any(row.available for row in rows)


def test_save_sliced_writes_a_plain_folder(hub, common_files, tiny_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_sliced(REPOSITORY, 0.6, tmp_path / "plain", **hub.options)
    assert hub.sent() == common_files | {SHELLS[1], ADAPTERS[1]}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_same_weights(plain, ElasticModel.from_pretrained(tiny_checkpoint, level="60%"))
    AutoTokenizer.from_pretrained(tmp_path / "plain")


def test_all_files_are_of_one_commit(hub, common_files, tmp_path):
    hub.commits[SECOND] = tmp_path / "not there"
    hub.moves_to = SECOND
    ElasticModel.from_pretrained(REPOSITORY, level="70%", **hub.options)
    assert hub.main == SECOND
    assert {revision for _, revision, file in hub.asked if file != CONFIG_NAME} == {FIRST}
    assert hub.sent() == common_files | set(ADAPTERS)


@pytest.mark.parametrize("how", ["local_files_only", "server down", "overloaded", "HF_HUB_OFFLINE"])
def test_without_the_hub_the_cache_serves(how, hub, common_files, monkeypatch):
    ElasticModel.from_pretrained(REPOSITORY, level="70%", **hub.options)
    hub.overloaded = how == "overloaded"
    if not hub.overloaded:
        hub.stop()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {**hub.options, "local_files_only": how == "local_files_only"}
    ElasticModel.from_pretrained(REPOSITORY, level="70%", **options)
    absent = r"shell-level-0\.6\.safetensors cannot be fetched"
    failing(CheckpointError, absent, ElasticModel.from_pretrained, REPOSITORY, level="50%", **options)


def test_no_answer_is_told_at_once(hub):
    hub.stop()
    failing(CheckpointError, "elastic_config.json.*refused", levels, REPOSITORY, **hub.options)


def test_unknown_names_are_told(hub):
    failing(CheckpointError, "someone/else.*Repository Not Found", levels, "someone/else", **hub.options)
    failing(CheckpointError, "Revision Not Found", levels, REPOSITORY, revision="v9", **hub.options)
    failing(ConfigError, "unknown argument 'branch'.*revision", levels, REPOSITORY, branch="v9", **hub.options)
    failing(LevelError, "0.5", ElasticModel.from_pretrained, REPOSITORY, level="90%", **hub.options)
    assert hub.sent() == {CONFIG_NAME}


def test_no_elastic_checkpoint_in_the_repository(hub, broken):
    (broken / CONFIG_NAME).unlink()
    failing(CheckpointError, "elastic_config.json.*Entry Not Found", levels, REPOSITORY, **hub.options)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "Entry Not Found"),
    "truncated": (lambda path: truncate(path, 3), r"has \d+ bytes, expected \d+"),
    "flipped bit": (flip, "sha256 differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_on_the_hub_is_named(name, hub, broken):
    change, message = DAMAGE[name]
    change(broken / SHELLS[0])
    match = f"{SHELLS[0]}.*{message}"
    failing(CheckpointError, match, ElasticModel.from_pretrained, REPOSITORY, level="70%", **hub.options)


def test_a_connection_that_breaks_is_an_error_of_ours(hub, monkeypatch):
    hub.cut = SHELLS[0]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub retries it, once a second
    failing(CheckpointError, SHELLS[0], ElasticModel.from_pretrained, REPOSITORY, level="70%", **hub.options)


def test_a_live_model_switches_by_downloading_what_is_missing(hub):
    model = ElasticModel.from_pretrained(REPOSITORY, "70%", **hub.options)
    hub.sent()
    set_level(model, "50%")
    assert hub.sent() == {"shell-level-0.6.safetensors", "shell-level-0.5.safetensors"}
    set_level(model, "70%")
    assert hub.sent() == set()


def test_a_token_is_used_but_not_pickled(hub):
    model = ElasticModel.from_pretrained(REPOSITORY, "70%", **{**hub.options, "token": "hf_secret"})
    pickled = pickle.dumps(model)
    assert b"hf_secret" not in pickled and b"hf_secret" not in repr(model.elastic_state).encode()
    for other in (pickle.loads(pickled), copy.deepcopy(model)):
        set_level(other, "50%")
    assert with_secrets(copy.deepcopy(model).elastic_state.hub)["token"] == "hf_secret"
    assert with_secrets(pickle.loads(pickled).elastic_state.hub)["token"] is None


def test_an_upgrade_downloads_only_what_is_missing(hub, tmp_path, tiny_checkpoint):
    copy_level(tiny_checkpoint, 0.6, tmp_path / "device")
    upgrade(tmp_path / "device", REPOSITORY, 0.5, **hub.options)
    assert hub.sent() == {CONFIG_NAME, "shell-level-0.5.safetensors"}
    ElasticModel.from_pretrained(tmp_path / "device", 0.5)


def test_an_export_for_peft_downloads_adapters_only(hub, tmp_path):
    export_peft(REPOSITORY, tmp_path / "a", **hub.options)
    assert hub.sent() == {CONFIG_NAME, *ADAPTERS, "adapters-3.safetensors"}


def test_what_is_cached_can_be_verified(hub):
    ElasticModel.from_pretrained(REPOSITORY, "70%", **hub.options)
    assert all(check.passed for check in verify(REPOSITORY, **hub.options))


def test_a_level_is_chosen_from_the_config_only(hub, tiny_checkpoint):
    choice = choose_level(REPOSITORY, max_bytes="1GB", profile="phone", **hub.options)
    assert hub.sent() == {CONFIG_NAME}
    assert choice == choose_level(tiny_checkpoint, max_bytes="1GB", profile="phone")
    failing(LevelError, "no level is complete here", choose_level, REPOSITORY, max_bytes="1GB",
            **hub.options, local_files_only=True)  # fmt: skip


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_an_answer_only_cached_levels_are_chosen(is_offline, hub, monkeypatch):
    ElasticModel.from_pretrained(REPOSITORY, "70%", **hub.options)
    if is_offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub.stop()
    choice = choose_level(REPOSITORY, max_bytes="1GB", **hub.options)
    assert choice.level == "0.7" and "its files are not here" in choice.explanation
    assert ElasticModel.from_pretrained(REPOSITORY, max_bytes="1GB", **hub.options).elastic_state.level.name == "0.7"


@pytest.mark.parametrize("level", ["70%", None])
def test_an_elastic_hub_id_is_evaluated(level, hub, common_files, tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    settings = {"level": level, "window": 64, "precision": "float32"}
    rows, _ = evaluate_path(REPOSITORY, str(text), **settings, **hub.options)
    assert hub.sent() == common_files | set(ADAPTERS) | (set() if level else EVERY_LEVEL)
    assert rows == evaluate_path(str(tiny_checkpoint), str(text), **settings)[0]


def test_what_is_evaluated_is_of_one_commit(hub, tmp_path):
    hub.moves_to = SECOND
    hub.commits[SECOND] = tmp_path / "not there"
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    evaluate_path(REPOSITORY, str(tmp_path / "text.txt"), level="70%", window=64, precision="float32", **hub.options)
    assert hub.main == SECOND
    assert {revision for _, revision, file in hub.asked if file != CONFIG_NAME} == {FIRST}


def test_what_is_no_elastic_hub_id_is_loaded_as_a_plain_model(hub, broken, tmp_path, monkeypatch):
    assert elastic_folder("someone/else", **hub.options) is None
    assert elastic_folder(tmp_path) is None
    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").write_bytes(b"")
    assert elastic_folder("models/x.gguf", **hub.options) is None
    assert hub.asked == [], "a file here is nothing to ask a hub for"
    (broken / CONFIG_NAME).unlink()
    assert elastic_folder(REPOSITORY, **hub.options) is None
    hub.stop()
    assert elastic_folder("someone/else", **hub.options) is None


def test_a_damaged_elastic_config_is_not_taken_for_a_plain_model(hub, broken, tmp_path):
    (broken / CONFIG_NAME).write_text("{")
    failing(CheckpointError, "elastic_config.json: cannot be read", evaluate_path, REPOSITORY, "x", **hub.options)


def test_a_bench_downloads_the_levels_it_times(hub, common_files):
    settings = {"prompt": 4, "new_tokens": 1, "repeats": 1, "batches": [1], "ways": ["dense-float32"]}
    profile = bench(REPOSITORY, levels=["70%"], **settings, **hub.options)
    assert hub.sent() == common_files | set(ADAPTERS)
    assert [row.level for row in profile.measurements] == ["0.7"]
