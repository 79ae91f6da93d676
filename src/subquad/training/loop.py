"""The training loop: accelerate for devices, precision and processes, torch's optimizers and schedulers, exact resume.

Step s = 1, 2, ... depends on the weights, the optimizer's state and (seed, s) alone: its batches are
``data.batch((s - 1) * accumulate + j)`` and the random generators are reseeded from (seed, s). A run that was stopped
or killed at any moment and resumed therefore ends, on a CPU, with the weights of an uninterrupted one, bit for bit.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import random_state
from .checkpoint import Checkpoint, CheckpointError
from .data import BatchLike, Data, check_batch, count_targets
from .interrupts import StopSignal
from .metrics import MetricsLog, Record
from .nonfinite import NonFiniteLoss, first_non_finite, first_non_finite_parameter
from .objectives import Objective, ScheduledObjective, StepModule, next_token
from .optimizers import OptimizerFactory, adamw, learning_rate_schedule
from .options import TrainingOptions
from .processes import accelerator_for, first_of_any_process, on_main_process, rows_of_process, summed
from .progress import ProgressDisplay

Evaluation = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done, those before a resume included.
        stopped: ``"finished"`` (all steps done) or ``"time"`` (``max_seconds``; resume to go on).
        loss: the last recorded loss; NaN if nothing was recorded.
        tokens: label positions seen in the whole run.
        seconds: wall-clock time of this call.
        checkpoint: the newest checkpoint's folder; None without ``out``.
        history: one record per recorded step, on the first process also of the steps before a resume: ``step``,
            ``loss``, ``learning_rate``, ``gradient_norm``, ``tokens``, the objective's metrics, and
            ``evaluation/<name>`` where an evaluation was due.
    """

    step: int
    stopped: str
    loss: float
    tokens: int
    seconds: float
    checkpoint: Path | None
    history: list[Record] = field(repr=False)


def train(
    model: nn.Module,
    data: Data,
    options: TrainingOptions,
    *,
    out: str | Path | None,
    resume: bool = False,
    objective: Objective = next_token,
    optimizer: OptimizerFactory = adamw,
    evaluate: Evaluation | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Trains ``model`` in place and leaves it on the run's device, in the mode (train or eval) it came in.

    Args:
        model: any module that ``objective`` can call; shared weights and frozen parameters are fine.
        data: ``data.batch(i)`` is batch i, a pure function of i, with ``options.batch_size`` rows.
        options: see :class:`TrainingOptions`.
        out: folder for ``checkpoints/``, ``metrics.jsonl``, ``metrics.csv`` and ``tensorboard/``; None writes nothing.
        resume: continue from the newest whole checkpoint in ``out``, or begin where there is none.
        objective: ``(model, batch) -> (mean loss, metrics)``. The loss of a step is the mean over all its targets, also
            where batches or processes have different numbers of them.
        optimizer: ``(model, options) -> torch optimizer``; its state must load with ``weights_only=True``.
        evaluate: called with the model in eval mode, without gradients, on the first process; its numbers are recorded
            as ``evaluation/<name>``.
        console: where progress goes; stderr if not given.

    Raises:
        ValueError, TypeError: options, data, objective or model that do not fit each other; ``out`` already holds a run
            and ``resume`` is false.
        CheckpointError: there are checkpoints to resume from and none is usable.
        NonFiniteLoss: a loss, gradient or weight is NaN or infinite; step, batch and layer are named, and nothing is
            written.
        OSError: ``out`` cannot be written, or the disk is full; earlier checkpoints are intact.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came: after a checkpoint at the end of the step.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from subquad.training import Batch, TrainingOptions, train
        >>> class Counting:
        ...     def batch(self, index):
        ...         tokens = (torch.arange(9) + torch.arange(index, index + 4)[:, None]) % 10
        ...         return Batch(tokens[:, :-1], tokens[:, 1:])
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=16, n_layer=1, n_head=1))
        >>> options = TrainingOptions(steps=60, batch_size=4, learning_rate=1e-2, warmup_steps=5)
        >>> result = train(model, Counting(), options, out=None, console=Console(quiet=True))
        >>> result.step, result.loss < result.history[0]["loss"] / 2
        (60, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}")
    if not isinstance(options, TrainingOptions):
        raise TypeError(f"options must be TrainingOptions; got {type(options).__name__}")
    if not hasattr(data, "batch"):
        raise TypeError(f"data must have a method batch(index); got {type(data).__name__}")
    if out is None and resume:
        raise ValueError("resume=True needs out, the folder of the run to resume")
    folder = Path(out) if out is not None else None
    was_training = model.training
    started = time.monotonic()
    with ExitStack() as stack:
        accelerator = stack.enter_context(accelerator_for(options))
        stack.enter_context(random_state.preserved(accelerator.device))
        stack.callback(model.train, was_training)
        stop = stack.enter_context(StopSignal())
        run = _Run(model, data, options, objective, optimizer, accelerator, folder, resume)
        log_folder = folder if accelerator.is_main_process else None
        log = MetricsLog(log_folder, resumed_step=run.step, tensorboard=options.tensorboard)
        stack.callback(log.close)
        console = console or Console(stderr=True, quiet=not accelerator.is_main_process)
        progress = stack.enter_context(ProgressDisplay(console, options.steps, run.step))
        first, tokens_before = run.step, run.tokens
        ended = None if run.step < options.steps else "finished"
        while ended is None:
            late = options.max_seconds is not None and time.monotonic() - started > options.max_seconds
            values, stopping, late = run.advance(stop.received is not None, late)
            last = run.step == options.steps
            if evaluate is not None and (last or _due(run.step, options.eval_every)):
                values |= run.evaluate(evaluate)
            elapsed = time.monotonic() - started
            speed = (run.tokens - tokens_before) / elapsed
            if last or _due(run.step, options.log_every) or any(name.startswith("evaluation/") for name in values):
                log.write(run.step, values, {"tokens_per_second": speed})
            seconds_left = elapsed / (run.step - first) * (options.steps - run.step)
            progress.show(run.step, values["loss"], speed, seconds_left)
            if last or stopping or late or _due(run.step, options.save_every):
                run.save(log)
            if last:
                ended = "finished"
            elif stopping or late:
                ended = "signal" if stopping else "time"
    saved = f"; the checkpoint is {run.checkpoint}" if run.checkpoint else ""
    stop.raise_received(f"stopped after step {run.step} of {options.steps}{saved}")
    if ended == "signal":
        raise KeyboardInterrupt(
            f"another process was told to stop; stopped after step {run.step} of {options.steps}{saved}"
        )
    return TrainingResult(
        step=run.step,
        stopped=ended,
        loss=log.history[-1]["loss"] if log.history else math.nan,
        tokens=run.tokens,
        seconds=time.monotonic() - started,
        checkpoint=run.checkpoint,
        history=log.history,
    )


class _Run:
    """The state that a step changes and a checkpoint holds: weights, optimizer, scheduler, loss scale, step, tokens."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        options: TrainingOptions,
        objective: Objective,
        optimizer: OptimizerFactory,
        accelerator: Accelerator,
        folder: Path | None,
        resume: bool,
    ) -> None:
        self.model, self.data, self.options = model, data, options
        self.objective, self.accelerator = objective, accelerator
        self.folder = folder / "checkpoints" if folder is not None else None
        self.step = self.tokens = 0
        self.checkpoint: Path | None = None
        found = on_main_process(accelerator, lambda: self._find(resume))
        if found is not None:
            checkpoints.load_weights(found, model)
        self.step_module = accelerator.prepare_model(StepModule(model, objective))
        plain_optimizer = optimizer(model, options)
        self.scheduler = learning_rate_schedule(plain_optimizer, options)
        self.optimizer = accelerator.prepare_optimizer(plain_optimizer)
        if found is not None:
            self._restore(found)
        model.train()

    def advance(self, stopping: bool, late: bool) -> tuple[dict[str, float], bool, bool]:
        """One optimizer step. Returns its record, and whether any process is ``stopping`` or ``late``."""
        options, accelerator = self.options, self.accelerator
        step = self.step + 1
        batches = self._batches(step)
        targets = sum(count_targets(batch.labels) for batch in batches)
        if targets == 0:
            first = (step - 1) * options.accumulate
            raise ValueError(f"step {step} has nothing to learn: every label from data.batch({first}) on is ignored")
        random_state.reseed(options.seed, step, accelerator.process_index)
        if isinstance(self.objective, ScheduledObjective):
            self.objective.begin_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        losses, parts = [], []
        for number, batch in enumerate(batches):
            mine = rows_of_process(batch, accelerator)
            weight = count_targets(mine.labels) / targets
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.step_module):
                loss, metrics = self.step_module(send_to_device(mine, accelerator.device))
                # gradients are averaged over processes, and this is a sum of shares of one mean
                accelerator.backward(loss * (weight * accelerator.num_processes))
            losses.append(loss.detach())
            parts.append(weight * torch.stack([loss.detach().float(), *(value.float() for value in metrics.values())]))
        flags = torch.tensor([stopping, late], dtype=torch.float32, device=accelerator.device)
        loss_value, *metric_values, stops, lates = summed(accelerator, torch.cat([torch.stack(parts).sum(0), flags]))
        if not math.isfinite(loss_value):
            self._blame_loss(step, batches, losses, loss_value)
        values = {
            "loss": loss_value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self._clip(step),
        }
        self.optimizer.step()
        self.scheduler.step()
        self.step = step
        self.tokens += sum(batch.labels.numel() for batch in batches)
        values["tokens"] = self.tokens
        values |= dict(zip(metrics, metric_values, strict=True))
        return values, stops > 0, lates > 0

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                measured = on_main_process(self.accelerator, lambda: evaluation(self.model))
        finally:
            self.model.train()
        if not isinstance(measured, dict):
            raise TypeError(f"evaluate must return a dictionary of numbers; got {type(measured).__name__}")
        return {f"evaluation/{name}": float(value) for name, value in measured.items()}

    def save(self, log: MetricsLog) -> None:
        """Writes a checkpoint of the current step, where there is a folder for it."""
        folder = self.folder
        if folder is None:
            return
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        details = {
            "options": asdict(self.options),
            "tokens": self.tokens,
            "next_batch": self.step * self.options.accumulate,
            "random_state": {"seed": self.options.seed, "next_step": self.step + 1},
        }

        def write() -> Checkpoint:
            bad = first_non_finite_parameter(self.model, gradient=False)
            if bad is not None:
                raise NonFiniteLoss(self.step, None, bad, f"the step made the weight {bad!r} non-finite")
            log.sync()
            return checkpoints.write_checkpoint(folder, self.step, self.model, state, details, keep=self.options.keep)

        self.checkpoint = on_main_process(self.accelerator, write).path

    def _find(self, resume: bool) -> Checkpoint | None:
        if self.folder is None:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the run's folder {self.folder.parent} cannot be made: {error.strerror}") from error
        if not resume and checkpoints.finished(self.folder):
            newest = checkpoints.finished(self.folder)[0].name
            raise ValueError(
                f"{self.folder.parent} already holds a run, at {newest}: "
                "pass resume=True to continue it, or another folder"
            )
        found = checkpoints.find_latest(self.folder)
        if found is not None:
            differences = self.options.differences(found.details["options"])
            if differences:
                raise ValueError(f"these options do not continue {found.path}: {'; '.join(differences)}")
            if found.step > self.options.steps:
                raise ValueError(f"{found.path} is beyond steps = {self.options.steps}")
        return found

    def _restore(self, found: Checkpoint) -> None:
        state = checkpoints.load_state(found)
        stored = [group.get("param_names") for group in state["optimizer"]["param_groups"]]
        present = [group.get("param_names") for group in self.optimizer.param_groups]
        if stored != present:
            raise CheckpointError(f"checkpoint {found.path} is of an optimizer over other parameters than this one's")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.checkpoint = found.step, found.details["tokens"], found.path

    def _batches(self, step: int) -> list[BatchLike]:
        first = (step - 1) * self.options.accumulate
        batches = []
        for index in range(first, first + self.options.accumulate):
            batch = self.data.batch(index)
            check_batch(batch, index, self.options.batch_size)
            batches.append(batch)
        return batches

    def _clip(self, step: int) -> float:
        """Clips the gradients and returns their norm before that. With fp16 the scaler skips a step that overflowed."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm)
        if not math.isfinite(value) and self.accelerator.scaler is None:
            bad = first_non_finite_parameter(self.model, gradient=True)
            what = f"the gradient of {bad!r} is not finite" if bad else "the gradient's norm overflows"
            raise NonFiniteLoss(step, None, bad or "gradient norm", f"the loss is finite, but {what}")
        if self.options.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.options.clip, norm)
        return value

    def _blame_loss(self, step: int, batches: list[BatchLike], losses: list[Tensor], value: float) -> None:
        """Raises NonFiniteLoss on every process, for the first batch of the first process that has one to blame."""
        number = next((n for n, loss in enumerate(losses) if not torch.isfinite(loss)), None)
        report = None
        if number is not None:
            random_state.reseed(self.options.seed, step, self.accelerator.process_index)
            module = StepModule(self.model, self.objective)
            mine = [rows_of_process(batch, self.accelerator) for batch in batches[: number + 1]]
            *before, batch = send_to_device(mine, self.accelerator.device)
            with self.accelerator.autocast():
                for earlier in before:  # draws from the random generators what the step drew
                    module(earlier)
                layer, what = first_non_finite(self.model, batch.inputs, lambda: module(batch)[0])
            index = (step - 1) * self.options.accumulate + number
            report = (index, layer, f"the loss is {float(losses[number])}: {what}")
        report = first_of_any_process(self.accelerator, report)
        if report is None:
            raise NonFiniteLoss(step, None, "metrics", f"the losses are finite and their sum is {value}")
        raise NonFiniteLoss(step, *report)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
