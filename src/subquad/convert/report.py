"""The report of a conversion: what was lost and what was won, in one HTML page and as tables for a console."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Group
from rich.table import Table
from rich.text import Text

from subquad.evaluation.report import bytes_text, count_text, length_text, listed

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Conversion by {{ plan.recipe }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .9em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th { text-align: left }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em }
</style></head><body>
<h1>{{ plan.source }} converted by {{ plan.recipe }}</h1>
<p>{{ plan.summary }}. {{ plan["converted layers"] | length }} of {{ plan["attention layers"] }} attention layers were
converted; {{ count(plan["added parameters"]) }} parameters were added to {{ count(plan.parameters) }}.
{{ "%.1f" | format(minutes) }} minutes on this machine.</p>
<ul>{% for sentence in verdict %}<li>{{ sentence }}</li>{% endfor %}</ul>
<h2>Quality on held-out text</h2>
<table><tr><th></th>{% for stage in stages %}<th>{{ stage }}</th>{% endfor %}</tr>
{% for name, values in quality %}<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Cost by context</h2>
<table><tr><th>tokens</th><th>measure</th><th>source</th><th>converted</th></tr>
{% for row in costs %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Text, always the likeliest token</h2>
<p>Prompt</p><pre>{{ prompt }}</pre><p>Source</p><pre>{{ before }}</pre><p>Converted</p><pre>{{ after }}</pre>
<h2>How to load it</h2>
<pre>import subquad
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this folder")</pre>
</body></html>
"""


def verdict(record: dict[str, Any]) -> list[str]:
    """What was lost and won, in sentences with their figures."""
    before, after = (record["stages"][stage] for stage in ("source", "converted"))
    sentences = []
    first, last = (stage["quality"]["perplexity"] for stage in (before, after))
    sentences.append(
        f"Perplexity on held-out text went from {first:.2f} to {last:.2f}, a factor of {last / first:.2f}."
    )
    lost = [
        f"{name} fell from {value:.2f} to {after['quality'][name]:.2f}"
        for name, value in before["quality"].items()
        if name not in ("perplexity", "bits per byte") and after["quality"][name] < value - 0.02
    ]
    if lost:
        sentences.append(f"It finds less in its context: {listed(lost)}.")
    for length, cost in before["costs"].items():
        ours = after["costs"][length]
        speed = cost["milliseconds per token"] / ours["milliseconds per token"]
        memory = cost["state bytes"] / ours["state bytes"]
        sentences.append(
            f"After {length_text(int(length))} tokens a token takes {ours['milliseconds per token']:.1f} ms, before "
            f"{cost['milliseconds per token']:.1f} ({speed:.2f}x), and the state holds "
            f"{bytes_text(ours['state bytes'])}, before {bytes_text(cost['state bytes'])} ({memory:.1f}x)."
        )
    return sentences


def quality_table(record: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Stages, and a row of figures per measure; what a stage was not asked is left empty."""
    stages = record["stages"]
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage["quality"]))
    return list(stages), [(name, [_figure(stage["quality"].get(name)) for stage in stages.values()]) for name in names]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def tables(record: dict[str, Any]) -> Group:
    """The report for a console."""
    stages, rows = quality_table(record)
    table = Table("held-out text", *stages)
    for name, values in rows:
        table.add_row(name, *values)
    return Group(table, *(Text(sentence) for sentence in verdict(record)))


def write_report(record: dict[str, Any], path: Path) -> None:
    """Writes the page."""
    before, after = (record["stages"][stage] for stage in ("source", "converted"))
    stages, quality = quality_table(record)
    costs = [
        (length_text(int(length)), name, *(_cost(name, value) for value in (value, after["costs"][length][name])))
        for length, cost in before["costs"].items()
        for name, value in cost.items()
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(PAGE).render(
        plan=record["plan"],
        minutes=record["minutes"],
        verdict=verdict(record),
        stages=stages,
        quality=quality,
        costs=costs,
        prompt=before["prompt"],
        before=before["text"],
        after=after["text"],
        count=count_text,
    )
    path.write_text(page)


def _cost(name: str, value: float) -> str:
    return bytes_text(value) if name == "state bytes" else f"{value:.3g}"
