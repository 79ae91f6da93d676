"""From a budget in seconds to numbers of steps: the same for every mixer, from the measured time of every mixer."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from subquad.bench.comparison.settings import CompareSettings
from subquad.evaluation.report import seconds_text

FEWEST_STEPS = 8
MARGIN = 0.93  # of the time that is left: trainings are planned to take so much
RECALL_SHARE, SPEED_SHARE, MEMORY_SHARE = 0.16, 0.1, 0.12  # of what is left once steps have been timed
REPORT_SECONDS = 6.0
SPEED_SECONDS_WITHOUT_BUDGET = 120.0  # per mixer
MOST_FOR_MEMORY = 0.25  # of the same: where starting the processes would take more, peak memory is left out
OVERRUN = 1.05  # of the budget: a further seed is not begun where it would end later


@dataclass(frozen=True)
class StepTime:
    """What one training of a candidate costs: seconds per step, and seconds besides the steps."""

    step: float
    other: float

    def seconds(self, steps: int) -> float:
        return self.step * steps + self.other


def makespan(durations: Sequence[float], workers: int) -> float:
    """When the last of these jobs ends, each taken in turn by the worker that is free first.

    Example:
        >>> makespan([3.0, 2.0, 2.0], 2)
        4.0
    """
    free = [0.0] * workers
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def steps_within(seconds: float, times: Sequence[StepTime], shares: Sequence[float], workers: int, most: int) -> int:
    """The largest number of steps n up to ``most`` at which jobs of ``share * n`` steps end within ``seconds``.

    Args:
        seconds: what there is.
        times, shares: of each job, in the order in which they are started.
        workers: how many run side by side.
        most: never more than this.

    Example:
        >>> steps_within(10.0, [StepTime(0.1, 0.0)] * 4, [1.0] * 4, workers=2, most=1000)
        50
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        jobs = [time.seconds(math.ceil(share * middle)) for time, share in zip(times, shares)]
        if makespan(jobs, workers) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def refuse_too_few(steps: int, settings: CompareSettings, seconds: float) -> None:
    """Raises where a budget leaves so few steps that nothing could be learnt from them."""
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"a budget of {seconds_text(settings.budget or 0.0)} leaves {seconds_text(max(seconds, 0.0))} to train "
            f"{len(settings.candidates)} mixers on {len(settings.seeds)} seeds after {len(settings.learning_rates)} "
            f"learning rates, which is {steps} steps each, and {FEWEST_STEPS} are the least: give more time, fewer "
            "parameters or fewer mixers"
        )
