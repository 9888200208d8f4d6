"""`write_report` and the command: what is written where, what is refused, and that the checkpoint stays what it was."""

import os
import shutil

import pytest
from conftest import tiny_recipe
from reports import Page, quality, with_record
from test_cli import expect_error, run

from elastic_sparsity import ElasticCheckpoint, copy_level, optimize, pipeline, reporting, upgrade, verify, write_report
from elastic_sparsity.errors import CheckpointError, ConfigError, OutputError
from elastic_sparsity.model_card import MARK


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "c")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without plots, which take most of the time; whatever is said of files holds with them too."""
    monkeypatch.setattr(
        reporting, "plots_of", lambda _: dict.fromkeys(("sparsity", "bytes", "totals", "zeros", "errors"))
    )


def test_the_command_end_to_end(capsys, folder):
    code, stdout, stderr = run(capsys, "report", with_record(folder, quality=quality()))
    assert code == 0, stderr
    assert f"{folder}/report.html: the report; {folder}/README.md: the model card." in stdout
    page, card = folder / "report.html", folder / "README.md"
    assert Page(page.read_text(encoding="utf-8")).problems == [] and MARK in card.read_text(encoding="utf-8")
    first = page.read_bytes(), card.read_bytes()
    assert run(capsys, "report", folder)[0] == 0, "its own files are replaced"
    assert (page.read_bytes(), card.read_bytes()) == first
    assert not list(folder.glob(".*")), "nothing is left behind"


def test_another_page_and_no_card(capsys, folder, tmp_path, undrawn):
    page = tmp_path / "new" / "page.html"
    code, stdout, stderr = run(capsys, "report", folder, "--output", page, "--no-card")
    assert code == 0 and f"{page}: the report." in stdout, stderr
    assert page.is_file() and not (folder / "README.md").exists() and not (folder / "report.html").exists()
    assert run(capsys, "report", folder, "--output", page)[0] == 0
    assert "report.html" not in (folder / "README.md").read_text(), "the card names no page that is not beside it"


def test_what_a_person_wrote_stays(capsys, folder, undrawn):
    card, page = folder / "README.md", folder / "report.html"
    card.write_text("# Mine\n")
    expect_error(capsys, "README.md: is there already, and not by `elastic-sparsity report`; give --no-card",
                 "report", folder)  # fmt: skip
    assert card.read_text() == "# Mine\n" and not page.exists(), "all or nothing"
    assert run(capsys, "report", folder, "--no-card")[0] == 0 and card.read_text() == "# Mine\n"
    assert run(capsys, "report", folder, "--force")[0] == 0 and MARK in card.read_text()
    card.write_text(card.read_text().replace(MARK, ""))
    expect_error(capsys, "give --no-card to leave it alone, or --force", "report", folder)
    page.write_text("<p>mine</p>")
    expect_error(capsys, "give another --output to leave it alone", "report", folder, "--no-card")


def test_mistakes(capsys, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    expect_error(capsys, "no elastic checkpoint here", "report", tmp_path / "empty")
    expect_error(capsys, "is no file; name another output file", "report", folder, "--output", tmp_path / "empty")
    expect_error(capsys, "cannot be made", "report", folder, "--output", folder / "config.json" / "x.html")
    expect_error(capsys, "is where the model card goes", "report", folder, "--output", folder / "README.md")
    for name in ("elastic_config.json", "shell-core.safetensors", "config.json", "run.json"):
        before = (folder / name).read_bytes()
        with pytest.raises(OutputError, match="is a file of the checkpoint itself"):
            write_report(folder, folder / name, force=True)
        assert (folder / name).read_bytes() == before
    with pytest.raises(ConfigError, match="owner/name: is on a hub, where no report can be written; give --output"):
        write_report("owner/name", card=False)
    with pytest.raises(ConfigError, match="download it and name the folder"):
        write_report("owner/name", tmp_path / "x.html")
    (folder / "README.md").mkdir()
    with pytest.raises(OutputError, match=r"README\.md: is no file"):
        write_report(folder)
    assert not (folder / "report.html").exists()
    config = folder / "elastic_config.json"
    config.write_bytes(config.read_bytes()[:-200])
    expect_error(capsys, "elastic_config.json: cannot be read", "report", folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_report(folder, card=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(folder):
    folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be made"):
            write_report(folder)
    finally:
        folder.chmod(0o755)


def test_the_checkpoint_stays_what_it_was(folder, tmp_path, undrawn):
    """Verified, copied and upgraded as before; a device's part can have its own report."""
    before = (folder / "elastic_config.json").read_bytes()
    write_report(folder)
    assert (folder / "elastic_config.json").read_bytes() == before
    assert all(check.passed for check in verify(folder))
    part = copy_level(folder, "0.7", tmp_path / "part").folder
    assert not (part / "README.md").exists()
    assert "The files of 50 %, 60 %, 2:4 are not in" in write_report(part).read_text(encoding="utf-8")
    upgrade(part, folder, "0.5")
    assert ElasticCheckpoint(part).is_complete(ElasticCheckpoint(part).find("0.5"))
    assert all(check.passed for check in verify(part))


def test_a_run_that_was_killed_after_its_checkpoint_still_ends(tmp_path, monkeypatch, undrawn):
    """It finds a checkpoint with a report in it, and goes on as it would without."""

    def killed(*_):
        raise KeyboardInterrupt

    out, recipe = tmp_path / "out", tiny_recipe(block={"steps": 0}, end_to_end={"trainable": "off"})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "record_run", killed)
        with pytest.raises(KeyboardInterrupt):
            optimize(recipe, out)
    assert (tmp_path / "out.run").is_dir()
    page = write_report(out)
    assert "no run.json here" in page.read_text(encoding="utf-8")
    assert optimize(recipe, out).folder == out and not (tmp_path / "out.run").exists()
    assert page.is_file() and (out / "README.md").is_file()
    with pytest.raises(OutputError, match="already holds something"):
        optimize(recipe, out)
