"""The options of a training run: one frozen record, checked when it is made."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("cosine", "constant", "one_cycle")
PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained: optimizer, schedule, precision, and how often to evaluate, record and save.

    Args:
        steps: optimizer steps in the whole run, counted from 1.
        batch_size: rows of every ``data.batch(i)``, over all processes together.
        learning_rate: the peak of the schedule.
        weight_decay: AdamW's decoupled decay, for the weights that :func:`~subquad.training.parameter_groups` decays.
        betas, epsilon: AdamW's.
        warmup_steps: steps over which the learning rate rises linearly (``one_cycle``: along a cosine).
        schedule: what follows the warm-up: ``"cosine"`` down to ``final_learning_rate`` at the last step,
            ``"constant"``, or ``"one_cycle"`` (Smith and Topin 2018; torch's ``OneCycleLR``, momentum not cycled).
        final_learning_rate: where the cosine ends.
        clip: largest norm of the gradient, over all parameters; None for no clipping.
        accumulate: batches per optimizer step; step ``s`` begins with batch ``(s - 1) * accumulate``.
        precision: ``"no"`` computes in the weights' dtype, ``"bf16"`` and ``"fp16"`` under autocast (fp16: GPU only).
        device: ``"auto"`` takes the accelerator that torch finds, else the CPU; ``"cpu"`` always the CPU.
        eval_every: steps between evaluations; None evaluates after the last step only.
        save_every: steps between checkpoints; None saves at the end (or when the run is stopped) only.
        keep: checkpoints that stay on disk; an older one is what a damaged newest one falls back to.
        log_every: steps between records of the metrics.
        max_seconds: stop at the first step boundary after so many seconds, with a checkpoint.
        seed: of the run: every step reseeds the random generators from (seed, step).
        find_unused_parameters: on several processes, for a model that leaves parameters without gradient in some steps.
        tensorboard: also write TensorBoard events, where the package ``tensorboard`` is installed.

    Raises:
        TypeError, ValueError: a field of the wrong kind or out of range; the message names it and what is needed.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    warmup_steps: int = 0
    schedule: str = "cosine"
    final_learning_rate: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "no"
    device: str = "auto"
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 1
    max_seconds: float | None = None
    seed: int = 0
    find_unused_parameters: bool = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep", "log_every"):
            _check_integer(name, getattr(self, name), least=1)
        for name in ("eval_every", "save_every"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least=1, otherwise=" or None")
        for name in ("warmup_steps", "seed"):
            _check_integer(name, getattr(self, name), least=0)
        for name in ("learning_rate", "epsilon"):
            _check_number(name, getattr(self, name), "a number > 0", lambda x: x > 0)
        for name in ("weight_decay", "final_learning_rate"):
            _check_number(name, getattr(self, name), "a number >= 0", lambda x: x >= 0)
        for name in ("clip", "max_seconds"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), "a number > 0 or None", lambda x: x > 0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers; got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            _check_number("betas", beta, "two numbers in [0, 1)", lambda x: 0 <= x < 1)
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("device", DEVICES)):
            _check_choice(name, getattr(self, name), choices)
        for name in ("find_unused_parameters", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if self.warmup_steps >= self.steps and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps must be less than steps = {self.steps}; got {self.warmup_steps}")
        if self.schedule == "one_cycle" and self.warmup_steps < 2:
            raise ValueError(
                "schedule 'one_cycle' rises for warmup_steps steps, which must be at least 2 (3/10 of steps is usual)"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be at most learning_rate = {self.learning_rate}; "
                f"got {self.final_learning_rate}"
            )
        if self.final_learning_rate and self.schedule != "cosine":
            raise ValueError(f"final_learning_rate belongs to schedule 'cosine'; the schedule is {self.schedule!r}")

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Where a run with these options would not continue one with ``earlier`` (the fields that a checkpoint stores).

        How often to evaluate, save and record may change, and where the schedule is constant so may ``steps``.
        """
        fields = list(TRAJECTORY_FIELDS) + (["steps"] if self.schedule != "constant" else [])
        mine = {name: getattr(self, name) for name in fields} | {"betas": list(self.betas)}
        return [
            f"{name} is {mine[name]!r} and was {earlier.get(name)!r}"
            for name in fields
            if mine[name] != earlier.get(name)
        ]


TRAJECTORY_FIELDS = (
    "batch_size",
    "learning_rate",
    "weight_decay",
    "betas",
    "epsilon",
    "warmup_steps",
    "schedule",
    "final_learning_rate",
    "clip",
    "accumulate",
    "precision",
    "seed",
)


def _check_integer(name: str, value: Any, least: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {least}{otherwise}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}{otherwise}; got {value}")


def _check_number(name: str, value: Any, needed: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {needed}; got {value!r}")
    if not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {needed}; got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}{hint}")
