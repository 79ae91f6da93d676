"""Writes the tables of the documentation from the library itself, between the markers that the pages hold.

``python docs/generate.py`` brings every page up to date; ``make docs`` does so before the site is built. A page marks
the place of a table by ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from subquad import catalog, feedforward, mixers, ops, tasks
from subquad.claims import MARKDOWN_HEADER, load, read_records
from subquad.claims.contract import Row
from subquad.mixers.contract import named_leaves
from subquad.models.checkpoints import FORMATS
from subquad.models.config import SubquadConfig
from subquad.models.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = RESULTS / "claims.json"
WIDTH, HEADS = 256, 4  # of the mixers whose states are counted


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"

    header = list(header)
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def summary(documented: object) -> str:
    """The first paragraph of a docstring, as Markdown on one line."""
    paragraph = (inspect.getdoc(documented) or "").split("\n\n")[0]
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(paragraph.split()).replace("``", "`"))


def page_of_op(name: str) -> str:
    """The page of the op's family, beside the pages of the other families."""
    family = getattr(ops, name).__module__.split(".")[2]
    return f"{family}.md"


def systems() -> str:
    rows = []
    for row in catalog.SYSTEMS:
        names = code(name for floor in row.names.values() for name in floor)
        rows.append((f"{row.number:02d}", row.name, row.title, row.kind, row.state, names))
    return table(("No.", "System", "Paper", "Kind", "State", "Public names"), rows)


def built() -> str:
    rows = []
    for row in catalog.ROWS:
        if row.state != "built":
            continue
        names = "; ".join(f"{floor}: {code(names)}" for floor, names in row.names.items())
        number = "" if row.number is None else f"{row.number:02d}"
        claim = f"`subquad claims {number}`" if row.claim else ""
        rows.append((number, row.name, names, ", ".join(row.patterns), ", ".join(row.backends), claim))
    return table(("No.", "System", "Public names", "Patterns", "Backends", "Claim"), rows)


def status() -> str:
    done = [row for row in catalog.SYSTEMS if row.state == "built"]
    names = ", ".join(f"{row.name} ({row.number:02d})" for row in done)
    return f"{len(done)} of the {len(catalog.SYSTEMS)} systems are built: {names}. The others are planned."


def op_table() -> str:
    rows = [
        (
            f"[`ops.{name}`]({page_of_op(name)})",
            summary(getattr(ops, name)),
            ", ".join(row.backends or catalog.TORCH_ONLY),
        )
        for row in catalog.ROWS
        for name in row.names.get("ops", {})
    ]
    return table(("Op", "What it computes", "Backends"), rows)


def mixer_table() -> str:
    rows = []
    for name in mixers.available():
        cls = mixers.mixer_class(name)
        patterns = ", ".join(sorted(pattern.removesuffix("-attention") for pattern in cls.patterns))
        rows.append((f"`{name}`", f"`{cls.__name__}`", summary(cls), patterns, state_of(name)))
    return table(("Name", "Class", "What it computes", "Patterns", "State"), rows)


def state_of(name: str) -> str:
    """Whether the state of a mixer grows, and how many values it holds."""
    if mixers.Pattern.CAUSAL_SELF not in mixers.mixer_class(name).patterns:
        return "none: reads all tokens at once"
    mixer = mixers.build(name, WIDTH, num_heads=HEADS).double()  # float64 compiles no kernel
    if not mixer.constant_state:
        return "grows with the context"
    with torch.no_grad():
        sizes = [values_after(mixer, time) for time in (2, 512)]
    return f"constant, {sizes[1]:,} values" if sizes[0] == sizes[1] else f"constant, at most {sizes[1]:,} values"


def values_after(mixer: mixers.Mixer, time: int) -> int:
    state = mixer(torch.zeros(1, time, WIDTH, dtype=torch.float64), use_state=True).state
    return sum(leaf.numel() for _, leaf in named_leaves(state))


def mixer_options() -> str:
    shared = {"self", "dim", "num_heads", "causal", "layer_index", "num_layers"}
    rows = []
    for name in mixers.available():
        parameters = inspect.signature(mixers.mixer_class(name).__init__).parameters
        values = {option: p.default for option, p in parameters.items() if option not in shared}
        values.update(catalog.MIXERS[name].options)
        rows.append((f"`{name}`", ", ".join(f"`{option}={value!r}`" for option, value in values.items()) or "none"))
    return table(("Name", "Options and their defaults"), rows)


def feedforwards() -> str:
    rows = []
    for name in feedforward.available():
        layer = feedforward.build(name, 8, 16)
        rows.append((f"`{name}`", f"`{type(layer).__name__}`", summary(type(layer))))
    return table(("Name", "Class", "What it computes"), rows)


def presets() -> str:
    rows = []
    for name in PRESETS:
        config = SubquadConfig.preset(name)
        entries = [entry if isinstance(entry, str) else entry["name"] for entry in config.mixers]
        used = code(dict.fromkeys(entries))
        sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        rows.append((f"`{name}`", used, *map(str, sizes), f"`{config.feedforward}`"))
    return table(("Preset", "Mixers", "Width", "Layers", "Heads", "Feed-forward width", "Feed-forward"), rows)


def task_table() -> str:
    rows = []
    for name in tasks.available():
        task = tasks.get(name)
        rows.append((f"`{name}`", f"`{type(task).__name__}`", summary(type(task))))
    return table(("Name", "Class", "Task"), rows)


def foreign_formats() -> str:
    return code(FORMATS)


def claims() -> str:
    """What ``make claims`` measured last; without a record, how to make one."""
    if not CLAIMS.exists():
        return "No result is recorded in this tree: `make claims` measures them all and fills this table."
    lines = [MARKDOWN_HEADER]
    for slug, record in read_records(CLAIMS).items():
        rows = [Row(row["method"], row["seed"], row["figures"]) for row in record["rows"]]
        lines.append(load(slug).judge(rows, record["seconds"]).markdown_row())
    return "\n".join(lines)


def results(name: str) -> dict[str, Any]:
    """What a script of ``make bench`` wrote last into ``name.json``; empty without it."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


NOT_MEASURED = "Nothing is recorded in this tree: `make bench` measures and fills this table."


def speed() -> str:
    """How many times faster than torch's attention the ops are, one thread, by length and direction."""
    found = results("ops")
    if not found:
        return NOT_MEASURED
    lengths = (2048, 8192, 16_384)
    ratios = {(t["op"], t["time"], t["backward"]): t["ratio"] for t in found["timings"] if t["threads"] == 1}
    header = ["Op", *(f"{length:,}" for length in lengths), *(f"{length:,}, with backward" for length in lengths)]
    rows = [
        (f"`{op}`", *(f"{ratios[op, length, backward]:.1f}x" for backward in (False, True) for length in lengths))
        for op in dict.fromkeys(t["op"] for t in found["timings"])
    ]
    where = f"One thread of {found['machine']['processor']}, batch 1, 8 heads of 64, float32, tokens in the heading; "
    return f"{table(header, rows)}\n\n{where}written by `{found['command']}`."


def speed_beside_others() -> str:
    """Ours against the CPU fallbacks of transformers, and one-token steps against the same layer in plain torch."""
    found = results("ops")
    if not found:
        return NOT_MEASURED
    rows = []
    for row in found["transformers_gated_delta_rule"]:
        what = f"gated delta rule, forward, {row['time']:,} tokens, {row['heads']} heads of {row['width']}"
        rows.append((what, "transformers' chunked fallback", f"{row['transformers_chunk_ratio']:.1f}x"))
        rows.append((what, "transformers' token loop", f"{row['transformers_recurrent_ratio']:.1f}x"))
    for row in results("scans").get("mamba", []):
        seconds, what = row["seconds"], f"{row['time']:,} tokens, width {row['dim']}, {row['threads']} threads"
        pairs = [
            ("Mamba's scan, forward", "transformers_scan", "scan", "transformers' token loop"),
            ("Mamba's scan, forward", "mambapy_scan", "scan", "mambapy's parallel scan"),
            ("Mamba's mixer, forward", "transformers_mixer", "mixer", "transformers"),
            ("Mamba's mixer, forward and backward", "transformers_mixer_both", "mixer_both", "transformers"),
        ]
        rows += [
            (f"{name}, {what}", other, f"{seconds[theirs] / seconds[ours]:.1f}x")
            for name, theirs, ours, other in pairs
            if theirs in seconds
        ]
    for row in found["mixer_steps"]:
        what = f"`{row['mixer']}`, one token of the whole mixer, width {row['dim']}"
        rows.append((what, "the same layer in plain torch", f"{row['plain_torch_ratio']:.1f}x"))
    return table(("Ours", "Beside", "Times faster"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "systems": systems,
    "built": built,
    "status": status,
    "ops": op_table,
    "mixers": mixer_table,
    "mixer_options": mixer_options,
    "feedforwards": feedforwards,
    "presets": presets,
    "tasks": task_table,
    "foreign_formats": foreign_formats,
    "claims": claims,
    "speed": speed,
    "speed_beside_others": speed_beside_others,
}


def updated(text: str) -> str:
    """The text of a page with all its tables written anew."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}; there are: {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = updated(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {page}")


if __name__ == "__main__":
    main()
