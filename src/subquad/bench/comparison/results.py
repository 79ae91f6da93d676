"""What a comparison found: per candidate the raw figures and what follows from them, as JSON, CSV and table."""

import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
from rich.table import Table

from subquad.bench.comparison.settings import CompareSettings
from subquad.evaluation.report import Range, bytes_text, count_text, length_text, seconds_text
from subquad.training.checkpoint import write_atomically

MULTIPLES = (1, 2, 4)


class Statement(NamedTuple):
    """One finding in plain words, and what it is about."""

    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.text}"


@dataclass(frozen=True)
class ContextFigures:
    """One candidate at one context length.

    Attributes:
        length: tokens.
        prefill: tokens read per second, over repetitions.
        decode_seconds: median time of one written token after this context.
        state_bytes: held between tokens.
        peak_bytes: memory above the idle model while reading; None where it was not measured.
    """

    length: int
    prefill: Range
    decode_seconds: float
    state_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class CandidateResult:
    """One candidate. ``raw`` holds every figure that was measured; the properties are what is read from them.

    Attributes:
        name: of the mixer, or the pattern of a hybrid.
        fields: of its :class:`SubquadConfig`.
        parameters: of its language model.
        raw: ``sweep`` (a record per learning rate), ``runs`` (a record per seed), ``recall`` (a record per learning
            rate and seed), ``speed`` and ``memory``.
    """

    name: str
    fields: dict[str, Any]
    parameters: int
    raw: dict[str, Any]
    context: int
    batch_size: int

    @property
    def learning_rate(self) -> float | None:
        """The chosen learning rate; None where every one diverged."""
        rate: float | None = self.raw["learning_rate"]
        return rate

    @property
    def finished_runs(self) -> list[dict[str, Any]]:
        """The trainings that did not diverge."""
        return [run for run in self.raw["runs"] if run["diverged"] is None]

    @property
    def diverged(self) -> list[str]:
        """Sentences on trainings that diverged."""
        return [f"seed {run['seed']}: {run['diverged']}" for run in self.raw["runs"] if run["diverged"] is not None]

    @property
    def loss(self) -> Range | None:
        """Bits per byte on the test split, over seeds; None where no training ended well."""
        losses = [run["test_bits"] for run in self.finished_runs]
        return Range.of(losses) if losses else None

    @property
    def training_tokens_per_second(self) -> Range | None:
        """Of one training, over seeds."""
        steps = [run["step_seconds"] for run in self.finished_runs if run["step_seconds"]]
        return Range.of([self.batch_size * self.context / seconds for seconds in steps]) if steps else None

    @property
    def extrapolation(self) -> dict[int, Range]:
        """Bits per byte up to 1x the training context, from there to 2x, from there to 4x: over seeds, by multiple."""
        found: dict[int, Range] = {}
        runs = [run["positions"] for run in self.finished_runs]
        before = 0
        for multiple in MULTIPLES:
            if not runs or runs[0]["multiple"] < multiple:
                break
            stop = multiple * self.context // runs[0]["block"]
            found[multiple] = Range.of([math.fsum(run["bits"][before:stop]) / (stop - before) for run in runs])
            before = stop
        return found

    @property
    def recall(self) -> Range | None:
        """Accuracy of the recall test at its best learning rate, over seeds; None where there is none."""
        runs = self.raw["recall"]
        rate = self.raw["recall_learning_rate"]
        if not runs or rate is None:
            return None
        return Range.of([run["accuracy"] for run in runs if run["learning_rate"] == rate])

    @property
    def contexts(self) -> list[ContextFigures]:
        """The figures by context length, shortest first, as far as time allowed."""
        peaks = dict(zip(self.raw["memory"]["contexts"], self.raw["memory"]["bytes"] or []))
        return [
            ContextFigures(
                cost["length"],
                Range.of([cost["length"] / seconds for seconds in cost["prefill_seconds"]]),
                sorted(cost["decode_seconds"])[len(cost["decode_seconds"]) // 2],
                cost["state_bytes"],
                peaks.get(cost["length"]),
            )
            for cost in self.raw["speed"]["costs"]
        ]


@dataclass(frozen=True)
class Comparison:
    """The outcome of :func:`subquad.bench.compare`.

    Attributes:
        settings: what was asked for.
        data: source, split and sizes of the text, ``bigram_bits`` (None for tokens) and a digest.
        steps, sweep_steps, recall_steps: optimizer steps of every model, every try, every recall model.
        machine, versions: what it ran on.
        seconds: of the whole comparison.
        candidates: in the order asked for.
        verdict: what follows, in plain words, the most important first; ``str`` of each is a line.
        notes: what was left out, and why.
        folder: where the files are.
    """

    settings: CompareSettings
    data: dict[str, Any]
    steps: int
    sweep_steps: int
    recall_steps: int
    workers: int
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    candidates: list[CandidateResult]
    notes: list[str]
    folder: Path
    verdict: list[Statement] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Training tokens of every model."""
        return self.steps * self.settings.tokens_per_step

    @property
    def report(self) -> Path:
        """The report for a person."""
        return self.folder / "report.html"

    def candidate(self, name: str) -> CandidateResult:
        """The candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def by_loss(self) -> list[CandidateResult]:
        """The candidates that have a loss, the lowest first."""
        return sorted((c for c in self.candidates if c.loss is not None), key=lambda c: c.loss.mean)  # type: ignore[union-attr]

    def longest_common_context(self) -> int | None:
        """The longest length at which every candidate was measured."""
        common = set.intersection(*({figures.length for figures in c.contexts} for c in self.candidates))
        return max(common, default=None)

    def summary(self) -> list[dict[str, Any]]:
        """A row per candidate, by loss, of plain numbers: what ``results.csv`` holds."""
        length = self.longest_common_context()
        ranked = self.by_loss()
        rows = []
        for candidate in ranked + [c for c in self.candidates if c not in ranked]:
            at = next((figures for figures in candidate.contexts if figures.length == length), None)
            loss, training, recall = candidate.loss, candidate.training_tokens_per_second, candidate.recall
            row: dict[str, Any] = {
                "mixer": candidate.name,
                "parameters": candidate.parameters,
                "learning_rate": candidate.learning_rate,
                "bits_per_byte": loss and loss.mean,
                "bits_per_byte_low": loss and loss.low,
                "bits_per_byte_high": loss and loss.high,
                "seeds": loss.count if loss else 0,
                "training_tokens_per_second": training and training.mean,
                "context": length,
                "prefill_tokens_per_second": at and at.prefill.mean,
                "decode_tokens_per_second": at and 1 / at.decode_seconds,
                "state_bytes": at and at.state_bytes,
                "prefill_peak_bytes": at and at.peak_bytes,
                "recall_accuracy": recall and recall.mean,
                "recall_accuracy_low": recall and recall.low,
                "recall_accuracy_high": recall and recall.high,
            }
            for multiple in MULTIPLES:
                beyond = candidate.extrapolation.get(multiple)
                row[f"bits_per_byte_at_{multiple}x"] = beyond and beyond.mean
            rows.append(row)
        return rows

    def table(self) -> Table:
        """The summary for a terminal, made for 80 columns; a row per candidate, the lowest loss first."""
        length = self.longest_common_context()
        at = "" if length is None else f"\nat {length_text(length)}"
        seeds = len(self.settings.seeds)
        table = Table(
            title=f"{count_text(self.tokens)} training tokens each, {seeds} seed{'s' if seeds > 1 else ''}",
            box=rich.box.SIMPLE_HEAD,
        )
        table.add_column("mixer", overflow="fold", min_width=10, max_width=24)
        for heading in (
            "bits per\nbyte",
            "spread\nof seeds",
            "training\ntokens/s",
            f"reading\ntokens/s{at}",
            f"writing\ntokens/s{at}",
            f"kept\nstate{at}",
            "recall",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.summary():
            low, high = row["bits_per_byte_low"], row["bits_per_byte_high"]
            table.add_row(
                row["mixer"],
                "diverged" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}",
                "" if low is None or row["seeds"] < 2 else f"±{(high - low) / 2:.3f}",
                _cell(row["training_tokens_per_second"], count_text),
                _cell(row["prefill_tokens_per_second"], count_text),
                _cell(row["decode_tokens_per_second"], count_text),
                _cell(row["state_bytes"], bytes_text),
                _cell(row["recall_accuracy"], lambda x: f"{100 * x:.0f}%"),
            )
        bigram = self.data["bigram_bits"]
        bar = "" if bigram is None else f"a table of byte pairs: {bigram:.3f} bits per byte; "
        table.caption = f"{bar}{seconds_text(self.seconds)} in all"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything, as ``results.json`` holds it."""
        return {
            "settings": self.settings.to_dict(),
            "data": self.data,
            "plan": {
                "steps": self.steps,
                "tokens": self.tokens,
                "sweep_steps": self.sweep_steps,
                "recall_steps": self.recall_steps,
                "workers": self.workers,
            },
            "machine": self.machine,
            "versions": self.versions,
            "seconds": self.seconds,
            "verdict": [statement._asdict() for statement in self.verdict],
            "notes": self.notes,
            "summary": self.summary(),
            "candidates": [
                {"name": c.name, "fields": c.fields, "parameters": c.parameters, **c.raw} for c in self.candidates
            ],
        }

    def write_tables(self) -> None:
        """Writes ``results.json`` and ``results.csv``, each whole or not at all."""
        write_text(self.folder / "results.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        rows = self.summary()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{key: "" if value is None else value for key, value in row.items()} for row in rows])
        write_text(self.folder / "results.csv", buffer.getvalue())

    def with_verdict(self, verdict: list[Statement]) -> "Comparison":
        return dataclasses.replace(self, verdict=verdict)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def _cell(value: Any, text: Any) -> str:
    return "-" if value is None else str(text(value))
