"""The report of a comparison: one HTML file, its plots inside it and beside it as SVG."""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from subquad.bench.comparison.results import Comparison, write_text
from subquad.bench.comparison.verdict import fastest_reader, leading
from subquad.bench.report.figures import Plot
from subquad.bench.report.plots import all_plots, standing_out
from subquad.evaluation.report import bytes_text, count_text, length_text, seconds_text


@dataclass(frozen=True)
class Column:
    """One column of the table: where its figure stands in the summary, and whether more is better."""

    heading: str
    unit: str
    key: str
    text: Callable[[Any], str]
    more_is_better: bool
    spread: tuple[str, str] | None = None


def write_report(comparison: Comparison) -> None:
    """Writes ``plots/*.svg`` and ``report.html`` into the comparison's folder, each whole or not at all."""
    plots = all_plots(comparison)
    folder = comparison.folder / "plots"
    folder.mkdir(exist_ok=True)
    for plot in plots:
        write_text(folder / f"{plot.name}.svg", plot.svg)
    page = template("report.html").render(
        comparison=comparison,
        settings=comparison.settings,
        pictures=pictures_of(plots),
        standing_out=standing_out(comparison),
        table=table_of(comparison),
        common=comparison.longest_common_context(),
        serving=serving_by_length(comparison),
        count=count_text,
        size=bytes_text,
        duration=seconds_text,
        length=length_text,
    )
    write_text(comparison.report, page)


def table_of(comparison: Comparison) -> dict[str, Any]:
    """Headings and rows of the table; in each column the best, and what cannot be told from it, is marked."""
    rows = comparison.summary()
    columns = [column for column in _columns(comparison) if any(row[column.key] is not None for row in rows)]
    leaders = {candidate.name for candidate in leading(comparison)} if comparison.by_loss() else set()
    length = comparison.longest_common_context()
    readers = {c.name for c in fastest_reader(comparison.candidates, length)} if length is not None else set()
    marked = {"bits_per_byte": leaders, "prefill_tokens_per_second": readers}
    cells = []
    for row in rows:
        line = []
        for column in columns:
            value = row[column.key]
            spread = ""
            if column.spread is not None and value is not None and row["seeds"] > 1:
                spread = " to ".join(column.text(row[key]) for key in column.spread)
            is_best = row["mixer"] in marked.get(column.key, _best_names(rows, column))
            line.append({"text": "–" if value is None else column.text(value), "spread": spread, "best": is_best})
        cells.append({"mixer": row["mixer"], "cells": line})
    return {"columns": columns, "rows": cells}


def serving_by_length(comparison: Comparison) -> list[dict[str, str]]:
    """For each length: who reads fastest of those with the lowest loss, and of all."""
    if not comparison.by_loss():
        return []
    found = []
    for length in comparison.settings.contexts:
        best = [c.name for c in fastest_reader(leading(comparison), length)]
        fastest = [c.name for c in fastest_reader(comparison.candidates, length)]
        if fastest:
            found.append(
                {
                    "length": length_text(length),
                    "best": ", ".join(best) or "not measured",
                    "fastest": ", ".join(fastest),
                }
            )
    return found


def _columns(comparison: Comparison) -> list[Column]:
    length = comparison.longest_common_context()
    at = "" if length is None else f"at {length_text(length)} tokens"
    percent: Callable[[Any], str] = lambda value: f"{100 * value:.0f}"  # noqa: E731
    bits: Callable[[Any], str] = lambda value: f"{value:.3f}"  # noqa: E731
    columns = [
        Column("Loss", "bits per byte", "bits_per_byte", bits, False, ("bits_per_byte_low", "bits_per_byte_high")),
        Column("Training", "tokens/s", "training_tokens_per_second", count_text, True),
        Column("Reading", f"tokens/s {at}", "prefill_tokens_per_second", count_text, True),
        Column("Writing", f"tokens/s {at}", "decode_tokens_per_second", count_text, True),
        Column("Kept state", at, "state_bytes", bytes_text, False),
        Column("Peak memory", f"reading, {at}", "prefill_peak_bytes", bytes_text, False),
        Column("Recall", "% right", "recall_accuracy", percent, True, ("recall_accuracy_low", "recall_accuracy_high")),
    ]
    columns += [
        Column(
            f"Loss to {length_text(comparison.settings.context * multiple)}",
            f"bits/byte, {multiple}x context",
            f"bits_per_byte_at_{multiple}x",
            bits,
            False,
        )
        for multiple in (2, 4)
    ]
    return columns


def _best_names(rows: list[dict[str, Any]], column: Column) -> set[str]:
    """Whoever shows the same text as the best; with ranges, whoever's overlaps the best one's."""
    known = [row for row in rows if row[column.key] is not None]
    if len(known) < 2:
        return set()
    pick = max if column.more_is_better else min
    best = pick(known, key=lambda row: row[column.key])
    if column.spread is not None and best["seeds"] > 1:
        low, high = column.spread
        return {row["mixer"] for row in known if row[low] <= best[high] and best[low] <= row[high]}
    return {row["mixer"] for row in known if column.text(row[column.key]) == column.text(best[column.key])}


def template(name: str) -> Template:
    """A page of this folder, ``base.html`` around it."""
    environment = Environment(
        loader=PackageLoader("subquad.bench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def pictures_of(plots: Iterable[Plot]) -> list[dict[str, str]]:
    """What a page shows of plots, the pictures inside it."""
    return [
        {
            "title": plot.title,
            "caption": plot.caption,
            "alternative": plot.alternative,
            "source": "data:image/svg+xml;base64," + base64.b64encode(plot.svg.encode()).decode(),
        }
        for plot in plots
    ]
