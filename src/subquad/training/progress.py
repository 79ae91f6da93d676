"""What a person sees while a run goes on: a bar on a terminal, now and then a line elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20


class ProgressDisplay:
    """Step, loss, tokens per second and time left, on ``console`` (a ``Console(quiet=True)`` shows nothing).

    On a terminal one bar; elsewhere about ``LINES`` lines in the whole run.
    """

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console, self.steps, self.every = console, steps, max(1, steps // LINES)
        self.bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> "ProgressDisplay":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step % self.every == 0 or step == self.steps:
            minutes, seconds = divmod(round(seconds_left), 60)
            line = f"step {step}/{self.steps}  {numbers}  {minutes}:{seconds:02d} left"
            self.console.print(line, highlight=False, soft_wrap=True)
