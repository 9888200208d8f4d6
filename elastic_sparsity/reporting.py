"""`write_report`: a checkpoint's page and model card, written whole or not at all, over nobody's own work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_sparsity import model_card, report_page, report_plots
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.errors import ConfigError, OutputError
from elastic_sparsity.files import atomic_file, check_output_file, is_file
from elastic_sparsity.hub import checkpoint_folder, is_hub_id
from elastic_sparsity.manifest import CONFIG_NAME, RUN_NAME
from elastic_sparsity.report_facts import MODEL_CONFIG_NAME, Facts, read_facts

PAGE_NAME, CARD_NAME = "report.html", "README.md"
MAX_MARK_BYTES = 1_000_000  # of a file that is there: as far as our mark is looked for


def write_report(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    card: bool = True,
    force: bool = False,
    **hub: Any,
) -> Path:
    """Writes one self-contained HTML page about a checkpoint and, into its folder, the model card README.md.

    All figures come from the checkpoint's own records and from `results`; nothing is measured, no tensor is read, and
    no file that the checkpoint lists is touched.

    Args:
        checkpoint: folder; or hub id, of which elastic_config.json alone is fetched: give `output` and no card then.
        output: the page; default: report.html in the folder.
        results: files that `elastic-sparsity eval --output` wrote about this checkpoint or its base model.
        card: whether to write the card.
        force: replace a page or card that this function has not written.
        **hub: as in `checkpoint_folder`, for a hub id.
    Returns: where the page is.
    Raises: CheckpointError: no checkpoint there, or a damaged elastic_config.json. ConfigError: a hub id without
        `output`, or with a card; results that cannot be read, or of other weights.
        OutputError: cannot be written, or would replace somebody's file.
    """
    remote = is_hub_id(checkpoint)
    if remote and (output is None or card):
        raise ConfigError(
            f"{checkpoint}: is on a hub, where no report can be written; give --output PAGE.html and --no-card, or "
            "download it and name the folder."
        )
    opened = ElasticCheckpoint(checkpoint_folder(checkpoint, None, **hub))
    page_path = opened.folder / PAGE_NAME if output is None else Path(output)
    card_path = opened.folder / CARD_NAME
    _check_free(page_path, report_page.MARK, opened, force)
    if card:
        if page_path.absolute() == card_path:
            raise ConfigError(f"{page_path}: is where the model card goes; name another page, or give --no-card.")
        _check_free(card_path, model_card.MARK, opened, force)
    facts = read_facts(opened, str(checkpoint) if remote else opened.folder.resolve().name, results)
    beside = page_path.name if page_path.absolute().parent == opened.folder else None
    texts = {page_path: report_page.page(facts, plots_of(facts))}
    if card:
        texts[card_path] = model_card.model_card(facts, beside)
    for path, text in texts.items():
        with atomic_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8", newline="\n")
    return page_path


def plots_of(facts: Facts) -> dict[str, str | None]:
    """Every figure that the facts allow, by the page's names for them."""
    return {
        "sparsity": report_plots.perplexity_by_sparsity(facts),
        "bytes": report_plots.perplexity_by_bytes(facts),
        "totals": report_plots.total_bytes(facts),
        "zeros": report_plots.zeros_by_layer(facts),
        "errors": report_plots.block_errors(facts),
    }


def _check_free(path: Path, mark: str, checkpoint: ElasticCheckpoint, force: bool) -> None:
    """Raises: OutputError: unless `path` can be written, and is no part of the checkpoint nor of anybody's own."""
    check_output_file(path)
    manifest = checkpoint.manifest
    listed = [*manifest.extras, *(entry for entries in manifest.files.values() for entry in entries)]
    own = {CONFIG_NAME, MODEL_CONFIG_NAME, RUN_NAME, *(entry.file for entry in listed)}
    if os.path.realpath(path) in {os.path.realpath(checkpoint.folder / name) for name in own}:  # of a loop of links too
        raise OutputError(f"{path}: is a file of the checkpoint itself; name another output file.")
    if not force and is_file(path) and not _has_mark(path, mark):
        other = "--no-card" if path.name == CARD_NAME else "another --output"
        raise OutputError(
            f"{path}: is there already, and not by `elastic-sparsity report`; give {other} to leave it alone, or "
            "--force to replace it."
        )


def _has_mark(path: Path, mark: str) -> bool:
    try:
        with path.open("rb") as file:
            return mark.encode() in file.read(MAX_MARK_BYTES)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error}.") from error
