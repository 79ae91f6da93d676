"""What a person sees while a comparison goes on: the stage, how far it is, and the time left of the whole."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from subquad.evaluation.report import seconds_text

LINE_EVERY = 10.0  # seconds between lines where there is no terminal
STAGES = {
    "prepare": "compiling kernels and timing steps",
    "speed": "reading and writing at each context",
    "memory": "peak memory",
    "recall": "recall test",
    "sweep": "choosing learning rates",
    "train": "training",
    "report": "writing the report",
}


class Display:
    """Shows progress on ``console`` (a quiet one shows nothing): a bar on a terminal, lines elsewhere.

    Attributes:
        expected: seconds of each stage, corrected as measurements come in; None where nothing is known yet.
    """

    def __init__(self, console: Console, elapsed_before: float, budget: float | None) -> None:
        self.console, self.budget = console, budget
        self.started = time.monotonic() - elapsed_before
        self.expected: dict[str, float | None] = dict.fromkeys(STAGES)
        self.stage, self.stage_started = "prepare", time.monotonic()
        self.total, self.done_by_job = 1.0, dict[str, float]()
        self.lock, self.last_line = threading.Lock(), 0.0
        self.bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            words, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
            self.bar = Progress(words, BarColumn(), TaskProgressColumn(), left, console=console)
            self.task = self.bar.add_task("starting", total=1.0, left="")

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def elapsed(self) -> float:
        """Seconds of the whole comparison, those before a resume included."""
        return time.monotonic() - self.started

    def begin(self, stage: str, total: float, note: str = "") -> None:
        """Enters a stage with ``total`` units of work."""
        with self.lock:
            self.stage, self.stage_started = stage, time.monotonic()
            self.total, self.done_by_job = max(total, 1e-9), {}
            text = STAGES[stage] + (f" ({note})" if note else "")
            if self.bar is not None:
                self.bar.update(self.task, description=text, completed=0.0, left="")
            else:
                self.console.print(
                    f"{seconds_text(self.elapsed())}: {text}{self._left()}", highlight=False, soft_wrap=True
                )
            self.last_line = time.monotonic()

    def advance(self, job: str, done: float) -> None:
        """``done`` units of one job's work are done."""
        with self.lock:
            self.done_by_job[job] = done
            share = min(1.0, sum(self.done_by_job.values()) / self.total)
            if self.bar is not None:
                self.bar.update(self.task, completed=share, left=self._left().removeprefix(", "))
            elif time.monotonic() - self.last_line >= LINE_EVERY:
                self.last_line = time.monotonic()
                self.console.print(f"  {share:.0%} of this stage{self._left()}", highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """The time left: of this stage by its pace, of later ones as expected; within a budget never beyond it."""
        later = list(STAGES)[list(STAGES).index(self.stage) + 1 :]
        known = [self.expected[stage] for stage in later]
        spent = time.monotonic() - self.stage_started
        share = min(1.0, sum(self.done_by_job.values()) / self.total)
        own = self.expected[self.stage]
        rest = spent / share - spent if share > 0.05 else None if own is None else max(own - spent, 0.0)
        if rest is not None and None not in known:
            left = rest + sum(seconds or 0.0 for seconds in known)
        elif self.budget is not None:
            left = max(self.budget - self.elapsed(), 0.0)
        else:
            return ""
        return f", about {seconds_text(max(round(left), 1))} left"
