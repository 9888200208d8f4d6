"""A checkpoint's model card: README.md with the Hub's metadata. Facts in, markdown out; knows no file.

Metadata holds only what is known: `model-index` the elastic levels' measured figures, `base_model` only if the base is
on the Hub (the Hub refuses anything else), no license or language that is not recorded. All text from a checkpoint
passes `escaped` or `code`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from elastic_sparsity import report_words as words
from elastic_sparsity.report import level_title
from elastic_sparsity.report_facts import Facts
from elastic_sparsity.report_page import use_commands
from elastic_sparsity.report_results import DENSE, Measured, TaskRow

MARK = "<!-- Written by `elastic-sparsity report`, which writes it anew; without this line it is left alone. -->"
LIBRARY = "elastic_sparsity"
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~$!#&@]|:(?=//)|w(?=ww\.)")  # the last two: addresses become links


def model_card(facts: Facts, page_name: str | None = None) -> str:
    """The whole card. Args: page_name: of the HTML report, if it lies beside the card."""
    parts = [
        f"---\n{front_matter(facts)}\n---",
        MARK,
        f"# {escaped(facts.name)}",
        escaped(words.lead(facts)),
        *([] if page_name is None else [f"Plots, layers and the whole recipe: {code(page_name)} in this folder."]),
        "## Use it at a level",
        f"{fenced(use_commands(facts))}",
        "## Levels",
        _levels(facts),
        escaped(words.protocol(facts)),
        *_others(facts),
        *_later(facts),
        "## All levels together",
        _table(("", "bytes"), [(name, words.size(count)) for name, count in words.totals(facts)]),
        "## How it was made",
        _table(("", ""), words.made_rows(facts)),
        "## Limits",
        "\n".join(f"- {escaped(text)}" for text in words.limits(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> str:
    """The metadata as YAML, by huggingface_hub itself."""
    from huggingface_hub import EvalResult, ModelCardData  # slow import, only here

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=on,
            dataset_config=on,  # results of one type and config would get the first one's name
            metric_type=kind,
            metric_name=f"{name} at {title}",
            metric_value=value,
        )
        for on, kind, name, title, value in _results(facts)
    ]
    results += [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.task,
            dataset_name=", ".join([row.task, *_limit(measured)]),
            dataset_config=", ".join(_limit(measured)) or None,
            metric_type=row.metric,
            metric_name=f"{row.metric} at {level_title(row.level)}",
            metric_value=row.value,
        )
        for measured in facts.results.tasks
        for row in measured.rows
        if row.level != DENSE
    ]
    patterns = [level.name for level in facts.levels if level.is_pattern]
    data = ModelCardData(
        base_model=facts.base_hub_id,
        license=facts.license,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=["elastic-sparsity", "sparsity", "pruning", *patterns],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _results(facts: Facts) -> Iterator[tuple[str, str, str, str, float]]:
    """Measured figures of the levels: on what, metric, its name, the level, the value."""
    on, seen = _measured_on(dict(facts.protocol)), set[tuple[str, str]]()
    for level in (*facts.levels, *facts.structured):
        found = facts.figure(level.name, "elastic")
        if found is not None and found.perplexity is not None and math.isfinite(found.perplexity):
            seen.add((on, level.title))
            yield on, "perplexity", "perplexity", level.title, found.perplexity
        if found is not None and found.kl is not None and math.isfinite(found.kl):
            yield on, "kl_divergence", "KL to the dense model", level.title, found.kl
    for measured in facts.results.quality:
        for row in measured.rows:
            if row.level != DENSE and math.isfinite(row.perplexity):
                on, title = _measured_on(dict(measured.protocol)), level_title(row.level)
                if (on, title) not in seen:  # e.g. once more in another precision
                    seen.add((on, title))
                    yield on, "perplexity", "perplexity", title, row.perplexity


def _limit(measured: Measured[TaskRow]) -> list[str]:
    """Of a quick look, how many documents: its figure is not the task's."""
    documents = dict(measured.protocol).get("documents", "all")
    return [] if documents == "all" else [f"first {documents} documents"]


def _measured_on(told: dict[str, str]) -> str:
    parts = [told.get("text", f"text {words.NOT_RECORDED}"), *(told[x] for x in ("windows",) if x in told)]
    return ", ".join(parts)


def _levels(facts: Facts) -> str:
    rows = []
    for level in (*facts.levels, *facts.structured):
        found = facts.figure(level.name, "elastic")
        cells = (words.zeros(level), words.size(level.bytes), words.perplexity(found), words.kl(found))
        rows.append((level.title, *cells))
    return _table(("level", "zeros", "bytes read", "perplexity", "KL to dense"), rows)


def _others(facts: Facts) -> list[str]:
    rows = words.other_rows(facts)
    if not rows:
        return []
    cells = [(words.row_title(row), row.method, words.perplexity(row), words.kl(row)) for row in rows]
    return ["### Other methods on the same text", _table(("level", "method", "perplexity", "KL to dense"), cells)]


def _later(facts: Facts) -> list[str]:
    """What `eval` measured after the run, a table for each protocol."""
    parts = []
    for quality in facts.results.quality:
        parts += [_table(words.QUALITY_HEAD, words.quality_rows(quality)), escaped(words.measured_later(quality))]
    for tasks in facts.results.tasks:
        parts += [_table(*words.task_rows(tasks)), escaped(words.ACCURACIES + words.measured_later(tasks))]
    return ["## Measured later", *parts] if parts else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["|".join(["", *head, ""]), "|".join(["", *["---"] * len(head), ""])]
    lines += ["|".join(["", *map(escaped, row), ""]) for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text as markdown that shows it as it is, on one line, also within a table."""
    return _SPECIAL.sub(lambda x: f"&#{ord(x[0])};", " ".join(text.split()))


def code(text: str) -> str:
    """Text as code, whatever quotes are in it."""
    return f"<code>{escaped(text)}</code>"


def fenced(blocks: Iterable[str]) -> str:
    """Commands as one code block that nothing in them can end."""
    body = "\n\n".join(blocks)
    fence = "`" * max(3, 1 + max((len(x) for x in re.findall("`+", body)), default=0))
    return f"{fence}bash\n{body}\n{fence}"
