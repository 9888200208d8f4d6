"""A checkpoint's report as one HTML page that opens offline. Facts and SVG texts in, text out; knows no file.

No script and nothing from elsewhere: the page's own policy forbids it to the browser too. All text from a checkpoint
passes `escape`.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from elastic_sparsity import report_words as words
from elastic_sparsity.report_facts import Facts

MARK = '<meta name="generator" content="elastic-sparsity report">'
_STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5d6670;--line:#e2e4e8;--accent:#0b7d73;
--tint:#eef7f5}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1b1f23;--ink:#e6e8ea;--soft:#9aa4ae;--line:#31373d;
--accent:#4fc9ba;--tint:#18302d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:66rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:2.6rem 0 .5rem;letter-spacing:-.005em}
p{margin:.5rem 0;max-width:46rem}.soft,figcaption{color:var(--soft);font-size:.9rem}
a{color:var(--accent)}
.kicker{color:var(--accent);font-weight:600;font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.4rem 0 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tiles dt{color:var(--soft);font-size:.8rem}.tiles dd{margin:.1rem 0 0;font-size:1.25rem;font-weight:600;
font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem;background:var(--card);margin:.8rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .85rem;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.82rem;white-space:nowrap}
tbody th{font-weight:600}.n{text-align:right;white-space:nowrap}
.ours td,.ours th{background:var(--tint)}
.wide{white-space:nowrap}.facts tr:first-child>*{border-top:0}.facts td{min-width:12rem}
.facts th{width:16rem;min-width:9rem;font-weight:400;color:var(--soft)}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem;
font-size:.86rem;line-height:1.5;margin:.6rem 0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem;margin:.8rem 0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;min-width:0}
figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:inherit!important}
svg image{image-rendering:pixelated}
figcaption{margin:.5rem .2rem 0;line-height:1.45}
li{margin:.35rem 0;max-width:46rem}ul{padding-left:1.2rem}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--accent)}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--line);padding-top:1rem}
@media(max-width:34rem){main{padding:1.5rem .9rem 3rem}h1{font-size:1.5rem}th,td{padding:.42rem .5rem}
table{font-size:.84rem}thead th{font-size:.76rem}.facts th{width:auto;min-width:7.5rem}
figure{padding:.5rem}.tiles dd{font-size:1.05rem}}
@media print{.scroll{overflow:visible}figure,.scroll{break-inside:avoid}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(facts: Facts, plots: Mapping[str, str | None]) -> str:
    """The whole page.

    Args:
        plots: SVG text by name: "sparsity", "bytes", "totals", "zeros", "errors"; None where there is nothing to draw.
    """
    sections = (
        _head(facts),
        _use(facts),
        _levels(facts),
        _others(facts),
        _later(facts),
        _quality_plots(facts, plots),
        _bytes(facts, plots),
        _layers(facts, plots),
        _made(facts),
        _limits(facts),
    )
    title = escape(f"{facts.name}: elastic sparse checkpoint")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{MARK}\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by <code>elastic-sparsity report</code> from {escape(words.sources(facts))}; nothing was "
        "measured for this page.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(facts: Facts) -> str:
    tiles = {
        "levels": str(len(facts.levels)),
        "all levels together": words.size(facts.total_bytes),
        "smallest level reads": words.size(min(level.bytes for level in facts.levels)),
        "one dense copy": words.size(facts.dense_bytes),
        "dense perplexity": words.perplexity(facts.figure("dense", "dense")),
    }
    inner = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in tiles.items())
    base = escape(facts.base_hub_id or facts.base_id or words.NOT_RECORDED)
    if facts.base_hub_id is not None:
        base = f'<a href="https://huggingface.co/{base}">{base}</a>'
    license_ = escape(facts.license or words.NOT_RECORDED)
    return (
        f'<header><p class="kicker">Elastic sparse checkpoint</p>\n<h1>{escape(facts.name)}</h1>\n'
        f"<p>{escape(words.lead(facts))}</p>\n"
        f'<p class="soft">Base model: {base}; license: {license_}</p><dl class="tiles">{inner}</dl></header>'
    )


def _use(facts: Facts) -> str:
    commands = "\n\n".join(use_commands(facts))
    return f"<h2>Use it at a level</h2>\n<pre>{escape(commands)}</pre>"


def use_commands(facts: Facts) -> tuple[str, str]:
    """A plain folder from the command line, and a model in Python. Names are quoted for where they stand."""
    level = words.example_level(facts)
    output = f"{facts.name}-{level.name.replace(':', 'of')}"
    return (
        "# a plain Hugging Face folder that any tool opens\n"
        f"elastic-sparsity slice {shlex.quote(facts.name)} --level {level.name} --output {shlex.quote(output)}",
        "# the same model in Python; set_level(model, ...) switches it in place\n"
        f"python -c {shlex.quote(_python(facts, level.name))}",
    )


def _python(facts: Facts, level: str) -> str:
    name = json.dumps(facts.name, ensure_ascii=False)  # double quotes: the shell's are single
    call = f'ElasticModel.from_pretrained({name}, level="{level}")'
    return f"from elastic_sparsity import ElasticModel\nprint({call})"


def _levels(facts: Facts) -> str:
    rows = []
    for level in (*facts.levels, *facts.structured):
        found = facts.figure(level.name, "elastic")
        here = "yes" if level.available else "no"
        cells = (words.zeros(level), words.size(level.bytes), words.perplexity(found), words.kl(found), here)
        rows.append((level.title, *cells))
    head = ("level", "zeros", "bytes read", "perplexity", "KL to dense", "in this folder")
    return f"<h2>Levels</h2>\n{_table(head, rows)}\n{_soft(words.protocol(facts))}"


def _others(facts: Facts) -> str:
    """Other methods' figures, with ours at the same level beside them."""
    others = words.other_rows(facts)
    if not others:
        return ""
    rows: list[tuple[str, str, str, str]] = []
    ours = set()
    for name in dict.fromkeys(row.level for row in others):
        here = [row for row in facts.figures if row.level == name]
        for row in sorted(here, key=lambda x: x.method != "elastic"):
            if row.method == "elastic":
                ours.add(len(rows))
            rows.append((words.row_title(row), row.method, words.perplexity(row), words.kl(row)))
    table = _table(("level", "method", "perplexity", "KL to dense"), rows, text_columns=2, marked=ours)
    return (
        f"<h2>Beside other methods</h2>\n{table}\n"
        '<p class="soft">Same text, same windows. One-shot methods prune each level on its own and train nothing.</p>'
    )


def _later(facts: Facts) -> str:
    """What `eval` measured after the run, a table for each protocol."""
    parts = []
    for quality in facts.results.quality:
        parts += [_table(words.QUALITY_HEAD, words.quality_rows(quality)), _soft(words.measured_later(quality))]
    for tasks in facts.results.tasks:
        head, lines = words.task_rows(tasks)
        parts += [_table(head, lines, text_columns=2), _soft(words.ACCURACIES + words.measured_later(tasks))]
    return "<h2>Measured later</h2>\n" + "\n".join(parts) if parts else ""


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _quality_plots(facts: Facts, plots: Mapping[str, str | None]) -> str:
    if not facts.figures:
        return ""  # said below the levels
    if plots["sparsity"] is None:
        return "<h2>Quality in pictures</h2>\n<p>No recorded perplexity can be drawn.</p>"
    more = words.drawn(len(facts.methods), words.DRAWN_METHODS, "methods")
    figures = _figure(plots["sparsity"], f"Perplexity against sparsity, by method. Hollow marks: N:M levels.{more}")
    if plots["bytes"] is not None:
        figures += _figure(
            plots["bytes"],
            "Perplexity against bytes. One checkpoint holds every level (dotted); a file for one level alone is "
            "smaller than that level here. Files of their own: same weights, computed sizes.",
        )
    return f'<h2>Quality in pictures</h2>\n<div class="plots">{figures}</div>'


def _bytes(facts: Facts, plots: Mapping[str, str | None]) -> str:
    rows = []
    for level in facts.levels:
        share = f"{level.bytes / facts.dense_bytes:.2f}"
        rows.append((level.title, words.size(level.bytes), share, words.size(level.alone_bytes)))
    table = _table(("level", "reads", "of a dense copy", "alone, merged, as bitmask (computed)"), rows)
    totals = _table(
        ("all levels together", "bytes"), [(name, words.size(count)) for name, count in words.totals(facts)]
    )
    drawn = _figure(plots["totals"], "All levels together: one checkpoint against files for each level.")
    return f'<h2>Bytes</h2>\n<div class="plots">{drawn}<div>{totals}</div></div>\n{table}'


def _layers(facts: Facts, plots: Mapping[str, str | None]) -> str:
    parts = []
    if plots["zeros"] is None:
        size = f"{len(facts.types):,} layer types and {len(facts.blocks):,} blocks"
        parts.append(f"<p>Zeros by layer: {size}, too many to draw.</p>")
    figures = _figure(
        plots["zeros"],
        "Zeros by layer type and block. Every row of a layer has the same count; without an allocation so has every "
        "layer its share, and an even picture is as it should be. N:M levels show what the pattern promises."
        + words.drawn(len(facts.levels), words.DRAWN_MAPS, "levels"),
    )
    figures += _figure(
        plots["errors"],
        "Error by layer: each block's training loss against the dense block at the end of its training, by level "
        "(log scale). What the loss is relative to is a setting of the recipe, block.loss."
        + words.drawn(len(facts.loss_levels), words.DRAWN_LOSSES, "levels"),
    )
    parts.append(f'<div class="plots">{figures}</div>' if figures else "")
    if plots["errors"] is None:
        why = words.NO_LOSSES if not facts.loss_levels else "The errors by block cannot be drawn."
        parts.append(f"<p>{why}</p>")
    return "<h2>Layer by layer</h2>\n" + "\n".join(part for part in parts if part)


def _made(facts: Facts) -> str:
    table = _facts_table(words.made_rows(facts))
    recipe = f"<p>Recipe: {words.NOT_RECORDED}.</p>"
    if facts.recipe:
        recipe = f"<details><summary>The whole recipe</summary>{_facts_table(facts.recipe)}</details>"
    return f"<h2>How it was made</h2>\n{table}\n{recipe}"


def _limits(facts: Facts) -> str:
    items = "".join(f"<li>{escape(text)}</li>\n" for text in words.limits(facts))
    return f"<h2>Limits</h2>\n<ul>\n{items}</ul>"


def _figure(svg: str | None, caption: str) -> str:
    if svg is None:
        return ""
    label = escape(caption)
    drawn = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{drawn}<figcaption>{label}</figcaption></figure>\n"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1, marked: Iterable[int] = ()
) -> str:
    """A table that scrolls sideways; the first columns are text, the others numbers."""
    kinds = ["" if number < text_columns else ' class="n"' for number in range(len(head))]
    titles = "".join(f'<th scope="col"{kind}>{escape(x)}</th>' for x, kind in zip(head, kinds, strict=True))
    lines, ours = [], set(marked)
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(x)}</td>" for x, kind in zip(rest, kinds[1:], strict=True))
        start = '<tr class="ours">' if number in ours else "<tr>"
        lines.append(f'{start}<th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    kind = "scroll wide" if len(head) > 2 else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _facts_table(rows: Iterable[tuple[str, str]]) -> str:
    lines = (f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return '<div class="scroll facts"><table><tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"
