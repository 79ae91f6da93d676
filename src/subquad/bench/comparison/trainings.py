"""The trainings that a worker process does, plain values in and out.

They depend on their arguments alone, never on the worker that runs them or on what runs beside it.
"""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from subquad import tasks, training
from subquad.bench.comparison.costs import Report, build_model
from subquad.bench.comparison.settings import RecallSettings
from subquad.evaluation.loss import bits_by_position, bits_factor, bits_per_byte, smoothed
from subquad.evaluation.recall import recall_accuracy

WARMUP_SHARE = 0.3
RECALL_WARMUP_SHARE = 0.7  # found while the rate still rises, or late: the step from guessing to looking up
CURVE_POINTS = 100
VALID_TOKENS, TEST_TOKENS = 8192, 32_768
EXTRAPOLATION = (1, 2, 4)
BLOCKS_PER_CONTEXT = 4
QUIET = Console(quiet=True)


def save_text(text: tasks.TextData, folder: Path) -> None:
    """Keeps a text where workers find it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        np.save(folder / f"{split}.npy", text.tokens(split))


def load_text(folder: str, vocab_size: int, num_bytes: dict[str, int]) -> tasks.TextData:
    """The text kept by :func:`save_text`; workers share its pages."""
    arrays = {split: np.load(Path(folder, f"{split}.npy"), mmap_mode="r") for split in ("train", "valid", "test")}
    return tasks.TextData(**arrays, vocab_size=vocab_size, source=folder, split_by="given", num_bytes=num_bytes)


class StepClock:
    """Batches of ``data``, and the seconds between one request and the next: the time of a step.

    What happens between two steps and belongs to neither is left out: ``with clock.stopped(): ...``.
    """

    def __init__(self, data: training.Data, report: Report) -> None:
        self.data, self.report = data, report
        self.asked: list[float] = []
        self.left_out = 0.0

    def batch(self, index: int) -> Any:
        self.asked.append(time.perf_counter() - self.left_out)
        self.report(index)
        return self.data.batch(index)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - began

    def step_seconds(self) -> float | None:
        """The median over the steps but the first; None where fewer than two were made."""
        steps = np.diff(self.asked)[1:]
        return float(statistics.median(steps)) if len(steps) else None


def train_text(
    report: Report,
    *,
    text: dict[str, Any],
    fields: dict[str, Any],
    context: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    threads: int,
    folder: str | None,
    save_every: int | None,
    final: bool,
) -> dict[str, Any]:
    """Trains one language model; with ``final`` also measures it on the test split.

    Returns:
        ``valid_bits``, ``test_bits``, ``positions`` (bits per byte along the position), ``curve`` (``[step, bits]`` on
        the validation split), ``training_curve``, ``step_seconds``, ``other_seconds`` (evaluation, checkpoints) and
        ``diverged`` (a sentence, or None).
    """
    began = time.perf_counter()
    torch.set_num_threads(threads)
    data = load_text(**text)
    clock = StepClock(training.from_text(data, context, batch_size, seed), report)
    options = _options(steps, batch_size, learning_rate, weight_decay, seed, save_every, eval_every=max(1, steps // 6))
    model = build_model(fields, seed)

    def validation(model: Any) -> dict[str, float]:
        with clock.stopped():
            return {"bits": bits_per_byte(model, data, "valid", context, limit=max(1, VALID_TOKENS // context))}

    result: dict[str, Any] = {"diverged": None, "valid_bits": None, "test_bits": None, "positions": None}
    try:
        run = training.train(
            model,
            clock,
            options,
            out=folder,
            resume=folder is not None,
            evaluate=validation if final else None,
            console=QUIET,
        )
    except training.NonFiniteLoss as error:
        return result | {"diverged": str(error), "curve": [], "training_curve": [], **_times(clock, began)}
    report(steps)
    factor = bits_factor(data, "train")
    losses = [record["loss"] * factor for record in run.history]
    result["training_curve"] = smoothed(losses, CURVE_POINTS)
    result["curve"] = [
        [record["step"], record["evaluation/bits"]] for record in run.history if "evaluation/bits" in record
    ]
    result["valid_bits"] = result["curve"][-1][1] if final else validation(model)["bits"]
    if final:
        result["test_bits"] = bits_per_byte(model, data, "test", context, limit=max(1, TEST_TOKENS // context))
        result["positions"] = _positions(model, data, context)
    return result | _times(clock, began)


def train_recall(
    report: Report,
    *,
    fields: dict[str, Any],
    recall: dict[str, Any],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """Trains one small model on multi-query associative recall: ``accuracy``, times, and ``diverged``."""
    began = time.perf_counter()
    torch.set_num_threads(threads)
    settings = RecallSettings(**recall)
    task = recall_task(settings)
    clock = StepClock(training.from_task(task, settings.batch_size, seed), report)
    options = _options(
        steps, settings.batch_size, learning_rate, weight_decay, seed, None, warmup_share=RECALL_WARMUP_SHARE
    )
    model = build_model(fields, seed)
    try:
        training.train(model, clock, options, out=None, console=QUIET)
    except training.NonFiniteLoss as error:
        return {"diverged": str(error), "accuracy": 0.0, "valid_accuracy": 0.0, **_times(clock, began)}
    report(steps)
    return {
        "diverged": None,
        "accuracy": recall_accuracy(model, task),
        "valid_accuracy": recall_accuracy(model, task, split="valid"),
        **_times(clock, began),
    }


def calibrate(
    report: Report, *, training_job: dict[str, Any], recall_job: dict[str, Any] | None
) -> dict[str, float | None]:
    """Compiles whatever a candidate's trainings need, then times a few steps of each kind."""
    times: dict[str, float | None] = {}
    for kind, function, arguments, steps in (
        ("text", train_text, training_job, 8),
        ("recall", train_recall, recall_job, 16),
    ):
        if arguments is None:
            continue
        function(lambda done: None, **arguments, steps=4)
        measured = function(lambda done: None, **arguments, steps=steps)
        times[f"{kind}_step"], times[f"{kind}_other"] = measured["step_seconds"], measured["other_seconds"]
        report(len(times) // 2)
    return times


def recall_task(settings: RecallSettings) -> tasks.TokenTask:
    """The task of the recall test."""
    task: tasks.TokenTask = tasks.Mqar(
        vocab_size=settings.vocab_size, length=settings.length, num_pairs=settings.num_pairs
    )
    return task


def _options(
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    save_every: int | None,
    eval_every: int | None = None,
    warmup_share: float = WARMUP_SHARE,
) -> training.TrainingOptions:
    return training.TrainingOptions(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="one_cycle",
        warmup_steps=max(2, round(warmup_share * steps)),
        seed=seed,
        save_every=save_every,
        eval_every=eval_every,
        keep=1,
        tensorboard=False,
    )


def _positions(model: Any, data: tasks.TextData, context: int) -> dict[str, Any]:
    """Loss along the position in windows of up to four contexts, as far as the test split is long enough."""
    longest = max(multiple for multiple in EXTRAPOLATION if multiple == 1 or len(data.test) > 2 * multiple * context)
    length = longest * context
    blocks = longest * math.gcd(context, BLOCKS_PER_CONTEXT)
    limit = max(1, TEST_TOKENS // length)
    return {
        "multiple": longest,
        "block": length // blocks,
        "bits": bits_by_position(model, data, "test", length, blocks=blocks, limit=limit),
    }


def _times(clock: StepClock, began: float) -> dict[str, Any]:
    step = clock.step_seconds()
    wall = time.perf_counter() - began
    return {"step_seconds": step, "other_seconds": max(0.0, wall - (step or 0.0) * len(clock.asked))}
