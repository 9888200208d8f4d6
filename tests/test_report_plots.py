"""Figures as SVG: nothing of matplotlib's file that a page cannot take, text as text, and the same text every time."""

import dataclasses
import re
import shutil
from xml.etree import ElementTree

import pytest
from reports import EVIL, hostile_record, quality, with_record

from elastic_sparsity import ElasticCheckpoint
from elastic_sparsity.report_facts import Figure, read_facts
from elastic_sparsity.report_plots import (
    block_errors,
    perplexity_by_bytes,
    perplexity_by_sparsity,
    spread,
    zeros_by_layer,
)
from elastic_sparsity.reporting import plots_of


@pytest.fixture(scope="module")
def facts(tiny_checkpoint, tmp_path_factory):
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("plots") / "c")
    return read_facts(ElasticCheckpoint(with_record(folder, quality=quality())), "c")


@pytest.fixture(scope="module")
def plots(facts):
    return plots_of(facts)


def test_every_figure_is_one_clean_svg(plots):
    assert all(plots.values())
    for name, svg in plots.items():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert svg.startswith("<svg") and "<style" not in svg and "<metadata" not in svg and "0b0c" not in svg
        assert "currentColor" in svg and 'viewBox="0 0 ' in svg
        head = svg[: svg.index(">")]
        assert " width=" not in head and " height=" not in head
        links = re.findall(r'(?:href="|url\()([^")]+)', svg)
        assert all(link.startswith((f"#{name}-", "data:image/png;base64,")) for link in links)
    ids = [found for svg in plots.values() for found in re.findall(r' id="([^"]+)"', svg)]
    assert len(set(ids)) == len(ids), "ids of two figures meet on the page"


def test_figures_name_what_they_show(plots):
    for word in ("elastic", "wanda", "sparsegpt", "dense (21.98)", "N:M level", "zeros, %"):
        assert word in plots["sparsity"]
    assert "50 %" in plots["bytes"] and "2:4" in plots["bytes"]
    assert "down_proj" in plots["zeros"] and "70 %" in plots["zeros"]
    assert "60 %" in plots["errors"]


def test_the_same_facts_make_the_same_text(facts, plots):
    assert plots_of(facts) == plots


def test_without_figures_there_is_nothing_to_draw(facts):
    bad = tuple(Figure(level="0.5", method="elastic", perplexity=x, kl=None) for x in (None, float("inf"), -1.0, 0.0))
    for figures in ((), bad):
        empty = dataclasses.replace(facts, figures=figures)
        assert perplexity_by_sparsity(empty) is None and perplexity_by_bytes(empty) is None
    assert block_errors(dataclasses.replace(facts, loss_levels=(), block_losses=())) is None
    nothing = dataclasses.replace(facts, loss_levels=("0.5",), block_losses=((None, float("nan"), 0.0),))
    assert block_errors(nothing) is None


def test_many_levels_get_few_panels(facts):
    assert spread(200, 6) == [0, 40, 80, 119, 159, 199] and spread(6, 6) == list(range(6)) and spread(0, 6) == []
    many = dataclasses.replace(facts, levels=facts.levels * 50, zeros=facts.zeros * 50)
    assert zeros_by_layer(many).count("<image") == 7, "six maps and the scale"
    assert "50 %" not in perplexity_by_bytes(many), "200 labels would hide the curve"
    many = dataclasses.replace(facts, loss_levels=facts.loss_levels * 50, block_losses=facts.block_losses * 50)
    assert block_errors(many) is not None
    assert zeros_by_layer(dataclasses.replace(facts, types=tuple(map(str, range(99))))) is None


def test_hostile_names_are_text(tiny_checkpoint, tmp_path):
    folder = hostile_record(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    for svg in plots_of(read_facts(ElasticCheckpoint(folder), EVIL)).values():
        assert svg is None or "<script" not in svg
        assert svg is None or ElementTree.fromstring(svg) is not None
