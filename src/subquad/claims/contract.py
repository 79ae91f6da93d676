"""What a claim is: arms that are measured, rules that say when the paper's effect shows, and a verdict.

An arm is one method under one recipe; measured with a seed it gives named figures. Rules compare figures of one seed,
and a claim is reproduced if every rule holds on every seed. All of it is data, so that what is printed as the pass rule
is what is tested.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

Figures = Mapping[str, float]
Progress = Callable[[str], None]


class Arm(Protocol):
    """One method of a comparison."""

    @property
    def timed(self) -> bool:
        """Whether its figures are times, which a busy machine spoils."""
        ...

    def measure(self, seed: int) -> Figures:
        """Figures by name; the same names for every seed."""
        ...

    def tiny(self) -> Self:
        """The same path at a size of seconds, whose figures mean nothing."""
        ...


@dataclass(frozen=True)
class Term:
    """A figure of an arm."""

    method: str
    measure: str

    def of(self, figures: Mapping[str, Figures]) -> float:
        return figures[self.method][self.measure]

    def __str__(self) -> str:
        return f"{self.method}'s {self.measure}"


@dataclass(frozen=True)
class Rule:
    """``left <= times * right + plus``, or ``>=``; without ``right`` the bound is ``plus``. Made by :func:`at_most` and
    :func:`at_least`."""

    left: Term
    relation: str
    right: Term | None
    times: float
    plus: float

    @property
    def methods(self) -> set[str]:
        return {term.method for term in (self.left, self.right) if term is not None}

    def margin(self, figures: Mapping[str, Figures]) -> float:
        """By how much the rule holds for the figures of one seed; negative where it fails, NaN where one is NaN."""
        room = self._bound(figures) - self.left.of(figures)
        return room if self.relation == "<=" else -room

    def holds(self, figures: Mapping[str, Figures]) -> bool:
        return self.margin(figures) >= 0

    def compared(self, figures: Mapping[str, Figures]) -> str:
        """The two numbers of one seed, as "3.010 against 2.997"."""
        return f"{shown(self.left.of(figures))} against {shown(self._bound(figures))}"

    def _bound(self, figures: Mapping[str, Figures]) -> float:
        return self.plus if self.right is None else self.times * self.right.of(figures) + self.plus

    def __str__(self) -> str:
        if self.right is None:
            return f"{self.left} {self.relation} {self.plus:g}"
        factor = "" if self.times == 1 else f"{self.times:g} x "
        offset = "" if self.plus == 0 else f" {'+' if self.plus > 0 else '-'} {abs(self.plus):g}"
        return f"{self.left} {self.relation} {factor}{self.right}{offset}"


def at_most(left: Term, right: Term | None = None, *, times: float = 1.0, plus: float = 0.0) -> Rule:
    """``left <= times * right + plus``.

    Example:
        >>> print(at_most(Term("A", "loss"), Term("B", "loss"), plus=-0.05))
        A's loss <= B's loss - 0.05
    """
    return Rule(left, "<=", right, times, plus)


def at_least(left: Term, right: Term | None = None, *, times: float = 1.0, plus: float = 0.0) -> Rule:
    """``left >= times * right + plus``."""
    return Rule(left, ">=", right, times, plus)


@dataclass(frozen=True)
class Row:
    """The figures of one method and seed."""

    method: str
    seed: int
    figures: Figures


@dataclass(frozen=True)
class Claim:
    """A paper's claim and the small experiment that tests it.

    Attributes:
        number, slug: of the paper, as in the catalog.
        claim: what the paper claims, in a sentence.
        measured: what is trained and measured here.
        arms: the methods by name, the paper's own first.
        rules: all must hold on every seed.
        remark: what does not show at this size, or must be known to read the figures.
    """

    number: int
    slug: str
    claim: str
    measured: str
    arms: Mapping[str, Arm]
    rules: tuple[Rule, ...]
    remark: str = ""

    def __post_init__(self) -> None:
        for rule in self.rules:
            unknown = rule.methods - set(self.arms)
            if unknown:
                raise ValueError(f"claim {self.slug}: the rule {rule} names {sorted(unknown)}; arms: {list(self.arms)}")

    @property
    def pass_rule(self) -> str:
        """The rules in words."""
        return "; ".join(map(str, self.rules))

    def tiny(self) -> "Claim":
        """The same claim with every arm at its smallest size: whether it runs; its verdict means nothing."""
        return replace(self, arms={name: arm.tiny() for name, arm in self.arms.items()})

    def run(
        self, seeds: Sequence[int] = (0, 1), progress: Progress | None = None, *, timed: bool = True
    ) -> "ClaimResult":
        """Measures every arm with every seed and judges.

        Args:
            seeds: each decides weights and batches of a whole comparison.
            progress: called with a line before every measurement.
            timed: False leaves out the arms whose figures are times, and the rules about them (on a busy machine).

        Raises:
            ValueError: no seed, one twice, or nothing left to measure.
        """
        seeds = tuple(seeds)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must be one or more different integers; got {list(seeds)}")
        arms = {name: arm for name, arm in self.arms.items() if timed or not arm.timed}
        if not arms:
            raise ValueError(f"claim {self.slug} measures nothing but time; timed=False leaves nothing of it")
        started = time.perf_counter()
        rows: list[Row] = []
        for seed in seeds:
            for name, arm in arms.items():
                if progress is not None:
                    progress(f"{self.number:02d} {self.slug}: {name}, seed {seed}")
                rows.append(Row(name, seed, dict(arm.measure(seed))))
        return self.judge(rows, time.perf_counter() - started)

    def judge(self, rows: Iterable[Row], seconds: float) -> "ClaimResult":
        """The verdict on measured figures. Rules about methods that were not measured are left unjudged."""
        rows = tuple(rows)
        measured = {row.method for row in rows}
        judged = [rule for rule in self.rules if rule.methods <= measured]
        if not judged:
            raise ValueError(f"claim {self.slug}: these figures decide none of its rules")
        outcomes = tuple(Outcome.of(rule, rows) for rule in judged)
        unjudged = tuple(str(rule) for rule in self.rules if rule not in judged)
        return ClaimResult(self, rows, outcomes, unjudged, seconds)


@dataclass(frozen=True)
class Outcome:
    """A rule on all seeds: whether it holds, and the two numbers of the seed where it is nearest to failing."""

    rule: str
    holds: bool
    seed: int
    compared: str

    @classmethod
    def of(cls, rule: Rule, rows: Sequence[Row]) -> "Outcome":
        by_seed: dict[int, dict[str, Figures]] = {}
        for row in rows:
            by_seed.setdefault(row.seed, {})[row.method] = row.figures
        failing = [seed for seed, figures in by_seed.items() if not rule.holds(figures)]
        nearest = min(failing or by_seed, key=lambda seed: rule.margin(by_seed[seed]))
        return cls(str(rule), not failing, nearest, rule.compared(by_seed[nearest]))

    def __str__(self) -> str:
        return f"{self.rule}: {'holds' if self.holds else 'FAILS'} (seed {self.seed}: {self.compared})"


@dataclass(frozen=True)
class ClaimResult:
    """What was measured, and the verdict.

    Attributes:
        claim: what was tested.
        rows: figures per method and seed, the seeds together.
        outcomes: one per rule that was judged.
        unjudged: rules about arms that were left out.
        seconds: wall-clock time of the whole.
    """

    claim: Claim
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    unjudged: tuple[str, ...]
    seconds: float

    @property
    def reproduced(self) -> bool:
        """Whether every rule that was judged holds on every seed."""
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(row.seed for row in self.rows))

    @property
    def verdict(self) -> str:
        """One sentence: reproduced or not, on which seeds, what failed and what was not judged."""
        seeds = ", ".join(map(str, self.seeds))
        text = f"{'reproduced' if self.reproduced else 'not reproduced'} on seed{'s' * (len(self.seeds) > 1)} {seeds}"
        failed = [str(outcome) for outcome in self.outcomes if not outcome.holds]
        if failed:
            text += f": {'; '.join(failed)}"
        if self.unjudged:
            text += f" (not measured: {'; '.join(self.unjudged)})"
        return text

    def __rich__(self) -> Group:
        """All of it for a rich console: the claim, what was measured, the figures, every rule and the verdict."""
        outcomes = [f"  {outcome}" for outcome in self.outcomes]
        lines = [f"Claim: {self.claim.claim}", f"Measured: {self.claim.measured}"]
        after = [*outcomes, f"{self.verdict[0].upper()}{self.verdict[1:]}."] + (
            [self.claim.remark] if self.claim.remark else []
        )
        return Group(*map(Text, lines), self.table(), *map(Text, after))

    def table(self) -> Table:
        """The figures, a line per method and measure and a column per seed, for a rich console."""
        table = Table(title=f"{self.claim.number:02d} {self.claim.slug}")
        table.add_column("method")
        table.add_column("measure")
        for seed in self.seeds:
            table.add_column(f"seed {seed}", justify="right")
        for method, rows in self._by_method().items():
            for number, measure in enumerate(rows[0].figures):
                table.add_row(method if number == 0 else "", measure, *(shown(row.figures[measure]) for row in rows))
        return table

    def markdown_row(self) -> str:
        """One line of a table with the columns of :data:`MARKDOWN_HEADER`."""
        parts = []
        for method, rows in self._by_method().items():
            figures = (
                f"{measure} {' / '.join(shown(row.figures[measure]) for row in rows)}" for measure in rows[0].figures
            )
            parts.append(f"{method}: {', '.join(figures)}")
        mark = "yes" if self.reproduced else "**no**"
        if self.unjudged:
            mark += " (times not measured)"
        cells = (f"{self.claim.number:02d}", self.claim.claim, self.claim.pass_rule, "<br>".join(parts), mark)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def record(self) -> dict[str, Any]:
        """What JSON can hold: the verdict, the rules with their outcome, the figures and the time."""
        return {
            "number": self.claim.number,
            "claim": self.claim.claim,
            "measured": self.claim.measured,
            "reproduced": self.reproduced,
            "verdict": self.verdict,
            "rules": [
                {"rule": outcome.rule, "holds": outcome.holds, "nearest": f"seed {outcome.seed}: {outcome.compared}"}
                for outcome in self.outcomes
            ],
            "unjudged": list(self.unjudged),
            "rows": [{"method": row.method, "seed": row.seed, "figures": dict(row.figures)} for row in self.rows],
            "seconds": round(self.seconds, 1),
        }

    def _by_method(self) -> dict[str, list[Row]]:
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.method, []).append(row)
        return grouped


MARKDOWN_HEADER = (
    "| Paper | Claim | Reproduced if, on every seed | Measured (a figure per seed) | Reproduced |\n"
    "|---|---|---|---|---|"
)


def shown(value: float) -> str:
    """A figure with four significant digits, large ones with thousands.

    Example:
        >>> shown(2.83791), shown(123456.7), shown(0.05)
        ('2.838', '123,457', '0.05')
    """
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
